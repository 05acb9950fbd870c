"""Which positional argument is the configuration, and which are overrides."""

from ultrathink.cli.arguments import split_config_and_overrides


def test_an_override_has_an_equals_sign_after_a_key() -> None:
    part = "data.train=[{type: text, path: a/b}]"
    assert split_config_and_overrides([]) == (None, [])
    assert split_config_and_overrides(["a=1", "my.yaml", part, "b="]) == (
        "my.yaml",
        ["a=1", part, "b="],
    )
    path = "runs/lr=0.1/config.yaml"
    assert split_config_and_overrides([path]) == (path, [])
