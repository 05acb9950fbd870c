"""No controller: the bare trainer, which leaves out steps that are not finite."""

from __future__ import annotations


class NoController:
    """Does nothing."""


CONTROLLER = NoController
