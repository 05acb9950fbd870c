import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten

from tests.unit.checkpoint.disks import state
from ultrathink.checkpoint.format import (
    DamagedCheckpointError,
    files_of,
    load_checkpoint,
    read_state,
    save_checkpoint,
    tensor_shapes,
    verify_checkpoint,
    weights,
)
from ultrathink.core.errors import CheckpointError

STATE = {
    "model": {"a.weight": torch.randn(3, 4), "scalar": torch.tensor(2.5)},
    "random": {"torch": torch.get_rng_state(), "python": [3, [1, 2, 3], None]},
    "half": torch.randn(5, dtype=torch.bfloat16),
    "turned": torch.randn(4, 3).t(),
    "empty": torch.zeros(0),
    "progress": {"step": 7, "best": -1.5, "name": "x", "flag": True, "none": None},
    "list": [torch.arange(3), {"deep": torch.ones(2)}],
}
WEIGHTS, OTHERS = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def equal(a: Any, b: Any) -> bool:
    """Whether two states are the same, to the bit."""
    one, other = tree_flatten(a), tree_flatten(b)
    return one[1] == other[1] and all(
        x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(one[0], other[0], strict=True)
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of ``STATE``."""
    save_checkpoint(tmp_path / "c", STATE)
    return tmp_path / "c"


def test_everything_comes_back_bit_for_bit_or_what_is_wanted(saved: Path) -> None:
    assert equal(load_checkpoint(saved), STATE)
    state = load_checkpoint(saved, weights)
    assert equal(state["model"], STATE["model"])
    assert state["half"] is None
    assert state["progress"] == STATE["progress"]


def test_files_are_plain_safetensors_one_for_the_model_and_json(saved: Path) -> None:
    """Nothing is pickled."""
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json"}
    model, others = load_file(saved / WEIGHTS), load_file(saved / OTHERS)
    assert model.keys() == {"model/a.weight", "model/scalar"}
    assert torch.equal(model["model/a.weight"], STATE["model"]["a.weight"])
    assert "half" in others
    assert {WEIGHTS, OTHERS} & set(files_of(saved, weights)) == {WEIGHTS}
    assert tensor_shapes(saved)["half"] == ((5,), torch.bfloat16)
    sums = json.loads((saved / "checksums.json").read_text())
    contents = {path.name: path.read_bytes() for path in saved.iterdir()}
    del contents["checksums.json"]
    assert sums == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }


def test_no_file_is_empty(tmp_path: Path) -> None:
    for part, num_files in (("model", 1), ("optimizer", 1), ("progress", 0)):
        state: dict[str, Any] = {part: {"w": torch.ones(2)} if num_files else 1}
        save_checkpoint(tmp_path / "c", state)
        names = [path.name for path in (tmp_path / "c").glob("*.safetensors")]
        assert names == ["model-00001-of-00001.safetensors"] * num_files
        verify_checkpoint(tmp_path / "c")
        assert equal(load_checkpoint(tmp_path / "c"), state)


def test_threads_save_without_a_warning_and_without_silencing_others(tmp_path: Path) -> None:
    """Silencing warnings would change the filters of all threads meanwhile."""
    filters = list(warnings.filters)
    with ThreadPoolExecutor(2) as pool:
        places = [tmp_path / str(number) for number in range(4)]
        saves = [pool.submit(save_checkpoint, place, state(3)) for place in places]
        while not all(save.done() for save in saves):
            assert list(warnings.filters) == filters
        assert [save.result() for save in saves] == [None] * 4


def stop() -> None:
    raise RuntimeError("enough")


class StopAt:
    """Does something when it is called for the ``at``-th time."""

    def __init__(self, at: int, action: Callable[[], None] = stop) -> None:
        self.at, self.action, self.num_calls = at, action, 0

    def __call__(self) -> None:
        self.num_calls += 1
        if self.num_calls == self.at:
            self.action()


def test_a_check_that_raises_ends_the_save_wherever_it_is(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", STATE)
    with pytest.raises(TypeError, match="cannot hold"):
        save_checkpoint(tmp_path / "c", {"bad": object()})  # type: ignore[dict-item]
    other = state(3, num_values=3_000_000)  # several pieces to a file
    counter = StopAt(-1)
    save_checkpoint(tmp_path / "counted", other, counter)
    assert counter.num_calls > 18  # at each file, each piece of one, each checksum
    for at in range(1, counter.num_calls + 1):
        with pytest.raises(RuntimeError, match="enough"):
            save_checkpoint(tmp_path / "c", other, StopAt(at))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "counted"]
    assert equal(load_checkpoint(tmp_path / "c"), STATE)


def test_a_folder_that_vanishes_while_it_is_written_is_an_error(tmp_path: Path) -> None:
    def vanish() -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)

    counter = StopAt(-1)
    save_checkpoint(tmp_path / "run" / "c", STATE, counter)
    for at in range(1, counter.num_calls + 1):
        with pytest.raises(OSError, match="No such file"):
            save_checkpoint(tmp_path / "run" / "c", STATE, StopAt(at, vanish))
        assert list(tmp_path.rglob("*.safetensors")) == []
    save_checkpoint(tmp_path / "run" / "c", STATE)
    assert equal(load_checkpoint(tmp_path / "run" / "c"), STATE)


def test_messages_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no state\.json"):
        read_state(tmp_path)
    save_checkpoint(tmp_path / "c", STATE)
    state_file = tmp_path / "c" / "state.json"
    whole = state_file.read_text()
    for damaged in (whole[:-10], "[]", "{}", "3"):
        state_file.write_text(damaged)
        with pytest.raises(DamagedCheckpointError, match=r"state\.json cannot be read"):
            read_state(tmp_path / "c")
    state_file.write_text(whole.replace('"format": 3', '"format": 99'))
    with pytest.raises(CheckpointError, match=r"another version .* \(format 99, "):
        read_state(tmp_path / "c")


def test_all_is_on_the_disk_before_a_checkpoint_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    missing: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def rename(old: Path, new: Path) -> None:
        missing.extend(p.name for p in (old, *old.iterdir()) if p.stat().st_ino not in flushed)
        flushed.clear()
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save_checkpoint(tmp_path / "c", STATE)
    assert missing == []
    assert flushed == {tmp_path.stat().st_ino}  # and so is the name itself
