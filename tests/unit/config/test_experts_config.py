"""The section ``model.moe``: what it derives, and what it answers to mistakes."""

from __future__ import annotations

import pytest

from ultrathink.config import load_config
from ultrathink.config.model import FEED_FORWARDS
from ultrathink.core.errors import ConfigError

ONE = "model.moe.groups=[{name: a, num_experts: 8, top_k: 2}]"


def groups(text: str) -> str:
    return f"model.moe.groups=[{text}]"


MISTAKES = {
    (groups("{name: a, num_experts: 4, top_k: 5}"),): "top_k (5) of group 'a' is above its num_",
    (groups("{name: a, num_experts: 4}"),): "groups.0.top_k: a value is needed here",
    (groups("{name: a, num_experts: 4, top_k: 1, max_experts: 3}"),): "max_experts (3) of group 'a'"
    " is below its num_experts (4)",
    (groups("{name: a, num_experts: 4, top_k: 1}, {name: a, num_experts: 2, top_k: 1}"),): "two "
    "groups are called 'a'; give each its own name",
    (groups("{name: 1a, num_experts: 4, top_k: 1}"),): "should be a name of letters, digits, '_' "
    "and '-' that starts with a letter.",
    ("model.moe.routing.jitter=0.1",): "model.moe.groups: a value is needed here",
    (ONE, "model.moe.intermediate_size=12"): "intermediate_size (12) must be a multiple of 8, "
    "because the grouped product reads rows of 16 bytes; use 8 or 16.",
    (ONE, "model.moe.intermediate_size=5"): "use 8.",
    (ONE, "model.moe.shared_size=20"): "shared_size (20) must be a multiple of 8",
    (ONE, "model.hidden_size=36", "model.num_heads=2"): "hidden_size (36) must be a multiple of 8 "
    "for a model with experts",
    (ONE, "model.moe.layers=[2]"): "model.moe.layers: there is no layer 2; the model has 2, 0 to 1",
    (ONE, "model.moe.layers=[true]"): "True is no layer; write an index",
    (ONE, "model.moe.layers=[1.5]"): "model.moe.layers: the fraction 1.5 is outside 0.0 to 1",
    (ONE, "model.moe.layers=sandwich"): "moe.layers is 'sandwich', which is no layer of a model "
    "with num_layers = 2",
    (ONE, "model.moe.layers=interleaved", "model.num_layers=1"): "num_layers = 1; use all",
    (ONE, "model.feed_forward=mine"): "experts compute swiglu or relu2, and feed_forward is 'mine'",
}


@pytest.mark.parametrize("overrides", MISTAKES, ids=lambda overrides: overrides[-1])
def test_a_mistake_names_the_key_the_value_and_the_fix(overrides: tuple[str, ...]) -> None:
    FEED_FORWARDS.add("mine", "ultrathink.model.feed_forward:SwiGLU")  # which is no expert
    with pytest.raises(ConfigError) as caught:
        load_config("debug", list(overrides))
    assert MISTAKES[overrides] in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "width"),
    [
        (("model.intermediate_size=64",), 32),  # two experts of a token have the dense width
        (("model.intermediate_size=65",), 40),
        (("model.hidden_size=64", "model.feed_forward=relu2"), 128),
        (("model.intermediate_size=64", "model.moe.intermediate_size=8"), 8),
        (("model.intermediate_size=64", "model.moe.shared_size=32"), 32),
    ],
)
def test_the_width_of_an_expert_follows_from_the_dense_one(
    overrides: tuple[str, ...], width: int
) -> None:
    config = load_config("debug", [ONE, *overrides])
    assert config.model.moe is not None
    assert config.model.moe.intermediate_size == width
    if width != 8:
        origin = config.origin("model.moe.intermediate_size")
        assert "model.intermediate_size / 2 experts of a token" in origin


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        ("all", 3, (0, 1, 2)),
        ("interleaved", 5, (1, 3)),
        ("sandwich", 5, (1, 2, 3)),
        ("[2, 0]", 5, (0, 2)),
        ("[0.0, 0.5, 1.0]", 8, (0, 4, 7)),
        ("[0.5, 2]", 4, (2,)),
        ("[1]", 5, (1,)),  # an index
        ("[1.0]", 5, (4,)),  # the end
    ],
)
def test_layers_by_name_index_and_fraction(
    layers: str, num_layers: int, expected: tuple[int, ...]
) -> None:
    words = [ONE, f"model.num_layers={num_layers}", f"model.moe.layers={layers}"]
    assert load_config("debug", words).model.expert_layers == expected


def test_several_groups_are_balanced_by_a_bias_and_one_is_not() -> None:
    """A Mixtral has one group and no bias."""
    one = "{name: knowledge, num_experts: 8, top_k: 2}"
    two = one.replace("knowledge", "skill")
    for groups, rate in ((one, 0.0), (f"{one}, {two}", 0.005)):
        config = load_config("debug", [f"model.moe.groups=[{groups}]"])
        assert config.model.moe is not None
        assert config.model.moe.balance.bias_rate == rate
        assert config.origin("model.moe.balance.bias_rate").startswith("derived from")
        asked = load_config(
            "debug", [f"model.moe.groups=[{groups}]", "model.moe.balance.bias_rate=0.25"]
        )
        assert asked.model.moe is not None
        assert asked.model.moe.balance.bias_rate == 0.25
