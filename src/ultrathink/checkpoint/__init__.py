"""Checkpoints: their format, and the snapshots in them."""
