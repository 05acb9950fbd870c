"""Where documents come from; ``config.data`` registers each source by name."""
