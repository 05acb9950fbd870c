"""Any valid override survives the run folder; any text at all is a configuration or a message."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.config.whole import WHOLE, another
from ultrathink.config import Config, load_config
from ultrathink.config.docs import to_yaml
from ultrathink.config.overrides import flatten
from ultrathink.config.reflection import all_fields
from ultrathink.config.yaml_format import dump_yaml, parse_yaml
from ultrathink.core.errors import ConfigError

VALID: dict[str, st.SearchStrategy[Any]] = {
    "run.name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True),
    "run.dir": st.text(min_size=1),
    "training.optimizer.lr": st.floats(1e-12, 1e12),
    "training.schedule.warmup": st.one_of(
        st.integers(0, 10**9),
        st.floats(0, 1),
        st.floats(1e-12, 1e12).map(lambda x: f"{x:.6f} tokens"),
        st.integers(0, 999).map(lambda n: f"{n} minutes"),
    ),
    "training.sample.prompts": st.lists(st.text(), max_size=4),
}


def assert_survives(config: Config, file: Path) -> None:
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file) == config
    # Any other program reads the same values from it.
    assert yaml.safe_load(to_yaml(config)) == config.model_dump(mode="json")


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
        assert_survives(config, tmp_path / "demo.yaml")

    check()


@pytest.mark.parametrize("name", WHOLE)
def test_another_value_of_every_option_is_taken_and_survives(name: str, tmp_path: Path) -> None:
    tree = load_config("debug", WHOLE[name]).model_dump(mode="json")
    derived = re.compile(r"^model\.|^tokenizer\.|\.type$")  # their values have to fit each other
    for key, value in flatten(tree).items():
        wanted = None if derived.search(key) else another(key, value)
        if wanted is not None:
            override = f"{key}={dump_yaml(wanted, one_line=True)}"
            config = load_config("debug", [*WHOLE[name], override])
            assert flatten(config.model_dump(mode="json"))[key] == wanted
            assert config.origin(key) == f"override {override}"
            assert_survives(config, tmp_path / "debug.yaml")


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
@given(st.sampled_from(list(all_fields(Config))), plain)
def test_any_value_anywhere_is_accepted_or_explained(key: str, value: Any) -> None:
    override = f"{key}={dump_yaml(value, one_line=True)}"
    with suppress(ConfigError):
        load_config("demo", [override])


@settings(max_examples=150)
@given(st.text())
def test_any_text_is_an_override_or_a_message(text: str) -> None:
    with suppress(ConfigError):
        load_config("demo", [text])
