"""``ultrathink doctor``: what it prints, for whom, and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import Say, without_codes
from ultrathink.training.choices import choose

# Nothing that is measured decides, and nothing can be compiled: the same on every machine.
SAME = ("debug", "training.deterministic=true", "training.device=cpu", "--quick")


def doctor(*words: str, wrapper: tuple[str, ...] = (), **env: str) -> Any:
    """The command in a process of its own."""
    done = subprocess.run(
        [*wrapper, sys.executable, "-m", "ultrathink", "doctor", *words],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULTRATHINK_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_it_says_what_auto_would_choose_and_leaves_nothing_behind(say: Say) -> None:
    said = say("doctor", *SAME)
    for title in ("Versions", "Machine", "Folders", "What auto chooses here for debug", "Packages"):
        assert f"\n{title}\n" in f"\n{said}"
    assert "  precision         fp32: set by: preset debug" in said
    assert "\x1b" not in said
    assert said.splitlines()[-1].startswith(("No problems found", "Training works here"))
    assert list(Path.cwd().iterdir()) == []


def test_json_is_one_object_with_all_of_it(say: Say) -> None:
    report = json.loads(say("doctor", *SAME, "--json"))
    assert report["can_train"] is True
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["run_folder"]["path"] == str(Path.cwd() / "runs")
    assert report["cache_folder"]["problem"] is None
    assert report["processor"]["usable_cores"] >= 1
    assert report["cpu_speed"] is None  # --quick
    assert {"key": "training.compile", "value": False, "reason": "set by: preset debug"} in report[
        "choices"
    ]
    assert any(p["name"] == "torch" and p["fits"] for p in report["packages"])


def test_it_asks_the_function_that_a_trainer_asks(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def remembered(config: Any, samples_per_epoch: int | None) -> Any:
        asked.append(str(config.run.name))
        return choose(config, samples_per_epoch)

    monkeypatch.setattr("ultrathink.training.choices.choose", remembered)
    (Path.cwd() / "mine.yaml").write_text("training: {max_steps: 3, device: cpu}\n")
    report = json.loads(say("doctor", "mine.yaml", "--quick", "--json"))
    chosen = {choice["key"]: choice for choice in report["choices"]}
    assert asked == ["mine"]
    assert chosen["training.device"]["reason"] == "set by: file mine.yaml"
    assert "times the rate of fp32" in chosen["training.precision"]["reason"]


def test_a_folder_that_cannot_be_written_ends_with_status_1(say: Say) -> None:
    Path("taken").write_text("a file")
    said = say("doctor", *SAME, "run.dir=taken", status=1)
    assert f"error: nothing can be written to {Path.cwd() / 'taken'} (run folders)" in said
    assert "  fix: choose another folder: run.dir=FOLDER" in said
    assert said.splitlines()[-1].startswith("Training is not possible here")


def test_a_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    broken = tmp_path / "elsewhere" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(
        "raise ImportError('libtorch_cpu.so: cannot open shared object file\\nand more')\n"
    )
    path = f"{broken.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = doctor("--json", PYTHONPATH=path)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["can_train"] is False
    [problem] = [p for p in report["problems"] if p["level"] == "error"]
    assert problem["text"].endswith("libtorch_cpu.so: cannot open shared object file")
    assert problem["fix"] == 'pip install --force-reinstall "torch~=2.13.0"'
    assert (
        report["processor"]["logical_cores"] == os.cpu_count()
    )  # the rest is reported all the same


# Not /proc/cpuinfo nor all of /sys: torch itself reads those, and dies of a product without them.
HIDE = (
    "mount -t tmpfs none /sys/fs/cgroup && for f in meminfo stat loadavg self/cgroup; do "
    'mount --bind /dev/null /proc/$f || exit 99; done; exec "$@"'
)


@pytest.mark.skipif(sys.platform != "linux", reason="hides files of Linux")
def test_a_system_that_reports_nothing_is_no_error() -> None:
    wrapper = ("unshare", "-rm", "sh", "-c", HIDE, "sh")
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here")
    done = doctor(*SAME, "--json", wrapper=wrapper)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["memory"]["available"] is None
    assert report["sharing"] is None
    assert report["load_average"] is None or report["load_average"] >= 0


def test_a_terminal_gets_colours_and_lines_that_fit(terminal: Say) -> None:
    said = terminal("doctor", *SAME)
    assert "\x1b[1mMachine" in said
    assert " ..." in said[: said.index("\x1b[1mVersions")]  # what it is doing, meanwhile
    lines = without_codes(said[said.index("\x1b[1mVersions") :])
    assert max(map(len, lines)) <= 60
    assert any("tokenizers" in line for line in lines)  # the last word of a long line: none is cut
