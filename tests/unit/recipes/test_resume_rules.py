"""Every option of the tree, given another value in a resume, does what its field declares."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.config.whole import TYPES, WHOLE, another
from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import At, Recorder, asks, final_state, records, without_time
from ultrathink.config import Config, load_config
from ultrathink.config.base import PartConfig
from ultrathink.config.overrides import flatten, parse_override
from ultrathink.config.reflection import field_at, rule_of
from ultrathink.config.yaml_format import dump_yaml
from ultrathink.core.errors import UltrathinkError
from ultrathink.recipes.parts.resume_plan import ResumePlan, plan_resume
from ultrathink.recipes.resume import resume_trainer
from ultrathink.runs.checking import check_run
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.segments import read_segments
from ultrathink.training.changes import Stop


@pytest.fixture(params=WHOLE)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    """A run folder with a checkpoint that holds what a plan reads."""
    config = load_config("debug", [f"run.dir={tmp_path}", *WHOLE[request.param]])
    run, config = RunFolder.create(config)
    run.write_config(config)
    state: dict[str, Any] = {
        "model": {"w": torch.zeros(1)},
        "progress": {"step": 4, "elapsed_s": 1.0, "is_over": False},
        "budget": {"total_steps": 20, "tokens_per_step": 512, "validation_s": 2.0},
        "config": config.model_dump(mode="json"),
    }
    run.save(4, state, is_best=False, keep=9)
    return run


def plan(run: RunFolder, override: str, *reset: str) -> ResumePlan:
    found = plan_resume(run, overrides=[override], reset=reset)
    found.release()
    assert isinstance(found, ResumePlan)
    return found


def test_every_option_is_refused_or_applied_as_declared(run: RunFolder) -> None:
    values = flatten(run.read_config().model_dump(mode="json"))
    tried = {"fixed": 0, "felt": 0, "free": 0}
    values.update({key: values[f"{key}.type"] for key in TYPES})
    values.update({"data.train": None, "data.val": None})  # as a whole
    for key, value in values.items():
        found = field_at(Config, key.split("."), None)
        assert found is not None, key
        rule, wanted = rule_of(Config, key), another(key, value)
        if wanted is None or (key.endswith(".type") and issubclass(found[0], PartConfig)):
            continue
        override = f"{key}={dump_yaml(wanted, one_line=True)}"
        tried[rule.rule] += 1
        if rule.rule == "fixed":
            with pytest.raises(UltrathinkError) as caught:
                plan(run, override)
            said = str(caught.value)
            assert said.startswith(f"{key} cannot change to {wanted} in a resumed run: "), key
            assert f": {rule.because}; start a new run with it: " in said, key
            assert f"train CONFIG {override} (with training.init_from={run.path} " in said, key
            continue
        made = plan(run, override, *(("optimizer",) if key == "training.optimizer" else ()))
        changes = [one for one in made.changes if f"{key}.".startswith(f"{one.key}.")]
        reported = [
            text for text, _ in made.remarks if text.startswith(f"changed after step 4: {key}")
        ]
        assert bool(changes) == rule.is_compared, key
        assert all(change.felt == (rule.rule == "felt") for change in changes), key
        assert bool(reported) == (rule.rule == "felt" and key in {one.key for one in changes}), key
        if rule.is_place:
            assert flatten(made.config.model_dump(mode="json"))[key] == wanted
    assert min(tried.values()) > 15, tried


def test_a_mapping_is_refused_for_what_is_fixed_in_it(run: RunFolder) -> None:
    made = plan(run, "model={dropout: 0.5, rope_theta: 5000}")
    assert {change.key for change in made.changes} == {"model.dropout", "model.rope_theta"}
    with pytest.raises(UltrathinkError, match=r"^model\.hidden_size cannot change to 32 "):
        plan(run, "model={dropout: 0.5, hidden_size: 32}")
    same = dump_yaml(run.read_config().tokenizer.model_dump(mode="json"), one_line=True)
    assert plan(run, f"tokenizer={same}").changes == (), "the same values again"


def test_a_place_may_be_edited_by_hand(run: RunFolder) -> None:
    run.write_config(run.read_config().replace({"data.cache_dir": "moved"}, origin="by hand"))
    made = plan(run, "training.log_every=3")
    assert made.config.data.cache_dir == "moved"
    assert made.config.origin("training.log_every") == "override training.log_every=3"


FREE = (
    "training.log_every=2",
    "training.eval.every_steps=3",
    "training.eval.batch_size=3",
    "training.checkpoint={every_steps: 5, keep: 1}",
    "training.sample.max_new_tokens=3",
    "training.activation_checkpointing=full",
    "data.num_workers=1",
    "monitoring.sinks=[jsonl, tensorboard]",
    "orchestrator.mode=off",
)


def test_what_is_free_is_applied_silently_and_what_is_felt_on_record(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The resumed run takes the steps of one that never stopped, bit for bit."""
    whole = make_trainer("training.max_steps=8")
    whole.fit()
    stop = At(step4=asks(Stop()))
    make_trainer("training.max_steps=8", "run.name=stopped", controllers=[stop]).fit()
    run = RunFolder(tmp_path / "runs" / "stopped")
    recorder = Recorder()
    resume_trainer(run, overrides=FREE, callbacks=[recorder]).fit()
    assert not [text for text in recorder.messages if "changed" in text]
    last = read_segments(run.segments)[-1]
    assert last.felt == ()
    keys = {parse_override(override)[0] for override in FREE}
    assert all(any(c.key.startswith(key) for c in last.changes) for key in keys)
    expected, found = (without_time(records(one)) for one in (whole.run, run))
    losses = {row["step"]: row["loss"] for row in expected if row["split"] == "train"}
    assert [row["loss"] for row in found if row["split"] == "train" and row["step"] > 4] == [
        losses[step] for step in (6, 8)
    ]
    weights = final_state(whole.run)
    assert all(
        torch.equal(tensor, weights[name])
        for name, tensor in final_state(run).items()
        if re.match(r"(model|optimizer)\.", name)
    )
    recorder = Recorder()
    felt = ["training.max_steps=10", "training.clip=0.5"]
    resume_trainer(run, overrides=felt, callbacks=[recorder]).fit()
    assert "changed after step 8: training.clip: 1.0 -> 0.5" in recorder.messages
    assert {change.key for change in read_segments(run.segments)[-1].felt} == {
        "training.max_steps",
        "training.clip",
    }
    details = [one.detail for one in check_run(run).findings if one.item == "segments.jsonl"]
    assert len(details) == 1
    assert "changes that affect training: after step 8 " in details[0]
    assert "training.clip: 1.0 -> 0.5" in details[0]
    assert "log_every" not in details[0]
