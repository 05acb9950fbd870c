"""Which positional argument is the configuration, and which are overrides."""

import pytest

from ultrathink.cli.arguments import split_config_and_overrides
from ultrathink.core.errors import UltrathinkError


@pytest.mark.parametrize(
    ("words", "source", "overrides"),
    [
        ([], None, []),
        (["demo"], "demo", []),
        (["a.b=1", "c=2"], None, ["a.b=1", "c=2"]),
        (["a=1", "my.yaml", "b="], "my.yaml", ["a=1", "b="]),
        (["runs/lr=0.1/config.yaml"], "runs/lr=0.1/config.yaml", []),
        (["data.train=[{type: text, path: a/b}]"], None, ["data.train=[{type: text, path: a/b}]"]),
    ],
)
def test_an_override_has_an_equals_sign_after_a_key(
    words: list[str], source: str | None, overrides: list[str]
) -> None:
    assert split_config_and_overrides(words) == (source, overrides)


def test_there_is_one_configuration() -> None:
    with pytest.raises(UltrathinkError, match=r"'demo' and 'x' are given .* only one"):
        split_config_and_overrides(["demo", "a=1", "x"])
