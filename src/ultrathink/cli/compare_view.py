"""A comparison of runs for people: tables, a plot, and sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ultrathink.config.yaml_format import dump_yaml
from ultrathink.insight.comparison import (
    ABSENT,
    Agreement,
    Comparison,
    Difference,
    Figure,
    position,
)
from ultrathink.monitoring.plot import PlotView, Scale
from ultrathink.monitoring.report import Cell, Column, Report

_COLORS = ("cyan", "yellow", "magenta", "green", "blue", "red")
_MAX_PLOT_WIDTH = 72
_MISSING = "-"
# A hash of 40 or 64 digits; git's may have a word behind it.
_HASH = re.compile(r"^([0-9a-f]{12})[0-9a-f]{28,}(\+\w+)?$")
_FIGURES = {
    "steps": ("steps", "{:,.0f}"),
    "tokens": ("tokens", "{:,.0f}"),
    "train_loss": ("train loss, last", "{:.4f}"),
    "train_loss_last_tenth": ("train loss, mean of the last tenth", "{:.4f}"),
    "val_loss": ("val loss, last", "{:.4f}"),
    "bits_per_byte": ("bits/byte, last", "{:.4f}"),
    "best_val_loss": ("val loss, best", "{:.4f}"),
    "best_bits_per_byte": ("bits/byte, best", "{:.4f}"),
    "tokens_per_sec": ("tokens/s, median", "{:,.0f}"),
}


def print_comparison(comparison: Comparison) -> None:
    """Print a comparison on standard output, for people."""
    report = Report()
    _print_config(report, comparison)
    _print_manifest(report, comparison)
    _print_segments(report, comparison)
    _print_curves(report, comparison)
    _print_figures(report, comparison)


def _print_config(report: Report, comparison: Comparison) -> None:
    left_out = comparison.place_keys
    other = f" ({', '.join(left_out)} left out)" if left_out else ""
    count = len(comparison.config)
    total = comparison.num_config_keys
    if count:
        _title(report, f"Configuration: {count} of {total} values differ{other}")
        _print_differences(report, comparison, comparison.config)
    else:
        _title(report, f"Configuration: all {total} values are the same{other}")


def _print_manifest(report: Report, comparison: Comparison) -> None:
    report.line()
    lacking = [side.label for side in comparison.sides if not side.manifest]
    if lacking:
        names = " and ".join(lacking)
        _title(report, f"Manifest: {names} {_has(lacking)} none that can be read")
    elif comparison.manifest:
        _title(report, "Manifest: what the runs were made with")
        _print_differences(report, comparison, comparison.manifest)
    else:
        _title(report, "Manifest: same code, packages, hardware, data and tokenizer")


def _print_differences(
    report: Report, comparison: Comparison, differences: Sequence[Difference]
) -> None:
    columns = [Column(""), *_run_columns(comparison, folds=True)]
    rows = [[item.key, *(_shown(item.key, value) for value in item.values)] for item in differences]
    report.table(columns, rows, indent=2)


def _print_segments(report: Report, comparison: Comparison) -> None:
    changed = [
        (side, segment) for side in comparison.sides for segment in side.segments if segment.felt
    ]
    if not changed:
        return
    report.line()
    _title(report, "Changed on resuming")
    for side, segment in changed:
        changes = "; ".join(map(str, segment.felt))
        report.line(f"  {side.label} after step {segment.from_step:,}: {changes}")


def _print_curves(report: Report, comparison: Comparison) -> None:
    report.line()
    empty = [side.label for side in comparison.sides if not side.train]
    if empty:
        _title(report, f"Curves: {' and '.join(empty)} {_has(empty)} no metrics yet")
        return
    _title(report, "Curves: train loss (mean of a stretch), bits/byte (last validation in it)")
    by_steps = comparison.axis == "step"
    columns = [Column("up to step" if by_steps else "up to token", right=True)]
    has_scores = any(v is not None for s in comparison.stretches for v in s.bits_per_byte)
    for group in ("loss", "bits/byte") if has_scores else ("loss",):
        first, *others = _run_columns(comparison, right=True)
        columns += [replace(first, title=f"{group} {first.title}"), *others]
    rows = [
        [
            f"{stretch.end:,}",
            *(_number(value, "{:.4f}") for value in stretch.train_loss),
            *((_number(value, "{:.4f}") for value in stretch.bits_per_byte) if has_scores else ()),
        ]
        for stretch in comparison.stretches
    ]
    report.table(columns, rows, indent=2)
    _print_plot(report, comparison)
    _print_remarks(report, comparison)


def _print_remarks(report: Report, comparison: Comparison) -> None:
    """Where curves are equal, and metrics that only some runs have."""
    remarks = []
    for side, agreements in zip(comparison.sides[1:], comparison.agreements, strict=True):
        words = [text for agreement in agreements if (text := _agreement_in_words(agreement))]
        if words:
            remarks.append(f"{comparison.sides[0].label} and {side.label}: {'; '.join(words)}")
    remarks += dict.fromkeys(  # one line for a family of metrics, such as experts/skill/gini
        f"only {' and '.join(having)} {_has(having)} the "
        + (f"metrics {name.rpartition('/')[0]}/*" if "/" in name else f"metric {name}")
        for name, having in comparison.lone_metrics.items()
    )
    for remark in remarks:
        report.line(f"  {remark}")
    if remarks:
        report.line()


def _print_plot(report: Report, comparison: Comparison) -> None:
    end = comparison.stretches[-1].end
    curves = [
        [
            (float(place), r.values.get("loss", math.nan))
            for r in side.train
            if (place := position(r, comparison.axis)) <= end
        ]
        for side in comparison.sides
    ]
    scale = Scale.of(curves)
    if scale is None or not report.can_draw:
        return
    report.line()
    view = PlotView(report, scale, end=end, max_width=_MAX_PLOT_WIDTH)
    unit = "steps" if comparison.axis == "step" else "tokens"
    if not report.has_colors:  # dots of several runs could not be distinguished
        wide = max(len(side.label) for side in comparison.sides)
        report.line(
            f"  train loss over {end:,} {unit}, from {view.low} (low) to {view.high} (high)"
        )
        for side, curve in zip(comparison.sides, curves, strict=True):
            drawn = view.bars(curve, width=_MAX_PLOT_WIDTH - wide)
            report.line(f"  {side.label:<{wide}}  {drawn}")
        report.line()
        return
    colors = _colors(comparison)
    view.print_dots(curves, colors)
    view.print_foot([Cell("─" * view.width, "dim")])
    scale_line = f"{end:,} {unit}"
    names: list[str | Cell] = ["train loss"]
    for side, color in zip(comparison.sides, colors, strict=True):
        names += ["  ", Cell(f"━ {side.label}", color)]
    legend = sum(len(part if isinstance(part, str) else part.text) for part in names)
    gap = " " * max(2, view.width - legend - len(scale_line))
    report.line(" " * (view.margin + 2), *names, gap, Cell(scale_line, "dim"))
    report.line()


def _print_figures(report: Report, comparison: Comparison) -> None:
    if not comparison.figures:
        return
    _title(report, "Figures, and the difference to the first run")
    columns = [Column("")]
    for side, color in zip(comparison.sides, _colors(comparison), strict=True):
        columns.append(Column(side.label, right=True, style=color))
        if side is not comparison.sides[0]:
            columns.append(Column("difference", right=True))
    rows: list[list[str | Cell]] = []
    for figure in comparison.figures:
        title, form = _FIGURES[figure.name]
        row: list[str | Cell] = [title]
        for number, difference in enumerate(figure.differences):
            row.append(_figure_in_words(figure, number, form))
            if number:
                row.append(Cell(_signed(difference, form), "dim"))
        rows.append(row)
    report.table(columns, rows, indent=2)


def _figure_in_words(figure: Figure, number: int, form: str) -> str:
    text = _number(figure.values[number], form)
    if figure.at is not None and figure.at[number] is not None:
        return f"{text} at {figure.at[number]:,}"
    return text


def _agreement_in_words(agreement: Agreement) -> str:
    """Where the losses of two runs are equal; empty where they never are."""
    if agreement.num_common == 0 or agreement.last_equal is None:
        return ""
    kind = "logged" if agreement.split == "train" else "validation"
    if agreement.first_difference is not None:
        return (
            f"the {kind} losses are equal up to step {agreement.last_equal:,} and differ from step "
            f"{agreement.first_difference:,} on"
        )
    count = agreement.num_common
    where = " (identical)" if agreement.is_identical else " at the steps that both have"
    if count == 1:
        return f"the one {kind} loss is equal{where}"
    return f"all {count:,} {kind} losses are equal{where}"


def _has(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _title(report: Report, text: str) -> None:
    report.line(Cell(text, "bold"))


def _run_columns(
    comparison: Comparison, *, folds: bool = False, right: bool = False
) -> list[Column]:
    return [
        Column(side.label, folds=folds, right=right, style=color)
        for side, color in zip(comparison.sides, _colors(comparison), strict=True)
    ]


def _colors(comparison: Comparison) -> list[str]:
    return [_COLORS[number % len(_COLORS)] for number in range(len(comparison.sides))]


def _shown(key: str, value: Any) -> str:
    """A value as YAML, with short hashes, and bytes in GiB."""
    if value is ABSENT:
        return _MISSING
    if isinstance(value, str) and (match := _HASH.match(value)):
        return f"{match[1]}{match[2] or ''}"
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB"
    return dump_yaml(value, one_line=True)


def _number(value: float | None, form: str) -> str:
    if value is None:
        return _MISSING
    return form.format(value) if math.isfinite(value) else str(value)


def _signed(value: float | None, form: str) -> str:
    if value is None:
        return _MISSING
    return _number(value, form.replace("{:", "{:+")) if value else "0"
