"""Sources that name their expert groups: what a run learns of it, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.experts import MIXTURE
from tests.unit.training.observers import assert_equal_tensors, records
from ultrathink.checkpoint.format import load_checkpoint
from ultrathink.config import load_config
from ultrathink.core.errors import ConfigError
from ultrathink.model.experts.group_gates import group_weights
from ultrathink.recipes.resume import resume_trainer
from ultrathink.recipes.train import build_trainer
from ultrathink.training.trainer import Trainer

GATES = (*MIXTURE, "model.moe.group_gates=true", "model.moe.balance.groups=0.3")


def sources(*groups: str) -> str:
    """Texts of the same kind with other words; each belongs to a group."""
    each = "num_documents: 60, num_words: 40"
    items = [
        f"{{type: dummy, name: s{n}, seed: {n}, groups: [{group}], {each}}}"
        for n, group in enumerate(groups)
    ]
    return f"data.train=[{', '.join(items)}]"


def last(trainer: Trainer) -> Any:
    """The last line of ``metrics.jsonl`` of a step."""
    return [line for line in records(trainer.run) if line["split"] == "train"][-1]


def take_step(trainer: Trainer) -> Any:
    trainer.model.train()
    return trainer.stepper.take_step(trainer.loader.next_batch(), trainer.settings, 1.0)


def test_micro_batches_agree(make_trainer: MakeTrainer) -> None:
    """Means are over the tokens of the batch, whatever the share of a source that names no group
    in a micro-batch."""
    found = []
    for size in (8, 2):
        trainer = make_trainer(
            *GATES,
            sources("b", "", "a, b"),
            "training.precision=fp64",
            "training.batch_size=8",
            f"training.micro_batch_size={size}",
        )
        losses = [take_step(trainer).aux_losses["moe_groups"] for _ in range(2)]
        found.append({"losses": torch.tensor(losses)} | dict(trainer.model.state_dict()))
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-9, msg=name)
    assert 0.0 < float(found[0]["losses"][0]) < 0.3 * 2 * 0.7  # two layers, ln 2, some without


def test_a_run_learns_which_text_belongs_to_which_group(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    items = []
    for name, letters, group in (("s", "abcde ", "b"), ("t", "vwxyz ", "a")):
        (tmp_path / name).write_text("".join(Random(1).choices(letters, k=3000)))
        items.append(f"{{type: text, path: {tmp_path / name}, groups: [{group}]}}")
    words = (f"data.train=[{', '.join(items)}]", "training.max_steps=30", "training.batch_size=8")
    trainer = make_trainer(*GATES, *words)
    trainer.fit()
    batch = trainer.loader.next_batch()
    seen: list[torch.Tensor] = []
    gates = trainer.model.blocks[2].feed_forward.router.group_gates
    gates.register_forward_hook(lambda *parts: seen.append(group_weights(parts[2]).detach()))
    trainer.model.eval()(batch.input_ids)
    sums = [seen[0][batch.source_ids == source].mean(0) for source in (0, 1)]
    assert sums[0][1] > 1.1 < sums[1][0]  # b of the first source, a of the second
    lines = (trainer.run.path / "experts.jsonl").read_text(encoding="utf-8").splitlines()
    groups = json.loads(lines[-1])["groups"]
    each = [a + b for a, b in zip(*(groups[name]["weight"] for name in "ab"), strict=True)]
    assert each == pytest.approx([2.0, 2.0], rel=1e-4)  # 1 on average, in both layers
    assert 0.5 < last(trainer)["experts/a/weight"] < 1.5


def test_a_resumed_run_equals_one_that_went_on(make_trainer: MakeTrainer) -> None:
    words = (*GATES, sources("b", "a"), "training.checkpoint={every_steps: 3, keep: 9}")
    whole = make_trainer(*words, "training.max_steps=6")
    whole.fit()
    again = resume_trainer(whole.run, 3)
    again.fit()
    here, there = (
        load_checkpoint(run.path / "checkpoints" / "last") for run in (whole.run, again.run)
    )
    assert_equal_tensors(here["model"], there["model"])
    assert "routing.groups" in here["model"]


def test_groups_of_a_source_change_no_sample_and_no_cache(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    text, cache = tmp_path / "a.txt", tmp_path / "cache"
    text.write_text("some words of a text to learn from. " * 200)
    for source in (f"type: text, path: {text}", "type: dummy"):
        found = []
        for groups in ("", "a"):
            words = (f"data.cache_dir={cache}", f"data.train=[{{{source}, groups: [{groups}]}}]")
            trainer = make_trainer(*GATES, *words)
            files = {path for path in cache.rglob("*") if path.is_file()}
            found.append((trainer.identity["data_hash"], files))
        assert found[0] == found[1]


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no such group": (
        (*GATES, sources("a", "z")),
        r"data\.train\.1\.groups: there is no expert "
        r"group 'z'\. Known: a, b\.",
    ),
    "no experts": (
        (sources("a"),),
        r"data\.train\.0\.groups: there is no expert group 'a'\. "
        r"The model has no expert groups\.",
    ),
    "no gates": (
        (*MIXTURE, sources("", "a")),
        r"data\.train\.1\.groups names a, .* set model\.moe\."
        r"group_gates=true, or leave groups out \(there are a, b\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_source_of_a_group_that_does_not_exist_is_refused(name: str) -> None:
    words, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        load_config("debug", words)


def test_the_example_of_the_manual_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "elastic.md").read_text(encoding="utf-8")
    section = text.split("## Experts that mean their names")[1]
    [example] = re.findall(r"```yaml\n(# elastic-groups\.yaml\n.*?)```", section, re.DOTALL)
    path = tmp_path / "elastic-groups.yaml"
    path.write_text(example, encoding="utf-8")
    config = load_config(path)
    assert [source.groups for source in config.data.train] == [("knowledge",), ("skill",)]
    few = ("training.max_steps=1", "tokenizer=byte", "training.compile=false", "data.seq_len=16")
    small = "data.train=[{type: dummy, groups: [knowledge]}]"  # to read all of stdlib takes long
    trainer = build_trainer(load_config(path, [*few, small, f"run.dir={tmp_path / 'runs'}"]))
    trainer.fit()
    assert "expert_group_weight" in trainer.model(torch.zeros(1, 4, dtype=torch.int64)).stats
