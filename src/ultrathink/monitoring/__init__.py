"""Where figures go: metric records, and the sinks that show or keep them."""

from ultrathink.monitoring.records import BaseSink, Level, MetricRecord, RunInfo, Sink, Split

__all__ = ["BaseSink", "Level", "MetricRecord", "RunInfo", "Sink", "Split"]
