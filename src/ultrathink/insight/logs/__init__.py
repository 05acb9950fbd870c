"""Anybody's training logs, read as signals: one small file per kind of log."""
