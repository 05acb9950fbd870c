"""Evaluators measure a model during training; this is their interface, and how they are run."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ultrathink.config.data import SourceConfig
from ultrathink.config.evaluators import EvaluatorConfig, SampleConfig
from ultrathink.core.errors import UltrathinkError
from ultrathink.core.random import seed_everything, step_seed
from ultrathink.data.tokenizers.base import Tokenizer
from ultrathink.data.validation import ValidationSet
from ultrathink.model.transformer import Transformer
from ultrathink.monitoring.records import Reporter
from ultrathink.parallel.sharding import is_divided
from ultrathink.parallel.store import new_store
from ultrathink.parallel.world import ALONE, Group, World, is_lost_connection
from ultrathink.training.callbacks import EvaluationReport
from ultrathink.training.model_set import inference_view
from ultrathink.training.run_state import Progress

_PATIENCE_S = 60.0


class Written(NamedTuple):
    """The text that a model wrote after a prompt."""

    text: str
    num_tokens: int


@dataclass(frozen=True)
class EvaluatorParts:
    """What an evaluator is built from."""

    tokenizer: Tokenizer
    batch_size: int  # sequences in one pass
    open_text: Callable[[SourceConfig], ValidationSet]
    """The whole text of a source, in the run's tokens; raises DataError."""

    continue_prompts: Callable[[Transformer, SampleConfig, int], list[Written]]
    """Generates the model's continuation of each prompt, from a seed."""

    group: Group  # processes that may divide the work and share the results


class Evaluator(ABC):
    """Measures a model under a name.

    Its constructor runs on several processes one after the other, so it must not communicate.
    """

    def __init__(self, config: EvaluatorConfig) -> None:
        self.name = config.label
        self.every_steps = config.every_steps

    @abstractmethod
    def evaluate(self, model: Transformer, step: int) -> Mapping[str, float]:
        """Figures by name; metrics call them ``NAME/figure``.

        All processes call it together, with the same ``model`` in evaluation mode, without
        gradients, and from the same random state, seeded by the run's seed, the name and the step.
        Sums over processes must use the ``group`` of its parts, which passes on an error of one
        process to the others.
        """


class EvaluationError(Exception):
    """An evaluator failed on some process; all processes raise this."""


class Agreement:
    """Exchanges errors between processes before they do something together.

    It uses the shared store: a process that waits in a collective could not answer there.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._store = new_store(world)
        self._count = 0  # agreements so far, the same on all processes

    def reach(self, error: Exception | None = None, *, patience_s: float = math.inf) -> None:
        """Raise EvaluationError on every process if one of them has an ``error``.

        That process waits ``patience_s`` for the others, then raises UltrathinkError and so ends:
        the collective that the others wait in then fails.
        """
        store, count = self._store, self._count + 1
        deadline = math.inf if error is None else time.monotonic() + patience_s

        def check() -> None:
            if time.monotonic() > deadline:
                raise UltrathinkError(
                    f"an evaluator failed on process {store.rank} alone, while the others wait for "
                    f"it: {_described(error)}"
                ) from error

        store.put(f"{count}/{store.rank}", None if error is None else _described(error))
        answers = store.wait_for([f"{count}/{rank}" for rank in range(store.size)], check)
        if store.rank == 0:  # all have read what was agreed before
            store.forget([f"{self._count}/{rank}" for rank in range(store.size) if self._count])
        self._count = count
        for rank, problem in enumerate(answers):
            if problem is not None:
                where = f" (on process {rank})" if store.size > 1 else ""
                raise EvaluationError(f"{problem}{where}") from error


def _described(error: Exception | None) -> str:
    return str(error) if isinstance(error, UltrathinkError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class AgreeingGroup(Group):
    """A group that exchanges errors before each sum."""

    agreement: Agreement = field(kw_only=True)

    def summed(self, values: Tensor) -> Tensor:
        self.agreement.reach()
        return super().summed(values)


class EvaluatorSet(NamedTuple):
    """The evaluators of a run, and how its processes exchange errors."""

    members: Sequence[Evaluator]
    agreement: Agreement


NO_EVALUATORS = EvaluatorSet((), Agreement(ALONE))


@dataclass
class Evaluations:
    """Runs evaluators at step boundaries, without any effect on the training.

    An evaluator that fails is reported, and runs again when it is next due. ``before_each`` is
    called before each.
    """

    evaluators: EvaluatorSet
    model: Transformer
    seed: int
    before_each: Callable[[], None]
    on_report: Callable[[EvaluationReport], None]
    report: Reporter
    _seconds: dict[str, float] = field(default_factory=dict)  # duration of the last run of each
    _failing: set[str] = field(default_factory=set)
    _done: tuple[int, frozenset[str]] = (0, frozenset())  # a step, and those that ran on it

    def run(self, progress: Progress, *, is_last: bool = False) -> None:
        """Run the evaluators that are due after a step; at the end all that have not seen it."""
        step = progress.step
        done = self._done[1] if is_last and self._done[0] == step else frozenset()
        due = [
            one
            for one in self.evaluators.members
            if one.name not in done and (is_last or progress.is_due(one.every_steps))
        ]
        if not due:
            return
        self._done = step, done | {one.name for one in due}
        began = time.perf_counter()
        figures = {name: value for one in due for name, value in self._figures(one, step).items()}
        if figures:
            seconds = time.perf_counter() - began
            self.on_report(EvaluationReport(step, progress.tokens, figures, seconds))

    def seconds_a_step(self) -> float:
        """Cost of the evaluators per step, on the clock of the first process."""
        mine = sum(
            self._seconds.get(one.name, 0.0) / one.every_steps
            for one in self.evaluators.members
            if one.every_steps is not None
        )
        return self.evaluators.agreement.world.of_main(mine)

    def _figures(self, evaluator: Evaluator, step: int) -> dict[str, float]:
        """The figures of ``evaluator`` by full name; empty if it failed."""
        self.before_each()
        began, name = time.perf_counter(), evaluator.name
        try:
            found = self._evaluate(evaluator, step)
        except EvaluationError as error:
            if name not in self._failing:
                self._failing.add(name)
                self.report(
                    f"evaluator {name!r} failed at step {step}: {error}; training continues, and "
                    f"it runs again when it is next due",
                    "warning",
                )
            return {}
        self._failing.discard(name)
        self._seconds[name] = time.perf_counter() - began
        return {f"{name}/{figure}": value for figure, value in found.items()}

    def _evaluate(self, evaluator: Evaluator, step: int) -> dict[str, float]:
        """The figures on every process, or EvaluationError on every process."""
        failure, found = None, {}
        with inference_view(self.model) as model, torch.no_grad():
            was_training = model.training
            model.eval()
            seed_everything(step_seed(self.seed, step, *evaluator.name.encode()))
            try:
                figures = evaluator.evaluate(model, step)
                found = {name: float(value) for name, value in figures.items()}
            except EvaluationError:
                raise  # all processes raise it
            except Exception as error:
                if is_lost_connection(error):
                    raise
                failure = error
            finally:
                model.train(was_training)
        # If passes gather weights, a process that fails leaves the others waiting in theirs.
        patience_s = _PATIENCE_S if is_divided(self.model) else math.inf
        self.evaluators.agreement.reach(failure, patience_s=patience_s)
        return found
