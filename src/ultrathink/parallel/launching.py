"""Starts the processes of a run on this machine, and restarts them when one dies.

PyTorch's elastic agent does the work, with these differences: on a single machine nothing listens
beyond loopback (processes rendezvous through a file); signals are forwarded to the processes, which
save and stop by themselves; when one process dies, the others, which wait for it, are killed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from ultrathink.core.files import temporary_folder
from ultrathink.parallel import watchdog
from ultrathink.parallel.world import RENDEZVOUS_VARIABLE, RUN_POINTER_VARIABLE

# After these exit statuses a restart would end in the same way.
USER_ERROR, EXCEPTION = 2, 70
FINAL_STATUSES = (USER_ERROR, EXCEPTION)
OUT_OF_MEMORY = 71  # the restart uses smaller micro-batches, as the process has recorded
PEER_GONE = 75  # another process is gone, and has the reason
# Silenced: its messages repeat what is printed here.
_TORCH_LOG = logging.getLogger("torch.distributed.elastic")
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MONITOR_S = 0.1


@dataclass(frozen=True)
class Launch:
    """What to start: ``command`` as ``num_processes`` on each of ``num_nodes`` machines."""

    command: Sequence[str]
    num_processes: int
    num_nodes: int = 1
    endpoint: str | None = None  # rendezvous of several machines, host:port
    run_id: str = "ultrathink"
    max_restarts: int = 3
    log_folder: Path | None = None  # for the output of each process, in separate files


@dataclass(frozen=True)
class LaunchResult:
    """How the processes ended: the exit status, and the reason of a failure."""

    status: int
    reason: str = ""


def launch(what: Launch, report: Callable[[str], None]) -> LaunchResult:
    """Start the processes, supervise them until they end, and return how they ended."""
    _TORCH_LOG.setLevel(logging.CRITICAL)
    with temporary_folder() as folder, _environment(_variables(what, folder)):
        spec = _spec(what, folder)
        agent = _Agent(spec, _logs(what), report)
        with _forwarding_signals(agent) as received:
            result = agent.run()
        if what.endpoint is None:
            with suppress(Exception):  # ends the heartbeats, which write to a file in the folder
                spec.rdzv_handler.shutdown()
    if received and not result.is_failed():
        return LaunchResult(128 + received[0])
    if not result.is_failed():
        return LaunchResult(0)
    rank, code = agent.failure or _first_failure(result)
    return LaunchResult(code if code > 0 else 128 - code, reason=_how(rank, code))


class _Agent(LocalElasticAgent):
    """The elastic agent, which knows its processes and when a restart is useless."""

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, report: Callable[[str], None]):
        super().__init__(spec, logs)
        self.report = report
        self.pids: list[int] = []
        self.failure: tuple[int, int] | None = None  # rank and exit code of the first to fail

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        self.pids = list(started.values())
        self.failure = None
        return started

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        # They wait for a process that is gone, so they could not stop by themselves.
        self._shutdown(signal.SIGKILL)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._end_the_rest(worker_group)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state != WorkerState.FAILED:
            return result
        rank, code = self.failure or _first_failure(result)
        self.failure = (rank, code)
        if code in FINAL_STATUSES:
            self._remaining_restarts = 0
        elif self._remaining_restarts > 0:
            self.report(
                f"{_how(rank, code)}; all restart from the last checkpoint "
                f"({self._remaining_restarts} restart"
                f"{'s' if self._remaining_restarts > 1 else ''} left)"
            )
        return result

    def _end_the_rest(self, worker_group: WorkerGroup) -> None:
        """Once a process has failed, kill the others, which may wait for it forever."""
        processes = {
            worker.global_rank: handler.proc
            for worker in worker_group.workers
            for local_rank, handler in getattr(self._pcontext, "subprocess_handlers", {}).items()
            if local_rank == worker.local_rank
        }
        codes = {rank: process.poll() for rank, process in processes.items()}
        failed = {rank: code for rank, code in codes.items() if code}
        if not failed or self.failure is not None:
            return
        self.failure = min(failed.items(), key=lambda item: item[1] == PEER_GONE)
        for rank, process in processes.items():
            if codes[rank] is None:
                process.kill()


def _first_failure(result: RunResult) -> tuple[int, int]:
    """The rank and exit code of the process that failed first."""
    failures = result.failures.items()
    rank, failure = min(
        failures, key=lambda item: (item[1].exitcode == PEER_GONE, item[1].timestamp)
    )
    return rank, failure.exitcode


def _how(rank: int, exit_code: int) -> str:
    """How the process of ``rank`` ended, as text."""
    if exit_code < 0:
        return f"process {rank} was killed by {signal.Signals(-exit_code).name}"
    if exit_code == PEER_GONE:
        return f"process {rank} lost the connection to another"
    if exit_code == OUT_OF_MEMORY:
        return f"process {rank} ran out of memory"
    if exit_code == watchdog.STATUS:
        return f"process {rank} took no step for too long (RUN/logs/stacks-{rank}.txt says where)"
    return f"process {rank} ended with status {exit_code}"


def _spec(what: Launch, folder: Path) -> WorkerSpec:
    # A single machine rendezvouses through a file, so that nothing listens on the network.
    alone = {"local_addr": "127.0.0.1", "store_type": "file"} if what.endpoint is None else {}
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=what.endpoint or str(folder / "agents"),
        run_id=what.run_id,
        min_nodes=what.num_nodes,
        max_nodes=what.num_nodes,
        **alone,
    )
    return WorkerSpec(
        role="train",
        local_world_size=what.num_processes,
        entrypoint=what.command[0],
        args=tuple(what.command[1:]),
        rdzv_handler=get_rendezvous_handler(parameters),
        max_restarts=what.max_restarts,
        monitor_interval=_MONITOR_S,
    )


def _logs(what: Launch) -> DefaultLogsSpecs:
    if what.log_folder is None:
        return DefaultLogsSpecs()
    what.log_folder.mkdir(parents=True, exist_ok=True)
    return DefaultLogsSpecs(log_dir=str(what.log_folder), tee=Std.ALL)


def _variables(what: Launch, folder: Path) -> dict[str, str]:
    """The environment variables of the processes."""
    variables = {
        # With a store that survives a restart, every third restart hung.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        RUN_POINTER_VARIABLE: str(folder / "run"),
        # The other signals are for the processes (see _forwarding_signals).
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        variables["OMP_NUM_THREADS"] = str(max(1, cores // what.num_processes))
    if what.endpoint is None:
        variables[RENDEZVOUS_VARIABLE] = str(folder / "processes")
        variables["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    return variables


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _forwarding_signals(agent: _Agent) -> Iterator[list[int]]:
    """Forward signals to the processes, which stop by themselves; yields those received."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        agent._remaining_restarts = 0
        for pid in agent.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    # Ignored signals stay ignored, such as SIGHUP under nohup.
    handled = [number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in handled}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
