"""Tiny checkpoints of Hugging Face, and runs that hold a model without having trained it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ultrathink.config import load_config
from ultrathink.config.model import ModelConfig
from ultrathink.config.tokenizer import BpeTokenizerConfig
from ultrathink.data.tokenizers.base import END_OF_TEXT, Tokenizer
from ultrathink.data.tokenizers.bpe import BpeTokenizer
from ultrathink.model.transformer import Transformer
from ultrathink.runs.folder import RunFolder

VOCAB = 300
SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
}
TEXTS = (
    "the quick brown fox jumps over the lazy dog and the other dogs there",
    "naïve café 中文 👍🏽 don't  stop\n\n\tnow 12345",
)


@cache
def small_bpe() -> BpeTokenizer:
    return BpeTokenizer.train(BpeTokenizerConfig(vocab_size=VOCAB), TEXTS * 4)


def write_tokenizer(folder: Path) -> None:
    """The files of a tokenizer as a checkpoint of Hugging Face has them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(small_bpe().definition, encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages }}\r\n")


def make_theirs(kind: str, **changes: Any) -> Any:
    """A model of ``transformers`` whose every weight, norms and biases too, is random."""
    import transformers

    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    }
    config, model_class = classes[kind]
    if kind == "mistral":
        changes = {"sliding_window": None, **changes}
    torch.manual_seed(0)
    model = model_class(config(**SHAPE | changes, attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and not name.endswith("bias")
            parameter.normal_(1.0 if is_norm else 0.0, 0.15)
    return model.eval()


def save_theirs(folder: Path, kind: str, **changes: Any) -> Any:
    """Save such a model, with a tokenizer, as ``transformers`` does; gives the model."""
    model = make_theirs(kind, **changes)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def change_config(folder: Path, *drop: str, **values: Any) -> None:
    """Set and drop keys of a folder's ``config.json``."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: config[key] for key in config if key not in drop}))


def to_older_layout(folder: Path) -> None:
    """Say of rotary positions what transformers before 5 would have said."""
    parameters = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = parameters.pop("rope_theta")
    parameters["type"] = parameters.pop("rope_type")
    change_config(folder, "rope_parameters", rope_theta=theta, rope_scaling=parameters)


def make_run(
    place: Path, model: ModelConfig, tokenizer: Tokenizer, state: dict[str, torch.Tensor]
) -> RunFolder:
    """A run folder whose checkpoint of step 7 holds ``state``."""
    config = load_config("debug", [f"run.dir={place / 'runs'}"])
    values = {f"model.{key}": value for key, value in model.model_dump(mode="json").items()}
    run, _ = RunFolder.create(config.replace(values, origin="test"))
    tokenizer.save(run.tokenizer)
    run.save(7, {"model": dict(state), "progress": {"step": 7}}, is_best=True, keep=1)
    return run


def make_random_run(place: Path, tokenizer: Tokenizer | None = None, **changes: Any) -> RunFolder:
    """A run folder that holds a random model of ours; every weight, norms and biases too."""
    shape = {"hidden_size": 48, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2}
    config = ModelConfig.model_validate({**shape, "vocab_size": VOCAB, **changes}).resolved()
    torch.manual_seed(1)
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and not name.endswith("bias")
            parameter.normal_(1.0 if is_norm else 0.0, 0.15)
    return make_run(place, config, tokenizer or small_bpe(), model.state_dict())


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids).logits
    assert logits.std() > 0.5, "the comparison needs logits that differ"
    return logits


def assert_same_logits(ours: Any, theirs: Any) -> None:
    ids = make_ids(120)
    torch.testing.assert_close(logits_of(ours, ids), logits_of(theirs, ids), atol=1e-5, rtol=1e-5)


def load_theirs(folder: Path) -> Any:
    """A saved model, as ``transformers`` reads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def make_ids(length: int = 48) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(3))
