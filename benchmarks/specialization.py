"""Whether experts know where a text comes from, and what a group is worth for a text.

    python benchmarks/specialization.py runs/demo-moe
    python benchmarks/specialization.py runs/demo-moe --shuffles 200 --json
    python benchmarks/specialization.py --data FOLDER
    python benchmarks/specialization.py --ways gates targets --seeds 0 --steps 200 --json

Of a finished run: the sources are the packages of Python's standard library with the most files, as
many files of each. Each file goes through the model by itself. For each group of experts and each
layer, tokens are counted by their file's package and by the experts they are sent to; printed is
the normalized mutual information I(S; E) / sqrt(H(S) H(E)), mean over layers. With labels shuffled
among files it is what chance would give: its mean and its highest value are beside it, and how many
standard deviations lie between.

Without a run, small models are trained on four sources, each the text of one group
(``named_experts.py``), in three ways: groups without weights, with learned weights
(``model.moe.group_gates``), and with weights that are taught (``data.train[].groups``). Then each
group is switched off by its path. Printed is what that costs each source in held-out loss, and the
lead: how many times the next of its row and column the diagonal is, at worst. Beside it are the
measures of OLMoE (``routing_measures.py``).
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from argparse import Namespace
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import named_experts
import numpy as np
import torch
from harness import parser, rows, setting, show, start

from ultrathink import load_model
from ultrathink.config.data import StdlibSourceConfig
from ultrathink.core.errors import UltrathinkError
from ultrathink.data.sources.stdlib import StdlibSource
from ultrathink.runs.folder import find_run

WANTED_LEAD, MOST_COST = 1.5, 0.005  # of targets: the diagonal, and the share of the loss


def main() -> None:
    """Measure a run, or train models and measure them."""
    options = parser(__doc__)
    options.add_argument("run", nargs="?", help="a run, or its folder, of a model with experts")
    options.add_argument("--packages", type=int, default=8, help="how many, the largest")
    options.add_argument("--files", type=int, default=16, help="of each package")
    options.add_argument("--max-tokens", type=int, default=1024, help="of each file")
    options.add_argument("--shuffles", type=int, default=100)
    trained = options.add_argument_group("without a run")
    trained.add_argument("--data", type=Path, default=Path(named_experts.FOLDER), help="the texts")
    trained.add_argument("--ways", nargs="*", default=list(named_experts.WAYS), metavar="WAY")
    trained.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    trained.add_argument("--steps", type=int, default=600)
    trained.add_argument("--held-out", type=int, default=16384, help="tokens of each source")
    trained.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all models")
    args = options.parse_args()
    result = of_training(args) if args.run is None else of_run(args)
    table = describe_training(result) if args.run is None else describe(result)
    show(result, table, args.json)


def of_run(args: Namespace) -> dict[str, Any]:
    """Route the files and count what their routes tell of their packages."""
    model, tokenizer = load_model(args.run)
    if not model.expert_layers():
        raise UltrathinkError(f"{args.run} has no experts; give a run with model.moe.")
    seq_len = find_run(args.run).read_config().data.seq_len
    documents = largest_packages(args.packages, args.files)
    loads = [
        expert_loads(model, tokenizer.encode(text)[: args.max_tokens], seq_len)
        for _, text in documents
    ]
    labels = [package for package, _ in documents]
    router = next(iter(model.expert_layers().values())).router
    groups = {group.name: slots for group, slots in router.groups()}
    return {
        "benchmark": "specialization",
        "run": Path(args.run).name,
        "setting": setting(),
        "files": len(documents),
        "tokens": int(sum(load[0, groups[next(iter(groups))]].sum() for load in loads)),
        "packages": dict(Counter(labels)),
        "groups": {
            name: measure([load[:, slots] for load in loads], labels, args.shuffles)
            for name, slots in groups.items()
        },
    }


def of_training(args: Namespace) -> dict[str, Any]:
    """Train a model of each way and seed, and measure it."""
    for way in args.ways:
        if way not in named_experts.WAYS:
            known = ", ".join(named_experts.WAYS)
            raise UltrathinkError(f"--ways {way}: no such way of training; known: {known}.")
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory() as folder:
        sources = named_experts.prepare(args.data, Path(folder))
        for seed in args.seeds:
            for way in args.ways:
                to, overrides = Path(folder) / "runs", [f"run.seed={seed}", *args.set]
                one = named_experts.examine(way, sources, to, args.steps, args.held_out, overrides)
                found[way].append(one)
                said = f"{way}, seed {seed}: loss {one['loss']:.4f}, lead {one['lead']:.2f}"
                print(said, file=sys.stderr, flush=True)
    result = {
        "benchmark": "specialization",
        "setting": setting(),
        "steps": args.steps,
        "seeds": args.seeds,
        "sources": list(named_experts.GROUPS),
        "ways": found,
    }
    if "targets" in found:
        result["gate"] = gate(found)
    return result


def gate(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Whether targets do what they should in every seed, and what they cost in loss."""
    leads = [one["lead"] for one in found["targets"]]
    costs = {
        f"cost_beside_{way}": statistics.mean(
            taught["loss"] / other["loss"] - 1
            for taught, other in zip(found["targets"], found[way], strict=True)
        )
        for way in ("plain", "gates")
        if way in found
    }
    holds = min(leads) >= WANTED_LEAD and all(cost <= MOST_COST for cost in costs.values())
    return {"lead": min(leads), **costs, "holds": holds}


def largest_packages(num_packages: int, num_files: int) -> list[tuple[str, str]]:
    """Package and text of the largest files of the packages with the most files."""
    found: dict[str, list[str]] = defaultdict(list)
    for document in StdlibSource(StdlibSourceConfig()).documents("all"):
        package, *rest = Path(document.id).parts
        if rest:  # a module by itself is no package
            found[package].append(document.text)
    largest = sorted(found, key=lambda package: -len(found[package]))[:num_packages]
    return [
        (package, text)
        for package in largest
        for text in sorted(found[package], key=len)[-num_files:]
    ]


@torch.no_grad()
def expert_loads(model: Any, tokens: list[int], seq_len: int) -> Any:
    """Tokens sent to each expert in each layer, ``[L, E]``."""
    total: Any = 0
    for begin in range(0, len(tokens), seq_len):
        ids = torch.tensor([tokens[begin : begin + seq_len]])
        total = total + model(ids).stats["expert_load"].double().numpy()
    return total


def measure(loads: list[Any], labels: list[str], shuffles: int) -> dict[str, float]:
    """The normalized mutual information of one group, and what shuffled labels give."""
    random = np.random.default_rng(0)
    found = information(loads, labels)
    chance = [information(loads, list(random.permutation(labels))) for _ in range(shuffles)]
    spread = statistics.stdev(chance)
    return {
        "information": found,
        "by_chance": statistics.mean(chance),
        "highest_by_chance": max(chance),
        "deviations": (found - statistics.mean(chance)) / spread if spread else math.inf,
    }


def information(loads: list[Any], labels: list[str]) -> float:
    """I(S; E) / sqrt(H(S) H(E)) of tokens counted by source and expert, mean over layers."""
    names = sorted(set(labels))
    table = np.stack(
        [
            sum(load for load, label in zip(loads, labels, strict=True) if label == name)
            for name in names
        ],
        axis=1,
    )  # [L, S, n]
    return statistics.mean(_normalized(layer) for layer in table)


def _normalized(counts: Any) -> float:
    joint = counts / counts.sum()
    rows_, columns = joint.sum(1), joint.sum(0)
    shared = _entropy(rows_) + _entropy(columns) - _entropy(joint.ravel())
    return float(shared / math.sqrt(max(_entropy(rows_) * _entropy(columns), 1e-12)))


def _entropy(shares: Any) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def describe(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        (
            name,
            f"{figures['information']:.4f}",
            f"{figures['by_chance']:.4f}",
            f"{figures['highest_by_chance']:.4f}",
            f"{figures['deviations']:.1f}",
        )
        for name, figures in result["groups"].items()
    ]
    header = ("group", "information", "by chance", "highest", "deviations above")
    reported = f"{result['files']} files of {len(result['packages'])} packages, "
    return f"{reported}{result['tokens']:,} assignments of tokens\n{rows(header, lines)}"


def describe_training(result: dict[str, Any]) -> str:
    """The result as tables: means over seeds, for each way."""
    names, lines = result["sources"], []
    for way, seeds in result["ways"].items():
        leads = ", ".join(f"{one['lead']:.2f}" for one in seeds)
        mean = np.mean([one["costs"] for one in seeds], 0)
        losses = np.mean([one["losses"] for one in seeds], 0)
        table = [("loss, nats", *(f"{loss:.3f}" for loss in losses))]
        table += [
            (f"without {name}", *(f"{cost:+.4f}" for cost in row))
            for name, row in zip(names, mean, strict=True)
        ]
        measured = [
            (
                group,
                *(
                    f"{np.mean([one['groups'][group][figure] for one in seeds]):.3f}"
                    for figure in ("domain", "vocabulary", "co_activation", "saturation")
                ),
                f"{seeds[0]['groups'][group]['even_share']:.3f}",
            )
            for group in names
        ]
        header = ("group", "domain", "vocabulary", "co-activation", "saturation", "even share")
        loss = np.mean([one["loss"] for one in seeds])
        lines += [
            f"{way}: loss {loss:.4f}, lead of the diagonal by seed: {leads}",
            rows(("", *names), table),
            rows(header, measured),
            "",
        ]
    if "gate" in result:
        lines.append(", ".join(f"{name} {value:.4g}" for name, value in result["gate"].items()))
    return "\n".join(lines)


if __name__ == "__main__":
    start(main)
