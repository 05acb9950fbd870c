"""Turns tokens into text that can be shown at once: whole characters, nothing of a stop text."""

from __future__ import annotations

import codecs


class TextStream:
    """Turns the bytes of tokens into text as soon as it is certain.

    An incomplete character, and text that may become one of ``stop``, are held back. ``stopped`` is
    true after a stop text; neither that nor anything after it is returned.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self.stop = stop
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, data: bytes) -> str:
        """Add the bytes of the next token; returns the text that is now certain."""
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
        """The text that was held back, at the end; an incomplete character is dropped."""
        certain, self._held = self._held, ""
        return certain


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of ``text`` that ``stop`` starts with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
