"""What the doctor concludes: the rules, and the choices of auto."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from ultrathink.config import load_config
from ultrathink.core.errors import ConfigError
from ultrathink.insight.doctor.accelerators import Accelerators, Gpu
from ultrathink.insight.doctor.diagnose import diagnose
from ultrathink.insight.doctor.findings import find_problems
from ultrathink.insight.doctor.machine import Memory, Processor
from ultrathink.insight.doctor.packages import Package
from ultrathink.insight.doctor.report import Choice, Diagnosis
from ultrathink.insight.doctor.speed import ProductRate, Sharing, Speed
from ultrathink.insight.doctor.wording import sections, verdict
from ultrathink.training.choices import choose
from ultrathink.training.determinism import set_deterministic

GB = 10**9
NO_GPU = Accelerators(gpus=(), mps=False, driver=None, warnings=())
H200 = Gpu("NVIDIA H200", memory=150 * GB, free=140 * GB, capability="9.0")


@pytest.fixture(scope="module")
def seen() -> Diagnosis:
    """What is really found here."""
    return diagnose(load_config("debug", ["training.deterministic=true"]), "debug", quick=True)


@pytest.fixture
def healthy(seen: Diagnosis) -> Diagnosis:
    """The same, on a machine of four cores where nothing is wrong."""
    assert seen.torch is not None
    assert seen.toolchain is not None
    return replace(
        seen,
        processor=Processor(4, 4, 4, None),
        memory=Memory(16 * GB, 12 * GB, None, None, GB),
        run=replace(seen.run, may_compile=True),
        run_folder=replace(seen.run_folder, free=100 * GB, problem=None),
        cache_folder=replace(seen.cache_folder, free=100 * GB, problem=None),
        packages=(Package("torch~=2.13.0", "torch", "2.13.0", True, None),),
        torch=replace(seen.torch, threads=4),
        accelerators=NO_GPU,
        toolchain=replace(seen.toolchain, problem=None),
        cpu_speed=rates(one=100e9, four=380e9),
        sharing=Sharing(2.0, others=0.02, stolen=0.0),
        problems=(),
    )


def rates(one: float, four: float) -> Speed:
    return Speed((ProductRate("fp32", 1, one), ProductRate("fp32", 4, four)), memory=2e10)


def changed(report: Diagnosis, changes: dict[str, Any]) -> Diagnosis:
    """The report with other values; a key may name a field of a part, as in ``run.state_bytes``."""
    for key, value in changes.items():
        part, _, name = key.partition(".")
        report = replace(
            report, **{part: replace(getattr(report, part), **{name: value}) if name else value}
        )
    return report


def gpu(**facts: Any) -> dict[str, Any]:
    """The changes for a machine with a GPU that training would take."""
    return {
        "accelerators.gpus": (replace(H200, **facts),),
        "choices": (Choice("training.device", "cuda", "the first"),),
    }


def package(requirement: str, installed: str | None, extra: str | None = None) -> dict[str, Any]:
    name = requirement.partition(">")[0]
    return {"packages": (Package(requirement, name, installed, False, extra),)}


# What is changed of a healthy machine, and the only problem then: its level, words and fix.
CASES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "others use the cores": (
        {"sharing": Sharing(2.0, others=1.6, stolen=0.3)}, "warning",
        "other processes used 1.9 of 4 cores during the measurement; threads wait for each other",
        "OMP_NUM_THREADS=2 ultrathink train",
    ),
    "threads wait for each other": (
        {"cpu_speed": rates(one=100e9, four=40e9)}, "warning",
        "4 threads compute at 0.4 times the rate of one", "OMP_NUM_THREADS=3 ultrathink train",
    ),
    "more threads than a control group allows": (
        {"processor.quota": 2.5, "cpu_speed": None}, "warning",
        "torch uses 4 threads, and this process may use 2 cores (its control group allows 2.5)",
        "OMP_NUM_THREADS=2 ultrathink train",
    ),
    "fewer threads than cores": (
        {"torch.threads": 1}, "note",
        "torch uses 1 of 4 cores; with all of them products are 3.8 times as fast",
        "OMP_NUM_THREADS=4 ultrathink train",
    ),
    "a broken torch": (
        {"torch": None, "torch_error": "ImportError: libtorch.so"}, "error",
        "torch cannot be imported: ImportError: libtorch.so",
        'pip install --force-reinstall "torch~=2.13.0"',
    ),
    "a folder for runs that cannot be written": (
        {"run_folder.problem": "read-only file system"}, "error",
        "(run folders): read-only file system", "run.dir=FOLDER",
    ),
    "a cache that cannot be written": (
        {"cache_folder.problem": "permission denied"}, "error",
        "(the cache): permission denied", "ULTRATHINK_CACHE=FOLDER",
    ),
    "a model beyond all memory": (
        {"run.state_bytes": 17 * GB}, "error",
        "take 17.0 GB before a single activation, more than the memory here (16.0 GB)",
        "a smaller model",
    ),
    "a model beyond a control group's memory": (
        {"memory.limit": 4 * GB, "memory.limit_free": 4 * GB, "run.state_bytes": 5 * GB}, "error",
        "more than the memory here (4.0 GB)", "a smaller model",
    ),
    "a model beyond what is free": (
        {"run.state_bytes": 13 * GB}, "warning",
        "the memory here has 12.0 GB free", "close programs that use the memory",
    ),
    "a model beyond the GPU": (
        {**gpu(), "run.state_bytes": 151 * GB}, "error",
        "more than the memory of NVIDIA H200 (150.0 GB)", "a smaller model",
    ),
    "a disk that is nearly full": (
        {"run_folder.free": 1000}, "warning",
        "checkpoints of debug take up to", "training.checkpoint.keep=1",
    ),
    "no compiler": (
        {"toolchain.problem": "no C++ compiler was found"}, "warning",
        "no C++ compiler was found; training runs uncompiled", "apt-get install g++ python3-dev",
    ),
    "a GPU that this torch was not built for": (
        {**gpu(), "accelerators.warnings": ("Found GPU0 which has capability 3.0",)}, "warning",
        "torch warns: Found GPU0 which has capability 3.0", "pytorch.org",
    ),
    "a driver without a GPU": (
        {"accelerators.driver": "550.54"}, "warning",
        "an NVIDIA driver (550.54), but torch finds no GPU", "pytorch.org",
    ),
    "a package that is missing": (
        package("rich>=13.7", None), "error",
        "the package rich is missing", 'pip install "rich>=13.7"',
    ),
    "a package that is too old": (
        package("rich>=13.7", "9.0"), "warning",
        "rich 9.0 is installed; rich>=13.7 is needed", 'pip install "rich>=13.7"',
    ),
    "a package of an extra that is too old": (
        package("ruff>=1", "0.1", "test"), "warning",
        "ruff 0.1 is installed", 'pip install "ultrathink[test]"',
    ),
    "an installation without metadata": (
        {"packages": None}, "note", "its packages were not checked", "pip install -e .",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_problem_comes_with_its_fix(healthy: Diagnosis, name: str) -> None:
    changes, level, text, fix = CASES[name]
    (problem,) = find_problems(changed(healthy, changes))
    assert problem.level == level
    assert text in problem.text
    assert fix in str(problem.fix)


HARMLESS: dict[str, dict[str, Any]] = {
    "a healthy machine": {},
    "others on cores that are left over": {
        "torch.threads": 2, "sharing": Sharing(2.0, others=1.5, stolen=0.0), "cpu_speed": None,
    },
    "two threads of each physical core": {
        "processor.physical_cores": 2, "cpu_speed": rates(100e9, 190e9),
    },
    "an extra that is not installed": package("ruff>=1", None, "test"),
    "no compiler where nothing is compiled": {
        "toolchain.problem": "no C++ compiler", "run.may_compile": False,
    },
    "no C++ compiler where a GPU trains": {**gpu(), "toolchain.problem": "no C++ compiler"},
    "more memory needed than the CPU has, on a GPU": {**gpu(), "run.state_bytes": 100 * GB},
    "nothing measured": {"sharing": None, "cpu_speed": None},
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_what_harms_nobody_is_not_reported(healthy: Diagnosis, name: str) -> None:
    assert find_problems(changed(healthy, HARMLESS[name])) == ()
    assert verdict(healthy) == "No problems found. Start with: ultrathink train"


def test_the_worst_comes_first_and_decides(healthy: Diagnosis) -> None:
    ill = healthy
    for name in ("fewer threads than cores", "no compiler", "a broken torch"):
        ill = changed(ill, CASES[name][0])
    ill = replace(ill, torch=healthy.torch, sharing=Sharing(2.0, 3.0, 0.0))
    problems = find_problems(ill)
    assert [p.level for p in problems] == ["error", "warning", "warning"]
    assert not replace(ill, problems=problems).can_train
    assert "not possible" in verdict(replace(ill, problems=problems))
    assert replace(ill, problems=problems[1:]).can_train
    assert verdict(replace(ill, problems=problems[1:])) == "Training works here; 2 warnings above."


def test_choices_are_those_a_trainer_would_make(seen: Diagnosis) -> None:
    assert not torch.are_deterministic_algorithms_enabled()  # asking has changed nothing
    config, _ = choose(load_config("debug", ["training.deterministic=true"]), 1000)
    set_deterministic(False, torch.device("cpu"))
    chosen = {choice.key: choice for choice in seen.choices}
    assert chosen["training.micro_batch_size"].value == config.training.micro_batch_size
    assert chosen["model.attention.backend"].value == config.model.attention.backend
    assert chosen["training.device"].reason == "the first available of cuda, mps, cpu"
    assert chosen["training.compile"].reason == "set by: preset debug"


def test_a_length_of_the_data_is_no_obstacle_and_a_device_that_is_not_there_is() -> None:
    words = ["training.epochs=3", "training.compile=auto", "training.deterministic=true"]
    report = diagnose(load_config("debug", words), "debug", quick=True)
    [compiling] = [c for c in report.choices if c.key == "training.compile"]
    assert compiling.value is False
    assert "once its data is read" in compiling.reason or "C++ compiler" in compiling.reason
    config = load_config("debug", ["training.device=cuda:99"])
    with pytest.raises(ConfigError) as refused:
        choose(config, None)
    report = diagnose(config, "debug", quick=True)
    assert report.choices == ()
    assert str(refused.value) in [p.text for p in report.problems if p.level == "error"]
    assert not report.can_train


def test_what_is_not_known_is_called_unknown(seen: Diagnosis) -> None:
    nothing = ("torch", "accelerators", "toolchain", "sharing", "packages", "load_average")
    blind = replace(
        seen,
        processor=Processor(None, None, None, None),
        memory=Memory(None, None, None, None, None),
        run_folder=replace(seen.run_folder, free=None, total=None),
        choices=(),
        **dict.fromkeys(nothing),
    )
    assert blind.processor.usable_cores == 1
    words = [line for lines in sections(blind).values() for line in lines]
    assert ("processor", "unknown") in words
    assert ("cores", "unknown physical, unknown logical; this process may use 1") in words
    assert ("memory", "unknown, unknown available") in words
    assert ("torch", "unknown") in words
    find_problems(blind)  # and no rule stumbles over it
    json.dumps(blind.to_json(), allow_nan=False)
