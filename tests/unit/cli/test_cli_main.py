"""The command itself: help, versions, mistakes, interrupts, full disks, readers that leave."""

import argparse
import errno
import os
import subprocess
import sys
import types
from collections.abc import Callable

import pytest
import torch

from ultrathink import __version__
from ultrathink.cli import main as main_module
from ultrathink.cli.main import COMMANDS, load_command, main
from ultrathink.core.errors import ConfigError

Run = Callable[[argparse.Namespace], int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Adds a command ``probe`` that does what the test says."""

    def add(run: Run) -> None:
        module = types.ModuleType("probe_command")

        def configure(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("words", nargs="*")
            parser.add_argument("--json", action="store_true")
            parser.add_argument("--name")

        module.configure = configure  # type: ignore[attr-defined]
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "probe_command", module)
        monkeypatch.setitem(COMMANDS, "probe", ("probe_command", "probe this"))

    return add


def failing(error: BaseException) -> Run:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name}" in out
        assert summary in out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ultrathink {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: ultrathink {name}")
    assert "examples:" in out
    assert "--debug" in out


def test_an_unknown_command_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["trian"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: there is no command 'trian'. Did you mean 'train'? See: ultrathink --help\n"
    )
    assert main(["--verbose"]) == 2
    assert "there is no option '--verbose'." in capsys.readouterr().err


def test_an_unknown_flag_is_answered_with_the_nearest(
    command: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(lambda args: 0)
    assert main(["probe", "--jsn"]) == 2
    assert capsys.readouterr().err == (
        "error: --jsn is not known here; did you mean --json? See: ultrathink probe --help\n"
    )
    assert main(["probe", "--zzz=3"]) == 2
    assert "error: --zzz is not known here. See: ultrathink probe" in capsys.readouterr().err
    assert main(["probe", "--name"]) == 2
    assert "error: argument --name: expected one argument. See:" in capsys.readouterr().err
    assert main(["probe", "--js"]) == 2  # no abbreviations, which new flags would break


def test_flags_may_stand_anywhere(command: Callable[[Run], None]) -> None:
    seen = []
    command(lambda args: seen.append(args) or 7)
    assert main(["probe", "a", "--json", "b=1", "--debug", "--name", "x", "c=2"]) == 7
    assert (seen[0].words, seen[0].json, seen[0].name) == (["a", "b=1", "c=2"], True, "x")
    assert main(["--debug", "probe", "a"]) == 7


def test_a_mistake_of_the_user_is_a_message_and_no_trace(
    command: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(failing(ConfigError("model.x: wrong.\nmodel.y: wrong too.")))
    assert main(["probe"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: model.x: wrong.\n       model.y: wrong too.\n"
    with pytest.raises(ConfigError):
        main(["probe", "--debug"])


def out_of_memory() -> RuntimeError:
    """What torch raises."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)
    return caught.value


NO_MEMORY = "error: memory did not suffice; take a smaller model or shorter sequences.\n"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            1,
            "error: No space left on device: runs/a; free some space on that disk, or choose "
            "another folder with run.dir.\n",
        ),
        (
            OSError(errno.EACCES, "Permission denied", "runs/a"),
            1,
            "error: Permission denied: runs/a; choose a folder that you may write to, for example "
            "with run.dir.\n",
        ),
        (
            OSError(errno.EIO, "Input/output error", "runs/a"),
            1,
            "error: Input/output error: runs/a (--debug shows where).\n",
        ),
        (MemoryError(), 1, NO_MEMORY),
        (out_of_memory(), 1, NO_MEMORY),
    ],
)
def test_what_ends_a_command_is_one_line_and_with_debug_a_trace(
    error: BaseException,
    status: int,
    text: str,
    command: Callable[[Run], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(failing(error))
    assert main(["probe"]) == status
    assert capsys.readouterr().err == text
    with pytest.raises(type(error)):
        main(["probe", "--debug"])


def test_a_fault_of_ours_keeps_its_trace(command: Callable[[Run], None]) -> None:
    command(failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["probe"])


def test_a_command_is_imported_only_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = []
    real = main_module.importlib.import_module
    monkeypatch.setattr(
        main_module.importlib, "import_module", lambda name: imported.append(name) or real(name)
    )
    load_command("config")
    assert imported == ["ultrathink.cli.config"]


WITHOUT_TORCH = """
import sys
from ultrathink.cli.main import main
for words in sys.argv[1:]:
    assert main(words.split()) == 0
    heavy = [name for name in ("torch", "numpy", "transformers", "rich") if name in sys.modules]
    assert not heavy, (words, heavy)
"""


def test_what_needs_no_torch_does_not_wait_for_it() -> None:
    helps = [f"{name} --help" for name in ("train", "generate", "")]
    words = [*helps, "config show", "config check", "config schema"]
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ultrathink", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == f"ultrathink {__version__}\n"


@pytest.mark.parametrize("argv", [["config", "docs"], ["--version"]])  # much text, and little
def test_a_reader_that_leaves_ends_the_program_quietly(argv: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "ultrathink", *argv],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 141


def test_an_encoding_that_lacks_a_character_is_no_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ultrathink", "config", "docs"],
        capture_output=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert b"\\u221a" in done.stdout  # the root sign
