"""Every option of the system, one file a section, readable without torch."""

from ultrathink.config.loading import load_config, preset_names
from ultrathink.config.schema import Config

__all__ = ["Config", "load_config", "preset_names"]
