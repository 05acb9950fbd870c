"""Doing many runs, some at a time, each in a separate process; finished runs are not repeated."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from fault_runs import RESULT, run_job
from fault_setting import Job, Setting

from ultrathink.core.errors import UltrathinkError
from ultrathink.core.files import write_atomic


def run_all(
    jobs: Sequence[Job], setting: Setting, out: Path, *, processes: int, verbose: bool
) -> dict[Job, dict[str, Any]]:
    """The result of each job; those that ``out`` holds already are taken from there.

    Snapshots are done before what begins with them. SIGTERM ends the runs at work, like Ctrl-C.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    done = {job: found for job in jobs if (found := kept_result(job, out)) is not None}
    todo = [job for job in jobs if job not in done]
    progress = _Progress(len(jobs), len(done), processes, verbose)
    server = _server()
    for stage in (True, False):
        part = [job for job in todo if (job.kind == "snapshot") is stage]
        done |= dict(_run_side_by_side(part, setting, out, processes, server, progress))
    return {job: done[job] for job in jobs}


def kept_result(job: Job, out: Path) -> dict[str, Any] | None:
    """What an earlier start left of ``job``; None where it must be run."""
    file = out / job.folder / RESULT
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if result.get("sources") == job.sources else None


def _server() -> ForkServerContext:
    """Processes that begin with everything imported."""
    os.environ["OMP_NUM_THREADS"] = "1"  # the same bits on every machine, however many run
    here = str(Path(__file__).parent)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{here}{os.pathsep}{before}" if before else here
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_runs"])
    return context


def _run_side_by_side(
    jobs: Sequence[Job],
    setting: Setting,
    out: Path,
    processes: int,
    server: ForkServerContext,
    progress: _Progress,
) -> list[tuple[Job, dict[str, Any]]]:
    """Run ``jobs``, so many at a time; an exception, such as Ctrl-C, ends those at work."""
    waiting = list(reversed(jobs))
    at_work: dict[Any, tuple[Job, ForkServerProcess, float]] = {}
    results = []
    try:
        while waiting or at_work:
            while waiting and len(at_work) < processes:
                job = waiting.pop()
                process = server.Process(target=run_job, args=(job, setting, out))
                process.start()
                at_work[process.sentinel] = (job, process, time.monotonic())
            for sentinel in wait(list(at_work)):
                job, process, began = at_work.pop(sentinel)
                process.join()
                result = _result_of(job, process.exitcode, out)
                results.append((job, result))
                progress.report(job, result, time.monotonic() - began)
    finally:
        for _, process, _ in at_work.values():
            process.terminate()
            process.join()
    return results


def _result_of(job: Job, exitcode: int | None, out: Path) -> dict[str, Any]:
    """What a run left; one whose process was ended from outside died of its fault."""
    result = kept_result(job, out)
    if result is not None:
        return result
    if job.fault is None or exitcode is None or exitcode >= 0:
        raise UltrathinkError(
            f"{job.label} ended with status {exitcode} and no result; what it said stands above."
        )
    result = {
        "loss": None,
        "died": f"ended by signal {-exitcode}",
        "step": 0,
        "steps_taken": 0,
        "seconds": 0.0,
        "memory_growth_gib": 0.0,
        "skipped": 0,
        "interventions": [],
        "sources": job.sources,
    }
    write_atomic(out / job.folder / RESULT, json.dumps(result))
    return result


@dataclass
class _Progress:
    """Reports each run at its end, and the expected end of all."""

    total: int
    done: int
    processes: int
    verbose: bool
    seconds: float = 0.0  # of the runs of this start
    finished: int = 0

    def report(self, job: Job, result: dict[str, Any], seconds: float) -> None:
        self.done += 1
        self.finished += 1
        self.seconds += seconds
        if not self.verbose:
            return
        left = (self.total - self.done) * self.seconds / self.finished / self.processes
        what = result.get("died") or (
            f"loss {result['loss']:.4f}" if result.get("loss") is not None else "no finite loss"
        )
        if job.kind == "snapshot":
            what = "saved"
        what = textwrap.shorten(what, 60, placeholder=" …")
        line = f"[{self.done}/{self.total}] {job.label}: {what}, {seconds:.0f} s"
        print(f"{line}; about {left / 60:.0f} min to go", file=sys.stderr, flush=True)
