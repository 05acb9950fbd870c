"""The reference of all options, as Markdown, a JSON schema and resolved YAML."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ultrathink.config.base import PartOf
from ultrathink.config.explain import sections_of
from ultrathink.config.schema import Config, flatten
from ultrathink.core.durations import Duration


def json_schema() -> dict[str, Any]:
    """A JSON schema of the YAML file, for editors."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "ULTRATHINK configuration"
    return _inline_definitions(schema)


def _inline_definitions(schema: dict[str, Any]) -> dict[str, Any]:
    """Lift the ``$defs`` of nested schemas to the top, where their references point."""
    definitions: dict[str, Any] = {}

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            for name, definition in node.pop("$defs", {}).items():
                definitions[name] = definition
                visit(definition)
            for value in node.values():
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit(schema)
    if definitions:
        schema["$defs"] = definitions
    return schema


def markdown() -> str:
    """A table of every option with its default and meaning, a section each."""
    lines = [
        "# Configuration",
        "",
        "Made by `ultrathink config docs`. Values come from the defaults below, then a preset or",
        "YAML file, then `dotted.key=value` on the command line; `ultrathink config show --why`",
        "says which.",
    ]
    _write_section(Config, "", lines)
    return "\n".join(lines) + "\n"


def _write_section(section: type[BaseModel], prefix: str, lines: list[str]) -> None:
    nested: list[tuple[str, Any]] = []
    rows: list[str] = []
    for name, field in section.model_fields.items():
        inner = sections_of(field.annotation, field.metadata)
        if inner:
            nested.append((f"{prefix}{name}", field))
        if not inner or not prefix or _is_part(field):
            default = _shown_default(field.default, has_sections=bool(inner))
            rows.append(f"| `{prefix}{name}` | {default} | {field.description or ''} |")
    if rows and prefix:
        lines += ["", "| key | default | meaning |", "|---|---|---|", *rows]
    for key, field in nested:
        classes = sections_of(field.annotation, field.metadata)
        several = _is_part(field)
        lines += ["", f"{'##' if '.' not in key else '###'} `{key}`", "", field.description or ""]
        for inner_class in classes:
            if several:
                kind = inner_class.model_fields["type"].default
                lines += ["", f"**type: {kind}** — {_first_sentence(inner_class)}"]
            _write_section(inner_class, f"{key}.", lines)


def _is_part(field: Any) -> bool:
    text = repr(field.annotation)
    return "PartOf" in text or any(isinstance(marker, PartOf) for marker in field.metadata)


def _first_sentence(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _shown_default(default: Any, *, has_sections: bool) -> str:
    if default is PydanticUndefined:
        return "" if has_sections else "required"
    if default is None:
        return "unset"
    if isinstance(default, BaseModel):
        return f"`{default.type}`" if hasattr(default, "type") else ""
    if isinstance(default, Duration):
        return f"`{default}`"
    if isinstance(default, tuple):
        shown = [getattr(item, "type", item) for item in default]
        return f"`[{', '.join(map(str, shown))}]`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def to_yaml(config: Config, *, why: bool = False) -> str:
    """The resolved configuration as YAML; with ``why`` each value's origin beside it."""
    tree = config.model_dump(mode="json")
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)
    if not why:
        return text
    leaves = flatten(tree)
    values = {key: yaml.safe_dump(value, default_flow_style=True, width=10_000).split("\n")[0]
              for key, value in leaves.items()}
    width = max(len(f"{key}: {value}") for key, value in values.items())
    rows = [f"{f'{key}: {value}':<{width}}  # {config.origin(key)}" for key, value in values.items()]
    return "\n".join(rows) + "\n"
