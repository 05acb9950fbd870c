"""Checkpoints: their format, the snapshots in them, and the thread that writes them."""
