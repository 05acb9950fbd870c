"""Healthy runs of many shapes, made up: what no detector should raise an alarm about.

A curve is a power law above a floor, times noise; every shape is an array of losses, one a logged
step, with other signals beside it where the shape is about them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ultrathink.orchestrator.events import Event
from ultrathink.orchestrator.signals import Signals
from ultrathink.orchestrator.watcher import Watcher

Floats = npt.NDArray[np.float64]
Columns = dict[str, Floats]
Shape = Callable[[np.random.Generator, int], Columns]


def law(count: int, *, start: float = 8.0, floor: float = 2.0, exponent: float = 0.4) -> Floats:
    """A power law above a floor."""
    steps = np.arange(1, count + 1, dtype=np.float64)
    return floor + start * (1 + steps / 4) ** -exponent


def signals(columns: Mapping[str, Any], every: int = 1, start: int = 1) -> Iterator[Signals]:
    """Columns as signals, logged every so many steps."""
    for index in range(len(next(iter(columns.values())))):
        values = {name: float(column[index]) for name, column in columns.items()}
        yield Signals(start + index * every, values)


def watched(run: Sequence[Signals] | Iterator[Signals], *, end: bool = True) -> Watcher:
    """A watcher that has seen a run."""
    watcher = Watcher()
    for one in run:
        watcher.observe(one)
    if end:
        watcher.finish()
    return watcher


def alarms(run: Sequence[Signals] | Iterator[Signals]) -> list[Event]:
    """The alarms of a run."""
    return [event for event in watched(run).events if event.is_alarm]


def autocorrelated(rng: np.random.Generator, count: int, rho: float = 0.5) -> Floats:
    """Noise of unit variance of which each value keeps a share of the one before."""
    fresh = rng.standard_normal(count) * np.sqrt(1 - rho**2)
    noise = np.empty(count)
    last = float(rng.standard_normal())
    for index in range(count):
        last = rho * last + fresh[index]
        noise[index] = last
    return noise


def noisy(share: float) -> Shape:
    """A power law with noise of so large a share of the loss."""

    def shape(rng: np.random.Generator, count: int) -> Columns:
        return {"loss": law(count) * np.exp(share * rng.standard_normal(count))}

    return shape


def heavy_tailed(rng: np.random.Generator, count: int) -> Columns:
    """Student's t with three degrees of freedom: now and then a value far out."""
    return {"loss": law(count) * np.exp(0.01 * rng.standard_t(3, count))}


def correlated(rng: np.random.Generator, count: int) -> Columns:
    """Noise that lasts over a few steps."""
    return {"loss": law(count) * np.exp(0.02 * autocorrelated(rng, count))}


def cosine_end(rng: np.random.Generator, count: int) -> Columns:
    """A learning rate that falls by a cosine, and a loss that falls faster with it."""
    share = np.arange(count) / count
    rate = 0.5 * (1 + np.cos(np.pi * share))
    loss = law(count) * (1 - 0.06 * (1 - rate)) * np.exp(0.01 * rng.standard_normal(count))
    return {"loss": loss, "lr": 3e-4 * rate}


def stable_then_decay(rng: np.random.Generator, count: int) -> Columns:
    """Warm-up, a constant rate, and a decay over the last fifth, with a clear fall."""
    share = np.arange(count) / count
    rate = np.clip(np.minimum(share / 0.02, (1 - share) / 0.2), 0, 1)
    late = np.clip((share - 0.8) / 0.2, 0, 1)
    loss = law(count) * (1 - 0.08 * late) * np.exp(0.01 * rng.standard_normal(count))
    return {"loss": loss, "lr": 3e-4 * rate}


def steps_of_the_rate(rng: np.random.Generator, count: int) -> Columns:
    """A learning rate lowered tenfold twice: the loss drops each time, then hardly falls."""
    share = np.arange(count) / count
    times = (share > 0.4).astype(float) + (share > 0.7)
    since = np.where(share > 0.7, share - 0.7, share - 0.4) * count
    drop = 0.05 * times - 0.03 * (times > 0) * np.exp(-since / 40)
    loss = law(count) * (1 - drop) * np.exp(0.01 * rng.standard_normal(count))
    return {"loss": loss, "lr": 1e-3 * 0.1**times}


def restarts(rng: np.random.Generator, count: int) -> Columns:
    """Warm restarts: the rate jumps up, the loss rises a little with it and falls again."""
    share = (np.arange(count) % 1000) / 1000
    rate = 0.5 * (1 + np.cos(np.pi * share))
    loss = law(count) * (1 + 0.04 * rate) * np.exp(0.01 * rng.standard_normal(count))
    return {"loss": loss, "lr": 3e-4 * rate}


def warm_up_bump(rng: np.random.Generator, count: int) -> Columns:
    """A loss that rises by a few percent as the learning rate reaches its height."""
    steps = np.arange(count)
    bump = 1 + 0.06 * np.exp(-(((steps - 300) / 120.0) ** 2))
    loss = law(count) * bump * np.exp(0.01 * rng.standard_normal(count))
    return {"loss": loss, "lr": 3e-4 * np.minimum(steps / 300, 1)}


def growing_batches(rng: np.random.Generator, count: int) -> Columns:
    """Batches that grow in steps: the noise shrinks, the gradient's norm falls."""
    sizes = 2.0 ** np.floor(np.arange(count) / (count / 5))
    loss = law(count) * np.exp(0.06 / np.sqrt(sizes) * rng.standard_normal(count))
    norm = np.exp(0.15 * rng.standard_normal(count)) / np.sqrt(sizes)
    return {"loss": loss, "grad_norm": norm}


def shrinking_batches(rng: np.random.Generator, count: int) -> Columns:
    """Batches that become half as large twice: noise and norm grow."""
    sizes = 0.5 ** np.floor(np.arange(count) / (count / 3))
    loss = law(count) * np.exp(0.02 / np.sqrt(sizes) * rng.standard_normal(count))
    norm = np.exp(0.15 * rng.standard_normal(count)) / np.sqrt(sizes)
    return {"loss": loss, "grad_norm": norm}


def staircase(rng: np.random.Generator, count: int) -> Columns:
    """Fine-tuning over epochs: the loss drops at the end of each and is flat within."""
    level = np.array([2.0, 1.6, 1.2, 0.85, 0.6])[np.arange(count) * 5 // count]
    bend = 1 + 0.5 * np.exp(-np.arange(count) / 30)
    return {"loss": level * bend * np.exp(0.12 * rng.standard_normal(count))}


def rising_epochs(rng: np.random.Generator, count: int) -> Columns:
    """Several epochs in which the loss drops at the start of each and creeps up within it."""
    position = np.arange(count) % (count // 5) / (count // 5)
    level = np.array([2.0, 1.7, 1.45, 1.25, 1.1])[np.arange(count) * 5 // count]
    return {"loss": level * (1 + 0.03 * position) * np.exp(0.1 * rng.standard_normal(count))}


def hard_batches(rng: np.random.Generator, count: int) -> Columns:
    """One step in two hundred lies far out, by up to a factor of two, and is alone."""
    jumps = np.where(rng.random(count) < 0.005, rng.uniform(0.08, 0.7, count), 0.0)
    jumps[1:][jumps[:-1] > 0] = 0  # two in a row are reported below
    return {"loss": law(count) * np.exp(0.01 * rng.standard_normal(count) + jumps)}


def near_zero(rng: np.random.Generator, count: int) -> Columns:
    """A memorized set: losses over many orders of magnitude, noise as large as themselves."""
    fall = np.exp(-np.minimum(np.arange(count) / 400, 9))
    return {"loss": 2.0 * fall * np.exp(0.6 * rng.standard_normal(count))}


def exact_zeros(rng: np.random.Generator, count: int) -> Columns:
    """As memorized as can be, rounded to four digits as logs are: many are zero."""
    fall = np.exp(-np.minimum(np.arange(count) / 200, 9))
    return {"loss": np.round(2.0 * fall * np.exp(0.6 * rng.standard_normal(count)), 4)}


def negative(rng: np.random.Generator, count: int) -> Columns:
    """Losses about zero and below, as in reinforcement learning."""
    fall = -0.5 * (1 - np.exp(-np.arange(count) / 500))
    return {"loss": 0.1 + fall + 0.08 * rng.standard_normal(count)}


def preference(rng: np.random.Generator, count: int) -> Columns:
    """Preference training: from ln 2 towards zero, noisier and noisier in the logarithm."""
    fall = 1 / (1 + np.arange(count) / 300)
    wide = 0.1 + 0.5 * (1 - fall)
    loss = np.log(2) * fall * np.exp(wide * rng.standard_normal(count))
    accuracy = np.clip(0.5 + 0.4 * (1 - fall) + 0.1 * rng.standard_normal(count), 0, 1)
    return {"loss": loss, "accuracy": accuracy}


def rounded(rng: np.random.Generator, count: int) -> Columns:
    """Losses logged with two digits: most neighbours are equal."""
    return {"loss": np.round(law(count) * np.exp(0.003 * rng.standard_normal(count)), 2)}


def mixed_lengths(rng: np.random.Generator, count: int) -> Columns:
    """Small batches of tasks: noise of three kinds, drawn again each step."""
    kinds = rng.choice([0.8, 1.0, 1.3], count)
    return {"loss": law(count) * kinds * np.exp(0.1 * rng.standard_normal(count))}


def gradients(rng: np.random.Generator, count: int) -> Columns:
    """Norms that fall at first, then grow slowly, with a heavy tail."""
    steps = np.arange(count)
    trend = 6 * np.exp(-steps / 60) + 0.5 + 1.5 * steps / count
    norm = trend * np.exp(0.15 * rng.standard_t(5, count))
    return {"loss": law(count) * np.exp(0.01 * rng.standard_normal(count)), "grad_norm": norm}


def resources(rng: np.random.Generator, count: int) -> Columns:
    """Jitter, slow first steps, checkpoints that take long, memory that fills at the start."""
    steps = np.arange(count)
    seconds = 1.0 + 0.05 * np.abs(rng.standard_t(3, count))
    seconds[:3] = (60.0, 5.0, 2.0)
    seconds[rng.random(count) < 0.02] *= 1.8
    seconds[500::500] = 25.0
    memory = 20 + 15 * (1 - np.exp(-steps / 20)) + 0.3 * rng.standard_normal(count)
    return {
        "loss": law(count) * np.exp(0.01 * rng.standard_normal(count)),
        "step_time": seconds,
        "data_wait": 0.05 * seconds,
        "memory": memory,
        "memory_limit": np.full(count, 80.0),
    }


def validations(rng: np.random.Generator, count: int) -> Columns:
    """A validation loss of a small set every 20 logged steps, absent in between."""
    val_loss = np.where(
        np.arange(count) % 20 == 0, law(count, floor=2.2) + 0.03 * rng.standard_normal(count), 0
    )
    return {"loss": law(count) * np.exp(0.02 * rng.standard_normal(count)), "val_loss": val_loss}


def sources(rng: np.random.Generator, count: int) -> Columns:
    """Losses of three sources, the smallest the noisiest."""
    columns = {
        f"loss/{name}": law(count, floor=floor) * np.exp(noise * rng.standard_normal(count))
        for name, floor, noise in (("web", 2.5, 0.02), ("code", 1.0, 0.06), ("maths", 1.5, 0.25))
    }
    return {"loss": sum(columns.values()) / 3, **columns}


SHAPES: dict[str, Shape] = {
    **{f"noise of {share:.1%}": noisy(share) for share in (0.002, 0.01, 0.05, 0.15, 0.3)},
    **{
        shape.__name__.replace("_", " "): shape
        for shape in (
            heavy_tailed,
            correlated,
            cosine_end,
            stable_then_decay,
            steps_of_the_rate,
            restarts,
            warm_up_bump,
            growing_batches,
            shrinking_batches,
            staircase,
            rising_epochs,
            hard_batches,
            near_zero,
            exact_zeros,
            negative,
            preference,
            rounded,
            mixed_lengths,
            gradients,
            resources,
            validations,
            sources,
        )
    },
}


def healthy(name: str, count: int, *, every: int = 1, seed: int = 0) -> list[Signals]:
    """A healthy run of a shape, ``count`` logged steps; what it does not tell is left out."""
    rng = np.random.default_rng([seed, list(SHAPES).index(name)])
    run = signals(SHAPES[name](rng, count), every)
    return [
        Signals(one.step, {k: v for k, v in one.values.items() if k != "val_loss" or v})
        for one in run
    ]


def found(columns: Mapping[str, Any], kind: str) -> list[Event]:
    """The events of a kind in a run given as columns."""
    return [event for event in watched(signals(columns)).events if event.kind == kind]


def steady(count: int, share: float = 0.01, seed: int = 0) -> Floats:
    """Losses of a healthy run with little noise."""
    return law(count) * np.exp(share * np.random.default_rng(seed).standard_normal(count))
