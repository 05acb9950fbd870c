import json
from pathlib import Path

import pytest
import torch

from ultrathink.core.errors import CheckpointError
from ultrathink.runs import checkpoint
from ultrathink.runs.checkpoint import (
    load_checkpoint,
    read_state,
    save_checkpoint,
    tensor_shapes,
)

STATE = {
    "model": {"a.weight": torch.randn(3, 4), "scalar": torch.tensor(2.5)},
    "random": {"torch": torch.get_rng_state(), "python": [3, [1, 2, 3], None]},
    "half": torch.randn(5, dtype=torch.bfloat16),
    "empty": torch.zeros(0),
    "progress": {"step": 7, "best": -1.5, "name": "x", "flag": True, "none": None},
    "list": [torch.arange(3), {"deep": torch.ones(2)}],
}


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        assert isinstance(b, dict)
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        assert isinstance(b, list)
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step_1", STATE)
    assert equal(load_checkpoint(tmp_path / "step_1"), STATE)


def test_only_wanted_tensors_are_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", STATE)
    state = load_checkpoint(tmp_path / "c", lambda name: name.startswith("model/"))
    assert equal(state["model"], STATE["model"])
    assert state["half"] is None
    assert state["progress"] == STATE["progress"]


def test_nothing_is_pickled(tmp_path: Path) -> None:
    """Tensors are plain safetensors that the library reads, the rest is JSON."""
    from safetensors.torch import load_file

    save_checkpoint(tmp_path / "c", STATE)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert all(name.endswith((".safetensors", ".json")) for name in names)
    tensors = {}
    for path in (tmp_path / "c").glob("*.safetensors"):
        tensors.update(load_file(path))
    assert torch.equal(tensors["model/a.weight"], STATE["model"]["a.weight"])
    json.loads((tmp_path / "c" / "state.json").read_text())
    assert tensor_shapes(tmp_path / "c")["half"] == ((5,), torch.bfloat16)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", STATE)
    with pytest.raises(TypeError, match="cannot hold"):
        save_checkpoint(tmp_path / "c", {"bad": object()})  # type: ignore[dict-item]
    assert equal(load_checkpoint(tmp_path / "c"), STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "c", STATE)

    def full(path: Path, data: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "c", {"model": {"w": torch.ones(2)}})
    assert equal(load_checkpoint(tmp_path / "c"), STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_messages_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no state\.json"):
        read_state(tmp_path)
    save_checkpoint(tmp_path / "c", STATE)
    state_file = tmp_path / "c" / "state.json"
    whole = state_file.read_text()
    state_file.write_text(whole[:-10])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(tmp_path / "c")
    state_file.write_text(whole.replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match="has format 99, this version reads 1"):
        load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_damaged_tensors_are_an_error_not_a_crash(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path / "c", STATE)
    [file] = (tmp_path / "c").glob("*.safetensors")
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:200])
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "c")
