"""Faults and controllers from files, the plan of runs, and the messages of mistakes in them."""

from pathlib import Path

import pytest

from tests.unit.benchmarks import conftest  # noqa: F401 - makes the benchmarks importable
from ultrathink.core.errors import UltrathinkError

# isort: split
from fault_injection import drawn_number
from fault_parts import chosen, known_controllers, known_faults
from fault_setting import FULL, QUICK, keep_setting, plan

FAULT = """
from fault_injection import Fault
class Mine(Fault):
    name = "mine"
    group = "data"
FAULT = Mine
"""


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("x = 1", "does not say what its FAULT is. Write in it: class MyFault(Fault)"),
        ("FAULT = 3", "is 3, and no class derived from fault_injection.Fault"),
        ("def broken(:", "cannot be run: SyntaxError"),
        (FAULT.replace("data", "date"), "group = 'date' of the fault in"),
        (FAULT.replace('"mine"', '""'), "has no name; give the class one"),
        (FAULT.replace('"mine"', '"lr_x10"'), "calls its fault 'lr_x10', and so does"),
        (None, "there is no file"),
    ],
)
def test_a_file_that_is_no_fault_is_reported_so(
    tmp_path: Path, text: str | None, reported: str
) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UltrathinkError) as caught:
        known_faults([file])
    assert reported in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "reported"),
    [
        ("mine.py", "x = 1", "does not say what its CONTROLLER is"),
        ("mine.py", "CONTROLLER = 3", "nothing that makes a controller when called"),
        ("mine.txt", "CONTROLLER = int", "is no Python file"),
        ("zclip.py", "CONTROLLER = int", "calls its controller 'zclip'"),
        ("mine.py", None, "there is no file"),
    ],
)
def test_a_file_that_is_no_controller_is_reported_so(
    tmp_path: Path, name: str, text: str | None, reported: str
) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(UltrathinkError) as caught:
        known_controllers([file])
    assert reported in str(caught.value)


def test_files_of_others_stand_beside_ours(tmp_path: Path) -> None:
    fault, controller = tmp_path / "f.py", tmp_path / "steady.py"
    fault.write_text(FAULT)
    controller.write_text("CONTROLLER = object")
    assert list(known_faults([fault]))[-1] == "mine"
    names = list(known_controllers([controller]))
    assert names[0] == "none"
    assert set(names) == {"none", "fixed_clip", "zclip", "skip_step", "orchestrator", "steady"}


def test_a_name_there_is_not_is_reported_with_the_nearest() -> None:
    with pytest.raises(UltrathinkError, match=r"'lr_10x' is no fault\. Did you mean 'lr_x10'"):
        chosen(["lr_10x"], known_faults(), "fault")


def test_the_plan_has_each_fault_with_each_seed_and_controller() -> None:
    faults, controllers = known_faults(), known_controllers()
    jobs = plan(FULL, faults.values(), list(controllers.values()), [0, 1])
    assert len({job.folder for job in jobs}) == len(jobs)
    struck = [(j.fault.name, j.controller.name, j.seed) for j in jobs if j.fault and j.controller]
    assert len(set(struck)) == len(struck) == len(faults) * 5 * 2
    kinds = [job.kind for job in jobs]
    assert kinds.count("snapshot") == 4
    assert kinds.count("clean") == 2 * 2 * 5
    for name in controllers:
        own = [
            j for j in jobs if j.kind == "healthy" and j.controller and j.controller.name == name
        ]
        assert sum(job.num_steps for job in own) >= 30_000
        assert len({job.num_steps for job in own}) == 3
    where = {(job.fault.name, job.seed): job.injection for job in jobs if job.fault}
    for job in jobs:
        if job.fault:  # the same step for each controller, with a full window before it
            assert job.injection == where[job.fault.name, job.seed]
            assert FULL.snapshot_step + 128 < job.injection < FULL.end_step - 128
    assert len(set(where.values())) > 10


def test_a_plan_of_dense_faults_trains_no_experts() -> None:
    faults = [known_faults()["lr_x10"]]
    jobs = plan(QUICK, faults, list(known_controllers().values()), [0])
    assert {job.model for job in jobs} == {"dense"}


def test_drawn_numbers_are_fixed_and_spread() -> None:
    assert drawn_number("lr_x10", 0) == drawn_number("lr_x10", 0)
    numbers = [drawn_number("lr_x10", seed) % 15 for seed in range(200)]
    assert min(numbers.count(value) for value in range(15)) > 3


def test_a_folder_keeps_results_of_one_setting(tmp_path: Path) -> None:
    keep_setting(tmp_path / "a", QUICK)
    keep_setting(tmp_path / "a", QUICK)
    with pytest.raises(UltrathinkError, match="snapshot_step = 300, and now it is 600"):
        keep_setting(tmp_path / "a", FULL)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(UltrathinkError, match="is not empty and holds no results"):
        keep_setting(tmp_path / "b", QUICK)
