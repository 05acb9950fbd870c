"""Decoding prompts of different lengths in one batch, against ``transformers`` and its cache.

Theirs pads on the left and masks; ours pads on the right and counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.numerics.test_llama_parity import build_pair, make_tokens
from tests.numerics.test_mixtral_parity import OUR_KERNELS, make_ours
from tests.unit.interop.checkpoints import make_ids, save_theirs
from ultrathink.model.transformer import Transformer

LENGTHS = [11, 3]
NEW = 12


@torch.no_grad()
def theirs_step_by_step(theirs: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Their greedy tokens ``[B, NEW]`` and the logits ``[B, NEW, V]`` they were taken from."""
    width = max(LENGTHS)
    padded = torch.zeros(2, width, dtype=torch.int64)
    mask = torch.zeros(2, width, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        padded[row, width - length :] = ids[row, :length]
        mask[row, width - length :] = 1
    out = theirs.generate(
        padded,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, width:], torch.stack(out.logits, 1)


@torch.no_grad()
def ours_step_by_step(ours: Transformer, ids: Tensor) -> tuple[Tensor, Tensor]:
    cache = ours.new_cache(2, max(LENGTHS) + NEW)
    unread, lengths = ids[:, : max(LENGTHS)], LENGTHS
    tokens, steps = [], []
    for _ in range(NEW):
        logits = ours(unread, lengths=lengths, cache=cache, last_only=True).logits
        assert logits is not None
        steps.append(logits[:, 0])
        unread, lengths = logits.argmax(-1), [1, 1]
        tokens.append(unread[:, 0])
    return torch.stack(tokens, 1), torch.stack(steps, 1)


@pytest.mark.parametrize("family", ["llama", "qwen3", *OUR_KERNELS])
def test_a_batch_of_different_lengths_decodes_as_theirs(tmp_path: Path, family: str) -> None:
    if family in OUR_KERNELS:  # of a mixtral, one token at a time reads the chosen experts only
        theirs, ids = save_theirs(tmp_path, "mixtral"), make_ids(16)
        ours = make_ours(tmp_path, family)
    else:
        theirs, ours = build_pair(num_kv_heads=2, qk_norm=family == "qwen3")
        ids = make_tokens(16)
    expected, expected_logits = theirs_step_by_step(theirs, ids)
    tokens, logits = ours_step_by_step(ours, ids)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
