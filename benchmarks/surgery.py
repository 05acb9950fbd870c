"""What it costs to split, prune and release experts of a trained model.

    python benchmarks/surgery.py
    python benchmarks/surgery.py --steps 1500 --json

A small model with one group of 64 experts, top-2, in each layer is trained on `stdlib`. Then, each
time from the same state:

- the busiest expert of every layer is split: the largest change of a logit, at once
- the least salient expert of every layer is pruned (dropped, or merged), or for comparison the
  busiest: loss of held-out text at once
- the least salient is pruned, and training goes on, beside training that goes on without: loss of
  held-out text after 100 steps of the same data
- a pair that was split is released after 100 steps: loss before and after
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from harness import parser, rows, setting, show, start

from ultrathink import build_trainer, load_config
from ultrathink.training.change import Change
from ultrathink.training.changes import AddExpert, PruneExpert, ReleaseExperts
from ultrathink.training.expert_measures import measure_experts
from ultrathink.training.trainer import Trainer

GROUP = "experts"
SHAPE = (
    "model.hidden_size=128",
    "model.num_layers=3",
    f"model.moe={{groups: [{{name: {GROUP}, num_experts: 64, top_k: 2, max_experts: 65}}], "
    "intermediate_size: 64, shared_size: 128, gate_scale: 2.0}",
)


def main() -> None:
    """Train, operate, and print what it cost."""
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=1000, help="of training before")
    options.add_argument("--more", type=int, default=100, help="steps after an operation")
    options.add_argument("--scored", type=int, default=100_000, help="tokens of held-out text")
    options.add_argument("--preset", default="demo-moe")
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            args.preset,
            [
                f"run.dir={folder}",
                *SHAPE,
                f"training.max_steps={args.steps + args.more}",
                "training.schedule={type: wsd, decay: 0}",
                "training.checkpoint.every_minutes=null",
                "training.sample.prompts=[]",
                f"training.eval.max_tokens={args.scored}",
                "monitoring.sinks=[jsonl]",
                *args.set,
            ],
        )
        trainer = build_trainer(config)
        result = {
            "benchmark": "surgery",
            "steps": args.steps,
            "more": args.more,
            "setting": setting(),
            **measured(trainer, args.steps, args.more),
        }
        trainer.close()
    show(result, text(result), args.json)


def measured(trainer: Trainer, steps: int, more: int) -> dict[str, Any]:
    """Train, then measure each operation from the same state."""
    trainer.start()
    run(trainer, steps)
    batch, before = trainer.boundary.batch, trainer.state.copy()
    assert batch is not None
    ids = batch.input_ids[:4].to(trainer.device)
    measures = measure_experts(trainer.parts)
    assert measures is not None
    busiest = [int(row.argmax()) for row in measures.tokens]
    loss, logits = trainer.score().loss, logits_of(trainer, ids)

    def after(*changes: Change, then: int = 0) -> float:
        trainer.state.roll_back(before)
        trainer.boundary.batch = batch
        for change in changes:
            change.apply(trainer.parts)
        run(trainer, then)
        return trainer.score().loss

    each = zip(trainer.model.expert_layers(), busiest, strict=True)
    found = {
        "loss": loss,
        "dropped": after(PruneExpert("all", GROUP)),
        "merged": after(PruneExpert("all", GROUP, how="merge")),
        "busiest_dropped": after(*(PruneExpert(layer, GROUP, one) for layer, one in each)),
        "split": after(AddExpert("all", GROUP)),
        "logit_change": float((logits_of(trainer, ids) - logits).abs().max()),
        "copied": after(AddExpert("all", GROUP, how="copy")),
        "later": after(then=more),
        "dropped_later": after(PruneExpert("all", GROUP), then=more),
        "split_later": after(AddExpert("all", GROUP), then=more),
    }
    ReleaseExperts("all", GROUP).apply(trainer.parts)
    return {**found, "released_later": trainer.score().loss}


def run(trainer: Trainer, steps: int) -> None:
    """Take some steps."""
    for _ in range(steps):
        trainer.train_step()


@torch.no_grad()
def logits_of(trainer: Trainer, ids: torch.Tensor) -> torch.Tensor:
    """Of the whole model in evaluation mode."""
    logits: torch.Tensor = trainer.model.eval()(ids).logits.float()
    trainer.model.train()
    return logits


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    later = {name: result[name] for name in ("dropped_later", "split_later", "released_later")}
    now = {name: result[name] for name in ("dropped", "merged", "busiest_dropped", "split")}
    table = [("trained", f"{result['loss']:.4f}", "")]
    for name, value in {**now, "copied": result["copied"]}.items():
        table.append((name, f"{value:.4f}", f"{value / result['loss'] - 1:+.3%}"))
    table.append((f"{result['more']} steps later", f"{result['later']:.4f}", ""))
    for name, value in later.items():
        table.append((name, f"{value:.4f}", f"{value / result['later'] - 1:+.3%}"))
    change = f"largest change of a logit by a split: {result['logit_change']:.2g}"
    return f"{rows(('', 'loss, nats', 'change'), table)}\n{change}"


if __name__ == "__main__":
    start(main)
