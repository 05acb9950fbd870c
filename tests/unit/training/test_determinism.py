import os
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor

from tests.stress.determinism import kinds, repeat
from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import final_state
from ultrathink.cli.main import main
from ultrathink.config import load_config
from ultrathink.core.errors import ConfigError
from ultrathink.training import hardware
from ultrathink.training.callbacks import Callback, StepReport
from ultrathink.training.choices import choose
from ultrathink.training.compiling import compiler_problem
from ultrathink.training.determinism import set_deterministic

CPU = torch.device("cpu")


def switches() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        inductor.deterministic,
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


REPEATABLE = (True, False, True, False, True, False, ":4096:8")


def test_switches_are_set_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for mine, expected in ((None, ":4096:8"), (":16:8", ":16:8")):  # as good a value is kept
        if mine is None:
            monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        else:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", mine)
            monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        before = switches()
        set_deterministic(False, CPU)  # never set by this
        assert switches() == before
        for _ in range(2):
            set_deterministic(True, CPU)
            assert switches() == (*REPEATABLE[:-1], expected)
        set_deterministic(False, CPU)
        assert switches() == before


def test_a_later_trainer_without_it_is_not_bound_by_it(make_trainer: MakeTrainer) -> None:
    seen: list[tuple[object, ...]] = []

    class Look(Callback):
        def on_step(self, report: StepReport) -> None:
            seen.append(switches())

    before = switches()
    for wanted in ("true", "false"):
        trainer = make_trainer(
            "training.max_steps=1", f"training.deterministic={wanted}", callbacks=[Look()]
        )
        trainer.fit()
    assert seen == [REPEATABLE, before]


def test_lengths_that_follow_the_clock_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "training.deterministic=true"]) == 2  # the preset's length is 5 minutes
    said = capsys.readouterr().err
    assert "(override training.deterministic=true)" in said
    assert "max_minutes = 5 follows the clock" in said
    assert "training.max_steps=2000" in said
    counted = ["training.deterministic=true", "training.max_steps=2000"]
    assert load_config("demo", counted).training.deterministic


@pytest.mark.parametrize(
    ("schedule", "key"),
    [
        ("{type: cosine, warmup: 1 minute}", "warmup"),
        ("{type: wsd, warmup: 10, decay: 2 minutes}", "decay"),
    ],
)
def test_schedules_that_follow_the_clock_are_refused(schedule: str, key: str) -> None:
    words = ["training.deterministic=true", f"training.schedule={schedule}"]
    with pytest.raises(ConfigError, match=rf"schedule\.{key} = '. minutes' follows the clock") as e:
        load_config("debug", words)
    assert f"training.schedule.{key}=5%" in str(e.value)
    assert load_config("debug", words[1:]).training.schedule  # without it, as ever


@pytest.mark.parametrize("length", ["max_steps=400", "max_tokens=3_000_000"])
def test_choices_do_not_hang_on_what_is_measured(
    monkeypatch: pytest.MonkeyPatch, length: str
) -> None:
    words = ["training.deterministic=true", f"training.{length}", "training.device=cpu"]
    config = load_config("demo", words)
    chosen = []
    for fp32, bf16 in ((1e9, 9e9), (9e13, 1e13)):  # a slow machine with bf16, a fast one without
        values = {torch.float32: fp32, torch.bfloat16: bf16, torch.float64: 1e9}
        monkeypatch.setattr(hardware, "measured_rate", lambda dtype, *rest, v=values: v[dtype])
        found, _ = choose(config, samples_per_epoch=1000)
        chosen.append((found.training, found.model.attention, found.origins))
    assert chosen[0] == chosen[1]


def test_deterministic_choices_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["training.deterministic=true", "training.device=cpu"]
    monkeypatch.setattr(hardware, "bf16_instructions", lambda: "avx512_bf16")
    config, _ = choose(load_config("demo", [*words, "training.max_steps=100_000"]), 1000)
    assert (config.training.precision, config.training.compile) == (
        "bf16",
        compiler_problem() is None,
    )
    assert switches()[0]  # set before anything runs on a GPU: cuBLAS looks only once
    assert config.origin("training.precision") == (
        "chosen at run time: this processor has avx512_bf16 products; not measured"
    )
    if compiler_problem() is None:
        assert "uncompiled at a nominal " in config.origin("training.compile")
    monkeypatch.setattr(hardware, "bf16_instructions", lambda: None)
    config, _ = choose(load_config("demo", [*words, "training.max_steps=10"]), 1000)
    assert (config.training.precision, config.training.compile) == ("fp32", False)
    assert "has no bf16 products" in config.origin("training.precision")


def test_what_only_watches_changes_no_bit(make_trainer: MakeTrainer) -> None:
    common = ("training.deterministic=true", "training.max_steps=6", "model.dropout=0.1")
    plain = make_trainer(*common)
    plain.fit()
    for words in (
        "data.num_workers=2",
        "training.eval.every_steps=2",
        "training.checkpoint.every_steps=2",
        "training.log_every=4",
        "training.sample.prompts=[the]",
        "monitoring.sinks=[tensorboard]",
    ):
        watched = make_trainer(*common, words)
        watched.fit()
        one, other = final_state(plain.run), final_state(watched.run)
        assert one.keys() == other.keys()
        assert [n for n in one if not torch.equal(one[n], other[n])] == [], words


@pytest.mark.compiled
@pytest.mark.skipif(compiler_problem() is not None, reason="no C++ compiler to compile with")
def test_fresh_processes_give_equal_bits_whether_they_compile_or_find_the_code(
    tmp_path: Path,
) -> None:
    few = ("training.max_steps=3", "training.eval.every_steps=null", "training.eval.max_tokens=128")
    assert repeat(tmp_path, (*kinds(full=True)["compiled bf16 muon 2 workers"], *few)) == []
    assert any((tmp_path / "compiled").rglob("*.so"))  # it was compiled
