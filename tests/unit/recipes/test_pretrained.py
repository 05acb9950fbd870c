"""Training that begins with weights of Hugging Face: whose shape, whose tokenizer, whose values."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.interop.checkpoints import (
    change_config,
    make_random_run,
    save_theirs,
    small_bpe,
    to_older_layout,
)
from ultrathink import build_model, load_model
from ultrathink.config import load_config
from ultrathink.config.schema import Config
from ultrathink.core.errors import CheckpointError, ConfigError
from ultrathink.data.tokenizers.huggingface import HuggingFaceTokenizer
from ultrathink.inference.engine import Engine
from ultrathink.inference.sampling import SamplingParams
from ultrathink.interop.export import export_run
from ultrathink.interop.importing import load_pretrained
from ultrathink.recipes.parts.pretrained import adopt_pretrained, shown_with_pretrained
from ultrathink.recipes.resume import resume_trainer
from ultrathink.recipes.train import build_trainer, trainer_at_start
from ultrathink.runs.lock import RunLock

Load = Callable[..., Config]
SMALL = (
    "data.seq_len=32",
    "data.train=[{type: dummy, num_documents: 60, num_words: 40}]",
    "training.batch_size=4",
    "training.log_every=1",
    "training.sample.prompts=[the]",
    "training.sample.max_new_tokens=4",
    "monitoring.sinks=[jsonl]",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Qwen2 with stretched positions, as ``transformers`` saves it."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}
    save_theirs(tmp_path / "theirs", "qwen2", rope_parameters=rope)
    return tmp_path / "theirs"


@pytest.fixture
def load(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a configuration that begins with it, by default the debug preset."""
    monkeypatch.setenv("ULTRATHINK_CACHE", str(tmp_path / "cache"))

    def load(*overrides: str, source: str | Path = "debug") -> Config:
        places = (f"run.dir={tmp_path / 'runs'}", f"training.init_from=hf:{folder}")
        return load_config(source, [*SMALL, *places, *overrides])

    return load


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_training_continues_from_the_weights_and_they_go_back(
    load: Load, folder: Path, request: pytest.FixtureRequest, family: str
) -> None:
    if family == "mixtral":
        request.getfixturevalue("mixtral")
    theirs, _ = load_pretrained(f"hf:{folder}")
    trainer = build_trainer(load("training.max_steps=5"))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for name, tensor in theirs.named_parameters():
        assert torch.equal(before[name], tensor), name
    assert trainer.fit().name == "finished"
    model, tokenizer = load_model(trainer.run.path, "last")
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.encode("the fox") == small_bpe().encode("the fox")
    params = SamplingParams(max_new_tokens=4, temperature=0.0)
    assert Engine(model, tokenizer).generate("the fox", params).new_tokens > 0
    after = model.state_dict()
    for name, _ in model.named_parameters():  # biases too
        assert not torch.equal(after[name], before[name]), name
    done = export_run(str(trainer.run.path), "last")
    assert (done.model_type, done.remarks) == (family, ())
    again, _ = load_pretrained(f"hf:{done.folder}")
    for name, tensor in again.named_parameters():
        assert torch.equal(after[name], tensor), name
    scaling = theirs.config.rope_scaling
    assert model.config.rope_scaling == again.config.rope_scaling == scaling
    assert (scaling is None) == (family == "mixtral")


def test_the_run_says_what_it_took_on_and_needs_the_folder_only_to_begin(
    load: Load, folder: Path
) -> None:
    trainer = build_trainer(load("training.max_steps=2"))
    run, config = trainer.run, trainer.run.read_config()
    assert config.model.qkv_bias
    assert (config.model.hidden_size, config.model.max_positions) == (48, 256)
    assert config.tokenizer.model_dump() == {"type": "hf", "vocab_size": 300}
    for key in ("model.hidden_size", "model.rope_scaling.factor", "tokenizer.type"):
        assert config.origin(key) == f"from the weights hf:{folder}", key
    assert config.origin("tokenizer.vocab_size") == config.origin("tokenizer.type")
    with pytest.raises(ConfigError, match=r"comes with them: set training\.init_from=hf:"):
        build_trainer(load_config(run.path, ["training.init_from=null"]))
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert trainer.lock is not None
    trainer.lock.release()  # it ended before its first checkpoint
    again = trainer_at_start(config, run, RunLock.acquire(run))
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    assert again.config == trainer.config
    again.fit()
    folder.rename(folder.with_name("moved"))
    assert shown_with_pretrained(config) == config
    assert resume_trainer(run, overrides=["training.max_steps=4"]).fit().name == "finished"


def test_weights_that_cannot_be_used_are_refused(load: Load, folder: Path, tmp_path: Path) -> None:
    newer, _ = adopt_pretrained(load())
    to_older_layout(folder)
    assert adopt_pretrained(load())[0] == newer
    change_config(folder, use_sliding_window=True, sliding_window=16, layer_types=None)
    with pytest.raises(CheckpointError, match=r"data\.seq_len=16 or less"):
        build_trainer(load())
    run = make_random_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config\.json\. A run of ultrathink is"):
        build_trainer(load(f"training.init_from=hf:{run.path}"))
    for source in ("null", "runs/some"):
        with pytest.raises(ConfigError, match=r"model\.moe\.groups"):
            load("model.moe.balance.load=0.02", f"training.init_from={source}")


def test_what_a_preset_says_of_the_model_gives_way(load: Load) -> None:
    shown = shown_with_pretrained(load(source="demo"))
    assert (shown.model.hidden_size, shown.model.qk_norm) == (48, False)
    assert shown.tokenizer.type == "hf"
    assert shown.training.optimizer == load(source="demo").training.optimizer


def test_what_the_user_says_of_the_model_must_agree(
    load: Load, tmp_path: Path, folder: Path
) -> None:
    config, _ = adopt_pretrained(load("model.hidden_size=48", "model.dropout=0.1"))
    assert config.model.dropout == 0.1, "no value of the shape"
    assert config.origin("model.dropout") == "override model.dropout=0.1"
    with pytest.raises(ConfigError) as caught:
        adopt_pretrained(load("model.hidden_size=64", "model.num_layers=3", "tokenizer=byte"))
    message = str(caught.value)
    assert f"training.init_from=hf:{folder} is another model" in message
    assert "model.hidden_size is 64 (override model.hidden_size=64), the checkpoint's 48" in message
    assert "model.num_layers is 3 (override model.num_layers=3), the checkpoint's 2" in message
    assert "tokenizer is byte (override tokenizer=byte), the checkpoint has its own" in message
    assert "Remove these keys" in message
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: {hidden_size: 48, rope_theta: 10000.0, rope_scaling: null}\n"
        "training: {max_steps: 3}\n"
    )
    with pytest.raises(ConfigError) as caught:
        adopt_pretrained(load(source=file))
    message = str(caught.value)
    assert f"model.rope_theta is 10000.0 (file {file}), the checkpoint's 50000.0" in message
    assert f"model.rope_scaling is None (file {file})" in message, "a null is no wish"
    assert "hidden_size" not in message


def test_positions_may_be_stretched(load: Load) -> None:
    yarn = "model.rope_scaling={type: yarn, factor: 4, original_max_positions: 256}"
    trainer = build_trainer(load(yarn, "model.rope_theta=100000", "training.max_steps=1"))
    model = trainer.model.config
    assert model.rope_scaling is not None
    assert (model.rope_scaling.type, model.rope_theta) == ("yarn", 100_000)
    assert model.max_positions is None
    trainer.fit()
    done = export_run(str(trainer.run.path))
    again, _ = load_pretrained(f"hf:{done.folder}")
    assert again.config.rope_scaling == model.rope_scaling
    assert again.config.max_positions == 1024
    config, _ = adopt_pretrained(load(yarn, "model.max_positions=512"))
    assert config.model.max_positions == 512


# -- experts ---------------------------------------------------------------------------------------


@pytest.fixture
def mixtral(folder: Path) -> Path:
    """A tiny Mixtral in place of the Qwen2."""
    shutil.rmtree(folder)
    save_theirs(folder, "mixtral", num_local_experts=4)
    return folder


def test_how_experts_are_trained_stays_the_users(load: Load, mixtral: Path) -> None:
    config, _ = adopt_pretrained(
        load(
            "model.moe.balance.load=0.02", "model.moe.routing.jitter=0.1", "model.moe.backend=loop"
        )
    )
    moe = config.model.moe
    assert moe is not None
    assert (moe.balance.load, moe.routing.jitter, moe.backend) == (0.02, 0.1, "loop")
    assert [(group.name, group.num_experts, group.top_k) for group in moe.groups] == [
        ("experts", 4, 2)
    ]
    assert (moe.intermediate_size, moe.layers, moe.score) == (64, "all", "softmax")
    assert (moe.routing.warmup_steps, moe.balance.bias_rate) == (0, 0.0)
    for key in ("groups", "intermediate_size", "routing.warmup_steps", "balance.bias_rate"):
        assert config.origin(f"model.moe.{key}") == f"from the weights hf:{mixtral}", key
    assert config.origin("model.moe.balance.load") == "override model.moe.balance.load=0.02"
    plain, pretrained = adopt_pretrained(load())
    assert plain.model.moe == pretrained.model.moe
    assert shown_with_pretrained(plain) == plain
    config, _ = adopt_pretrained(
        load("model.moe.balance.bias_rate=0.002", "model.moe.routing.warmup_steps=5")
    )
    assert config.model.moe is not None
    assert config.model.moe.balance.bias_rate == 0.002
    assert config.model.moe.routing.warmup_steps == 5


def test_groups_of_the_user_have_their_names_and_their_room(load: Load, mixtral: Path) -> None:
    groups = "{name: mine, num_experts: 4, top_k: 2, max_experts: 6}"
    trainer = build_trainer(load(f"model.moe.groups=[{groups}]", "training.max_steps=1"))
    theirs, _ = load_pretrained(f"hf:{mixtral}")
    layer, plain = (model.expert_layers()[1] for model in (trainer.model, theirs))
    assert layer.router.config.groups[0].name == "mine"
    assert layer.router.active.tolist() == [True] * 4 + [False] * 2
    assert torch.equal(layer.experts.down[:4], plain.experts.down)
    assert not layer.experts.down[4:].any()
    ids = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = trainer.model.eval()(ids).logits
        torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_other_experts_than_the_checkpoints_are_refused(load: Load, mixtral: Path) -> None:
    groups = "model.moe.groups=[{name: a, num_experts: 4, top_k: 1}]"
    with pytest.raises(ConfigError) as caught:
        adopt_pretrained(load(groups, "model.moe.shared_size=16", "model.moe.score=softmax"))
    message = str(caught.value)
    assert f"training.init_from=hf:{mixtral} is another model" in message
    assert f"model.moe.groups is 4 top-1 (override {groups}), the checkpoint's 4 top-2" in message
    assert "model.moe.shared_size is 16 (override model.moe.shared_size=16), the" in message
    assert "score" not in message
    with pytest.raises(
        ConfigError, match=r"model\.moe is null \(override .*checkpoint has experts"
    ):
        adopt_pretrained(load("model.moe=null"))


def test_experts_for_a_checkpoint_that_has_none(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        adopt_pretrained(load("model.moe.balance.load=0.02"))
    assert "model.moe is set (override model.moe.balance.load=0.02), the" in str(caught.value)
    assert "checkpoint has no experts" in str(caught.value)
    adopt_pretrained(load("model.moe=null"))
    config = load("model.moe.groups=[{name: a, num_experts: 4, top_k: 1}]")
    preset = config.with_origins({"model.moe.groups.0.name": "preset some"})
    adopted, _ = adopt_pretrained(preset)
    assert adopted.model.moe is None, "what a preset says gives way"
    assert build_model(adopted).routing is None
