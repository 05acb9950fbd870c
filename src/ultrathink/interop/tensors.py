"""The tensors of a Hugging Face folder: safetensors in one file or several, nothing pickled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ultrathink.core.errors import CheckpointError
from ultrathink.interop.values import read_json
from ultrathink.interop.weights import EMBEDDING, HEAD, RowSlice
from ultrathink.model.transformer import Transformer

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_COMPUTED = ".rotary_emb.inv_freq"  # stored by old checkpoints, follows from the configuration


def find_tensors(folder: Path) -> dict[str, Path]:
    """The file of each tensor; CheckpointError if there are none or files are missing."""
    if (folder / WEIGHTS_FILE).is_file():
        with _opened(folder / WEIGHTS_FILE) as file:
            return dict.fromkeys(file.keys(), folder / WEIGHTS_FILE)
    index = folder / INDEX_FILE
    if not index.is_file():
        old = next((path.name for path in sorted(folder.glob("*.bin"))), None)
        if old is not None:
            raise CheckpointError(
                f"{folder} has its weights in {old}, which is pickled and can run code when it is "
                f"read; write them as safetensors with transformers: "
                f"AutoModelForCausalLM.from_pretrained(NAME).save_pretrained(FOLDER)."
            )
        raise CheckpointError(
            f"{folder} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}; copy or download "
            f"them again."
        )
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no weight_map; copy or download it again.")
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file of that folder.")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing; copy or download it again.")
    return {tensor: folder / name for tensor, name in names.items()}


def check_tensors(files: Mapping[str, Path], wanted: Sequence[RowSlice], folder: Path) -> None:
    """Raise CheckpointError naming the first tensor that is missing, unknown or misshapen."""
    expected = {entry.theirs: entry for entry in wanted}
    for name in expected:
        if name not in files:
            raise CheckpointError(
                f"{folder} has no weight {name}, which its config.json asks for; save the whole "
                f"model with transformers (ForCausalLM, adapters merged)."
            )
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            for name in sorted(name for name, place in files.items() if place == path):
                if name in expected:
                    _check_tensor(file, name, expected[name].shape, path)
                elif name == HEAD:  # the configuration says that the head is tied
                    _check_shared(files, folder)
                elif not name.endswith(_COMPUTED):
                    raise CheckpointError(
                        f"{path} holds {name}, which is not part of the model in its config.json "
                        f"and would be lost. Save the model with transformers, adapters merged."
                    )


def _check_tensor(file: Any, name: str, shape: tuple[int, ...], path: Path) -> None:
    stored = file.get_slice(name)
    found = tuple(stored.get_shape())
    if found != shape:
        raise CheckpointError(
            f"{path}: {name} is {list(found)}, but its config.json makes it {list(shape)}; one of "
            f"the two belongs to another model."
        )
    if stored.get_dtype() not in _FLOATS:
        raise CheckpointError(
            f"{path}: {name} holds numbers of type {stored.get_dtype()}; only {', '.join(_FLOATS)} "
            f"can be trained on. Take the checkpoint it was quantized from."
        )


def _check_shared(files: Mapping[str, Path], folder: Path) -> None:
    """Raise CheckpointError if a head declared as tied differs from the embedding."""
    pair = []
    for name in (EMBEDDING, HEAD):
        with _opened(files[name]) as file:
            pair.append(file.get_tensor(name))
    if not torch.equal(*pair):
        raise CheckpointError(
            f"{folder / 'config.json'}: tie_word_embeddings is true, but {HEAD} is not the "
            f"embedding; set it to false."
        )


@torch.no_grad()
def fill(model: Transformer, files: Mapping[str, Path], wanted: Sequence[RowSlice]) -> None:
    """Copy each tensor, checked before, to its place in ``model``, one at a time."""
    parameters = dict(model.named_parameters())
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            for entry in wanted:
                if files[entry.theirs] == path:
                    entry.of(parameters[entry.ours]).copy_(file.get_tensor(entry.theirs))


def split(
    state: Mapping[str, Tensor], wanted: Iterable[RowSlice], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """A copy of our weights under Hugging Face's names, converted to ``dtype`` unless None."""
    theirs: dict[str, Tensor] = {}
    for entry in wanted:
        part = entry.of(state[entry.ours])
        theirs[entry.theirs] = part.to(dtype or part.dtype, copy=True)
    return theirs


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); copy or download it again."
        ) from None
