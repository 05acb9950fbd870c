"""The manifest of a run: its code, packages, hardware and data."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

import ultrathink
from ultrathink.core.errors import CheckpointError
from ultrathink.core.files import write_atomic
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.reading import RunReader

_PACKAGES = ("torch", "numpy", "pydantic", "tokenizers", "tiktoken", "safetensors")
_KIND = "train"  # the job that created a run; other kinds cannot be resumed here


def write_manifest(path: Path, *, data_hash: str, tokenizer_hash: str, num_parameters: int) -> None:
    """Write facts about a run, this machine and this process to a file, as JSON."""
    manifest = {
        "kind": _KIND,
        **code_and_packages(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "hardware": hardware(),
        "data_hash": data_hash,
        "tokenizer_hash": tokenizer_hash,
        "num_parameters": num_parameters,
    }
    write_atomic(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def check_run_kind(run: RunFolder) -> None:
    """Raise CheckpointError if a run has a manifest and cannot be trained on."""
    if not run.manifest.is_file():
        return
    kind = RunReader(run).manifest().get("kind")
    if kind is None:
        raise CheckpointError(
            f"run {run.path} was written by an earlier version of ultrathink, which this version "
            f"cannot resume; use that version ({run.manifest.name} names it), or start a new run."
        )
    if kind != _KIND:
        raise CheckpointError(
            f"run {run.path} is of kind {kind!r}, but this command needs kind "
            f"{_KIND!r}; name another run."
        )


def code_and_packages() -> dict[str, Any]:
    """The versions of this code, of Python, and of the packages that affect results."""
    return {
        "ultrathink": ultrathink.__version__,
        "commit": _commit(Path(ultrathink.__file__).parent),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
    }


def hardware() -> dict[str, Any]:
    """The processor, its cores and memory, and the accelerators that torch sees."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if torch.cuda.is_available():
        facts["gpus"] = [
            {
                "name": torch.cuda.get_device_name(index),
                "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            }
            for index in range(torch.cuda.device_count())
        ]
    return facts


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit(folder: Path) -> str | None:
    """The git commit of the code in use, with "+changes" if files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
        )
        if done.returncode:
            raise OSError(done.stderr)
        return done.stdout.strip()

    try:
        if not git("ls-files", "--", str(folder / "__init__.py")):
            return None  # installed inside another repository
        commit = git("rev-parse", "HEAD")
        return f"{commit}+changes" if git("status", "--porcelain", "--", str(folder)) else commit
    except (OSError, subprocess.SubprocessError):
        return None
