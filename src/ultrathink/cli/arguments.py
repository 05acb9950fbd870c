"""Arguments that several commands share: which configuration, changed how, with which plugins."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ultrathink.core.errors import UltrathinkError

_POSITIONALS = "positionals"
# A path such as runs/lr=0.1/config.yaml has an equals sign too, but not after a dotted key.
_OVERRIDE = re.compile(r"^[A-Za-z_][\w.\-]*=")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``[CONFIG] [key=value ...]`` and ``--plugin FILE``."""
    parser.add_argument(
        _POSITIONALS,
        nargs="*",
        metavar="CONFIG | key=value",
        help="a preset's name, a YAML file or a run folder (default: the preset demo), "
        "and values that replace its own",
    )
    add_plugin_argument(parser)


def add_plugin_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--plugin FILE``, which may be given several times."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="run this Python file first, which registers parts of your own",
    )


def file_to_write(option: str, text: str) -> Path:
    """The file that ``option`` names, checked before anything is read."""
    path = Path(text)
    if not path.parent.is_dir():
        raise UltrathinkError(f"{option}: there is no folder {str(path.parent)!r}; make it first.")
    return path


def takes_config(parser: argparse.ArgumentParser) -> bool:
    """Whether a command takes ``[CONFIG] [key=value ...]``."""
    return any(action.dest == _POSITIONALS for action in parser._actions)


def generate_command(run: Path, prompts: Sequence[str] | None) -> str:
    """The command that lets the model of ``run`` continue the first of its ``prompts``."""
    lines = prompts[0].strip().splitlines() if prompts else []
    return f"ultrathink generate {run} {shlex.quote(lines[0] if lines else 'some text')}"


def split_config_and_overrides(positionals: Sequence[str]) -> tuple[str | None, list[str]]:
    """The configuration's name (None for the default), and the overrides, which have a ``=``."""
    overrides = [word for word in positionals if _OVERRIDE.match(word)]
    sources = [word for word in positionals if not _OVERRIDE.match(word)]
    if len(sources) > 1:
        raise UltrathinkError(
            f"{' and '.join(map(repr, sources))} are given as configurations, but there can be "
            f"only one; an override has the form key=value, without spaces around the '='"
        )
    return (sources[0] if sources else None), overrides
