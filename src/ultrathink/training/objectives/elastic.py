"""Elastic pretraining: one model that predicts the next token on each of its compute paths.

The loss of every step is that of the whole model. Beside it each step trains one exit, on the same
pass (https://arxiv.org/abs/2404.16710), and runs a few sequences again on one path that does not
begin the whole model. Both learn from labels and from the whole model's own distribution.

Shapes: B sequences of a micro-batch, T tokens, L layers, C hidden size, V vocabulary, S tokens of a
sequence that an exit is trained on, R sequences that run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultrathink.config.objective import ElasticConfig
from ultrathink.core.errors import ConfigError
from ultrathink.core.random import step_seed
from ultrathink.data.batch import FLOAT32, INT64, Batch
from ultrathink.data.packing import IGNORED
from ultrathink.model.compute_path import ComputePath, path_of
from ultrathink.model.loss import linear_cross_entropy
from ultrathink.model.output import ModelOutput
from ultrathink.model.thinning import Thinning, layer_dropout
from ultrathink.model.token_losses import linear_soft_cross_entropy
from ultrathink.model.transformer import Transformer
from ultrathink.training.objectives.base import LOSS, TOKENS, WEIGHTS, Losses, Parts, Term
from ultrathink.training.objectives.pretrain import Pretraining

EXIT, SUB_PATH = "exit", "sub_path"  # terms, and the counts that divide them
BOOL = {"dtype": torch.bool}


@dataclass(frozen=True)
class ElasticBatch(Batch):
    """A batch, and what of it the exit and the sub-path of its step are trained on."""

    exit_tokens: Tensor | None = field(default=None, metadata=INT64)
    """``[B, S]``: positions, ascending."""
    runs_again: Tensor | None = field(default=None, metadata=BOOL)
    """``[B]``."""
    keep: Tensor | None = field(default=None, metadata=BOOL)
    """``[B, L]``, as ``Thinning.keep``."""
    width: Tensor | None = field(default=None, metadata=FLOAT32)
    """``[B, L]``, as ``Thinning.width``."""
    exit_layer: int = 0
    sub_path: str = ""


class Sums(NamedTuple):
    """The results of the pass of the whole model, summed over trained tokens."""

    loss: Tensor
    exit: Tensor | None
    states: Tensor | None  # normalized, [B, T, C], without gradient
    aux_losses: dict[str, Tensor]
    stats: dict[str, Tensor]


class Elastic(Pretraining):
    """Cross-entropy of the next token, on the whole model and on its other paths.

    Exit and sub-path of a step, tokens and sequences are a function of the seed, the step and the
    index of a sample, so that micro-batches and processes agree.
    """

    def __init__(self, config: ElasticConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.config, self.seed = config, parts.seed
        self.exits = self.model.config.exit_layers if config.exits is not None else ()
        self.paths = self._sub_paths() if config.sub_paths is not None else {}
        if not self.exits and not self.paths:
            raise ConfigError(
                "training.objective = elastic has nothing to train beside the whole model: it has "
                "no exit, and no path in sub_paths; name some (model.exits.layers, model.paths), "
                "or use training.objective=pretrain."
            )
        self.scored_paths = parts.scored_paths or (*self._exit_names(), *self.paths)
        # Tensors, so that other values do not recompile the step.
        self.distill = torch.tensor(config.distill, device=parts.device)
        self.weights = {EXIT: torch.zeros((), device=parts.device)}
        self.weights[SUB_PATH] = self.weights[EXIT].clone()
        of_pass = parts.compilation.of_pass
        is_taught = bool(config.distill)
        returns_states = is_taught and bool(self.paths)
        self.whole = of_pass(whole_pass(self.model, self.exits, is_taught, returns_states))
        self.again = of_pass(again_pass(self.model))
        self.trained_norms: set[str] = set()  # the exits whose own norm this step trains

    def before_step(self, step: int) -> None:
        super().before_step(step)
        for name, part in ((EXIT, self.config.exits), (SUB_PATH, self.config.sub_paths)):
            if part is not None:
                share = min(1.0, step / part.ramp_steps) if part.ramp_steps else 1.0
                self.weights[name].fill_(part.weight * share)

    def prepare(self, batch: Batch, step: int) -> ElasticBatch:
        """Choose the exit and the sub-path of ``step``, by rotation, and their tokens."""
        plain = {each.name: getattr(batch, each.name) for each in fields(batch)}
        samples = batch.sample_ids.tolist()
        drawn = [
            torch.Generator().manual_seed(step_seed(self.seed, step, *divmod(sample, 2**32)))
            for sample in samples
        ]
        chosen: dict[str, Any] = {}
        if self.config.exits is not None and self.exits:
            count = math.ceil(self.config.exits.share * batch.seq_len)
            orders = [torch.randperm(batch.seq_len, generator=one)[:count] for one in drawn]
            chosen["exit_tokens"] = torch.stack(orders).sort(1).values
            chosen["exit_layer"] = self.exits[step % len(self.exits)]
        sub_paths = self.config.sub_paths
        if sub_paths is not None and self.paths:
            chosen["sub_path"] = list(self.paths)[step % len(self.paths)]
            rate = _rate(sub_paths.rows)
            # Evenly spaced, so that a micro-batch has at most its share, rounded up.
            chosen["runs_again"] = torch.tensor(
                [sample * rate.numerator % rate.denominator < rate.numerator for sample in samples]
            )
            if sub_paths.layer_dropout or sub_paths.sample_top_k:
                number = self.model.config.num_layers
                uniform = torch.stack([torch.rand(2, number, generator=one) for one in drawn])
                maximum = sub_paths.layer_dropout
                limits = [layer_dropout(layer, number, maximum) for layer in range(number)]
                chosen["keep"] = uniform[:, 0] >= torch.tensor(limits)
                widths = 1 - uniform[:, 1]  # above 0
                chosen["width"] = widths if sub_paths.sample_top_k else torch.ones_like(widths)
        self.trained_norms = self._norms_trained_by(chosen)
        return ElasticBatch(**plain, **chosen)

    def counts(self, batch: Batch) -> dict[str, float]:
        assert isinstance(batch, ElasticBatch), "prepare() has made it"
        counts, weights = super().counts(batch), batch.loss_weights
        if batch.exit_tokens is not None:
            of_tokens = None if weights is None else weights.gather(1, batch.exit_tokens)
            counts[EXIT] = _total(batch.targets.gather(1, batch.exit_tokens), of_tokens)
        if batch.runs_again is not None:
            rows = batch.runs_again
            counts[SUB_PATH] = _total(
                batch.targets[rows], None if weights is None else weights[rows]
            )
        return counts

    def losses(self, batch: Batch) -> Losses:
        assert isinstance(batch, ElasticBatch), "prepare() has made it"
        inputs, weights = self.inputs(batch), self.loss_weights(batch)
        own = weights[0] if weights else None
        exit_tokens = exit_layer = None
        if batch.exit_tokens is not None:
            (exit_tokens,) = batch.on(self.device, "exit_tokens")
            exit_layer = torch.tensor(batch.exit_layer, device=self.device)
        targets = self.group_targets.options(batch)
        sums = self.whole(*inputs, own, exit_tokens, exit_layer, self.distill, **targets)
        terms = {LOSS: Term(sums.loss, per=WEIGHTS if weights else TOKENS)}
        terms |= {name: Term(value) for name, value in sums.aux_losses.items()}
        if sums.exit is not None:
            depth = (batch.exit_layer + 1) / self.model.config.num_layers
            terms[EXIT] = Term(sums.exit, self.weights[EXIT] * depth, EXIT)
        if batch.runs_again is not None:
            again = self._run_again(batch, inputs, own, sums.states)
            terms[SUB_PATH] = Term(again, self.weights[SUB_PATH], SUB_PATH)
        return Losses(terms, sums.stats)

    def before_update(self) -> None:
        """Leave the norms of exits alone that the step did not train: their gradient is zero."""
        for name, parameter in self.model.exit_norms.named_parameters():
            if name.partition(".")[0] not in self.trained_norms:
                parameter.grad = None

    def _norms_trained_by(self, chosen: dict[str, Any]) -> set[str]:
        number, found = self.model.config.num_layers, set()
        if "exit_layer" in chosen:
            found.add(str(chosen["exit_layer"]))
        if "sub_path" in chosen:
            found.add(str(self.paths[chosen["sub_path"]].indices(number)[-1]))
        return found

    def _run_again(
        self,
        batch: ElasticBatch,
        inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        weights: Tensor | None,
        states: Tensor | None,
    ) -> Tensor:
        """The loss of the sub-path, summed over its rows: as many in every micro-batch."""
        assert batch.runs_again is not None, "there is a sub-path"
        assert self.config.sub_paths is not None, "there is a sub-path"
        number = math.ceil(batch.num_sequences * _rate(self.config.sub_paths.rows))
        found = batch.runs_again.nonzero()[:number, 0]
        rows = torch.cat([found, found.new_zeros(number - len(found))])
        is_filler = (torch.arange(number) >= len(found)).to(self.device)[:, None]
        chosen = rows.to(self.device)
        ids, labels = inputs[0][chosen], inputs[1][chosen]
        isolated = [None if each is None else each[chosen] for each in inputs[2:]]
        labels = torch.where(is_filler, IGNORED, labels)
        thinning = None
        if batch.keep is not None:
            thinning = Thinning(*(each[chosen] for each in batch.on(self.device, "keep", "width")))
        of_rows = [None if each is None else each[chosen] for each in (weights, states)]
        path = self.paths[batch.sub_path]
        result: Tensor = self.again(ids, labels, *isolated, *of_rows, thinning, self.distill, path)
        return result

    def _sub_paths(self) -> dict[str, ComputePath]:
        """The sub-paths by name; ConfigError for one that begins the whole model, or is it."""
        assert self.config.sub_paths is not None, "they are configured"
        config, names = self.model.config, self.config.sub_paths.names
        every = {name: path_of(name, config) for name in names or config.path_names}
        whole = path_of(None, config)
        found: dict[str, ComputePath] = {}
        for name, path in every.items():
            if not path.is_prefix_of(whole, config) and path not in found.values():
                found[name] = path
            elif names is not None:
                raise ConfigError(
                    f"training.objective.sub_paths.names: path {name!r} begins the whole model, "
                    f"so its exit is trained on the same pass; leave it out here, and use "
                    f"training.objective.exits."
                )
        return found

    def _exit_names(self) -> list[str]:
        """A named path for each exit that has one."""
        named = {layers[-1]: name for name, layers in self.model.config.prefix_paths.items()}
        return [named[layer] for layer in self.exits if layer in named]


def whole_pass(
    model: Transformer, exits: tuple[int, ...], is_taught: bool, returns_states: bool
) -> Callable[..., Sums]:
    """The function from token ids to the losses of the whole model and of one of its ``exits``."""

    def summed(
        input_ids: Tensor,
        labels: Tensor,
        positions: Tensor | None,
        document_ids: Tensor | None,
        loss_weights: Tensor | None,
        exit_tokens: Tensor | None,
        exit_layer: Tensor | None,
        distill: Tensor,
        group_targets: Tensor | None = None,
    ) -> Sums:
        def head(x: Tensor, weight: Tensor, _: Any, tapped: Any) -> dict[str, Tensor]:
            weights = None if loss_weights is None else loss_weights.flatten()
            own = model.head_loss(x, labels.flatten(), weights)
            assert own.loss is not None
            found = {LOSS: own.loss, **own.aux_losses}
            if returns_states:
                found["states"] = x.detach()
            if exit_tokens is None or exit_layer is None:
                return found
            each = {layer: _at(state, exit_tokens) for layer, state in tapped.items()}
            states = model.exit_states(each, exit_layer)
            found[EXIT] = path_loss(
                states,
                weight,
                labels.gather(1, exit_tokens),
                None if loss_weights is None else loss_weights.gather(1, exit_tokens),
                _at(x.detach(), exit_tokens) if is_taught else None,
                distill,
            )
            return found

        output: ModelOutput = model(
            input_ids,
            labels=labels,
            positions=positions,
            document_ids=document_ids,
            head=head,
            tap=() if exit_tokens is None else exits,
            group_targets=group_targets,
        )
        losses = dict(output.head)
        loss, of_exit = losses.pop(LOSS), losses.pop(EXIT, None)
        states = losses.pop("states", None)
        return Sums(loss, of_exit, states, {**losses, **output.aux_losses}, output.stats)

    return summed


def again_pass(model: Transformer) -> Callable[..., Tensor]:
    """The function from token ids to a path's loss; with the whole model's states ``[R, T, C]``,
    which are normalized, it learns from them too."""

    def summed(
        input_ids: Tensor,
        labels: Tensor,
        positions: Tensor | None,
        document_ids: Tensor | None,
        loss_weights: Tensor | None,
        states: Tensor | None,
        thinning: Thinning | None,
        distill: Tensor,
        path: ComputePath,
    ) -> Tensor:
        def head(x: Tensor, weight: Tensor, *_: Any) -> dict[str, Tensor]:
            return {LOSS: path_loss(x, weight, labels, loss_weights, states, distill)}

        output: ModelOutput = model(
            input_ids,
            labels=labels,
            positions=positions,
            document_ids=document_ids,
            head=head,
            path=path,
            thinning=thinning,
        )
        return output.head[LOSS]

    return summed


def path_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None,
    whole: Tensor | None,
    distill: Tensor,
) -> Tensor:
    """The summed loss of a path at its normalized states ``x`` ``[..., C]`` with head ``[V, C]``.

    Its target is the label, or with states ``whole`` of the whole model a mixture of the label and
    ``distill`` of that model's distribution.
    """
    weights = None if loss_weights is None else loss_weights.flatten()
    if whole is None:
        sums = linear_cross_entropy(
            x.flatten(0, -2), weight, labels.flatten(), loss_weights=weights
        )
        return sums.cross_entropy
    return linear_soft_cross_entropy(
        x.flatten(0, -2),
        weight,
        labels.flatten(),
        whole.flatten(0, -2),
        weight.detach(),
        distill,
        loss_weights=weights,
    )


def _at(states: Tensor, tokens: Tensor) -> Tensor:
    """The states ``[B, S, C]`` of some ``tokens`` ``[B, S]`` of ``[B, T, C]``."""
    return states.gather(1, tokens[..., None].expand(-1, -1, states.shape[-1]))


def _total(targets: Tensor, weights: Tensor | None) -> float:
    """The number, or the summed weight, of trained targets."""
    trained = targets != IGNORED
    return float(trained.sum()) if weights is None else float(weights[trained].double().sum())


def _rate(share: float) -> Fraction:
    return Fraction(share).limit_denominator(64)
