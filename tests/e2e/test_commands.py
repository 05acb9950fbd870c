"""The commands of the README, run as a user runs them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.stress import evidence
from tests.stress.process import Session, ultrathink
from ultrathink.cli.main import main

README = Path(__file__).parents[2] / "README.md"
TINY = ("training.max_steps=6", "training.checkpoint={every_steps: 2, keep: 9}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("e2e")


def command(
    place: Path, *words: str, stdin: str = "", status: int = 0
) -> subprocess.CompletedProcess[str]:
    done = ultrathink(place, *words, stdin=stdin)
    assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """Status, standard output and errors of a command, without a process of its own."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("ULTRATHINK_CACHE", str(place / "cache"))

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(words), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A finished run of the debug preset."""
    done = command(place, "train", "debug", *TINY, "--json")
    result = json.loads(done.stdout)  # and nothing else stands there
    assert result["ending"] == "finished"
    assert result["step"] == 6
    assert result["bits_per_byte"] > 0
    return place / result["run"]


def test_train_tells_its_course_and_what_to_do_next(place: Path) -> None:
    done = command(place, "train", "debug", "training.max_steps=3", "run.name=reported")
    assert done.stdout == ""
    said = done.stderr
    for part in (
        "step 3/3",
        "bits/byte",
        "sample after step 3",
        "Run folder: runs/reported",
        "ultrathink generate runs/reported",
    ):
        assert part in said
    assert "\x1b[" not in said  # no colour codes where nobody sees colours


def test_a_second_run_of_a_name_gets_a_number(said: Said, run: Path) -> None:
    _, out, _ = said("train", "debug", "training.max_steps=1", "--json")
    assert re.fullmatch(r"runs/debug-\d", json.loads(out)["run"])


def test_a_file_and_overrides(place: Path) -> None:
    (place / "books").mkdir()
    for number in range(30):
        (place / "books" / f"{number}.txt").write_text(
            f"It was a dark and stormy night, number {number}. " * 40
        )
    (place / "mine.yaml").write_text(
        "model: {hidden_size: 32, num_layers: 1, num_heads: 2}\n"
        "tokenizer: {type: bpe, vocab_size: 300}\n"
        "data: {seq_len: 32, train: [{type: text, path: books}]}\n"
        "training: {max_steps: 5, batch_size: 4, compile: false}\n"
    )
    done = command(place, "train", "mine.yaml", "training.max_steps=2", "--json")
    result = json.loads(done.stdout)
    assert result["run"] == "runs/mine"
    assert result["step"] == 2
    why = command(place, "config", "show", "runs/mine", "--why").stdout
    assert re.search(r"training\.max_steps: 2 +# override training\.max_steps=2", why)
    assert re.search(r"model\.hidden_size: 32 +# file mine\.yaml", why)
    assert re.search(r"model\.vocab_size: 300 +# derived from the tokenizer", why)
    assert re.search(r"training\.micro_batch_size: 4 +# chosen at run time", why)


def test_resuming_a_finished_run_says_so(said: Said, run: Path) -> None:
    status, out, reported = said("train", "--resume", "debug")
    assert (status, out) == (0, "")
    assert "is finished: step 6 was its last" in reported
    assert json.loads(said("train", "--resume", "debug", "--json")[1])["step"] == 6


def test_resume_from_an_earlier_step_in_another_process_gives_the_same_run(
    place: Path, run: Path
) -> None:
    def losses() -> list[float]:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows]

    def tensors() -> dict[str, torch.Tensor]:
        files = (run / "checkpoints" / "last").glob("*.safetensors")
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    losses_before, before = losses(), tensors()
    command(place, "train", "--resume", f"{run}@2")
    after = tensors()
    assert losses() == losses_before
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_resume_takes_changes_but_not_of_the_shape(said: Said, place: Path) -> None:
    assert said("train", "debug", "run.name=longer", "training.max_steps=2")[0] == 0
    status, _, errors = said("train", "--resume", "longer", "model.num_layers=9")
    assert status == 2
    assert "model.num_layers cannot change to 9 in a resumed run" in errors
    done = command(place, "train", "--resume", "longer", "training.max_steps=4")
    assert "changed after step 2: training.max_steps: 2 -> 4" in done.stderr
    assert "Finished after step 4" in done.stderr


def test_generate_streams_what_json_returns(said: Said, place: Path, run: Path) -> None:
    words = ("generate", str(run), "the ", "--max-new-tokens", "12", "--temperature", "0")
    streamed = said(*words)[1]
    result = json.loads(said(*words, "--json")[1])
    assert streamed == f"the {result['text']}\n"
    assert result["new_tokens"] <= 12
    assert result["finish_reason"] in ("length", "end_of_text")
    from_stdin = command(place, "generate", "debug@last", "-", *words[3:], "--json", stdin="the ")
    assert json.loads(from_stdin.stdout)["text"] == result["text"]


def test_a_seed_repeats_and_another_differs(said: Said, run: Path) -> None:
    words = ("generate", "debug", "the ", "--temperature", "1", "--max-new-tokens", "40", "--json")
    one, again, other = (
        json.loads(said(*words, "--seed", seed)[1])["text"] for seed in ("1", "1", "2")
    )
    assert one == again != other


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_can_be_resumed(
    place: Path, number: signal.Signals
) -> None:
    name = f"stopped-{number.name}"
    words = ("training.max_steps=100000", f"run.name={name}", "training.log_every=1")
    session = Session(place, place / "runs" / name, "train", "debug", *words)
    try:
        assert session.wait_until(lambda: session.step() > 3)
        session.process.send_signal(number)
        session.wait_until(lambda: False)
    finally:
        session.kill()
    assert session.process.returncode == 128 + number
    assert "Traceback" not in session.stderr
    assert "saving after this step; once more ends the run at once" in session.stderr
    assert f"ultrathink train --resume runs/{name}" in session.stderr
    assert evidence.steps(session.run)[-1] == session.step()


def test_a_run_that_fails_before_it_starts_leaves_no_folder(place: Path) -> None:
    gone = "data.train=[{type: text, path: nothing.txt}]"
    command(place, "train", "debug", "run.name=never", gone, status=2)
    assert not (place / "runs" / "never").exists()


def test_a_plugin_file_adds_parts_that_a_config_can_name(place: Path) -> None:
    (place / "my_parts.py").write_text(
        "from typing import Literal\n"
        "import torch\n"
        "from ultrathink.config.optimizer import OPTIMIZERS, OptimizerConfig\n"
        "class PlainConfig(OptimizerConfig):\n"
        "    type: Literal['plain'] = 'plain'\n"
        "    lr: float = 0.5\n"
        "@OPTIMIZERS.register('plain', options=PlainConfig)\n"
        "def build_plain(config, model):\n"
        "    return [torch.optim.SGD(model.parameters(), lr=config.lr)]\n"
    )
    plain = ("run.name=plain", "training.optimizer.type=plain")
    words = ("train", "debug", "training.max_steps=1", *plain, "--json")
    assert "there is no optimizer called 'plain'" in command(place, *words, status=2).stderr
    done = command(place, *words, "--plugin", "my_parts.py")
    assert json.loads(done.stdout)["step"] == 1


def test_the_readme_opens_with_the_two_commands() -> None:
    blocks = re.findall(r"^    (.+)$", README.read_text(), re.MULTILINE)
    assert blocks[0] == "pip install -e . && ultrathink train"
    assert blocks[1] == 'pip install -e ".[test]" && pytest'
