"""Resuming when the text or the token cache is not what the run was trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import At, Recorder, asks, final_state, records, without_time
from ultrathink.core.errors import CheckpointError
from ultrathink.recipes.resume import resume_trainer
from ultrathink.runs.folder import RunFolder
from ultrathink.runs.segments import read_segments
from ultrathink.training.changes import Stop

Damage = Callable[[Path], None]
LENGTH = ("training.max_steps=10", "training.checkpoint={every_steps: 2, keep: 9}")


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"Line of book {number} and some more.\n" * 80)
    lines = [json.dumps({"text": f"entry {n}: something to say here.\n" * 3}) for n in range(40)]
    (tmp_path / "crawl.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def sources(books: Path) -> str:
    crawl = books.parent / "crawl.jsonl"
    return f"data.train=[{{type: text, path: {books}}}, {{type: jsonl, path: {crawl}}}]"


@pytest.fixture
def run(make_trainer: MakeTrainer, books: Path) -> RunFolder:
    """A run of ten steps that stopped after four."""
    trainer = make_trainer(*LENGTH, sources(books), controllers=[At(step4=asks(Stop()))])
    assert trainer.fit().name == "stopped"
    return trainer.run


@pytest.fixture
def whole(make_trainer: MakeTrainer, books: Path, run: RunFolder) -> RunFolder:
    """The same run, never stopped."""
    trainer = make_trainer(*LENGTH, sources(books))
    trainer.fit()
    return trainer.run


def assert_same(run: RunFolder, other: RunFolder) -> None:
    assert without_time(records(run)) == without_time(records(other))
    here, there = final_state(run), final_state(other)
    assert here.keys() == there.keys()
    assert [name for name in here if not torch.equal(here[name], there[name])] == []


def grow(books: Path) -> None:
    with (books.parent / "crawl.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": f"new entry {n}\n" * 9}) + "\n" for n in range(5))


def change(books: Path) -> None:
    (books / "1.txt").write_text("Another text altogether, of other words.\n" * 80)


def remove(books: Path) -> None:
    (books / "2.txt").unlink()


def remove_all(books: Path) -> None:
    shutil.rmtree(books)


DAMAGE = [
    pytest.param(grow, "crawl.jsonl grew by 5 documents", id="jsonl-grew"),
    pytest.param(change, "1.txt changed", id="file-changed"),
    pytest.param(remove, "2.txt is gone", id="file-vanished"),
    pytest.param(remove_all, "books", id="folder-vanished"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGE)
def test_it_is_refused_by_default_and_keep_continues_bit_for_bit_with_the_tokens_of_then(
    run: RunFolder, whole: RunFolder, books: Path, damage: Damage, named: str
) -> None:
    damage(books)
    segments = run.segments.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        resume_trainer(run)
    message = str(caught.value)
    assert named in message
    assert "data.on_change=keep" in message
    # What is not there cannot be tokenized again.
    assert ("data.on_change=rebuild" in message) == (damage is not remove_all)
    assert run.segments.read_bytes() == segments
    recorder = Recorder()
    resume_trainer(run, overrides=["data.on_change=keep"], callbacks=[recorder]).fit()
    assert_same(run, whole)
    assert any(named in text for text in recorder.messages)
    assert any(named in note for note in read_segments(run.segments)[-1].notes)


def test_rebuild_trains_on_the_new_text_on_record_and_earlier_checkpoints_know_theirs(
    run: RunFolder, whole: RunFolder, books: Path, tmp_path: Path
) -> None:
    before = json.loads(run.data_record.read_text())["data_hash"]
    grow(books)
    trainer = resume_trainer(run, overrides=["data.on_change=rebuild"])
    assert (trainer.loader.samples_seen, trainer.progress.step) == (0, 4)
    assert trainer.progress.best is None
    assert trainer.fit().name == "finished"
    segment = read_segments(run.segments)[-1]
    assert segment.reset == ("data",)
    assert any("crawl.jsonl grew by 5 documents" in note for note in segment.notes)
    assert json.loads(run.data_record.read_text())["data_hash"] != before
    # From there on it is an ordinary run of the new text.
    longer = resume_trainer(run, overrides=["training.max_steps=12"])
    assert longer.loader.samples_seen == 6 * 4
    assert longer.fit().name == "finished"
    with pytest.raises(CheckpointError, match=r"crawl\.jsonl grew by 5 documents"):
        resume_trainer(run, "2")
    resume_trainer(run, "2", overrides=["data.on_change=keep"]).fit()
    assert_same(run, whole)


def test_a_damaged_token_cache_is_built_again_and_reported(
    run: RunFolder, whole: RunFolder, tmp_path: Path
) -> None:
    damaged = sorted((tmp_path / "cache" / "tokens").glob("*/tokens.bin"))
    for number, path in enumerate(damaged):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if number else data[: len(data) // 2])
    recorder = Recorder()
    resume_trainer(run, callbacks=[recorder]).fit()
    reported = [text for text in recorder.messages if "was rebuilt" in text]
    assert len(reported) >= 2
    assert_same(run, whole)


def test_other_validation_text_lets_the_order_continue(
    make_trainer: MakeTrainer, run: RunFolder, whole: RunFolder, tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("Something else to be judged by.\n" * 60)
    trainer = resume_trainer(run, overrides=[f"data.val=[{{type: text, path: {held_out}}}]"])
    assert trainer.progress.best is None
    # With data.val the training sources are trained on whole, so these are other samples.
    assert trainer.loader.samples_seen == 0
    trainer.fit()
    held_out.write_text("And yet something else to be judged by.\n" * 60)
    again = resume_trainer(run, overrides=["data.on_change=rebuild", "training.max_steps=12"])
    assert again.loader.samples_seen == 6 * 4
    assert again.progress.best is None
    again.fit()
