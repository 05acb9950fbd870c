"""What ``ultrathink launch`` hands on to the processes that it starts."""

from ultrathink.cli import launch
from ultrathink.cli.main import load_command


def test_the_processes_are_started_with_the_arguments_of_train() -> None:
    words = [
        *("--nproc", "2", "debug", "training.max_steps=3", "--plugin", "parts.py", "--json"),
        *("--max-restarts", "1", "--log-dir", "logs"),
    ]
    args = load_command("launch")[0].parse(words)
    assert launch._train_arguments(args) == [
        *("debug", "training.max_steps=3", "--plugin", "parts.py", "--json"),
    ]
    args = load_command("launch")[0].parse(["--resume", "demo@5", "--reset", "data"])
    assert launch._train_arguments(args) == ["--resume", "demo@5", "--reset", "data"]
