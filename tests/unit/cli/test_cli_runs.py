"""``ultrathink runs`` and ``ultrathink runs check``, as a person and as a program sees them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.unit.checkpoint.disks import flip
from tests.unit.cli.conftest import Say
from tests.unit.runs.trained_runs import make_run, train_line, val_line, write_lines
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.lock import RunLock


def set_age(run: RunFolder, seconds: float) -> None:
    moment = time.time() - seconds
    for path in (run.metrics, run.checkpoints, run.path / "config.yaml"):
        if path.exists():
            os.utime(path, (moment, moment))


def test_the_list_has_a_line_for_each_run(place: Path, say: Say) -> None:
    done = make_run(place / "runs", "done", saved=[10, 20])
    write_lines(done.metrics, [train_line(20, 2.25), val_line(20, 3.5)])
    long = make_run(place / "runs", "a-longer-name", saved=[1000], total=12_000)
    write_lines(long.metrics, [train_line(1040, None)])
    fresh = make_run(place / "runs", "fresh")
    for run, age in ((done, 200), (long, 7500), (fresh, 90_000)):
        set_age(run, age)
    lines = [line.rsplit("  ", 1)[0].rstrip() for line in say("runs").splitlines()]  # no size
    assert lines == [
        "run            state             step    loss  val loss  bits/byte  changed",
        "done           finished         20/20  2.2500    3.5000      1.750    3 min",
        "a-longer-name  stopped   1,040/12,000     nan         -          -      2 h",
        "fresh          empty             -/20       -         -          -    1 day",
    ]


def test_json_has_raw_values(place: Path, say: Say) -> None:
    run = make_run(place / "runs", "demo", saved=[10])
    write_lines(run.metrics, [train_line(12, None), val_line(12, 3.5)])
    os.utime(run.metrics, (2e9, 2e9))
    with RunLock.acquire(run):
        [found] = json.loads(say("runs", "runs", "--json"))["runs"]
    assert found.pop("size_bytes") > 1000
    assert found.pop("process")["pid"] == os.getpid()
    assert found == {
        "name": "demo",
        "path": "runs/demo",
        "state": "running",
        "problem": None,
        "step": 12,
        "total_steps": 20,
        "checkpoints": [10],
        "train_loss": None,
        "val_loss": 3.5,
        "bits_per_byte": 1.75,
        "changed": 2e9,
    }


def test_a_damaged_run_is_explained_below_the_list(place: Path, say: Say) -> None:
    run = make_run(place / "runs", "demo", saved=[10])
    (run.checkpoint(10) / "state.json").write_text("{")
    lines = say("runs").splitlines()
    assert lines[1].startswith("demo  damaged  10/20")
    assert lines[3].startswith("demo: checkpoint checkpoints/step_00000010 is damaged: state.json")
    assert lines[4] == "What can be used: ultrathink runs check runs/demo"


def test_minutes_that_are_used_up_finish_a_run(place: Path, say: Say) -> None:
    path = make_run(place / "runs", "demo", saved=[10]).path / "config.yaml"
    # Ten seconds are done, and four are kept free: 1.5 validations of 2 s, and one for saving.
    for seconds, state in ((14.1, "stopped"), (13.9, "finished")):
        tree = yaml.safe_load(path.read_text())
        tree["training"] |= {"max_steps": None, "max_minutes": seconds / 60}
        path.write_text(yaml.safe_dump(tree))
        assert json.loads(say("runs", "--json"))["runs"][0]["state"] == state


def test_an_empty_folder_says_how_to_begin(place: Path, say: Say) -> None:
    assert say("runs") == "There is no run in runs/ yet. Start one: ultrathink train\n"
    (place / "runs" / "deep").mkdir()
    assert "Start one: ultrathink train run.dir=runs/deep" in say("runs", "runs/deep")
    assert json.loads(say("runs", "--json")) == {"runs": []}


def test_runs_are_listed_without_torch(place: Path) -> None:
    run = make_run(place / "runs", "demo", saved=[10])
    write_lines(run.metrics, [train_line(10, 2.0), val_line(10, 2.0)])
    code = (
        "import sys; from ultrathink.cli.main import main; main(['runs', '--json']); "
        "print(sorted(m for m in ('torch', 'tokenizers') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    answer, modules = done.stdout.splitlines()
    assert json.loads(answer)["runs"][0]["step"] == 10
    assert modules == "[]"


# -- runs check -----------------------------------------------------------------------------------


def test_check_names_what_is_damaged_and_how_to_resume(trained: RunFolder, say: Say) -> None:
    out = say("runs", "check", "debug")
    assert "  ok  checkpoints/step_00000004  undamaged, fits the model, " in out
    assert out.endswith("Nothing is damaged.\nThe run is finished: step 4 was its last.\n")

    flip(next(trained.checkpoint(4).glob("*1-of-*.safetensors")))
    lines = say("runs", "check", "debug", status=1).splitlines()
    assert lines[0] == "run runs/debug"
    [line] = [line for line in lines if line.startswith("  damaged  checkpoints/step_00000004")]
    assert line.endswith("-of-00002.safetensors: content differs from its checksum")
    assert lines[-1] == "To resume from step 2: ultrathink train --resume debug@2"
    found = json.loads(say("runs", "check", "runs/debug", "--json", status=1))
    assert (found["run"], found["sound"], found["newest_sound_step"]) == ("runs/debug", False, 2)
    assert found["resume"] == "ultrathink train --resume runs/debug@2"
    assert {"item": "config.yaml", "status": "ok", "detail": "can be used"} in found["findings"]

    out = say("runs", "check", "debug@2", "--data")
    assert "step_00000004" not in out
    assert "metrics.jsonl" not in out
    assert out.endswith("To resume from step 2: ultrathink train --resume debug@2\n")
    assert "--resume" not in say("runs", "check", "debug@4", status=1)

    (trained.path / "config.yaml").write_text("{")
    out = say("runs", "check", "debug", status=1)
    assert out.endswith("To resume the run, restore its config.yaml and tokenizer first.\n")


def test_check_of_a_stopped_run_and_of_one_in_use(trained: RunFolder, say: Say) -> None:
    path = trained.path / "config.yaml"
    path.write_text(path.read_text().replace("max_steps: 4", "max_steps: 9"))
    assert say("runs", "check", "debug").endswith(
        "Nothing is damaged.\nTo resume from step 4: ultrathink train --resume debug\n"
    )
    with RunLock.acquire(trained):
        out = say("runs", "check", "debug")
    assert out.startswith(f"run runs/debug, in use by process {os.getpid()} on host")
    assert "--resume" not in out
