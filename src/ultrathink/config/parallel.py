"""Section ``parallel``: how a run is spread over processes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from ultrathink.config.base import Section, off_means
from ultrathink.config.options import free

_NOT_BUILT = {"cp": "context", "tp": "tensor", "pp": "pipeline", "ep": "expert"}


class ParallelConfig(Section):
    """How a run is spread over processes; one process ignores it.

    ``dp_replicate`` x ``dp_shard`` is the number of processes; the other degrees are not built yet
    and refused above 1. What ``zero_stage`` shards is that of ZeRO
    (https://arxiv.org/abs/1910.02054), by FSDP2.
    """

    dp_replicate: int = free(1, gt=0)
    """Copies of the model; each has dp_shard processes that share it."""
    dp_shard: int = free(-1)
    """Processes that share one copy of the model; -1: as many as dp_replicate leaves."""
    cp: int = free(1, gt=0)
    """Processes that share each sequence; 1 so far."""
    tp: int = free(1, gt=0)
    """Processes that share each matrix product; 1 so far."""
    pp: int = free(1, gt=0)
    """Processes that share the layers; 1 so far."""
    ep: int = free(1, gt=0)
    """Processes that share the experts; 1 so far."""
    zero_stage: Literal[1, 2, 3] = free(3)
    """What the processes of one copy divide among them: optimizer state (1), also gradients (2),
    also parameters (3). More takes less memory and more communication."""
    offload: Annotated[Literal["none", "optimizer", "params"], off_means("none")] = free("none")
    """What is kept in host memory instead of GPU memory: the optimizer's state, or the parameters
    with it."""
    engine: Literal["native"] = free("native")
    """native: PyTorch's FSDP2."""
    hang_minutes: float = free(10.0, gt=0)
    """Minutes without a step after which one of several processes writes its stack to logs/ and
    ends, so that the launcher restarts all; the first step has ten times as long."""

    @model_validator(mode="after")
    def _degrees_are_built(self) -> ParallelConfig:
        if self.dp_shard < -1 or self.dp_shard == 0:
            raise ValueError(
                f"dp_shard is {self.dp_shard}; give the number of processes that share one copy "
                f"of the model, or -1 for as many as there are"
            )
        for name, kind in _NOT_BUILT.items():
            degree = getattr(self, name)
            if degree > 1:
                raise ValueError(
                    f"{name} is {degree}, but {kind} parallelism is not built yet; set {name}=1 "
                    f"and divide the model with dp_shard"
                )
        return self
