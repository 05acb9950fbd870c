"""The C++ compiler that compiled steps need, and the cache of compiled code."""

from __future__ import annotations

import sys
import sysconfig
from dataclasses import dataclass

from torch.utils import collect_env

from ultrathink.core.files import temporary_folder
from ultrathink.insight.doctor.machine import attempt
from ultrathink.runs.listing import size_on_disk
from ultrathink.training.compiling import compile_cache_folder, compiler_problem, find_cpp_compiler

# Beside the compiler itself, compiled steps need Python's headers and OpenMP.
_PROGRAM = """\
#include <Python.h>
#include <cmath>
#ifdef _OPENMP
#include <omp.h>
#endif
extern "C" int trial() { return (int) std::ceil(0.5); }
"""


@dataclass(frozen=True)
class Toolchain:
    """The C++ compiler for the CPU, and the cache of compiled code."""

    compiler: str | None  # its path
    version: str | None
    problem: str | None  # why nothing can be compiled; None where a trial succeeded
    cache: str
    cache_bytes: int


def read_toolchain(*, try_out: bool) -> Toolchain:
    """Find the compiler and, to ``try_out``, compile a few lines with torch's options."""
    compiler = find_cpp_compiler()
    problem, version = compiler_problem(), None
    if compiler is not None:
        command = [compiler, "--version"]
        version = attempt(lambda: collect_env.run_and_return_first_line(collect_env.run, command))
        if problem is None and try_out:
            problem = _trial(compiler)
    folder = compile_cache_folder()
    return Toolchain(compiler, version, problem, str(folder), size_on_disk(folder))


def _trial(compiler: str) -> str | None:
    with temporary_folder() as folder:
        source = folder / "trial.cpp"
        source.write_text(_PROGRAM, encoding="utf-8")
        command = [compiler, str(source), "-c", "-fPIC", "-std=c++20", "-o", f"{source}.o"]
        command.append(f"-I{sysconfig.get_path('include')}")
        if sys.platform == "linux":  # on other systems torch ships OpenMP
            command.append("-fopenmp")
        try:
            status, _, errors = collect_env.run(command)
        except OSError as error:
            return f"the C++ compiler {compiler} does not run ({error})"
    if status == 0:
        return None
    lines = [line for line in errors.splitlines() if "error" in line] or ["no reason given"]
    return f"the C++ compiler {compiler} cannot compile a trial ({lines[0].strip()})"
