"""What compiling needs, and where compiled code is kept."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

from ultrathink.core.files import temporary_folder
from ultrathink.training.compiling import compile_cache_folder, compiler_problem, find_cpp_compiler

# Python's headers and OpenMP are what compiled steps need beside the compiler itself.
_PROGRAM = """\
#include <Python.h>
#include <cmath>
#ifdef _OPENMP
#include <omp.h>
#endif
extern "C" int trial() { return (int) std::ceil(0.5); }
"""
_TIMEOUT_S = 30
_COUNTING_S = 1.0


@dataclass(frozen=True)
class Toolchain:
    """The C++ compiler for the CPU, and the cache of what it made."""

    compiler: str | None  # its path
    version: str | None
    problem: str | None  # why nothing can be compiled; None where a trial succeeded
    cache: str
    cache_bytes: int | None  # None where counting took too long


def read_toolchain(*, try_out: bool) -> Toolchain:
    """Find the compiler and, to ``try_out``, compile a few lines as torch would."""
    compiler = find_cpp_compiler()
    problem = compiler_problem()
    if compiler is not None and problem is None and try_out:
        problem = _trial(compiler)
    folder = compile_cache_folder()
    return Toolchain(
        compiler=compiler,
        version=_version(compiler) if compiler is not None else None,
        problem=problem,
        cache=str(folder),
        cache_bytes=folder_bytes(folder),
    )


def folder_bytes(folder: Path, seconds: float = _COUNTING_S) -> int | None:
    """The size of all files below ``folder``, 0 where it is missing; None where it takes longer."""
    total, end = 0, time.perf_counter() + seconds
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # another process removed it
                continue
        if time.perf_counter() > end:
            return None
    return total


def _version(compiler: str) -> str | None:
    try:
        done = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def _trial(compiler: str) -> str | None:
    with temporary_folder() as folder:
        source = folder / "trial.cpp"
        source.write_text(_PROGRAM, encoding="utf-8")
        command = [compiler, str(source), "-c", "-fPIC", "-std=c++20", "-o", f"{source}.o"]
        command += [f"-I{sysconfig.get_path('include')}"]
        if sys.platform == "linux":  # elsewhere OpenMP comes with torch
            command.append("-fopenmp")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except (OSError, subprocess.SubprocessError) as error:
            return f"the C++ compiler {compiler} does not run ({error})"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
    return f"the C++ compiler {compiler} cannot compile a trial ({lines[0].strip()})"
