"""Any valid override survives the run folder; any text at all is a configuration or a message."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ultrathink.config import load_config
from ultrathink.config.docs import to_yaml
from ultrathink.config.reflection import all_keys
from ultrathink.config.yaml_format import dump_yaml, parse_yaml
from ultrathink.core.errors import ConfigError

positive = st.floats(1e-12, 1e12)
share = st.floats(0, 1)
length = st.one_of(
    st.integers(0, 10**9),
    share,
    positive.map(lambda x: f"{x:.6f} tokens"),
    st.integers(0, 999).map(lambda n: f"{n} minutes"),
)
name = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True)

VALID: dict[str, st.SearchStrategy[Any]] = {
    "run.name": name,
    "run.dir": st.text(min_size=1),
    "run.seed": st.integers(0, 2**63 - 1),
    "model.num_layers": st.integers(1, 10**6),
    "model.norm_eps": positive,
    "model.qk_norm": st.booleans(),
    "model.init.residual": st.sampled_from(["depth_scaled", "zero"]),
    "data.cache_dir": st.none() | st.text(min_size=1),
    "data.train": st.lists(
        st.fixed_dictionaries(
            {"type": st.just("text"), "path": st.text() | st.lists(st.text(), max_size=3)}
        ),
        min_size=1,
        max_size=3,
    ),
    "training.batch_size": st.integers(1, 10**6),
    "training.compile": st.booleans() | st.just("auto"),
    "training.max_tokens": st.integers(1, 10**15),
    "training.epochs": positive,
    "training.schedule.warmup": length,
    "training.schedule.decay": length,
    "training.optimizer.lr": positive,
    "training.optimizer.betas": st.lists(st.floats(0, 0.999), min_size=2, max_size=2),
    "training.sample.prompts": st.lists(st.text(), max_size=4),
}


@pytest.mark.parametrize("key", VALID)
def test_a_valid_value_survives_yaml_and_reloading(key: str, tmp_path: Path) -> None:
    @settings(
        max_examples=15,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(VALID[key])
    def check(value: Any) -> None:
        config = load_config("demo", [f"{key}={dump_yaml(value, one_line=True)}"])
        file = tmp_path / "demo.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(file) == config
        # Any other program reads the same values from it.
        assert yaml.safe_load(to_yaml(config)) == config.model_dump(mode="json")

    check()


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_yaml_is_read_as_it_was_written(value: Any) -> None:
    assert parse_yaml(dump_yaml(value)) == value
    line = dump_yaml(value, one_line=True)
    assert "\n" not in line
    assert parse_yaml(line) == value


@pytest.mark.parametrize(
    "text",
    ["1e3", "1e-3", ".5e3", "2024-01-01", "null", "~", "off", "0x10", "1_000", ".inf", "", " a",
     "a: b", "=", "- a", "#", "\x85", "\u2028", "a\nb", "&a", "[", "007", "12:30"],
)  # fmt: skip
def test_text_stays_text(text: str) -> None:
    for dumped in (dump_yaml([text]), dump_yaml([text], one_line=True)):
        assert parse_yaml(dumped) == [text]
        assert yaml.safe_load(dumped) == [text]


def test_what_occurs_twice_is_written_twice() -> None:
    shared = [0.9, 0.95]
    assert "&" not in dump_yaml({"a": shared, "b": shared})


@settings(max_examples=150)
@given(st.sampled_from(all_keys()), plain)
def test_any_value_anywhere_is_accepted_or_explained(key: str, value: Any) -> None:
    override = f"{key}={dump_yaml(value, one_line=True)}"
    with suppress(ConfigError):
        load_config("demo", [override])


@settings(max_examples=150)
@given(st.text())
def test_any_text_is_an_override_or_a_message(text: str) -> None:
    with suppress(ConfigError):
        load_config("demo", [text])
