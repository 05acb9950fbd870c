"""What the benchmarks share: whose turn it is, what a figure was measured on, how it is printed."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pty
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ultrathink.core.errors import UltrathinkError
from ultrathink.runs.manifest import hardware


def start(main: Callable[[], None]) -> None:
    """Run a benchmark; a mistake in its arguments is reported in a sentence."""
    try:
        main()
    except UltrathinkError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--json", action="store_true", help="print one JSON object")
    return result


def add_turns(options: argparse.ArgumentParser) -> None:
    """The options of a benchmark whose contenders train alternately."""
    options.add_argument("--device", default="auto")
    options.add_argument("--rounds", type=int, default=8)
    options.add_argument("--seconds", type=float, default=4.0, help="of training in each turn")
    options.add_argument("--threads", type=int, default=os.cpu_count())


def add_checkout(options: argparse.ArgumentParser) -> None:
    """The options that compare two source trees of ours."""
    options.add_argument(
        "--checkout",
        type=Path,
        metavar="PATH",
        help="take turns with another source tree of ours alone, such as a worktree of the parent",
    )
    options.add_argument(
        "--launches",
        type=int,
        default=1,
        help="with --checkout, start both so often, for --rounds each: where the memory of a "
        "process happens to lie makes all its turns faster or slower alike",
    )


def setting() -> dict[str, Any]:
    """When and on what the figures were taken."""
    facts = hardware()
    gpus = [gpu["name"] for gpu in facts.get("gpus", [])]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": facts["cpu"],
        "threads": int(os.environ.get("OMP_NUM_THREADS", facts["threads"])),
        "gpus": gpus,
    }


# Two-sided 95% quantiles of Student's t, by degrees of freedom; beyond, that of the normal.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)


def ratio_interval(ratios: Sequence[float]) -> dict[str, Any]:
    """The geometric mean of paired ratios and its 95% interval, by Student's t of their logs."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, freedom = statistics.fmean(logs), len(logs) - 1
    quantile = _T95[freedom - 1] if 0 < freedom <= len(_T95) else 1.96
    half = quantile * statistics.stdev(logs) / math.sqrt(len(logs)) if freedom else math.inf
    return {
        "mean": math.exp(mean),
        "low_95": math.exp(mean - half),
        "high_95": math.exp(min(700.0, mean + half)),
        "measured": list(ratios),
    }


def spread(figures: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(figures), "low": min(figures), "high": max(figures)}


def show(result: dict[str, Any], table: str, as_json: bool) -> None:
    """Print the result as one JSON object, or as its table with the setting above it."""
    if as_json:
        print(json.dumps(result))
        return
    where = result["setting"]
    on = ", ".join(where["gpus"]) or f"{where['threads']} threads of {where['processor']}"
    print(f"{on}, {where['date']}\n{table}")


def rows(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A table: the first column to the left, the others to the right, as wide as they must be."""
    cells = [[str(cell) for cell in line] for line in (header, *lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


class Contender:
    """A process of ``contenders.py``: it works for a turn on request, and waits otherwise.

    Its standard error is a terminal, so that a console shows what it would show a person.
    ``BENCHMARK_DEBUG=1`` passes on what it says there. ``checkout`` is the source tree whose code
    and benchmarks it runs, this one unless given.
    """

    def __init__(
        self, name: str, arguments: dict[str, Any], checkout: Path = Path(__file__).parents[1]
    ) -> None:
        self.name = name
        script = checkout / "benchmarks" / "contenders.py"
        if not script.is_file():
            raise UltrathinkError(f"--checkout {checkout}: {script} does not exist.")
        ours, its = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, str(script), name, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=its,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(checkout / "src"),
                "TERM": "xterm-256color",
                "COLUMNS": "100",
            },
        )
        os.close(its)
        threading.Thread(target=self._read_terminal, args=(ours,), daemon=True).start()

    def take_turn(self, seconds: float) -> dict[str, float]:
        """Work for ``seconds``; what it answers, tokens per second among it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; BENCHMARK_DEBUG=1 shows what it said")
        answer: dict[str, float] = json.loads(line)
        return answer

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _read_terminal(self, terminal: int) -> None:
        with contextlib.suppress(OSError):  # the terminal ends with its process
            while said := os.read(terminal, 65536):
                if os.environ.get("BENCHMARK_DEBUG"):
                    sys.stderr.buffer.write(said)


def by_turns(
    contenders: Sequence[Contender], rounds: int, seconds: float
) -> list[dict[Contender, dict[str, float]]]:
    """Let them work in the same minutes: one turn each a round, after one to warm up.

    The order is turned round from one round to the next, so that none always follows the same.
    """
    try:
        for contender in contenders:
            contender.take_turn(0.0)  # the first step, compilation included
        for contender in contenders:
            contender.take_turn(seconds / 2)
        taken = []
        for number in range(rounds):
            ordered = contenders if number % 2 == 0 else list(reversed(contenders))
            taken.append({one: one.take_turn(seconds) for one in ordered})
        return taken
    finally:
        for contender in contenders:
            contender.stop()
