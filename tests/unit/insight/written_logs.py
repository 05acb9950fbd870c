"""Known series, written as ten trainers write them, and what happens to logs on their way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Record = dict[str, float]  # of a step: "step", and some of SIGNALS
Series = dict[str, dict[int, float]]  # signal -> step -> value
SIGNALS = ("loss", "val_loss", "lr", "grad_norm")
PREFIXES = (
    "2026-01-02 03:04:05,678 - INFO - trainer - ",
    "[2026-01-02 03:04:05] [INFO] [train.py:55] ",
    "2026-01-02T03:04:05.678Z INFO trainer | ",
    "INFO:root:",
    "\x1b[32m[rank0]:\x1b[0m ",
    "0: ",
)


def records(run: int = 0, *, every: int = 10, val: int = 100, other: int = 10) -> list[Record]:
    """A run of 300 steps, with a loss at every tenth, and the rest as seldom as is said."""
    found: list[Record] = []
    for step in range(every, 301, every):
        loss = round(2 + 2 * math.exp(-step / 100) + 0.02 * math.sin(step) + 0.3 * run, 4)
        row: Record = {"step": step, "loss": loss}
        if step % other == 0:
            row |= {"lr": round(1e-3 * step / 300, 7), "grad_norm": round(1 + 1 / (step + run), 4)}
        found.append(row)
        if step % val == 0:
            found.append({"step": step, "val_loss": round(loss + 0.1234, 4)})
    return found


def series(
    rows: Sequence[Record], only: Sequence[str] = SIGNALS, *, counts: bool = False
) -> Series:
    """What a reader should find; the rows with a loss are its steps where it has to count them."""
    found: Series = {}
    number = 0
    for row in rows:
        number += "loss" in row
        step = number if counts else int(row["step"])
        for signal in only:
            if signal in row:
                found.setdefault(signal, {})[step] = row[signal]
    return found


def _some(row: Record, *parts: tuple[str, str]) -> list[str]:
    """The parts of a line, each with the signal that it shows, of which the row has figures."""
    return [text.format(row[signal]) for signal, text in parts if signal in row]


def trainer_state(rows: Sequence[Record]) -> list[str]:
    names = {"val_loss": "eval_loss", "lr": "learning_rate"}
    history = [
        {"epoch": row["step"] / 100, **{names.get(k, k): v for k, v in row.items()}} for row in rows
    ]
    state = {"global_step": 300, "max_steps": 300, "log_history": history}
    return json.dumps(state, indent=1).splitlines()


def printed_dictionaries(rows: Sequence[Record]) -> list[str]:
    names = {"val_loss": "eval_loss", "lr": "learning_rate", "step": "epoch"}
    return [
        str({names.get(k, k): v / 100 if k == "step" else v for k, v in sorted(row.items())})
        for row in rows
    ]


def nano_gpt(rows: Sequence[Record]) -> list[str]:
    lines = []
    for row in rows:
        parts = _some(row, ("loss", "loss {}"), ("lr", "lr {:.6e}"), ("grad_norm", "grad_norm {}"))
        step = int(row["step"])
        if "val_loss" in row:
            lines.append(f"step {step}: train loss 1.2345, val loss {row['val_loss']}")
        else:
            lines.append(f"iter {step}: {', '.join([*parts, 'time 123.45ms', 'mfu 12.3%'])}")
    return lines


def llm_c(rows: Sequence[Record]) -> list[str]:
    lines = []
    for row in rows:
        parts = _some(
            row, ("loss", "loss {:10.6f} (+0.12z)"), ("grad_norm", "norm {:7.4f} (-1.00z)"),
            ("lr", "lr {:.6e}"),
        )  # fmt: skip
        rest = "36.50 ms | 9.2% bf16 MFU | 112241 tok/s"
        head = f"step {int(row['step']):4d}/300 | {'| '.join(parts)} | {rest}"
        lines.append(f"val loss {row['val_loss']:.6f}" if "val_loss" in row else head)
    return lines


def megatron(rows: Sequence[Record]) -> list[str]:
    lines = []
    for row in rows:
        step = int(row["step"])
        parts = _some(
            row, ("lr", "learning rate: {:.6E}"), ("loss", "lm loss: {:.6E}"),
            ("grad_norm", "grad norm: {:.4f}"),
        )  # fmt: skip
        if "val_loss" in row:
            value = row["val_loss"]
            for name, loss in (("validation", value), ("test", value + 1)):
                lines.append(
                    f" {name} loss at iteration {step} on {name} set | lm loss value: {loss:.6E} "
                    f"| lm loss PPL: {math.exp(loss):.6E} | "
                )
        else:
            lines.append(
                f" iteration {step:8d}/     300 | consumed samples: {8 * step} | elapsed time per "
                f"iteration (ms): 865.4 | {' | '.join(parts)} | loss scale: 1.0 | number of "
                f"skipped iterations:   0 | number of nan iterations:   0 |"
            )
    return lines


def deepspeed(rows: Sequence[Record], rank: int = 0) -> list[str]:
    lines = []
    stamp = "[2026-01-02 03:04:05,678] [INFO]"
    for row in rows:
        step = int(row["step"])
        if "val_loss" in row:
            lines.append(f"ppl: {math.exp(row['val_loss'])!r}")
        if "lr" in row:
            lines.append(
                f"{stamp} [logging.py:96:log_dist] [Rank {rank}] step={step}, skipped=0, "
                f"lr=[{row['lr']}, {row['lr']}], mom=[(0.9, 0.95), (0.9, 0.95)]"
            )
        if "loss" in row:
            lines.append(f"Epoch: 0, Step: {step}, Rank: {rank}, loss = {row['loss']}")
    return lines


def torchtune(rows: Sequence[Record]) -> list[str]:
    bars = [
        f"{1 + step // 150}|{step}|Loss: {row['loss']}: {step % 150:3d}%|██   | {step % 150}/150 "
        f"[00:01<01:00,  1.10it/s]"
        for row in rows
        if "loss" in row and (step := int(row["step"]))
    ]
    return ["\r" + "\r".join(bars)]


def lightning(rows: Sequence[Record]) -> list[str]:
    """A mean over the epoch stands in another column, at a step that has a loss as well."""
    lines = ["epoch,grad_norm,lr,step,train_loss_epoch,train_loss_step,val_loss"]
    for row in rows:
        cells = [str(row.get(k, "")) for k in ("grad_norm", "lr", "step", "loss", "val_loss")]
        lines.append(f"0,{cells[0]},{cells[1]},{cells[2]},,{cells[3]},{cells[4]}")
        if "val_loss" in row:
            lines.append(f"0,,,{cells[2]},9.87,,")
    return lines


def json_lines(rows: Sequence[Record]) -> list[str]:
    return [json.dumps(row) for row in rows]


def table(rows: Sequence[Record]) -> list[str]:
    columns = ("step", *SIGNALS)
    return ["\t".join(columns)] + ["\t".join(str(row.get(k, "")) for k in columns) for row in rows]


@dataclass(frozen=True)
class Format:
    write: Callable[..., list[str]]
    signals: tuple[str, ...] = SIGNALS
    counts: bool = False  # the lines have no step
    has_all: bool = False  # figures of a record, also its rank


FORMATS = {
    "trainer_state.json": Format(trainer_state, has_all=True),
    "printed dictionaries": Format(printed_dictionaries, counts=True),
    "nanoGPT": Format(nano_gpt),
    "llm.c": Format(llm_c),
    "Megatron": Format(megatron),
    "DeepSpeed": Format(deepspeed, ("loss", "val_loss", "lr")),
    "torchtune": Format(torchtune, ("loss",)),
    "Lightning": Format(lightning),
    "lines of JSON": Format(json_lines, has_all=True),
    "TSV": Format(table),
}
