"""Runs set against each other: keys, curves, figures, and where they are the same bit for bit."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.runs.trained_runs import make_run, train_line, val_line, write_lines
from ultrathink.insight.comparison import (
    ABSENT,
    MAX_ROWS,
    Comparison,
    Side,
    compare,
    mean,
    read_side,
    round_ends,
)

Lines = list[dict[str, Any]]


def side(place: Path, label: str, lines: Lines = (), **manifest: Any) -> Side:  # type: ignore[assignment]
    run = make_run(place, label)
    if lines:
        write_lines(run.metrics, lines)
    if manifest:
        run.manifest.write_text(json.dumps(manifest))
    return read_side(run, label)


def compared(place: Path, *curves: Lines) -> Comparison:
    return compare([side(place, f"r{n}", lines) for n, lines in enumerate(curves)])


def course(steps: int, loss: float = 3.0, every: int = 1, **values: Any) -> Lines:
    return [train_line(step, loss, **values) for step in range(every, steps + 1, every)]


def test_keys_that_differ_stand_where_they_belong(tmp_path: Path) -> None:
    first, second = make_run(tmp_path, "a"), make_run(tmp_path / "b", "b", total=30)
    path = second.path / "config.yaml"
    text = path.read_text().replace("type: adamw", "type: muon\n    momentum: 0.9")
    text = text.replace("\n  max_tokens: null\n", "\n")  # which is not the same as null
    path.write_text(text.replace("    eps: 1.0e-08\n", ""))
    found = compare([read_side(first, "a"), read_side(second, "b")])
    assert [(item.key, item.values) for item in found.config] == [
        ("training.max_steps", (20, 30)),
        ("training.max_tokens", (None, ABSENT)),
        ("training.optimizer.type", ("adamw", "muon")),
        ("training.optimizer.momentum", (ABSENT, 0.9)),
        ("training.optimizer.eps", (1e-8, ABSENT)),
    ]
    assert found.place_keys == ("run.name", "run.dir")
    assert found.num_config_keys == len(read_side(first, "a").config) + 1


def test_manifests_differ_in_what_counts(tmp_path: Path) -> None:
    packages = {"torch": "1", "numpy": "2"}
    one = {"commit": "a", "packages": packages, "created": "x", "command": ["y"]}
    two = {**one, "packages": {"torch": "1", "numpy": "3"}, "created": "z", "command": ["w", "v"]}
    found = compare([side(tmp_path, "a", **one), side(tmp_path, "b", **two)])
    assert [(item.key, item.values) for item in found.manifest] == [("packages.numpy", ("2", "3"))]


def test_a_run_without_manifest_or_metrics_is_compared_in_the_rest(tmp_path: Path) -> None:
    found = compare([side(tmp_path, "a", course(5), commit="x"), side(tmp_path, "b")])
    assert found.sides[1].manifest == {}
    assert found.stretches == ()
    assert [a.num_common for a in found.agreements[0]] == [0, 0]
    assert {f.name: f.values for f in found.figures}["steps"] == (5, None)


def test_losses_are_means_over_stretches_that_both_have_taken(tmp_path: Path) -> None:
    falling = [train_line(step, float(step)) for step in range(1, 25)]
    found = compared(tmp_path, falling, course(100, 2.0))
    assert found.axis == "step"
    assert [(s.begin, s.end) for s in found.stretches] == list(pairwise(range(0, 25, 2)))
    assert [s.train_loss for s in found.stretches] == [(n + 1.5, 2.0) for n in range(0, 24, 2)]


def test_losses_that_were_not_finite_are_left_out_of_a_mean(tmp_path: Path) -> None:
    lines = [train_line(1, 1.0), train_line(2, None), *course(8)[2:]]
    lines[6]["loss"] = lines[7]["loss"] = None
    sparse = [train_line(step, 3.0) for step in (1, 8)]
    found = compared(tmp_path, lines, sparse)
    losses = {s.end: s.train_loss for s in found.stretches}
    assert losses[1] == (1.0, 3.0)
    assert math.isnan(losses[2][0])
    assert losses[2][1] is None
    assert losses[3] == (3.0, None)
    assert mean([0.1] * 10) == 0.1


def test_rows_stand_where_both_were_validated(tmp_path: Path) -> None:
    def lines(every: int) -> Lines:
        validations = [val_line(step, 10 / step) for step in range(every, 81, every)]
        return sorted([*course(80), *validations], key=lambda line: line["step"])

    found = compared(tmp_path, lines(5), lines(10))
    assert [s.end for s in found.stretches] == list(range(10, 81, 10))
    assert found.stretches[0].bits_per_byte == (0.5, 0.5)
    many = compared(tmp_path, lines(2), lines(2))
    assert [s.end for s in many.stretches] == list(range(8, 81, 8))
    without = compared(tmp_path, lines(5), course(80))
    assert [s.end for s in without.stretches] == [*range(10, 81, 10)]
    assert [s.bits_per_byte[1] for s in without.stretches] == [None] * 8
    seldom = compared(tmp_path, lines(40), lines(40))
    assert [s.end for s in seldom.stretches] == [*range(8, 81, 8)]
    assert seldom.stretches[4].bits_per_byte == (0.125, 0.125)


def test_steps_of_another_size_are_compared_by_tokens(tmp_path: Path) -> None:
    wide = [train_line(step, 2.0, tokens=1024 * step) for step in range(1, 11)]
    for other in (wide, [*course(5), *wide[5:]]):  # throughout, or from a resume on
        found = compared(tmp_path, course(10), other)
        assert found.axis == "tokens"
        assert found.stretches[-1].end == 5120
    assert len(found.stretches) <= MAX_ROWS


@given(st.integers(1, 10**12))
def test_round_ends_are_few_and_reach_the_end(end: int) -> None:
    ends = round_ends(end)
    assert ends[-1] == end
    assert len(ends) <= MAX_ROWS + 1
    assert len(ends) >= min(end, MAX_ROWS // 2)
    assert all(a < b for a, b in pairwise(ends))
    assert len({b - a for a, b in pairwise([0, *ends[:-1]])}) <= 1


def test_rows_have_round_numbers() -> None:
    assert round_ends(5) == [1, 2, 3, 4, 5]
    assert round_ends(2075) == [*range(200, 2000, 200), 2000, 2075]
    assert round_ends(2010) == [*range(200, 2000, 200), 2010]  # without a short last row


def agree(tmp_path: Path, first: Lines, other: Lines) -> list[tuple[bool, int, int, Any, Any]]:
    return [
        (a.is_identical, a.num_common, a.num_equal, a.last_equal, a.first_difference)
        for a in compared(tmp_path, first, other).agreements[0]
    ]


def test_how_far_curves_are_equal(tmp_path: Path) -> None:
    lines = [*course(20), val_line(20, 2.0)]
    lines[3]["loss"] = None
    train, val = agree(tmp_path / "same", lines, lines)
    assert (train, val) == ((True, 20, 20, 20, None), (True, 1, 1, 20, None))
    changed = course(20)
    changed[7]["loss"] = math.nextafter(3.0, 4.0)
    train, val = agree(tmp_path / "least", course(20), changed)
    assert train == (False, 20, 19, 7, 8)
    assert not val[0]  # there is none
    train, _ = agree(tmp_path / "longer", course(20), course(30))
    assert train == (False, 20, 20, 20, None)


def test_every_run_is_measured_by_the_first(tmp_path: Path) -> None:
    found = compared(tmp_path, course(20), course(20, 4.0), course(20))
    assert [train.is_identical for train, _ in found.agreements] == [False, True]
    loss = next(figure for figure in found.figures if figure.name == "train_loss")
    assert (loss.values, loss.differences) == ((3.0, 4.0, 3.0), (0.0, 1.0, 0.0))


def test_figures_are_the_last_and_the_best(tmp_path: Path) -> None:
    first = [
        *course(10, 5.0, tokens_per_sec=100.0),
        val_line(10, 2.0),
        *course(20, 4.0, tokens_per_sec=300.0)[10:18],
        train_line(19, 1.0, tokens_per_sec=None),
        train_line(20, 2.0, tokens_per_sec=400.0),
        val_line(20, 3.0),
    ]
    found = {f.name: f for f in compared(tmp_path, first, course(10)).figures}
    assert {name: figure.values for name, figure in found.items()} == {
        "steps": (20, 10),
        "tokens": (10240, 5120),
        "train_loss": (2.0, 3.0),
        "train_loss_last_tenth": (1.5, 3.0),
        "val_loss": (3.0, None),
        "bits_per_byte": (1.5, None),
        "best_val_loss": (2.0, None),
        "best_bits_per_byte": (1.0, None),
        "tokens_per_sec": (100.0, None),
    }
    assert found["best_bits_per_byte"].at == (10, None)
    assert found["val_loss"].differences == (0.0, None)
