"""The YAML that configurations are written in: YAML 1.1 with fewer surprises.

``1e-3`` is a number, ``2024-01-01`` is text, and a key given twice is an error. What ``dump_yaml``
writes, both ``parse_yaml`` and plain YAML 1.1 read back as it was.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_FLOAT = "tag:yaml.org,2002:float"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_MERGE = "tag:yaml.org,2002:merge"
_WITHOUT_SPACE = re.compile(r"^([A-Za-z_]\w*):(\S.*)$", re.DOTALL)
_NUMBER_WITH_EXPONENT = re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Refuses keys that are given twice or are not text, and anchors inside themselves."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.deep_construct = True  # or a value could contain itself

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            if key_node.style is None and value_node.value == "":  # {type:text}
                advice = missing_space(key_node.value)
                if advice:
                    raise _error(advice, key_node)
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _error(f"the key {key_node.value} is not text; put it in quotes", key_node)
            if key in seen:
                raise _error(f"the key {key!r} is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that ``parse_yaml`` or plain YAML 1.1 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Escaped on one line: PyYAML writes the last three as they are and reads them back as spaces.
    style = '"' if any(mark in text for mark in "\n\r\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT, _NUMBER_WITH_EXPONENT, list("-+.0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def missing_space(text: Any) -> str:
    """What is wrong where ``text`` is a key and its value that YAML takes for one word; or ""."""
    found = _WITHOUT_SPACE.match(text) if isinstance(text, str) else None
    if found is None:
        return ""
    return f"there is no space after the colon in {text!r:.60}: write {found[1]}: {found[2]:.40}"


def parse_yaml(text: str) -> Any:
    """The value that ``text`` holds; ValueError says what is wrong with it, and where."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(_first_line(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def dump_yaml(value: Any, *, one_line: bool = False) -> str:
    """``value`` as YAML, keys in their order; without line breaks where ``one_line``."""
    text: str = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=one_line,
        width=float("inf") if one_line else 100,
    )
    return text.removesuffix("...\n").rstrip("\n") if one_line else text


def _first_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem
