"""How a batch is cut, packed or recomputed changes no loss, no statistic and no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.model.experts.mixtures import CAPACITY, FOUR, added, assert_same, mixture, trained

OPTIONS: dict[str, dict[str, Any]] = {
    "dropless": {},
    "capacity": {"routing": CAPACITY},
    "sigmoid": {"score": "sigmoid", "shared_size": 24, "routing": CAPACITY},
}


@pytest.fixture(params=OPTIONS)
def model(request: pytest.FixtureRequest, make_model: Any) -> Any:
    model = make_model(moe=mixture(FOUR, **OPTIONS[request.param]), dtype=torch.float64)
    for layer in model.expert_layers().values():
        layer.router.selection_bias.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_add_up(model: Any, batch: tuple[Tensor, Tensor], size: int) -> None:
    tokens, labels = batch
    whole = trained(model, tokens, labels)
    pieces = zip(tokens.split(size), labels.split(size), strict=True)
    assert_same(whole, added([trained(model, *piece) for piece in pieces]))
    # Nothing of it is compared in vain.
    assert whole["expert_dropped"].any() == bool(torch.isfinite(model.routing.capacity_factor))
    assert all(whole[name].any() for name in whole if name != "expert_dropped")


def documents(tokens: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Labels that reach over no end of a document, one token of each untrained."""
    labels = tokens.roll(-1, 1)
    for begin, end in spans:
        labels[:, end - 1] = -100
        labels[:, begin + 2] = -100
    return labels


def padded(values: Tensor, spans: list[tuple[int, int]], filler: int) -> Tensor:
    """Each document in a row of its own, filled up at its end."""
    rows = []
    for begin, end in spans:
        row = torch.full_like(values, filler)
        row[:, : end - begin] = values[:, begin:end]
        rows.append(row)
    return torch.cat(rows)


@pytest.mark.parametrize(("backend", "is_marked"), [("sdpa", False), ("blocks", True)])
def test_packed_documents_are_those_in_rows_of_their_own(
    model: Any, tokens: Tensor, packed: Any, backend: str, is_marked: bool
) -> None:
    """Padding is another document, if the model ``is_marked``, or the end of the only one."""
    model.set_attention_backend(backend)
    ids, positions, spans = packed
    labels = documents(tokens, spans)
    together = trained(model, tokens, labels, document_ids=ids, positions=positions)
    rows = padded(tokens, spans, 3), padded(labels, spans, -100)
    options = {"document_ids": padded(torch.zeros_like(tokens), spans, -1)} if is_marked else {}
    assert_same(together, trained(model, *rows, **options))
    # Rows that are no documents are another thing.
    mixed = trained(model, tokens, labels, positions=positions)
    assert abs(mixed["moe_load"] - together["moe_load"]) > 1e-3


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_nothing_and_draws_the_same_noise(
    model: Any, batch: tuple[Tensor, Tensor], mode: str
) -> None:
    model.routing.set("jitter", 0.3)
    model.routing.set("expert_dropout", 0.2)
    model.routing.get_buffer("warmup").fill_(0.3)
    torch.manual_seed(3)
    whole = trained(model, *batch)
    model.set_activation_checkpointing(mode)
    torch.manual_seed(3)
    assert_same(whole, trained(model, *batch), limit=0)
