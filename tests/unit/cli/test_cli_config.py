"""``ultrathink config``: what it prints, and for whom."""

import json
from pathlib import Path

import yaml

from tests.unit.cli.conftest import Say
from ultrathink.config import Config, docs, load_config


def test_show_prints_yaml_that_can_be_used_again(place: Path, say: Say) -> None:
    text = say("config", "show", "debug", "training.batch_size=4")
    assert yaml.safe_load(text)["training"]["batch_size"] == 4
    Path("again.yaml").write_text(text)
    assert say("config", "show", "again.yaml") == text


def test_show_json(say: Say) -> None:
    tree = json.loads(say("config", "show", "--json"))
    assert tree == load_config("demo").model_dump(mode="json")
    reasons = json.loads(say("config", "show", "demo", "--json", "--why"))
    assert reasons["model.num_layers"] == {"value": 4, "origin": "preset demo"}


SMALL = [
    "debug",
    "model={hidden_size: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2, intermediate_size: 176}",
    "tokenizer=byte",
    "data.seq_len=64",
    "training.batch_size=8",
]


def test_check_sums_up(say: Say) -> None:
    assert say("config", "check", *SMALL, "training.max_steps=1_000").splitlines() == [
        "debug: fine",
        "  model   108,928 parameters (2 layers of 64, 257 tokens)",
        "  step    512 tokens (8 sequences of 64)",
        "  length  1,000 steps (512,000 tokens)",
    ]
    assert json.loads(say("config", "check", *SMALL, "training.max_steps=20", "--json")) == {
        "config": "debug",
        "parameters": 108_928,
        "active_parameters": 108_928,
        "tokens_per_step": 512,
        "max_steps": 20,
    }
    for length, words in LENGTHS.items():
        said = say("config", "check", *SMALL, f"training.{length}")
        assert said.splitlines()[-1] == f"  length  {words}"


LENGTHS = {
    "max_tokens=5000": "5,000 tokens (10 steps)",
    "max_minutes=2.5": "2.5 minutes; the number of steps depends on the machine",
    "epochs=2": "2 passes over the data",
}


def test_check_counts_how_many_parameters_a_token_meets(say: Say) -> None:
    """A layer of 4 experts of width 8 has 4 * 64 more for its router, and a token meets 2."""
    groups = "model.moe={groups: [{name: experts, num_experts: 4, top_k: 2}], intermediate_size: 8}"
    said = say("config", "check", *SMALL, groups, "training.max_steps=1")
    shared = 108_928 - 2 * 3 * 64 * 176
    expert, routers = 3 * 64 * 8, 2 * 4 * 64
    total, active = (shared + routers + 2 * number * expert for number in (4, 2))
    line = f"  model   {total:,} parameters, {active:,} active (2 layers of 64, 257 tokens)"
    assert said.splitlines()[1] == line


def test_check_finds_what_training_would_refuse_all_at_once(place: Path, say: Say) -> None:
    Path("books").mkdir()
    Path("books/a.txt").write_text("Call me Ishmael.")
    Path("lines.jsonl").write_text('{"txt": "a"}\n')
    assert "fine" in say("config", "check", "debug", "data.train=books/")
    said = say("config", "check", "debug", "data={train: [books/*.md, lines.jsonl]}", status=2)
    assert said.splitlines() == [
        f"error: data source 'text': path 'books/*.md' matches no file (searched from {place}).",
        f"       {place}/lines.jsonl, line 1: there is no field 'text' (keys: txt; did you mean "
        f"`field: txt`?). Correct the line, or leave such lines out with `on_bad: skip`.",
    ]


def test_docs_and_schema_are_about_all_configurations(say: Say) -> None:
    assert say("config", "docs") == docs.markdown(Config)
    assert json.loads(say("config", "schema")) == docs.json_schema(Config)


PLUGIN = """
from typing import Literal
from ultrathink.config.optimizer import OPTIMIZERS, OptimizerConfig

class SgdConfig(OptimizerConfig):
    '''Plain gradient descent.'''
    type: Literal["sgd"] = "sgd"
    lr: float = 0.25

@OPTIMIZERS.register("sgd", options=SgdConfig)
def build_sgd(*args):
    raise NotImplementedError
"""


def test_a_part_of_the_users_own_is_an_option_like_any_other(place: Path, say: Say) -> None:
    Path("my_parts.py").write_text(PLUGIN)
    words = ("config", "show", "training.optimizer=sgd")
    assert "no optimizer called 'sgd'" in say(*words, status=2)
    shown = json.loads(say(*words, "--plugin", "my_parts.py", "--json"))
    assert shown["training"]["optimizer"] == {"type": "sgd", "lr": 0.25, "weight_decay": 0.1}
    assert "Plain gradient descent." in docs.markdown(Config)
    assert "sgd" in json.dumps(docs.json_schema(Config))


def test_a_part_without_options_is_the_mistake_of_its_author(place: Path, say: Say) -> None:
    Path("my_parts_2.py").write_text(PLUGIN.replace(", options=SgdConfig", ""))
    err = say("config", "show", "training.optimizer=sgd", "--plugin", "my_parts_2.py", status=2)
    assert "optimizer 'sgd' was registered without a class for its options" in err
