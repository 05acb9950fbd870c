"""Experts added, pruned and released in a running training."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.expert_checks import inconsistencies, logits_of
from tests.unit.training.experts import MIXTURE, ROUTING
from tests.unit.training.observers import At, Recorder, asks, assert_equal_tensors, final_state
from ultrathink import load_model
from ultrathink.cli.main import main
from ultrathink.core.errors import UltrathinkError
from ultrathink.model.experts.splits import siblings
from ultrathink.recipes.resume import resume_trainer
from ultrathink.runs.inspection import inspect_checkpoint
from ultrathink.training.change import Change
from ultrathink.training.changes import (
    AddExpert,
    AverageSnapshots,
    PruneExpert,
    ReleaseExperts,
    Rollback,
    Stop,
)
from ultrathink.training.expert_measures import measure_experts
from ultrathink.training.host_states import copied_to_host
from ultrathink.training.trainer import Trainer

# Two groups: six experts of eight, top-2, and three, top-1; the first of three layers has none.
EXPERTS = (*MIXTURE, ROUTING)
OPTIMIZERS = ("{type: adamw, lr: 0.003}", "{type: muon}")


@contextmanager
def running(make_trainer: MakeTrainer, *overrides: str, steps: int = 3) -> Iterator[Trainer]:
    """A trainer that has taken some steps."""
    trainer = make_trainer(*EXPERTS, "training.max_steps=100", *overrides)
    trainer.start()
    for _ in range(steps):
        trainer.train_step()
    yield trainer
    trainer.close()


def tokens() -> Tensor:
    return torch.randint(0, 250, (4, 32), generator=torch.Generator().manual_seed(3))


def state_of(trainer: Trainer) -> dict[str, Any]:
    return copied_to_host({**trainer.state_dict(), "progress": {}})  # type: ignore[no-any-return]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_lost_at_growth(make_trainer: MakeTrainer, optimizer: str) -> None:
    """neural-trees 67: a new expert has the weights, the bias and the moments of its source, and
    no other number of the run changes."""
    with running(make_trainer, f"training.optimizer={optimizer}") as trainer:
        before = state_of(trainer)
        [router] = [trainer.model.expert_layers()[1].router]
        AddExpert(1, "a", 4).apply(trainer.parts)
        after = state_of(trainer)
        assert router.active.tolist()[:8] == [True] * 7 + [False]
        checked = 0
        for kind in ("model", "optimizer"):
            for name, old in before[kind].items():
                olds, news = old, after[kind][name]
                if kind == "model":
                    olds, news = {"": old}, {"": news}
                for key, value in olds.items():
                    is_row = name.startswith("blocks.1.feed_forward.") and value.dim() > 0
                    inside = name.removeprefix("blocks.1.feed_forward.router.")
                    if inside in ("active", "side", "branch"):
                        continue
                    if is_row and "shared" not in name:
                        assert torch.equal(news[key][6], value[4]), (name, key)
                        assert value[4].any(), (name, key)
                        checked += 1
                        news[key][6] = value[6]
                    assert torch.equal(news[key], value), (name, key)
        assert checked == 1 + 3 + (6 if "adamw" in optimizer else 4)  # bias, weights, moments
        assert inconsistencies(trainer) == []


def test_a_split_is_the_same_function_at_once_and_after_a_resume(make_trainer: MakeTrainer) -> None:
    with running(make_trainer) as trainer:
        before, first = logits_of(trainer, tokens()), trainer.model.expert_layers()[1].router
        effects = []
        for change in (
            AddExpert("all", "a"),
            AddExpert(1, "a", 6),
            AddExpert("all", "a", how="copy"),
        ):
            if change.how == "copy":  # there is one slot left in layer 2 alone
                with pytest.raises(UltrathinkError, match="full"):
                    change.apply(trainer.parts)
                continue
            effects.append(change.apply(trainer.parts))
            logits = logits_of(trainer, tokens())
            assert (logits - before).abs().max() <= 1e-5
            assert (logits - before).norm() <= 1e-6 * before.norm()
        (was, now), _ = effects
        assert now["loss"] == pytest.approx(was["loss"], abs=1e-6)
        assert [one["experts"] for one in now["applied"]] == [7, 7]
        # A part of a part: three experts share the tokens of one.
        assert sorted(2.0 ** -first.branch.abs().sum(1)[:8]) == [0.25, 0.25, 0.5, 1, 1, 1, 1, 1]
        trainer.model.eval()
        loads = trainer.model(tokens()).stats["expert_load"][0, :8]
        trainer.model.train()
        source, share = now["applied"][0]["from"], loads[6:].sum()
        assert 0.2 < share / (share + loads[source]) < 0.8
        trainer.save()
        trainer.saving.wait_until_written()
        logits = logits_of(trainer, tokens())
    again = resume_trainer(trainer.run)
    assert torch.equal(logits_of(again, tokens()), logits)
    assert inconsistencies(again) == []
    ReleaseExperts("all", "a").apply(again.parts)
    assert (logits_of(again, tokens()) - logits).abs().max() > 1e-4  # the jump
    assert not again.model.has_splits
    again.close()


def test_the_jump_of_a_release_is_recorded_and_a_prune_undoes_a_split(
    make_trainer: MakeTrainer,
) -> None:
    with running(make_trainer) as trainer:
        before = state_of(trainer)["model"]
        _, added = AddExpert("all", "a").apply(trainer.parts)
        state = trainer.state.copy()
        was, now = ReleaseExperts(1, "a").apply(trainer.parts)
        assert was["loss"] == pytest.approx(added["loss"])
        assert abs(now["loss"] - was["loss"]) > 1e-6
        assert now["applied"] == [{"layer": 1, "group": "a", "experts": 7}]
        with pytest.raises(UltrathinkError, match=r"none is split in layer 1\."):
            ReleaseExperts(1, "a").apply(trainer.parts)
        for how in ("drop", "merge"):
            trainer.state.roll_back(state)
            assert trainer.model.has_splits
            PruneExpert("all", "a", 6, how=how).apply(trainer.parts)  # type: ignore[arg-type]
            assert_equal_tensors(state_of(trainer)["model"], before)
            assert not trainer.model.has_splits


def salience(trainer: Trainer, layer: int) -> list[float]:
    """Of each expert of group ``a``, on the last batch: a loop over tokens, in float64."""
    batch, block = trainer.boundary.batch, trainer.model.blocks[layer]
    assert batch is not None
    experts, router = block.feed_forward.experts, block.feed_forward.router
    found: list[list[float]] = [[] for _ in range(6)]
    handle = block.feed_forward.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    seen: list[Tensor] = []
    documents = {"positions": batch.positions, "document_ids": batch.document_ids}
    with torch.no_grad():
        trainer.model.eval()(batch.input_ids, **documents)
    trainer.model.train()
    handle.remove()
    router_rows, gate_up, down = (
        value.detach().double() for value in (router.weight[:6], experts.gate_up, experts.down)
    )
    pairs = zip(seen[0].flatten(0, 1).double(), batch.targets.flatten(), strict=True)
    for x in [x for x, label in pairs if label != -100]:
        logits = router_rows @ x
        chosen = (logits + router.selection_bias[:6]).argsort(descending=True)[:2].tolist()
        gates = logits.exp() / logits[chosen].exp().sum()
        for expert in chosen:
            gate, up = (gate_up[expert] @ x).chunk(2)
            out = down[expert] @ (torch.nn.functional.silu(gate) * up)
            found[expert].append(float(gates[expert] * out.norm()))
    return [sum(one) / max(1, len(one)) for one in found]


def test_the_least_salient_is_pruned_and_leaves_nothing(make_trainer: MakeTrainer) -> None:
    with running(make_trainer, "training.micro_batch_size=2") as trainer:
        wanted = [salience(trainer, layer) for layer in (1, 2)]
        measured = measure_experts(trainer.parts)
        assert measured is not None
        for row, one in zip(measured.salience, wanted, strict=True):
            assert row[:6].tolist() == pytest.approx(one, rel=1e-4)
        before, drawn = state_of(trainer), torch.get_rng_state()
        _, now = PruneExpert("all", "a").apply(trainer.parts)
        assert torch.equal(torch.get_rng_state(), drawn)
        pruned = [one["expert"] for one in now["applied"]]
        assert pruned == [one.index(min(one)) for one in wanted]
        after = state_of(trainer)
        for layer, expert in zip((1, 2), pruned, strict=True):
            for name, old in before["model"].items():
                if name.startswith(f"blocks.{layer}.feed_forward.") and "shared" not in name:
                    rest = torch.arange(len(old)) != expert
                    assert torch.equal(after["model"][name][rest], old[rest]), name
                    assert not after["model"][name][expert].any(), name
        for _ in range(3):  # nothing of it comes back
            trainer.train_step()
        assert inconsistencies(trainer) == []
        merged = PruneExpert(1, "a", how="merge").apply(trainer.parts)[1]["applied"][0]
        assert merged["into"] != merged["expert"]
        assert 0 <= merged["weight"] <= 0.5  # the least salient has fewer tokens
        assert inconsistencies(trainer) == []


@pytest.mark.parametrize(
    ("seed", "count"),
    [
        (0, 8),
        pytest.param(1, 20, marks=pytest.mark.long),
        pytest.param(2, 20, marks=pytest.mark.long),
    ],
)
def test_nothing_is_inconsistent_after_each_of_20_random_operations(
    make_trainer: MakeTrainer, seed: int, count: int
) -> None:
    draw, done = random.Random(seed), 0
    with running(make_trainer, "training.optimizer=" + OPTIMIZERS[seed % 2], steps=1) as trainer:
        while done < count:
            layer = draw.choice([1, 2, "all"])
            group = draw.choice(["a", "a", "a", "b"])
            change: Change = draw.choice(
                [
                    AddExpert(layer, group),
                    AddExpert(layer, group, how=draw.choice(["split", "copy"])),
                    AddExpert(layer, group, draw.randrange(3)),
                    PruneExpert(layer, group, how=draw.choice(["drop", "merge"])),
                    PruneExpert(layer, group, draw.randrange(8)),
                    ReleaseExperts(layer, group),
                ]
            )
            before, logits = state_of(trainer), logits_of(trainer, tokens())
            try:
                change.apply(trainer.parts)
            except UltrathinkError:
                after = state_of(trainer)
                assert_equal_tensors(after["model"], before["model"])
                continue
            done += 1
            assert inconsistencies(trainer) == [], change
            if isinstance(change, AddExpert) and change.how == "split":
                assert (logits_of(trainer, tokens()) - logits).abs().max() <= 1e-5
            if done % 4 == 0:
                trainer.train_step()
                assert inconsistencies(trainer) == [], change
        logits = logits_of(trainer, tokens())
        trainer.save()
        trainer.saving.wait_until_written()
        state = state_of(trainer)
    model, _ = load_model(trainer.run.path, "last")
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, logits)
    again = resume_trainer(trainer.run)
    assert inconsistencies(again) == []
    assert_equal_tensors(state_of(again)["model"], state["model"])
    for name, values in state["optimizer"].items():
        assert_equal_tensors(state_of(again)["optimizer"][name], values)
    again.close()


def test_it_continues_bit_for_bit_after_a_resume(make_trainer: MakeTrainer) -> None:
    wanted: list[Change] = [
        AddExpert("all", "a"),
        PruneExpert(1, "b"),
        AddExpert(2, "a", 1, how="copy"),
        PruneExpert(2, "a", how="merge"),
    ]
    states = []
    for changes in (wanted, [*wanted, Stop()]):
        trainer = make_trainer(
            *EXPERTS, "training.max_steps=8", controllers=[At(step4=asks(*changes))]
        )
        if trainer.fit().name == "stopped":
            trainer = resume_trainer(trainer.run)
            trainer.fit()
        states.append(final_state(trainer.run))
        lines = [json.loads(line) for line in trainer.run.decisions.read_text().splitlines()]
        assert [line["action"] for line in lines[:4]] == [change.name for change in wanted]
        counts = [one.router.active.sum().item() for one in trainer.model.expert_layers().values()]
        assert counts == [6 + 1 + 2, 6 + 1 + 1 - 1 + 3]
    assert_equal_tensors(*states)


def test_a_record_repeats_it_without_a_measurement(make_trainer: MakeTrainer) -> None:
    with running(make_trainer) as trainer:
        for change in (
            AddExpert("all", "a"),
            AddExpert("all", "a", 0, how="copy"),
            PruneExpert("all", "a", how="merge"),
            PruneExpert(2, "b"),
        ):
            before = trainer.state.copy()
            _, after = change.apply(trainer.parts)
            wanted, batch = state_of(trainer), trainer.boundary.batch
            trainer.state.roll_back(before)
            trainer.boundary.batch = None
            again = change.as_applied(json.loads(json.dumps(after)))
            Change.kinds[change.name](**vars(again)).apply(trainer.parts)
            found = state_of(trainer)
            assert_equal_tensors(found["model"], wanted["model"])
            for name, values in wanted["optimizer"].items():
                assert_equal_tensors(found["optimizer"][name], values)
            trainer.boundary.batch = batch


def test_a_pruned_model_is_inflated_again_or_given_one_count(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    """YOLO-Master 192 and reap-mlx 80: every reader has the experts of the checkpoint, by layer."""
    with running(make_trainer) as trainer:
        PruneExpert(1, "a", 2).apply(trainer.parts)
        PruneExpert(1, "a", 5).apply(trainer.parts)
        AddExpert(2, "a", 0).apply(trainer.parts)
        PruneExpert("all", "b", 1).apply(trainer.parts)
        trainer.train_step()
        trainer.save()
        trainer.saving.wait_until_written()
        logits = logits_of(trainer, tokens())
        active = [one.router.active for one in trainer.model.expert_layers().values()]
    model, _ = load_model(trainer.run.path, "last")
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, logits)
    for layer, there in zip(model.expert_layers().values(), active, strict=True):
        assert torch.equal(layer.router.active, there)
        assert not layer.experts.down[~there].any()
    contents = inspect_checkpoint(trainer.run.checkpoint("last"))
    assert contents.experts == {"a": {1: 4, 2: 7}, "b": {1: 2, 2: 2}}
    rows = sum(len(one) for one in active) - 4 - 7 - 2 - 2
    numbers = sum(one.numel() for one in model.parameters())
    assert contents.num_empty == rows * (32 + 3 * 32 * 16)
    assert contents.num_parameters == numbers - contents.num_empty
    assert main(["checkpoint", "info", str(trainer.run.path)]) == 0
    out = capsys.readouterr().out
    assert "experts of group a: 4 in layer 1; 7 in layer 2\n" in out
    assert "experts of group b: 2 in each layer\n" in out


def test_a_rollback_returns_the_experts_and_they_are_not_averaged_with_others(
    make_trainer: MakeTrainer,
) -> None:
    with running(make_trainer, steps=1) as trainer:
        snapshot = trainer.control.snapshot()
        trainer.apply_changes()
        before = state_of(trainer)
        trainer.control.add_expert("all", "a")
        trainer.control.prune_expert(2, "a", 0)
        trainer.apply_changes()
        assert trainer.model.has_splits
        with pytest.raises(UltrathinkError, match=r"step 1 has other experts in layer 1"):
            AverageSnapshots([snapshot]).apply(trainer.parts)
        Rollback(snapshot).apply(trainer.parts)
        assert not trainer.model.has_splits
        assert_equal_tensors(state_of(trainer)["model"], before["model"])


REFUSED: list[tuple[Change, str]] = [
    (AddExpert("all", "b"), r"group 'b' in layer 1 is full \(3 of 3 slots.*"
     r"training.init_from=.* model.moe.groups.1.max_experts=4 or more"),
    (PruneExpert(1, "b", 7), "expert 7 of group 'b' in layer 1 cannot be pruned: "
     "there is no such expert; the group has 0 to 2"),
    (AddExpert(1, "a", 6), "expert 6 of group 'a' in layer 1 cannot be copied"),
    (AddExpert(0, "a"), "layer 0.*the layer has no experts; .* experts: 1, 2"),
    (PruneExpert("all", "c"), "group 'c'.* there is no such group; groups: a, b"),
    (PruneExpert("all", "b"), r"cannot be pruned: a token is sent to top_k = 3 .* 2 would be left "
     r".*model.moe.groups.1.top_k=2"),
]  # fmt: skip
ON_DENSE: list[tuple[Change, str]] = [
    (PruneExpert("all", "a"), "cannot be pruned .* this model has no experts; model.moe"),
    (AddExpert(1, "a"), "cannot be added .* this model has no experts; model.moe"),
]


@pytest.mark.parametrize(
    ("cases", "model"), [(REFUSED, (*EXPERTS, "model.moe.groups.1.top_k=3")), (ON_DENSE, ())]
)
def test_what_is_impossible_is_reported_and_changes_nothing(
    make_trainer: MakeTrainer, cases: list[tuple[Change, str]], model: tuple[str, ...]
) -> None:
    recorder = Recorder()
    trainer = make_trainer(*model, "training.max_steps=2", callbacks=[recorder])
    trainer.start()
    trainer.train_step()
    before = state_of(trainer)["model"]
    asks(*(change for change, _ in cases))(trainer.control)
    trainer.apply_changes()
    assert_equal_tensors(state_of(trainer)["model"], before)
    assert recorder.changes == []
    reported = [text for text in recorder.messages if "failed" in text]
    for (_, message), text in zip(cases, reported, strict=True):
        assert re.search(message, text), text
    trainer.close()


def test_a_pair_counts_as_one_expert_to_choose(make_trainer: MakeTrainer) -> None:
    """Two parts of one expert are not two choices: a token would be sent to an empty slot."""
    with running(make_trainer) as trainer:
        AddExpert(1, "a", 0).apply(trainer.parts)
        for expert in (2, 3, 4, 5):
            PruneExpert(1, "a", expert).apply(trainer.parts)
        with pytest.raises(UltrathinkError, match="parts of a split expert are one"):
            PruneExpert(1, "a", 1).apply(trainer.parts)
        router = trainer.model.expert_layers()[1].router
        assert siblings(router.branch, 0) == [6]
        PruneExpert(1, "a").apply(trainer.parts)  # a part, which may leave
        assert router.active[:8].sum() == 2
        assert inconsistencies(trainer) == []


def test_biases_stopped_by_one_idle_layer(make_trainer: MakeTrainer) -> None:
    """torchtitan 3686: in the other layer they move, by its own number of experts."""
    with running(make_trainer) as trainer:
        PruneExpert(2, "a").apply(trainer.parts)
        first, second = (one.router for one in trainer.model.expert_layers().values())
        before = [one.selection_bias.clone() for one in (first, second)]
        load = torch.tensor([[0.0] * 11, [7.0, 1, 1, 1, 1, 1, 0, 0, 3, 3, 3]])
        load[1, :8] *= second.active[:8]
        trainer.model.move_selection_biases(load)
        assert torch.equal(first.selection_bias, before[0])
        mean = load[1, :8].sum() / 5
        moved = second.selection_bias - before[1]
        assert torch.equal(moved[:8].sign(), (mean - load[1, :8]).sign() * second.active[:8])
        assert not moved[8:].any()


@pytest.mark.long
def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[3] / "docs" / "elastic.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    [example] = [code for code in examples if "Surgeon" in code]
    names: dict[str, Any] = {}
    exec(example, names)
    assert main(["checkpoint", "info", "debug"]) == 0
    assert "experts of group a: 4 in layer 0; 5 in layer" in capsys.readouterr().out
    assert inconsistencies(names["trainer"]) == []
