"""Metric records, and the sinks that show or store them."""

from ultrathink.monitoring.records import Level, MetricRecord, RunInfo, Sink, Split

__all__ = ["Level", "MetricRecord", "RunInfo", "Sink", "Split"]
