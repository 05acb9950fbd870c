"""The changes that add experts to a running training, prune them, and release split ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ultrathink.training.change import Change, Effect

if TYPE_CHECKING:
    from ultrathink.training.parts import Parts

Layer = int | Literal["all"]


@dataclass(frozen=True)
class _ExpertChange(Change):
    """A change of the experts of ``group``, in one layer or in ``all`` that have some."""

    layer: Layer
    group: str

    def __post_init__(self) -> None:
        is_index = isinstance(self.layer, int) and not isinstance(self.layer, bool)
        if not is_index and self.layer != "all":
            self.refuse("layer", 'must be the index of a layer, or "all"')

    def _check(self, expert: str, ways: tuple[str, str], applied: Sequence[Any]) -> None:
        number = getattr(self, expert)
        is_whole = isinstance(number, int) and not isinstance(number, bool) and number >= 0
        if number is not None and not is_whole:
            self.refuse(expert, "must be the number of an expert in its group, from 0, or None")
        if self.how not in ways:  # type: ignore[attr-defined]
            self.refuse("how", f"must be {' or '.join(map(repr, ways))}")
        object.__setattr__(self, "applied", tuple(dict(one) for one in applied))


@dataclass(frozen=True)
class AddExpert(_ExpertChange):
    """Add an expert to `group` in `layer`, or in `"all"`: a copy of `source` (None: the busiest)
    that takes about half of its tokens (`how` `split`; the model computes the same) or competes
    with it (`copy`). Records set `applied`."""

    name = "add_expert"
    source: int | None = None
    how: Literal["split", "copy"] = "split"
    applied: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("source", ("split", "copy"), self.applied)

    def apply(self, run: Parts) -> Effect:
        """Returns the loss of the last batch before and after, and what was added."""
        from ultrathink.training.surgery import add_experts

        return add_experts(run, self.layer, self.group, self.source, self.how, self.applied)

    def as_applied(self, after: Any) -> Change:
        return replace(self, applied=after["applied"])


@dataclass(frozen=True)
class PruneExpert(_ExpertChange):
    """Prune `expert` (None: the least salient) of `group` in `layer`, or in `"all"`: `how` `drop`
    leaves an empty slot, `merge` first averages it with the most similar one. Records set
    `applied`."""

    name = "prune_expert"
    expert: int | None = None
    how: Literal["drop", "merge"] = "drop"
    applied: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("expert", ("drop", "merge"), self.applied)

    def apply(self, run: Parts) -> Effect:
        """Returns the loss of the last batch before and after, and what was pruned."""
        from ultrathink.training.surgery import prune_experts

        return prune_experts(run, self.layer, self.group, self.expert, self.how, self.applied)

    def as_applied(self, after: Any) -> Change:
        return replace(self, applied=after["applied"])


@dataclass(frozen=True)
class ReleaseExperts(_ExpertChange):
    """Let the parts of split experts of `group` in `layer`, or in `"all"`, compete for tokens like
    all others."""

    name = "release_experts"

    def apply(self, run: Parts) -> Effect:
        """Returns the loss of the last batch before and after: the jump."""
        from ultrathink.training.surgery import release_experts

        return release_experts(run, self.layer, self.group)
