import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import At, Recorder, asks, records
from ultrathink.core.errors import CheckpointError
from ultrathink.data.sources.dummy import DummySource
from ultrathink.data.tokenizers.base import load_tokenizer
from ultrathink.recipes.resume import resume_trainer
from ultrathink.training.callbacks import Callback, StepReport
from ultrathink.training.changes import Stop
from ultrathink.training.trainer import Trainer

# -- what a run writes ----------------------------------------------------------------------------


def test_metrics_have_the_promised_fields(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("training.max_steps=7", "training.log_every=3")
    assert trainer.fit().name == "finished"
    rows = records(trainer.run)
    train = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train] == [1, 3, 6, 7]  # the first and the last always
    for row in train:
        assert {"loss", "tokens", "lr", "grad_norm", "tokens_per_sec", "time"} <= row.keys()
        assert row["tokens"] == row["step"] * 4 * 32
    [val] = [row for row in rows if row["split"] == "val"]
    assert val["step"] == 7
    assert val["ppl"] == pytest.approx(math.exp(val["loss"]))
    # One token a byte; end-of-text tokens are predicted too but have no bytes.
    assert val["bits_per_byte"] == pytest.approx(val["loss"] / math.log(2), rel=0.02)
    assert 0 <= val["token_accuracy"] <= 1


def test_bits_per_byte_count_the_bytes_of_the_held_out_text(make_trainer: MakeTrainer) -> None:
    """Recomputed from the text itself and the full logits, for tokens of several bytes."""
    trainer = make_trainer("training.max_steps=1", "tokenizer={type: bpe, vocab_size: 300}")
    trainer.fit()
    val = next(row for row in records(trainer.run) if row["split"] == "val")
    config = trainer.run.read_config()
    source = DummySource(config.data.train[0])
    texts = [document.text for document in source.documents("val")]
    tokenizer = load_tokenizer(trainer.run.tokenizer)
    ids = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eot_id]][:-1]
    nats = 0.0
    trainer.model.eval()
    for start in range(0, len(ids) - 1, config.data.seq_len):
        window = torch.tensor(ids[start : start + config.data.seq_len + 1])
        logits = trainer.model(window[None, :-1]).logits[0]
        nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
    num_bytes = sum(len(text.encode()) for text in texts)
    assert num_bytes > 1.5 * len(ids)
    assert val["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert val["bits_per_byte"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)


def test_training_learns(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("training.max_steps=60", "training.optimizer.lr=0.01")
    trainer.fit()
    losses = [row["loss"] for row in records(trainer.run) if row["split"] == "train"]
    assert losses[0] > 5.0
    assert sum(losses[-5:]) / 5 < 2.6


def test_the_run_folder_is_complete(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        "training.max_steps=2",
        "training.sample.prompts=['the ']",
        "training.sample.max_new_tokens=4",
        "monitoring.sinks=[jsonl, tensorboard]",
    )
    trainer.fit()
    path = trainer.run.path
    expected = [
        ".lock",
        "checkpoints",
        "config.yaml",
        "data.json",
        "logs",
        "manifest.json",
        "metrics.jsonl",
        "origins.yaml",
        "samples.jsonl",
        "segments.jsonl",
        "tensorboard",
        "tokenizer",
    ]
    assert sorted(entry.name for entry in path.iterdir()) == expected
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["packages"]["torch"] == torch.__version__
    assert manifest["data_hash"]
    assert manifest["hardware"]["cpu_cores"] >= 1
    config = trainer.run.read_config()
    assert config.training.micro_batch_size == 4  # what auto came to
    assert config.origin("training.micro_batch_size").startswith("chosen at run time")
    assert config.model.attention.backend in ("sdpa", "blocks")
    [sample] = (path / "samples.jsonl").read_text().splitlines()
    assert json.loads(sample)["prompt"] == "the "


# -- resuming -------------------------------------------------------------------------------------


def test_a_resumed_cosine_continues_falling(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        "training.max_steps=10",
        "training.checkpoint.every_steps=6",
        controllers=[At(step6=asks(Stop()))],
    )
    trainer.fit()
    recorder = Recorder()
    resume_trainer(trainer.run, callbacks=[recorder]).fit()
    rates = [row["lr"] for row in records(trainer.run) if row["split"] == "train"]
    assert len(rates) == 10
    after_warmup = rates[5:]
    assert after_warmup == sorted(after_warmup, reverse=True)
    assert [report.step for report in recorder.steps] == [7, 8, 9, 10]


# -- starting from weights ------------------------------------------------------------------------


def test_init_from_takes_weights_and_tokenizer_only(make_trainer: MakeTrainer) -> None:
    first = make_trainer("training.max_steps=3")
    first.fit()
    second = make_trainer("training.max_steps=3", f"training.init_from={first.run.path}")
    assert second.progress.step == 0
    here, there = second.model.state_dict(), first.model.state_dict()
    assert all(torch.equal(here[name], there[name]) for name in there)
    for source in (f"{first.run.path}@3", first.run.checkpoint("last")):
        third = make_trainer(f"training.init_from={source}", "training.max_steps=1")
        assert torch.equal(third.model.state_dict()["norm.weight"], there["norm.weight"])
        assert third.fit().name == "finished"


def test_init_from_another_shape_names_the_weight(make_trainer: MakeTrainer) -> None:
    first = make_trainer("training.max_steps=1")
    first.fit()
    with pytest.raises(CheckpointError, match="holds another model"):
        make_trainer(f"training.init_from={first.run.path}", "model.num_layers=3")
    with pytest.raises(CheckpointError, match="Their vocabularies differ: use the tokenizer"):
        make_trainer(f"training.init_from={first.run.path}", "model.vocab_size=300")


def test_best_is_the_best_by_the_chosen_figure(make_trainer: MakeTrainer) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        "training.max_steps=6",
        "training.eval.every_steps=1",
        "training.checkpoint.best_by=token_accuracy",
        callbacks=[recorder],
    )
    trainer.fit()
    best = max(recorder.validations, key=lambda report: report.figures["token_accuracy"])
    assert int(trainer.run.checkpoint("best").name.removeprefix("step_")) == best.step
    state: Trainer = trainer
    assert state.progress.best == best.figures["token_accuracy"]


# -- what goes wrong ------------------------------------------------------------------------------


def test_training_continues_after_a_step_that_is_not_finite_and_a_callback_that_fails(
    make_trainer: MakeTrainer,
) -> None:
    recorder = Recorder()
    trainer = make_trainer("training.max_steps=4", callbacks=[Failing(), recorder])
    original, calls = trainer.objective.sums, []

    def sometimes_nan(*inputs: Any) -> Any:
        calls.append(1)
        sums = original(*inputs)
        return sums._replace(loss=sums.loss * math.nan) if len(calls) == 2 else sums

    trainer.objective.sums = sometimes_nan
    trainer.fit()
    assert [report.skipped for report in recorder.steps] == [False, True, False, False]
    assert any("step 2 was skipped" in text for text in recorder.messages)
    assert "warning: step 2 was skipped" in (trainer.run.logs / "run.log").read_text()
    rows = [row for row in records(trainer.run) if row["split"] == "train"]
    assert [row["loss"] is None for row in rows] == [False, True, False, False]
    assert rows[-1]["skipped_steps"] == 1
    steps = {s["step"].item() for s in trainer.stepper.optimizers[0].state.values()}
    assert steps == {3.0}  # bias correction counts the steps that were taken
    reported = [text for text in recorder.messages if "dashboard" in text]
    assert reported == ["Failing.on_step failed: RuntimeError: the disk of the dashboard is full"]


class Failing(Callback):
    def on_step(self, report: StepReport) -> None:
        raise RuntimeError("the disk of the dashboard is full")


class Endings(Callback):
    def __init__(self) -> None:
        self.seen: list[str | None] = []

    def on_end(self, ending: str | None) -> None:
        self.seen.append(ending)


@pytest.mark.parametrize("when", ["start", "train_step"])
def test_whatever_ends_a_run_callbacks_hear_of_its_end(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    endings = Endings()
    trainer = make_trainer("training.max_steps=2", callbacks=[endings])
    monkeypatch.setattr(trainer, when, interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert endings.seen == [None]
