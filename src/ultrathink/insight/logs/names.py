"""What others call the signals: which column is the loss, and in which unit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ultrathink.core.errors import UltrathinkError, suggestion

STEP = "step"
# Signal -> what it is called, the surest name first. Names are compared in lower case, with every
# run of other signs than letters, digits and slashes as one "_", and without their unit. A name may
# also say its split: "train/lm_loss" and "loss_train" are losses, "eval_lm_loss" is one of
# validation, which here has only those names of its own that do not say so.
ALIASES: dict[str, tuple[str, ...]] = {
    STEP: (
        "step", "global_step", "trainer/global_step", "_step", "iteration", "iter", "iters",
        "steps", "num_updates", "num_steps", "optimizer_step", "update", "updates", "batch", "it",
        "epoch",
    ),
    "loss": (
        "loss", "lm_loss", "trl", "losses", "crossentropyloss", "ce_loss", "cross_entropy",
        "cross_entropy_loss", "loss_metrics/global_avg_loss", "loss_total",
        "metrics_languagecrossentropy", "loss_step", "nll_loss", "nll", "total_loss", "mean_loss",
        "avg_loss", "average_loss", "loss_epoch", "trainloss", "running_loss", "value",
    ),
    "val_loss": ("tel", "lm_loss_value", "validation_metrics/loss", "valloss"),
    "accuracy": ("accuracy", "acc", "mean_token_accuracy", "token_accuracy"),
    "val_accuracy": (),
    "grad_norm": (
        "grad_norm", "gradient_norm", "gradnorm", "grad_norm_total", "total_grad_norm", "gnorm",
        "global_grad_norm", "optim/total_grad_norm", "optim/grad_norm", "grad/norm",
        "l2_norm/grad/global", "norm",
    ),
    "lr": (
        "lr", "learning_rate", "optim/learning_rate_group0", "optim/lr", "lr/group0", "lr/group_0",
        "lr_adamw", "lr_adam", "lr_group0", "learning_rate/group0", "lr_adamw/pg1",
    ),
    "step_time": (
        "step_time", "iteration_time", "iter_time", "elapsed_time_per_iteration", "time_per_step",
        "time_per_iteration", "step_avg", "sec_per_step", "seconds_per_step", "batch_time", "dt",
        "time_metrics/end_to_end", "perf/step_time",
    ),
    "data_wait": (
        "data_wait", "data_time", "data_loading_time", "dataloader_time", "data_load_time",
        "time_metrics/data_loading", "throughput/device/data_loading", "data_loading",
        "batch_generator",
    ),
    "tokens_per_sec": (
        "tokens_per_sec", "tokens_per_second", "tok_per_sec", "tok/sec", "tok/s", "tokens/s",
        "tokens/sec", "throughput/device/tokens_per_second", "tps", "throughput/device/tps",
        "tokens_per_second_per_gpu", "tokens/s/device", "tgs", "wps", "toks_per_sec",
        "throughput/tokens_per_sec", "throughput", "currsamplespersec", "samples_per_sec",
        "samples_per_second", "samples/s", "samples/sec",
    ),
    "memory": (
        "memory", "mem", "memory_allocated", "mem_allocated", "memallocated", "gpu_memory",
        "gpu_mem", "cuda_memory", "memory/allocated", "allocated", "memory/current_allocated_mem",
    ),
    "memory_reserved": (
        "memory_reserved", "mem_reserved", "memory/reserved", "reserved", "memory/reserved_mem",
    ),
    "memory_peak": (
        "memory_peak", "mem_max_allocated", "maxmemallocated", "max_memory_allocated",
        "peak_memory", "memory/max_reserved", "memory/max_active", "system/peak_gpu_memory",
        "peak_mem", "max_memory", "max_mem", "mem_peak", "memory/peak_allocated_mem",
    ),
    "memory_limit": ("memory_limit", "memory_total", "mem_limit"),
    "skipped_steps": ("skipped_steps", "skipped", "num_skipped_steps", "total_skipped_steps"),
    "loss_scale": ("loss_scale", "lossscale", "grad_scale", "amp_scale", "scaler_scale", "scale"),
    "update_ratio": ("update_ratio", "update_to_weight", "update_weight_ratio"),
}  # fmt: skip
SKIPPED_SINCE = frozenset(  # steps skipped since the last line, not since the beginning
    {"number_of_skipped_iterations", "skipped_iterations", "num_skipped_iterations"}
)
TOTAL = frozenset({"total", "max_steps", "total_steps", "num_train_steps", "train_iters"})
SPLIT = frozenset({"split", "kind", "phase", "mode", "stage", "subset", "partition"})
RUN = frozenset({"source", "run", "run_name", "run_id", "experiment"})
TRAINING = ("train", "training", "fit", "tr")
VALIDATION = ("val", "valid", "validation", "eval", "evaluation", "dev", "validate", "test")
SPLITS = (*TRAINING, *VALIDATION)
# What says when a line was written, or how far in the data: no figure of the training.
_CLOCKS = frozenset(
    {"time", "timestamp", "_timestamp", "_runtime", "wall_time", "walltime", "date", "datetime"}
    | {"line", "rank", "total", "max_steps", "total_steps", "time_elapsed", "elapsed"}
    | {"train_time", "tokens", "num_tokens", "total_tokens", "consumed_samples", "consumed_tokens"}
    | {"throughput/total_tokens", "runtime"}
)
_PER_SOURCE = (  # with the source in <s>
    (re.compile(r"(?:train_|train/)loss/(?P<s>.+)"), "loss/"),
    (re.compile(r"loss/(?P<s>.+)"), "loss/"),
    (re.compile(r"(?:val|valid|validation|eval)[_/]loss/(?P<s>.+)"), "val_loss/"),
    (re.compile(r"(?:val|valid|validation|eval)/(?P<s>.+)/(?:ce_)?loss"), "val_loss/"),
    (re.compile(r"eval_(?P<s>.+)_loss"), "val_loss/"),
)
_OURS = re.compile(r"(?:experts/.+/.+|grad_norm/.+|(?:val_)?loss/.+)")
_UNITS = {
    "ms": 1e-3, "msec": 1e-3, "milliseconds": 1e-3, "us": 1e-6, "s": 1.0, "sec": 1.0, "secs": 1.0,
    "seconds": 1.0,
    "bytes": 2.0**-30, "b": 2.0**-30, "kb": 2.0**-20, "kib": 2.0**-20, "mb": 2.0**-10,
    "mib": 2.0**-10, "gb": 1.0, "gib": 1.0, "tb": 2.0**10, "tib": 2.0**10,
    "%": 1e-2, "percent": 1e-2, "pct": 1e-2, "k": 1e3, "m": 1e6,
}  # fmt: skip
_UNIT_AT_THE_END = re.compile(
    r"(?:[_\-. ]|(?P<bracket>[(\[]))(?P<unit>ms|msec|milliseconds|us|s|sec|secs|seconds|bytes|"
    r"[kmgt]i?b|percent|pct|%)(?(bracket)[)\]])$",
    re.IGNORECASE,
)
_DURATIONS = frozenset({"ms", "msec", "milliseconds", "us", "s", "sec", "secs", "seconds"})
_SHARES = frozenset({"%", "percent", "pct"})
_SIZES = frozenset({"bytes", "b", "kb", "kib", "mb", "mib", "gb", "gib", "tb", "tib"})
_MEASURED_IN = {  # which units a signal may have; another word is no unit
    "step_time": _DURATIONS,
    "data_wait": _DURATIONS,
    "accuracy": _SHARES,
    "val_accuracy": _SHARES,
    "tokens_per_sec": frozenset({"k", "m"}),
    "memory": _SIZES,
    "memory_reserved": _SIZES,
    "memory_peak": _SIZES,
    "memory_limit": _SIZES,
}
_RANKS = {
    alias: (signal, 100 * rank)  # between them is room for the splits
    for signal, aliases in ALIASES.items()
    for rank, alias in enumerate(aliases)
}
_ALONE = frozenset({"value", "norm", "scale", "batch", "it"})  # mean little beside others
_OF_THE_LOSS = ("loss", "val_loss", "accuracy", "val_accuracy")


@dataclass(frozen=True)
class Meaning:
    """What a column stands for: ``signal`` times ``factor``; a lower ``rank`` is surer."""

    signal: str
    rank: int = 0
    factor: float = 1.0
    since_last: bool = False  # counts since the last line, to be summed up


def plain(name: str) -> str:
    """A name in lower case, every run of signs as one underscore: ``lm loss`` is ``lm_loss``."""
    text = name.rpartition(" - ")[2]  # Weights & Biases: the run's name stands before
    text = re.sub(r"[^a-z0-9/]+", "_", text.strip().lower().replace("%", " percent"))
    return text.rstrip("_") if text.strip("_") else text


def without_unit(name: str) -> tuple[str, str, str]:
    """A name in plain form and as it is, both without its unit, and that unit."""
    text = name.strip()
    match = _UNIT_AT_THE_END.search(text)
    if match is None:
        return plain(text), text, ""
    text = text[: match.start()].rstrip()
    return plain(text), text, match["unit"].lower()


def meaning_of(name: str, extra: Mapping[str, Meaning] | None = None) -> Meaning | None:
    """What the column ``name`` stands for; its own name where that is unknown.

    ``extra`` are names, in plain form, that mean something else in this log. None where it is no
    figure of the training, such as the time of day.
    """
    extra = extra or {}
    if name.endswith(("__MIN", "__MAX")):  # Weights & Biases: beside each column of means
        return None
    if _OURS.fullmatch(name) and _known(plain(name)) is None:
        return Meaning(name)
    key, shown, in_name = plain(name), name.strip(), ""
    if key not in extra and _known(key) is None:
        key, shown, in_name = without_unit(name)
    if key in extra:
        given = extra[key]
        return replace(given, factor=given.factor * _factor(given.signal, in_name))
    if key in SKIPPED_SINCE:
        return Meaning("skipped_steps", since_last=True)
    if (known := _known(key)) is not None:
        signal, rank = known
        return Meaning(signal, rank, _factor(signal, in_name))
    if key in _CLOCKS or plain(name) in _CLOCKS:
        return None
    for pattern, prefix in _PER_SOURCE:
        if match := pattern.fullmatch(plain(name)):
            return Meaning(prefix + match["s"])
    return Meaning(shown)


def _known(key: str) -> tuple[str, int] | None:
    """The signal that a name in plain form stands for, and its rank: with its split or without."""
    if key in _RANKS:
        return _RANKS[key]
    words = re.split("[/_]", key)
    splits = [word for word in words if word in SPLITS]
    base = "_".join(word for word in words if word not in splits)
    known = _RANKS.get(base)
    if known is None or len(splits) != 1 or base in _ALONE:
        return None
    (signal, rank), (split,) = known, splits
    if split in TRAINING:
        return signal, rank + 1
    # A speed or a memory of validation is no signal; "val" is surer than "test".
    is_scored = signal in ("loss", "accuracy")
    return (f"val_{signal}", rank + 1 + VALIDATION.index(split)) if is_scored else None


def of_validation(signal: str) -> str | None:
    """What a figure of a line about validation is called; None for speeds and the like."""
    if signal in ALIASES and signal not in _OF_THE_LOSS:
        return None
    return signal if signal.startswith("val_") else f"val_{signal}"


def is_telling(signal: str) -> bool:
    """Whether a signal says how the training goes: of such there must be one in a log."""
    prefixes = ("loss/", "val_loss/", "experts/")
    return signal in (*_OF_THE_LOSS, "grad_norm") or signal.startswith(prefixes)


def can_fail(signal: str) -> bool:
    """Whether NaN is news of ``signal``; elsewhere it means that nothing was recorded."""
    return signal in ("loss", "val_loss", "grad_norm", "update_ratio") or signal.startswith(
        ("loss/", "val_loss/", "grad_norm/")
    )


def parse_columns(texts: list[str]) -> dict[str, str]:
    """``--columns loss=train_loss,step=iter`` as signal -> column; errors name what is wrong."""
    columns: dict[str, str] = {}
    for text in texts:
        for part in filter(None, (part.strip() for part in text.split(","))):
            signal, equals, column = (word.strip() for word in part.partition("="))
            if not (signal and equals and column):
                raise UltrathinkError(
                    f"--columns: {part!r} is not SIGNAL=COLUMN, as in: --columns loss=train_loss"
                )
            if signal not in ALIASES and not _OURS.fullmatch(signal):
                raise UltrathinkError(
                    f"--columns: there is no signal {signal!r}. {suggestion(signal, ALIASES)}"
                )
            if signal in columns:
                raise UltrathinkError(
                    f"--columns: {signal} is given twice, as {columns[signal]!r} and {column!r}; "
                    f"name one column for each signal"
                )
            columns[signal] = column
    return columns


def _factor(signal: str, unit: str) -> float:
    return _UNITS[unit] if unit in _MEASURED_IN.get(signal, ()) else 1.0
