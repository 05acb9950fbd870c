"""From a configuration to working parts: the only place where everything meets."""
