"""Resuming with changes: what each does, what is recorded, and what is refused."""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.unit.training.conftest import TINY, MakeTrainer
from tests.unit.training.observers import At, Recorder, asks, final_state, records, without_time
from ultrathink.config import load_config
from ultrathink.core.errors import CheckpointError, UltrathinkError
from ultrathink.data.tokenizers.byte import ByteTokenizer
from ultrathink.recipes.parts.resume_plan import plan_resume
from ultrathink.recipes.resume import resume_trainer
from ultrathink.recipes.train import build_trainer
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.segments import read_segments
from ultrathink.training.changes import SetClip, SetLearningRateFactor, SetRouting, Stop
from ultrathink.training.control import TrainerControl
from ultrathink.training.trainer import Trainer

STOP_AT_4 = "training.checkpoint={every_steps: 4, keep: 9}"


def stopped(
    make_trainer: MakeTrainer, *overrides: str, length: str = "training.max_steps=10"
) -> Trainer:
    """A run of ten steps that stopped after four."""
    trainer = make_trainer(length, STOP_AT_4, *overrides, controllers=[At(step4=asks(Stop()))])
    assert trainer.fit().name == "stopped"
    return trainer


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of ten steps that stopped after four."""
    place = tmp_path_factory.mktemp("stopped")
    overrides = [*TINY, f"run.dir={place}", "training.max_steps=10", STOP_AT_4]
    config = load_config("debug", [*overrides, f"data.cache_dir={place / 'cache'}"])
    trainer = build_trainer(config, controllers=[At(step4=asks(Stop()))])
    assert trainer.fit().name == "stopped"
    return trainer.run.path


@pytest.fixture
def run(stopped_once: Path, tmp_path: Path) -> RunFolder:
    """A copy of that run."""
    return RunFolder(shutil.copytree(stopped_once, tmp_path / "runs" / "debug", symlinks=True))


def rates(run: RunFolder) -> list[float]:
    return [row["lr"] for row in records(run) if row["split"] == "train"]


# -- what is recorded -----------------------------------------------------------------------------


def test_a_run_that_dies_right_after_a_change_continues_with_it(
    run: RunFolder, make_trainer: MakeTrainer
) -> None:
    dead = resume_trainer(run, overrides=["training.optimizer.lr=0.005"], reset=["optimizer"])
    dead.close()  # before its first checkpoint
    first, second = read_segments(run.segments)
    assert (first.from_step, first.changes, first.reset) == (0, (), ())
    assert (second.from_step, second.reset) == (4, ("optimizer",))
    [change] = second.changes
    assert (change.key, change.after) == ("training.optimizer.lr", 0.005)
    assert second.environment["packages"]["torch"] == torch.__version__
    assert second.environment["hardware"]["threads"] == torch.get_num_threads()
    config = run.read_config()
    assert config.origin("training.optimizer.lr") == "override training.optimizer.lr=0.005"
    again = resume_trainer(run)
    assert again.training.optimizer.lr == 0.005
    assert not any(optimizer.state for optimizer in again.stepper.optimizers)
    assert again.fit().name == "finished"
    whole = stopped(make_trainer).run
    resume_trainer(whole, overrides=["training.optimizer.lr=0.005"], reset=["optimizer"]).fit()
    assert without_time(records(run)) == without_time(records(whole))


def test_an_earlier_checkpoint_continues_as_it_was(make_trainer: MakeTrainer) -> None:
    run = stopped(make_trainer, "training.checkpoint={every_steps: 2, keep: 9}").run
    trainer = resume_trainer(run, overrides=["training.optimizer.lr=0.005"])
    trainer.fit()
    recorder = Recorder()
    back = resume_trainer(run, "2", callbacks=[recorder])
    assert back.training.optimizer.lr != 0.005
    back.fit()
    whole = make_trainer("training.max_steps=10", "training.checkpoint={every_steps: 2, keep: 9}")
    whole.fit()
    assert without_time(records(run)) == without_time(records(whole.run))
    assert any(
        "as in the checkpoint of step 2: training.optimizer.lr" in m for m in recorder.messages
    )


# -- what changes do ------------------------------------------------------------------------------


def test_learning_rate_changes_from_here_on_and_moments_stay(make_trainer: MakeTrainer) -> None:
    plain = stopped(make_trainer).run
    before = rates(plain)
    trainer = resume_trainer(plain, overrides=["training.optimizer.lr=0.0005"])
    moments = trainer.stepper.optimizers[0].state
    assert {state["step"].item() for state in moments.values()} == {4.0}
    trainer.fit()
    after = rates(plain)
    assert after[:4] == before
    undisturbed = make_trainer("training.max_steps=10")
    undisturbed.fit()
    peak = undisturbed.training.optimizer.lr
    assert after[4:] == pytest.approx([r * 0.0005 / peak for r in rates(undisturbed.run)[4:]])


def test_batch_size_changes_and_no_sample_is_lost_or_repeated(run: RunFolder) -> None:
    trainer = resume_trainer(run, overrides=["training.batch_size=8"])
    assert trainer.loader.samples_seen == 16
    assert trainer.settings.micro_batch_size == 8  # what auto comes to for the new size
    trainer.fit()
    tokens = [row["tokens"] for row in records(run) if row["split"] == "train"]
    assert tokens == [128 * n for n in (1, 2, 3, 4)] + [512 + 256 * n for n in range(1, 7)]
    assert trainer.loader.samples_seen == 16 + 6 * 8


@pytest.mark.parametrize(
    ("length", "override", "total"),
    [
        ("training.max_steps=10", "training.max_steps=20", 20),
        ("training.max_tokens=1280", "training.batch_size=8", 4 + 3),  # 768 tokens are left
        ("training.max_tokens=1280", "training.max_tokens=2560", 20),
        ("training.max_steps=10", "training.max_tokens=2560", 20),
    ],
)
def test_another_length_counts_what_was_done(
    make_trainer: MakeTrainer, length: str, override: str, total: int
) -> None:
    resumed = resume_trainer(stopped(make_trainer, length=length).run, overrides=[override])
    assert resumed.fit().name == "finished"
    assert resumed.progress.step == total


def test_a_finished_run_continues_when_it_is_given_more(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        "training.max_steps=6",
        "training.schedule={type: cosine, warmup: 1}",
        "training.checkpoint={every_steps: 2, keep: 2}",
    )
    trainer.fit()
    run, kept = trainer.run, trainer.run.steps()
    # Killed between the last save and the removal of what it replaces: no save follows.
    shutil.copytree(run.step_path(6), run.step_path(1))
    plan = plan_resume(run)
    assert plan.is_finished
    plan.release()
    assert run.steps() == kept
    longer = resume_trainer(trainer.run, overrides=["training.max_steps=12"])
    assert longer.fit().name == "finished"
    assert [row["step"] for row in records(trainer.run) if row["split"] == "train"] == list(
        range(1, 13)
    )
    after_warmup = rates(trainer.run)
    assert after_warmup == sorted(after_warmup, reverse=True), "a resumed cosine must not rise"


def test_another_schedule_begins_where_the_old_one_stands(make_trainer: MakeTrainer) -> None:
    run = stopped(make_trainer, "training.schedule={type: cosine, warmup: 1}").run
    before = rates(run)
    other = "training.schedule={type: wsd, decay: 0.5}"
    resume_trainer(run, overrides=[other, "training.max_steps=40"]).fit()
    after = rates(run)
    assert after[:4] == before
    assert after[4] <= before[-1]
    assert all(later <= earlier for earlier, later in itertools.pairwise(after[3:]))


def test_reset_restarts_optimizer_and_schedule_over_what_is_left(make_trainer: MakeTrainer) -> None:
    run = stopped(make_trainer, "training.schedule={type: cosine, warmup: 2}").run
    muon = ["training.optimizer.type=muon", "training.max_steps=24"]
    trainer = resume_trainer(run, reset=["schedule", "optimizer"], overrides=muon)
    assert not any(optimizer.state for optimizer in trainer.stepper.optimizers)
    trainer.fit()
    assert any("momentum" in name for name in final_state(run))
    peak = trainer.training.optimizer.lr
    after = rates(run)[4:]
    assert after[:2] == pytest.approx([peak / 2, peak])
    tail = [0.1 + 0.9 * (1 + math.cos(math.pi * n / 18)) / 2 for n in range(18)]
    assert after[2:] == pytest.approx([peak * share for share in tail])


def test_other_mixture_weights_continue_where_each_source_stands(make_trainer: MakeTrainer) -> None:
    two = "data.train=[{type: dummy, name: a, weight: 1}, {type: dummy, name: b, seed: 5}]"
    run = stopped(make_trainer, two).run
    trainer = resume_trainer(run, overrides=["data.train.0.weight=3"])
    assert trainer.loader.samples_seen == 16
    assert list(trainer.loader.weights) == [3, 1]
    trainer.fit()
    resumed = resume_trainer(run, overrides=["training.max_steps=12"])  # a plain state again
    assert list(resumed.loader.weights) == [3, 1]
    resumed.fit()


def test_other_data_begins_its_own_order(run: RunFolder, tmp_path: Path) -> None:
    text = tmp_path / "more.txt"
    text.write_text("another text to go on with, line after line.\n" * 300)
    trainer = resume_trainer(run, overrides=[f"data.train=[{{type: text, path: {text}}}]"])
    assert trainer.loader.samples_seen == 0
    assert trainer.progress.tokens == 512
    assert trainer.progress.best is None  # scores on other text do not compare
    trainer.fit()
    segment = read_segments(run.segments)[-1]
    assert segment.reset == ("data",)
    assert [change.key for change in segment.changes] == ["data.train"]
    assert json.loads(run.data_record.read_text())["data_hash"] == trainer.identity["data_hash"]


# -- a run that was moved -------------------------------------------------------------------------


def test_a_moved_run_folder_resumes_bit_for_bit(
    run: RunFolder, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    moved = RunFolder(tmp_path / "another place" / "renamed")
    moved.path.parent.mkdir()
    shutil.move(run.path, moved.path)
    line = json.loads(moved.segments.read_text())
    line["environment"]["hardware"]["cpu"] = "Another Processor 9000"
    moved.segments.write_text(json.dumps(line) + "\n")
    recorder = Recorder()
    assert resume_trainer(moved, callbacks=[recorder]).fit().name == "finished"
    [reported] = [text for text in recorder.messages if "not bit for bit" in text]
    assert "processor Another Processor 9000 -> " in reported
    assert not run.path.exists()
    whole = make_trainer("training.max_steps=10", STOP_AT_4)
    whole.fit()
    assert without_time(records(moved)) == without_time(records(whole.run))
    one, other = final_state(moved), final_state(whole.run)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_run_without_a_checkpoint_begins_again_in_its_folder(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("training.max_steps=6")
    trainer.start()
    trainer.notify("on_step", trainer.train_step())  # and then the machine goes down
    trainer.close()
    assert trainer.run.steps() == []
    again = resume_trainer(trainer.run)
    assert again.run.path == trainer.run.path
    assert again.fit().name == "finished"
    whole = make_trainer("training.max_steps=6")
    whole.fit()
    assert without_time(records(again.run)) == without_time(records(whole.run))
    empty = make_trainer("training.max_steps=6")
    empty.close()
    with pytest.raises(UltrathinkError, match="ended before its first checkpoint"):
        resume_trainer(empty.run, overrides=["training.max_steps=7"])


# -- what is refused ------------------------------------------------------------------------------


REFUSED = {
    "training.optimizer.type=muon": "restart it with --reset optimizer",
    "training.max_steps=3": "the run is at step 4 already; give more",
    "training.optimzer.lr=1": "Did you mean",
    "training.batch_size=many": "batch_size = 'many' .* whole number",
}


def test_changes_that_a_run_cannot_take_are_refused(run: RunFolder) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for override, message in REFUSED.items():
        with pytest.raises(UltrathinkError, match=message):
            resume_trainer(run, overrides=[override])
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    changed = [path.name for path in after if after[path] != before.get(path)]
    assert [name for name in changed if name not in (".owner.json", ".lock")] == []
    config = run.read_config()
    run.write_config(config.replace({"training.clip": 0.5}, origin="by hand"))
    with pytest.raises(UltrathinkError, match=r"training\.clip: 1\.0 -> 0\.5") as caught:
        resume_trainer(run)
    assert f"--resume {run.path} training.clip=0.5" in str(caught.value)
    run.write_config(config)
    assert resume_trainer(run).fit().name == "finished"  # and the lock is free


def test_other_code_for_the_order_or_the_tokenizer_is_noticed(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ultrathink.data.permutation._NUM_ROUNDS", 8)
    with pytest.raises(CheckpointError, match="the code that orders and packs samples changed"):
        resume_trainer(run)
    trainer = resume_trainer(run, reset=["data"])  # the way out that the message names
    assert trainer.loader.samples_seen == 0
    assert trainer.fit().name == "finished"
    encode = ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: encode(self, text)[::-1])
    with pytest.raises(CheckpointError, match="splits text into other tokens"):
        resume_trainer(run)


# -- experts --------------------------------------------------------------------------------------

EXPERTS = (
    "model.moe={groups: [{name: knowledge, num_experts: 4, top_k: 2}], intermediate_size: 8, "
    "balance: {load: 0.02}}"
)


def test_configured_values_may_change_and_other_live_values_stay(
    make_trainer: MakeTrainer,
) -> None:
    def slow_down(control: TrainerControl) -> None:
        for change in (SetLearningRateFactor(0.5), SetClip(0.1), Stop()):
            control.request(change, reason="test")

    trainer = make_trainer(
        "training.max_steps=10",
        STOP_AT_4,
        EXPERTS,
        controllers=[At(step2=asks(SetRouting("temperature", 2.0)), step4=slow_down)],
    )
    trainer.fit()
    again = resume_trainer(trainer.run)
    assert (again.settings.lr_factor, again.settings.clip) == (0.5, 0.1)
    again.close()
    overrides = ["model.moe.routing.capacity_factor=1.5", "model.moe.balance.load=0.5"]
    overrides.append("training.clip=0.7")
    resumed = resume_trainer(trainer.run, overrides=overrides)
    routing = resumed.model.routing
    assert routing is not None
    names = ("capacity_factor", "load", "temperature")
    assert [routing.get(name) for name in names] == [1.5, 0.5, 2.0]
    assert (resumed.settings.lr_factor, resumed.settings.clip) == (0.5, 0.7)
    assert resumed.fit().name == "finished"
