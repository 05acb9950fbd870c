"""Ten steps of our trainer against a plain loop over Hugging Face's model and torch's AdamW."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.numerics.test_llama_parity import copy_weights, theirs_like
from ultrathink.config import load_config
from ultrathink.recipes.train import build_trainer

STEPS, BATCH, LENGTH = 10, 4, 32


def test_training_follows_a_plain_loop_over_hugging_face(tmp_path: Path) -> None:
    config = load_config(
        "debug",
        [
            f"run.dir={tmp_path}",
            f"training.max_steps={STEPS}",
            f"training.batch_size={BATCH}",
            "training.micro_batch_size=2",
            f"data.seq_len={LENGTH}",
            "data.packing.isolate_documents=false",
            "training.optimizer={type: adamw, lr: 0.003, weight_decay: 0.1}",
            "training.schedule={type: cosine, warmup: 3, min_ratio: 0.1}",
            "training.clip=0.5",
            "training.log_every=1",
            "training.sample.prompts=[]",
            "monitoring.sinks=[jsonl]",
        ],
    )
    trainer = build_trainer(config)
    torch.manual_seed(0)
    theirs = theirs_like(trainer.model.config)
    copy_weights(theirs, trainer.model)

    cursor = trainer.loader.state_dict()
    batches = [trainer.loader.next_batch() for _ in range(STEPS)]
    trainer.loader.load_state_dict(cursor)
    trainer.fit()
    lines = (trainer.run.path / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "train"]

    decayed = [p for p in theirs.parameters() if p.ndim >= 2]
    others = [p for p in theirs.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for batch, row in zip(batches, rows, strict=True):
        logits = theirs(batch.input_ids).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        assert row["loss"] == pytest.approx(loss.item(), rel=2e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=2e-4)
        for group in optimizer.param_groups:
            group["lr"] = row["lr"]
        optimizer.step()
        optimizer.zero_grad()
