"""What each rule of the orchestrator is worth where it acts, by its own audits.

    python benchmarks/rule_audits.py
    python benchmarks/rule_audits.py --only find_rate --orders 4 --seeds 0 1 --json

Each rule is given a run in which it has something to do (weights that break, a rate ten times too
high, a text that is too short). Then `ultrathink audit` replays the first
decision of that rule with and without it, over several data orders: the mean paired difference of
the validation loss, in nats a token, and its 95% interval. Negative is a gain. What continues from
outside is in neither branch, so rules about such faults (`skip_outliers`, `correct_rate`) are
judged by `faults.py` alone.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fault_setting import FULL
from harness import parser, rows, setting, show, start

from ultrathink import build_trainer, load_config
from ultrathink.core.errors import UltrathinkError, suggestion
from ultrathink.recipes.audit import audit_run
from ultrathink.runs.decisions import read_decisions
from ultrathink.training.callbacks import Callback, StepReport
from ultrathink.training.trainer import Trainer

STEPS = 600
BREAKS_AT = 300


class Breaks(Callback):
    """Multiplies the first matrix of a run by 30, once."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def on_step(self, report: StepReport) -> None:
        if report.step >= BREAKS_AT and self.trainer is not None:
            trainer, self.trainer = self.trainer, None
            with torch.no_grad():
                next(one for one in trainer.model.parameters() if one.ndim == 2).mul_(30.0)


def broken_weights(folder: Path) -> list[str]:
    """What breaks them comes from outside."""
    return []


def high_rate(folder: Path) -> list[str]:
    """Ten times what is best for this model."""
    return ["training.optimizer.lr=0.05"]


def short_text(folder: Path) -> list[str]:
    """Eight thousand letters, which are soon known by heart."""
    text = Path(random.__file__).read_text(encoding="utf-8")[:8_000]
    (folder / "short.txt").write_text(text, encoding="utf-8")
    return [
        f"data.train=[{{type: text, path: {folder / 'short.txt'}}}]",
        "data.val=[{type: stdlib}]",
    ]


CASES: dict[str, Callable[[Path], list[str]]] = {
    "roll_back": broken_weights,
    "find_rate": high_rate,
    "stop_overfitting": short_text,
}


def main() -> None:
    """Make the runs, audit them, and print what came out."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", default=list(CASES), metavar="RULE")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--orders", type=int, default=4)
    options.add_argument("--horizon", type=int, default=200)
    args = options.parse_args()
    for rule in args.only:
        if rule not in CASES:
            raise UltrathinkError(f"there is no case for {rule!r}. {suggestion(rule, CASES)}")
    torch.set_num_threads(1)
    audits: list[dict[str, Any]] = []
    for rule in args.only:
        for seed in args.seeds:
            audits.append({"rule": rule, "seed": seed})
            audits[-1] |= _audited(rule, seed, args.orders, args.horizon)
            print(f"{rule}, seed {seed}: {audits[-1]}", file=sys.stderr, flush=True)
    result = {
        "benchmark": "rule_audits",
        "setting": setting(),
        "orders": args.orders,
        "horizon": args.horizon,
        "audits": audits,
    }
    show(result, describe(result), args.json)


def _audited(rule: str, seed: int, orders: int, horizon: int) -> dict[str, Any]:
    """The audit of the first decision of ``rule`` in a run in which it has something to do."""
    with tempfile.TemporaryDirectory() as scratch:
        breaks = Breaks()
        config = load_config(
            "debug",
            [
                *FULL.config("dense", STEPS),
                f"run.dir={scratch}/runs",
                f"run.seed={seed}",
                "orchestrator.mode=act",
                "orchestrator.kept_states=100",
                *CASES[rule](Path(scratch)),
            ],
        )
        trainer = build_trainer(config, callbacks=[breaks])
        if rule == "roll_back":
            breaks.trainer = trainer
        trainer.fit()
        decided = [one for one in read_decisions(trainer.run.decisions) if one["rule"] == rule]
        if not decided:
            return {"decisions": 0}
        first = decided[0]
        audit = audit_run(trainer.run, decision=first["id"], orders=orders, horizon=horizon)
        found = audit[first["id"]]
        return {
            "decisions": len(decided),
            "step": first["step"],
            "mean": found.mean,
            "low": found.low,
            "high": found.high,
            "verdict": found.verdict,
        }


def describe(result: dict[str, Any]) -> str:
    """The result as a table, a line for each rule and seed."""
    lines = []
    for one in result["audits"]:
        if not one["decisions"]:
            lines.append((one["rule"], one["seed"], 0, "", "", "", "it did not act"))
            continue
        interval = f"{one['low']:+.4f} to {one['high']:+.4f}"
        figures = (one["decisions"], one["step"], f"{one['mean']:+.4f}", interval, one["verdict"])
        lines.append((one["rule"], one["seed"], *figures))
    header = ("", "seed", "decisions", "step of the first", "difference", "95% interval", "")
    reported = f"{result['orders']} data orders, {result['horizon']} steps after the decision"
    return f"{reported}\n{rows(header, lines)}"


if __name__ == "__main__":
    start(main)
