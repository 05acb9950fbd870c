"""What the section ``orchestrator`` refuses."""

import pytest

from ultrathink.config import load_config
from ultrathink.core.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("orchestrator.limits.lr_factor=[1.0, 0.1]", r"lr_factor \[1, 0.1\] leaves no room"),
        ("orchestrator.limits.lr_factor=[0, 1]", "leaves no room"),
        ("orchestrator.limits.rollbacks=-1", "orchestrator.limits.rollbacks"),
        ("orchestrator.rules.rol_back=false", "Did you mean .*roll_back"),
        ("orchestrator.mode=acts", "orchestrator.mode"),
    ],
)
def test_what_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("debug", [override])


def test_off_is_off() -> None:
    assert load_config("debug", ["orchestrator.mode=off"]).orchestrator.mode == "off"
