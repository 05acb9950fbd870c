"""What watching and steering cost, beside the time of the steps.

    python benchmarks/watch_cost.py
    python benchmarks/watch_cost.py --preset demo-moe --steps 200 --json

A run of the preset is trained for so many steps with ``orchestrator.mode=act``, and within it the
clock is read before and after the watcher sees a step, around the norms by layer, which are taken
where a step is logged, and around what acting adds: the guard's verdict, the policy, and the
snapshots, which are taken every ``orchestrator.snapshots.every_steps``.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from harness import parser, rows, setting, show, start


def main() -> None:
    """Train, and print the median of a step and what watching adds to it."""
    options = parser(__doc__)
    options.add_argument("--preset", default="demo")
    options.add_argument("--steps", type=int, default=150)
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    args = options.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    result = {
        "benchmark": "watch_cost",
        "preset": args.preset,
        "setting": setting(),
        **measure(args.preset, args.steps, args.set),
    }
    show(result, describe(result), args.json)


def measure(preset: str, num_steps: int, overrides: list[str]) -> dict[str, Any]:
    """Milliseconds: the median step, the watcher's at a step, the norms' at a logged step."""
    from ultrathink import build_trainer, load_config, orchestrator_of
    from ultrathink.orchestrator.live import LiveWatch

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            preset,
            [
                f"run.dir={folder}",
                f"training.max_steps={num_steps}",
                "training.eval.every_steps=null",
                "training.eval.max_tokens=4096",
                "training.checkpoint.every_minutes=null",
                "training.sample.prompts=[]",
                "monitoring.sinks=[jsonl]",
                "orchestrator.mode=act",
                *overrides,
            ],
        )
        trainer = build_trainer(config)
        (watch,) = [part for part in trainer.callbacks if isinstance(part, LiveWatch)]
        seen: list[float] = []
        norms: list[float] = []
        steps: list[float] = []
        acting: list[float] = []
        copying: list[float] = []
        steering = orchestrator_of(trainer)
        steering.at_boundary = timed(steering.at_boundary, acting)  # type: ignore[method-assign]
        steering.outliers.judge = timed(steering.outliers.judge, acting)  # type: ignore[method-assign]
        states = trainer.snapshots.states
        states.take = timed(states.take, copying)  # type: ignore[method-assign]
        observe, layers = watch.on_step, trainer.stepper.layer_norms

        def on_step(report: Any) -> None:
            began = time.perf_counter()
            observe(report)
            seen.append(time.perf_counter() - began)
            steps.append(report.seconds)

        watch.on_step = on_step  # type: ignore[method-assign]
        layers.before_update = timed(layers.before_update, norms)  # type: ignore[method-assign]
        layers.after_update = timed(layers.after_update, norms)  # type: ignore[method-assign]
        trainer.fit()
    tail = slice(num_steps // 3, None)  # windows fill, and compilation is over
    step, watching = statistics.median(steps[tail]), statistics.mean(seen[tail])
    logged = sum(norms) / max(1, len(norms) // 2)
    added = watching + logged / config.training.log_every
    deciding = sum(acting[len(acting) // 3 :]) / len(steps[tail])
    copies = statistics.median(copying)
    every = config.orchestrator.snapshots.every_steps
    return {
        "step_ms": 1e3 * step,
        "watcher_ms": 1e3 * watching,
        "norms_ms": 1e3 * logged,
        "share": added / step,
        "policy_ms": 1e3 * deciding,
        "snapshot_ms": 1e3 * copies,
        "share_acting": (added + deciding + copies / every) / step,
    }


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """``function``, its time appended to ``seconds``."""

    def call(*arguments: Any) -> Any:
        began = time.perf_counter()
        answer = function(*arguments)
        seconds.append(time.perf_counter() - began)
        return answer

    return call


def describe(result: dict[str, Any]) -> str:
    """The result as a table."""
    names = ("step_ms", "watcher_ms", "norms_ms", "policy_ms", "snapshot_ms")
    line = [f"{result[name]:.3f}" for name in names]
    header = (
        "preset",
        "step, ms",
        "watcher, ms a step",
        "norms, ms a logged step",
        "policy, ms a step",
        "ms a snapshot",
        "watching",
        "acting",
    )
    shares = (f"{result['share']:.2%}", f"{result['share_acting']:.2%}")
    return rows(header, [(result["preset"], *line, *shares)])


if __name__ == "__main__":
    start(main)
