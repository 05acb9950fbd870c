"""Reads tokenizers from Hugging Face folders, and writes ours there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultrathink.core.errors import CheckpointError
from ultrathink.data.tokenizers.base import END_OF_TEXT, Tokenizer
from ultrathink.data.tokenizers.bpe import BpeTokenizer
from ultrathink.data.tokenizers.byte import ByteTokenizer
from ultrathink.data.tokenizers.byte_names import BYTE_OF_NAME
from ultrathink.data.tokenizers.huggingface import (
    TOKENIZER_FILE,
    HuggingFaceTokenizer,
    read_companions,
)
from ultrathink.interop.values import read_json

_CONFIG = "tokenizer_config.json"


def read_tokenizer(folder: Path, model: Mapping[str, Any]) -> HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face folder whose ``config.json`` holds ``model``.

    Its end-of-text token is the ``eos_token`` of its files, else the model's ``eos_token_id``.
    Raises CheckpointError if there is no readable tokenizer.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {TOKENIZER_FILE}, so its text cannot be read; write one there with "
            f"transformers: AutoTokenizer.from_pretrained(NAME).save_pretrained({str(folder)!r})."
        )
    try:
        definition = path.read_text(encoding="utf-8")
        tokenizer = HuggingFaceTokenizer(definition, 0, read_companions(folder))
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = str(error) or repr(error)
        raise CheckpointError(
            f"{path} cannot be used: {reason}; supported are byte-level tokenizers such as those "
            f"of Llama, Mistral and Qwen. Copy the file again, or take another checkpoint."
        ) from None
    name = special_token(tokenizer, "eos_token")
    eot_id = tokenizer.token_id(name) if name is not None else _eos_of(model)
    if eot_id is None:
        raise CheckpointError(
            f"{folder} names no end-of-text token; set eos_token in {_CONFIG} to a token of its "
            f"vocabulary, or eos_token_id in config.json."
        )
    if not 0 <= eot_id < tokenizer.vocab_size:
        raise CheckpointError(
            f"{folder / 'config.json'}: eos_token_id is {eot_id}, which is not one of the "
            f"{tokenizer.vocab_size} ids of {TOKENIZER_FILE}; set it to one of them."
        )
    return HuggingFaceTokenizer(definition, eot_id, tokenizer.companions)


def special_token(tokenizer: HuggingFaceTokenizer, role: str) -> str | None:
    """The token for ``role`` ("eos_token") that the configuration files of a tokenizer name."""
    for file in (_CONFIG, "special_tokens_map.json"):
        try:
            value = json.loads(tokenizer.companions.get(file, "{}")).get(role)
        except (ValueError, AttributeError):
            raise CheckpointError(
                f"{file} beside the tokenizer is not a JSON object; copy it again."
            ) from None
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            return content
    return None


def _eos_of(model: Mapping[str, Any]) -> int | None:
    value = model.get("eos_token_id")
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) and not isinstance(first, bool) else None


def tokenizer_files(tokenizer: Tokenizer, max_positions: int) -> dict[str, str] | None:
    """The files, by name, with which ``transformers`` gives the same ids; None if none can."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return {TOKENIZER_FILE: tokenizer.definition, **tokenizer.companions}
    if isinstance(tokenizer, BpeTokenizer):
        definition = tokenizer.definition
    elif isinstance(tokenizer, ByteTokenizer):
        definition = _bytes_as_pairs(tokenizer)
    else:
        return None
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    return {TOKENIZER_FILE: definition, _CONFIG: json.dumps(settings, indent=2) + "\n"}


def _bytes_as_pairs(tokenizer: ByteTokenizer) -> str:
    """A byte-pair encoding without merges: each byte is one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {**BYTE_OF_NAME, END_OF_TEXT: tokenizer.eot_id}
    standard = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    standard.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    standard.decoder = decoders.ByteLevel()
    standard.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return str(standard.to_str(pretty=True)) + "\n"


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids for ``config.json``: end of text and, if the tokenizer has one, begin of text."""
    begin = None
    if isinstance(tokenizer, HuggingFaceTokenizer):
        name = special_token(tokenizer, "bos_token")
        begin = tokenizer.token_id(name) if name is not None else None
    return {"bos_token_id": begin, "eos_token_id": tokenizer.eot_id, "pad_token_id": None}


def check_size(tokenizer: HuggingFaceTokenizer, vocab_size: int, folder: Path) -> None:
    """Raise CheckpointError if ``tokenizer`` gives ids without a row in the embedding."""
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{folder / TOKENIZER_FILE} has {tokenizer.vocab_size} ids, and vocab_size in "
            f"config.json is {vocab_size}; give the embedding a row for each with transformers "
            f"(model.resize_token_embeddings({tokenizer.vocab_size})) and save the model again."
        )


def read_model_file(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a Hugging Face folder; CheckpointError if there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint of Hugging Face: it has no config.json. A run of "
            f"ultrathink is named without hf: (training.init_from=RUN)."
        )
    return read_json(path)
