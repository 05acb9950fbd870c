"""What a run writes down about itself besides metrics: every change, every message."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Literal

from ultrathink.monitoring.jsonl import cut_after
from ultrathink.monitoring.records import RunInfo
from ultrathink.runs.folder import RunFolder
from ultrathink.training.callbacks import Callback
from ultrathink.training.control import Change


class RunLog(Callback):
    """Appends changes to ``decisions.jsonl`` and messages to ``logs/run.log``."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def on_start(self, info: RunInfo) -> None:
        if info.start_step and self.run.decisions.exists():
            cut_after(self.run.decisions, info.start_step)
        self.on_message(f"training starts after step {info.start_step}", "info")

    def on_change(self, change: Change) -> None:
        record = {"time": time.time(), **asdict(change)}
        with self.run.decisions.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def on_message(self, text: str, level: Literal["info", "warning"]) -> None:
        moment = time.strftime("%Y-%m-%d %H:%M:%S")
        with (self.run.logs / "run.log").open("a", encoding="utf-8") as file:
            file.write(f"{moment} {level}: {text}\n")
