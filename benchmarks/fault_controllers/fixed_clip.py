"""The gradient norm is clipped at 1, as almost everybody does."""

from __future__ import annotations

from ultrathink.training.stepping import Verdict

LIMIT = 1.0


class FixedClip:
    """Clips the norm of the whole gradient at a fixed limit."""

    def judge(self, step_loss: float, grad_norm: float) -> Verdict:
        return Verdict(clip=LIMIT)


CONTROLLER = FixedClip
