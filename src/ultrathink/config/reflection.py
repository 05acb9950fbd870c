"""The configuration's classes as data: which sections, keys and types of parts there are."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ultrathink.config.base import PartConfig, PartOf
from ultrathink.config.options import OnResume, on_resume


def sections_of(field: FieldInfo) -> list[Any]:
    """The section classes inside a field: itself, a union's, a list's, a part's."""
    return _sections_in(field.annotation, field.metadata)


def _sections_in(annotation: Any, markers: Sequence[Any] = ()) -> list[Any]:
    for marker in markers:
        if isinstance(marker, PartOf):
            return [entry.options for entry in marker.registry if entry.options is not None]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _sections_in(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType, tuple, list):
        return [section for argument in arguments for section in _sections_in(argument)]
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if is_section else []


def is_part(field: FieldInfo) -> bool:
    """Whether the field holds one part that a registry knows, or a list of them."""
    return any(issubclass(section, PartConfig) for section in sections_of(field))


def is_list(field: FieldInfo) -> bool:
    """Whether the field holds a list, if it is set."""
    members = get_args(field.annotation) if is_optional(field) else (field.annotation,)
    return any(get_origin(member) in (tuple, list) for member in members)


def is_optional(field: FieldInfo) -> bool:
    """Whether the field may be null."""
    return type(None) in get_args(field.annotation)


def type_name(section: type[BaseModel]) -> str:
    """The ``type`` that a part's options are chosen by."""
    default = section.model_fields["type"].default
    return default if isinstance(default, str) else section.__name__


def sections_at(
    root: type[BaseModel], path: list[str], tree: Mapping[str, Any] | None
) -> list[type[BaseModel]]:
    """The classes that a path of keys may lead to, in ``tree`` only those of the types it names."""
    current = [root]
    node: Any = tree
    for part in path:
        node = _step_into(node, part)
        if not part.isdigit():
            fields = [section.model_fields.get(part) for section in current]
            current = [inner for field in fields if field for inner in sections_of(field)]
            default = next((field.default for field in fields if field), None)
            if isinstance(default, PartConfig) and isinstance(node, Mapping):
                node = {"type": default.type, **node}
        current = _of_type(current, node)
    return current


def _step_into(node: Any, part: str) -> Any:
    if isinstance(node, Mapping):
        return node.get(part)
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return node[int(part)]
    return None


def _of_type(sections: list[type[BaseModel]], node: Any) -> list[type[BaseModel]]:
    """Those of the type that the values name, or all when they name none that is known."""
    named = node.get("type") if isinstance(node, Mapping) else node
    parts = [section for section in sections if issubclass(section, PartConfig)]
    return [section for section in parts if type_name(section) == named] or sections


def field_at(
    root: type[BaseModel], path: list[str], tree: Mapping[str, Any] | None
) -> tuple[type[BaseModel], FieldInfo] | None:
    """The section and the field that a path of keys names; None where there is none."""
    if not path:
        return None
    *parents, name = path
    for section in sections_at(root, parents, tree):
        if name in section.model_fields:
            return section, section.model_fields[name]
    return None


def rule_of(root: type[BaseModel], key: str) -> OnResume:
    """What resuming with another value of ``key`` does, as it or a section around it declares.

    A list is one value: its rule is that of its items.
    """
    path = key.split(".")
    for end in range(1, len(path)):
        outer = field_at(root, path[:end], None)
        if outer is not None and is_list(outer[1]):
            path = path[:end]
            break
    while path:
        found = field_at(root, path, None)
        rule = on_resume(found[1]) if found is not None else None
        if rule is not None:
            return rule
        path = path[:-1]
    raise KeyError(f"nothing says what resuming with another {key} does")


def options_of(root: type[BaseModel]) -> dict[str, OnResume]:
    """The rule of every option that declares one, by dotted key."""
    rules = {key: on_resume(field) for key, field in all_fields(root).items()}
    return {key: rule for key, rule in rules.items() if rule is not None}


def all_fields(root: type[BaseModel]) -> dict[str, FieldInfo]:
    """Every field of a configuration by dotted key, parts of lists and of all types included."""
    fields: dict[str, FieldInfo] = {}

    def visit(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            fields.setdefault(f"{prefix}{name}", field)
            for inner in sections_of(field):
                visit(inner, f"{prefix}{name}.")

    visit(root, "")
    return fields
