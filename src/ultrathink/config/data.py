"""Section ``data``: where text comes from and how it becomes sequences."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from ultrathink.config.base import PartConfig, PartOf, Section, alike
from ultrathink.config.options import felt, free, place
from ultrathink.core.errors import ConfigError
from ultrathink.core.registry import Registry

SOURCES: Registry[Any] = Registry("data source")

content = partial(felt, decides=("samples",))

OnBad = Literal["error", "skip"]


class SourceConfig(PartConfig):
    """What every source has."""

    name: str | None = content(None)
    """What metrics call the source; its type or file name when unset."""
    weight: float = content(1.0, gt=0)
    """Share of the training samples, relative to the other sources."""
    groups: tuple[str, ...] = felt(())
    """Expert groups that the text of a training source belongs to: their gates are raised on its
    tokens (model.moe.group_gates)."""


class StdlibSourceConfig(SourceConfig):
    """The Python source of the running interpreter's standard library."""

    type: Literal["stdlib"] = "stdlib"


class FileSourceConfig(SourceConfig):
    """What sources that read files share."""

    path: str | tuple[str, ...] = content()
    """A file, a folder (searched recursively), a pattern with *, or a list of them."""
    val_fraction: float = content(0.05, ge=0, lt=1)
    """Share held out for validation when data.val is unset: whole documents chosen by hash, or the
    end of each document where there are fewer than 20."""
    on_bad: OnBad = content("error")
    """What to do with text that cannot be read: error, or skip and count."""


class TextSourceConfig(FileSourceConfig):
    """UTF-8 text files, one document a file."""

    type: Literal["text"] = "text"


class JsonlSourceConfig(FileSourceConfig):
    """Files with one JSON object a line, each a document."""

    type: Literal["jsonl"] = "jsonl"
    field: str = content("text")
    """Key of the object that holds the document's text."""


class DummySourceConfig(SourceConfig):
    """Generated text with structure to learn; for tests and trial runs."""

    type: Literal["dummy"] = "dummy"
    num_documents: int = content(200, gt=0)
    """How many documents to generate."""
    num_words: int = content(200, gt=0)
    """Words in each document."""
    seed: int = content(0, ge=0)
    """Seed of the generated text."""


_PLACE = "ultrathink.data.sources"
SOURCES.add("stdlib", f"{_PLACE}.stdlib:StdlibSource", options=StdlibSourceConfig)
SOURCES.add("text", f"{_PLACE}.text:TextSource", options=TextSourceConfig)
SOURCES.add("jsonl", f"{_PLACE}.jsonl:JsonlSource", options=JsonlSourceConfig)
SOURCES.add("dummy", f"{_PLACE}.dummy:DummySource", options=DummySourceConfig)


def source_of_path(text: str) -> dict[str, str]:
    """The source that a path alone stands for; ConfigError where it does not look like one."""
    if not any(mark in text for mark in "/\\.*~"):
        try:
            return {"type": SOURCES.entry(text).name}
        except ConfigError as error:
            raise ConfigError(f"{error} Text of your own: {{type: text, path: {text}}}.") from None
    is_lines = text.removesuffix(".gz").endswith((".jsonl", ".ndjson"))
    return {"type": "jsonl" if is_lines else "text", "path": text}


SourceField = Annotated[SourceConfig, PartOf(SOURCES, source_of_path)]


class PackingConfig(Section):
    """How documents fill sequences."""

    enabled: bool = content(True)
    """Join documents and cut sequences of seq_len from the stream; when false each sequence holds
    one document (long ones are cut), padded to seq_len."""
    isolate_documents: bool = content(True)
    """Documents in one sequence do not see each other, positions restart."""


class DataConfig(Section):
    """Text sources and sequences."""

    mode: Literal["base"] = content("base")
    """What is learned: base (plain text)."""
    seq_len: int = content(256, gt=1)
    """Tokens in a sequence."""
    train: tuple[SourceField, ...] = content((StdlibSourceConfig(),), min_length=1)
    """Sources to train on, such as [{type: text, path: books/}]; a path alone (books/, lines.jsonl)
    stands for a source with its defaults."""
    val: tuple[SourceField, ...] | None = felt(None, decides=("samples", "scores"))
    """Sources to validate on; the held-out part of data.train when unset."""
    packing: PackingConfig = PackingConfig()
    """How documents fill sequences."""
    num_workers: int = free(0, ge=0)
    """Processes that prepare batches; 0 prepares them in the trainer."""
    on_change: Literal["refuse", "rebuild", "keep"] = free("refuse")
    """What resuming does when the text is not what the run was trained on: refuse names what
    changed and stops, rebuild tokenizes the text as it is now and trains on from the start of its
    order, keep continues bit for bit with the tokens in the cache, even where files changed or
    vanished."""
    verify: Literal["stat", "full"] = free("stat")
    """How a start verifies that text and token cache are unchanged: stat hashes the files whose
    size, times or inode differ from those of the last start; full hashes all of them, which also
    finds bits that a disk lost."""
    cache_dir: str | None = place(None)
    """Folder of tokenized data; $ULTRATHINK_CACHE or ~/.cache/ultrathink when unset."""

    @field_validator("train", "val", mode="before")
    @classmethod
    def _one_source_is_a_list(cls, value: Any) -> Any:
        """``train: books/``."""
        return [value] if isinstance(value, str | Mapping) else value

    @model_validator(mode="after")
    def _names_differ(self) -> DataConfig:
        twice = alike([source.name for source in self.train])
        if twice is not None:
            raise ValueError(f"two sources are called {twice!r}; give each its own name")
        return self
