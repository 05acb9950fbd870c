"""Habits from other trainers, each with the line that means it here: the table habits.yaml."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import resources
from typing import Any

from ultrathink.config.yaml_format import dump_yaml, parse_yaml

_LINE = re.compile(r"^(?P<key>\w+(?:\.\w+)+)=(?P<value>.*[^.])$")  # a sentence has a full stop

# What a value here counts, where another trainer's counts something else.
_NOTES = {
    "training.batch_size": "the sequences of a whole step, over all devices",
    "training.micro_batch_size": (
        "training.batch_size counts the sequences of a whole step, over all devices"
    ),
    "run.dir": "each run is a folder in it, called run.name",
}


@functools.cache
def table() -> dict[str, dict[str, str]]:
    """For each option of another trainer the answers, by pattern of its value."""
    file = resources.files("ultrathink.config") / "habits.yaml"
    return {
        name: {"*": answers} if isinstance(answers, str) else answers
        for names, answers in parse_yaml(file.read_text(encoding="utf-8")).items()
        for name in names.split()
    }


def answer(name: str, value: Any, *, in_file: bool) -> str | None:
    """What another trainer's option ``name`` means here, in a sentence; None where it is unknown.

    ``value`` is the user's, None where there is none. The line is one for a YAML file where
    ``in_file``, for the command line otherwise.
    """
    word = shown(value)
    meant = word or ("false" if in_file else "true")  # `fp16:` is off, --fp16 is on
    for pattern, text in table().get(plain_name(name), {}).items():
        if fnmatchcase(meant.lower(), pattern):
            line = _LINE.match(text)
            if line is None:
                return text.replace("{}", word or "…")
            known = word is not None or "{}" not in text
            text = line["value"].replace("{}", word or "")
            return write(line["key"], text if known else None, in_file=in_file)
    return None


def plain_name(name: str) -> str:
    """An option's name in the table, given a flag or a key."""
    return name.lstrip("-").replace("-", "_").lower()


def write(key: str, value: str | None, *, in_file: bool) -> str:
    """The sentence that asks for ``key`` to be set to ``value``, which is YAML or None."""
    if value is None:
        return f"The key is {key} here."
    line = f"{key}={value}"
    if in_file and not any(part.isdigit() for part in key.split(".")):
        *sections, name = key.split(".")
        line = ": {".join([*sections, f"{name}: {value}"]) + "}" * len(sections)
    elif not in_file:
        line = shlex.quote(line)
    note = _NOTES.get(key)
    return f"Write {line} ({note})." if note else f"Write {line}."


def shown(value: Any) -> str | None:
    """A value as a line shows it; None where there is none, or it is a section."""
    if value is None or isinstance(value, dict):
        return None
    if isinstance(value, (str, bool, Sequence)):
        return dump_yaml(value, one_line=True)
    return str(value)  # 2e-05, which YAML would write as 2.0e-05
