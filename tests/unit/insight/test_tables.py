"""Tables and lines of JSON: columns that are guessed or named, and cells that say nothing."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrathink.core.errors import UltrathinkError
from ultrathink.insight.logs.log import LogError, NotYetError
from ultrathink.insight.logs.names import ALIASES, parse_columns
from ultrathink.insight.logs.opening import open_log

Read = list[tuple[int, dict[str, float]]]


def read(path: Path, text: str, **columns: str) -> Read:
    path.write_text(text)
    return [(s.step, dict(s.values)) for s in open_log(path, columns).signals()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.mark.parametrize(
    ("title", "signal", "factor"),
    [
        ("Training Loss", "loss", 1),
        ("run-7 - train/loss", "loss", 1),  # exported by Weights & Biases
        ("lm loss", "loss", 1),
        ("eval_loss", "val_loss", 1),
        ("Grad Norm", "grad_norm", 1),
        ("eval_accuracy", "val_accuracy", 1),
        ("train/loss/web", "loss/web", 1),
        ("eval_wiki_loss", "val_loss/wiki", 1),
        ("eval/lm/c4/CE loss", "val_loss/lm/c4", 1),
        ("grad_norm/layers.3", "grad_norm/layers.3", 1),
        ("iter_time_ms", "step_time", 1e-3),
        ("elapsed time per iteration (ms)", "step_time", 1e-3),
        ("mem-allocated-bytes", "memory", 2.0**-30),
        ("peak_memory_mib", "memory_peak", 2.0**-10),
        ("memory/max_reserved(GiB)", "memory_peak", 1),
        ("accuracy_percent", "accuracy", 1e-2),
    ],
)
def test_names_are_known(path: Path, title: str, signal: str, factor: float) -> None:
    known = {} if signal == "loss" else {"loss": 2.0}
    header = "".join(f",{name}" for name in known)
    found = read(path, f"step,{title}{header}\n1,8{',2' if known else ''}\n")
    assert found == [(1, {signal: pytest.approx(8 * factor), **known})]


def test_no_alias_stands_for_two_signals() -> None:
    names = [alias for aliases in ALIASES.values() for alias in aliases]
    assert len(names) == len(set(names))


TABLES: dict[str, tuple[str, dict[str, str], Read]] = {
    "spaces part cells": (
        "step  loss  lr\n1  3.5  0.1\n2  3.25  0.1\n", {},
        [(1, {"loss": 3.5, "lr": 0.1}), (2, {"loss": 3.25, "lr": 0.1})],
    ),
    "the surer name wins": (
        "loss,epoch,step,total_loss\n3.0,0,7,9.0\n", {}, [(7, {"loss": 3.0, "total_loss": 9.0})],
    ),
    "a split in a name is known": (
        "step,test_loss,loss_train,eval_loss,val_lr\n1,9,3,2,4\n", {},
        [(1, {"test_loss": 9.0, "loss": 3.0, "val_loss": 2.0, "val_lr": 4.0})],
    ),
    "minima and maxima beside a column are left out": (
        '"Step","a - loss","a - loss__MIN","a - loss__MAX"\n"5","2.5","2.0","3.0"\n', {},
        [(5, {"loss": 2.5})],
    ),
    "columns can be named": (
        "n,q,r\n4,1.5,8\n", {"step": "n", "loss": "q", "val_loss": "r"},
        [(4, {"loss": 1.5, "val_loss": 8.0})],
    ),
    "a named column is taken before a guessed one": (
        "step,loss,smoothed\n4,1.5,8\n", {"loss": "smoothed"}, [(4, {"loss": 8.0})],
    ),
    "rows of training and validation": (
        "step,kind,loss,lr,time_ms\n0,val,9.5,,3\n1,train,9.0,0.1,4\n1,val,8.5,0.1,5\n", {},
        [(0, {"val_loss": 9.5}), (1, {"loss": 9.0, "lr": 0.1}),
         (1, {"val_loss": 8.5, "val_lr": 0.1})],
    ),
    "sources that take turns are no runs": (
        "source,step,loss\nweb,1,3\ncode,1,2\nweb,2,2.5\ncode,2,1.5\n", {},
        [(1, {"loss/web": 3.0}), (1, {"loss/code": 2.0}),
         (2, {"loss/web": 2.5}), (2, {"loss/code": 1.5})],
    ),
    "empty cells say nothing": (
        "step,train_loss,val_loss\n1,3.0,\n1,,2.9\n2,None,N/A\n3,2.5,nan\n4,nan,2.4\n", {},
        [(1, {"loss": 3.0}), (1, {"val_loss": 2.9}), (3, {"loss": 2.5}), (4, {"val_loss": 2.4})],
    ),
    "a gradient norm of zero from the start was not computed": (
        "step,loss,grad_norm\n1,3,0.000\n2,3,0.5\n3,3,0\n", {},
        [(1, {"loss": 3.0}), (2, {"loss": 3.0, "grad_norm": 0.5}),
         (3, {"loss": 3.0, "grad_norm": 0.0})],
    ),
    "a loss that is not a number is kept, a time was not recorded": (
        "step,loss,step_time\n1,3.0,nan\n2,nan,nan\n3,-nan,NaN\n4,Infinity,inf\n", {},
        [(1, {"loss": 3.0}), (2, {"loss": math.nan}), (3, {"loss": math.nan}),
         (4, {"loss": math.inf})],
    ),
    "the last line may lack its end": (
        "step,loss\r\n1,3.0\r\n2,2.5", {}, [(1, {"loss": 3.0}), (2, {"loss": 2.5})],
    ),
    "objects in lines of others": (
        '{"_step": 5, "train": {"loss": "2.5"}, "_timestamp": 3.0, "val": {"loss": null}}\n'
        '{"_step": 6, "train": {"loss": "NaN"}, "note": "x", "flag": true}\n', {},
        [(5, {"loss": 2.5}), (6, {"loss": math.nan})],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_what_a_table_says(path: Path, case: str) -> None:
    text, columns, expected = TABLES[case]
    assert repr(read(path, text, **columns)) == repr(expected)  # a NaN equals none


def test_runs_are_told_apart_and_rows_are_counted_without_steps(path: Path) -> None:
    path.write_text("run,step,loss\na,1,3\na,2,2\nb,1,4\n")
    assert [(s.run, s.step) for s in open_log(path).signals()] == [("a", 1), ("a", 2), ("b", 1)]
    path.write_text("loss\tlr\n3\t0.1\n2\t0.1\n")
    log = open_log(path)
    assert log.format == "TSV, rows counted as steps"
    assert [s.step for s in log.signals()] == [1, 2]


def test_damaged_lines_are_left_out_with_a_note(path: Path) -> None:
    path.write_text("step,loss,lr\n1,3,0.1\n2,\nsome words\n3,2,0.1\n4,1.")
    log = open_log(path)
    assert [s.step for s in log.signals()] == [1, 3]
    torn = "The last line is torn and was left out."
    unread = "2 lines or cells were not understood and left out, the first: 2,"
    assert log.notes == [torn, unread]
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    log = open_log(path)
    assert [s.step for s in log.signals()] == [1]
    assert log.notes == [torn]


@pytest.mark.parametrize(
    ("text", "columns", "kind", "message"),
    [
        ("a,b,c\n1,2,3\n", {}, LogError, r"as a loss.*seen: a, b, c\. Name them: --columns"),
        ("step,nll_mean\n1,2\n", {"loss": "nll_maen"}, LogError, "'nll_maen'.*'nll_mean'"),
        ("step,loss\n", {}, NotYetError, "no rows yet"),
    ],
)
def test_what_is_no_table_of_a_training_is_said(
    path: Path, text: str, columns: dict[str, str], kind: type[LogError], message: str
) -> None:
    path.write_text(text)
    with pytest.raises(kind, match=message):
        open_log(path, columns)


def test_mistakes_in_columns_are_named() -> None:
    for text, message in (
        ("loss", r"'loss' is not SIGNAL=COLUMN"),
        ("los=x", r"no signal 'los'.*'loss'"),
        ("loss=a,loss=b", r"loss is given twice, as 'a' and 'b'"),
    ):
        with pytest.raises(UltrathinkError, match=message):
            parse_columns([text])
    whole = {"loss": "lm loss", "step": "it", "val_loss/web": "w"}
    assert parse_columns(["loss=lm loss, step=it", "val_loss/web=w"]) == whole


# -- lines of JSON ---------------------------------------------------------------------------------


def test_our_own_lines(path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "split": "train", "time": 1.0, "loss": 8.5, "tokens": 20, "lr": 0.1,
         "memory_gib": 1.5, "skipped_steps": 0, "experts/skill/gini": 0.25},
        {"step": 2, "split": "train", "time": 2.0, "loss": None, "grad_norm": None, "mfu": None},
        {"step": 2, "split": "val", "time": 3.0, "loss": 7.5, "ppl": 9.0, "token_accuracy": 0.5},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = open_log(path)
    assert log.format == "metrics.jsonl"
    first = {"loss": 8.5, "lr": 0.1, "memory": 1.5, "skipped_steps": 0.0}
    assert [repr(signals.values) for signals in log.signals()] == [
        repr({**first, "experts/skill/gini": 0.25}),
        repr({"loss": math.nan, "grad_norm": math.nan}),
        repr({"val_loss": 7.5, "val_ppl": 9.0, "val_accuracy": 0.5}),
    ]


# -- properties ------------------------------------------------------------------------------------

numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)
rows_of_tables = st.lists(
    st.tuples(st.integers(0, 10**9), numbers, st.one_of(st.none(), numbers)),
    min_size=1,
    max_size=30,
    unique_by=lambda row: row[0],
)


@settings(max_examples=60)
@given(rows_of_tables, st.sampled_from([",", "\t", ";"]), st.booleans())
def test_every_loss_of_a_table_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: Any, delimiter: str, has_end: bool
) -> None:
    """What Python writes as text is read back, but for losses of which most are NaN."""
    rows = sorted(rows)
    lines = [["step", "loss", "memory_gib"]]
    lines += [[str(a), str(b), "" if c is None else str(c)] for a, b, c in rows]
    path = tmp_path_factory.mktemp("tables") / "log"
    path.write_text("\n".join(delimiter.join(line) for line in lines) + "\n" * has_end)
    found = list(open_log(path).signals())
    losses = [(step, loss) for step, loss, _ in rows]
    if 2 * sum(math.isnan(loss) for _, loss in losses) > len(losses):
        return  # they may be gaps
    assert [s.step for s in found] == [step for step, _ in losses]
    assert [repr(s.values["loss"]) for s in found] == [repr(float(loss)) for _, loss in losses]
    kept = [memory for _, _, memory in rows if memory is not None and math.isfinite(memory)]
    assert [s.values["memory"] for s in found if "memory" in s.values] == kept
