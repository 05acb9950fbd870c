"""What is wrong with a configuration, in words: the key, its value, where it came from, the fix."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ultrathink.config.base import PartOf
from ultrathink.config.schema import Config
from ultrathink.core.errors import closest


def explain_validation_error(error: ValidationError, origins: Mapping[str, str]) -> str:
    """One line for each key with a problem."""
    problems: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        problems.setdefault(_key(detail), []).append(detail)
    lines = []
    for key, details in problems.items():
        caused_below = any(other.startswith(f"{key}.") for other in problems)
        if not (caused_below and details[0]["type"] == "too_short"):
            lines.append(_explain(key, details, origins))
    return "\n".join(lines)


def _key(detail: ErrorDetails) -> str:
    """The dotted key of a problem, without the names that pydantic adds for a union's members."""
    parts = [str(part) for part in detail["loc"]]
    added = ("literal[", "tuple[", "function-")
    return ".".join(
        part for part in parts if part not in _UNION_MEMBERS and not part.startswith(added)
    )


_UNION_MEMBERS = ("int", "bool", "float", "str")


def _explain(key: str, details: list[ErrorDetails], origins: Mapping[str, str]) -> str:
    detail = details[0]
    location: list[Any] = key.split(".") if key else []
    source = _source(key, origins)
    if detail["type"] == "extra_forbidden":
        return f"{key}{source}: there is no such key. {_known_keys(location, origins)}"
    if detail["type"] == "missing":
        return f"{key}: a value is needed here. {_describe(location)}".rstrip()
    if detail["type"] == "value_error":
        reason = str(detail.get("ctx", {}).get("error", detail["msg"])).rstrip(".")
        return f"{key}{source}: {reason}." if key else f"{reason}."
    wanted = list(dict.fromkeys(_expected(detail) for detail in details))
    return (
        f"{key} = {_shown(detail['input'])}{source}: should be {' or '.join(wanted)}. "
        f"{_describe(location)}"
    ).rstrip()


_EXPECTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list, like [a, b]",
    "too_short": "a list with at least one item",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "string_pattern_mismatch": "a name of letters, digits, '.', '_' and '-' that starts with a "
    "letter or digit",
}


def _expected(detail: ErrorDetails) -> str:
    kind = detail["type"]
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind == "literal_error":
        return str(detail.get("ctx", {})["expected"])
    return str(detail["msg"]).removeprefix("Input should be ")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _source(key: str, origins: Mapping[str, str]) -> str:
    """Where the value came from; for a section, the overrides of keys inside it."""
    if key in origins:
        return f" ({origins[key]})"
    inside = [origin for known, origin in origins.items() if known.startswith(f"{key}.")]
    overrides = [origin for origin in dict.fromkeys(inside) if origin.startswith("override")]
    return f" ({', '.join(overrides)})" if overrides else ""


def _known_keys(location: list[Any], origins: Mapping[str, str]) -> str:
    """Suggest the nearest key in the same section, else the same name in another section."""
    *parents, name = [str(part) for part in location]
    fields = _fields_at(parents)
    near = closest(name, fields)
    if near is not None:
        return f"Did you mean {'.'.join([*parents, near])!r}?"
    elsewhere = [key for key in all_keys() if key.rpartition(".")[2] == name]
    if elsewhere:
        return f"Did you mean {elsewhere[0]!r}?"
    return f"Known keys: {', '.join(fields)}."


def _fields_at(path: list[str]) -> list[str]:
    names: list[str] = []
    for section in _sections_at(path):
        names += [name for name in section.model_fields if name not in names]
    return names


def _sections_at(path: list[str]) -> list[type[BaseModel]]:
    """The section classes that a path of keys may lead to; several where parts have types."""
    current: list[type[BaseModel]] = [Config]
    for part in path:
        if part.isdigit():
            continue
        following: list[type[BaseModel]] = []
        for section in current:
            if part in section.model_fields:
                field = section.model_fields[part]
                following += sections_of(field.annotation, field.metadata)
        current = following
    return current


def sections_of(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> list[Any]:
    """The section classes inside a field's annotation: itself, a union's, a list's, a part's."""
    for marker in metadata:
        if isinstance(marker, PartOf):
            return [entry.options for entry in marker.registry if entry.options is not None]
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *markers = get_args(annotation)
        return sections_of(inner, markers)
    if origin in (Union, types.UnionType, tuple, list):
        return [s for argument in get_args(annotation) for s in sections_of(argument)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return []


def all_keys() -> list[str]:
    """Every dotted key of the configuration, parts of lists and of all types included."""
    keys: list[str] = []

    def visit(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            key = f"{prefix}{name}"
            if key not in keys:
                keys.append(key)
            for inner in sections_of(field.annotation, field.metadata):
                visit(inner, f"{key}.")

    visit(Config, "")
    return keys


def _describe(location: list[Any]) -> str:
    *parents, name = [str(part) for part in location] or [""]
    for section in _sections_at(parents):
        field = section.model_fields.get(name)
        if field is not None and field.description:
            return f"({field.description.rstrip('.')}.)"
    return ""
