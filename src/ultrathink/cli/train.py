"""``ultrathink train``: start a run, or resume one."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ultrathink.cli.arguments import (
    add_config_arguments,
    generate_command,
    split_config_and_overrides,
)
from ultrathink.cli.together import is_launched, run_together
from ultrathink.config import load_config
from ultrathink.core.errors import UltrathinkError
from ultrathink.core.streams import print_stderr
from ultrathink.training.changes import Stop

if TYPE_CHECKING:
    from ultrathink.training.trainer import Trainer

EPILOG = """examples:
  ultrathink train                      five minutes on Python's own source
  ultrathink train debug                twenty tiny steps: does all work?
  ultrathink train data.train=books/    your own text
  ultrathink train my.yaml training.max_steps=1000
                                        your own file, one value changed
  ultrathink train --resume auto        resume the newest run
  ultrathink train --resume demo@500    resume from the checkpoint of step 500
  ultrathink train --resume demo training.max_steps=5000
                                        resume, and train longer

options of other trainers are answered with the line that means them here:
  ultrathink train --learning_rate 1e-4
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ultrathink train``."""
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="resume a run: its name or folder, RUN@step, or auto for the newest",
    )
    parser.add_argument(
        "--reset",
        action="append",
        default=[],
        choices=["optimizer", "schedule", "data"],
        help="with --resume: reset this part (may be given several times)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object on stdout"
    )


def run(args: argparse.Namespace) -> int:
    """Train; returns 0 at the end of a run, 128 plus the signal's number where one stopped it."""
    if is_launched():
        run_together(lambda: _run(args))
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    if is_launched():
        from ultrathink.parallel.restarts import run_to_resume

        path = run_to_resume()
        if path is not None:
            return _resume(str(path), [], [], args.json)
    source, overrides = split_config_and_overrides(args.positionals)
    if args.resume is None:
        if args.reset:
            raise UltrathinkError("--reset belongs to --resume: a new run has nothing to reset.")
        config = load_config(source, overrides)  # mistakes are reported before torch is imported
        from ultrathink.recipes.train import build_trainer

        return _train(partial(build_trainer, config), args.json)
    if source:
        raise UltrathinkError(
            f"--resume uses the run's own configuration and takes no other ({source}); give "
            f"changes as key=value, or start a new run from its weights: "
            f"ultrathink train {source} training.init_from={args.resume}"
        )
    return _resume(args.resume, overrides, args.reset, args.json)


def _resume(run: str, overrides: list[str], reset: list[str], as_json: bool) -> int:
    """Resume ``run`` (its name or folder, or RUN@step)."""
    from ultrathink.recipes.parts.resume_plan import plan_resume
    from ultrathink.recipes.resume import build_resumed
    from ultrathink.runs.folder import find_run, split_run

    name, checkpoint = split_run(run)
    plan = plan_resume(find_run(name), checkpoint, overrides=overrides, reset=reset)
    if plan.is_finished:
        plan.release()
        return _report_finished(plan.run.path, plan.step, as_json)
    return _train(partial(build_resumed, plan), as_json)


def _train(make: Any, as_json: bool) -> int:
    from ultrathink.monitoring.preparation import PreparationDisplay
    from ultrathink.training.callbacks import LastReports

    last = LastReports()
    with PreparationDisplay() if _is_main() else nullcontext() as display:
        trainer = make(callbacks=[last], progress=display)
    with _stop_on_signals(trainer) as received:
        trainer.fit()
    if not received:
        _audit_if_asked(trainer)
    result = _result(trainer, last)
    if as_json and _is_main():
        print(json.dumps(result))
    elif _is_main():
        _print_next_steps(trainer, result)
    return 128 + received[0] if received else 0


def _audit_if_asked(trainer: Trainer) -> None:
    """Audit the decisions where the configuration asks for it."""
    from ultrathink.config.schema import Config

    config = Config.model_validate(trainer.config).orchestrator
    if not config.audit or not trainer.run.kept_states() or not _is_main():
        return
    from ultrathink.cli.audit import described
    from ultrathink.recipes.audit import audit_run

    if trainer.world.size > 1:
        print_stderr(f"audit the decisions with one process: ultrathink audit {trainer.run.path}")
        return
    for number, audit in audit_run(trainer.run, report=print_stderr).items():
        print_stderr(described(number, audit))


def _is_main() -> bool:
    """Whether this process prints what happens; of several that train together, one does."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def _stop_on_signals(trainer: Trainer) -> Iterator[list[int]]:
    """End the run after its step on the first Ctrl-C or SIGTERM, and at once on the second.

    A terminal that closes (SIGHUP) counts like SIGTERM, unless it is ignored (nohup).
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        trainer.control.request(Stop(), reason=name)
        text = f"{name}: saving after this step; once more ends the run at once, without saving"
        trainer.notify("on_message", text, "info")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _result(trainer: Trainer, last: Any) -> dict[str, Any]:
    validation, step = last.validation, trainer.progress.step
    assert trainer.ending is not None, "fit() has returned"
    return {
        "run": str(trainer.run.path),
        "ending": trainer.ending.name,
        "reason": trainer.ending.reason,
        "step": step,
        "tokens": trainer.progress.tokens,
        "minutes": round(trainer.clock.elapsed_s / 60, 3),
        "loss": last.step.loss if last.step and last.step.step == step else None,
        "val_loss": validation.loss if validation else None,
        "bits_per_byte": validation.figures.get("bits_per_byte") if validation else None,
        "skipped_steps": trainer.progress.num_skipped,
    }


def _print_next_steps(trainer: Trainer, result: dict[str, Any]) -> None:
    """Print the result, the run folder, and the commands to use next."""
    from ultrathink.monitoring.terminal import error_stream

    run = trainer.run.path
    score = result["bits_per_byte"]
    reached = f", {score:.3f} bits per byte on held-out text" if score is not None else ""
    because = f": {result['reason']}" if result["reason"] else ""
    ended = result["ending"].capitalize()
    if ended != f"Returned to step {result['step']}":
        ended += f" after step {result['step']:,}"
    lines = [
        "",
        f"{ended} ({result['tokens']:,} "
        f"tokens, {result['minutes']:.1f} minutes){reached}{because}.",
        f"Run folder: {run}",
    ]
    assert trainer.ending is not None, "fit() has returned"
    if trainer.ending.can_resume:
        lines.append(f"  resume it:       ultrathink train --resume {run}")
    prompts = trainer.config["training"]["sample"]["prompts"]
    lines.append(f"  let it write:    {generate_command(run, prompts)}")
    lines.append(f"  see how it went: ultrathink report {run}")
    error_stream().write("\n".join(lines) + "\n")


def _report_finished(run: Path, step: int, as_json: bool) -> int:
    if not _is_main():
        return 0
    if as_json:
        from ultrathink.training.endings import FINISHED

        print(json.dumps({"run": str(run), "ending": FINISHED.name, "step": step}))
    else:
        print_stderr(
            f"Run {run} is finished: step {step:,} was its last. To train it longer: "
            f"ultrathink train --resume {run} training.max_steps={2 * step}"
        )
    return 0
