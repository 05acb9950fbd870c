"""The trainer: one loop, and its parts."""
