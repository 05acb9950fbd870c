import os
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor

from ultrathink.training import hardware
from ultrathink.training.compiling import (
    compile_cache_folder,
    compile_function,
    compiler_problem,
    find_cpp_compiler,
)
from ultrathink.training.hardware import (
    bf16_instructions,
    choose_precision,
    measured_rate,
    nominal_flops,
    using_threads,
)

CPU = torch.device("cpu")


def test_threads_are_restored_and_nominal_rates_grow_with_them() -> None:
    before = torch.get_num_threads()
    with using_threads(1):
        one = nominal_flops(CPU, "bf16")
        with pytest.raises(KeyError), using_threads(2):
            raise KeyError(nominal_flops(CPU, "bf16"))
        assert torch.get_num_threads() == 1
    with using_threads(2):
        assert nominal_flops(CPU, "bf16") == 2 * one
    assert torch.get_num_threads() == before


def test_formats_are_compared_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several, other processes on the cores decide who wins."""
    seen: list[int] = []

    def timed(dtype: torch.dtype, size: int, seconds: float, device: torch.device) -> list[float]:
        seen.append(torch.get_num_threads())
        return [2.0 if dtype == torch.float32 else 1.0]

    monkeypatch.setattr(hardware, "product_seconds", timed)
    measured_rate.cache_clear()
    try:
        with using_threads(3):
            assert choose_precision("auto", CPU)[0] == "bf16"
        assert seen == [1, 1]
    finally:
        measured_rate.cache_clear()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_bf16_products_are_those_the_processor_has() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    # As the kernel calls them, on x86 and on ARM.
    kernels = {"amx_bf16", "avx512_bf16", "bf16", "svebf16"}
    assert (bf16_instructions() is not None) == bool(flags & kernels)


# -- the compiler ----------------------------------------------------------------------------------


def program(path: Path) -> Path:
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_first_compiler_found_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_cpp_compiler() is None
    assert "no C++ compiler was found (install g++ or clang)" in str(compiler_problem())
    clang = program(tmp_path / "clang++")
    assert find_cpp_compiler() == str(clang)
    gcc = program(tmp_path / "g++")
    assert find_cpp_compiler() == str(gcc)
    monkeypatch.setenv("CXX", "clang++")
    assert find_cpp_compiler() == str(clang)
    monkeypatch.setenv("CXX", "icpx")  # not there: torch would look for no other
    assert find_cpp_compiler() is None
    assert "CXX is 'icpx'" in str(compiler_problem())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Python comes with its headers")
def test_compiling_needs_the_headers_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(program(tmp_path / "g++")))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "headers of Python are not in" in str(compiler_problem())
    assert "python3-dev" in str(compiler_problem())
    (tmp_path / "Python.h").touch()
    assert compiler_problem() is None


def test_torch_learns_of_a_compiler_that_it_does_not_look_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    clang = program(tmp_path / "clang++")
    with inductor.patch({"cpp.cxx": (None, "g++")}):
        compile_function(torch.sin)
        assert inductor.cpp.cxx == (None, str(clang))
    program(tmp_path / "g++")
    with inductor.patch({"cpp.cxx": (None, "g++")}):
        compile_function(torch.sin)
        assert inductor.cpp.cxx == (None, "g++")  # the one it looks for is left alone


def test_compiled_code_is_kept_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("ULTRATHINK_CACHE", str(tmp_path))
    assert compile_cache_folder() == tmp_path / "compiled"
    compile_function(torch.sin)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert compile_cache_folder() == Path("/elsewhere")


@pytest.mark.skipif(sys.platform != "linux", reason="hides a file of Linux")
def test_an_unknown_processor_has_no_known_capabilities() -> None:
    """torch 2.13 ends the process when it is asked for them then."""
    hide = 'mount --bind /dev/null /proc/cpuinfo || exit 99; exec "$@"'
    wrapper = ("unshare", "-rm", "sh", "-c", hide, "sh")
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here")
    code = "from ultrathink.training.hardware import cpu_capabilities; print(cpu_capabilities())"
    done = subprocess.run([*wrapper, sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "{}\n"), done.stderr


GIVES_BACK = """
from pathlib import Path
import torch
from ultrathink.training.hardware import keep_freed_memory, return_freed_memory

def address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * 4096 >> 20

def change_by_a_large_tensor():
    before = address_space()
    torch.ones(64 << 20, dtype=torch.uint8)
    return address_space() - before

if keep_freed_memory():
    print("kept", change_by_a_large_tensor())
    return_freed_memory()
    print("given back", change_by_a_large_tensor())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_kept_until_it_is_short() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GIVES_BACK], capture_output=True, text=True, check=True
    )
    if not done.stdout:
        pytest.skip("another allocator than glibc's")
    kept, given_back = (int(line.rpartition(" ")[2]) for line in done.stdout.splitlines())
    assert kept > 60
    assert given_back < 4
