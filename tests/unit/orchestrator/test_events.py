"""Findings become events: consecutive ones of one kind and subject are one incident."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink.orchestrator.events import SEVERITIES, Finding, Incidents, in_order


def test_the_gravest_finding_tells_the_event_and_is_reported() -> None:
    incidents = Incidents()
    incidents.add([Finding(1, "spike", "low", "a", values={"score": 7.0})])
    (graver,) = incidents.add([Finding(2, "spike", "high", "b", values={"score": 20.0})])
    assert incidents.add([Finding(3, "spike", "medium", "c", values={"score": 9.0})]) == []
    (event,) = incidents.events
    assert (event.severity, event.message, event.values) == ("high", "b", {"score": 20.0})
    assert (event.step, event.to_step, event.found_at) == (1, 3, 1)
    assert graver.severity == "high"


def test_an_event_begins_where_it_began_but_not_within_the_one_before() -> None:
    incidents = Incidents()
    incidents.add([Finding(40, "divergence", "medium", "x", since=10)])
    for _ in range(9):
        incidents.add([])
    incidents.add([Finding(60, "divergence", "medium", "x", since=30)])
    assert [(event.step, event.to_step) for event in incidents.events] == [(10, 40), (41, 60)]


def test_closed_incidents_do_not_resume() -> None:
    incidents = Incidents()
    incidents.add([Finding(100, "spike", "medium", "x")])
    incidents.close()
    incidents.add([Finding(51, "spike", "medium", "x")])
    assert [(event.step, event.to_step) for event in incidents.events] == [(100, 100), (51, 51)]
    assert [event.step for event in in_order(incidents.events)] == [51, 100]


def test_a_finding_has_a_known_severity_and_finite_values() -> None:
    with pytest.raises(AssertionError):
        Finding(1, "spike", "grave", "x")
    values = {"a": 1.0, "b": math.nan, "c": math.inf}
    assert Finding(1, "spike", "low", "x", values=values).values == {"a": 1.0}


FINDINGS = st.lists(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]),
            st.sampled_from(["", "x", "y"]),
            st.sampled_from(SEVERITIES),
            st.integers(0, 40),
            st.sampled_from([8, 20]),
        ),
        max_size=2,
    ),
    max_size=80,
)


@given(FINDINGS, st.integers(0, 80))
def test_findings_of_a_key_are_one_event_up_to_a_pause_and_events_survive_a_restart(
    steps: list[list[tuple[str, str, str, int, int]]], restart: int
) -> None:
    incidents, other = Incidents(), Incidents()
    ends: dict[tuple[str, str], int] = {}  # by which step the next finding has to come
    expected: list[tuple[str, str, int, int]] = []  # kind, subject, found at, to step
    for number, found in enumerate(steps, 1):
        findings = [
            Finding(number, kind, severity, "x", {}, number - ago, subject, pause)
            for kind, subject, severity, ago, pause in found
        ]
        if number == restart:
            other.load_state_dict(json.loads(json.dumps(incidents.state_dict())))
        changed = incidents.add(findings)
        if number >= restart:
            same = other.add(findings) if restart else changed
            assert same == changed
        assert {event.kind for event in changed} <= {finding.kind for finding in findings}
        for one in findings:
            key = (one.kind, one.subject)
            if number <= ends.get(key, 0):
                [last] = [n for n, event in enumerate(expected) if event[:2] == key][-1:]
                expected[last] = (*expected[last][:3], number)
            else:
                expected.append((*key, number, number))
            ends[key] = number + one.pause
    reported = [(one.kind, one.subject, one.found_at, one.to_step) for one in incidents.events]
    assert reported == expected
    for key in ends:
        own = [event for event in incidents.events if (event.kind, event.subject) == key]
        assert all(event.step <= event.to_step for event in own)
        assert all(one.to_step < other.step for one, other in pairwise(own))
