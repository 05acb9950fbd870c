"""The run as TensorBoard shows it: ``tensorboard --logdir runs``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ultrathink.monitoring.records import BaseSink, MetricRecord, RunInfo

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

FOLDER = "tensorboard"
FLUSH_S = 20


class TensorBoardSink(BaseSink):
    """Writes scalars such as ``train/loss`` and ``val/bits_per_byte``, and samples as text."""

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None
        self._tags: dict[str, str] = {}

    def open(self, info: RunInfo) -> None:
        """Begin an event file; what earlier ones hold beyond the start step is not shown."""
        with _quiet():
            # Imported here: it takes a second, and a run without this sink need not wait for it.
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(
                str(info.folder / FOLDER), purge_step=info.start_step + 1, flush_secs=FLUSH_S
            )

    def write(self, record: MetricRecord) -> None:
        """Write each figure as the scalar ``split/name``."""
        assert self._writer is not None, "the sink was not opened"
        with _quiet():
            for name, value in record.values.items():
                self._writer.add_scalar(
                    f"{record.split}/{name}", value, record.step, walltime=record.time
                )

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Write a sample; every prompt has a tag of its own, so that its texts line up."""
        assert self._writer is not None, "the sink was not opened"
        tag = self._tags.setdefault(prompt, f"samples/{len(self._tags) + 1}")
        # Four spaces make Markdown show the text as it is.
        verbatim = "\n".join(f"    {line}" for line in f"{prompt}{text}".splitlines())
        with _quiet():
            self._writer.add_text(tag, verbatim.encode("utf-8", "replace").decode(), step)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            with _quiet():
                self._writer.close()
            self._writer = None


@contextmanager
def _quiet() -> Iterator[None]:
    """TensorBoard's dependencies warn of each other; a user of ours can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
