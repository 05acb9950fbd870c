"""What every other package may lean on: errors, registries, durations, files, random state."""
