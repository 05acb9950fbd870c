"""Sources from their configurations, and whether they can be read; without NumPy and torch."""

from __future__ import annotations

from collections.abc import Sequence

from ultrathink.config.data import SOURCES, SourceConfig
from ultrathink.core.errors import DataError
from ultrathink.data.sources.base import Source
from ultrathink.data.sources.files import FileSource


def build_sources(configs: Sequence[SourceConfig]) -> list[Source | DataError]:
    """The sources that ``configs`` describe, or why not; repeated names are numbered."""
    sources: list[Source | DataError] = []
    taken = {config.name for config in configs if config.name is not None}
    for config in configs:
        try:
            source: Source = SOURCES.load(config.type)(config)
        except DataError as error:
            sources.append(error)
            continue
        if config.name is None:
            base, number = source.name, 2
            while source.name in taken:
                source.name, number = f"{base}-{number}", number + 1
            taken.add(source.name)
        sources.append(source)
    return sources


def unreadable(configs: Sequence[SourceConfig]) -> list[DataError]:
    """Why sources cannot be read, as far as the start of each file shows."""
    errors = []
    for source in build_sources(configs):
        try:
            if isinstance(source, DataError):
                raise source
            if isinstance(source, FileSource):
                source.check()
        except DataError as error:
            errors.append(error)
    return errors
