"""From text to batches: how fast it is tokenized, loaded, and how long a step waits for it.

    python benchmarks/data_speed.py
    python benchmarks/data_speed.py --json

Tokenizing is everything between an empty cache and the first batch: reading the text of `stdlib`,
learning the vocabulary, encoding, writing the store. Beside the loader stand two ways that others
go over the same tokens, alternately: random crops of a memory map (nanoGPT's), and a `DataLoader`
over windows.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import config_of
from harness import parser, rows, setting, show, spread, start
from train_speed import SHAPES

from ultrathink import build_trainer
from ultrathink.data.loader import TrainLoader
from ultrathink.data.prepare import PreparedData, prepare_data

STEPS = 40  # timed to see what share of them is waiting


def main() -> None:
    """Time each part and print what came out."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=SHAPES, default="S")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--seconds", type=float, default=0.5, help="of loading in each turn")
    args = options.parse_args()
    shape = {**SHAPES[args.shape], "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        tokenizing = [tokenize(shape, Path(folder) / str(n))[1] for n in range(3)]
        data, _ = tokenize(shape, Path(folder) / "0")
        ways = loaders(data, shape, Path(folder))
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, take in ways.items():
                rates[name].append(tokens_per_second(take, shape, args.seconds))
        waiting = waiting_share(shape, folder)
    result = {
        "benchmark": "data_speed",
        "shape": args.shape,
        "setting": setting(),
        "tokens": sum(store.num_tokens for store in data.train_stores),
        "tokenizing_s": spread(tokenizing),
        "million_tokens_per_second": {
            name: {key: value / 1e6 for key, value in spread(figures).items()}
            for name, figures in rates.items()
        },
        "waiting_share": waiting,
    }
    show(result, describe(result), args.json)


def tokenize(shape: dict[str, Any], cache: Path) -> tuple[PreparedData, float]:
    """The data of ``shape``, and the seconds that it took; an empty ``cache`` is filled."""
    config = config_of(shape, str(cache), f"data.cache_dir={cache}")
    began = time.perf_counter()
    data = prepare_data(config.data, config.tokenizer)
    return data, time.perf_counter() - began


def loaders(
    data: PreparedData, shape: dict[str, Any], folder: Path
) -> dict[str, Callable[[], object]]:
    """By name, what makes the next batch."""
    config = config_of(shape, str(folder))
    size, length = shape["batch_size"], shape["seq_len"]
    ours = TrainLoader(
        data.train_stores,
        data.record.weights,
        seq_len=length,
        batch_size=size,
        packing=config.data.packing,
        seed=0,
    )
    flat = folder / "tokens.bin"
    np.concatenate([store.tokens for store in data.train_stores]).astype(np.uint16).tofile(flat)
    tokens = np.memmap(flat, np.uint16, "r")

    def random_crops() -> torch.Tensor:
        starts = torch.randint(len(tokens) - length - 1, (size,))
        cuts = [tokens[int(start) : int(start) + length + 1].astype(np.int64) for start in starts]
        return torch.stack([torch.from_numpy(cut) for cut in cuts])

    whole = tokens[: len(tokens) // length * length].astype(np.int64)
    windows = torch.utils.data.DataLoader(
        torch.from_numpy(whole).view(-1, length), batch_size=size, shuffle=True
    )
    endless = (batch for _ in iter(int, 1) for batch in windows)
    return {
        "ultrathink": ours.next_batch,
        "random crops": random_crops,
        "DataLoader": lambda: next(endless),
    }


def tokens_per_second(take: Callable[[], object], shape: dict[str, Any], seconds: float) -> float:
    """Tokens that ``take`` gives in ``seconds``, as a rate."""
    began, batches = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        take()
        batches += 1
    return batches * shape["batch_size"] * shape["seq_len"] / (time.perf_counter() - began)


def waiting_share(shape: dict[str, Any], folder: str) -> float:
    """The share of the trainer's steps that passes until their batch is there."""
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    limit = f"training.max_steps={STEPS}"
    trainer = build_trainer(config_of(shape, folder, "training.compile=true", limit))
    waited: list[float] = []
    next_batch = trainer.loader.next_batch

    def timed() -> Any:
        began = time.perf_counter()
        batch = next_batch()
        waited.append(time.perf_counter() - began)
        return batch

    trainer.loader.next_batch = timed  # type: ignore[method-assign]
    seconds: list[float] = []
    trainer.start()
    while trainer.ending is None:
        seconds.append(trainer.train_step().seconds)
        trainer._end_if_over()
    trainer.close()
    return sum(waited[5:]) / sum(seconds[5:])  # without compilation


def describe(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        (f"{name}, million tokens/s", *(f"{rate[key]:.1f}" for key in ("median", "low", "high")))
        for name, rate in result["million_tokens_per_second"].items()
    ]
    taken = result["tokenizing_s"]
    lines.insert(
        0, ("tokenizing stdlib, s", *(f"{taken[key]:.2f}" for key in ("median", "low", "high")))
    )
    return (
        f"shape {result['shape']}, {result['tokens']:,} tokens\n"
        f"{rows(('', 'median', 'low', 'high'), lines)}\n"
        f"a step waits for its batch {result['waiting_share']:.3%} of its time"
    )


if __name__ == "__main__":
    start(main)
