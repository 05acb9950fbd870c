"""Evaluators beside training: what they report, where it goes, and that nothing else changes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import (
    At,
    Recorder,
    asks,
    assert_equal_tensors,
    final_state,
    goes_back,
    records,
    without_time,
)
from ultrathink import load_model, resume_trainer
from ultrathink.config import load_config
from ultrathink.config.evaluators import EVALUATORS, EvaluatorConfig
from ultrathink.core.errors import ConfigError, DataError
from ultrathink.insight.logs.run_folder import RunFolderLog
from ultrathink.insight.report.gathering import gather
from ultrathink.insight.report.page import render
from ultrathink.model.transformer import Transformer
from ultrathink.monitoring.tensorboard import FOLDER
from ultrathink.orchestrator.live import LiveWatch
from ultrathink.orchestrator.signals import Signals
from ultrathink.runs.metrics_check import check_metrics
from ultrathink.runs.reading import RunReader
from ultrathink.training.changes import Stop
from ultrathink.training.evaluators.base import Evaluator
from ultrathink.training.evaluators.samples import variety

WORDS = "Numbers are drawn, texts are read, and the loss goes down.\n" * 40
STEPS = ("training.max_steps=7", "training.checkpoint.every_steps=2")


class DrawingConfig(EvaluatorConfig):
    """Options of ``Drawing``."""

    type: Literal["drawing"] = "drawing"
    fails_at: int | None = None


class Drawing(Evaluator):
    """Draws from every generator, looks around, and fails on request."""

    def __init__(self, config: DrawingConfig, parts: Any) -> None:
        super().__init__(config)
        self.fails_at = config.fails_at

    def evaluate(self, model: Transformer, step: int) -> Mapping[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        figures = {"python": random.random(), "numpy": np.random.rand(), "torch": torch.rand(())}
        if step == self.fails_at:
            raise ValueError("nothing to draw from")
        return figures  # type: ignore[return-value]


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    EVALUATORS.add("drawing", Drawing, options=DrawingConfig)
    yield
    del EVALUATORS._entries["drawing"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.txt"
    path.write_text(WORDS)
    return path


def evaluators(text: Path, **drawing: Any) -> str:
    options = "".join(f", {key}: {value}" for key, value in drawing.items())
    return (
        f"training.evaluators=[{{type: drawing, every_steps: 2{options}}}, "
        f"{{type: text, name: words, source: {{type: text, path: {text}}}, every_steps: 3}}, "
        f"{{type: samples, prompts: [The], max_new_tokens: 6, every_steps: 3}}]"
    )


def evaluated(run: Any) -> list[dict[str, Any]]:
    return [row for row in without_time(records(run)) if row["split"] == "eval"]


def figures_at(run: Any) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for row in evaluated(run):
        names = {key.partition("/")[0] for key in row if "/" in key}
        assert not found.get(row["step"], set()) & names
        found[row["step"]] = found.get(row["step"], set()) | names
    return found


def test_training_is_bit_identical_and_a_resume_evaluates_alike(
    make_trainer: MakeTrainer, finished: MakeTrainer, text: Path
) -> None:
    """The first process stops between two evaluations."""
    plain = finished(*STEPS)
    whole = make_trainer(*STEPS, evaluators(text))
    whole.fit()
    expected = final_state(plain.run)
    assert any(name.startswith("random/") for name in expected)
    assert_equal_tensors(final_state(whole.run), expected)
    assert plain.loader.state_dict() == whole.loader.state_dict()
    every = {"drawing", "words", "samples"}
    assert figures_at(whole.run) == {
        2: {"drawing"}, 3: {"words", "samples"}, 4: {"drawing"}, 6: every, 7: every
    }  # fmt: skip
    assert len({row["drawing/torch"] for row in evaluated(whole.run) if "drawing/torch" in row}) > 3

    first = make_trainer(*STEPS, evaluators(text), controllers=[At(step5=asks(Stop()))])
    first.fit()
    assert sorted(figures_at(first.run)) == [2, 3, 4]  # the model of a stopped run is not the last
    resume_trainer(first.run).fit()
    assert evaluated(first.run) == evaluated(whole.run)
    [(status, _)] = check_metrics(first.run, first.run.read_config(), saved_step=7)
    assert status == "ok"


def test_what_a_rollback_undid_is_evaluated_again(make_trainer: MakeTrainer, text: Path) -> None:
    words = (*STEPS, evaluators(text))
    trainer = make_trainer(*words, controllers=[goes_back(kept=5, at=6)])
    trainer.fit()
    steps = [row["step"] for row in evaluated(trainer.run)]
    assert steps == [2, 3, 4, 6, 6, 7]
    history = RunReader(trainer.run).history()
    assert [one.step for one in history if one.split == "eval"] == [2, 3, 4, 6, 7]
    assert evaluated(trainer.run)[3] == evaluated(trainer.run)[4]  # it draws the same


def test_scores_are_those_of_the_model_and_go_to_all_who_watch(
    make_trainer: MakeTrainer, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(
        "training.max_steps=3", evaluators(text), "monitoring.sinks=[console, jsonl, tensorboard]"
    )
    [watch] = [part for part in trainer.callbacks if isinstance(part, LiveWatch)]
    seen: list[Signals] = []
    observe = watch.watcher.observe
    watch.watcher.observe = lambda signals: seen.append(signals) or observe(signals)  # type: ignore
    trainer.fit()
    run = trainer.run
    [row] = [row for row in evaluated(run) if "words/loss" in row]
    model, tokenizer = load_model(run.path, "last")
    model.requires_grad_(False)
    tokens = torch.tensor([tokenizer.encode(WORDS)])
    sums, size = 0.0, 32
    for begin in range(0, tokens.shape[1] - 1, size):
        window = tokens[:, begin : begin + size + 1]
        logits = model(window[:, :-1]).logits.double()
        sums += float(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
    loss = sums / (tokens.shape[1] - 1)
    assert row["words/loss"] == pytest.approx(loss, rel=1e-5)
    assert row["words/ppl"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert row["words/bits_per_byte"] == pytest.approx(sums / len(WORDS) / math.log(2), rel=1e-5)
    assert 0 < row["samples/tokens"] <= 6
    reported = {name: value for one in seen for name, value in one.having("eval/").items()}
    assert reported["words/loss"] == row["words/loss"]
    assert f"words/loss {row['words/loss']:.4g}" in capsys.readouterr().err
    splits = [record.split for record in RunReader(run).history()]
    assert splits == ["train", "train", "eval", "train", "eval", "val", "eval"]
    assert RunReader(run).last_records().keys() == {"train", "val"}
    log = RunFolderLog(run).signals()
    logged = {name: value for one in log for name, value in one.having("eval/").items()}
    assert logged == reported
    assert gather(run).evaluated["words/loss"] == [(3, row["words/loss"])]
    assert "<code>words/bits_per_byte</code>" in render(gather(run))
    assert _scalars(run.path / FOLDER)["eval/words/loss"] == pytest.approx(loss, rel=1e-5)


def test_one_that_fails_is_reported_once_and_training_continues(
    make_trainer: MakeTrainer, finished: MakeTrainer, text: Path
) -> None:
    recorder = Recorder()
    trainer = make_trainer(*STEPS, evaluators(text, fails_at=4), callbacks=[recorder])
    broken = trainer.evaluators.members[2]
    broken.evaluate = lambda model, step: {"odd": "no number"}  # type: ignore[method-assign,dict-item]
    trainer.fit()
    reported = [text for text in recorder.messages if text.startswith("evaluator ")]
    assert reported == [
        f"evaluator {name!r} failed at step {step}: ValueError: {problem}; training continues, and "
        f"it runs again when it is next due"
        for name, step, problem in (
            ("samples", 3, "could not convert string to float: 'no number'"),
            ("drawing", 4, "nothing to draw from"),
        )
    ]
    assert figures_at(trainer.run) == {
        2: {"drawing"}, 3: {"words"}, 6: {"drawing", "words"}, 7: {"drawing", "words"}
    }  # fmt: skip
    assert trainer.model.training
    assert_equal_tensors(final_state(trainer.run), final_state(finished(*STEPS).run))


@pytest.mark.parametrize(
    ("evaluator", "message"),
    [
        ("type: txt", "there is no evaluator called 'txt'. Did you mean 'text'?"),
        ("type: text, name: a/b, source: dummy", "training.evaluators.0.name"),
        ("type: samples}, {type: samples, prompts: [a]", "training.evaluators.0.prompts"),
        (
            "type: samples, prompts: [a]}, {type: samples, prompts: [b]",
            "two evaluators are called 'samples'; give each its own name",
        ),
    ],
)
def test_mistakes_in_the_configuration_are_named(evaluator: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("debug", [f"training.evaluators=[{{{evaluator}}}]"])
    assert message in str(caught.value)


def test_a_text_that_is_not_there_is_named_before_a_run_begins(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        make_trainer(evaluators(tmp_path / "missing.txt"))
    assert "missing.txt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "runs").glob("*"))


def test_texts_are_counted_in_runs_of_tokens() -> None:
    assert variety([[1, 2, 3], []]) == {"distinct_2": 1.0, "repeated_4": 0.0}
    found = variety([[5] * 9, [1, 2, 1, 2, 1, 2]])  # 6 and 3 runs of four, of which 1 and 2 differ
    assert found == {"distinct_2": 3 / 13, "repeated_4": pytest.approx((5 / 6 + 1 / 3) / 2)}


def _scalars(folder: Path) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
