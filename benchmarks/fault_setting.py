"""The size of the benchmark, and the runs that it consists of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fault_injection import drawn_number
from fault_parts import BARE, MODELS, Part, fault_of

from ultrathink.core.errors import UltrathinkError

_BASE = (
    "data.train=[{type: stdlib}]",
    "data.seq_len=128",
    "tokenizer.type=byte",
    "model.hidden_size=64",
    "model.num_layers=2",
    "training.batch_size=8",
    "training.micro_batch_size=8",
    "training.device=cpu",
    "training.compile=false",
    "training.clip=null",
    "training.log_every=1",
    "training.optimizer={type: adamw, lr: 0.005}",
    "training.schedule={type: wsd, warmup: 30, decay: 20%}",
    "training.sample.prompts=[]",
    "monitoring.sinks=[]",
    "orchestrator.mode=off",
)
_EXPERTS = (
    "model.moe.groups=[{name: knowledge, num_experts: 16, top_k: 2}, "
    "{name: skill, num_experts: 8, top_k: 2}, {name: meta, num_experts: 4, top_k: 1}, "
    "{name: safety, num_experts: 4, top_k: 1}]",
    "model.moe.intermediate_size=32",
)


@dataclass(frozen=True)
class Setting:
    """How long everything is. Steps are counted from the beginning of training."""

    snapshot_step: int  # up to here all runs of a seed are one
    end_step: int
    healthy_steps: int  # of all healthy runs of a controller together, at least
    scored_tokens: int  # of the fixed validation set
    validation_every: int  # steps, for the signals
    validation_tokens: int
    overrides: tuple[str, ...] = ()

    def config(self, model: str, num_steps: int) -> list[str]:
        """The overrides of the ``debug`` preset for a run of so many steps."""
        return [
            *_BASE,
            *(_EXPERTS if model == "moe" else ()),
            f"training.max_steps={num_steps}",
            f"training.eval.every_steps={self.validation_every}",
            f"training.eval.max_tokens={self.validation_tokens}",
            *self.overrides,
        ]

    def injection(self, fault: str, seed: int) -> int:
        """The first step that a fault strikes, past the middle of what is trained from the
        snapshot: a guard's window is full by then."""
        length = self.end_step - self.snapshot_step
        spread = max(1, length // 20)
        return self.snapshot_step + 1 + int(0.45 * length) + drawn_number(fault, seed) % spread


FULL = Setting(
    snapshot_step=600,
    end_step=1200,
    healthy_steps=30_000,
    scored_tokens=160_000,
    validation_every=50,
    validation_tokens=16_384,
)
QUICK = Setting(
    snapshot_step=300,
    end_step=600,
    healthy_steps=3_000,
    scored_tokens=160_000,
    validation_every=50,
    validation_tokens=8_192,
)
HEALTHY = ((0.2, "dense"), (0.3, "moe"), (0.5, "dense"))  # runs of several lengths, by share


@dataclass(frozen=True)
class Job:
    """One run: from the start ("snapshot", "healthy"), or from a snapshot ("clean", "fault")."""

    kind: str
    model: str
    seed: int
    num_steps: int  # at which it ends
    controller: Part | None = None
    fault: Part | None = None
    injection: int = 0

    @property
    def label(self) -> str:
        """What the run is called on the console."""
        if self.kind == "snapshot":
            return f"snapshot of {self.model}, seed {self.seed}"
        assert self.controller is not None
        what = self.fault.name if self.fault is not None else f"{self.kind} {self.model}"
        return f"{what}, {self.controller.name}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Where its results are kept, under the benchmark's folder."""
        if self.kind == "snapshot":
            return f"snapshots/{self.model}-seed{self.seed}"
        assert self.controller is not None
        what = self.fault.name if self.fault is not None else f"{self.kind}-{self.model}"
        length = f"-{self.num_steps}" if self.kind == "healthy" else ""
        return f"runs/{what}/{self.controller.name}-seed{self.seed}{length}"

    @property
    def sources(self) -> list[str | None]:
        """The hashes of the files that it is made of: with others it is another run."""
        return [part.sha256 if part is not None else None for part in (self.controller, self.fault)]


def plan(
    setting: Setting, faults: Iterable[Part], controllers: Sequence[Part], seeds: Sequence[int]
) -> list[Job]:
    """Every run of the benchmark, each after those that it needs."""
    classes = {part: fault_of(Path(part.file)) for part in faults}
    models = [name for name in MODELS if name in {fault.model for fault in classes.values()}]
    end = setting.end_step
    snapshots = [Job("snapshot", model, seed, end) for seed in seeds for model in models]
    clean = [
        Job("clean", model, seed, end, controller)
        for seed in seeds
        for controller in controllers
        for model in models
    ]
    struck = [
        Job("fault", cls.model, seed, end, controller, part, setting.injection(part.name, seed))
        for seed in seeds
        for part, cls in classes.items()
        for controller in controllers
    ]
    healthy = [
        Job(
            "healthy",
            model if model in models else models[0],
            1000 + number,
            -int(-share * setting.healthy_steps // 1),
            controller,
        )
        for controller in controllers
        for number, (share, model) in enumerate(HEALTHY)
        if setting.healthy_steps
    ]
    bare_first = sorted([*clean, *struck], key=lambda job: (job.seed, _name(job) != BARE))
    return [*snapshots, *bare_first, *healthy]


def _name(job: Job) -> str:
    return job.controller.name if job.controller is not None else ""


def keep_setting(out: Path, setting: Setting) -> None:
    """Let ``out`` hold results of ``setting`` only; UltrathinkError where it holds others."""
    file = out / "setting.json"
    plain = json.loads(json.dumps(asdict(setting)))
    if file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))
        differing = [key for key in plain if there.get(key) != plain[key]]
        if differing:
            key = differing[0]
            raise UltrathinkError(
                f"{out} holds results with {key} = {there.get(key)}, and now it is {plain[key]}; "
                f"give another folder with --out."
            )
        return
    if out.exists() and any(out.iterdir()):
        raise UltrathinkError(f"{out} is not empty and holds no results; give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(plain), encoding="utf-8")
