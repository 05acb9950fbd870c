"""ULTRATHINK: train a language model from one YAML file.

from ultrathink import load_config, build_model, build_trainer, load_model
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultrathink.config import Config, load_config
    from ultrathink.recipes.parts.assembly import build_model
    from ultrathink.recipes.parts.steering import orchestrator_of
    from ultrathink.recipes.resume import resume_trainer
    from ultrathink.recipes.train import build_trainer
    from ultrathink.runs.loading import load_model

__version__ = "0.1.0"
__all__ = [
    "Config",
    "build_model",
    "build_trainer",
    "load_config",
    "load_model",
    "orchestrator_of",
    "resume_trainer",
]

# Imported on first use: `import ultrathink` must not pay for torch.
_HOMES = {
    "Config": "ultrathink.config",
    "load_config": "ultrathink.config",
    "build_model": "ultrathink.recipes.parts.assembly",
    "build_trainer": "ultrathink.recipes.train",
    "resume_trainer": "ultrathink.recipes.resume",
    "orchestrator_of": "ultrathink.recipes.parts.steering",
    "load_model": "ultrathink.runs.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ultrathink' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
