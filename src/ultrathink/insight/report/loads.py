"""The load of experts over a run, from ``experts.jsonl``, ready to be drawn as heat maps.

Shapes: S logged steps, L layers with experts, N slots of one group, C columns of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from ultrathink.monitoring.jsonl import finite_number
from ultrathink.runs.reading import RunReader, has_step

MOST_COLUMNS = 240
_LATE = 0.1  # share of the logged steps in the picture of layers

Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class GroupCourse:
    """One group of experts: its load over steps, and in every layer at the end."""

    name: str
    steps: Floats  # [S]
    course: Floats  # [C, N]: load over the even one, the mean of layers
    course_active: Booleans  # [C, N]
    late: Floats  # [L, N]: tokens in the last tenth of the logged steps
    late_active: Booleans  # [L, N]
    gini: float | None  # the largest of any layer at the end
    num_dead: int  # experts of all layers without a token in the last tenth

    @property
    def num_experts(self) -> int:
        """Slots that held an expert at the end, of one layer."""
        return int(self.late_active.sum(1).max(initial=0))


def read_loads(reader: RunReader) -> list[GroupCourse]:
    """Every group of experts, without the steps that a resume or a rollback undid."""
    rows: list[dict[str, Any]] = []
    for row in reader.rows(reader.run.experts, lambda row: has_step(row) and bool(_groups(row))):
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(_slim(row))
    names = dict.fromkeys(name for row in rows for name in row["loads"])
    return [_course(name, [row for row in rows if name in row["loads"]]) for name in names]


def _groups(row: dict[str, Any]) -> dict[str, Any]:
    groups = row.get("groups")
    return {} if not isinstance(groups, dict) else {n: g for n, g in groups.items() if _is_grid(g)}


def _is_grid(group: Any) -> bool:
    load = group.get("load") if isinstance(group, dict) else None
    return isinstance(load, list) and bool(load) and all(isinstance(row, list) for row in load)


def _slim(row: dict[str, Any]) -> dict[str, Any]:
    """The parts of a line that are drawn: a long run has many lines."""
    groups = _groups(row)
    return {
        "step": row["step"],
        "loads": {str(name): _load(group["load"]) for name, group in groups.items()},
        "gini": {str(name): group.get("gini") for name, group in groups.items()},
    }


def _load(rows: list[list[Any]]) -> npt.NDArray[np.float32]:
    """``[L, N]``, NaN for empty slots."""
    try:
        grid = np.array(rows, np.float32)  # null becomes NaN
        if grid.ndim == 2:
            return grid
    except (TypeError, ValueError):  # layers of other lengths, or no numbers
        pass
    cells = [[np.nan if finite_number(x) is None else x for x in row] for row in rows]
    return np.array(list(zip_longest(*cells, fillvalue=np.nan)), np.float32).T


def _course(name: str, rows: list[dict[str, Any]]) -> GroupCourse:
    height = max(row["loads"][name].shape[0] for row in rows)
    width = max(row["loads"][name].shape[1] for row in rows)
    loads = np.full((len(rows), height, width), np.nan, np.float32)  # [S, L, N]
    for number, row in enumerate(rows):
        load = row["loads"][name]
        loads[number, : load.shape[0], : load.shape[1]] = load
    parts = np.array_split(np.arange(len(rows)), min(MOST_COLUMNS, len(rows)))
    courses, there = zip(*(_over_even(*_summed(loads[part])) for part in parts), strict=True)
    late = loads[-max(1, round(_LATE * len(rows))) :]
    total, active = _summed(late)
    ginis = map(finite_number, rows[-1]["gini"].get(name) or ())
    return GroupCourse(
        name=name,
        steps=np.array([row["step"] for row in rows], float),
        course=np.stack(courses),
        course_active=np.stack(there),
        late=total,
        late_active=active,
        gini=max((gini for gini in ginis if gini is not None), default=None),
        num_dead=int((active & (total == 0)).sum()),
    )


def _summed(loads: npt.NDArray[np.float32]) -> tuple[Floats, Booleans]:
    """Tokens of each expert ``[L, N]`` over steps ``[S, L, N]``, and which slots had one."""
    total: Floats = np.nansum(loads, 0, dtype=np.float64)
    active: Booleans = np.logical_not(np.isnan(loads).all(0))
    return total, active


def _over_even(total: Floats, active: Booleans) -> tuple[Floats, Booleans]:
    """The load over the even one, the mean of layers ``[N]``, and which slots had an expert."""
    even = total.sum(1, keepdims=True) / active.sum(1, keepdims=True).clip(1)
    ratio = np.where(active, total / np.where(even > 0, even, 1.0), 0.0)
    mean: Floats = ratio.sum(0) / active.sum(0).clip(1)
    is_there: Booleans = np.asarray(active.any(0))
    return mean, is_there
