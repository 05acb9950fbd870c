"""Sinks beside each other: one that fails neither stops the others nor the run."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.monitoring.routed import with_loads
from ultrathink.monitoring import Level, MetricRecord, RunInfo, Sink
from ultrathink.monitoring.experts import ExpertRecord
from ultrathink.monitoring.records import Note
from ultrathink.monitoring.sink_group import SinkGroup

INFO = RunInfo("a", Path("runs/a"), 10, 0, "")
RECORD = MetricRecord(1, "train", 0.0, {"loss": 1.0})
EXPERTS = ExpertRecord(1, 0.0, with_loads([3.0, 1.0], num_tokens=4))
CALLS: dict[str, tuple[Any, ...]] = {
    "open": (INFO,),
    "set_total_steps": (10,),
    "progress": (1,),
    "write": (RECORD,),
    "experts": (EXPERTS,),
    "message": ("hello", "info"),
    "sample": (1, "a", "b"),
    "close": (),
}


class Keeping:
    """Notes every call; the methods in ``failing`` raise instead."""

    def __init__(self, *failing: str) -> None:
        self.failing = set(failing)
        self.heard: list[tuple[Any, ...]] = []
        self.notes: list[Note] = []

    def __getattr__(self, name: str) -> Any:
        if name not in CALLS:
            raise AttributeError(name)

        def call(*details: Any) -> None:
            if name in self.failing:
                raise OSError(5, f"{name} is broken")
            self.heard.append((name, *details))

        return call

    def take_notes(self) -> list[Note]:
        notes, self.notes = self.notes, []
        return notes

    def messages(self) -> list[str]:
        return [call[1] for call in self.heard if call[0] == "message"]


class TroubledSink(Keeping):
    """Has a name that messages can use."""


@pytest.mark.parametrize("method", CALLS)
def test_an_error_in_one_leaves_the_others_complete(method: str) -> None:
    first, broken, last = Keeping(), TroubledSink(method), Keeping()
    reported: list[tuple[str, Level]] = []
    group = SinkGroup([first, broken, Sink(), last], lambda *note: reported.append(note))
    for name, details in CALLS.items():
        getattr(group, name)(*details)
    everything = [(name, *details) for name, details in CALLS.items()]
    assert first.heard == last.heard == everything
    assert broken.heard == [call for call in everything if call[0] != method]
    assert reported == [
        (
            f"the troubled sink failed: OSError: [Errno 5] {method} is broken; training continues, "
            "and the sink is tried again with the next record",
            "warning",
        )
    ]


def test_a_sink_that_recovers_is_reported_and_gets_what_follows() -> None:
    broken, well = TroubledSink("write"), Keeping()
    group = SinkGroup([broken, well])  # without another way, the sinks report it
    group.write(RECORD)
    group.write(RECORD)
    assert len(well.messages()) == 1
    broken.failing.clear()
    group.progress(3)
    assert len(well.messages()) == 1
    group.write(RECORD)
    assert well.messages()[1:] == ["the troubled sink works again"]
    assert ("write", RECORD) in broken.heard


def test_a_sink_that_cannot_take_messages_does_not_go_round_in_circles() -> None:
    class Changing(Sink):
        count = 0

        def message(self, text: str, level: Level) -> None:
            self.count += 1
            raise OSError(self.count, "another kind each time")

    changing, well = Changing(), Keeping()
    group = SinkGroup([changing, well])
    group.message("hello", "info")
    assert changing.count == 3  # the message, its failure, and the failure of that
    reported = well.messages()
    assert len(reported) == 3
    assert "hello" in reported
    assert len([text for text in reported if text.startswith("the changing sink failed")]) == 2


def test_notes_of_a_sink_are_reported_whether_the_call_failed_or_not() -> None:
    for failing in ((), ("write",)):
        sink, well = TroubledSink(*failing), Keeping()
        group = SinkGroup([well, sink])
        sink.notes = [("the file is gone", "warning")]
        group.write(RECORD)
        assert well.messages()[-1] == "the file is gone"
        assert well.heard[-1][2] == "warning"


def test_the_console_hears_of_what_fails_in_closing_the_others() -> None:
    console, broken = Keeping(), TroubledSink("close")
    group = SinkGroup([console, broken])
    group.close()
    assert [call[0] for call in console.heard] == ["message", "close"]
    group.message("too late", "info")
    assert console.heard[-1] == ("close",)


def test_an_interrupt_is_no_failure_of_a_sink() -> None:
    class Interrupted(Sink):
        def write(self, record: MetricRecord) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SinkGroup([Interrupted()]).write(RECORD)
