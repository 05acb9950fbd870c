"""The reference of all options, as Markdown, a JSON schema and resolved YAML."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ultrathink.config.options import on_resume
from ultrathink.config.overrides import flatten
from ultrathink.config.reflection import is_list, is_part, sections_of, type_name
from ultrathink.config.root import Root
from ultrathink.config.yaml_format import dump_yaml
from ultrathink.core.durations import Duration

WHY_COLUMN = 56
_TAG = re.compile(r"<(?=[A-Za-z/!])")

INTRODUCTION = """\
# Configuration

A configuration is one YAML file. Its values come from the defaults below, then from a preset or
your file, then from `dotted.key=value` on the command line; `ultrathink config show --why` says
which of them each came from, and `ultrathink config check FILE` what training would refuse.

An item of a list is counted from 0: `data.train.0.weight=2`. Where a key has types, `type` chooses
one and decides the other keys; its bare name stands for the type with its defaults
(`training.optimizer=muon`), and another type starts from its own defaults. A length of training
is written as steps (`100`), a share of the run (`0.1`, `10%`), tokens (`2M tokens`) or minutes
(`3 minutes`).

The column *resuming* says what `ultrathink train --resume RUN key=value` does: a `fixed` value is
refused; a `felt` value is applied, reported and recorded as a change that affects training; a
`free` value is applied silently, since the updates stay the same up to rounding.

This page is made by `ultrathink config docs`. Editors check and complete the file with the schema
that `ultrathink config schema` prints."""


def json_schema(root: type[Root]) -> dict[str, Any]:
    """A JSON schema of the YAML file, for editors."""
    schema = root.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "ULTRATHINK configuration"
    return schema


def markdown(root: type[Root]) -> str:
    """The reference: a table of every section, with each option's values, default and meaning."""
    lines = [INTRODUCTION]
    documented: dict[tuple[Any, ...], str] = {}
    _write_nested(root, "", 2, lines, documented)
    return "\n".join(lines) + "\n"


def _write_nested(
    section: type[BaseModel],
    prefix: str,
    level: int,
    lines: list[str],
    documented: dict[tuple[Any, ...], str],
) -> None:
    """The sections inside a section, each under a heading."""
    for name, field in section.model_fields.items():
        classes = tuple(sections_of(field))
        if not classes:
            continue
        key = f"{prefix}{name}"
        lines += ["", f"{'#' * level} `{key}`", "", _sentence(field.description or "")]
        if classes in documented:
            lines += ["", f"It has the types of `{documented[classes]}`."]
            continue
        documented[classes] = key
        inner = f"{key}.N." if is_list(field) else f"{key}."
        for options in classes:
            if is_part(field):
                lines += ["", f"**`type: {type_name(options)}`** - {_cell(_summary(options))}"]
            _write_table(options, inner, lines)
        for options in classes:
            _write_nested(options, inner, level + 1, lines, documented)


def _write_table(section: type[BaseModel], prefix: str, lines: list[str]) -> None:
    rows = []
    for name, field in section.model_fields.items():
        inner = sections_of(field)
        is_own_type = get_origin(field.annotation) is Literal and not field.is_required()
        if (name == "type" and is_own_type) or (inner and not is_part(field)):
            continue  # in the heading
        rule = on_resume(field)
        cells = [
            f"`{prefix}{name}`",
            "see below" if inner else _values(field),
            _default(field),
            rule.rule if rule is not None else "",
            _sentence(field.description or ""),
        ]
        rows.append(f"| {' | '.join(map(_cell, cells))} |")
    if rows:
        titles = "| key | values | default | resuming | meaning |"
        lines += ["", titles, "|---|---|---|---|---|", *rows]


def _values(field: FieldInfo) -> str:
    """The allowed values, in words."""
    kinds = _kinds(field.annotation)
    bounds = []
    for marker in field.metadata:
        for attribute, words in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            limit = getattr(marker, attribute, None)
            if limit is not None:
                bounds.append(f"{words} {'2^63' if limit == 2**63 else limit}")
    return f"{', '.join(kinds)} {', '.join(bounds)}".strip()


_KIND_NAMES: dict[Any, str] = {
    int: "whole number",
    float: "number",
    bool: "true, false",
    str: "text",
    Duration: "length",
}


def _kinds(annotation: Any) -> list[str]:
    if annotation in _KIND_NAMES:
        return [_KIND_NAMES[annotation]]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return [f"`{value}`" for value in arguments]
    if origin is Annotated:
        return _kinds(arguments[0])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return [f"list of {' or '.join(map(_plural, _kinds(arguments[0])))}"]
        return [f"list of {len(arguments)} {_plural(_kinds(arguments[0])[0])}"]
    return [kind for member in arguments if member is not type(None) for kind in _kinds(member)]


def _plural(kind: str) -> str:
    return kind if kind == "text" else f"{kind}s"


def _default(field: FieldInfo) -> str:
    default = field.default
    if field.is_required():
        return "required"
    if default is None:
        return "unset"
    if isinstance(default, Duration):
        return f"`{default}`"
    if isinstance(default, BaseModel):
        return f"`{type_name(type(default))}`"
    if isinstance(default, tuple):
        items = [getattr(item, "type", item) for item in default]
        return f"`{dump_yaml(items, one_line=True)}`"
    return f"`{dump_yaml(default, one_line=True)}`"


def _summary(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").strip().split("\n\n")[0].split())


def _sentence(text: str) -> str:
    return text if not text or text.endswith(".") else f"{text}."


def _cell(text: str) -> str:
    """Text for a table, escaped for Markdown where it is not code."""
    parts = text.replace("|", "\\|").split("`")
    parts[::2] = [_TAG.sub("&lt;", part.replace("*", "\\*")) for part in parts[::2]]
    return "`".join(parts)


def to_yaml(config: Root, *, why: bool = False) -> str:
    """The resolved configuration as YAML; with ``why`` one key a line, its origin beside it."""
    tree = config.model_dump(mode="json")
    if not why:
        return dump_yaml(tree)
    rows = [
        (f"{key}: {dump_yaml(value, one_line=True)}", config.origin(key))
        for key, value in flatten(tree).items()
    ]
    # One long value must not push every origin off the screen.
    width = max((len(row) for row, _ in rows if len(row) <= WHY_COLUMN), default=0)
    return "".join(f"{row:<{width}}  # {origin}\n" for row, origin in rows)
