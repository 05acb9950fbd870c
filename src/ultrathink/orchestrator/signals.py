"""What is known of a step: plain numbers under standard names, wherever the log came from.

========================  =====================================================================
``loss``                  training loss, nats (mean over the step's tokens)
``val_loss``              validation loss
``loss/<source>``         training loss of one source; ``val_loss/<source>`` likewise
``accuracy``              training accuracy, 0 to 1; ``val_accuracy`` likewise
``grad_norm``             norm of the whole gradient before clipping
``lr``                    learning rate; ``lr_scheduled`` is the one that the schedule asks for
``step_time``             seconds a step
``data_wait``             seconds a step waits for its batch
``tokens_per_sec``        speed; samples a second where a log has no tokens
``memory``                memory in use, GiB; ``memory_reserved``, ``memory_peak``,
                          ``memory_limit`` likewise
``skipped_steps``         steps that were left out so far
``nan_steps``             steps so far whose loss was NaN, where a log only counts them
``loss_scale``            by which an fp16 loss is multiplied
``update_ratio``          norm of the update over norm of the weights
``grad_norm/<layer>``     norm of the gradient of one layer
``eval/<name>/<f>``       figures of an evaluator (``training.evaluators``)
``experts/<group>/<f>``   figures of a group of experts, as in ``experts.jsonl``: the mean over its
                          layers, or the worst of them (docs/watching.md)
========================  =====================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

SMALL = 0.01  # nats: what a loss of zero and one of this differ by is no matter


@dataclass(frozen=True)
class Signals:
    """The figures of one step, by name; what a log does not tell is absent.

    A value that was logged and is no number (NaN, infinity) stays in ``values`` as such.
    """

    step: int
    values: Mapping[str, float] = field(default_factory=dict)

    def finite(self, name: str) -> float | None:
        """The value called ``name``; None where it is absent or not finite."""
        value = self.values.get(name)
        return value if value is not None and math.isfinite(value) else None

    def having(self, prefix: str) -> dict[str, float]:
        """All finite values whose names begin with ``prefix``, without it."""
        return {
            name.removeprefix(prefix): value
            for name, value in self.values.items()
            if name.startswith(prefix) and math.isfinite(value)
        }
