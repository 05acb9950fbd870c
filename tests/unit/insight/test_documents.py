"""Logs that are one JSON document, whole, cut off, or being written."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink.insight.logs.documents import read_document
from ultrathink.insight.logs.log import LogError
from ultrathink.insight.logs.opening import open_log

STATE = {
    "max_steps": 90,
    "log_history": [
        {"epoch": 0.1, "loss": 3.0, "learning_rate": 1e-4, "grad_norm": 2.0, "step": 10},
        {"epoch": 0.1, "eval_loss": 2.9, "eval_runtime": 4.5, "step": 10},
        {"epoch": 0.2, "loss": 2.5, "learning_rate": 1e-4, "step": 20},
        {"epoch": 0.2, "train_loss": 2.75, "train_runtime": 60.0, "step": 20},
        {"epoch": 0.2, "train_loss": 2.75, "step": 20},
        {"epoch": 0.2, "loss": 2.8, "train_runtime": 60.0, "step": 20},
    ],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_a_trainer_state_and_a_folder_that_holds_it(tmp_path: Path) -> None:
    for indent in (None, 2):
        (tmp_path / "trainer_state.json").write_text(json.dumps(STATE, indent=indent))
        log = open_log(tmp_path)
        assert (log.format, log.total_steps) == ("Hugging Face trainer_state.json", 90)
        assert [(s.step, s.values) for s in log.signals()] == [
            (10, {"loss": 3.0, "lr": 1e-4, "grad_norm": 2.0}),
            (10, {"val_loss": 2.9}),
            (20, {"loss": 2.5, "lr": 1e-4}),  # the summary of the run at its end is no step
        ]


def series(**values: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", " "): {"start_step": 1, "values": v} for name, v in values.items()}


def test_series_of_megatron(path: Path) -> None:
    path.write_text(json.dumps(series(
        lm_loss={"1": 3.0, "5": 2.5, "10": "nan"},
        iteration_time={"1": "nan", "5": 0.5, "10": "nan"},
        mem_max_allocated_bytes={"1": 2.0**31, "5": 2.0**30, "10": "nan"},
    )))  # fmt: skip
    log = open_log(path)
    assert log.format == "Megatron's JSON"
    assert [(s.step, s.values) for s in log.signals()] == [
        (1, {"loss": 3.0, "memory_peak": 2.0}),
        (5, {"loss": 2.5, "step_time": 0.5, "memory_peak": 1.0}),
    ]


# A "nan" fills the steps that were not recorded, and stands for a loss that was no number.
RECORDS = {1: "3.0", 2: "2.5"}
SERIES: dict[str, tuple[Any, dict[int, str]]] = {
    "a list of records": ([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}], RECORDS),
    "records of lists": ({"step": [1, 2], "loss": [3.0, 2.5]}, RECORDS),
    "lists have an interval": (
        {"lm loss": {"start_step": 0, "step_interval": 5, "values": [3.0, 2.5, 2.0]}},
        {0: "3.0", 5: "2.5", 10: "2.0"},
    ),
    "at the ends nothing was recorded, between numbers it is one": (
        series(lm_loss={"1": "nan", "2": 3.0, "3": "nan", "4": 2.5, "5": "nan", "6": "nan"}),
        {2: "3.0", 3: "nan", 4: "2.5"},
    ),
    "a series that is mostly nan has gaps": (
        series(lm_loss={"1": 3.0, "2": "nan", "3": "nan", "4": "nan", "5": 2.5}),
        {1: "3.0", 5: "2.5"},
    ),
    "where something else was recorded it is one": (  # norms stop, the count of zeros does not
        series(
            lm_loss={"1": 3.0, "2": "nan", "3": "nan", "4": "nan"},
            num_zeros={"1": 7.0, "2": 8.0, "3": 9.0, "4": "nan"},
        ),
        {1: "3.0", 2: "nan", 3: "nan"},
    ),
    "what is no text is a value": (
        series(lm_loss={"1": 3.0, "2": math.nan}),
        {1: "3.0", 2: "nan"},
    ),
}


@pytest.mark.parametrize("case", SERIES)
def test_what_a_series_recorded(path: Path, case: str) -> None:
    document, losses = SERIES[case]
    for indent in (None, 1):
        path.write_text(json.dumps(document, indent=indent))
        found = list(open_log(path).signals())
        assert {s.step: str(s.values["loss"]) for s in found if "loss" in s.values} == losses


def test_a_document_that_is_cut_off_is_read_to_the_cut(path: Path) -> None:
    text = json.dumps(STATE, indent=2)
    path.write_text(text[: text.index('"eval_loss"')])
    log = open_log(path)
    assert [(s.step, s.values["loss"]) for s in log.signals()] == [(10, 3.0)]
    assert log.notes == ["The document is cut off; what is whole of it was read."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"model": {\n"layers": 3}, "name": "x"}', "an object with the keys model, name"),
        ("[\n]", "a JSON list with nothing in it"),
        ("{\n", "no complete JSON document"),
        ("[\n1, 2]", "a JSON list"),
        ('{\n"log_history": []}', "none of the columns"),
        ('{\n"log_history": [{"a": 1}]}', "seen: a"),
    ],
)
def test_other_documents_are_no_log(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(LogError, match=message):
        open_log(path)


def test_new_records_are_returned_and_another_document_from_its_beginning(path: Path) -> None:
    def news(document: Any) -> tuple[list[int], bool]:
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        new = log.poll()
        return [s.step for s in new.signals], new.is_replaced

    path.write_text(json.dumps(STATE))
    log = open_log(path)
    assert news(STATE) == ([10, 10, 20], False)
    assert news(STATE) == ([], False)
    assert news("") == ([], False)  # half written: it is waited for
    assert news(STATE) == ([], False)
    history: Any = STATE["log_history"]
    longer = {**STATE, "log_history": [*history[:3], {"step": 30, "loss": 2.0}]}
    assert news(longer) == ([30], False)
    assert news({"log_history": [{"step": 1, "loss": 9.0}]}) == ([1], True)


trees = st.recursive(
    st.one_of(st.integers(), st.text(max_size=5), st.none(), st.booleans()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=20,
)


@given(st.lists(trees, min_size=1), st.data())
def test_what_is_read_of_a_cut_document_was_in_it(
    tmp_path_factory: pytest.TempPathFactory, document: list[Any], data: st.DataObject
) -> None:
    """All elements but the last are as they were, and the last is not an invention."""
    text = json.dumps(document)
    path = tmp_path_factory.mktemp("cut") / "log"
    path.write_text(text[: data.draw(st.integers(1, len(text) - 1))])
    try:
        found, is_whole = read_document(path)
    except LogError:
        return
    assert not is_whole
    assert found[:-1] == document[: max(0, len(found) - 1)]
    assert len(found) <= len(document)
    if found and not isinstance(found[-1], list | dict):
        assert found[-1] == document[len(found) - 1]
