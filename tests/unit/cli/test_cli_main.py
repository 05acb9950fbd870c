"""The command itself: help, versions, mistakes, interrupts, full disks, readers that leave."""

import argparse
import errno
import os
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit.cli.conftest import Say
from ultrathink import __version__
from ultrathink.cli.main import COMMANDS, main
from ultrathink.core.errors import ConfigError

Run = Callable[[argparse.Namespace], int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Adds a command ``probe`` that does what the test says."""

    def add(run: Run) -> None:
        module = types.ModuleType("ultrathink.cli.probe")

        def configure(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("words", nargs="*")
            parser.add_argument("--json", action="store_true")
            parser.add_argument("--name")

        vars(module).update(configure=configure, run=run, EPILOG="")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(COMMANDS, "probe", "probe this")

    return add


def failing(error: BaseException) -> Run:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(argv: list[str], say: Say) -> None:
    out = say(*argv)
    for name, summary in COMMANDS.items():
        assert f"  {name}" in out
        assert summary in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, say: Say) -> None:
    out = say(name, "--help")
    assert out.startswith(f"usage: ultrathink {name}")
    assert "examples:" in out
    assert "--debug" in out


def test_flags_may_stand_anywhere(command: Callable[[Run], None]) -> None:
    seen = []
    command(lambda args: seen.append(args) or 7)
    assert main(["probe", "a", "--json", "b=1", "--debug", "--name", "x", "c=2"]) == 7
    assert (seen[0].words, seen[0].json, seen[0].name) == (["a", "b=1", "c=2"], True, "x")
    assert main(["--debug", "probe", "a"]) == 7


def out_of_memory() -> RuntimeError:
    """What torch raises."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)
    return caught.value


NO_MEMORY = "memory did not suffice; take a smaller model or shorter sequences"
SYSTEM = {
    errno.ENOSPC: "; free some space on that disk, or choose another folder with run.dir",
    errno.EACCES: "; choose a folder that you may write to, for example with run.dir",
    errno.EIO: " (--debug shows where)",
}
ENDINGS = [
    (KeyboardInterrupt(), 130, "interrupted\n"),
    (MemoryError(), 1, f"error: {NO_MEMORY}.\n"),
    (out_of_memory(), 1, f"error: {NO_MEMORY}.\n"),
    (ConfigError("a: no.\nb: no."), 2, "error: a: no.\n       b: no.\n"),
    *(
        (OSError(number, "It failed", "runs/a"), 1, f"error: It failed: runs/a{advice}.\n")
        for number, advice in SYSTEM.items()
    ),
]


@pytest.mark.parametrize(("error", "status", "text"), ENDINGS)
def test_what_ends_a_command_is_one_line_and_with_debug_a_trace(
    error: BaseException,
    status: int,
    text: str,
    command: Callable[[Run], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(failing(error))
    assert main(["probe"]) == status
    assert capsys.readouterr() == ("", text)
    with pytest.raises(type(error)):
        main(["probe", "--debug"])


def test_a_fault_of_ours_keeps_its_trace(command: Callable[[Run], None]) -> None:
    command(failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["probe"])


WITHOUT_TORCH = """
import sys
from ultrathink.cli.main import main
for words in sys.argv[1:]:
    assert main(words.split()) == 0
    heavy = [name for name in ("torch", "numpy", "transformers", "rich") if name in sys.modules]
    assert not heavy, (words, heavy)
    assert "ultrathink.cli.runs" not in sys.modules  # a command is imported when it is used
"""


def test_what_needs_no_torch_does_not_wait_for_it() -> None:
    helps = [f"{name} --help" for name in ("train", "generate", "")]
    words = [*helps, "config show", "config check", "config schema"]
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def ultrathink(*words: str, **options: Any) -> Any:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "ultrathink", *words]
    return subprocess.run(command, stderr=subprocess.PIPE, timeout=60, **options)


def test_the_module_is_the_command() -> None:
    done = ultrathink("--version", stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode() == f"ultrathink {__version__}\n"


@pytest.mark.parametrize("argv", [["config", "docs"], ["--version"]])  # much text, and little
def test_a_reader_that_leaves_ends_the_program_quietly(argv: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = ultrathink(*argv, stdout=writing, env=kept)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_encoding_that_lacks_a_character_is_no_error() -> None:
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = ultrathink("config", "docs", stdout=subprocess.PIPE, check=True, env=ascii_only)
    assert b"\\u221a" in done.stdout  # the root sign
