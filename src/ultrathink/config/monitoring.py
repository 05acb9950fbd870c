"""Section ``monitoring``: where figures go."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator

from ultrathink.config.base import Section
from ultrathink.config.options import free
from ultrathink.core.registry import Registry

SINKS: Registry[Any] = Registry("sink")
SINKS.add("console", "ultrathink.monitoring.console:ConsoleSink")
SINKS.add("jsonl", "ultrathink.monitoring.jsonl:JsonlSink")
SINKS.add("tensorboard", "ultrathink.monitoring.tensorboard:TensorBoardSink")


class MonitoringConfig(Section):
    """Where metrics go."""

    sinks: tuple[str, ...] = free(
        ("console", "jsonl", "tensorboard"), description="Registered sinks that get every record."
    )

    @field_validator("sinks")
    @classmethod
    def _sinks_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            SINKS.entry(name)
        return names
