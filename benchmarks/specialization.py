"""Whether experts know where a text comes from: mutual information of sources and experts.

    python benchmarks/specialization.py runs/demo-moe
    python benchmarks/specialization.py runs/demo-moe --shuffles 200 --json

The sources are the packages of Python's standard library with the most files, as many files of
each. Each file goes through the model by itself. For each group of experts and each layer, tokens
are counted by their file's package and by the experts they are sent to; printed is the normalized
mutual information I(S; E) / sqrt(H(S) H(E)), mean over layers. With labels shuffled among files it
is what chance would give: its mean and its highest value are beside it, and how many standard
deviations lie between.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import parser, rows, setting, show, start

from ultrathink import load_model
from ultrathink.config.data import StdlibSourceConfig
from ultrathink.core.errors import UltrathinkError
from ultrathink.data.sources.stdlib import StdlibSource
from ultrathink.runs.folder import find_run


def main() -> None:
    """Route the files and print what their routes tell of their packages."""
    options = parser(__doc__)
    options.add_argument("run", help="a run, or its folder, of a model with experts")
    options.add_argument("--packages", type=int, default=8, help="how many, the largest")
    options.add_argument("--files", type=int, default=16, help="of each package")
    options.add_argument("--max-tokens", type=int, default=1024, help="of each file")
    options.add_argument("--shuffles", type=int, default=100)
    args = options.parse_args()
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
    result = {
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
    show(result, describe(result), args.json)


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


if __name__ == "__main__":
    start(main)
