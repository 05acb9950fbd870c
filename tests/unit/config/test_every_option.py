"""What holds for every option of the tree: each mistake is answered with the key and the fix."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from tests.unit.config.whole import WHOLE
from ultrathink.config import Config, load_config
from ultrathink.config.overrides import flatten
from ultrathink.config.reflection import all_fields, field_at, is_list
from ultrathink.core.durations import Duration
from ultrathink.core.errors import ConfigError

BOUNDS = {
    "gt": "greater than {}",
    "ge": "greater than or equal to {}",
    "lt": "less than {}",
    "le": "less than or equal to {}",
}


@pytest.fixture(params=WHOLE)
def whole(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return WHOLE[request.param]


def options(whole: tuple[str, ...]) -> Iterator[tuple[str, FieldInfo]]:
    """The dotted key and the field of each option that a configuration has, but for types."""
    tree = load_config("debug", whole).model_dump(mode="json")
    for key in flatten(tree):
        found = field_at(Config, key.split("."), tree)
        assert found is not None, key
        if not key.endswith(".type"):
            yield key, found[1]


def message(whole: tuple[str, ...], override: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config("debug", [*whole, override])
    return str(caught.value)


def choices_of(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def test_these_configurations_have_every_option() -> None:
    seen = {key for parts in WHOLE.values() for key, _ in options(parts)}
    names = {".".join(part for part in key.split(".") if not part.isdigit()) for key in seen}
    for key in all_fields(Config):
        is_section = any(other.startswith(f"{key}.") for other in all_fields(Config))
        is_there = key.startswith(("data.val.", "training.evaluators.source."))  # in data.train
        assert key in names or is_section or is_there or key.endswith(".type"), key


def test_a_slip_in_any_key_is_answered_with_that_key(whole: tuple[str, ...]) -> None:
    for key, _ in options(whole):
        prefix, _, name = key.rpartition(".")
        if len(name) > 3:
            slip = f"{name[:-2]}{name[-1]}{name[-2]}" if name[-1] != name[-2] else name[:-1]
            assert f"Did you mean {key!r}?" in message(whole, f"{prefix}.{slip}=1")


def test_a_value_of_another_kind_is_answered_with_the_right_one(whole: tuple[str, ...]) -> None:
    for key, field in options(whole):
        allowed = get_args(field.annotation) or (field.annotation,)
        is_name = str in allowed and get_origin(field.annotation) is not Literal
        said = message(whole, f"{key}={3 if is_name else 'zz'}")
        if Duration in allowed:
            assert said.startswith(f"{key} (override): 'zz' is not a length of training;")
            continue
        wrong = "3" if is_name else "'zz'"
        assert said.startswith(f"{key} = {wrong} (override): should be "), key
        assert f"({str(field.description).rstrip('.')}.)" in said, key
        assert not is_list(field) or "list" in said, key
        assert (type(None) in allowed) == (", or null" in said), key
        choices = [c for kind in (field.annotation, *allowed) for c in choices_of(kind)]
        assert all(repr(choice) in said for choice in choices), key
        if {int, float} & set(allowed) and bool not in allowed and not is_list(field):
            truth = message(whole, f"{key}=true")
            assert truth.startswith(f"{key} = true (override): should be a "), key
            assert "number" in truth, key


def test_a_number_beyond_its_bound_is_answered_with_the_bound(whole: tuple[str, ...]) -> None:
    count = 0
    for key, field in options(whole):
        for marker in field.metadata:
            for name, words in BOUNDS.items():
                bound: Any = getattr(marker, name, None)
                if bound is None:
                    continue
                step = {"gt": 0, "ge": -1, "lt": 0, "le": 1}[name]
                said = message(whole, f"{key}={bound + step}")
                assert said.startswith(f"{key} = {bound + step} (override): should be "), key
                assert words.format(bound) in said, key
                count += 1
    assert count > 40
