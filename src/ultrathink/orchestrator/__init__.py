"""Watches and steers a run: signals, detectors, phases, forecast, policy, in Python and NumPy."""
