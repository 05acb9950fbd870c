"""What belongs to the whole process and is put back behind each test.

- environment variables, the working directory, handlers of signals, levels of loggers
- the parts that plugins have registered, and the plugins' modules
- random numbers, which begin alike in each test
- of torch: the default dtype, the number of threads, the precision of products, disabled gradients,
  the switches for repeatable kernels, a process group
- what was compiled (torch keeps it by a function's code, so that a later model of the same shapes
  would find it), and how the compiler was set
- how glibc's allocator was set: training tells it to keep what is freed
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
from typing import Any

import numpy as np
import torch
import torch._functorch.config as functorch

from ultrathink.config.data import SOURCES
from ultrathink.config.experts import EXPERT_BACKENDS
from ultrathink.config.model import ATTENTION_BACKENDS, FEED_FORWARDS
from ultrathink.config.monitoring import SINKS
from ultrathink.config.objective import OBJECTIVES
from ultrathink.config.optimizer import OPTIMIZERS, SCHEDULES
from ultrathink.config.tokenizer import TOKENIZERS
from ultrathink.core.registry import Registry

State = dict[str, Any]
_REGISTRIES: tuple[Registry[Any], ...] = (
    *(SOURCES, EXPERT_BACKENDS, ATTENTION_BACKENDS, FEED_FORWARDS),
    *(SINKS, OBJECTIVES, OPTIMIZERS, SCHEDULES, TOKENIZERS),
)
_LOGGERS = (None, "torch", "torch.distributed.elastic")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_COMPILER = (
    "ban_recompute_materialized_backward",
    "autograd_cache_allow_custom_autograd_functions",
)


def seed() -> None:
    """Let random numbers begin as in every test."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def read() -> State:
    """How the process stands."""
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "signals": {number: signal.getsignal(number) for number in _SIGNALS},
        "loggers": {name: logging.getLogger(name).level for name in _LOGGERS},
        "registered": [set(one.names()) for one in _REGISTRIES],
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "products": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "compiler": {name: getattr(functorch, name) for name in _COMPILER},
    }


def restore(before: State) -> None:
    """Let the process stand as ``read`` has found it."""
    if os.environ != before["environment"]:
        os.environ.clear()
        os.environ.update(before["environment"])
    os.chdir(before["folder"])
    for number, handler in before["signals"].items():
        if handler is not None:  # as where it was not set by Python
            signal.signal(number, handler)
    for name, level in before["loggers"].items():
        logging.getLogger(name).setLevel(level)
    for registry, names in zip(_REGISTRIES, before["registered"], strict=True):
        for name in set(registry.names()) - names:
            del registry._entries[name]
    for name in [name for name in sys.modules if name.startswith("ultrathink_plugin_")]:
        del sys.modules[name]
    torch.set_default_dtype(before["dtype"])
    if torch.get_num_threads() != before["threads"]:
        torch.set_num_threads(before["threads"])
    torch.set_float32_matmul_precision(before["products"])
    torch.set_grad_enabled(before["gradients"])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name, value in before["compiler"].items():
        setattr(functorch, name, value)
    _forget_what_was_compiled()
    _forget_what_training_set()


def _forget_what_was_compiled() -> None:
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is not None and utils.counters:
        torch._dynamo.reset()
        utils.counters.clear()


def _forget_what_training_set() -> None:
    determinism = sys.modules.get("ultrathink.training.determinism")
    if determinism is not None:
        determinism.set_deterministic(False, torch.device("cpu"))
    hardware = sys.modules.get("ultrathink.training.hardware")
    if hardware is not None:
        hardware._set_malloc(
            (hardware._M_MMAP_MAX, hardware._DEFAULT_MMAP_MAX),
            (hardware._M_TRIM_THRESHOLD, hardware._DEFAULT_TRIM),
            (hardware._M_ARENA_MAX, 0),
        )
