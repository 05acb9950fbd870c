"""From a preset or YAML file and overrides to a checked configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, overload

from pydantic import ValidationError

from ultrathink.config.base import PartConfig
from ultrathink.config.explain import explain_validation_error
from ultrathink.config.overrides import Draft, flatten
from ultrathink.config.reflection import options_of
from ultrathink.config.root import DEFAULT, Root
from ultrathink.config.schema import Config
from ultrathink.config.yaml_format import missing_space, parse_yaml
from ultrathink.core.errors import ConfigError, suggestion

CONFIG_FILE = "config.yaml"
ORIGINS_FILE = "origins.yaml"
CHOSEN = "chosen at run time"
RootT = TypeVar("RootT", bound=Root)


@overload
def load_config(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Config: ...


@overload
def load_config(
    source: str | Path | None, overrides: Sequence[str], root: type[RootT]
) -> RootT: ...


def load_config(
    source: str | Path | None = None, overrides: Sequence[str] = (), root: type[Root] = Config
) -> Root:
    """The configuration of a preset's name, a YAML file or a run folder, with overrides applied.

    ``overrides`` are strings ``"dotted.key=value"``, the value read as YAML. ``root`` is the kind
    of job, training by default. Raises ConfigError with one message for all that is wrong.
    """
    tree, name, origins = _read_base(source, root)
    draft = Draft(tree, origins)
    for override in overrides:
        draft.override(override)
    root.prepare(draft)
    return _validated(draft, root).derived(name)


def change_config(config: RootT, overrides: Sequence[str]) -> RootT:
    """A resolved configuration with ``overrides`` applied; raises ConfigError.

    A value chosen at run time, such as the number of steps, is chosen again where it depends on one
    that is overridden.
    """
    draft = Draft(config.model_dump(mode="json"), config.origins)
    for override in overrides:
        draft.override(override)
    config.prepare(draft)
    for key, rule in options_of(type(config)).items():
        is_open = any(map(draft.is_overridden, rule.rests_on)) and not draft.is_overridden(key)
        if is_open and config.origin(key).startswith(CHOSEN):
            draft.set_open(key)
    return _validated(draft, type(config))


def preset_names(root: type[Root] = Config) -> list[str]:
    """Names of the presets that come with the package."""
    if root.presets is None:
        return []
    folder = resources.files("ultrathink.config") / root.presets
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if ".yaml" in p.name)


def _validated(draft: Draft, root: type[RootT]) -> RootT:
    try:
        config = root.model_validate(draft.tree)
    except ValidationError as error:
        raise ConfigError(explain_validation_error(error, draft, root)) from None
    return config.with_origins(_with_short_forms(config, draft.origins))


def _read_base(
    source: str | Path | None, root: type[Root]
) -> tuple[dict[str, Any], str, dict[str, str]]:
    """The values a config starts from, the name it gives to runs, and each value's origin."""
    text = str(source if source is not None else root.default_preset or DEFAULT)
    presets = preset_names(root)
    if text in presets and not (isinstance(source, Path) and source.exists()):
        file = resources.files("ultrathink.config") / f"{root.presets}/{text}.yaml"
        tree = _parse(file.read_text(encoding="utf-8"), f"preset {text}", root)
        return tree, text, dict.fromkeys(flatten(tree), f"preset {text}")
    if source is None:
        return {}, text, {}
    path = Path(text)
    if path.is_dir():
        return _read_run_folder(path, root)
    if path.suffix in (".yaml", ".yml"):
        tree = _read(path, root)
        return tree, path.stem, dict.fromkeys(flatten(tree), f"file {path}")
    if path.is_file():
        raise ConfigError(f"{text}: a configuration file's name ends in .yaml; rename it.")
    if len(path.parts) > 1:
        raise ConfigError(f"there is no file or run folder {text}.{_named_presets(root)}")
    raise ConfigError(
        f"there is no preset {text!r}. {suggestion(text, presets)} "
        f"A file's name ends in .yaml; an override has the form key=value."
    )


def _named_presets(root: type[Root]) -> str:
    names = ", ".join(preset_names(root))
    return f" Presets: {names}." if names else ""


def _read_run_folder(path: Path, root: type[Root]) -> tuple[dict[str, Any], str, dict[str, str]]:
    config_file, origins_file = path / CONFIG_FILE, path / ORIGINS_FILE
    if not config_file.is_file():
        raise ConfigError(
            f"the folder {path} is not a run folder: it has no {CONFIG_FILE}.{_named_presets(root)}"
        )
    tree = _read(config_file, root)
    origins = dict.fromkeys(flatten(tree), f"file {config_file}")
    if origins_file.is_file():
        origins = {key: str(value) for key, value in _read(origins_file, root).items()}
    return tree, path.resolve().name, origins


def _read(path: Path, root: type[Root]) -> dict[str, Any]:
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path), root)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}.{_named_presets(root)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def _parse(text: str, where: str, root: type[Root]) -> dict[str, Any]:
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        first = ":, ".join(list(root.model_fields)[:2])
        advice = missing_space(tree)
        problem = f"; {advice}" if advice else ""
        raise ConfigError(f"{where} must hold sections ({first}:, ...), not {tree!r:.60}{problem}.")
    return tree


def _with_short_forms(config: Root, origins: Mapping[str, str]) -> dict[str, str]:
    """The origins with that of ``optimizer: muon`` moved to its type."""
    origins = dict(origins)
    for key in [key for key in origins if isinstance(_value_at(config, key), PartConfig)]:
        origins[f"{key}.type"] = origins.pop(key)
    return origins


def _value_at(config: Root, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, tuple) else getattr(value, part, None)
    return value
