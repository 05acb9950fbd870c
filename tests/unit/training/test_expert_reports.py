"""What a run of a mixture of experts reports: in its files, and to who watches."""

import json
from typing import Any

import pytest

from tests.stress.evidence import differences
from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import At, Recorder, records
from tests.unit.training.test_resume_matrix import break_off_after
from ultrathink import resume_trainer
from ultrathink.insight.comparison import compare, read_side
from ultrathink.runs.checking import check_run
from ultrathink.runs.folder import RunFolder
from ultrathink.training.trainer import Trainer

GROUPS = "[{name: skill, num_experts: 4, top_k: 2}, {name: meta, num_experts: 3, top_k: 1}]"
EXPERTS = (
    f"model.moe={{groups: {GROUPS}, intermediate_size: 8}}",
    "model.moe.routing.warmup_steps=3",
    "training.max_steps=9",
)
UNBALANCED = (
    "model.moe.balance={load: 0, importance: 0, entropy: 0, z: 0, bias_rate: 0}",
    "training.checkpoint={every_steps: 2, keep: 9}",
)


def lines(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "experts.jsonl").read_text().splitlines()]


def without_expert(trainer: Trainer, expert: int) -> Trainer:
    """Let nobody choose ``expert`` of the first group in the first layer."""
    trainer.model.blocks[0].feed_forward.router.selection_bias[expert] = -1e4
    return trainer


def test_every_logged_step_has_its_line_and_metrics_tell_the_same_in_short(
    make_trainer: MakeTrainer,
) -> None:
    recorder = Recorder()
    trainer = make_trainer(*EXPERTS, "training.log_every=4", callbacks=[recorder])
    trainer.fit()
    reported = lines(trainer.run)
    assert [line["step"] for line in reported] == [1, 4, 8, 9]
    assert [one.step for one in recorder.steps if one.experts is not None] == [1, 4, 8, 9]
    rows = [row for row in records(trainer.run) if row["split"] == "train"]
    for row, line in zip(rows, reported, strict=True):
        assert line["num_tokens"] == 4 * 32
        assert line["layers"] == [0, 1]
        assert (row["step"], row["time"]) == (line["step"], line["time"])
        for group, top_k in (("skill", 2), ("meta", 1)):
            layers = line["groups"][group]
            for loads in layers["load"]:
                assert sum(loads) == top_k * line["num_tokens"]
            assert row[f"experts/{group}/gini"] == max(layers["gini"])
            assert row[f"experts/{group}/dead"] == sum(layers["dead"])
            mean = sum(layers["utilization"]) / 2
            assert row[f"experts/{group}/utilization"] == pytest.approx(mean, rel=1e-4)


def test_commands_that_read_runs_cope(finished: MakeTrainer) -> None:
    trainers = [finished(*EXPERTS), finished("training.max_steps=9")]
    for trainer in trainers:
        assert {finding.status for finding in check_run(trainer.run).findings} == {"ok"}
    labels = ("mixture", "dense")
    mixture, dense = (read_side(t.run, label) for t, label in zip(trainers, labels, strict=True))
    found = compare([mixture, dense])
    assert found.lone_metrics["train experts/skill/gini"] == (mixture.label,)
    assert compare([mixture, mixture]).agreements[0][0].is_identical
    run = trainers[1].run
    assert not (run.path / "experts.jsonl").exists()
    assert not any("experts/" in name for row in records(run) for name in row)


@pytest.mark.parametrize("saved", [4, 8])
def test_a_run_that_broke_off_has_the_same_experts_in_the_end(
    saved: int, make_trainer: MakeTrainer
) -> None:
    """Line for line but for time; and what was reported, or was about to be, is reported once."""
    options = (*EXPERTS, *UNBALANCED, "training.max_steps=14")
    recorder = Recorder()
    whole = without_expert(make_trainer(*options, callbacks=[Recorder()]), 2)
    whole.fit()
    broken = without_expert(make_trainer(*options, callbacks=[recorder]), 2)
    end = break_off_after(broken.run.path / f"checkpoints/step_{saved:08}")
    broken.controllers = [At(**{f"step{saved + 1}": end})]
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    assert lines(broken.run)[-1]["step"] == saved + 1
    resumed = resume_trainer(broken.run, callbacks=[recorder])
    assert resumed.progress.step == saved
    assert resumed.fit().name == "finished"
    assert differences(whole.run.path, resumed.run.path) == []
    assert len(lines(resumed.run)) == 14


def test_dead_experts_are_reported_after_warm_up_and_in_the_log(make_trainer: MakeTrainer) -> None:
    recorder = Recorder()
    words = ("training.max_steps=210", "training.checkpoint.every_steps=null")
    trainer = make_trainer(*EXPERTS, *UNBALANCED, *words, callbacks=[recorder])
    without_expert(trainer, 1).fit()
    (text,) = [text for text in recorder.messages if "group skill has" in text]
    # Before, balancing may still be finding its way.
    assert text.startswith("dead_expert at step 200 (medium): group skill has ")
    assert f"warning: {text}" in (trainer.run.logs / "run.log").read_text()
