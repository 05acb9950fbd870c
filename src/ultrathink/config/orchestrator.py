"""Section ``orchestrator``: who watches the run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ultrathink.config.base import Section

Mode = Literal["off", "advise"]


class OrchestratorConfig(Section):
    """Watching the run while it trains."""

    mode: Mode = Field(
        "advise",
        description="advise: detectors watch every step, tell of what goes wrong and keep it in "
        "events.jsonl, and change nothing; off: nobody watches.",
    )

    @field_validator("mode", mode="before")
    @classmethod
    def _false_is_off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare `off` as false
