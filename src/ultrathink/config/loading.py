"""From a preset or YAML file and overrides to a checked configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ultrathink.config.explain import explain_validation_error
from ultrathink.config.schema import Config, flatten
from ultrathink.config.training import BUDGETS
from ultrathink.core.errors import ConfigError, suggestion

CONFIG_FILE = "config.yaml"
ORIGINS_FILE = "origins.yaml"


def load_config(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a preset's name, a YAML file or a run folder, with overrides applied.

    ``overrides`` are strings ``"dotted.key=value"``, the value read as YAML. Raises ConfigError
    with one message for all that is wrong.
    """
    tree, name, origins = _read_base(source)
    for override in overrides:
        key, value = parse_override(override)
        set_dotted(tree, key, value, override)
        origins = {k: v for k, v in origins.items() if k != key and not k.startswith(f"{key}.")}
        origins.update(dict.fromkeys(flatten(value, key), f"override {override}"))
    _drop_replaced_lengths(tree, origins)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain_validation_error(error, origins)) from None
    return _derive(config.with_origins(origins), name)


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("ultrathink.config") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if ".yaml" in p.name)


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``dotted.key=value`` and read the value as YAML."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"{text!r} is not an override; write dotted.key=value, "
            f"for example training.max_steps=100."
        )
    try:
        return key.strip(), yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {text!r} is not valid YAML: {_first_line(error)}") from None


def set_dotted(tree: dict[str, Any], key: str, value: Any, override: str) -> None:
    """Set one dotted key in nested mappings; a new ``type`` starts that part from its defaults."""
    node: Any = tree
    *parents, leaf = key.split(".")
    for depth, part in enumerate(parents):
        child = _child(node, part, ".".join(parents[: depth + 1]), override)
        if isinstance(child, str) and parents[depth:] and isinstance(node, dict):
            child = {"type": child}  # the short form `optimizer: muon`
            node[part] = child
        node = child
    if isinstance(node, list):
        index = _list_index(node, leaf, key, override)
        node[index] = value
        return
    if not isinstance(node, dict):
        raise ConfigError(f"override {override!r}: {'.'.join(parents)} has no keys of its own.")
    if leaf == "type" and node.get("type") not in (None, value):
        node.clear()
    node[leaf] = value


def _drop_replaced_lengths(tree: dict[str, Any], origins: dict[str, str]) -> None:
    """A length given as an override replaces the one that the preset or file gave."""
    training = tree.get("training")
    if not isinstance(training, dict):
        return
    keys = [f"training.{name}" for name in (*BUDGETS, "step_budget")]
    overridden = [key for key in keys if origins.get(key, "").startswith("override")]
    if overridden:
        for key in set(keys) - set(overridden):
            training.pop(key.removeprefix("training."), None)
            origins.pop(key, None)


def _child(node: Any, part: str, path: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, part, path, override)]
    if not isinstance(node, dict):
        raise ConfigError(f"override {override!r}: {path} has no keys of its own.")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _list_index(node: list[Any], part: str, path: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(
            f"override {override!r}: {path} names item {part!r} of a list of {len(node)}; "
            f"use a number from 0 to {len(node) - 1}, or set the whole list."
        )
    return int(part)


def _read_base(source: str | Path | None) -> tuple[dict[str, Any], str, dict[str, str]]:
    """The values a config starts from, the name it gives to runs, and each value's origin."""
    text = str(source) if source is not None else "demo"
    path = Path(text)
    if path.is_dir():
        return _read_run_folder(path)
    if path.suffix not in (".yaml", ".yml"):
        if text not in preset_names():
            raise ConfigError(
                f"there is no preset {text!r}. {suggestion(text, preset_names())} "
                f"A file's name ends in .yaml; an override has the form key=value."
            )
        file = resources.files("ultrathink.config") / "presets" / f"{text}.yaml"
        tree = _parse(file.read_text(encoding="utf-8"), f"preset {text}")
        return tree, text, dict.fromkeys(flatten(tree), f"preset {text}")
    tree = _parse(_read_text(path), str(path))
    return tree, path.stem, dict.fromkeys(flatten(tree), f"file {path}")


def _read_run_folder(path: Path) -> tuple[dict[str, Any], str, dict[str, str]]:
    tree = _parse(_read_text(path / CONFIG_FILE), str(path / CONFIG_FILE))
    origins_file = path / ORIGINS_FILE
    if origins_file.is_file():
        recorded = _parse(_read_text(origins_file), str(origins_file))
        origins = {str(key): str(value) for key, value in recorded.items()}
    else:
        origins = dict.fromkeys(flatten(tree), f"file {path / CONFIG_FILE}")
    return tree, path.name, origins


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"there is no file {path}. Presets: {', '.join(preset_names())}."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {_first_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} must hold sections (run:, model:, …), not {tree!r:.60}.")
    return tree


def _first_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem


def _derive(config: Config, name: str) -> Config:
    """Fill in what follows from other values, recording from which."""
    if config.run.name is None:
        config = config.replace({"run.name": name}, origin="derived from the config's name")
    for field, (value, reason) in config.model.derived().items():
        config = config.replace({f"model.{field}": value}, origin=f"derived from {reason}")
    if config.model.vocab_size is None:
        config = config.replace(
            {"model.vocab_size": config.tokenizer.size()}, origin="derived from the tokenizer"
        )
    return config
