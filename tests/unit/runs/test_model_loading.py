"""From checkpoints back to models, whole and damaged."""

import warnings
from pathlib import Path

import pytest
import torch

from tests.unit.checkpoint.disks import flip
from ultrathink import load_model
from ultrathink.checkpoint.format import DamagedCheckpointError
from ultrathink.config import load_config
from ultrathink.config.schema import Config
from ultrathink.core.errors import CheckpointError
from ultrathink.data.tokenizers.byte import ByteTokenizer
from ultrathink.model.transformer import Transformer
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.loading import check_loads, load_weights, weights_from

WEIGHTS, OTHERS = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(
        "debug",
        [f"run.dir={tmp_path}", "model.hidden_size=32", "model.num_layers=1", "model.num_heads=2"],
    )


@pytest.fixture
def run(config: Config) -> RunFolder:
    """A run whose checkpoints 1, 2 (the best) and 3 hold models of that seed."""
    run, _ = RunFolder.create(config)
    ByteTokenizer().save(run.tokenizer)
    for step in (1, 2, 3):
        weights = dict(model_of(config, step).state_dict())
        state = {"model": weights, "optimizer": torch.ones(3), "progress": {"step": step}}
        run.save(step, state, is_best=step == 2, keep=9)  # type: ignore[arg-type]
    return run


def model_of(config: Config, seed: int) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config.model)


def same(one: Transformer, other: Transformer) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_a_model_comes_back_from_the_best_the_last_or_a_step(
    run: RunFolder, config: Config
) -> None:
    (run.step_path(2) / OTHERS).unlink()  # weights need nothing of the optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for which, seed in (("best", 2), ("last", 3), (1, 1)):
            model, _ = load_model(run.path, which)  # type: ignore[arg-type]
            assert same(model, model_of(config, seed))
            assert not model.training
        assert weights_from(f"{run.path}@best", "runs") == (run.step_path(2), run)


@pytest.mark.parametrize(("which", "damaged", "seed"), [("best", 2, 3), ("last", 3, 2)])
def test_another_stands_in_for_damaged_weights_with_a_warning(
    run: RunFolder, config: Config, which: str, damaged: int, seed: int
) -> None:
    flip(run.step_path(damaged) / WEIGHTS)
    expected = f"step_0000000{damaged} is damaged .*; using step_0000000{seed}"
    with pytest.warns(UserWarning, match=expected) as caught:
        model, _ = load_model(run.path, which)
    assert [warning.filename for warning in caught] == [__file__]
    assert same(model, model_of(config, seed))
    with pytest.warns(UserWarning, match=expected) as caught:
        assert weights_from(f"{run.path}@{which}", "runs")[0] == run.step_path(seed)
    assert [warning.filename for warning in caught] == [__file__]


def test_damaged_weights_that_were_asked_for_are_refused(run: RunFolder, config: Config) -> None:
    flip(run.step_path(2) / WEIGHTS)
    with pytest.raises(DamagedCheckpointError, match=rf"{WEIGHTS}: content differs.*there are: 1"):
        load_model(run.path, 2)
    model = model_of(config, 7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DamagedCheckpointError, match=WEIGHTS):
        load_weights(model, run.step_path(2))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    for step in (1, 3):
        flip(run.step_path(step) / "state.json")
    with pytest.raises(DamagedCheckpointError, match="no checkpoint in it is sound"):
        load_model(run.path)


def test_a_checkpoint_is_checked_against_a_model_without_reading_it(
    run: RunFolder, config: Config
) -> None:
    check_loads(run.step_path(1), config.model)
    other = config.replace({"model.num_layers": 2}, origin="test")
    with pytest.raises(CheckpointError, match=r"the checkpoint has no weight 'blocks\.1"):
        check_loads(run.step_path(1), other.model)
    with pytest.raises(CheckpointError, match=r"the checkpoint has no weight 'blocks\.1"):
        load_weights(Transformer(other.model), run.step_path(1))
    run.save(1, {"progress": {"step": 1}}, is_best=False, keep=9)  # without a model
    with pytest.raises(CheckpointError, match="the checkpoint has no weight 'embedding"):
        check_loads(run.step_path(1), config.model)
    run.save(1, {"model": {"w": torch.ones(1)}}, is_best=False, keep=9)
    [weights] = run.step_path(1).glob("*.safetensors")
    weights.write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match="its tensors cannot be read"):
        check_loads(run.step_path(1), config.model)
