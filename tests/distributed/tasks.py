"""What the processes of the pool are asked to do."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import ultrathink.training.trainer as trainer_module
from tests.unit.training import several_modules, weighted
from tests.unit.training.conftest import TINY as ALONE
from tests.unit.training.expert_checks import inconsistencies
from tests.unit.training.experts import MIXTURE, ROUTING
from tests.unit.training.late_copies import LateCopier
from tests.unit.training.limited_memory import LimitedMemory
from tests.unit.training.observers import At, Recorder, asks, goes_back, scale_loss
from ultrathink.checkpoint.format import load_checkpoint, weights
from ultrathink.config import load_config
from ultrathink.core.errors import UltrathinkError
from ultrathink.data.tokenizers.base import load_tokenizer
from ultrathink.inference.engine import Engine
from ultrathink.inference.sampling import SamplingParams
from ultrathink.parallel.world import (
    PeerFailedError,
    join_world,
    leave_status,
    status_of_first,
)
from ultrathink.recipes.resume import resume_trainer
from ultrathink.recipes.train import build_trainer
from ultrathink.runs.decisions import read_decisions
from ultrathink.runs.folder import RunFolder
from ultrathink.training import host_states
from ultrathink.training.callbacks import StepReport
from ultrathink.training.changes import (
    AddExpert,
    PruneExpert,
    ReleaseExperts,
    ReviveExperts,
    Rollback,
    SetLearningRateFactor,
    SkipSamples,
    Stop,
)
from ultrathink.training.host_states import copied_to_host
from ultrathink.training.model_set import inference_view
from ultrathink.training.model_state import region_needed
from ultrathink.training.out_of_memory import SmallerStartError
from ultrathink.training.silent_changes import RecallCheckpoint
from ultrathink.training.snapshots import Snapshot
from ultrathink.training.stepping import Verdict
from ultrathink.training.trainer import Trainer

TINY = (*ALONE, "training.clip=0.5", "training.eval.batch_size=3")
# Two groups that two processes cannot halve; the first layer has no experts.
EXPERTS = (*MIXTURE, ROUTING)
DEPTH = (*EXPERTS, "model.mod={layers: [0, 1]}")
ELASTIC = (*EXPERTS, "model.exits.own_norms=true")


def new_trainer(place: str, *overrides: str, **parts: Any) -> Trainer:
    with several_modules.registered(), weighted.registered():
        config = load_config("debug", [*TINY, f"run.dir={place}/runs", *overrides])
        return build_trainer(config, **parts)


def resumed(
    path: str, checkpoint: str = "last", overrides: Sequence[str] = (), **parts: Any
) -> Trainer:
    """A trainer that continues from a checkpoint of the run in ``path``."""
    with several_modules.registered(), weighted.registered():
        return resume_trainer(RunFolder(Path(path)), checkpoint, overrides=overrides, **parts)


def weights_at_rest(place: str, *overrides: str) -> dict[str, tuple[int, int]]:
    """How many numbers this process holds after a step, of each model, and how many there are."""
    with closing(new_trainer(place, *overrides)) as trainer:
        trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 1.0)
        models = trainer.objective.models
    found = {**models.modules, **{name: one.model for name, one in models.frozen.items()}}
    return {
        name: (
            sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)),
            sum(p.numel() for p in model.parameters()),
        )
        for name, model in found.items()
    }


def train_and_write(place: str, *overrides: str) -> tuple[str, list[str]]:
    """Let the model write before the first step and after the second; the run, and the texts."""
    trainer = new_trainer(place, *overrides)
    tokenizer = load_tokenizer(trainer.run.tokenizer)
    params = SamplingParams(max_new_tokens=6, temperature=0.7, seed=3)
    train_step, texts = trainer.train_step, []

    def write_and_train() -> StepReport:
        if trainer.progress.step in (0, 2):
            with inference_view(trainer.model) as model:
                engine = Engine(model, tokenizer, in_training=True)
                texts.append(engine.generate("the ", params).text)
                torch.rand(1)
        return train_step()

    trainer.train_step = write_and_train  # type: ignore[method-assign]
    trainer.fit()
    return str(trainer.run.path), texts


def train(place: str, *overrides: str) -> str:
    """Train a tiny model; returns its run folder."""
    trainer = new_trainer(place, *overrides)
    trainer.fit()
    return str(trainer.run.path)


def train_with_an_evaluator_that_fails_on_process_1(place: str, *overrides: str) -> str:
    """Train; the first evaluator fails there at its first time, before processes add up."""
    trainer = new_trainer(place, *overrides)
    evaluator = trainer.evaluators.members[0]
    evaluate = evaluator.evaluate

    def failing(model: Any, step: int) -> Any:
        if step == 2:
            raise OSError("its disk is gone")
        return evaluate(model, step)

    if trainer.world.rank == 1:
        evaluator.evaluate = failing  # type: ignore[method-assign]
    trainer.fit()
    return str(trainer.run.path)


def resume(path: str, *overrides: str) -> list[str]:
    """Continue with a run to its end; what was remarked on the way."""
    trainer = resumed(path, overrides=overrides)
    trainer.fit()
    return [text for text, _ in trainer.remarks]


def loaded_state(path: str, checkpoint: str = "last", *overrides: str) -> dict[str, Any]:
    """The state of a trainer that continues from a checkpoint, its tensors whole."""
    with closing(resumed(path, checkpoint, overrides)) as trainer:
        return learned(trainer)


def learned(trainer: Trainer) -> dict[str, Any]:
    """Weights, moments and the place in the data, whole."""
    state = copied_to_host(trainer.state_dict())
    kinds = ("model", "modules", "optimizer", "data")
    return {kind: whole(state[kind]) for kind in kinds if kind in state}


def recall(place: str, *overrides: str) -> list[dict[str, Any]]:
    """What was learned by a checkpoint's step, and once the run went back to that checkpoint."""
    trainer = new_trainer(place, *overrides)
    found = []
    trainer.start()
    for number in range(3):
        trainer.train_step()
        if number == 1:
            trainer.save()
            found.append(learned(trainer))
    RecallCheckpoint(2, 7).apply(trainer.parts)
    Rollback(Snapshot(2, 7), skip_data=False).apply(trainer.parts)
    found.append(learned(trainer))
    trainer.close()
    return found


def numbers_read(path: str) -> tuple[int, int]:
    """How many numbers of the model a process reads to go on with a run, and how many there are."""
    with closing(resumed(path)) as trainer:
        state: Any = load_checkpoint(
            RunFolder(Path(path)).checkpoint("last"),
            weights,
            partial(region_needed, trainer.objective.models),
        )
    shards = [one for one in state["model"].values() if not isinstance(one, torch.Tensor)]
    mine = [shard.local.numel() for shard in shards]
    return sum(mine), sum(torch.Size(shard.shape).numel() for shard in shards)


def whole(node: Any) -> Any:
    if isinstance(node, DTensor):
        return node.full_tensor().numpy()
    if isinstance(node, torch.Tensor):
        return node.numpy()
    if isinstance(node, dict):
        return {key: whole(value) for key, value in node.items()}
    return node


def train_with_nan_on_rank_1(place: str) -> list[tuple[bool, float]]:
    """Spoil the loss of one process in step 2; whether each step was skipped, and a weight."""
    found: list[tuple[bool, float]] = []
    with closing(new_trainer(place, "training.max_steps=4")) as trainer:
        scale_loss(trainer, [2] if join_world().rank == 1 else [], float("nan"))
        trainer.start()
        for _ in range(4):
            report = trainer.train_step()
            weight = trainer.model.get_parameter("norm.weight")
            assert isinstance(weight, DTensor)
            found.append((report.skipped, float(weight.detach().full_tensor().sum())))
    return found


def random_number_and_scored_tokens(place: str) -> tuple[float, int, int]:
    """A random number drawn in the first step; tokens scored by validation, and those there are."""
    drawn: list[float] = []
    with closing(new_trainer(place, "model.dropout=0.5")) as trainer:
        trainer.stepper.optimizers[0].register_step_pre_hook(
            lambda *_: drawn.append(float(torch.rand(())))
        )
        trainer.start()
        trainer.train_step()
        return drawn[0], trainer.score().num_tokens, trainer.objective.num_scored


def train_with_a_controller(
    place: str, *overrides: str, copies_late: bool = False
) -> tuple[str, float, list[int]]:
    """Go back from step 4 to 2, and change the rate and the data after step 5; the run's folder,
    the live rate factor, and the step and samples it ended with.

    ``copies_late``: its snapshots are made as late as they may be.
    """
    steering = [
        goes_back(kept=2, at=4),
        At(step5=asks(SetLearningRateFactor(0.5), SkipSamples(3))),
    ]
    trainer = new_trainer(place, "training.max_steps=7", *overrides, controllers=steering)
    with pytest.MonkeyPatch.context() as patch:
        if copies_late:
            patch.setattr(host_states, "_SMALL_BYTES", 16)
            trainer.snapshots.states.copier = LateCopier()
        trainer.fit()
    loader = trainer.loader
    counts = [trainer.progress.step, loader.samples_seen, loader.samples_skipped]
    return str(trainer.run.path), trainer.settings.lr_factor, counts


STEERED = (
    "training.max_steps=130",
    "training.clip=null",
    "orchestrator={mode: act, snapshots: {every_steps: 20}}",
)


def train_and_break(place: str, *overrides: str) -> tuple[str, list[Any], int]:
    """Break the weights after step 110 under an orchestrator that acts; the run folder, what it
    decided, and how many samples were skipped."""
    return _broken(new_trainer(place, *STEERED, *overrides))


def train_and_stop(place: str, *overrides: str) -> str:
    """Stop such a run after step 106; its folder."""
    stop = At(step106=asks(Stop()))
    trainer = new_trainer(place, *STEERED, *overrides, controllers=[stop])
    trainer.fit()
    return str(trainer.run.path)


def resume_and_break(path: str, *overrides: str) -> tuple[str, list[Any], int]:
    """Continue with a stopped run, and break its weights as ``train_and_break`` does."""
    return _broken(resumed(path, overrides=overrides))


def _broken(trainer: Trainer) -> tuple[str, list[Any], int]:
    take_step = trainer.stepper.take_step
    is_broken = []

    def breaking(*args: Any, **options: Any) -> Any:
        if trainer.progress.step == 110 and not is_broken:
            is_broken.append(True)
            with torch.no_grad():
                next(p for p in trainer.model.parameters() if p.ndim == 2).mul_(300.0)
        return take_step(*args, **options)

    trainer.stepper.take_step = breaking  # type: ignore[method-assign]
    trainer.fit()
    decided = [
        [record["rule"], record["step"], record["after"]]
        for record in read_decisions(trainer.run.decisions)
        if record["rule"] != "by_hand"
    ]
    return str(trainer.run.path), decided, trainer.loader.samples_skipped


def train_and_ruin(place: str, *overrides: str) -> tuple[str, str, float]:
    """Let weights decay to nothing after step 25 of a steered run; its folder, its ending and the
    loss that it ends with."""
    few = ("training.max_steps=45", "training.eval.every_steps=10")
    off = ("orchestrator.rules.roll_back=false", "orchestrator.rules.find_rate=false")
    trainer = new_trainer(place, *STEERED, *few, *off, *overrides)

    def decay(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups if trainer.progress.step > 25 else ():
            group["weight_decay"] = 50.0

    for optimizer in trainer.stepper.optimizers:
        optimizer.register_step_pre_hook(decay)
    ending = trainer.fit()
    return str(trainer.run.path), ending.name, trainer.score().loss


def status_that_is_heard() -> int | None:
    """The first process ends with 2, a second after it spoke; what each ends with."""
    world = join_world()
    if world.rank == 0:
        time.sleep(1)
        leave_status(world, 2)
        status: int | None = 2
    else:
        status = status_of_first(world)
    world.barrier()
    if world.rank == 0:  # the pool continues, and nothing failed
        dist.distributed_c10d._get_default_store().delete_key("ultrathink/status")
    return status


class _Guard:
    """Clips hard, and leaves out the second step; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, float]] = []

    def judge(self, step_loss: float, grad_norm: float) -> Verdict:
        self.asked.append((step_loss, grad_norm))
        return Verdict(clip=grad_norm / 4, skip=len(self.asked) == 2)


def train_with_a_guard(place: str, *overrides: str) -> tuple[str, list[tuple[float, float]]]:
    """Train under a guard; the run folder, and the losses and norms that the guard was shown."""
    trainer = new_trainer(place, "training.max_steps=4", *overrides)
    guard = _Guard()
    trainer.set_guard(guard)
    trainer.fit()
    return str(trainer.run.path), guard.asked


def train_out_of_memory(place: str) -> tuple[str, str, list[int]]:
    """Let passes over two sequences fail from step 4 on; the run, what it says, its checkpoints."""
    trainer = new_trainer(
        place, "training.max_steps=6", "training.checkpoint={every_steps: 2, keep: 9}"
    )
    assert trainer.settings.micro_batch_size == 2
    LimitedMemory(trainer, fits=1, after=3)
    with pytest.raises(SmallerStartError) as caught:
        trainer.fit()
    return str(trainer.run.path), str(caught.value), trainer.run.steps()


def resume_with_little_memory(path: str, *overrides: str) -> tuple[list[int], int, list[str]]:
    """Resume where two sequences do not fit: sizes of the passes, the last size, changes."""
    recorder = Recorder()
    trainer = resumed(path, overrides=overrides, callbacks=[recorder])
    memory = LimitedMemory(trainer, fits=1)
    with suppress(SmallerStartError):
        trainer.fit()
    changed = [
        f"{one.setting}: {one.before} -> {one.after} ({one.reason})" for one in recorder.changes
    ]
    return memory.tried, trainer.settings.micro_batch_size, changed


def optimizer_state_before_and_after(place: str, *overrides: str) -> list[dict[str, list[Any]]]:
    """What is allocated before the first step, and what a step without that makes."""
    found = []
    for is_early in (True, False):
        trainer = new_trainer(place, *overrides)
        if is_early:
            trainer.stepper.allocate_state()
        else:
            trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 1.0)
        state: Any = trainer.state_dict()["optimizer"]
        found.append(
            {
                f"{name}/{key}": [
                    *(type(value).__name__, str(value.dtype), tuple(value.shape)),
                    *(
                        (str(value.placements), tuple(value.to_local().shape), str(value.device))
                        if isinstance(value, DTensor)
                        else (str(value.device),)
                    ),
                ]
                for name, values in state.items()
                for key, value in values.items()
            }
        )
        trainer.close()
    return found


def message_of_a_mistake(place: str, by_rank: list[list[str]]) -> str | None:
    """What building a trainer is answered with, each process with overrides of its own."""
    try:
        new_trainer(place, *by_rank[join_world().rank])
    except PeerFailedError:
        return None
    except UltrathinkError as error:
        return str(error)
    return "no error"


def gathered(values: list[Any]) -> list[Any]:
    """What every process of the world says, as each of them hears it."""
    world = join_world()
    return world.gathered(values[world.rank])


def train_and_revive(place: str, *overrides: str) -> tuple[str, list[Any], str]:
    """Re-initialize experts in a run; its folder, what each copied, and a hash of the weights that
    this process sees."""
    wanted = [
        {"layer": layer, "group": group, "expert": expert}
        for layer, group, expert in ((1, "a", 2), (1, "a", 5), (2, "b", 1))
    ]
    trainer = new_trainer(
        place,
        *EXPERTS,
        "training.max_steps=6",
        "training.eval={every_steps: 3, max_tokens: 256}",
        *overrides,
        controllers=[At(step3=asks(ReviveExperts(wanted)))],  # validated, so weights are whole
    )
    for layer in trainer.model.expert_layers().values():
        layer.router.selection_bias[[2, 5, 9]] = -1e4  # 2 and 5 of a, 1 of b
    trainer.fit()
    seen = hashlib.sha256()
    for value in trainer.model.state_dict().values():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        seen.update(whole.detach().cpu().numpy().tobytes())
    [record] = read_decisions(trainer.run.decisions)
    return str(trainer.run.path), record["after"], seen.hexdigest()


def train_and_operate(place: str, *overrides: str) -> tuple[str, list[Any], list[str]]:
    """Add, prune and release experts in a run; its folder, what was done, and what this process
    finds inconsistent."""
    wanted = [
        AddExpert("all", "a"),
        AddExpert(1, "a", 2, how="copy"),
        PruneExpert("all", "b"),
        PruneExpert(2, "a", how="merge"),
        ReleaseExperts(2, "a"),
        AddExpert(2, "a"),
    ]
    trainer = new_trainer(
        place,
        *EXPERTS,
        "training.max_steps=6",
        "training.eval={every_steps: 3, max_tokens: 256}",
        *overrides,
        controllers=[At(step3=asks(*wanted))],  # validated, so weights are whole
    )
    trainer.fit()
    done = [[one["before"], one["after"]] for one in read_decisions(trainer.run.decisions)]
    return str(trainer.run.path), done, inconsistencies(trainer)


def train_in_need(place: str, *overrides: str) -> tuple[str, str, list[Any]]:
    """Let the second process be short of memory under an orchestrator that acts; the run folder,
    how this process then keeps activations, and what was decided."""
    of_this_process = trainer_module.memory_share
    if join_world().rank == 1:
        trainer_module.memory_share = lambda: 0.8
    try:
        trainer = new_trainer(place, "training.max_steps=4", "orchestrator.mode=act", *overrides)
        trainer.fit()
    finally:
        trainer_module.memory_share = of_this_process
    decided = [
        [record["rule"], record["step"], record["after"]]
        for record in read_decisions(trainer.run.decisions)
    ]
    return str(trainer.run.path), trainer.model.activation_checkpointing, decided
