"""The same run on one process and on many: losses, gradient norms and weights compared.

    python -m tests.stress.parity            every mesh, in fp64 and fp32: some minutes
    python -m tests.stress.parity --quick    two processes only

In fp64 six steps must agree to 1e-9, in fp32 three steps to 1e-5, with clipping, accumulation,
masked tokens and activation checkpointing. Muon, which computes in bf16 beside fp32, is compared in
fp64 only. Ends with status 1 where one does not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.stress.evidence import rows
from tests.stress.process import ultrathink
from ultrathink.checkpoint.format import load_checkpoint


@dataclass(frozen=True)
class Mesh:
    """How many processes, and the overrides that spread a run over them."""

    num_processes: int
    replicate: int
    stage: int

    @property
    def name(self) -> str:
        if self.num_processes == self.replicate:
            return f"ddp {self.replicate}"
        kind = f"zero {self.stage}" if self.replicate == 1 else f"hybrid, zero {self.stage}"
        return f"{kind}, {self.replicate} x {self.num_processes // self.replicate}"

    @property
    def overrides(self) -> list[str]:
        return [f"parallel.dp_replicate={self.replicate}", f"parallel.zero_stage={self.stage}"]


MESHES = [
    Mesh(2, 2, 3),
    Mesh(2, 1, 1),
    Mesh(2, 1, 2),
    Mesh(2, 1, 3),
    Mesh(4, 2, 3),
    Mesh(4, 2, 2),
    Mesh(4, 2, 1),
    Mesh(4, 4, 3),
    Mesh(4, 1, 3),
]
# How a run may differ beside its mesh, each as overrides of `debug`.
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "accumulation": ["training.micro_batch_size=1"],
    "checkpointing": ["training.activation_checkpointing=full", "training.micro_batch_size=1"],
    "selective": ["training.activation_checkpointing=selective"],
    "muon": ["training.optimizer={type: muon, lr: 0.01}", "model.tie_embeddings=false"],
    "z-loss": ["model.z_loss=0.001", "model.qk_norm=true"],
}
COMMON = [
    "training.clip=0.5",
    "training.log_every=1",
    "training.schedule={type: wsd, warmup: 2}",
    "data.train=[{type: dummy, num_documents: 60, num_words: 40}]",
    "training.sample.prompts=[]",
    "monitoring.sinks=[jsonl]",
]
STEPS = {"fp64": 6, "fp32": 3}
LIMITS = {"fp64": 1e-9, "fp32": 1e-5}
# Muon's products are in bf16 where weights are in fp32: the last bit of a sum may turn into the
# last of bf16's eight, so there is no fp32 to compare.
ONLY_FP64 = ("muon",)


def train(place: Path, name: str, words: Sequence[str], num_processes: int) -> Path:
    """Run ``ultrathink`` on so many processes; returns the run folder."""
    command = ["train", "debug"]
    if num_processes > 1:
        command = ["launch", "--nproc", str(num_processes), "debug"]
    done = ultrathink(place, *command, *COMMON, *words, f"run.name={name}")
    if done.returncode:
        raise SystemExit(f"{name} ended with status {done.returncode}:\n{done.stderr}")
    return place / "runs" / name


def largest_difference(reference: Path, other: Path) -> float:
    """Over the logged losses and norms (relative to their size) and every weight (absolute)."""
    here, there = rows(reference), rows(other)
    assert [row["step"] for row in here] == [row["step"] for row in there]
    worst = 0.0
    for a, b in zip(here, there, strict=True):
        for key in ("loss", "grad_norm"):
            if key in a:
                worst = max(worst, abs(a[key] - b[key]) / max(1.0, abs(a[key])))
    weights: Any = load_checkpoint(reference / "checkpoints" / "last")["model"]
    others: Any = load_checkpoint(other / "checkpoints" / "last")["model"]
    assert list(weights) == list(others)
    return max(worst, *(float((weights[name] - others[name]).abs().max()) for name in weights))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two processes, fp64 only")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args()
    meshes = [mesh for mesh in MESHES if mesh.num_processes == 2] if args.quick else MESHES
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for precision in ["fp64"] if args.quick else ["fp64", "fp32"]:
            for variant in args.only:
                if precision == "fp32" and variant in ONLY_FP64:
                    continue
                words = [
                    *VARIANTS[variant],
                    f"training.precision={precision}",
                    f"training.max_steps={STEPS[precision]}",
                ]
                reference = train(place, f"{precision}-{variant}-one", words, 1)
                for mesh in meshes:
                    name = f"{precision}-{variant}-{mesh.name}".replace(" ", "").replace(",", "-")
                    run = train(place, name, [*words, *mesh.overrides], mesh.num_processes)
                    worst = largest_difference(reference, run)
                    holds = worst <= LIMITS[precision]
                    failures += not holds
                    reported = "" if holds else f"  FAILED: above {LIMITS[precision]:g}"
                    print(
                        f"{precision}  {variant:<13}  {mesh.name:<20}  {worst:.1e}{reported}",
                        flush=True,
                    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
