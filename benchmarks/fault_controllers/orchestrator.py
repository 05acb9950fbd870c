"""Ours: the orchestrator, with the options that a run has without naming any."""

from __future__ import annotations


class Orchestrator:
    """What it does is built into the trainer; here it is only switched on."""

    overrides = ("orchestrator.mode=act",)


CONTROLLER = Orchestrator
