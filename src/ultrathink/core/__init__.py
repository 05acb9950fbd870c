"""The foundation of all packages: errors, registries, durations, files, random state."""
