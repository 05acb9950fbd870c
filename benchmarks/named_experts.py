"""Small MoE³ models trained on four sources, each the text of one expert group.

The texts are public files in a folder with the layout of ``FILES``, and the standard library. The
ways of training are: groups without weights (``plain``), with learned weights (``gates``), and with
weights that are raised on the tokens of a group's source (``targets``).

Shapes: G groups, S sources, in the same order; B windows of T tokens.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from routing_measures import choices, measures
from torch import Tensor

from ultrathink import build_trainer, load_config, load_model
from ultrathink.core.errors import UltrathinkError
from ultrathink.data.validation import ValidationSet
from ultrathink.model.compute_path import ComputePath
from ultrathink.model.transformer import Transformer

FOLDER = os.environ.get("ULTRATHINK_TEST_DATA", str(Path(__file__).parents[2] / "shared" / "data"))
FILES: Mapping[str, tuple[str, ...]] = {
    "knowledge": ("text/world192.txt", "text/wikitext2-valid.txt", "text/wikitext2-test.txt"),
    "skill": (),  # the standard library
    "meta": ("eval/gsm8k-train.jsonl",),
    "safety": ("safety/hh_harmless_test.jsonl.gz",),
}
GROUPS = tuple(FILES)
WAYS = ("plain", "gates", "targets")
# A quarter of the experts of MoE³, and as many of a token.
MOE = (
    "{groups: [{name: knowledge, num_experts: 16, top_k: 2}, {name: skill, num_experts: 8, top_k: "
    "2}, {name: meta, num_experts: 4, top_k: 1}, {name: safety, num_experts: 2, top_k: 1}], "
    "intermediate_size: 32, shared_size: 64}"
)
SHAPE = (
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.intermediate_size=128",
    f"model.moe={MOE}",
    "tokenizer.vocab_size=2048",
    "data.seq_len=128",
    "training.batch_size=16",
)
QUIET = (
    "training.eval.every_steps=null",
    "training.sample.prompts=[]",
    "monitoring.sinks=[jsonl]",
    "orchestrator.mode=off",
)


def prepare(folder: Path, to: Path) -> dict[str, dict[str, Any]]:
    """The sources by the group they belong to, as items of ``data.train``; files written to ``to``.

    A question of GSM8K and its answer are one document; of the harmless dialogues of Anthropic HH,
    in which people ask for harm and are refused, the preferred ones are taken. UltrathinkError if a
    file is missing.
    """
    for name in (name for names in FILES.values() for name in names):
        if not (folder / name).is_file():
            raise UltrathinkError(
                f"--data {folder}: {name} is not there. Four public texts are needed, and "
                f"docs/elastic.md says which; give the folder that has them."
            )
    [questions], [dialogues] = FILES["meta"], FILES["safety"]
    _write(to / "gsm8k.jsonl", _gsm8k(folder / questions))
    _write(to / "harmless.jsonl", _harmless(folder / dialogues))
    texts = [str(folder / name) for name in FILES["knowledge"]]
    return {
        "knowledge": {"type": "text", "path": texts},
        "skill": {"type": "stdlib"},
        "meta": {"type": "jsonl", "path": str(to / "gsm8k.jsonl")},
        "safety": {"type": "jsonl", "path": str(to / "harmless.jsonl")},
    }


def _gsm8k(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield f"{row['question']}\n{row['answer']}\n"


def _harmless(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["chosen"].strip() + "\n"


def _write(path: Path, texts: Iterator[str]) -> None:
    lines = (json.dumps({"text": text}) for text in texts)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def examine(
    way: str,
    sources: Mapping[str, Mapping[str, Any]],
    to: Path,
    steps: int,
    tokens: int,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """Train one model in the folder ``to``, and measure it on ``tokens`` held-out tokens of each
    source."""
    groups = {name: [name] if way == "targets" else [] for name in sources}
    mixture = [{**source, "name": name, "groups": groups[name]} for name, source in sources.items()]
    half = max(1, steps // 2)
    config = load_config(
        "demo",
        [
            f"run.dir={to}",
            f"data.train={json.dumps(mixture)}",
            *(*SHAPE, *QUIET),
            f"training.checkpoint={{every_steps: {half}, every_minutes: null, keep: 4}}",
            f"training.max_steps={steps}",
            f"model.moe.group_gates={json.dumps(way != 'plain')}",
            *overrides,
        ],
    )
    trainer = build_trainer(config)
    trainer.fit()
    model = trainer.model.eval()
    earlier, _ = load_model(trainer.run.path, half)
    held_out = Windows(trainer.objective.held_out, tokens)
    router = next(iter(model.expert_layers().values())).router
    slots = {group.name: (where, group.top_k) for group, where in router.groups()}
    batches = [ids for batches in held_out.of for ids, _ in batches]
    of_tokens = [
        np.full(ids.numel(), number)
        for number, batches in enumerate(held_out.of)
        for ids, _ in batches
    ]
    chosen, before = (choices(each, batches) for each in (model, earlier))
    ids = torch.cat([each.flatten() for each in batches]).numpy()
    return {
        **causal(model, held_out),
        "groups": measures(chosen, before, np.concatenate(of_tokens), ids, slots),
    }


class Windows:
    """Held-out windows of each source: ids and labels ``[B, T]`` in batches."""

    def __init__(self, held_out: ValidationSet, tokens: int, batch_size: int = 8) -> None:
        self.of: list[list[tuple[Tensor, Tensor]]] = []
        for store in held_out.stores:
            batches = ValidationSet([store], held_out.seq_len).batches(batch_size, tokens)
            self.of.append([(batch.input_ids, batch.labels) for batch in batches])

    @torch.no_grad()
    def losses(self, model: Transformer, path: ComputePath | None = None) -> list[float]:
        """The mean cross-entropy of each source on a path, in nats."""
        found = []
        for batches in self.of:
            outputs = [model(ids, labels, path=path) for ids, labels in batches]
            total = sum(float(output.loss) for output in outputs if output.loss is not None)
            found.append(total / sum(int((labels != -100).sum()) for _, labels in batches))
        return found


def causal(model: Transformer, held_out: Windows) -> dict[str, Any]:
    """The loss of each source, and what it rises by without each group.

    ``costs[g][s]`` is in nats a token of source s, with group g switched off by its path.
    """
    whole = held_out.losses(model)
    costs = []
    for group in GROUPS:
        path = ComputePath(groups=tuple(name for name in GROUPS if name != group))
        without = held_out.losses(model, path)
        costs.append([there - here for here, there in zip(whole, without, strict=True)])
    return {
        "losses": whole,
        "loss": sum(whole) / len(whole),
        "costs": costs,
        "lead": lead(costs),
    }


def lead(costs: Sequence[Sequence[float]]) -> float:
    """How many times the next of its row and column a diagonal value is, at worst.

    1 or less: a group matters as much for another source, or another group for its source. 0 if a
    source loses nothing without its group.
    """
    worst = math.inf
    for index, row in enumerate(costs):
        column = [other[index] for other in costs]
        others = [
            value for values in (row, column) for at, value in enumerate(values) if at != index
        ]
        own, nearest = row[index], max(others)
        if own <= 0:
            return 0.0
        worst = min(worst, own / nearest if nearest > 0 else math.inf)
    return worst
