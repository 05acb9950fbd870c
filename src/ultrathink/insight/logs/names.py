"""What others call the signals, in which unit, and how they write numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ultrathink.core.errors import UltrathinkError, suggestion

STEP = "step"
# Signal -> its names, the surest first. Names are compared in lower case, with each run of signs
# other than letters, digits and slashes as one "_", and without their unit. A name may also say its
# split: "train/lm_loss" and "loss_train" are losses, "eval_lm_loss" is a validation loss.
ALIASES: dict[str, tuple[str, ...]] = {
    signal: tuple(names.split())
    for signal, names in {
        STEP: "step global_step trainer/global_step _step iteration iter iters steps num_updates "
        "num_steps optimizer_step update updates batch it epoch",
        "loss": "loss lm_loss trl losses crossentropyloss ce_loss cross_entropy cross_entropy_loss "
        "loss_metrics/global_avg_loss loss_total metrics_languagecrossentropy loss_step nll_loss "
        "nll total_loss mean_loss avg_loss average_loss loss_epoch trainloss running_loss "
        "lm_loss_value value",
        "val_loss": "tel validation_metrics/loss valloss",
        "accuracy": "accuracy acc mean_token_accuracy token_accuracy",
        "val_accuracy": "",
        "grad_norm": "grad_norm gradient_norm gradnorm grad_norm_total total_grad_norm gnorm "
        "global_grad_norm optim/total_grad_norm optim/grad_norm grad/norm l2_norm/grad/global norm",
        "lr": "lr learning_rate optim/learning_rate_group0 optim/lr lr/group0 lr/group_0 lr_adamw "
        "lr_adam lr_group0 learning_rate/group0 lr_adamw/pg1",
        "step_time": "step_time iteration_time iter_time elapsed_time_per_iteration time_per_step "
        "time_per_iteration step_avg sec_per_step seconds_per_step batch_time dt "
        "time_metrics/end_to_end perf/step_time time/iteration",
        "data_wait": "data_wait data_time data_loading_time dataloader_time data_load_time "
        "time_metrics/data_loading throughput/device/data_loading data_loading batch_generator",
        "tokens_per_sec": "tokens_per_sec tokens_per_second tok_per_sec tok/sec tok/s tokens/s "
        "tokens/sec throughput/device/tokens_per_second tps throughput/device/tps "
        "tokens_per_second_per_gpu tokens/s/device tgs wps toks_per_sec throughput/tokens_per_sec "
        "throughput currsamplespersec samples_per_sec samples_per_second samples/s samples/sec",
        "memory": "memory mem memory_allocated mem_allocated memallocated gpu_memory gpu_mem "
        "cuda_memory memory/allocated allocated memory/current_allocated_mem",
        "memory_reserved": "memory_reserved mem_reserved memory/reserved reserved "
        "memory/reserved_mem",
        "memory_peak": "memory_peak mem_max_allocated maxmemallocated max_memory_allocated "
        "peak_memory memory/max_reserved memory/max_active system/peak_gpu_memory peak_mem "
        "max_memory max_mem mem_peak memory/peak_allocated_mem",
        "memory_limit": "memory_limit memory_total mem_limit",
        "skipped_steps": "skipped_steps skipped num_skipped_steps total_skipped_steps",
        "nan_steps": "nan_steps",
        "loss_scale": "loss_scale lossscale grad_scale amp_scale scaler_scale scale",
        "update_ratio": "update_ratio update_to_weight update_weight_ratio",
    }.items()
}
_SINCE_LAST = {  # counts since the last line, which are added up
    f"{before}{what}_iterations": f"{what}_steps"
    for what in ("skipped", "nan")
    for before in ("number_of_", "num_", "")
} | {"nan_iters": "nan_steps"}
# Columns that say where a row belongs -> what they say of it.
ROLES = {
    name: role
    for role, names in {
        "total": "total max_steps total_steps num_train_steps train_iters",
        "split": "split kind phase mode stage subset partition",
        "run": "run run_name run_id experiment trial seed",
        "source": "source dataset domain corpus task",
        "length": "epoch_steps steps_per_epoch",
        "rank": "rank global_rank local_rank process_index process",
    }.items()
    for name in names.split()
}
# The time of a line, or the position in the data: no figures of the training.
_CLOCKS = frozenset((
    "time", "timestamp", "_timestamp", "_runtime", "wall_time", "walltime", "date", "datetime",
    "line", "time_elapsed", "elapsed", "train_time", "tokens", "num_tokens", "total_tokens",
    "consumed_samples", "consumed_tokens", "throughput/total_tokens", "runtime",
))  # fmt: skip
TRAINING = ("train", "training", "fit", "tr")
VALIDATION = ("val", "valid", "validation", "eval", "evaluation", "dev", "validate", "test")
SPLITS = (*TRAINING, *VALIDATION)
_PER_SOURCE = (  # with the source in <s>
    (re.compile(r"(?:train[_/])?loss/(?P<s>.+)"), "loss/"),
    (re.compile(r"(?:val|valid|validation|eval)[_/]loss/(?P<s>.+)"), "val_loss/"),
    (re.compile(r"(?:val|valid|validation|eval)/(?P<s>.+)/(?:ce_)?loss"), "val_loss/"),
    (re.compile(r"eval_(?P<s>.+)_loss"), "val_loss/"),
)
_OURS = re.compile(r"(?:experts/.+/.+|grad_norm/.+|(?:val_)?loss/.+)")
_TIMES = {"s": 1.0, "sec": 1.0, "secs": 1.0, "seconds": 1.0, "us": 1e-6}
_TIMES |= {"ms": 1e-3, "msec": 1e-3, "milliseconds": 1e-3}
_SIZES = {"gb": 1.0, "gib": 1.0, "mb": 2.0**-10, "mib": 2.0**-10, "kb": 2.0**-20, "kib": 2.0**-20}
_SIZES |= {"tb": 2.0**10, "tib": 2.0**10, "bytes": 2.0**-30, "b": 2.0**-30}
_SHARES, _NATS = {"%": 1e-2, "percent": 1e-2, "pct": 1e-2}, {"nats": 1.0}
_COUNTS = {"k": 1e3, "m": 1e6, "g": 1e9}
# The units that a signal may have: seconds, GiB, shares and counts. A figure in another unit is
# another figure, and keeps its name.
_MEASURED_IN: dict[str, dict[str, float]] = {
    **dict.fromkeys(("step_time", "data_wait"), _TIMES),
    **dict.fromkeys(("memory", "memory_reserved", "memory_peak", "memory_limit"), _SIZES),
    **dict.fromkeys(("accuracy", "val_accuracy"), _SHARES),
    **dict.fromkeys(("loss", "val_loss"), _NATS),
    **dict.fromkeys(("tokens_per_sec", "loss_scale", "skipped_steps", "nan_steps"), _COUNTS),
}
# Where the comma of "10,050" parts thousands; elsewhere it may part decimals.
_WITH_COMMAS = (STEP, "tokens_per_sec", "loss_scale", "memory", "memory_reserved", "memory_peak")
_UNIT_AT_THE_END = re.compile(
    r"(?:[_\-. ]|(?P<bracket>[(\[]))(?P<unit>ms|msec|milliseconds|us|s|sec|secs|seconds|bytes|"
    r"[kmgt]i?b|percent|pct|%|nats)(?(bracket)[)\]])$",
    re.IGNORECASE,
)
_RANKS = {
    alias: (signal, 100 * rank)  # between them is room for the splits
    for signal, aliases in ALIASES.items()
    for rank, alias in enumerate(aliases)
}
_ALONE = frozenset({"value", "norm", "scale", "batch", "it"})  # mean little beside others
SCORED = ("loss", "val_loss", "accuracy", "val_accuracy")  # depend on the data
NUMBER = (
    r"(?:[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)"
    r"|[-+]?(?i:nan|inf(?:inity)?)\b)"
)
_QUANTITY = re.compile(rf"(?P<number>{NUMBER})\s*(?P<unit>[A-Za-z%/]*)")
_ABSENT = frozenset({"", "-", "--", "none", "null", "n/a", "na", "<na>"})


@dataclass(frozen=True)
class Meaning:
    """What a column stands for: ``signal`` times ``factor``; a lower ``rank`` is surer."""

    signal: str
    rank: int = 0
    factor: float = 1.0
    since_last: bool = False  # counts since the last line, to be added up
    is_perplexity: bool = False  # whose logarithm is the loss


@lru_cache(maxsize=4096)
def plain(name: str) -> str:
    """A name in lower case, each run of signs as one underscore: ``lm loss`` is ``lm_loss``."""
    text = re.sub(r"[^a-z0-9/]+", "_", name.strip().lower().replace("%", " percent"))
    return text.rstrip("_") if text.strip("_") else text


@lru_cache(maxsize=4096)
def words_of(name: str) -> tuple[str, tuple[str, ...]]:
    """A plain name without the words that say its split, and those words."""
    words = re.split("[/_]", plain(name))
    return "_".join(w for w in words if w not in SPLITS), tuple(w for w in words if w in SPLITS)


def qualified(name: str, split: str) -> str:
    """The name of a figure of ``split``, where the name does not say a split itself."""
    return name if not split or words_of(name)[1] else f"{split}_{name}"


def factor_of(signal: str, unit: str, otherwise: float = 1.0) -> float | None:
    """What a value in ``unit`` is multiplied by: ``otherwise`` where that is no unit.

    None where the signal is not measured in it.
    """
    if not unit or (unit in ("%", ",") and signal not in ALIASES):
        return otherwise
    if unit == "," and signal in _WITH_COMMAS:
        return otherwise
    return _MEASURED_IN.get(signal, {}).get(unit.lower())


def meaning_of(name: str, extra: Mapping[str, Meaning] | None = None) -> Meaning | None:
    """What the column ``name`` stands for; its own name where that is unknown.

    ``extra`` are names, in plain form, that mean something else in this log. None where it is no
    figure of the training, such as the time of day.
    """
    extra, shown, key, unit = extra or {}, name.strip(), plain(name), ""
    if name.endswith(("__MIN", "__MAX")):  # Weights & Biases: beside each column of means
        return None
    if key not in extra and _known(key) is None:
        if _OURS.fullmatch(name):
            return Meaning(name)
        for pattern, prefix in _PER_SOURCE:
            if match := pattern.fullmatch(key):
                return Meaning(prefix + match["s"])
        if match := _UNIT_AT_THE_END.search(shown):
            key, unit = plain(shown[: match.start()]), match["unit"]
    if key in extra:
        known = extra[key]
    elif not {key, plain(name), words_of(key)[0]}.isdisjoint(_CLOCKS):
        return None
    elif key in _SINCE_LAST:
        known = Meaning(_SINCE_LAST[key], since_last=True)
    else:
        known = Meaning(*(_known(key) or (shown, 0)))
    factor = factor_of(known.signal, unit)
    return Meaning(shown) if factor is None else replace(known, factor=known.factor * factor)


def given_meaning(name: str, signal: str) -> Meaning:
    """What a column stands for that the user names for a signal, in the unit that its name has."""
    match = _UNIT_AT_THE_END.search(name.strip())
    factor = factor_of(signal, match["unit"]) if match else None
    return Meaning(signal, rank=-1, factor=factor or 1.0)


def _known(key: str) -> tuple[str, int] | None:
    """The signal that a name in plain form stands for, and its rank: with its split or without."""
    base, splits = words_of(key)
    if key in _RANKS or base not in _RANKS or len(splits) != 1 or base in _ALONE:
        return _RANKS.get(key)
    (signal, rank), split = _RANKS[base], splits[0]
    if split in TRAINING or signal == STEP:
        return signal, rank + 1
    # A speed or a memory of validation is no signal; "val" is surer than "test".
    is_scored = signal in ("loss", "accuracy")
    return (f"val_{signal}", rank + 1 + VALIDATION.index(split)) if is_scored else None


def is_telling(signal: str) -> bool:
    """Whether a signal says how the training goes: a log has at least one of these."""
    return signal in (*SCORED, "grad_norm") or signal.startswith(("loss/", "val_loss/", "experts/"))


def can_fail(signal: str) -> bool:
    """Whether NaN is news of ``signal``; elsewhere it means that nothing was recorded."""
    families = ("loss/", "val_loss/", "grad_norm/")
    return signal in ("loss", "val_loss", "grad_norm", "update_ratio") or signal.startswith(
        families
    )


def parse_columns(texts: list[str]) -> dict[str, str]:
    """``--columns loss=train_loss,step=iter`` as signal -> column; errors name what is wrong."""
    columns: dict[str, str] = {}
    for part in filter(None, (part.strip() for text in texts for part in text.split(","))):
        signal, _, column = (word.strip() for word in part.partition("="))
        mistake = ""
        if not (signal and column):
            mistake = f"{part!r} is not SIGNAL=COLUMN, as in: --columns loss=train_loss"
        elif signal not in (*ALIASES, "run") and not _OURS.fullmatch(signal):
            known = suggestion(signal, (*ALIASES, "run"))
            mistake = f"there is no signal {signal!r}. {known}"
        elif signal in columns:
            both = f"{columns[signal]!r} and {column!r}"
            mistake = f"{signal} is given twice, as {both}; name one column for each signal"
        if mistake:
            raise UltrathinkError(f"--columns: {mistake}")
        columns[signal] = column
    return columns


def quantity(value: Any) -> tuple[float | None, str]:
    """The number that ``value`` is or spells, NaN and infinities too, and the unit behind it.

    None where it is no number. The unit is ``,`` of a number such as ``10,050``.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value), ""
        except OverflowError:  # an integer of more than 308 digits
            return math.copysign(math.inf, value), ""
    match = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return None, ""
    comma = "," if "," in match["number"] and "." not in match["number"] else ""
    return float(match["number"].replace(",", "")), match["unit"] or comma


def whole_number(value: Any) -> int | None:
    """The whole number that ``value`` is or spells, such as ``7`` and ``"7.0"``."""
    number, unit = quantity(value)
    is_whole = number is not None and math.isfinite(number) and number == int(number)
    return int(number) if number is not None and is_whole and unit in ("", ",") else None


def is_absent(value: Any) -> bool:
    """Whether a cell says that nothing was recorded."""
    return value is None or (isinstance(value, str) and value.strip().lower() in _ABSENT)
