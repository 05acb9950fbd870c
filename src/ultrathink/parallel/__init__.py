"""Runs of several processes: their groups, and how they share the model."""
