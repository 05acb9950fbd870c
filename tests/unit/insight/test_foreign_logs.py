"""Logs of ten formats, as they are and with four twists: the series that went in, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from pathlib import Path

import pytest

from tests.unit.insight.written_logs import (
    FORMATS,
    PREFIXES,
    Format,
    Record,
    Series,
    deepspeed,
    records,
    series,
)
from ultrathink.insight.log_analysis import LogAnalysis
from ultrathink.insight.logs.log import LogError
from ultrathink.insight.logs.opening import open_log

Made = tuple[str, list[str], list[list[Record]]]  # how a log was made, its lines, the runs in it
Twist = Callable[[Format], Iterator[Made]]


def no_twist(known: Format) -> Iterator[Made]:
    yield "as it is", known.write(records()), [records()]


def prefixes(known: Format) -> Iterator[Made]:
    for prefix in PREFIXES:
        yield f"prefix {prefix}", [prefix + line for line in known.write(records())], [records()]


def ranks(known: Format) -> Iterator[Made]:
    """Three processes print alternating lines, with a tag each, a key, or nothing."""
    runs = [records(rank) for rank in range(3)]
    written = [
        known.write(run, rank) if known.write is deepspeed else known.write(run)
        for rank, run in enumerate(runs)
    ]
    for tags in (("[rank0]: ", "[rank1]: ", "[rank2]: "), ("", "[rank1]: ", "[rank2]: ")):
        tagged = [[tag + line for line in lines] for tag, lines in zip(tags, written, strict=True)]
        yield f"tags {tags}", _alternating(tagged), [runs[0]]
    states = [[text for line in lines for text in line.split("\r")] for lines in written]
    yield "no tags", _alternating(states), [runs[0]]
    rows = [
        {"rank": float(rank), **row}
        for steps in zip(*runs, strict=True)
        for rank, row in enumerate(steps)
    ]
    if known.has_all:
        yield "a key", known.write(rows), [runs[0]]


def two_runs(known: Format) -> Iterator[Made]:
    first, second = records(0), records(1)
    yield "one after the other", known.write(first) + known.write(second), [first, second]
    yield "in one writing", known.write([*first, *second]), [first, second]
    yield "the first cut", known.write(first[:20]) + known.write(second), [first[:20], second]


def cadence(known: Format) -> Iterator[Made]:
    """Losses at every tenth step, other figures at every fiftieth, validations at the hundredth."""
    rows = records(other=50)
    yield "other figures seldom", known.write(rows), [rows]


def is_refused(name: str, made: str) -> bool:
    """Whether nobody could know what the series is."""
    if name == "trainer_state.json":  # a document is whole, or it is none
        return made not in ("as it is", "a key", "in one writing", "other figures seldom")
    return made == "no tags" and name != "DeepSpeed"  # whose lines say the rank themselves


@pytest.mark.parametrize("twist", [no_twist, prefixes, ranks, two_runs, cadence])
@pytest.mark.parametrize("name", FORMATS)
def test_the_series_that_went_in_comes_out_or_an_error(
    tmp_path: Path, name: str, twist: Twist
) -> None:
    known, path = FORMATS[name], tmp_path / "log"
    for made, lines, runs in twist(known):
        path.write_text("\n".join(lines) + "\n")
        if is_refused(name, made):
            with pytest.raises(LogError, match=r"several (processes|JSON)|no (training|complete)"):
                read(path)
            continue
        wanted = [series(run, known.signals, counts=known.counts) for run in runs]
        found = [{k: v for k, v in run.items() if k in known.signals} for run in read(path)]
        assert len(found) == len(wanted), made
        for run, other in zip(found, wanted, strict=True):
            assert run.keys() == other.keys(), made
            for signal in other:
                assert run[signal] == pytest.approx(other[signal], rel=1e-5), (made, signal)


def read(path: Path) -> list[Series]:
    """The series of each run, without what a resume undid."""
    found: dict[str, Series] = {}
    for record in open_log(path).signals():
        run = found.setdefault(record.run, {})
        for signal, value in record.values.items():
            points = run.get(signal, {}).items()
            kept = {step: x for step, x in points if step <= (record.undone or record.step)}
            run[signal] = {**kept, record.step: value}
    return list(found.values())


def _alternating(written: list[list[str]]) -> list[str]:
    return [line for line in chain(*zip_longest(*written)) if line is not None]


# -- single traps ----------------------------------------------------------------------------------

TRAPS: dict[str, tuple[str, list[Series]]] = {
    "two runs in the columns of an export of Weights & Biases": (
        "Step,a - loss,a - loss__MIN,b - loss\n1,3,2.9,4\n2,2.5,2.4,\n3,,,3.5\n",
        [{"loss": {1: 3.0, 2: 2.5}}, {"loss": {1: 4.0, 3: 3.5}}],
    ),
    "runs whose rows alternate": (
        "seed,step,loss\n0,1,3\n1,1,4\n0,2,2\n1,2,3\n",
        [{"loss": {1: 3.0, 2: 2.0}}, {"loss": {1: 4.0, 2: 3.0}}],
    ),
    "a loss of the step and one of the epoch": (
        "step,train_loss_epoch,loss\n1,,3\n2,,2\n2,9,\n3,,1\n",
        [{"loss": {1: 3.0, 2: 2.0, 3: 1.0}, "train_loss_epoch": {2: 9.0}}],
    ),
    "a kind of row that is unknown": (
        "step,kind,loss\n1,train,3\n1,ema,2\n1,test,5\n1,val,4\n2,train,2.5\n",
        [{"loss": {1: 3.0, 2: 2.5}, "ema_loss": {1: 2.0}, "test_loss": {1: 5.0},
          "val_loss": {1: 4.0}}],
    ),
    "validations on two sets": (
        '{"step": 1, "loss": 3}\n{"step": 1, "val_loss": 4, "dataset": "a"}\n'
        '{"step": 1, "val_loss": 5, "dataset": "b"}\n{"step": 2, "val_loss": 6, "dataset": "b"}\n',
        [{"loss": {1: 3.0}, "val_loss": {1: 4.0}, "val_loss/b": {1: 5.0, 2: 6.0}}],
    ),
    "units that are not nats, and commas": (
        "step 1 | loss 2.5 | val loss 3.5 bits | lr 3,125 | dt 12 ms | 1.5M tok/s\n"
        "step 2 | loss 2,375 | val loss 4.5\n",
        [{"loss": {1: 2.5}, "val loss (bits)": {1: 3.5}, "lr (with commas)": {1: 3125.0},
          "step_time": {1: 0.012}, "tokens_per_sec": {1: 1.5e6},
          "loss (with commas)": {2: 2375.0}, "val_loss": {2: 4.5}}],
    ),
    "commas are decimal where semicolons part cells": (
        "step;loss\n1;3,125\n2;2,5\n",
        [{"loss": {1: 3.125, 2: 2.5}}],
    ),
    "other titles further below": (
        "step,loss,lr\n1,3,0.1\nstep,lr,loss\n2,0.2,2\n",
        [{"loss": {1: 3.0, 2: 2.0}, "lr": {1: 0.1, 2: 0.2}}],
    ),
    "a word that says the split": (
        "step 1 loss 3\n[val] step 1 loss 5\nstep 2 train: loss 2 acc 0.5 | val: loss 4 acc 0.4\n",
        [{"loss": {1: 3.0, 2: 2.0}, "val_loss": {1: 5.0, 2: 4.0}, "accuracy": {2: 0.5},
          "val_accuracy": {2: 0.4}}],
    ),
    "a column in which NaN means nothing": (
        "step,loss,grad_norm\n" + "".join(
            f"{step},{9 - step},{1.5 if step % 3 == 0 else 'nan'}\n" for step in range(1, 9)
        ),
        [{"loss": {step: 9.0 - step for step in range(1, 9)}, "grad_norm": {3: 1.5, 6: 1.5}}],
    ),
    "epochs that count their own steps from 0": (
        "epoch,batch,loss\n" + "".join(f"{e},{b},{3 - e}\n" for e in (0, 1) for b in (0, 10, 20)),
        [{"loss": {0: 3.0, 10: 3.0, 20: 3.0, 30: 2.0, 40: 2.0, 50: 2.0}}],
    ),
    "epochs that count their own steps and say how many": (
        "".join(f"Epoch [{e}/2], Step [{s}/95], Loss: {3 - e}\n" for e in (1, 2) for s in (50, 90)),
        [{"loss": {50: 2.0, 90: 2.0, 145: 1.0, 185: 1.0}}],
    ),
    "a step beside a printed dictionary": (
        "Step 100: {'loss': 3.0, 'tag': None}\nStep 200: {'loss': nan}\nStep 300: {'loss': 2.0}\n",
        [{"loss": {100: 3.0, 200: float("nan"), 300: 2.0}}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAPS)
def test_series_are_not_mixed(tmp_path: Path, case: str) -> None:
    text, wanted = TRAPS[case]
    (tmp_path / "log").write_text(text)
    found = read(tmp_path / "log")
    assert [run.keys() for run in found] == [run.keys() for run in wanted]
    for run, other in zip(found, wanted, strict=True):
        for signal in run:
            assert run[signal] == pytest.approx(other[signal], nan_ok=True), signal


def test_lines_of_several_processes_without_steps_are_refused(tmp_path: Path) -> None:
    lines = [
        str({"loss": 3 + rank / 10 - step / 9, "learning_rate": step / 1e4, "epoch": step / 100})
        for step in range(1, 9)
        for rank in range(2)
    ]
    (tmp_path / "log").write_text("\n".join(lines))
    with pytest.raises(LogError, match="several processes"):
        open_log(tmp_path / "log")


def test_a_title_that_two_columns_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("step,loss,loss\n1,2,3\n")
    with pytest.raises(LogError, match="two columns are called 'loss'"):
        open_log(tmp_path / "log")


def test_what_was_not_read_is_noted(tmp_path: Path) -> None:
    """Lines of another form, and those of other processes; a column may say which run it is."""
    path = tmp_path / "log"
    path.write_text("0: iter 1: loss 3, time 1ms\n1: iter 1: loss 4, time 1ms\nstep=1 loss=9\n")
    log = open_log(path)
    assert [signals.values["loss"] for signals in log.signals()] == [3.0]
    assert log.notes == [
        "1 line or cell was not understood and left out, the first: step=1 loss=9",
        "Several processes wrote this log; the lines of rank 0 were read.",
    ]
    for text, unread in (
        ("step,loss\n1,3\n2,2.1.0\n3,1\n", "loss: 2.1.0"),
        ("step,loss\n1,3\n2_,2\n3,1\n", "step: 2_"),
        ("step 1 loss 3\nstep 2 loss 2,5 lr 1e-3\nstep 3 loss 1\n", "step 2 loss 2,5 lr 1e-3"),
    ):
        path.write_text(text)
        log = open_log(path)
        assert [signals.values for signals in log.signals()] == [{"loss": 3.0}, {"loss": 1.0}]
        assert log.notes == [f"1 line or cell was not understood and left out, the first: {unread}"]
    path.write_text("who,step,loss\na,1,3\nb,1,4\na,2,2\nb,2,3\n")
    assert [s.run for s in open_log(path, {"run": "who"}).signals()] == ["a", "b", "a", "b"]


# -- public cases ----------------------------------------------------------------------------------


@pytest.fixture
def analyze(public_file: Callable[[str], Path]) -> Callable[[str], LogAnalysis]:
    def analyze(name: str) -> LogAnalysis:
        analysis = LogAnalysis(open_log(public_file(f"cases/{name}")))
        for signals in analysis.log.signals():
            analysis.observe(signals)
        return analysis

    return analyze


def test_losses_between_other_figures_in_brackets(analyze: Callable[[str], LogAnalysis]) -> None:
    analysis = analyze("nanogpt_pipe_val.log")
    (course,) = analysis.courses
    assert course.curves["loss"][0] == (0.0, 6.15)
    assert course.curves["val_loss"][:2] == [(0.0, 6.2), (100.0, 5.36)]
    assert len(course.curves["val_loss"]) == 21
    assert set(analysis.signals) == {
        "loss", "val_loss", "train_eval_loss", "lr", "grad_norm", "step_time",
        "train loss PPL", "train loss BPC", "val loss PPL", "val loss BPC",
    }  # fmt: skip


def test_two_runs_with_speeds_in_thousands(analyze: Callable[[str], LogAnalysis]) -> None:
    analysis = analyze("fp8_two_runs_ktoks.log")
    assert analysis.summary()["runs"] == ["run 1", "run 2"]
    for course in analysis.courses:
        assert course.undone == []
        assert [step for step, _ in course.curves["val_loss"]] == [0, 200, 400]
        assert course.curves["loss"][-1][0] == 520
    first = next(iter(analysis.log.signals()))
    assert first.values["tokens_per_sec"] == 184100.0


def test_a_progress_bar_of_torchtune(analyze: Callable[[str], LogAnalysis]) -> None:
    (course,) = analyze("torchtune_tqdm.log").courses
    assert course.curves["loss"] == [
        (step, pytest.approx(2.5 - step / 100)) for step in range(1, 101)
    ]


def test_a_log_with_a_summary_alone_is_refused(analyze: Callable[[str], LogAnalysis]) -> None:
    with pytest.raises(LogError, match=r"holds only the final summary \(train_loss 0.97"):
        analyze("ts_summary_only.json")
