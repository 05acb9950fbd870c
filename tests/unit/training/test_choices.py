import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ultrathink.config import load_config
from ultrathink.config.model import ModelConfig
from ultrathink.config.size import sizes
from ultrathink.core.errors import ConfigError
from ultrathink.training import attention_choice, hardware
from ultrathink.training.choices import _micro_batch_size, choose
from ultrathink.training.compiling import compiler_problem
from ultrathink.training.hardware import choose_device, choose_precision, measured_rate, peak_flops

CPU = torch.device("cpu")


def rates(monkeypatch: pytest.MonkeyPatch, *, bf16: float) -> None:
    """Pretend that fp32 products run at 100 GFLOP/s and bf16 products at ``bf16`` times that."""
    values = {torch.float32: 1e11, torch.bfloat16: bf16 * 1e11, torch.float64: 5e10}
    monkeypatch.setattr(hardware, "measured_rate", lambda dtype, *rest: values[dtype])


@pytest.mark.parametrize(("bf16", "chosen"), [(4.0, "bf16"), (1.2, "fp32"), (0.02, "fp32")])
def test_precision_follows_the_measured_rates_unless_configured(
    monkeypatch: pytest.MonkeyPatch, bf16: float, chosen: str
) -> None:
    rates(monkeypatch, bf16=bf16)
    precision, reason = choose_precision("auto", CPU)
    assert precision == chosen
    assert f"{bf16:.1f} times the rate" in reason
    assert choose_precision("bf16", CPU)[0] == "bf16"


@pytest.mark.skipif(compiler_problem() is not None, reason="nothing can be compiled here")
def test_a_compiled_run_refuses_selective_checkpointing() -> None:
    words = ["training.activation_checkpointing=selective", "training.device=cpu"]
    with pytest.raises(ConfigError, match=r"use full, none, or training\.compile=false"):
        choose(load_config("debug", [*words, "training.compile=true"]), 1000)
    config, _ = choose(load_config("debug", words), 1000)
    assert config.training.activation_checkpointing == "selective"


def test_peaks_come_from_the_data_sheet_or_from_the_device_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert 1e5 < measured_rate(torch.float32, 128, 0.01) < 1e14
    asked: list[tuple[torch.dtype, str]] = []

    def measured(dtype: torch.dtype, size: int, seconds: float, device: str) -> float:
        asked.append((dtype, device))
        return 1.0

    monkeypatch.setattr(hardware, "measured_rate", measured)
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(gpu, "bf16") == 989e12
    assert peak_flops(gpu, "fp32") == 1.0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40")
    assert peak_flops(gpu, "bf16") == 1.0
    assert peak_flops(CPU, "fp32") == 1.0
    assert asked == [
        (torch.float32, "cuda:0"),
        (torch.bfloat16, "cuda:0"),
        (torch.float32, "cpu"),
    ]


def test_auto_is_replaced_by_values_that_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    rates(monkeypatch, bf16=4.0)
    config = load_config("demo", ["training.max_steps=10"])
    config, choices = choose(config, samples_per_epoch=1000)
    training = config.training
    assert (training.device, training.precision, training.compile) == ("cpu", "bf16", False)
    assert training.micro_batch_size == training.batch_size
    assert config.model.attention.backend in ("blocks", "sdpa")
    for key in ("training.precision", "training.compile", "model.attention.backend"):
        assert config.origin(key).startswith("chosen at run time: ")
    assert choices.precision == "bf16"
    assert choices.warnings == ()
    again, _ = choose(config, samples_per_epoch=1000)
    assert again == config  # a resumed run chooses the same


@pytest.mark.parametrize(
    ("length", "compiled"),
    [
        ("training.max_minutes=5", True),
        ("training.max_minutes=0.5", False),
        ("training.max_steps=10", False),
        ("training.max_steps=1000000", True),
    ],
)
def test_compiling_pays_in_long_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, length: str, compiled: bool
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(attention_choice, "try_backends", lambda *_: {"sdpa": 1.0, "blocks": 2.0})
    rates(monkeypatch, bf16=4.0)
    config = load_config("demo", [length, f"data.cache_dir={tmp_path}"])
    config, _ = choose(config, samples_per_epoch=1000)
    assert config.training.compile is compiled


def test_without_a_compiler_training_is_eager_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for wanted in ("auto", "true"):
        config = load_config("demo", [f"training.compile={wanted}"])
        config, choices = choose(config, samples_per_epoch=1000)
        assert config.training.compile is False
        [warning] = choices.warnings
        assert "no C++ compiler was found (install g++ or clang)" in warning
    off, choices = choose(load_config("demo", ["training.compile=false"]), samples_per_epoch=1)
    assert off.training.compile is False
    assert choices.warnings == ()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "mps")
    with pytest.raises(ConfigError, match="shows no CUDA devices; use auto or cpu"):
        choose_device("cuda:3")
    with pytest.raises(ConfigError, match="no such kind of device; use auto, cpu, cuda"):
        choose_device("gpu")
    with pytest.raises(ConfigError, match="MPS has no fp64; use fp32 or bf16"):
        choose_precision("fp64", torch.device("mps"))


EXPERTS = "model.moe={groups: [{name: experts, num_experts: 4, top_k: 2}], intermediate_size: 8}"


def test_the_kernel_of_experts_is_chosen_and_written_down() -> None:
    config = load_config("debug", [EXPERTS, "training.precision=fp64"])
    chosen, _ = choose(config, None)
    assert chosen.model.moe is not None
    assert chosen.model.moe.backend == "batched"
    assert "chosen at run time: the fastest for cpu" in chosen.origin("model.moe.backend")
    loop, grouped = (
        config.replace({"model.moe.backend": name}, origin="test")
        for name in ("loop", "grouped_mm")
    )
    assert choose(loop, None)[0].model.moe.backend == "loop"
    with pytest.raises(ConfigError, match=r"takes fp32 or bf16, but training\.precision is"):
        choose(grouped, None)


def test_other_models_take_memory_from_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a frozen one its weights, and the activations of one layer at a time; of one that is
    trained all activations, and what is kept of each weight."""
    split, _ = choose(load_config("debug", ["training.batch_size=96", "data.seq_len=512"]), 1000)
    assert split.training.micro_batch_size == 16  # 16 x 512 positions
    config = load_config("debug", ["training.batch_size=4096", "model.num_layers=4"])
    weights = 4 * sizes(config.model).total

    def chosen(free: int, *frozen: ModelConfig, trained: Sequence[ModelConfig] = ()) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
        return _micro_batch_size(config, torch.device("cuda"), 4096, frozen, lambda _: trained)

    plenty = 1 << 28
    alone = chosen(plenty)
    assert alone == 256  # 289 fit
    assert chosen(plenty + weights, config.model) == 128  # 231: five layers of activations, not 4
    assert chosen(2 * plenty, config.model) == 256
    assert chosen(plenty + 4 * weights, trained=[config.model]) == 128  # 144: eight layers
    assert chosen(4 * weights, trained=[config.model]) == 1
    assert chosen(weights, config.model) == 1
