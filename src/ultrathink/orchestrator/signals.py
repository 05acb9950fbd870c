"""The figures of a step: numbers under standard names, for logs of any origin.

========================  =====================================================================
``loss``                  training loss, nats (mean over the step's tokens)
``val_loss``              validation loss
``loss/<source>``         training loss of one source; ``val_loss/<source>`` likewise
``accuracy``              training accuracy, 0 to 1; ``val_accuracy`` likewise
``grad_norm``             norm of the whole gradient before clipping
``lr``                    learning rate; ``lr_scheduled`` is that of the schedule
``step_time``             seconds per step
``data_wait``             seconds that a step waits for its batch
``tokens_per_sec``        speed; samples per second if a log has no tokens
``memory``                memory in use, GiB; ``memory_reserved``, ``memory_peak``,
                          ``memory_limit`` likewise
``skipped_steps``         number of skipped steps so far
``nan_steps``             steps so far whose loss was NaN, where a log only counts them
``loss_scale``            factor of an fp16 loss
``update_ratio``          norm of the update over norm of the weights
``grad_norm/<layer>``     norm of the gradient of one layer
``eval/<name>/<f>``       figures of an evaluator (``training.evaluators``)
``experts/<group>/<f>``   figures of a group of experts, as in ``experts.jsonl``: the mean over its
                          layers, or the worst of them (docs/watching.md)
``depth/<layer>/<f>``     figures of a layer with depth routing (docs/elastic.md)
========================  =====================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

SMALL = 0.01  # nats: smaller losses need not be distinguished from zero


@dataclass(frozen=True)
class Signals:
    """The figures of one step, by name; those that a log lacks are absent.

    Logged values of NaN and infinity stay in ``values``.
    """

    step: int
    values: Mapping[str, float] = field(default_factory=dict)

    def finite(self, name: str) -> float | None:
        """The value of ``name``; None if it is absent or not finite."""
        value = self.values.get(name)
        return value if value is not None and math.isfinite(value) else None

    def having(self, prefix: str) -> dict[str, float]:
        """All finite values whose names start with ``prefix``, which is removed."""
        return {
            name.removeprefix(prefix): value
            for name, value in self.values.items()
            if name.startswith(prefix) and math.isfinite(value)
        }
