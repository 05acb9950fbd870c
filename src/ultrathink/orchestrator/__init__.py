"""Watching a run: signals, detectors, phases and a forecast, in plain Python and NumPy."""
