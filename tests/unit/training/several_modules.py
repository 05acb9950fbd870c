"""Objectives that train more than one module: a model beside those that predict its losses, and two
that teach each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ultrathink.config.model import ModelConfig
from ultrathink.config.objective import OBJECTIVES, ObjectiveConfig
from ultrathink.data.batch import IGNORED, Batch
from ultrathink.model.token_losses import linear_kl, linear_log_probabilities
from ultrathink.model.transformer import Transformer
from ultrathink.training.model_set import MAIN, TrainedModule
from ultrathink.training.objectives.base import LOSS, Losses, Parts, Term
from ultrathink.training.objectives.pretrain import Pretraining, Sums

VALUE_LR, VALUE_DECAY, PEER_LR = 3.0, 0.05, 0.5


class CriticConfig(ObjectiveConfig):
    """Options of ``Critic``."""

    type: Literal["critic"] = "critic"


class Judge(nn.Module):
    """A Transformer with a head of its own: a number for each token, ``[B*T, 1]``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.body = Transformer(config)
        self.head = nn.Linear(config.hidden_size, 1)

    def forward(self, input_ids: Tensor, positions: Any, document_ids: Any) -> Tensor:
        output = self.body(
            input_ids,
            positions=positions,
            document_ids=document_ids,
            head=lambda x, *_: {"states": x},
        )
        # Flat, so that the last product is no view, of which FSDP warns where a module returns it.
        numbers: Tensor = self.head(output.head["states"].flatten(0, 1))
        return numbers


class Critic(Pretraining):
    """Beside the cross-entropy, a head on the model's states predicts each token's own, and so does
    a model of its own."""

    def __init__(self, config: CriticConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.sums = parts.compilation.of_pass(self.summed_losses)

    @classmethod
    def modules(cls, config: Any, model: Transformer) -> dict[str, TrainedModule]:
        width = model.config.hidden_size
        head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        judge = Judge(model.config.model_copy(update={"num_layers": 1}))
        return {
            "value": TrainedModule(head, lr_factor=VALUE_LR, weight_decay=VALUE_DECAY),
            "judge": TrainedModule(judge),
        }

    def summed_losses(
        self, input_ids: Tensor, labels: Tensor, positions: Any, document_ids: Any
    ) -> Sums:
        def head(x: Tensor, weight: Tensor, *_: Any) -> dict[str, Tensor]:
            targets = labels.flatten()
            loss = self.model.head_loss(x, targets).loss
            assert loss is not None
            each = linear_log_probabilities(x.flatten(0, 1), weight, targets)
            return {LOSS: loss, "states": x, "each": each.detach()}

        output = self.model(
            input_ids, labels=labels, positions=positions, document_ids=document_ids, head=head
        )
        modules = self.models.modules
        numbers = {
            "value": modules["value"](output.head["states"].flatten(0, 1)),
            "judge": modules["judge"](input_ids, positions, document_ids),
        }
        trained, errors = labels.flatten() != IGNORED, {}
        for name, predicted in numbers.items():
            squares = (predicted[:, 0] + output.head["each"]).square()
            errors[name] = torch.where(trained, squares, 0.0).sum()
        return Sums(output.head[LOSS], errors, output.stats)


class MutualConfig(ObjectiveConfig):
    """Options of ``Mutual``."""

    type: Literal["mutual"] = "mutual"
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"


class Mutual(Pretraining):
    """Deep mutual learning (https://arxiv.org/abs/1706.00384): two models, each the other's
    teacher."""

    def __init__(self, config: MutualConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.passes = {
            name: parts.compilation.of_pass(pass_of(module))
            for name, module in self.models.modules.items()
        }

    @classmethod
    def modules(cls, config: Any, model: Transformer) -> dict[str, TrainedModule]:
        peer = Transformer(model.config.model_copy(update={"num_layers": 1}))
        return {"peer": TrainedModule(peer, lr_factor=PEER_LR, precision=config.precision)}

    def losses(self, batch: Batch) -> Losses:
        inputs = self.inputs(batch)
        with torch.no_grad():
            of_main = self.passes[MAIN](*inputs, None, None)
        of_peer = self.passes["peer"](*inputs, of_main["states"], of_main["weight"])
        of_main = self.passes[MAIN](*inputs, of_peer["states"], of_peer["weight"])
        terms = {
            LOSS: of_main[LOSS],
            "kl": of_main["kl"],
            "peer": of_peer[LOSS],
            "peer_kl": of_peer["kl"],
        }
        return Losses({name: Term(value) for name, value in terms.items()}, {})


def pass_of(model: Any) -> Any:
    """From token ids and another model's states and head to losses, and its own of these."""

    def run(
        input_ids: Tensor,
        labels: Tensor,
        positions: Any,
        document_ids: Any,
        states: Tensor | None,
        weight: Tensor | None,
    ) -> Mapping[str, Tensor]:
        def head(x: Tensor, own_weight: Tensor, *_: Any) -> dict[str, Tensor]:
            targets = labels.flatten()
            loss = model.head_loss(x, targets).loss
            found = {
                LOSS: loss,
                "states": x.detach().clone(),
                "weight": own_weight.detach().clone(),
            }
            if states is not None and weight is not None:
                hidden, theirs = x.flatten(0, 1), states.flatten(0, 1)
                found["kl"] = linear_kl(hidden, own_weight, targets, theirs, weight)
            return found

        output = model(
            input_ids, labels=labels, positions=positions, document_ids=document_ids, head=head
        )
        found: Mapping[str, Tensor] = output.head
        return found

    return run


@contextmanager
def registered() -> Iterator[None]:
    """Let a configuration name these objectives for as long as this lasts."""
    OBJECTIVES.add("critic", Critic, options=CriticConfig)
    OBJECTIVES.add("mutual", Mutual, options=MutualConfig)
    try:
        yield
    finally:
        del OBJECTIVES._entries["critic"], OBJECTIVES._entries["mutual"]
