"""The analysis of whole logs: real ones, several runs, resumes, impossible losses, the picture."""

import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ultrathink.core.errors import MissingDependencyError
from ultrathink.insight.log_analysis import LogAnalysis
from ultrathink.insight.logs.opening import open_log
from ultrathink.insight.picture import draw_picture, require_matplotlib
from ultrathink.orchestrator.events import Event
from ultrathink.orchestrator.phases import CONVERGING
from ultrathink.orchestrator.watcher import Watcher

RealLog = Callable[[str], Path]

# file -> format, records, first and last step, steps planned, how often signals are there
REAL: dict[str, tuple[str, int, tuple[int, int], int | None, dict[str, int]]] = {
    "adamw_124M.log": (
        "llm.c's main.log", 9537, (0, 9536), None, {"loss": 9536, "val_loss": 76},
    ),
    "llmc_124M_main.log": (
        "llm.c's main.log", 19561, (0, 19560), None,
        {"loss": 19560, "val_loss": 80, "lr": 19560, "grad_norm": 19560},
    ),
    "muon_124M.csv": ("CSV", 6251, (0, 6200), None, {"loss": 6200, "val_loss": 51}),
    "soap_124M.csv": ("CSV", 6049, (0, 6000), None, {"loss": 6000, "val_loss": 49}),
    "deepspeed_7b_baseline_loss.csv": ("CSV", 1000, (0, 999), None, {"loss": 1000}),
    "deepspeed_7b_bf16_loss.csv": ("CSV", 1000, (0, 999), None, {"loss": 1000}),
    "deepspeed_fp16_overflow.log": (
        "DeepSpeed", 736, (10, 7360), None,
        {"lr": 736, "skipped_steps": 736, "tokens_per_sec": 736, "memory": 736, "val_loss": 16},
    ),
    "megatron_gpt3_15b_h100.json": (
        "Megatron's JSON", 10173, (1, 50860), None,
        {"loss": 10173, "memory": 10173, "step_time": 507},
    ),
    "megatron_mixtral8x7b_h100_spike.json": (
        "Megatron's JSON", 4538, (1, 22685), None, {"loss": 4538, "step_time": 4538},
    ),
    "mt5_az.json": (
        "Hugging Face trainer_state.json", 770, (10, 7000), 9411,
        {"loss": 700, "val_loss": 70, "lr": 700},
    ),
    "star_spec_decode.json": (
        "Hugging Face trainer_state.json", 2000, (20, 40000), 252780,
        {"loss": 2000, "grad_norm": 2000, "lr": 2000},
    ),
    "bloom_iteration_lines.csv": (
        "CSV", 65, (29020, 45000), 115311,
        {"loss": 65, "lr": 65, "step_time": 65, "loss_scale": 52, "grad_norm": 56},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_logs_are_read(real_log: RealLog, name: str) -> None:
    format_name, count, (first, last), total, wanted = REAL[name]
    log = open_log(real_log(name))
    signals = list(log.signals())
    assert (log.format, len(signals), log.notes) == (format_name, count, [])
    assert (signals[0].step, signals[-1].step, log.total_steps) == (first, last, total)
    counts = {signal: sum(signal in s.values for s in signals) for signal in wanted}
    assert counts == wanted
    assert all(math.isfinite(value) for s in signals for value in s.values.values())


def analyze(path: Path) -> LogAnalysis:
    log = open_log(path)
    analysis = LogAnalysis(log)
    for signals in log.signals():
        analysis.observe(signals)
    analysis.finish()
    return analysis


# -- what is found in public logs ------------------------------------------------------------------


def watched(path: Path) -> Watcher:
    (course,) = analyze(path).courses
    return course.watcher


def alarms_of(path: Path) -> list[Event]:
    return [event for event in watched(path).events if event.is_alarm]


@pytest.mark.parametrize(
    "name",
    ["megatron_gpt3_15b_h100.json", "mt5_az.json", "llmc_124M_main.log", "adamw_124M.log"],
)
def test_healthy_runs_raise_no_alarm_and_converge(real_log: RealLog, name: str) -> None:
    watcher = watched(real_log(name))
    assert [event for event in watcher.events if event.is_alarm] == []
    steps = Counter[str]()
    for phase in watcher.phases:
        steps[phase.phase] += phase.to_step - phase.from_step
    assert steps[CONVERGING] > 0.9 * steps.total()


def test_jumps_that_recur_under_two_optimizers_are_hard_batches(real_log: RealLog) -> None:
    muon, soap = (watched(real_log(f"{name}_124M.csv")).events for name in ("muon", "soap"))
    for events in (muon, soap):
        assert {event.kind for event in events} == {"hard_batch"}
        assert len(events) >= 20
        assert not any(event.is_alarm for event in events)
    steps = {event.step for event in muon}
    assert len(steps & {event.step for event in soap}) >= 0.7 * len(steps)


def test_the_spike_of_mixtral_is_found_at_once(real_log: RealLog) -> None:
    alarms = alarms_of(real_log("megatron_mixtral8x7b_h100_spike.json"))
    assert {event.kind for event in alarms} == {"loss_spike"}
    (spike,) = (event for event in alarms if event.step == 3850)
    assert spike.found_at <= 3855  # the next logged step
    assert spike.values["loss"] == pytest.approx(3.41, abs=0.01)
    assert len(alarms) <= 8


def test_gradient_spikes_above_ten_times_the_median_are_found(real_log: RealLog) -> None:
    path = real_log("star_spec_decode.json")
    (course,) = analyze(path).courses
    before: list[float] = []
    spikes = []
    for step, norm in course.curves["grad_norm"]:
        if len(before) >= 20 and norm > 10 * np.median(before[-100:]):
            spikes.append(step)
        before.append(norm)
    assert len(spikes) >= 2
    alarms = [event for event in course.watcher.events if event.is_alarm]
    assert all(any(event.step <= step <= event.to_step for event in alarms) for step in spikes)
    assert len(alarms) <= 4  # in 40,000 steps


def test_a_divergence_in_the_first_steps_is_found_and_its_twin_is_healthy(
    real_log: RealLog,
) -> None:
    (event,) = alarms_of(real_log("deepspeed_7b_bf16_loss.csv"))
    assert (event.kind, event.step) == ("divergence", 3)
    assert alarms_of(real_log("deepspeed_7b_baseline_loss.csv")) == []


def test_steps_skipped_while_an_fp16_scale_is_searched_are_no_alarm(real_log: RealLog) -> None:
    events = watched(real_log("deepspeed_fp16_overflow.log")).events
    assert {event.kind for event in events} == {"fp16_overflow"}
    assert not any(event.is_alarm for event in events)


def test_the_divergences_of_bloom_are_seen_in_a_few_lines(
    real_log: RealLog, tmp_path: Path
) -> None:
    """Stretches of lines with gaps between them, each watched by itself."""
    stretches: dict[str, list[str]] = {}
    last, begin = 0, ""
    title, *lines = real_log("bloom_iteration_lines.csv").read_text().splitlines(keepends=True)
    column = title.split(",").index("iteration")
    for line in lines:
        step = line.split(",")[column]
        if not 0 < int(step) - last <= 10:
            begin = step
        last = int(step)
        stretches.setdefault(begin, []).append(line)
    path = tmp_path / "stretch.csv"
    found = {}
    for begin, part in stretches.items():
        path.write_text(title + "".join(part))
        found[int(begin)] = {event.kind for event in alarms_of(path)}
    assert {begin for begin, kinds in found.items() if "divergence" in kinds} >= {29020, 17060}
    healthy = {33240, 43680, 6502, 12000, 14000, 16800, 12695, 31250, 45000}
    assert not any(found[begin] for begin in healthy)


# -- runs, resumes, reports ------------------------------------------------------------------------


def test_runs_of_one_log_are_judged_separately(real_log: RealLog) -> None:
    analysis = analyze(real_log("bloom_iteration_lines.csv"))
    report = analysis.report()
    assert len(report["log"]["runs"]) == 5
    assert all("run" in event for event in report["events"])
    # From step 43,680 of one run to 7,000 of the next is no resume.
    assert not any(
        event["kind"] == "resumed" for event in report["events"]
        if event["run"] == "tr8b-104B/chronicles.md"
    )  # fmt: skip
    spiked = [e for e in report["events"] if e["run"] == "tr1-13B-base/chronicles.md"]
    assert any(
        e["step"] == 29050 and e["severity"] in ("medium", "high", "critical") for e in spiked
    )


def course(path: Path, steps: list[int], loss: Callable[[int], float]) -> Path:
    lines = [f"{step},{loss(step)!r},1.0\n" for step in steps]
    path.write_text("step,loss,grad_norm\n" + "".join(lines))
    return path


def falling(step: int) -> float:
    return 3.0 + 2.0 * math.exp(-step / 300) + 0.02 * math.sin(12.9898 * step)


def test_a_resume_cuts_the_curve_and_is_an_event(tmp_path: Path) -> None:
    steps = [*range(1, 301), *range(251, 401)]
    analysis = analyze(course(tmp_path / "log", steps, falling))
    (run,) = analysis.courses
    assert [step for step, _ in run.curves["loss"]] == list(range(1, 401))
    assert [[step for step, _ in part] for part in run.undone] == [list(range(250, 301))]
    (resumed,) = [event for _, event in analysis.events() if event.kind == "resumed"]
    assert resumed.step == 251
    assert analysis.summary()["num_steps"] == 400


def test_a_report_is_strict_json(tmp_path: Path) -> None:
    def loss(step: int) -> float:
        return math.nan if step > 290 else falling(step)

    report = analyze(course(tmp_path / "log", list(range(1, 301)), loss)).report()
    text = json.dumps(report, allow_nan=False)
    assert set(json.loads(text)) == {"log", "events", "phases", "forecast"}
    assert any(event["kind"] == "non_finite" for event in report["events"])


@pytest.mark.parametrize(
    ("text", "kind", "step"),
    [
        # A loss of exactly 0, which no cross-entropy is,
        ("step,loss\n10,2.5\n20,0\n30,2.4\n", "zero_loss", 20),
        ("step,loss\n10,0.0\n20,0.0\n", "zero_loss", 20),
        # but for one that is rounded to it,
        ("step,loss\n1,0.5\n2,0.05\n3,0.004\n4,0.0\n5,0.001\n6,0\n", "", 0),
        # and what the log itself counts as bad.
        (
            "".join(
                f" iteration {step}/ 90 | lm loss: 2.5E+00 | loss scale: 1.0 | number of skipped "
                f"iterations: {int(step == 50)} | number of nan iterations: {int(step == 70)} |\n"
                for step in range(10, 100, 10)
            ),
            "skipped_steps non_finite",
            50,
        ),
        (
            "".join(
                f"[INFO] [deepspeed] OVERFLOW! Rank 0 Skipping step. Attempted loss scale: "
                f"{2 ** (20 - step)}, reducing to {2 ** (19 - step)}\n"
                f"[INFO] [Rank 0] step={step}, skipped={step}, lr=[1e-4], mom=[0.9]\n"
                for step in range(1, 20)
            ),
            "fp16_underflow skipped_steps",
            19,
        ),
    ],
)
def test_what_is_impossible_or_counted_as_bad_is_an_alarm(
    tmp_path: Path, text: str, kind: str, step: int
) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    alarms = alarms_of(path)
    assert [event.kind for event in alarms] == kind.split()
    assert [event.step for event in alarms[:1]] == ([step] if kind else [])


# -- the picture -----------------------------------------------------------------------------------


def test_a_picture_has_the_curve_and_what_was_found(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    matplotlib = pytest.importorskip("matplotlib")

    def loss(step: int) -> float:
        return falling(step) + (4.0 if 400 <= step < 420 else 0.0)

    analysis = analyze(course(tmp_path / "log", list(range(1, 601)), loss))
    assert any(event.is_alarm for _, event in analysis.events())
    draw_picture(analysis, tmp_path / "course.png")
    with image.open(tmp_path / "course.png") as picture:
        assert picture.width > 1000
        colors = {color for _, color in picture.convert("RGB").getcolors(2**24)}
    red = tuple(round(255 * part) for part in matplotlib.colors.to_rgb("#1f4e79"))
    assert red in colors  # the line of the loss
    draw_picture(analysis, tmp_path / "course.svg")
    # The texts of an SVG: matplotlib leaves each as a comment beside its outlines.
    assert "loss (nats)" in (tmp_path / "course.svg").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "step,loss\n1,2\n",
        "step,val_loss\n1,2\n2,1.5\n",
        "step,loss\n1,-2\n2,-3\n",
        "step,loss\n1,nan\n2,nan\n",
        "step,loss,grad_norm\n5,2,0\n5,2,0\n",
        "run,step,loss\na,1,3\nb,1,2\n",
    ],
)
def test_little_is_drawn_too(tmp_path: Path, text: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "log"
    path.write_text(text)
    draw_picture(analyze(path), tmp_path / "course.png")
    assert (tmp_path / "course.png").stat().st_size > 5000


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "ultrathink\[plot\]"'):
        require_matplotlib()
