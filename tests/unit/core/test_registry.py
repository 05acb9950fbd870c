"""Registries: names, lazy import, optional packages, and a user's own parts."""

import sys
from pathlib import Path
from typing import Any

import pytest

from ultrathink.core import registry as registry_module
from ultrathink.core.errors import ConfigError
from ultrathink.core.registry import Registry, load_plugin


@pytest.fixture
def colours() -> Registry[Any]:
    registry: Registry[Any] = Registry("colour")
    registry.add("red", "fractions:Fraction")
    registry.add("green", "decimal:Decimal")
    return registry


def write_module(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_part_is_imported_when_it_is_loaded_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(tmp_path, "lazy_blue", "class Blue: ...", monkeypatch)
    registry: Registry[Any] = Registry("colour")
    registry.add("blue", "lazy_blue:Blue")
    assert registry.entry("blue").target == "lazy_blue:Blue"
    assert "lazy_blue" not in sys.modules

    part = registry.load("blue")
    assert part is sys.modules["lazy_blue"].Blue
    assert registry.load("blue") is part
    assert registry.entry("blue").target is part


def test_an_unknown_name_is_answered_with_the_nearest(colours: Registry[Any]) -> None:
    with pytest.raises(ConfigError, match=r"no colour called 'gren'\. Did you mean 'green'\?"):
        colours.entry("gren")
    with pytest.raises(ConfigError, match=r"no colour called 'xyz'\. Known: green, red\."):
        colours.load("xyz")


def test_a_name_is_taken_once(colours: Registry[Any]) -> None:
    with pytest.raises(ConfigError, match="colour 'red' is registered already"):
        colours.add("red", "decimal:Decimal")


def test_the_decorator_registers_the_object_itself(colours: Registry[Any]) -> None:
    @colours.register("blue", options=dict)
    class Blue: ...

    assert colours.load("blue") is Blue
    assert colours.entry("blue").options is dict


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("import absent_package_xyz", "No module named 'absent_package_xyz'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_plugin_that_fails_is_named_with_its_reason(
    text: str, message: str, tmp_path: Path
) -> None:
    plugin = tmp_path / "failing.py"
    plugin.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_plugin(plugin)
    assert f"--plugin {plugin} failed" in str(caught.value)
    assert message in str(caught.value)
    assert "ultrathink_plugin_failing" not in sys.modules
    with pytest.raises(ConfigError, match=r"must end in \.py"):
        load_plugin(plugin.rename(tmp_path / "parts.txt"))


def test_an_installed_plugin_is_found_when_a_name_is_unknown(
    tmp_path: Path, colours: Registry[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "_test_colours", colours, raising=False)
    monkeypatch.setattr(registry_module, "_loaded_entry_points", False)
    text = (
        "from ultrathink.core.registry import _test_colours\n"
        "_test_colours.add('installed', 'fractions:Fraction')\n"
    )
    write_module(tmp_path, "installed_parts", text, monkeypatch)
    info = tmp_path / "installed_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-parts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ultrathink.plugins]\nparts = installed_parts\n")

    assert "installed" not in colours
    assert colours.entry("installed").name == "installed"
