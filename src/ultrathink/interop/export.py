"""Exports a run's checkpoint to a folder that ``transformers`` loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import save_file

from ultrathink.checkpoint.format import load_checkpoint, weights
from ultrathink.core.errors import ConfigError
from ultrathink.core.files import new_folder
from ultrathink.data.tokenizers.base import Tokenizer, load_tokenizer
from ultrathink.data.tokenizers.huggingface import TOKENIZER_FILE, HuggingFaceTokenizer
from ultrathink.interop.families import write_family
from ultrathink.interop.routing import fold_routing
from ultrathink.interop.tensors import WEIGHTS_FILE, split
from ultrathink.interop.tokenizers import special_ids, tokenizer_files
from ultrathink.interop.weights import row_slices
from ultrathink.runs.folder import RunFolder, find_run
from ultrathink.runs.loading import check_loads

WeightType: TypeAlias = Literal["fp32", "bf16"]
_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

# transformers 5 ignores the tokenizer_class of a folder whose model_type is qwen2.
_QWEN2_TOKENIZER = (
    "AutoTokenizer takes the tokenizer of any Qwen2 for Qwen's own and cuts text as that does; "
    "load this one with PreTrainedTokenizerFast.from_pretrained"
)


@dataclass(frozen=True)
class Export:
    """What an export wrote, and where."""

    folder: Path
    run: Path
    checkpoint: Path
    step: int
    model_type: str
    """The family of Hugging Face that the model was exported as."""
    dtype: str
    """The type of the weights as ``torch`` calls it: float32."""
    tokenizer_class: str | None
    """The class of ``transformers`` that reads the tokenizer; None if no tokenizer was written."""
    remarks: tuple[str, ...]
    """Remarks for the user, one sentence each."""


def export_run(
    run: str,
    checkpoint: str = "best",
    *,
    output: str | Path | None = None,
    dtype: WeightType | None = None,
) -> Export:
    """Write the model of a run's checkpoint and its tokenizer as a Hugging Face folder.

    ``output`` is by default ``RUN/export/NAME``; an existing folder is never overwritten. With
    ``dtype`` None the weights keep their type. The folder is written under a temporary name,
    flushed and renamed. Raises ConfigError if no family of Hugging Face has such models, and
    CheckpointError if the run or the checkpoint is missing or damaged.
    """
    found = find_run(run)
    config = found.read_config()
    description = write_family(config.model, config.data.seq_len)  # before anything heavy is read
    source, remarks = found.sound_checkpoint(checkpoint, weights)
    check_loads(source, config.model)
    folder = Path(output) if output is not None else _usual_place(found, source, dtype)
    if folder.exists():
        raise ConfigError(
            f"{folder} exists already, and an export overwrites nothing; name another folder "
            f"with --output FOLDER, or remove it."
        )
    state: Any = load_checkpoint(source, weights)
    plain, folded = fold_routing(state["model"], config.model, source)
    remarks = [*remarks, *folded]
    if found_norms := [name for name in plain if name.startswith("exit_norms.")]:
        plain = {name: value for name, value in plain.items() if name not in found_norms}
        remarks = [*remarks, "the norms of its exits are left out; the model runs whole"]
    tensors = split(plain, row_slices(config.model), None if dtype is None else _DTYPES[dtype])
    name = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    tokenizer = load_tokenizer(found.tokenizer)
    files = _texts(description | {"torch_dtype": name}, tokenizer)
    tokenizer_class: str | None = "AutoTokenizer"
    if TOKENIZER_FILE not in files:
        tokenizer_class = None
        remarks = [
            *remarks,
            f"the tokenizer ({type(tokenizer).__name__}) cannot be written for transformers; the "
            f"folder has the model only",
        ]
    elif description["model_type"] == "qwen2" and not isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer_class = "PreTrainedTokenizerFast"
        remarks = [*remarks, _QWEN2_TOKENIZER]
    _write(folder, files, tensors)
    return Export(
        folder=folder,
        run=found.path,
        checkpoint=source,
        step=int(source.name.removeprefix("step_")),
        model_type=description["model_type"],
        dtype=name,
        tokenizer_class=tokenizer_class,
        remarks=tuple(remarks),
    )


def _usual_place(run: RunFolder, checkpoint: Path, dtype: WeightType | None) -> Path:
    name = f"hf-{checkpoint.name}" + (f"-{dtype}" if dtype is not None else "")
    return run.path / "export" / name


def _texts(description: dict[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """The text files of the folder, by name."""
    ids = special_ids(tokenizer)
    writing = {name: value for name, value in ids.items() if value is not None}
    return {
        "config.json": _json(description | ids),
        "generation_config.json": _json(writing),
        **(tokenizer_files(tokenizer, description["max_position_embeddings"]) or {}),
    }


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _write(folder: Path, texts: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    """Write all of a folder, or nothing."""
    with new_folder(folder) as beside:
        for name, text in texts.items():
            (beside / name).write_bytes(text.encode())
        # transformers requires the name of the library that the tensors are for.
        save_file(tensors, beside / WEIGHTS_FILE, metadata={"format": "pt"})
