"""Section ``monitoring``: where figures go."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ultrathink.config.base import Section, one_of
from ultrathink.config.options import free
from ultrathink.core.registry import Registry

SINKS: Registry[Any] = Registry("sink")
SINKS.add("console", "ultrathink.monitoring.console:ConsoleSink")
SINKS.add("jsonl", "ultrathink.monitoring.jsonl:JsonlSink")
SINKS.add("tensorboard", "ultrathink.monitoring.tensorboard:TensorBoardSink")


class MonitoringConfig(Section):
    """Where metrics go."""

    sinks: tuple[Annotated[str, one_of(SINKS)], ...] = free(("console", "jsonl", "tensorboard"))
    """Registered sinks that get every record."""
    log_level: Literal["info", "warning", "error"] = free("info")
    """Least severe messages that the console shows, as the level of Python's logger ultrathink.
    logs/run.log has all of them."""
