"""Routers that send every token to one expert of each group."""

from __future__ import annotations

import torch
from fault_injection import Fault, Moment
from torch import Tensor

from ultrathink.data.batch import Batch
from ultrathink.model.experts.router import Router

PUSH = 30.0  # by what the logit of the chosen expert rises, for all tokens alike


class RouterCollapse(Fault):
    """The weights of the first expert of each group are pushed to where all tokens lie.

    The direction is that of least squares, in which the product with every token of the batch is
    as near to one as can be.
    """

    name = "router_collapse"
    group = "experts"
    model = "moe"

    @torch.no_grad()
    def on_batch(self, batch: Batch, moment: Moment) -> Batch:
        routers = [layer.router for layer in moment.model.expert_layers().values()]
        for router in routers:  # one after the other: what a layer reads depends on those before
            tokens = _tokens_read(moment, router, batch)
            ones = torch.ones(len(tokens), 1)
            direction = torch.linalg.lstsq(tokens, ones).solution[:, 0]
            for _, slots in router.groups():
                router.weight[slots.start] += PUSH * direction
        return batch


def _tokens_read(moment: Moment, router: Router, batch: Batch) -> Tensor:
    """What ``router`` reads of the batch, ``[tokens, C]``."""
    read: list[Tensor] = []
    hook = router.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        moment.model(batch.input_ids, positions=batch.positions)
    finally:
        hook.remove()
    return read[0].flatten(0, 1)


FAULT = RouterCollapse
