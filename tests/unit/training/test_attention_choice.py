"""A long run tries the kernels that compete; a short one, or one that must repeat, does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ultrathink.config import load_config
from ultrathink.config.schema import Config
from ultrathink.training import attention_choice
from ultrathink.training.attention_choice import choose_attention, try_backends
from ultrathink.training.choices import choose

CPU = torch.device("cpu")
LONG, SHORT = 7200.0, 60.0


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(
        "debug",
        [f"data.cache_dir={tmp_path / 'cache'}", "training.micro_batch_size=2"],
    )


def trials(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> list[Config]:
    """Let a trial find these times; returns the list of the configurations that were tried."""
    tried: list[Config] = []

    def pretend(config: Config, dtype: torch.dtype, compiled: bool) -> dict[str, float]:
        tried.append(config)
        return dict(seconds)

    monkeypatch.setattr(attention_choice, "try_backends", pretend)
    return tried


def chosen(config: Config, planned_s: float | None, dtype: Any = torch.bfloat16) -> tuple[str, str]:
    return choose_attention(config, dtype, CPU, planned_s)


@pytest.mark.parametrize(
    ("sdpa", "blocks", "best"), [(0.002, 0.005, "sdpa"), (3e-3, 1e-3, "blocks")]
)
def test_a_long_run_takes_what_was_faster(
    monkeypatch: pytest.MonkeyPatch, config: Config, sdpa: float, blocks: float, best: str
) -> None:
    trials(monkeypatch, sdpa=sdpa, blocks=blocks)
    name, reason = chosen(config, LONG)
    assert name == best
    assert f"sdpa {1000 * sdpa:.1f} ms" in reason
    assert f"blocks {1000 * blocks:.1f} ms" in reason


def test_a_trial_is_made_once_for_each_setting(
    monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    tried = trials(monkeypatch, sdpa=1.0, blocks=2.0)
    for _ in range(3):
        assert chosen(config, LONG)[0] == "sdpa"
    assert len(tried) == 1
    longer = config.replace({"data.seq_len": 128}, origin="test")
    for dtype in (torch.float32, torch.bfloat16):
        chosen(longer, LONG, dtype)
    assert len(tried) == 3


def test_a_damaged_cache_is_created_again_and_one_that_cannot_be_written_is_ignored(
    monkeypatch: pytest.MonkeyPatch, config: Config, tmp_path: Path
) -> None:
    tried = trials(monkeypatch, sdpa=1.0, blocks=2.0)
    cache = tmp_path / "cache"
    cache.write_text("a file where the folder would be")
    assert chosen(config, LONG)[0] == "sdpa"
    cache.unlink()
    cache.mkdir()
    for damage in ("{", "[]"):
        (cache / "attention.json").write_text(damage)
        assert chosen(config, LONG)[0] == "sdpa"
    assert len(tried) == 3
    assert len(json.loads((cache / "attention.json").read_text())) == 1


@pytest.mark.parametrize(
    ("overrides", "planned_s"),
    [
        ({}, SHORT),
        ({}, None),
        ({"training.deterministic": True}, LONG),
        ({"data.seq_len": 4096}, LONG),  # the scores of blocks would fill the memory
    ],
)
def test_where_no_trial_pays_the_rule_decides(
    monkeypatch: pytest.MonkeyPatch,
    config: Config,
    overrides: dict[str, object],
    planned_s: float | None,
) -> None:
    tried = trials(monkeypatch, sdpa=1.0, blocks=2.0)
    config = config.replace(overrides, origin="test")
    name, reason = chosen(config, planned_s)
    assert name == ("sdpa" if config.data.seq_len == 4096 else "blocks")
    assert reason == "bfloat16 on cpu"
    assert not tried


def test_the_choice_of_a_long_run_is_in_its_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trials(monkeypatch, sdpa=1.0, blocks=2.0)
    overrides = [f"data.cache_dir={tmp_path}", "training.max_minutes=60"]
    config, _ = choose(load_config("debug", overrides), samples_per_epoch=1000)
    assert config.model.attention.backend == "sdpa"
    assert "sdpa 1000.0 ms" in config.origin("model.attention.backend")


@pytest.mark.parametrize("isolate", [True, False])
def test_a_trial_times_real_passes(config: Config, isolate: bool) -> None:
    config = config.replace({"data.packing.isolate_documents": isolate}, origin="test")
    before = torch.get_rng_state()
    seconds = try_backends(config, torch.float32, compiled=False)
    assert set(seconds) == {"sdpa", "blocks"}
    assert all(0 < taken < 5 for taken in seconds.values())
    assert torch.equal(torch.get_rng_state(), before)  # a run's numbers are the same with a trial
