"""Snapshots on the host: whole when they are read, whatever was written meanwhile.

What only a GPU can show (pinned memory, streams, events) is not run here.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.experts import MIXTURE
from tests.unit.training.late_copies import LateCopier
from tests.unit.training.observers import At, Recorder
from ultrathink.config.optimizer import AdamWConfig
from ultrathink.config.orchestrator import SnapshotsConfig
from ultrathink.parallel import placement
from ultrathink.parallel.placement import host_mesh, placed_like, shard_of
from ultrathink.parallel.world import World
from ultrathink.recipes.parts import steering
from ultrathink.training import host_states
from ultrathink.training.changes import AverageSnapshots, ReviveExperts, Rollback, SetRouting
from ultrathink.training.control import TrainerControl
from ultrathink.training.host_states import HostStates, copied_to_host, host_bytes
from ultrathink.training.memory import host_memory_in_use
from ultrathink.training.optimizers import (
    allocate_state,
    build_adamw,
    load_optimizer_state,
    optimizer_state,
)
from ultrathink.training.snapshots import Snapshot


def losses_of(make: MakeTrainer, copier: LateCopier | None) -> list[float]:
    """Of a run that goes back three times: to a copy after which only training wrote, and to two
    of boundaries at which something else did."""
    kept: dict[str, Snapshot] = {}
    returns = ["early", "middle", "late"]

    def keep(control: TrainerControl) -> None:
        kept.setdefault("early", control.snapshot())

    def keep_and_change(control: TrainerControl) -> None:
        kept.setdefault("middle", control.snapshot())
        control.request(ReviveExperts([{"layer": 1, "group": "a", "expert": 2}]), reason="test")
        control.request(SetRouting("temperature", 0.5), reason="test")

    def go_back(control: TrainerControl) -> None:
        kept.setdefault("late", control.snapshot())
        if returns:
            control.request(Rollback(kept[returns.pop(0)], skip_data=False), reason="test")

    def average(control: TrainerControl) -> None:
        control.request(AverageSnapshots([kept["early"], kept["late"]]), reason="test")

    recorder = Recorder()
    trainer = make(
        *MIXTURE,
        "model.moe.routing={warmup_steps: 20}",
        "model.dropout=0.1",
        "training.optimizer.type=muon",
        "training.max_steps=8",
        "training.eval.max_tokens=256",
        callbacks=[recorder],
        controllers=[At(step2=keep, step3=keep_and_change, step5=go_back, step6=average)],
    )
    if copier is not None:
        trainer.snapshots.states.copier = copier
    trainer.fit()
    assert [report.step for report in recorder.steps] == [1, 2, 3, 4, 5, 3, 4, 5, 4, 5, 6, 7, 8]
    return [report.loss for report in recorder.steps]


def test_a_copy_that_is_made_late_is_of_the_moment_it_was_asked_for(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = losses_of(make_trainer, None)
    assert len(set(reference)) > 8
    # So that only what a forward pass writes to counts as small, or everything in this model.
    for small_bytes in (16, 1 << 20):
        monkeypatch.setattr(host_states, "_SMALL_BYTES", small_bytes)
        copier = LateCopier()
        assert losses_of(make_trainer, copier) == reference
        assert copier.num_begun > 2


def test_small_tensors_may_be_written_to_at_once_and_large_ones_after_a_word() -> None:
    held = HostStates()
    held.copier = LateCopier()
    small, large = torch.zeros(()), torch.zeros(1 << 19)  # 2 MiB
    held.take(1, {"a": [small, large]})
    held.take(2, {"a": [small, large]})
    small.fill_(1.0)  # as a forward pass may do
    held.before_writing()
    large.fill_(1.0)
    for key in (1, 2):
        state: Any = held[key]
        assert not any(tensor.any() for tensor in state["a"])
    assert held.get(3) is None
    held.pop(1)
    assert list(held) == [2]


def test_room_is_a_share_of_this_machine_for_each_of_its_processes(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    size = host_bytes(trainer.state_dict()) / 2**30
    limit = 40 * size
    shares = []

    def in_use(num_processes: int) -> dict[str, float]:
        shares.append(num_processes)
        return {"memory": 0.0, "memory_limit": limit / num_processes}

    monkeypatch.setattr(steering, "host_memory_in_use", in_use)
    room = {}
    for local_size in (1, 2, 8):
        parts = replace(trainer.parts, world=World(0, 16, 0, local_size))
        room[local_size] = steering.room_for_snapshots(parts, SnapshotsConfig())
    trainer.close()
    assert shares == [1, 2, 8]
    assert room == {1: 8, 2: 4, 8: 1}
    monkeypatch.undo()
    alone, shared = host_memory_in_use(), host_memory_in_use(4)
    assert shared["memory_limit"] == pytest.approx(alone["memory_limit"] / 4)


@pytest.fixture
def gpu_mesh() -> Iterator[DeviceMesh]:
    """Eight processes with a GPU each, none of which is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=6, world_size=8)
    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp_replicate", "dp_shard"))
    host_mesh(mesh)
    yield mesh
    placement._host_mesh.cache_clear()
    dist.destroy_process_group()


def test_divided_tensors_go_to_the_host_and_back(gpu_mesh: DeviceMesh) -> None:
    """Shapes, places and devices only: fake tensors have no values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = DTensor.from_local(
            torch.empty(2, 5, device="cuda"),
            gpu_mesh,
            (Replicate(), Shard(0)),
            run_check=False,
            shape=torch.Size((8, 5)),
            stride=(5, 1),
        )
    copy = copied_to_host(weight)
    assert (copy.device.type, copy.to_local().device.type) == ("cpu", "cpu")
    assert (copy.shape, copy.placements) == (weight.shape, weight.placements)
    assert shard_of(copy).offset == (4, 0)
    assert shard_of(copy).local is None  # the other copy of the model writes it
    with FakeTensorMode(allow_non_fake_inputs=True):
        back = placed_like(copy, weight)
    assert isinstance(back, DTensor)
    assert back.device_mesh == gpu_mesh
    assert back.to_local().device.type == "cuda"
    assert placed_like(copy, weight, is_for_host=True) is copy
    assert host_bytes(weight) == 64  # 40, rounded up by the allocator of pinned memory


def test_a_restored_optimizer_goes_back_to_its_device() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.empty(3, 4, device="cuda"))
        optimizers = build_adamw(AdamWConfig(), model)
        allocate_state(optimizers)
        parameters = dict(model.named_parameters())
        before = optimizer_state(optimizers, parameters)
        copy = copied_to_host(before)
        devices = {value.device.type for values in copy.values() for value in values.values()}
        assert devices == {"cpu"}
        load_optimizer_state(optimizers, parameters, copy)
        after: Any = optimizer_state(optimizers, parameters)
        for name, values in after.items():
            for key, value in values.items():
                was: Any = before[name]
                assert value.device == was[key].device, (name, key)
