"""What is wrong with a configuration, in words: the key, its value, where it came from, the fix."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ultrathink.config.overrides import Draft
from ultrathink.config.reflection import all_fields, field_at, is_optional, sections_at, type_name
from ultrathink.config.yaml_format import dump_yaml
from ultrathink.core.errors import closest

# What pydantic puts into a location for the members of a union, which are no keys.
_NO_KEY = re.compile(
    r"^(int|bool|float|str|(literal|tuple|function-[a-z-]+|constrained-[a-z]+)\[.*)$"
)


def explain_validation_error(error: ValidationError, draft: Draft, root: type[BaseModel]) -> str:
    """One line for each key of ``draft``, made for ``root``, with a problem."""
    problems: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        problems.setdefault(_key(detail), []).append(detail)
    lines = []
    for key, details in problems.items():
        caused_below = any(other.startswith(f"{key}.") for other in problems)
        if not (caused_below and details[0]["type"] == "too_short"):
            lines.append(_explain(key, details, draft, root))
    return "\n".join(lines)


def _key(detail: ErrorDetails) -> str:
    return ".".join(part for part in map(str, detail["loc"]) if not _NO_KEY.match(part))


def _explain(key: str, details: list[ErrorDetails], draft: Draft, root: type[BaseModel]) -> str:
    detail = details[0]
    path = key.split(".") if key else []
    source = _source(key, draft.origins)
    if detail["type"] == "extra_forbidden":
        return f"{key}{source}: there is no such key. {_nearest_key(path, draft.tree, root)}"
    if detail["type"] == "missing":
        return _missing(path, detail["input"], draft, root)
    if detail["type"] == "value_error":
        reason = str(detail.get("ctx", {}).get("error", detail["msg"])).rstrip(".")
        end = "" if reason.endswith("?") else "."
        return f"{key}{source}: {reason}{end}" if key else f"{reason}{end}"
    wanted = list(dict.fromkeys(_expected(other) for other in details))
    found = field_at(root, path, draft.tree)
    unset = ", or null" if found is not None and is_optional(found[1]) else ""
    return (
        f"{key} = {_shown(detail['input'])}{source}: should be {' or '.join(wanted)}{unset}."
        f"{_meaning(path, draft.tree, root)}"
    )


_EXPECTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text (in quotes)",
    "tuple_type": "a list, like [a, b]",
    "too_short": "a list with at least one item",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "finite_number": "a finite number",
}


_PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "a name of letters, digits, '.', '_' and '-' that starts with "
    "a letter or digit",
    r"^[A-Za-z][A-Za-z0-9_-]*$": "a name of letters, digits, '_' and '-' that starts with a letter",
}


def _expected(detail: ErrorDetails) -> str:
    kind = detail["type"]
    context = detail.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], f"text like {context['pattern']}")
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "too_long":
        return f"a list of {context['max_length']}"
    return str(detail["msg"]).removeprefix("Input should be ")


def _shown(value: Any) -> str:
    """A value in YAML's words (null, true), text in quotes."""
    text = repr(value) if isinstance(value, str) else dump_yaml(_plain(value), one_line=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    """What YAML can show: the part that a failed section was read into, as its name."""
    known = isinstance(value, str | int | float | bool | list | dict) or value is None
    return value if known else str(value)


def _source(key: str, origins: Mapping[str, str]) -> str:
    """Where the value came from; for a section, the overrides of keys inside it."""
    parent = key
    while parent:
        if parent in origins:
            origin = origins[parent]
            return " (override)" if origin.startswith(f"override {key}=") else f" ({origin})"
        parent = parent.rpartition(".")[0]
    inside = [origin for known, origin in origins.items() if known.startswith(f"{key}.")]
    overrides = [origin for origin in dict.fromkeys(inside) if origin.startswith("override")]
    return f" ({', '.join(overrides)})" if overrides and key else ""


def _missing(path: list[str], given: Any, draft: Draft, root: type[BaseModel]) -> str:
    *parents, name = path
    if name.isdigit():  # an item of a list that is too short
        parent = ".".join(parents)
        return (
            f"{parent} = {_shown(list(given))}{_source(parent, draft.origins)}: "
            f"should have more items.{_meaning(parents, draft.tree, root)}"
        )
    return f"{'.'.join(path)}: a value is needed here.{_meaning(path, draft.tree, root)}"


def _nearest_key(path: list[str], tree: Mapping[str, Any], root: type[BaseModel]) -> str:
    """Suggest a key of the same section, the type that has this one, or its place elsewhere."""
    *parents, name = path
    sections = sections_at(root, parents, tree)
    fields = list(dict.fromkeys(key for section in sections for key in section.model_fields))
    near = closest(name, fields)
    if near is not None:
        return f"Did you mean {'.'.join([*parents, near])!r}?"
    others = [section for section in sections_at(root, parents, None) if section not in sections]
    match = closest(name, [key for section in others for key in section.model_fields])
    if match is not None:
        part = ".".join(parents)
        having = [type_name(section) for section in others if match in section.model_fields]
        return (
            f"{match!r} belongs to type {' and '.join(having)}, and {part} is of type "
            f"{type_name(sections[0])}, with: {', '.join(fields)}."
        )
    elsewhere = [key for key in all_fields(root) if key.rpartition(".")[2] == name]
    if elsewhere:
        return f"Did you mean {elsewhere[0]!r}?"
    return f"Known keys: {', '.join(fields)}."


def _meaning(path: list[str], tree: Mapping[str, Any], root: type[BaseModel]) -> str:
    """What the key is for, in brackets, to follow a sentence."""
    while path and path[-1].isdigit():
        path = path[:-1]
    found = field_at(root, path, tree)
    if found is None or not found[1].description:
        return ""
    return f" ({found[1].description.rstrip('.')}.)"
