"""Imports a model and its tokenizer from a Hugging Face checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ultrathink.config.model import ModelConfig
from ultrathink.data.tokenizers.huggingface import HuggingFaceTokenizer
from ultrathink.interop.families import Described, check_length, read_family
from ultrathink.interop.fetching import find_folder
from ultrathink.interop.tokenizers import check_size, read_model_file, read_tokenizer
from ultrathink.interop.weights import expert_names, row_slices

if TYPE_CHECKING:
    from ultrathink.model.transformer import Transformer


@dataclass(frozen=True)
class Pretrained:
    """A Hugging Face checkpoint of which everything but the weights was read."""

    source: str
    folder: Path
    described: Described
    tokenizer: HuggingFaceTokenizer

    @property
    def model(self) -> ModelConfig:
        """Our configuration of the model, with every size set."""
        return self.described.model

    def check_length(self, seq_len: int) -> None:
        """Raise CheckpointError if ``seq_len`` is too long for the model."""
        check_length(self.described, seq_len, self.folder / "config.json")

    def load_into(self, model: Transformer) -> None:
        """Load the weights into ``model``; CheckpointError if they do not fit.

        Weights are converted to the model's type. Its RoPE scaling may differ.
        """
        from ultrathink.interop.tensors import check_tensors, fill, find_tensors

        assert row_slices(self.model) == row_slices(model.config), "it was made for this checkpoint"
        files = find_tensors(self.folder)
        wanted = row_slices(self.model, expert_names(files))
        check_tensors(files, wanted, self.folder)
        fill(model, files, wanted)


def open_pretrained(text: str, *, with_weights: bool = True) -> Pretrained:
    """The checkpoint that ``hf:PATH`` or ``hf:NAME[@REVISION]`` names, its weights not yet read.

    Without ``with_weights`` a download skips them. Raises CheckpointError if the checkpoint is
    missing, damaged or not supported.
    """
    folder = find_folder(text, with_weights=with_weights)
    values = read_model_file(folder)
    described = read_family(values, folder / "config.json")
    tokenizer = read_tokenizer(folder, values)
    assert described.model.vocab_size is not None, "every config.json has one"
    check_size(tokenizer, described.model.vocab_size, folder)
    return Pretrained(text, folder, described, tokenizer)


def load_pretrained(text: str) -> tuple[Transformer, HuggingFaceTokenizer]:
    """The model of ``hf:PATH_OR_NAME``, on the CPU in fp32 and evaluation mode, and its tokenizer.

    Raises CheckpointError.
    """
    from ultrathink.runs.loading import empty_model

    pretrained = open_pretrained(text)
    model = empty_model(pretrained.model)
    pretrained.load_into(model)
    return model.eval(), pretrained.tokenizer
