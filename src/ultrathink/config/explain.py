"""Messages about a configuration: the key, its value, where it came from, and the fix."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ultrathink.config import habits
from ultrathink.config.overrides import Draft
from ultrathink.config.reflection import (
    all_fields,
    field_at,
    is_list,
    is_optional,
    sections_at,
    type_name,
)
from ultrathink.config.training import BUDGETS
from ultrathink.config.yaml_format import dump_yaml, missing_space, parse_yaml
from ultrathink.core.errors import closest

# What pydantic puts into a location for the members of a union, which are no keys.
_NO_KEY = re.compile(
    r"^(int|bool|float|str|(literal|tuple|function-[a-z-]+|constrained-[a-z]+)\[.*)$"
)

_GIVES_A_LENGTH = re.compile(rf"Write training(\.|: {{)({'|'.join(BUDGETS)})\b")


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
    if any(_GIVES_A_LENGTH.search(line) for line in lines):
        lines = [line for line in lines if not line.endswith("; none is given.")]
    return "\n".join(lines)


def _key(detail: ErrorDetails) -> str:
    return ".".join(part for part in map(str, detail["loc"]) if not _NO_KEY.match(part))


def _explain(key: str, details: list[ErrorDetails], draft: Draft, root: type[BaseModel]) -> str:
    detail = details[0]
    path = key.split(".") if key else []
    source = _source(key, draft.origins)
    if detail["type"] == "extra_forbidden":
        in_file = "(override" not in source
        if field_at(root, path, draft.tree) is not None:  # a key with dots in it
            nested = habits.write(key, habits.shown(detail["input"]), in_file=in_file)
            return f"{key}{source}: keys of a file are nested. {nested}"
        known = _known_key(path, detail["input"], in_file, draft.tree, root)
        return f"{key}{source}: there is no such key. {known}"
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
        f"{_advice(path, detail) or _meaning(path, draft.tree, root)}"
    )


def _advice(path: list[str], detail: ErrorDetails) -> str:
    """How a section is written that was given as text: ``training: max_steps:3``, ``data: x/``."""
    given = detail["input"]
    if detail["type"] not in ("model_type", "model_attributes_type") or not isinstance(given, str):
        return ""
    if advice := missing_space(given):
        return f" {advice[0].upper()}{advice[1:]}."
    meant = habits.answer(path[-1], given, in_file=True)
    return f" {meant}" if meant else ""


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
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
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
    """A value in YAML's words (null, true), text in quotes, a section that was read by its name."""
    if isinstance(value, str):
        text = repr(value)
    else:
        is_plain = value is None or isinstance(value, int | float | list | dict)
        text = dump_yaml(value if is_plain else str(value), one_line=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


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


def _known_key(
    path: list[str], value: Any, in_file: bool, tree: Mapping[str, Any], root: type[BaseModel]
) -> str:
    """The key that is meant: a type's that has it, its place elsewhere, or the nearest one."""
    *parents, name = path
    sections = sections_at(root, parents, tree)
    fields = list(dict.fromkeys(key for section in sections for key in section.model_fields))
    others = [section for section in sections_at(root, parents, None) if section not in sections]
    if any(name in other.model_fields for other in others):
        return _of_another_type(name, others, sections[0], ".".join(parents))
    meant = known_option(name, value, root, in_file=in_file)
    if meant is not None:
        return meant
    near = closest(name, fields)
    if near is not None:
        return f"Did you mean {'.'.join([*parents, near])!r}?"
    match = closest(name, [key for section in others for key in section.model_fields])
    if match is not None:
        return _of_another_type(match, others, sections[0], ".".join(parents))
    return f"Known keys: {', '.join(fields)}."


def known_flag(flag: str, value: str | None, root: type[BaseModel]) -> str | None:
    """What a flag of the command line means in ``root``, such as ``--max_steps 10``."""
    name = habits.plain_name(flag)
    with suppress(ValueError):
        given = value if value is None else parse_yaml(value)
        if field_at(root, name.split("."), None) is not None and "." in name:
            return habits.write(name, habits.shown(given), in_file=False)
        return known_option(name.rpartition(".")[2], given, root, in_file=False)
    return None


def known_option(name: str, value: Any, root: type[BaseModel], *, in_file: bool) -> str | None:
    """What an option that is not where it was given means in ``root``; None where nothing does.

    It has that name in another section, or in another trainer. ``value`` is what it was given.
    """
    name = habits.plain_name(name)
    places = _places_of(name, root)
    if name not in habits.table() or (isinstance(value, dict) and places):
        if len(places) == 1 and not isinstance(value, dict):
            return habits.write(places[0], habits.shown(value), in_file=in_file)
        if places:
            return f"Did you mean {' or '.join(map(repr, places[:3]))}?"
    is_training = "training" in root.model_fields
    return habits.answer(name, value, in_file=in_file) if is_training else None


def _of_another_type(
    name: str, others: list[type[BaseModel]], section: type[BaseModel], part: str
) -> str:
    having = [type_name(other) for other in others if name in other.model_fields]
    return (
        f"{name!r} belongs to type {' and '.join(having)}, and {part} is of type "
        f"{type_name(section)}, with: {', '.join(section.model_fields)}."
    )


def _places_of(name: str, root: type[BaseModel]) -> list[str]:
    """Where options of a name are; the outermost only, item 0 standing for those of a list."""
    places = []
    for key in all_fields(root):
        if key.rpartition(".")[2] == name:
            path = key.split(".")
            for end in range(len(path) - 1, 0, -1):
                outer = field_at(root, path[:end], None)
                if outer is not None and is_list(outer[1]):
                    path.insert(end, "0")
            places.append(path)
    least = min(map(len, places), default=0)
    return [".".join(path) for path in places if len(path) == least]


def _meaning(path: list[str], tree: Mapping[str, Any], root: type[BaseModel]) -> str:
    """The description of a key in brackets, to follow a sentence."""
    while path and path[-1].isdigit():
        path = path[:-1]
    found = field_at(root, path, tree)
    if found is None or not found[1].description:
        return ""
    return f" ({found[1].description.rstrip('.')}.)"
