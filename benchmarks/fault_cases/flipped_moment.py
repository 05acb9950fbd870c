"""The optimizer's momentum points the wrong way."""

from __future__ import annotations

from fault_injection import Fault, Moment

MOMENTA = ("exp_avg", "momentum")  # of AdamW; of Muon


class FlippedMoment(Fault):
    """The sign of every first moment is turned once, as by a wrong conversion of a checkpoint."""

    name = "flipped_moment"
    group = "gradient"

    def before_update(self, moment: Moment) -> None:
        for optimizer in moment.optimizers:
            for state in optimizer.state.values():
                for key in MOMENTA:
                    if key in state:
                        state[key].neg_()


FAULT = FlippedMoment
