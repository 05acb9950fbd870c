"""Equal bits from run to run: torch's switches for it, set and put back."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ultrathink.core.errors import ConfigError

_CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_REPEATABLE = ":4096:8"  # https://docs.nvidia.com/cuda/cublas/#results-reproducibility


@dataclass(frozen=True)
class _Switches:
    """What decides between fast and repeatable kernels, for the whole process."""

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
    """Make kernels repeat their bits, or put back what was set before this made them.

    The switches belong to the process. Where they were never set from here, ``wanted=False``
    leaves them as the user has them. Raises ConfigError where CUDA was used before in a way that
    cannot be undone.
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
        # A pass over every new tensor, which matters only to code that reads what it never set.
        fill_memory=False,
        cudnn=True,
        cudnn_benchmark=False,
        cublas=_before.cublas or _CUBLAS_REPEATABLE,
    ).apply()
    if device.type == "cuda":
        _require_repeatable_products(device)


def _require_repeatable_products(device: torch.device) -> None:
    """torch reads cuBLAS's variable once in a process, at the first matrix product."""
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
