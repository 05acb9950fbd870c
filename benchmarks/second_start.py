"""What a start costs on text that was prepared before: the bytes that it reads, and the seconds.

    python benchmarks/second_start.py
    python benchmarks/second_start.py --size-gb 2 --json

Text of two sizes is written as JSON lines and prepared once, with one token a byte (a vocabulary is
kept, so that learning one is no part of a second start). Then fresh processes prepare it again, by
turns: sources, stores, loader, its probe of the order, and the validation set. They count what they
read, in calls and from the disk (`/proc/self/io`), after the pages of all files were dropped. The
disk takes three times the text, below `--folder`, and gets it back.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import parser, rows, setting, show, spread, start

from ultrathink.config.data import DataConfig
from ultrathink.config.tokenizer import ByteTokenizerConfig
from ultrathink.core.errors import UltrathinkError
from ultrathink.data.loader import TrainLoader
from ultrathink.data.prepare import prepare_data
from ultrathink.data.validation import ValidationSet

SMALL_MB = 2
RACY_S = 2.5  # files that were written less than two seconds before are hashed once more
MAX_SHARE, MAX_EXTRA_S = 0.01, 1.0  # what a second start may read, and take beyond the small one
WORDS = ("the", "of", "a", "step", "model", "data", "learns", "from", "text", "and", "again")


def main() -> None:
    """Prepare both sizes, restart on them, and print what came out."""
    options = parser(__doc__)
    options.add_argument("--size-gb", type=float, default=2.0)
    options.add_argument("--files", type=int, default=20)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--folder", type=Path, help="where text and stores lie meanwhile")
    options.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.start is not None:
        cache = {"cache_dir": str(args.start / "cache")}
        prepare({"train": [{"type": "dummy"}], **cache})  # all is imported now
        text = {"type": "jsonl", "path": str(args.start / "text")}
        print(json.dumps(prepare({"train": [text], **cache})))
        return
    if not Path("/proc/self/io").exists():
        raise UltrathinkError("this benchmark counts in /proc/self/io, which only Linux has.")
    sizes = {"small": SMALL_MB * 10**6, "large": round(args.size_gb * 1e9)}
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folders = {name: Path(place) / name for name in sizes}
        for name, folder in folders.items():
            write_text(folder / "text", sizes[name], args.files)
        time.sleep(RACY_S)
        first = {name: fresh_start(folder) for name, folder in folders.items()}
        again: dict[str, list[dict[str, Any]]] = {name: [] for name in sizes}
        for _ in range(args.rounds):
            for name, folder in folders.items():
                drop_pages(folder)
                again[name].append(fresh_start(folder))
    result = {
        "benchmark": "second_start",
        "setting": setting(),
        "text_bytes": sizes,
        "files": args.files,
        "first_start_s": {name: figures["seconds"] for name, figures in first.items()},
        "seconds": {name: spread([one["seconds"] for one in many]) for name, many in again.items()},
        "bytes_read": {name: max(map(bytes_read, many)) for name, many in again.items()},
    }
    extra_s = result["seconds"]["large"]["median"] - result["seconds"]["small"]["median"]
    share = result["bytes_read"]["large"] / sizes["large"]
    result["gate"] = {
        "share_read": share,
        "extra_s": extra_s,
        "passed": share < MAX_SHARE and extra_s <= MAX_EXTRA_S,
    }
    show(result, describe(result), args.json)


def write_text(folder: Path, num_bytes: int, num_files: int) -> None:
    """About ``num_bytes`` of JSON lines, 2 kB each, no two alike."""
    folder.mkdir(parents=True)
    filler = " ".join(WORDS * 40)[:1960]
    for number in range(num_files):
        with (folder / f"part-{number:05}.jsonl").open("w") as file:
            for line in range(max(1, num_bytes // num_files // 2000)):
                file.write(json.dumps({"text": f"{number:08} {line:08} {filler}"}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def fresh_start(folder: Path) -> dict[str, Any]:
    """What a new process says of its start on the text in ``folder``."""
    command = [sys.executable, __file__, "--start", str(folder)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    figures: dict[str, Any] = json.loads(printed)
    return figures


def prepare(options: dict[str, Any]) -> dict[str, Any]:
    """All that a start does with data; the seconds, and the bytes read meanwhile."""
    config = DataConfig.model_validate(options)
    before, began = counters(), time.perf_counter()
    data = prepare_data(config, ByteTokenizerConfig())
    loader = TrainLoader(
        data.train_stores,
        data.record.weights,
        seq_len=config.seq_len,
        batch_size=32,
        packing=config.packing,
        seed=0,
    )
    loader.order_hash()
    held_out = ValidationSet(data.val_stores, config.seq_len).extent()
    seconds, after = time.perf_counter() - began, counters()
    return {
        "seconds": seconds,
        "called": after["rchar"] - before["rchar"],
        "from_disk": after["read_bytes"] - before["read_bytes"],
        "held_out_bytes": held_out.num_bytes,
        "notes": data.notes,
    }


def counters() -> dict[str, int]:
    """What this process has read: ``rchar`` in calls, ``read_bytes`` from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def bytes_read(figures: dict[str, Any]) -> int:
    """At most what was read: pages of mapped files come from the disk without a call."""
    total: int = figures["called"] + figures["from_disk"]
    return total


def drop_pages(folder: Path) -> None:
    """Have the system forget what it keeps of the files, so that mapped ones are read as well."""
    for path in files_below(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files_below(folder: Path) -> Iterator[Path]:
    """Every file at any depth."""
    return (path for path in folder.rglob("*") if path.is_file())


def describe(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        (
            f"{result['text_bytes'][name]:,} bytes of text",
            f"{result['first_start_s'][name]:.2f}",
            *(f"{result['seconds'][name][key]:.2f}" for key in ("median", "low", "high")),
            f"{result['bytes_read'][name]:,}",
        )
        for name in ("small", "large")
    ]
    gate = result["gate"]
    heading = ("", "first, s", "second, s", "low", "high", "bytes read")
    return (
        f"{rows(heading, lines)}\n"
        f"read again: {gate['share_read']:.3%} of the text (gate: under {MAX_SHARE:.0%}); "
        f"{gate['extra_s']:+.2f} s beyond the small text (gate: {MAX_EXTRA_S:.0f} s)"
    )


if __name__ == "__main__":
    start(main)
