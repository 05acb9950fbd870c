"""From tokens to text that can be shown at once: whole characters, nothing of a stop text."""

from __future__ import annotations

import codecs


class TextStream:
    """Turns the bytes of tokens into text as early as it is certain.

    A character whose bytes are not all there, and text that may yet become one of ``stop``, are
    held back. ``stopped`` is true once a stop text was read; nothing of it, and nothing after it,
    is ever given out.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self.stop = stop
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, data: bytes) -> str:
        """Take the bytes of the next token; return the text that is certain now."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(data)
        found = [at for at in (self._held.find(text) for text in self.stop) if at >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        uncertain = max((_overlap(self._held, text) for text in self.stop), default=0)
        cut = len(self._held) - uncertain
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def finish(self) -> str:
        """The text still held back when no more tokens come; half a character is dropped."""
        certain, self._held = self._held, ""
        return certain


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` with which ``stop`` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
