"""Checking a run that was trained, after damage to each of its parts."""

import itertools
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.unit.checkpoint.disks import flip
from tests.unit.runs.trained_runs import rewrite_state, train
from ultrathink.checkpoint.format import load_checkpoint
from ultrathink.core.errors import CheckpointError
from ultrathink.runs.checking import Check, check_run, run_to_check
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.lock import RunLock

LAST = "checkpoints/step_00000006"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(
        tmp_path_factory.mktemp("trained"),
        "training.max_steps=6",
        "training.log_every=2",
        "training.checkpoint={every_steps: 2, keep: 9}",
        "training.eval.every_steps=4",
    )


@pytest.fixture
def run(trained: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy to damage."""
    return RunFolder(shutil.copytree(trained.path, tmp_path / "copy", symlinks=True))


def damage(check: Check) -> dict[str, str]:
    return {f.item: f.detail for f in check.findings if f.status == "damaged"}


def notes(check: Check) -> dict[str, str]:
    return {f.item: f.detail for f in check.findings if f.status == "note"}


def test_a_trained_run_is_sound_in_all_its_parts(trained: RunFolder) -> None:
    before = {path: path.lstat().st_mtime_ns for path in trained.path.rglob("*")}
    check = check_run(trained)
    assert check.is_sound
    assert check.can_resume
    assert (check.newest_sound, check.newest) == (6, 6)
    checkpoints = {f"checkpoints/step_0000000{step}" for step in (2, 4, 6)}
    assert {f.item for f in check.findings} >= checkpoints | {
        *("config.yaml", "manifest.json", "tokenizer", "segments.jsonl", "metrics.jsonl"),
        *("checkpoints/last", "checkpoints/best"),
    }
    assert {f.status for f in check.findings} == {"ok"}
    assert before == {path: path.lstat().st_mtime_ns for path in trained.path.rglob("*")}


def test_the_token_cache_is_looked_at_where_that_is_asked_for(trained: RunFolder) -> None:
    check = check_run(trained, data=True)
    assert check.is_sound
    assert {f.item for f in check.findings} >= {"text", "tokens of dummy (train)"}
    for path in (trained.path.parents[1] / "cache" / "tokens").glob("*/tokens.bin"):
        flip(path)
    assert check_run(trained).is_sound
    check = check_run(trained, data=True)
    assert "other content than was written" in damage(check)["tokens of dummy (train)"]
    assert check.can_resume


def test_one_wrong_bit_or_a_file_that_is_gone_is_named(run: RunFolder) -> None:
    [file] = run.checkpoint(6).glob("*2-of-*")
    flip(file)
    check = check_run(run)
    assert damage(check)[LAST] == f"{file.name}: content differs from its checksum"
    assert damage(check)["checkpoints/last"] == "leads to step_00000006, which is damaged"
    assert (check.newest_sound, check.can_resume) == (4, True)
    (run.step_path(4) / "checksums.json").unlink()
    check = check_run(run)
    assert damage(check)["checkpoints/step_00000004"].startswith("checksums.json is missing")
    assert check.newest_sound == 2
    assert check_run(run, "4").newest_sound is None


def test_a_checkpoint_of_another_step_or_run_is_recognized_by_its_state(run: RunFolder) -> None:
    def reported(part: str, **values: Any) -> str:
        rewrite_state(run.checkpoint(6), lambda content: content["state"].update({part: values}))
        return damage(check_run(run))[LAST]

    other = "it was made with another tokenizer (hash 000000000000)"
    assert reported("identity", tokenizer_hash="0" * 64) == other
    assert reported("progress", step=5) == "it holds step 5, not 6"
    assert reported("progress").startswith("its state.json does not name its step")


def test_a_configuration_that_does_not_fit_is_damaged_or_gone(run: RunFolder) -> None:
    path = run.path / "config.yaml"
    path.write_text(path.read_text().replace("num_layers: 2", "num_layers: 3"))
    check = check_run(run)
    assert "holds another model: the checkpoint has no weight" in damage(check)[LAST]
    assert (check.newest_sound, check.can_resume) == (None, False)
    path.write_text("training: {max_steps: many}\n")
    flip(next(run.checkpoint(4).glob("*.safetensors")))
    check = check_run(run)
    assert damage(check)["config.yaml"].startswith("training.max_steps = 'many'")
    assert set(damage(check)) == {"config.yaml", "checkpoints/step_00000004"}
    assert (check.newest_sound, check.can_resume) == (6, False)
    path.unlink()
    assert run_to_check(str(run.path)) == run
    assert "config.yaml" in damage(check_run(run))
    with pytest.raises(CheckpointError, match="there is no run 'nowhere'"):
        run_to_check("nowhere")
    shutil.rmtree(run.checkpoints)
    run.checkpoints.mkdir()
    check = check_run(run)
    assert notes(check)["checkpoints"] == "there is none yet"
    assert (check.newest_sound, check.can_resume) == (None, False)


def test_a_tokenizer_that_is_gone_damaged_or_another(run: RunFolder) -> None:
    manifest = json.loads(run.manifest.read_text())
    run.manifest.write_text(json.dumps({**manifest, "tokenizer_hash": "0" * 64}))
    check = check_run(run)
    assert "it is not the tokenizer of the run" in damage(check)["tokenizer"]
    assert not check.can_resume
    meta = run.tokenizer / "tokenizer_meta.json"
    meta.write_text(meta.read_text()[:-9])
    assert "the tokenizer is damaged" in damage(check_run(run))["tokenizer"]
    shutil.rmtree(run.tokenizer)
    assert "there is no such file" in damage(check_run(run))["tokenizer"]


@pytest.mark.parametrize("name", ["manifest.json", "data.json", "segments.jsonl"])
def test_records_that_are_damaged_are_named(run: RunFolder, name: str) -> None:
    (run.path / name).write_text("{}\n" if name == "segments.jsonl" else "{")
    assert set(damage(check_run(run))) == {name}


def test_links_that_lead_nowhere_or_back(run: RunFolder) -> None:
    for name, target in (("best", "step_00000099"), ("last", "step_00000004")):
        (run.checkpoints / name).unlink()
        (run.checkpoints / name).symlink_to(target)
    check = check_run(run)
    assert damage(check) == {"checkpoints/best": "leads to step_00000099, which is not there"}
    assert notes(check) == {"checkpoints/last": "leads to step_00000004, which is not the newest"}
    (run.checkpoints / "last").unlink()
    assert notes(check_run(run))["checkpoints/last"] == "the link is missing"


def test_leftovers_of_a_killed_process_are_noted_and_no_damage(run: RunFolder) -> None:
    (run.checkpoints / ".step_00000008.tmp").mkdir()
    (run.checkpoints / ".step_00000008.tmp" / "state.json").write_bytes(bytes(1234))
    (run.path / ".config.yaml.4711.tmp").write_text("half")
    check = check_run(run)
    assert check.is_sound
    assert set(notes(check)) == {"checkpoints/.step_00000008.tmp", ".config.yaml.4711.tmp"}
    assert "(1,234 bytes)" in notes(check)["checkpoints/.step_00000008.tmp"]
    with RunLock.acquire(run):  # then they are being written
        assert notes(check_run(run)) == {}


def test_one_checkpoint_alone(run: RunFolder) -> None:
    flip(next(run.checkpoint(6).glob("*.safetensors")))
    run.metrics.write_text("garbage\n")
    check = check_run(run, "4")
    assert check.is_sound
    assert [f.item for f in check.findings if f.item.startswith("checkpoints")] == [
        "checkpoints/step_00000004"
    ]
    assert (check.newest_sound, check.newest) == (4, 6)
    assert set(damage(check_run(run, "last"))) == {LAST}
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; there are: 2, 4, 6"):
        check_run(run, "5")


def test_a_run_that_continues_is_not_taken_for_damaged(run: RunFolder) -> None:
    """Checkpoints are written and dropped while they are checked."""
    state: dict[str, Any] = dict(load_checkpoint(run.checkpoint(6)))
    is_over = threading.Event()

    def resume() -> None:
        for step in itertools.count(7):
            state["progress"]["step"] = step
            run.save(step, state, is_best=step % 3 == 0, keep=1)
            if is_over.is_set():
                return

    saving = threading.Thread(target=resume)
    with RunLock.acquire(run):
        saving.start()
        try:
            checks = [check_run(run) for _ in range(25)]
        finally:
            is_over.set()
            saving.join()
    found = [damage(check) for check in checks]
    # Only its metrics are, which end at step 6.
    assert all(set(items) <= {"metrics.jsonl"} for items in found), found
    assert len({check.newest_sound for check in checks}) > 1
