"""Where figures go: metric records, and the sinks that show or keep them."""

from ultrathink.monitoring.records import Level, MetricRecord, RunInfo, Sink, Split

__all__ = ["Level", "MetricRecord", "RunInfo", "Sink", "Split"]
