"""Bit-identical runs: sets and restores torch's switches for determinism."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ultrathink.core.errors import ConfigError

_CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_REPEATABLE = ":4096:8"  # https://docs.nvidia.com/cuda/cublas/#results-reproducibility


@dataclass(frozen=True)
class _Switches:
    """The switches between fast and deterministic kernels, for the whole process."""

    algorithms: bool
    warn_only: bool
    inductor: bool
    fill_memory: bool
    cudnn: bool
    cudnn_benchmark: bool
    cublas: str | None

    @classmethod
    def read(cls) -> _Switches:
        import torch._inductor.config as inductor

        return cls(
            algorithms=torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            inductor=inductor.deterministic,
            fill_memory=torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            cudnn=torch.backends.cudnn.deterministic,
            cudnn_benchmark=torch.backends.cudnn.benchmark,
            cublas=os.environ.get(_CUBLAS_VARIABLE),
        )

    def apply(self) -> None:
        import torch._inductor.config as inductor

        torch.use_deterministic_algorithms(self.algorithms, warn_only=self.warn_only)
        inductor.deterministic = self.inductor
        torch.utils.deterministic.fill_uninitialized_memory = self.fill_memory  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic = self.cudnn
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        if self.cublas is None:
            os.environ.pop(_CUBLAS_VARIABLE, None)
        else:
            os.environ[_CUBLAS_VARIABLE] = self.cublas


_before: _Switches | None = None


def set_deterministic(wanted: bool, device: torch.device) -> None:
    """Make kernels deterministic, or restore the switches as they were before this did.

    The switches belong to the process. If this function never set them, ``wanted=False`` leaves
    them as they are. Raises ConfigError if CUDA was already used in a way that cannot be undone.
    """
    global _before
    if not wanted:
        if _before is not None:
            _before.apply()
            _before = None
        return
    if _before is None:
        _before = _Switches.read()
    _Switches(
        algorithms=True,
        warn_only=False,
        inductor=True,
        # It costs a pass over every new tensor, and only helps code that reads uninitialized ones.
        fill_memory=False,
        cudnn=True,
        cudnn_benchmark=False,
        cublas=_before.cublas or _CUBLAS_REPEATABLE,
    ).apply()
    if device.type == "cuda":
        _require_repeatable_products(device)


def _require_repeatable_products(device: torch.device) -> None:
    """ConfigError if cuBLAS's variable is wrong: torch reads it once, at the first product."""
    one = torch.ones(1, 1, device=device)
    try:
        torch.mm(one, one)
    except RuntimeError:
        value = os.environ[_CUBLAS_VARIABLE]
        set_deterministic(False, device)
        raise ConfigError(
            f"training.deterministic = true: {_CUBLAS_VARIABLE} is {value!r}, or was not set when "
            f"this process first used the GPU; start it with {_CUBLAS_VARIABLE}="
            f"{_CUBLAS_REPEATABLE}."
        ) from None
