"""Kill a training run again and again with SIGKILL, resume it, and compare it with one left alone.

    python -m tests.stress.kill                    50 kills: some minutes
    python -m tests.stress.kill --kills 5 --json
    python -m tests.stress.kill --compile
    python -m tests.stress.kill --config mine.yaml training.optimizer.type=adamw

The moments fall into start-up, steps, the writing of checkpoints and the end of the run. Ends with
status 1 and the first difference where the killed run is not the undisturbed one, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from tests.stress import evidence
from tests.stress.process import Session

# Everything that a resume has to carry over; checkpoints of some MB, so that writing takes a while.
OPTIONS = (
    "model.hidden_size=128",
    "model.vocab_size=8192",
    "model.dropout=0.1",
    "data.seq_len=32",
    "data.train=[{type: dummy, name: a, weight: 3, num_documents: 60}, "
    "{type: dummy, name: b, seed: 5, num_documents: 60}]",
    "data.num_workers=2",
    "training.batch_size=4",
    "training.micro_batch_size=1",
    "training.precision=bf16",
    "training.optimizer.type=muon",
    "training.checkpoint={every_steps: 4, keep: 2}",
    "training.eval={every_steps: 7, max_tokens: 1024}",
    "training.log_every=1",
    "training.sample.prompts=[]",
    "monitoring.sinks=[jsonl]",
)
COMPILED = ("training.compile=true", "model.attention.backend=blocks")

_STEPS_BETWEEN_KILLS = 5
_STEPS_AROUND = 12  # before the first kill that is meant for a step, and after the last
_DELAY_S = 0.03  # longest wait between the moment aimed at and the kill
_AFTER_RENAME_S = 0.004  # the same behind a renaming: links are set, old checkpoints dropped
_END_S = 0.3  # the same behind the last step: validation, the last checkpoint, farewell
_SHARE_ALONE = 0.25  # of the kills that hit the trainer only, its loader workers left behind
_TRIES = 5  # for a moment that the process was too quick for
_ORPHAN_S = 30.0  # by then the workers of a killed trainer have to be gone

Kind = Literal["start", "step", "write", "rename", "end"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Moment:
    """When to kill: once ``step`` was logged, or after a ``share`` of start-up if that is sooner.

    ``write`` waits for the next checkpoint to be half written, ``rename`` until it is in its place.
    ``insists`` asks for another try where the kill came too late to find it half written.
    """

    kind: Kind
    step: int
    delay_s: float = 0.0
    share: float | None = None
    alone: bool = False
    insists: bool = False


@dataclass(frozen=True)
class Kill:
    """What a kill hit."""

    kind: Kind
    age_s: float  # of the process
    step: int  # the last that the process had logged, 0 before its first
    checkpoint: int  # the newest on disk, 0 where there was none
    in_writing: bool  # a checkpoint was left half written
    alone: bool


@dataclass
class Outcome:
    """What became of a run that was killed many times."""

    seed: int
    steps: int
    kills: list[Kill] = field(default_factory=list)
    started_again: list[str] = field(default_factory=list)  # what the resume had answered
    faults: list[str] = field(default_factory=list)
    num_lines: int = 0
    num_tensors: int = 0
    num_bytes: int = 0

    @property
    def num_in_writing(self) -> int:
        """Kills that left a checkpoint half written."""
        return sum(kill.in_writing for kill in self.kills)

    @property
    def num_steps_redone(self) -> int:
        """Steps whose results were lost and computed again."""
        return sum(max(0, kill.step - kill.checkpoint) for kill in self.kills)


def plan(num_kills: int, seed: int) -> tuple[int, list[Moment]]:
    """The run's number of steps, and moments spread over all of it.

    The first fall before any checkpoint, the last behind the last step; of the others about half
    fall into the writing of a checkpoint, two of them for certain.
    """
    draw = random.Random(seed)
    at_an_end = max(1, num_kills // 16)  # and as many before the first checkpoint
    num_write = max(2, num_kills // 2)
    kinds: list[Kind] = ["write"] * num_write
    kinds += draw.choices(("start", "step", "rename"), k=num_kills - 2 * at_an_end - num_write)
    draw.shuffle(kinds)
    num_steps = 2 * _STEPS_AROUND + _STEPS_BETWEEN_KILLS * len(kinds)

    def moment(kind: Kind, step: int, longest_delay_s: float = 0.0) -> Moment:
        return Moment(
            kind,
            step,
            delay_s=draw.uniform(0, longest_delay_s),
            share=draw.random() if kind == "start" else None,
            alone=draw.random() < _SHARE_ALONE,
        )

    moments = [moment("start", step=1) for _ in range(at_an_end - 1)]
    moments.append(moment("step", step=1))
    for number, kind in enumerate(kinds):
        step = _STEPS_AROUND + _STEPS_BETWEEN_KILLS * number + draw.randrange(_STEPS_BETWEEN_KILLS)
        moments.append(moment(kind, step, _AFTER_RENAME_S if kind == "rename" else _DELAY_S))
    moments += [moment("end", num_steps, _END_S) for _ in range(at_an_end)]
    writes = [number for number, one in enumerate(moments) if one.kind == "write"]
    for number in writes[:2]:
        moments[number] = replace(moments[number], delay_s=0.0, insists=True)
    return num_steps, moments


class KilledRun:
    """One run, and the processes that trained it until they were killed."""

    def __init__(
        self, place: Path, options: Sequence[str], outcome: Outcome, start_s: float
    ) -> None:
        self.place = place
        self.options = options
        self.outcome = outcome
        self.start_s = start_s  # that a process takes to its first step, about
        self.sessions: list[Session] = []
        self._killed_at: dict[Session, float] = {}
        self._is_begun = False

    @property
    def run(self) -> Path:
        """The folder; another one each time that the run had to be restarted."""
        return self.place / "runs" / f"killed-{len(self.outcome.started_again) + 1}"

    def kill_at(self, moment: Moment) -> Kill | None:
        """Continue with the run, kill it at ``moment``, and look at what is left.

        None where the process ended before, because there was nothing to do or to go on with.
        """
        session = self._resume()
        best = evidence.best_step(self.run, self._newest())
        if not self._wait_for(moment, session):
            self._accept(session)
            return None
        age_s, step = session.age_s, session.step()
        session.kill(alone=moment.alone)
        self.start_s = min(self.start_s, session.first_step_s or self.start_s)
        self._killed_at[session] = time.monotonic()
        kill = Kill(moment.kind, age_s, step, self._newest(), session.is_writing(), moment.alone)
        self.outcome.kills.append(kill)
        self._look(f"after kill {len(self.outcome.kills)} ({kill.kind})", best if step else 0)
        return kill

    def finish(self) -> None:
        """Let the run come to its end, and wait until no process of it is left."""
        while not self._accept(session := self._resume()):
            pass
        result = json.loads(session.finish())  # and nothing else stands there
        if (result["ending"], result["step"]) != ("finished", self.outcome.steps):
            self.outcome.faults.append(f"the last process ended with {result}")
        while self._orphans_are_left():
            time.sleep(0.1)

    def end_all(self) -> None:
        """Leave no process behind, whatever happened."""
        for session in self.sessions:
            if session in self._killed_at or not session.has_ended:
                session.kill()

    def _resume(self) -> Session:
        """A process that begins the run, or resumes it."""
        self._orphans_are_left()
        words = ["--resume", str(self.run)]
        if not self._is_begun:
            words = [*self.options, f"run.name={self.run.name}"]
        self._is_begun = True
        session = Session(self.place, self.run, "train", *words, "--json", cache="cache-killed")
        self.sessions.append(session)
        return session

    def _wait_for(self, moment: Moment, session: Session) -> bool:
        """Wait until ``moment``; False where the process ended before."""
        is_finished = self._newest() == self.outcome.steps

        def has_come() -> bool:
            if is_finished:  # the process will only say so: well before it has
                return session.age_s >= self.start_s / 2 * moment.delay_s / _END_S
            if moment.share is not None and session.age_s >= moment.share * self.start_s:
                return True
            if session.step() < moment.step:
                return False
            return moment.kind not in ("write", "rename") or session.is_writing()

        if not session.wait_until(has_come):
            return False
        if moment.kind == "rename":
            session.wait_until(lambda: not session.is_writing())
        time.sleep(moment.delay_s)
        return not session.has_ended

    def _accept(self, session: Session) -> bool:
        """Whether a process came to a good end; if not, there must be nothing to resume."""
        session.wait_until(lambda: False)
        if session.process.returncode == 0:
            return True
        answer = session.stderr.strip().splitlines()
        if session.process.returncode != 2 or not answer or evidence.steps(self.run):
            raise RuntimeError(session.complaint())
        self.outcome.started_again.append(answer[-1])
        self._is_begun = False
        return False

    def _newest(self) -> int:
        return max(evidence.steps(self.run), default=0)

    def _look(self, when: str, best: int) -> None:
        """Note what is wrong on disk; ``best`` is the best step when the process began to train."""
        faults = evidence.unsound(self.run)
        link = self.run / "checkpoints" / "best"
        if best and link.exists() and int(link.resolve().name.removeprefix("step_")) < best:
            faults.append(f"best points to {link.readlink()}, though step {best} was better")
        self.outcome.faults += [f"{when}: {fault}" for fault in faults]

    def _orphans_are_left(self) -> bool:
        """Whether killed trainers have left processes; those that stay too long are a fault."""
        for session, killed_at in list(self._killed_at.items()):
            living = session.survivors()
            if living and time.monotonic() - killed_at > _ORPHAN_S:
                self.outcome.faults.append(
                    f"{len(living)} processes that a killed trainer had started still lived "
                    f"{_ORPHAN_S:.0f} s later"
                )
                session.kill()
            elif living:
                continue
            del self._killed_at[session]
        return bool(self._killed_at)


def kill_and_compare(
    place: Path,
    options: Sequence[str],
    *,
    num_kills: int,
    seed: int,
    say: Say = lambda text: None,
) -> Outcome:
    """Train ``options`` in ``place`` twice, the second time with kills; what came of it.

    ``options`` are the words after ``ultrathink train``. Differences are among the faults.
    """
    steps, moments = plan(num_kills, seed)
    options = [*options, f"training.max_steps={steps}"]
    reference = place / "runs" / "reference"
    undisturbed = Session(
        place, reference, "train", *options, "run.name=reference", "--json", cache="cache-reference"
    )
    try:
        undisturbed.wait_until(lambda: undisturbed.step() > 0)
        undisturbed.finish()
    finally:
        undisturbed.kill()
    start_s = undisturbed.first_step_s or undisturbed.age_s
    say(f"undisturbed: {steps} steps in {undisturbed.age_s:.1f} s, {start_s:.1f} s to the first")
    outcome = Outcome(seed, steps)
    killed = KilledRun(place, options, outcome, start_s)
    try:
        _kill_all(killed, moments, say)
        killed.finish()
    finally:
        killed.end_all()
    outcome.faults += evidence.unsound(killed.run)
    outcome.faults += evidence.differences(reference, killed.run)
    compared = evidence.tensors(reference / "checkpoints" / "last")
    outcome.num_lines = len(evidence.rows(reference))
    outcome.num_tensors = len(compared)
    outcome.num_bytes = sum(tensor.nbytes for tensor in compared.values())
    return outcome


def _kill_all(killed: KilledRun, moments: Sequence[Moment], say: Say) -> None:
    for number, moment in enumerate(moments, start=1):
        for _ in range(_TRIES):
            kill = killed.kill_at(moment)
            if kill is None:
                continue
            say(f"kill {number}/{len(moments)}: {describe(kill)}")
            if kill.in_writing or not moment.insists:
                break
        else:
            killed.outcome.faults.append(f"kill {number} ({moment.kind}) never hit its moment")


def describe(kill: Kill) -> str:
    """A kill in words."""
    where = f"after step {kill.step}" if kill.step else "before its first step"
    whom = "the trainer alone" if kill.alone else "all its processes"
    writing = ", a checkpoint half written" if kill.in_writing else ""
    return f"{kill.age_s:.1f} s old, {where}{writing}; {whom}; newest is {kill.checkpoint}"


def summary(outcome: Outcome) -> str:
    """The outcome in a few lines."""
    kills = outcome.kills
    hit = Counter(
        "in start-up"
        if kill.step == 0
        else "while a checkpoint was written"
        if kill.in_writing
        else "after the last step"
        if kill.step == outcome.steps
        else "between"
        for kill in kills
    )
    reported = ", ".join(f"{count} {where}" for where, count in hit.most_common())
    lines = [
        f"{len(kills)} kills (seed {outcome.seed}): {reported}",
        f"{sum(kill.alone for kill in kills)} of them hit the trainer and not its loader workers",
        f"{outcome.num_steps_redone} of {outcome.steps} steps were lost and done again; "
        f"{len(outcome.started_again)} times there was nothing to resume yet",
        *(f'  the answer was: "{answer}"' for answer in sorted(set(outcome.started_again))),
    ]
    if outcome.faults:
        lines.append(f"NOT EQUAL: {len(outcome.faults)} faults, the first:")
        return "\n".join([*lines, *(f"  {fault}" for fault in outcome.faults[:10])])
    lines.append(
        f"equal to the undisturbed run, bit for bit: {outcome.num_lines} lines of metrics.jsonl, "
        f"{outcome.num_tensors} tensors ({outcome.num_bytes / 1e6:.1f} MB), state.json"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 where the killed run is not the undisturbed one."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress.kill", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--kills", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--seed", type=int, help="of the moments; drawn and reported when left out")
    parser.add_argument("--compile", action="store_true", help="with the compiled model")
    parser.add_argument("--config", default="debug", help="preset or YAML file (default: debug)")
    parser.add_argument("--keep-folder", action="store_true", help="do not delete the runs")
    parser.add_argument("--json", action="store_true", help="the outcome as one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the config")
    args = parser.parse_args(argv)
    if args.kills < 4:
        parser.error("--kills must be at least 4: one each for start, end and two writings")
    config = Path(args.config)
    options = [str(config.resolve()) if config.is_file() else args.config, *OPTIONS]
    options += [*(COMPILED if args.compile else ()), *args.overrides]
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    place = Path(tempfile.mkdtemp(prefix="ultrathink-kill-"))
    keep = True
    try:
        outcome = kill_and_compare(
            place,
            options,
            num_kills=args.kills,
            seed=seed,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
        keep = args.keep_folder or bool(outcome.faults)
    finally:
        if keep:
            print(f"kept: {place}", file=sys.stderr)
        else:
            shutil.rmtree(place)
    print(json.dumps(asdict(outcome)) if args.json else summary(outcome))
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
