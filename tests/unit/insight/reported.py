"""Files of runs as the report reads them, written by hand."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ultrathink.runs.folder import RunFolder

HELPED = {"mean": -0.012, "low": -0.015, "high": -0.009, "orders": 4, "horizon": 200}
HURT = {"mean": 0.006, "low": 0.002, "high": 0.01, "orders": 4, "horizon": 50}
UNPROVEN = {"mean": 0.001, "low": -0.004, "high": 0.006, "orders": 4, "horizon": 200}


def decision(**values: Any) -> dict[str, Any]:
    """A line of ``decisions.jsonl``."""
    line: dict[str, Any] = {
        "id": 1, "time": 1763.5, "step": 30, "rule": "spike", "level": 2, "confidence": 0.86,
        "signals": {"loss": 7.1, "score": 41.0}, "action": "lr_factor", "before": 0.003,
        "after": 0.0015, "reasoning": "the loss jumped", "outcome": None,
    }  # fmt: skip
    return line | values


def event(step: int, severity: str, **values: Any) -> dict[str, Any]:
    """A line of ``events.jsonl``."""
    line: dict[str, Any] = {
        "step": step, "began": step, "to_step": step, "found_at": step, "kind": "loss_spike",
        "severity": severity, "message": "the loss is high", "subject": "", "values": {},
        "time": 1.0,
    }  # fmt: skip
    return line | values


def write_lines(path: Path, lines: Iterable[dict[str, Any] | str]) -> None:
    """Objects, or text as it is, one a line."""
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    )


def metrics(steps: Iterable[int], **values: Any) -> list[dict[str, Any]]:
    """Training lines of a healthy run."""
    return [
        {
            "step": step,
            "split": "train",
            "time": 1e9 + step,
            "loss": 2 + 3 * step**-0.5 + 0.02 * math.sin(12.9898 * step),
            "tokens": 512 * step,
            "lr": 0.001,
            "grad_norm": 1.0 + 0.1 * math.sin(78.233 * step),
            "tokens_per_sec": 1000.0,
        }
        | values
        for step in steps
    ]


def make_longer(run: RunFolder, num_steps: int) -> None:
    """Say in a run's configuration that it is to take so many steps."""
    path = run.path / "config.yaml"
    text = path.read_text()
    assert "max_steps: 60\n" in text
    path.write_text(text.replace("max_steps: 60\n", f"max_steps: {num_steps}\n"))


def steer(run: RunFolder) -> None:
    """Give a run decisions of all kinds, and events."""
    write_lines(
        run.decisions,
        [
            decision(
                outcome={"resolved": True, "step": 41, "text": "The loss came back."}, audit=HELPED
            ),
            decision(id=2, step=31, level=3, action="rollback", audit=UNPROVEN),
            decision(
                id=None, step=40, rule="by_hand", level=None, confidence=None, signals={},
                action="adjust_weight_decay", before=0.1, after=None, reasoning="<i>mine</i>",
            ),
            decision(id=4, step=55, level=4, action="micro_batch_size", audit=HURT,
                     outcome={"resolved": False}),
        ],
    )  # fmt: skip
    write_lines(
        run.events,
        [event(10, "low"), event(30, "high", began=29, to_step=35), event(50, "info", kind="slow")],
    )
