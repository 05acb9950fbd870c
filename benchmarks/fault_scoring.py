"""From what runs came to, to how well controllers and detectors do.

A run is compared with its clean twin: the same seed, no fault, no controller. ``ratio`` is its loss
on the fixed validation set over the twin's, infinite for one that died or whose loss is no number.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fault_parts import BARE

HARM = 0.01  # a fault counts where the bare trainer ends by more than this worse
FAILED = 0.10  # a run that ends by more than this worse has failed
PAUSE = 8  # steps between two interventions of one incident
RESOURCES = "resources"
# Alarms about the machine. They answer for faults about resources, and for no others: where many
# share a machine, a throughput that drops is true, and says nothing about learning.
RESOURCE_KINDS = (
    "memory_fragmentation",
    "memory_leak",
    "memory_pressure",
    "starving_loader",
    "throughput_drop",
)


@dataclass(frozen=True)
class Run:
    """What one run came to. ``fault`` is empty for clean and healthy runs."""

    controller: str
    seed: int
    model: str
    loss: float | None  # None: not finite, or died
    num_steps: int  # that the controller saw
    interventions: tuple[int, ...] = ()
    fault: str = ""
    group: str = ""
    injection: int = 0
    died: str | None = None
    is_twin: bool = False  # from the snapshot to the same end as runs with faults
    seconds: float = 0.0
    memory_growth_gib: float = 0.0


@dataclass(frozen=True)
class Alarms:
    """When detectors raised alarms in a run without a controller: steps, and kinds of events."""

    found: tuple[tuple[int, str], ...]
    num_steps: int  # that were healthy, for a run without a fault


class Results:
    """All runs, and what follows from them for each fault and each controller."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self.struck = [run for run in runs if run.fault]
        self.healthy = [run for run in runs if not run.fault]
        self.controllers = list(dict.fromkeys(run.controller for run in runs))
        self.faults = list(dict.fromkeys(run.fault for run in self.struck))
        self._twins = {
            (run.model, run.seed): run
            for run in self.healthy
            if run.is_twin and run.controller == BARE
        }

    def ratio(self, run: Run) -> float:
        """The run's loss over its clean twin's."""
        twin = self._twins[run.model, run.seed]
        if run.died is not None or run.loss is None or twin.loss is None:
            return math.inf
        return run.loss / twin.loss

    def tolerance(self, model: str) -> float:
        """By how much a recovered run may be worse: 1%, or 2 sigma of seeds where that is more."""
        losses = [
            run.loss for (of, _), run in self._twins.items() if of == model and run.loss is not None
        ]
        if len(losses) < 2:
            return HARM
        return max(HARM, 2 * statistics.stdev(losses) / statistics.fmean(losses))

    def has_failed(self, run: Run) -> bool:
        """Whether it died, or ended without a number, or far worse than its twin."""
        return self.ratio(run) > 1 + FAILED

    def has_recovered(self, run: Run) -> bool:
        """Whether it ended about as well as its twin."""
        return self.ratio(run) <= 1 + self.tolerance(run.model)

    def is_harmful(self, fault: str, seed: int) -> bool:
        """Whether the bare trainer ends more than 1% worse with this fault."""
        return any(
            self.ratio(run) > 1 + HARM
            for run in self.struck
            if (run.controller, run.fault, run.seed) == (BARE, fault, seed)
        )

    def of(self, controller: str, fault: str | None = None) -> list[Run]:
        """The runs of a controller with a fault, or with all but those about resources."""
        return [
            run
            for run in self.struck
            if run.controller == controller
            and (run.group != RESOURCES if fault is None else run.fault == fault)
        ]

    def score(self, runs: Sequence[Run]) -> dict[str, Any]:
        """The figures of some runs with faults, all of one controller."""
        harmful = [run for run in runs if self.is_harmful(run.fault, run.seed)]
        delays = [
            delay
            for run in harmful
            if (delay := delay_of(run.interventions, run.injection)) is not None
        ]
        return {
            "recall": share(len(delays), len(harmful)),
            "delay_steps_median": median(delays),
            "failed_share": share(sum(map(self.has_failed, runs)), len(runs)),
            "recovered_share": share(sum(map(self.has_recovered, harmful)), len(harmful)),
            "within_1_percent_share": share(
                sum(self.ratio(run) <= 1 + HARM for run in harmful), len(harmful)
            ),
            "final_loss_ratio_median": median([self.ratio(run) for run in runs]),
            "num_runs": len(runs),
            "num_harmful": len(harmful),
        }

    def of_controller(self, name: str) -> dict[str, Any]:
        """All figures of a controller; faults about resources stand apart."""
        runs = self.of(name)
        healthy = [run for run in self.healthy if run.controller == name]
        num_steps = sum(run.num_steps for run in healthy)
        incidents = sum(len(incident_starts(run.interventions)) for run in healthy)
        twins = [self.ratio(run) for run in healthy if run.is_twin]
        of_resources = [
            run for run in self.struck if run.controller == name and run.group == RESOURCES
        ]
        groups = list(dict.fromkeys(run.group for run in runs))
        return {
            **self.score(runs),
            "false_alarms_per_10k": per_10k(incidents, num_steps),
            "healthy_steps": num_steps,
            "clean_loss_ratio_median": median(twins),
            "groups": {
                group: self.score([run for run in runs if run.group == group]) for group in groups
            },
            "resources": {
                "died_share": share(
                    sum(run.died is not None for run in of_resources), len(of_resources)
                )
            },
        }

    def of_fault(self, name: str) -> dict[str, Any]:
        """What a fault does, and what each controller makes of it."""
        runs = [run for run in self.struck if run.fault == name]
        first = runs[0]
        seeds = sorted({run.seed for run in runs})
        result: dict[str, Any] = {
            "group": first.group,
            "model": first.model,
            "harmful_share": share(sum(self.is_harmful(name, seed) for seed in seeds), len(seeds)),
            "harm": median([self.ratio(run) - 1 for run in self.of(BARE, name)]),
            "controllers": {},
        }
        for controller in self.controllers:
            own = self.of(controller, name)
            if not own:
                continue
            figures = {**self.score(own), "final_losses": [run.loss for run in own]}
            if first.group == RESOURCES:
                figures |= self._resources(own)
            result["controllers"][controller] = figures
        return result

    def _resources(self, runs: Sequence[Run]) -> dict[str, Any]:
        """Deaths, and time and memory beside the twin's."""
        alive = [run for run in runs if run.died is None]
        twins = [self._twins[run.model, run.seed] for run in alive]
        pairs = list(zip(alive, twins, strict=True))
        return {
            "died_share": share(len(runs) - len(alive), len(runs)),
            "died_of": sorted({run.died for run in runs if run.died is not None}),
            "time_ratio": median([run.seconds / twin.seconds for run, twin in pairs]),
            "memory_growth_gib": median(
                [run.memory_growth_gib - twin.memory_growth_gib for run, twin in pairs]
            ),
        }

    def of_detectors(self, alarms: Mapping[Run, Alarms]) -> dict[str, Any]:
        """How detectors alone do, over the runs without a controller."""
        harmful = [
            run
            for run in alarms
            if run.fault and run.group != RESOURCES and self.is_harmful(run.fault, run.seed)
        ]
        resources = [run for run in alarms if run.group == RESOURCES and run.died is None]
        healthy = [found for run, found in alarms.items() if not run.fault]
        num_steps = sum(found.num_steps for found in healthy)
        false = Counter(kind for one in healthy for _, kind in one.found)
        num_of_resources = sum(false[kind] for kind in RESOURCE_KINDS)
        delays = {
            run: delay_of(_answering(found, run), run.injection)
            for run, found in alarms.items()
            if run.fault
        }
        seen = [delay for run in harmful if (delay := delays[run]) is not None]
        of_resources = [delay for run in resources if (delay := delays[run]) is not None]
        by_fault = {}
        for name in self.faults:
            own = [run for run in alarms if run.fault == name]
            found = [delay for run in own if (delay := delays[run]) is not None]
            by_fault[name] = {
                "found_share": share(len(found), len(own)),
                "delay_steps_median": median(found),
                "kinds": sorted({kind for run in own for kind in _kinds_after(alarms[run], run)}),
            }
        return {
            "recall": share(len(seen), len(harmful)),
            "delay_steps_median": median(seen),
            "false_alarms_per_10k": per_10k(false.total() - num_of_resources, num_steps),
            "resource_alarms_per_10k": per_10k(num_of_resources, num_steps),
            "healthy_steps": num_steps,
            "num_harmful": len(harmful),
            "resources_recall": share(len(of_resources), len(resources)),
            "alarms_in_healthy_runs": dict(sorted(false.items())),
            "faults": by_fault,
        }


def incident_starts(steps: Sequence[int]) -> list[int]:
    """The first steps of incidents: those that no other precedes by ``PAUSE`` steps or fewer."""
    ordered = sorted(set(steps))
    return [
        step
        for number, step in enumerate(ordered)
        if number == 0 or step - ordered[number - 1] > PAUSE
    ]


def delay_of(steps: Sequence[int], injection: int) -> int | None:
    """Steps from the injection to the first of ``steps`` that does not come before it."""
    return min((step - injection for step in steps if step >= injection), default=None)


def share(part: int, whole: int) -> float | None:
    """A share of 1; None of nothing."""
    return part / whole if whole else None


def median(values: Sequence[float]) -> float | None:
    """The median; None of nothing, and where it is infinite, which JSON cannot say."""
    if not values:
        return None
    middle = statistics.median(values)
    return middle if math.isfinite(middle) else None


def per_10k(count: int, num_steps: int) -> float | None:
    """How often something happens in 10,000 steps."""
    return 10_000 * count / num_steps if num_steps else None


def _answering(alarms: Alarms, run: Run) -> list[int]:
    """The steps of alarms that can be an answer to the run's fault."""
    is_about_resources = run.group == RESOURCES
    return [step for step, kind in alarms.found if (kind in RESOURCE_KINDS) is is_about_resources]


def _kinds_after(alarms: Alarms, run: Run) -> list[str]:
    return [kind for step, kind in alarms.found if step >= run.injection]
