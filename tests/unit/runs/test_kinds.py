"""What kind of checkpoint and run a command is given, and what it says of another."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.runs.trained_runs import rewrite_state, train
from ultrathink.checkpoint.format import Header, load_checkpoint, read_header, save_checkpoint
from ultrathink.cli.main import main
from ultrathink.runs.folder import RunFolder

Out = pytest.CaptureFixture[str]
COMMANDS = (
    ("train", "--resume", "{run}", "training.max_steps=3"),
    ("train", "debug", "training.init_from={run}", "training.max_steps=1"),
    ("generate", "{run}", "the "),
    ("export", "{run}"),
    ("checkpoint", "consolidate", "{run}"),
    ("checkpoint", "info", "{run}"),
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return train(tmp_path, "training.max_steps=2").path


def as_before(content: dict[str, Any]) -> None:
    """As the version before wrote it."""
    del content["kind"], content["base"]
    content["format"] = 1


def reported(command: tuple[str, ...], run: Path, capsys: Out) -> list[str]:
    """The lines that a command fails with."""
    capsys.readouterr()
    assert main([word.format(run=run) for word in command]) == 2
    return capsys.readouterr().err.strip().splitlines()


def test_checkpoints_and_runs_of_an_earlier_version_are_refused_in_a_sentence(
    run: Path, capsys: Out
) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest.pop("kind") == "train"
    rewrite_state(RunFolder(run).checkpoint("last"), as_before)
    for command in COMMANDS:
        [line] = reported(command, run, capsys)
        assert "was written by another version of ultrathink (format 1, this" in line, command
    assert main(["runs", str(run.parent)]) == 0
    assert "was written by another version" in capsys.readouterr().out
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.yaml").write_text("what: {it: knew}\n")  # its options are not looked at
    [line] = reported(COMMANDS[0], run, capsys)
    assert f"run {run} was written by an earlier version of ultrathink" in line


def test_another_kind_is_refused_in_a_sentence(run: Path, capsys: Out) -> None:
    adapter = {"kind": "adapter", "base": "0123456789abcdef"}
    rewrite_state(RunFolder(run).checkpoint("last"), lambda content: content.update(adapter))
    for command in COMMANDS[:-1]:
        [line] = reported(command, run, capsys)
        assert "is of kind 'adapter', made for the model 0123456789ab," in line, command
        assert "needs kind 'model'" in line
    assert main(["checkpoint", "info", str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["base"]) == ("adapter", "0123456789abcdef")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "kind": "serve"}))
    [line] = reported(COMMANDS[0], run, capsys)
    assert "is of kind 'serve', but this command needs kind 'train'" in line


def test_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    header = Header("probe", "abc")
    save_checkpoint(tmp_path / "c", {"weight": 1}, header=header)
    assert read_header(tmp_path / "c") == header
    assert load_checkpoint(tmp_path / "c", kind="probe") == {"weight": 1}
