"""Every terminal of these tests is the same."""

import pytest


@pytest.fixture(autouse=True)
def _terminal_of_known_kind_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
