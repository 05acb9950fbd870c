"""Validation of a language model: loss, perplexity and bits per byte of held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ultrathink.data.validation import ValidationSet
from ultrathink.parallel.world import ALONE, Group


@dataclass(frozen=True)
class Scores:
    """The scores of a model on held-out text."""

    loss: float  # nats per token
    num_tokens: int
    figures: Mapping[str, float] = field(default_factory=dict)  # other scores, by name
    batch_losses: Sequence[float] = ()  # nats per token of each batch, in order

    def __getitem__(self, name: str) -> float:
        return self.loss if name == "loss" else self.figures[name]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    held_out: ValidationSet,
    *,
    device: torch.device,
    batch_size: int,
    max_tokens: int | None = None,
    max_batches: int | None = None,
    dp_group: Group = ALONE,
    paths: Sequence[str] = (),
) -> Scores:
    """Score ``model`` on ``held_out``; its train or eval mode is restored.

    Bits per byte = mean nats per token x tokens / UTF-8 bytes / ln 2, which is comparable between
    tokenizers. ``max_batches`` ends early, for timing. With several processes each scores its share
    of every batch, and all return the sums. The loss on each of ``paths`` is a figure of its own,
    ``loss/<path>``.
    """
    was_training = model.training
    model.eval()
    correct = 0.0
    on_paths = dict.fromkeys(paths, 0.0)
    batches: list[float] = []  # loss and tokens of each, alternating
    try:
        for number, batch in enumerate(held_out.batches(batch_size, max_tokens)):
            if max_batches is not None and number >= max_batches:
                break
            share = batch.share(dp_group.rank, dp_group.size)
            input_ids, labels = share.on(device, "input_ids", "labels")
            output = model(input_ids, labels=labels)
            correct += int(output.stats["num_correct"])
            batches += (float(output.loss), float(output.num_tokens))
            for path in on_paths:
                on_paths[path] += float(model(input_ids, labels=labels, path=path).loss)
    finally:
        model.train(was_training)
    sums = dp_group.sums([correct, *on_paths.values(), *batches])
    (correct, *path_losses), batches = sums[: 1 + len(on_paths)], sums[1 + len(on_paths) :]
    losses, counts = batches[::2], batches[1::2]
    num_scored = sum(counts)
    mean = sum(losses) / max(1, num_scored)
    num_tokens, num_bytes = held_out.extent(max_tokens)
    return Scores(
        loss=mean,
        num_tokens=int(num_scored),
        figures={
            "bits_per_byte": mean * num_tokens / num_bytes / math.log(2),
            "ppl": math.exp(min(mean, 700.0)),
            "token_accuracy": correct / max(1, num_scored),
            **{
                f"loss/{path}": loss / max(1, num_scored)
                for path, loss in zip(on_paths, path_losses, strict=True)
            },
        },
        batch_losses=[loss / max(1, count) for loss, count in zip(losses, counts, strict=True)],
    )
