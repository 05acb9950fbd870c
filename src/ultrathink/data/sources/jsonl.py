"""Files with one JSON object a line, each a document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ultrathink.config.data import JsonlSourceConfig
from ultrathink.core.errors import closest
from ultrathink.data.checksums import HashedFile
from ultrathink.data.documents import Document, UnreadableSourceError, replace_surrogates
from ultrathink.data.sources.files import FileSource, reading, refuse_binary

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonlSource(FileSource):
    """The strings under one key of JSON lines, also compressed by gzip; blank lines are skipped.

    Ids are the file's id and the line number, from 1. A lone surrogate escape (``\\ud800``) is
    replaced by U+FFFD.
    """

    suffixes = frozenset({".jsonl", ".json", ".ndjson"})

    def __init__(self, config: JsonlSourceConfig) -> None:
        super().__init__(config)
        self.field = config.field

    def _read(self, file_id: str, file: HashedFile) -> Iterator[Document | None]:
        with reading(file.path):
            for number, line in enumerate(file.lines(), start=1):
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                    _require_lines(file.path, line)
                if line.strip():
                    yield self._document(f"{file_id}:{number}", line.rstrip(), file.path, number)

    def _document(self, document_id: str, line: bytes, path: Path, number: int) -> Document | None:
        text, problem = self._text(line)
        if text is not None:
            return Document(document_id, replace_surrogates(text))
        if self.on_bad == "skip":
            return None
        raise UnreadableSourceError(
            f"{path}, line {number}: {problem}",
            ". Correct the line, or leave such lines out with `on_bad: skip`.",
        )

    def _text(self, line: bytes) -> tuple[str | None, str]:
        """The document's text, or None and what is wrong with the line."""
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            return None, f"not UTF-8 at byte {error.start} of the line"
        except json.JSONDecodeError as error:
            problem = error.msg.removesuffix(" at")
            return None, f"not JSON (column {error.colno}: {problem})"
        except (ValueError, RecursionError) as error:  # a number or a nesting beyond limits
            return None, f"not JSON that can be read ({error})"
        if not isinstance(value, dict):
            kind = "an array" if isinstance(value, list) else f"{json.dumps(value)[:40]}"
            return None, f"expected a JSON object, found {kind}"
        if self.field not in value:
            near = closest(self.field, value)
            hint = f"; did you mean `field: {near}`?" if near else ""
            keys = ", ".join(sorted(value)[:8]) or "none"
            return None, f"there is no field {self.field!r} (keys: {keys}{hint})"
        text = value[self.field]
        if not isinstance(text, str):
            return None, f"field {self.field!r} is {_kind(text)}, not a string"
        return text, ""


def _require_lines(path: Path, first: bytes) -> None:
    """Refuse a file whose first line shows that it holds no JSON lines."""
    refuse_binary(path, first[:8000])
    start = first.strip()
    if start == b"{" or start.startswith(b"["):
        kind = "array" if start.startswith(b"[") else "object over several lines"
        command = "jq -c '.[]'" if kind == "array" else "jq -c ."
        raise UnreadableSourceError(
            f"{path} is one JSON {kind}, not one object a line",
            f". Convert it: {command} {path.name} > lines.jsonl",
        )


def _kind(value: object) -> str:
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", list: "an array"}
    return kinds.get(type(value), "an object")
