"""Runs the same training in fresh processes and says where one bit differs.

    python -m tests.stress.determinism            a few kinds of training, some minutes
    python -m tests.stress.determinism --full     all of them, each three times

The second process of a kind finds the compiled code of the first; the third (``--full``) compiles
again while other processes keep the cores busy.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.stress.evidence import differences
from tests.stress.process import ultrathink

THREADS = 2
SMALL = (
    "train",
    "debug",
    "training.deterministic=true",
    "training.max_steps=8",
    "training.log_every=1",
    "training.eval.every_steps=3",
    "training.sample.prompts=[]",
    "monitoring.sinks=[jsonl]",
    # Large enough that torch shares the work of every kind of kernel out to its threads.
    "model={hidden_size: 128, num_layers: 1, num_heads: 4, num_kv_heads: 2}",
    "data.seq_len=128",
    "training.batch_size=8",
)
_BUSY = "while True: pass"


def train(place: Path, words: Sequence[str], *, compiled_code: Path, threads: int) -> Path:
    """One training in a process of its own that works in ``place``; its run folder."""
    place.mkdir(parents=True)
    done = ultrathink(
        place,
        *SMALL,
        *words,
        ULTRATHINK_CACHE=str(compiled_code.parent / "cache"),
        TORCHINDUCTOR_CACHE_DIR=str(compiled_code),
        OMP_NUM_THREADS=str(threads),
        OMP_WAIT_POLICY="passive",  # threads that spin stand still on a shared core
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr}")
    return place / "runs" / "debug"


def repeat(
    folder: Path, words: Sequence[str], *, threads: int = THREADS, under_load: bool = False
) -> list[str]:
    """Train twice or, ``under_load``, three times below ``folder``; where the runs differ."""
    first = train(folder / "1", words, compiled_code=folder / "compiled", threads=threads)
    second = train(folder / "2", words, compiled_code=folder / "compiled", threads=threads)
    found = differences(first, second)
    if under_load:
        with busy_cores():
            third = train(folder / "3", words, compiled_code=folder / "again", threads=threads)
        found += [f"under load: {text}" for text in differences(first, third)]
    return found


@contextmanager
def busy_cores() -> Iterator[None]:
    """A process that never rests on every second core, so that threads meet in another order."""
    count = max(1, (os.cpu_count() or 2) // 2)
    burners = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def kinds(full: bool) -> dict[str, tuple[str, ...]]:
    """Overrides by the name of a kind of training."""
    found: dict[str, tuple[str, ...]] = {}
    for compiled, precision, optimizer, workers in itertools.product(
        (False, True), ("fp32", "bf16"), ("adamw", "muon"), (0, 2)
    ):
        name = f"{'compiled' if compiled else 'eager'} {precision} {optimizer} {workers} workers"
        found[name] = (
            f"training.compile={str(compiled).lower()}",
            f"training.precision={precision}",
            f"training.optimizer.type={optimizer}",
            f"data.num_workers={workers}",
        )
    if not full:
        few = ("eager fp32 adamw 0 workers", "eager bf16 muon 2 workers")
        return {name: found[name] for name in (*few, "compiled bf16 muon 0 workers")}
    for compiled in (False, True):
        for name, words in _PARTS.items():
            base = f"training.compile={str(compiled).lower()}"
            found[f"{'compiled' if compiled else 'eager'} {name}"] = (base, *words)
    found["auto everywhere"] = ("training.precision=auto", "training.compile=auto")
    return found


_PARTS = {
    "dropout": ("model.dropout=0.1", "training.precision=bf16"),
    "sdpa": ("model.attention.backend=sdpa", "training.precision=bf16"),
    "sdpa with documents": ("model.attention.backend=sdpa", "training.batch_size=4"),
    "eager attention": ("model.attention.backend=eager", "training.precision=bf16"),
    "z-loss, QK-norm, own head": (
        "model.z_loss=1.0e-4",
        "model.qk_norm=true",
        "model.tie_embeddings=false",
    ),
    "micro-batches": ("training.micro_batch_size=2", "training.precision=bf16"),
    "recomputed activations": ("training.activation_checkpointing=full", "model.dropout=0.1"),
    "a mixture": ("data.train=[{type: dummy, weight: 3}, {type: dummy, seed: 7}]",),
    "unpacked": ("data.packing.enabled=false",),
    "fp64": ("training.precision=fp64",),
}


def main() -> int:
    """Say for each kind whether all its bits were equal; 1 where they were not."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--full", action="store_true", help="all kinds, each three times")
    parser.add_argument("--threads", type=int, default=THREADS, help="threads of each process")
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    args = parser.parse_args()
    failed = 0
    for name, words in kinds(args.full).items():
        if args.only not in name:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = repeat(Path(folder), words, threads=args.threads, under_load=args.full)
        verdict = "equal" if not found else "DIFFERENT"
        print(f"{verdict:<9}  {time.monotonic() - began:5.0f} s  {name}", flush=True)
        for text in found[:5]:
            print(f"           {text}")
        failed += bool(found)
    print(f"{failed} kinds differ" if failed else "all bits were equal")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
