"""``ultrathink train``: a new run from a configuration, or the continuation of one."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ultrathink.cli.arguments import (
    add_config_arguments,
    load_plugins,
    split_config_and_overrides,
)
from ultrathink.config import load_config
from ultrathink.core.errors import UltrathinkError

if TYPE_CHECKING:
    from ultrathink.training.trainer import Trainer

_EPILOG = """examples:
  ultrathink train                                   five minutes on Python's own source
  ultrathink train debug                             twenty tiny steps, to see that all works
  ultrathink train my.yaml training.max_steps=1000   a file of yours, one value changed
  ultrathink train 'data.train=[{type: text, path: books/}]' run.name=books
  ultrathink train --resume auto                     go on with the newest run
  ultrathink train --resume demo@500                 ... from its checkpoint of step 500
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ultrathink train``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with a run: its name or folder, RUN@step, or auto for the newest",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object on stdout"
    )


def run(args: argparse.Namespace) -> int:
    """Train; returns 0 at the end of a run, 128 plus the signal's number where one stopped it."""
    load_plugins(args)
    source, overrides = split_config_and_overrides(args.positionals)
    if args.resume is None:
        config = load_config(source, overrides)  # mistakes are told before torch is imported
        return _train(lambda **options: _new_trainer(config, **options), args.json)
    if overrides or source:
        raise UltrathinkError(
            f"--resume goes on with the run's own configuration and takes no other "
            f"({' '.join(args.positionals)}); for a new run with its weights use: "
            f"ultrathink train CONFIG training.init_from={args.resume}"
        )
    from ultrathink.recipe.resume import finished_step
    from ultrathink.runs.folder import find_run, split_run

    name, checkpoint = split_run(args.resume)
    folder = find_run(name)
    step = finished_step(folder, checkpoint)
    if step is not None:
        return _say_finished(folder.path, step, args.json)
    return _train(lambda **options: _resumed_trainer(folder, checkpoint, **options), args.json)


def _new_trainer(config: Any, **options: Any) -> Trainer:
    from ultrathink.recipe.build import build_trainer

    return build_trainer(config, **options)


def _resumed_trainer(folder: Any, checkpoint: str, **options: Any) -> Trainer:
    from ultrathink.recipe.build import resume_trainer

    return resume_trainer(folder, checkpoint, **options)


def _train(make: Any, as_json: bool) -> int:
    from ultrathink.monitoring.preparation import PreparationDisplay
    from ultrathink.training.callbacks import LastReports

    last = LastReports()
    with PreparationDisplay() as display:
        trainer = make(callbacks=[last], progress=display)
    with _stop_on_signals(trainer) as received:
        trainer.fit()
    result = _result(trainer, last)
    if as_json:
        print(json.dumps(result))
    else:
        _say_what_next(trainer, result)
    return 128 + received[0] if received else 0


@contextmanager
def _stop_on_signals(trainer: Trainer) -> Iterator[list[int]]:
    """Let the first Ctrl-C or SIGTERM end the run after its step; the second ends it at once."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        trainer.control.stop(reason=name)
        told = f"{name}: saving after this step; once more ends it at once, without saving"
        trainer.notify("on_message", told, "info")

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _result(trainer: Trainer, last: Any) -> dict[str, Any]:
    validation = last.validation
    return {
        "run": str(trainer.run.path),
        "ending": trainer.ending,
        "step": trainer.progress.step,
        "tokens": trainer.progress.tokens,
        "minutes": round(trainer.elapsed_s() / 60, 3),
        "loss": last.step.loss if last.step else None,
        "val_loss": validation.loss if validation else None,
        "bits_per_byte": validation.bits_per_byte if validation else None,
        "skipped_steps": trainer.progress.num_skipped,
    }


def _say_what_next(trainer: Trainer, result: dict[str, Any]) -> None:
    """End with what came out, where it lies, and the commands to go on with."""
    run = trainer.run.path
    words = {
        "finished": "Finished",
        "out of time": "Time is up",
        "stopped": "Stopped and saved",
    }[result["ending"]]
    score = result["bits_per_byte"]
    reached = f", {score:.3f} bits per byte on held-out text" if score is not None else ""
    lines = [
        "",
        f"{words} after step {result['step']:,} ({result['tokens']:,} tokens, "
        f"{result['minutes']:.1f} minutes){reached}.",
        f"Run folder: {run}",
    ]
    if result["ending"] == "stopped":
        lines.append(f"  go on with it:   ultrathink train --resume {run}")
    lines.append(f'  let it write:    ultrathink generate {run} "import "')
    if (run / "tensorboard").is_dir():
        lines.append(f"  see its curves:  tensorboard --logdir {run / 'tensorboard'}")
    print("\n".join(lines), file=sys.stderr)


def _say_finished(run: Path, step: int, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"run": str(run), "ending": "finished", "step": step}))
    else:
        print(
            f"Run {run} is finished: step {step:,} was its last. To train further from its "
            f"weights: ultrathink train CONFIG training.init_from={run}",
            file=sys.stderr,
        )
    return 0
