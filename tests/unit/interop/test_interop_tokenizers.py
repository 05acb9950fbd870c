"""Tokenizers that come from Hugging Face and go there: equal ids, and what each id stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer as Definition
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tests.unit.interop.checkpoints import (
    TEXTS,
    change_config,
    make_random_run,
    small_bpe,
    write_tokenizer,
)
from ultrathink.config.tokenizer import HuggingFaceTokenizerConfig
from ultrathink.core.errors import CheckpointError, ConfigError
from ultrathink.data.documents import replace_surrogates
from ultrathink.data.tokenizers.base import END_OF_TEXT, Tokenizer, load_tokenizer
from ultrathink.data.tokenizers.bpe import AWKWARD_TEXTS
from ultrathink.data.tokenizers.byte import ByteTokenizer
from ultrathink.data.tokenizers.huggingface import HuggingFaceTokenizer
from ultrathink.interop.export import export_run
from ultrathink.interop.importing import open_pretrained
from ultrathink.interop.tokenizers import read_tokenizer, special_ids

# transformers reads special tokens that are written out as such; here they are plain text.
ALL_TEXTS = [text for text in (*AWKWARD_TEXTS, *TEXTS) if END_OF_TEXT not in text]


def sentence_pieces(*, metaspace: bool) -> str:
    """A tokenizer in the manner of Llama 2 and Mistral: a space before every text, byte pieces."""
    tokenizer = Definition(models.BPE(unk_token="<unk>", byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        first: Any = decoders.Metaspace(prepend_scheme="first", split=True)
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), first])
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    special = ["<unk>", "<s>", "</s>"]
    byte_pieces = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*special, *byte_pieces], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    definition = json.loads(tokenizer.to_str())
    for added in definition["added_tokens"]:
        added["special"] = added["content"] in special
    definition["added_tokens"] = [a for a in definition["added_tokens"] if a["special"]]
    definition["truncation"] = {
        "max_length": 3,
        "stride": 0,
        "strategy": "LongestFirst",
        "direction": "Right",
    }
    return json.dumps(definition)


def write_definition(folder: Path, definition: str, **settings: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# -- in --------------------------------------------------------------------------------------------


def test_bytes_come_back_from_a_byte_level_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = read_tokenizer(tmp_path, {})
    for text in (*ALL_TEXTS, END_OF_TEXT, "a\ud800b"):
        ids = tokenizer.encode(text)
        assert tokenizer.eot_id not in ids, "a special token that is written out is plain text"
        assert ids == small_bpe().encode(text)
        assert tokenizer.encode_batch([text])[0].tolist() == ids
        assert tokenizer.decode(ids) == replace_surrogates(text)
        assert tokenizer.decode_bytes(ids) == replace_surrogates(text).encode()
    assert tokenizer.decode_bytes([tokenizer.eot_id]) == b""
    assert tokenizer.decode([99_999]) == "\ufffd"


@pytest.mark.parametrize("metaspace", [True, False])
def test_text_comes_back_from_sentence_pieces(tmp_path: Path, metaspace: bool) -> None:
    write_definition(tmp_path, sentence_pieces(metaspace=metaspace), eos_token="</s>")
    tokenizer = read_tokenizer(tmp_path, {})
    assert tokenizer.eot_id == 2
    assert tokenizer.vocab_size == Definition.from_str(tokenizer.definition).get_vocab_size()
    for text in ("the quick fox", "never seen: Ω☃", TEXTS[0]):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == f" {text}".encode(), "amid a text the space counts"
    assert len(tokenizer.encode("never seen: Ω☃")) > 3, (
        "the file's own truncation is not for training"
    )


def test_a_saved_one_comes_back_with_its_companions(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "there")
    tokenizer = read_tokenizer(tmp_path / "there", {})
    tokenizer.save(tmp_path / "run")
    again = load_tokenizer(tmp_path / "run")
    assert isinstance(again, HuggingFaceTokenizer)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.companions == tokenizer.companions
    assert again.companions["chat_template.jinja"].endswith("\r\n")
    other = HuggingFaceTokenizer(tokenizer.definition, 5)
    assert other.fingerprint != tokenizer.fingerprint


def test_a_damaged_one_is_reported(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "there")
    read_tokenizer(tmp_path / "there", {}).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    for damage in (lambda: path.write_text("{"), path.unlink):
        damage()
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: the tokenizer is damaged"):
            load_tokenizer(tmp_path)


def test_the_end_of_text_is_found_where_it_is_named(tmp_path: Path) -> None:
    write_definition(tmp_path, small_bpe().definition)
    plain = read_tokenizer(tmp_path, {"eos_token_id": 7})
    assert plain.eot_id == 7
    assert plain.decode_bytes([7, 8]) == small_bpe().decode_bytes([8]), "it stands for no bytes"
    assert read_tokenizer(tmp_path, {"eos_token_id": [9, 7]}).eot_id == 9
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": END_OF_TEXT, "lstrip": False}})
    )
    assert read_tokenizer(tmp_path, {"eos_token_id": 7}).eot_id == small_bpe().eot_id


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    def refused(model: dict[str, Any]) -> str:
        with pytest.raises(CheckpointError) as caught:
            read_tokenizer(tmp_path, model)
        assert str(tmp_path) in str(caught.value) or "beside the tokenizer" in str(caught.value)
        return str(caught.value)

    assert "has no tokenizer.json" in refused({})
    write_definition(tmp_path, small_bpe().definition)
    assert "names no end-of-text token; set eos_token" in refused({})
    assert "eos_token_id is 300, which is not one of the 300 ids" in refused({"eos_token_id": 300})
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json beside the tokenizer is not a JSON object" in refused({})
    words = Definition(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    write_definition(tmp_path, words.to_str())
    assert "its decoder (WordPiece) is not one of bytes" in refused({})
    write_definition(tmp_path, "{}")
    assert "supported are byte-level tokenizers" in refused({})


def test_it_is_not_trained() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.type hf .* set training\.init_from=hf:"):
        HuggingFaceTokenizer.train(HuggingFaceTokenizerConfig(), [])


def test_more_ids_than_the_model_has_rows(tmp_path: Path) -> None:
    folder = export_run(str(make_random_run(tmp_path).path)).folder
    change_config(folder, vocab_size=299)
    with pytest.raises(CheckpointError, match=r"has 300 ids, and vocab_size .* is 299; give the"):
        open_pretrained(f"hf:{folder}")


# -- out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}])
@pytest.mark.parametrize("tokenizer", [small_bpe(), ByteTokenizer()], ids=["bpe", "byte"])
def test_transformers_gives_the_same_ids(
    tmp_path: Path, tokenizer: Tokenizer, changes: dict[str, Any]
) -> None:
    run = make_random_run(tmp_path, tokenizer, **changes)
    done = export_run(str(run.path))
    assert done.tokenizer_class is not None
    theirs = getattr(transformers, done.tokenizer_class).from_pretrained(done.folder)
    assert (done.tokenizer_class == "AutoTokenizer") == (done.remarks == ())
    for text in ALL_TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.eot_id
    assert theirs.eos_token == END_OF_TEXT
    again = read_tokenizer(done.folder, {})
    assert again.eot_id == tokenizer.eot_id
    assert [again.encode(text) for text in ALL_TEXTS] == [tokenizer.encode(t) for t in ALL_TEXTS]


def test_ids_that_a_description_names(tmp_path: Path) -> None:
    definition = sentence_pieces(metaspace=True)
    write_definition(tmp_path, definition, eos_token="</s>", bos_token="<s>")
    tokenizer = read_tokenizer(tmp_path, {})
    assert special_ids(tokenizer) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert special_ids(ByteTokenizer())["bos_token_id"] is None
