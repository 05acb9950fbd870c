from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.data_helpers import loader_of
from ultrathink.config.data import DataConfig
from ultrathink.config.tokenizer import BpeTokenizerConfig, ByteTokenizerConfig
from ultrathink.core.errors import DataError
from ultrathink.data.prepare import PreparedData, prepare_data
from ultrathink.data.tokenizers.bpe import BpeTokenizer
from ultrathink.data.validation import ValidationSet

BPE = BpeTokenizerConfig(vocab_size=300)


def prepare(train: Any, tokenizer: Any = None, progress: Any = None, **data: Any) -> PreparedData:
    config = DataConfig.model_validate({"train": train, "seq_len": 16, **data})
    return prepare_data(config, tokenizer or ByteTokenizerConfig(), progress=progress)


DUMMY: dict[str, Any] = {"type": "dummy", "num_documents": 60, "num_words": 40}


def text_of(prepared: PreparedData, stores: Any) -> str:
    return "".join(prepared.tokenizer.decode(store.tokens) for store in stores)


def test_train_and_held_out_text_are_all_the_text_and_apart() -> None:
    prepared = prepare([DUMMY], BPE)
    assert [source.name for source in prepared.record.train] == ["dummy"]
    assert prepared.record.weights == [1.0]
    assert prepared.record.skipped == {}
    train, val = (
        text_of(prepared, stores) for stores in (prepared.train_stores, prepared.val_stores)
    )
    assert len(train) > 5 * len(val) > 0
    assert not set(train.splitlines()) & set(val.splitlines())
    assert prepared.tokenizer.vocab_size == 300
    loader = loader_of(prepared.train_stores, prepared.record.weights, seq_len=16)
    assert loader.num_samples == prepared.num_samples
    assert loader.next_batch().num_target_tokens == 3 * 16
    assert ValidationSet(prepared.val_stores, 16).extent().num_bytes == len(val)


def test_the_second_time_nothing_is_trained_or_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[str] = []

    def note(label: str, done: int, total: int) -> None:
        assert done <= total
        labels.append(label)

    first = prepare([DUMMY], BPE, note)
    assert labels == [
        "reading dummy",
        "training tokenizer",
        "tokenizing dummy (train)",
        "tokenizing dummy (val)",
    ]
    labels.clear()
    monkeypatch.setattr(BpeTokenizer, "train", lambda *_: pytest.fail("retrained"))
    second = prepare([DUMMY], BPE, note)
    assert labels == ["reading dummy"]
    assert second.record.data_hash == first.record.data_hash
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("tokenizer.json", lambda text: text[:100], "tokenizer.json: JSONDecodeError("),
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer_meta.json", None, "tokenizer_meta.json is missing"),
    ],
)
def test_a_damaged_cached_tokenizer_is_retrained_and_reported_once(
    tmp_path: Path, name: str, damage: Any, problem: str
) -> None:
    first = prepare([DUMMY], BPE)
    assert first.notes == []
    [file] = (tmp_path / "cache" / "tokenizers").glob(f"*/{name}")
    content = file.read_text()
    if damage is None:
        file.unlink()
    else:
        file.write_text(damage(content))
    again = prepare([DUMMY], BPE)
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert file.read_text() == content
    [note] = again.notes
    assert note.startswith("the cached tokenizer was damaged (")
    assert problem in note
    assert note.endswith(") and was retrained")
    assert prepare([DUMMY], BPE).notes == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the cache .*/file cannot be written .*data.cache_dir"):
        prepare([DUMMY], BPE, cache_dir=str(tmp_path / "file"))


def test_the_tokenizer_never_sees_held_out_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ordinary words here\n" * 200 + "zyxwvu\n" * 60)
    options = {"type": "text", "path": str(path)}
    prepared = prepare([{**options, "val_fraction": 0.2}], BPE)
    assert "zyxwvu" not in text_of(prepared, prepared.train_stores)
    assert len(prepared.tokenizer.encode("zyxwvu")) == 6
    assert len(prepare([{**options, "val_fraction": 0}], BPE).tokenizer.encode("zyxwvu")) < 6
    # Named validation text is scored whole, and nothing is held out.
    (tmp_path / "val.txt").write_text("zyxwvu zyxwvu\n" * 50)
    named = prepare([options], BPE, val=[{"type": "text", "path": str(tmp_path / "val.txt")}])
    assert text_of(named, named.train_stores) == path.read_text()
    assert text_of(named, named.val_stores) == "zyxwvu zyxwvu\n" * 50
    assert [store.name for store in named.val_stores] == ["val"]


def test_the_data_hash_follows_all_that_decides_the_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text\n" * 100)
    source = {"type": "text", "path": str(path)}
    prepared = [
        prepare([source]),
        prepare([source], seq_len=17),
        prepare([source], packing={"enabled": False}),
        prepare([source], packing={"isolate_documents": False}),
        prepare([source], BPE),
        prepare([source, DUMMY]),
        prepare([DUMMY, source]),
    ]
    path.write_text("Some text\n" * 100)
    hashes = [each.record.data_hash for each in [*prepared, prepare([source])]]
    assert len(set(hashes)) == len(hashes)
    path.write_text("some text\n" * 100)
    assert prepare([source]).record.data_hash == hashes[0]


def test_names_weights_stores_and_tokenizer_are_those_that_were_configured(
    bpe: BpeTokenizer, tmp_path: Path
) -> None:
    sources = [
        DUMMY,
        {**DUMMY, "seed": 1, "weight": 0.5},
        {**DUMMY, "seed": 2, "name": "mine"},
    ]
    prepared = prepare(sources, bpe, cache_dir=str(tmp_path / "mine"))
    assert [source.name for source in prepared.record.train] == ["dummy", "dummy-2", "mine"]
    assert prepared.record.weights == [1.0, 0.5, 1.0]
    assert prepared.tokenizer is bpe
    assert prepared.train_stores[0].eot_id == bpe.eot_id
    assert prepared.train_stores[0].folder.is_relative_to(tmp_path / "mine")
    assert not (tmp_path / "cache").exists()
    record = prepared.record
    for split, stores in (("train", prepared.train_stores), ("val", prepared.val_stores)):
        names = [store.folder.name for store in stores]
        assert [source.stores[split] for source in record.train] == names


def test_skipped_documents_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "word " * 200 + '"}\n{"text": 3}\nnot json\n')
    for _ in range(2):  # the second time from the cache
        prepared = prepare([{"type": "jsonl", "path": str(path), "on_bad": "skip"}])
        assert prepared.record.skipped == {"a": 2}


def test_more_text_than_is_learned_from_is_sampled_over_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first part\n" * 5000 + "SECOND_HALF\n" * 5000)
    tokenizer = BpeTokenizerConfig(vocab_size=400, train_bytes=20_000)
    prepared = prepare([{"type": "text", "path": str(path), "val_fraction": 0}], tokenizer)
    assert len(prepared.tokenizer.encode("SECOND_HALF")) < 6
    assert prepared.val_stores == []
    tiny = BpeTokenizerConfig(vocab_size=400, train_bytes=50)
    assert prepare([DUMMY], tiny).tokenizer.vocab_size > 257


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (
            "",
            {},
            "data source 'a' has no text: its documents are empty or there are none. "
            "Point it at other files.",
        ),
        (
            "x",
            {},
            "data source 'a' has no text left to train on once some is held out. Name "
            "validation text in data.val, or lower the source's val_fraction.",
        ),
        (
            "0123456789 0123",
            {"val_fraction": 0},
            "data source 'a' has 16 training tokens; one "
            "sequence of data.seq_len 16 needs 17. Add text, or lower data.seq_len.",
        ),
    ],
)
def test_too_little_text_is_named(
    tmp_path: Path, content: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=r"too small to hold out text .* text in data\.val"):
        prepare([{**DUMMY, "num_documents": 1}])
    path = tmp_path / "a.txt"
    path.write_text(content)
    for tokenizer in (None,) if "tokens" in words else (None, BPE):
        with pytest.raises(DataError) as caught:
            prepare([{"type": "text", "path": str(path), **options}], tokenizer)
        assert str(caught.value) == words


def test_shakespeare_and_c4_together(public_file: Callable[[str], Path]) -> None:
    prepared = prepare(
        [
            {"type": "text", "path": str(public_file("text/tinyshakespeare.txt"))},
            {"type": "jsonl", "path": str(public_file("text/c4_demo.jsonl")), "weight": 3},
        ],
        BpeTokenizerConfig(vocab_size=2000),
        seq_len=128,
    )
    assert [source.name for source in prepared.record.train] == ["tinyshakespeare", "c4_demo"]
    assert prepared.train_stores[0].num_documents == 1
    crawl = prepared.train_stores[1].num_documents, prepared.val_stores[1].num_documents
    assert sum(crawl) == 300
    assert 3 <= crawl[1] <= 35
    loader = loader_of(prepared.train_stores, prepared.record.weights, seq_len=128, batch_size=8)
    sources = [int(s) for _ in range(50) for s in loader.next_batch().source_ids[:, 0]]
    assert abs(sum(sources) - 300) <= 1
    assert ValidationSet(prepared.val_stores, 128).extent().num_tokens > 10_000
