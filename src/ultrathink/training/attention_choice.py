"""Chooses the fastest attention kernel: by a rule, or for long runs by a short trial."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ultrathink.config.model import ATTENTION_BACKENDS
from ultrathink.config.schema import Config
from ultrathink.core.files import write_atomic
from ultrathink.data.cache import cache_folder
from ultrathink.model.attention_backends import (
    LONGEST_FOR_BLOCKS,
    READS_DOCUMENTS,
    choose_backend,
)
from ultrathink.model.attention_mask import build_mask
from ultrathink.runs.manifest import hardware
from ultrathink.training.compiling import compile_function

# A trial compiles two small graphs, which pays in runs of at least this length.
WORTH_A_TRIAL_S = 1200.0
_REPEATS = 7
_FILE = "attention.json"  # in the cache folder: the result for each setting


def choose_attention(
    config: Config, dtype: torch.dtype, device: torch.device, planned_s: float | None
) -> tuple[str, str]:
    """The backend's name, and why; in long runs a trial decides between competing kernels.

    With ``training.deterministic`` there is no trial: two runs could measure different times.
    """
    training, seq_len = config.training, config.data.seq_len
    compiled = training.compile is True
    by_rule = choose_backend(device.type, dtype, seq_len, compiled)
    competing = device.type == "cpu" and seq_len <= max(LONGEST_FOR_BLOCKS.values())
    is_long = planned_s is not None and planned_s >= WORTH_A_TRIAL_S
    if training.deterministic or not competing or not is_long:
        return by_rule, f"{str(dtype).removeprefix('torch.')} on {device.type}"
    seconds = _remembered_trial(config, dtype, compiled)
    best = min(seconds, key=lambda name: seconds[name])
    times = ", ".join(f"{name} {1000 * taken:.1f} ms" for name, taken in seconds.items())
    return best, f"a layer's attention, forward and backward, took {times} here"


def _remembered_trial(config: Config, dtype: torch.dtype, compiled: bool) -> dict[str, float]:
    """Seconds by backend, from the cache if the same setting was tried before."""
    file = cache_folder(config.data.cache_dir) / _FILE
    setting = (  # everything that the times depend on
        hardware()["cpu"],
        torch.get_num_threads(),
        torch.__version__,
        str(dtype),
        compiled,
        _isolates(config),
        *_shape(config),
    )
    key = json.dumps(setting)
    known = _read(file)
    if key not in known:
        known = {**known, key: try_backends(config, dtype, compiled)}
        with suppress(OSError):  # on a full disk the next run repeats the trial
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps(known, indent=1) + "\n")
    return known[key]


def _read(file: Path) -> dict[str, dict[str, float]]:
    try:
        known: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _isolates(config: Config) -> bool:
    return config.data.packing.enabled and config.data.packing.isolate_documents


def _shape(config: Config) -> tuple[int, int, int, int, int]:
    """B, T, H, K and D of a micro-batch."""
    model = config.model.resolved()
    assert model.num_kv_heads is not None, "the configuration is resolved first"
    assert model.head_dim is not None, "the configuration is resolved first"
    assert isinstance(config.training.micro_batch_size, int), "the micro-batch size is set first"
    sizes = (model.num_heads, model.num_kv_heads, model.head_dim)
    return (config.training.micro_batch_size, config.data.seq_len, *sizes)


def try_backends(config: Config, dtype: torch.dtype, compiled: bool) -> dict[str, float]:
    """Median seconds of a layer's attention, forward and backward, by backend, alternating."""
    passes = {
        name: _one_pass(config, name, dtype, compiled)
        for name in (*sorted(READS_DOCUMENTS), "sdpa")
    }
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(_REPEATS + 2):
        for name, work in passes.items():
            began = time.perf_counter()
            work()
            if repeat >= 2:  # the first compiles, the second allocates memory
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _one_pass(config: Config, name: str, dtype: torch.dtype, compiled: bool) -> Callable[[], None]:
    B, T, H, K, D = _shape(config)
    generator = torch.Generator().manual_seed(0)  # leaves the run's random state unchanged
    fused = torch.randn(B, T, (H + 2 * K) * D, generator=generator).to(dtype).requires_grad_()
    documents = (torch.arange(T) * 2 // T).expand(B, T) if _isolates(config) else None
    mask = build_mask(
        batch_size=B,
        num_heads=H,
        num_queries=T,
        num_keys=T,
        dtype=dtype,
        device=fused.device,
        attention_mask=None,
        document_ids=documents,
        dense_documents=name not in READS_DOCUMENTS,
    )
    backend = ATTENTION_BACKENDS.load(name)

    def attend(fused: Tensor) -> Tensor:
        heads = fused.view(B, T, -1, D).transpose(1, 2)
        out: Tensor = backend(*heads.split([H, K, K], dim=1), mask)
        return out.transpose(1, 2).reshape(B, T, -1)

    run = compile_function(attend) if compiled else attend
    slopes = torch.ones(B, T, H * D, dtype=dtype)

    def work() -> None:
        run(fused).backward(slopes)
        fused.grad = None

    return work
