"""From a preset or YAML file and overrides to a checked configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ultrathink.config.base import PartConfig
from ultrathink.config.explain import explain_validation_error
from ultrathink.config.overrides import Draft
from ultrathink.config.schema import Config, flatten
from ultrathink.config.yaml_format import parse_yaml
from ultrathink.core.errors import ConfigError, suggestion

CONFIG_FILE = "config.yaml"
ORIGINS_FILE = "origins.yaml"
DEFAULT_PRESET = "demo"
CHOSEN = "chosen at run time"
# What is chosen at run time, and the values that the choice rests on.
_RESTS_ON = {
    "training.micro_batch_size": (
        "training.batch_size",
        "training.device",
        "training.activation_checkpointing",
        "data.seq_len",
    ),
    "training.precision": ("training.device",),
    "training.compile": ("training.device",),
    "model.attention.backend": (
        "training.device",
        "training.precision",
        "training.compile",
        "data.seq_len",
    ),
    "training.step_budget": ("training.batch_size", "data.seq_len", "data.train"),
}


def load_config(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a preset's name, a YAML file or a run folder, with overrides applied.

    ``overrides`` are strings ``"dotted.key=value"``, the value read as YAML. Raises ConfigError
    with one message for all that is wrong.
    """
    tree, name, origins = _read_base(source)
    draft = Draft(tree, origins)
    for override in overrides:
        draft.override(override)
    draft.drop_replaced_lengths()
    # Its length has no default, and a message about that says more than "training is missing".
    draft.tree.setdefault("training", {})
    _leave_groups_to_checkpoint(draft.tree)
    return _derive(_validated(draft), name)


def _leave_groups_to_checkpoint(tree: dict[str, Any]) -> None:
    """Let the experts of a model of Hugging Face be spoken of without saying how many there are.

    What stands in for its groups has no origin, so what the checkpoint says replaces it.
    """
    model, training = tree.get("model"), tree["training"]
    moe = model.get("moe") if isinstance(model, dict) else None
    source = training.get("init_from") if isinstance(training, dict) else None
    if isinstance(moe, dict) and isinstance(source, str) and source.startswith("hf:"):
        moe.setdefault("groups", [{"name": "experts", "num_experts": 1, "top_k": 1}])


def change_config(config: Config, overrides: Sequence[str]) -> Config:
    """A resolved configuration with ``overrides`` applied; raises ConfigError.

    What was chosen at run time is open again where it rests on a value that is overridden, and so
    is the number of steps that the length came to.
    """
    draft = Draft(config.model_dump(mode="json"), config.origins)
    for override in overrides:
        draft.override(override)
    draft.drop_replaced_lengths()
    for key, grounds in _RESTS_ON.items():
        is_chosen = config.origin(key).startswith(CHOSEN)
        if is_chosen and not draft.is_overridden(key) and any(map(draft.is_overridden, grounds)):
            draft.set_open(key, None if key == "training.step_budget" else "auto")
    return _validated(draft)


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("ultrathink.config") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if ".yaml" in p.name)


def _validated(draft: Draft) -> Config:
    try:
        config = Config.model_validate(draft.tree)
    except ValidationError as error:
        raise ConfigError(explain_validation_error(error, draft.tree, draft.origins)) from None
    return config.with_origins(_with_short_forms(config, draft.origins))


def _read_base(source: str | Path | None) -> tuple[dict[str, Any], str, dict[str, str]]:
    """The values a config starts from, the name it gives to runs, and each value's origin."""
    text = str(source) if source is not None else DEFAULT_PRESET
    if text in preset_names() and not (isinstance(source, Path) and source.exists()):
        file = resources.files("ultrathink.config") / "presets" / f"{text}.yaml"
        tree = _parse(file.read_text(encoding="utf-8"), f"preset {text}")
        return tree, text, dict.fromkeys(flatten(tree), f"preset {text}")
    path = Path(text)
    if path.is_dir():
        return _read_run_folder(path)
    if path.suffix in (".yaml", ".yml"):
        tree = _parse(_read_text(path), str(path))
        return tree, path.stem, dict.fromkeys(flatten(tree), f"file {path}")
    presets = ", ".join(preset_names())
    if path.is_file():
        raise ConfigError(f"{text}: a configuration file's name ends in .yaml; rename it.")
    if len(path.parts) > 1:
        raise ConfigError(f"there is no file or run folder {text}. Presets: {presets}.")
    raise ConfigError(
        f"there is no preset {text!r}. {suggestion(text, preset_names())} "
        f"A file's name ends in .yaml; an override has the form key=value."
    )


def _read_run_folder(path: Path) -> tuple[dict[str, Any], str, dict[str, str]]:
    if not (path / CONFIG_FILE).is_file():
        raise ConfigError(
            f"the folder {path} is not a run folder: it has no {CONFIG_FILE}. "
            f"Presets: {', '.join(preset_names())}."
        )
    tree = _parse(_read_text(path / CONFIG_FILE), str(path / CONFIG_FILE))
    origins_file = path / ORIGINS_FILE
    if origins_file.is_file():
        recorded = _parse(_read_text(origins_file), str(origins_file))
        origins = {str(key): str(value) for key, value in recorded.items()}
    else:
        origins = dict.fromkeys(flatten(tree), f"file {path / CONFIG_FILE}")
    return tree, path.resolve().name, origins


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"there is no file {path}. Presets: {', '.join(preset_names())}."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} must hold sections (run:, model:, ...), not {tree!r:.60}.")
    return tree


def _with_short_forms(config: Config, origins: Mapping[str, str]) -> dict[str, str]:
    """``optimizer: muon`` gave the type, and nothing of what follows from it."""
    origins = dict(origins)
    for key in [key for key in origins if isinstance(_value_at(config, key), PartConfig)]:
        origins[f"{key}.type"] = origins.pop(key)
    return origins


def _value_at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, tuple) else getattr(value, part, None)
    return value


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
