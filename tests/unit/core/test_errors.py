"""Suggestions: the nearest name, or all of them."""

from ultrathink.core.errors import closest, suggestion


def test_the_nearest_name_is_suggested() -> None:
    assert closest("hiden_size", ["hidden_size", "num_layers"]) == "hidden_size"
    assert closest("zzz", ["hidden_size"]) is None
    assert suggestion("admw", ["muon", "adamw"]) == "Did you mean 'adamw'?"
    assert suggestion("bep", ["bpe", "byte"]) == "Did you mean 'bpe'?"


def test_without_a_near_name_all_are_listed_in_order() -> None:
    assert suggestion("gelu", ["swiglu_x", "relu2"]) == "Known: relu2, swiglu_x."
