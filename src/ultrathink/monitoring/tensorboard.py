"""The run as TensorBoard shows it: ``tensorboard --logdir runs``.

This module writes event files itself: the thread of a ``SummaryWriter`` dies with the first failed
write, prints a stack trace, and every later call raises, ``close`` included. An event file is a
sequence of records, each with its length and checksum, so appending to it is like appending a line
(format: ``tensorboard/summary/writer/record_writer.py``).
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrathink.monitoring.appending import ResilientAppender
from ultrathink.monitoring.heat_map import DESCRIPTION, load_map
from ultrathink.monitoring.records import MetricRecord, Note, RunInfo, Sink

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

    from ultrathink.monitoring.experts import ExpertRecord

FOLDER = "tensorboard"
_FILE_VERSION = "brain.Event:2"

_number = itertools.count()  # distinguishes event files of one second


class TensorBoardSink(Sink):
    """Writes scalars such as ``train/loss``, samples as text, and each group of experts as scalars
    ``experts/<group>/<figure>/layer_<i>`` with a picture of its load, ``experts/<group>/load``.

    Events that cannot be written wait until they can; the method that tried raises OSError.
    """

    def __init__(self) -> None:
        self._file: ResilientAppender | None = None
        self._tags: dict[str, str] = {}

    def open(self, info: RunInfo) -> None:
        """Prepare an event file that hides later steps of earlier files."""
        with _quiet():
            header = _session_start(info.start_step + 1)
        folder = info.folder / FOLDER
        self._file = ResilientAppender(lambda: folder / _file_name(), header=header, end=b"")

    def write(self, record: MetricRecord) -> None:
        """Write each figure as the scalar ``split/name``, all or none."""
        self._append(_scalars, record)

    def experts(self, record: ExpertRecord) -> None:
        self._append(_of_experts, record)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Write a sample; each prompt has its tag, so that its texts are listed together."""
        tag = self._tags.setdefault(prompt, f"samples/{len(self._tags) + 1}")
        # Four spaces make Markdown show the text verbatim.
        verbatim = "\n".join(f"    {line}" for line in f"{prompt}{text}".splitlines())
        self._append(_text, tag, verbatim, step)

    def decision(self, step: int, title: str, text: str) -> None:
        self._append(_text, "decisions", text, step)

    def take_notes(self) -> list[Note]:
        return self._file.take_notes() if self._file is not None else []

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _append(self, make: Callable[..., bytes], *details: Any) -> None:
        assert self._file is not None, "the sink was not opened"
        with _quiet():
            entry = make(*details)
        self._file.append(entry)


def _file_name() -> str:
    """TensorBoard reads the event files of a folder in the order of their names."""
    host, number = socket.gethostname(), next(_number)
    return f"events.out.tfevents.{int(time.time()):010d}.{host}.{os.getpid()}.{number:03d}"


# The packages are imported in functions: they are slow, and not every run has this sink.


def _session_start(purge_step: int) -> bytes:
    """The start of an event file: the version, and the step from which earlier files are hidden."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    now = time.time()
    started = SessionLog(status=SessionLog.START)
    return _framed(Event(wall_time=now, file_version=_FILE_VERSION)) + _framed(
        Event(wall_time=now, step=purge_step, session_log=started)
    )


def _scalars(record: MetricRecord) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [
        Summary.Value(tag=f"{record.split}/{name}", simple_value=float(value))
        for name, value in record.values.items()
    ]
    return _framed(Event(wall_time=record.time, step=record.step, summary=Summary(value=values)))


def _of_experts(record: ExpertRecord) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.image.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    given = record.statistics
    values = [
        Summary.Value(tag=f"experts/{group}/{name}/layer_{layer}", simple_value=value)
        for group, figures in given.figures.items()
        for name, of_layers in figures.items()
        for layer, value in zip(given.layers, of_layers.tolist(), strict=True)
    ]
    about = create_summary_metadata(None, DESCRIPTION)
    for group in given.groups:
        picture = load_map(given.load[:, group.slots], given.active[:, group.slots])
        width, height = (f"{size}".encode() for size in (picture.width, picture.height))
        image = make_tensor_proto([width, height, picture.png], dtype=np.object_)
        tag = f"experts/{group.name}/load"
        values.append(Summary.Value(tag=tag, metadata=about, tensor=image))
    return _framed(Event(wall_time=record.time, step=record.step, summary=Summary(value=values)))


def _text(tag: str, text: str, step: int) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.text.summary_v2 import text_pb

    summary = text_pb(tag, text.encode("utf-8", "replace"))
    return _framed(Event(wall_time=time.time(), step=step, summary=summary))


def _framed(event: Event) -> bytes:
    """An event in a file: its length, its bytes, and a checksum of each."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer: Any = RecordWriter(buffer)
    writer.write(event.SerializeToString())
    return buffer.getvalue()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
