"""``ultrathink config``: what it prints, and for whom."""

import json
from pathlib import Path

import pytest
import yaml

from ultrathink.cli.main import main
from ultrathink.config import Config, docs, load_config

Out = pytest.CaptureFixture[str]


def fails(capsys: Out, *argv: str) -> str:
    assert main(["config", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_show_prints_yaml_that_can_be_used_again(
    capsys: Out, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["config", "show", "debug", "training.batch_size=4"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["training"]["batch_size"] == 4
    monkeypatch.chdir(tmp_path)
    Path("again.yaml").write_text(text)
    assert main(["config", "show", "again.yaml"]) == 0
    assert capsys.readouterr().out == text


def test_without_a_configuration_the_preset_demo_is_meant(capsys: Out) -> None:
    main(["config", "show", "training.batch_size=4"])
    shown = capsys.readouterr().out
    assert shown == docs.to_yaml(load_config("demo", ["training.batch_size=4"]))


def test_show_why(capsys: Out) -> None:
    main(["config", "show", "training.batch_size=4", "--why"])
    rows = dict(line.split("  # ") for line in capsys.readouterr().out.splitlines())
    origins = {row.partition(":")[0]: origin for row, origin in rows.items()}
    assert origins["training.batch_size"] == "override training.batch_size=4"
    assert origins["model.num_layers"] == "preset demo"
    assert origins["run.seed"] == "default"


def test_show_json(capsys: Out) -> None:
    main(["config", "show", "demo", "--json"])
    config = load_config("demo")
    assert json.loads(capsys.readouterr().out) == config.model_dump(mode="json")
    main(["config", "show", "demo", "--json", "--why"])
    reasons = json.loads(capsys.readouterr().out)
    assert reasons["model.num_layers"] == {"value": 4, "origin": "preset demo"}


SMALL = [
    "debug",
    "model={hidden_size: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2, intermediate_size: 176}",
    "tokenizer=byte",
    "data.seq_len=64",
    "training.batch_size=8",
]


def test_check_sums_up(capsys: Out) -> None:
    assert main(["config", "check", *SMALL, "training.max_steps=1_000"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "debug: fine",
        "  model   108,928 parameters (2 layers of 64, 257 tokens)",
        "  step    512 tokens (8 sequences of 64)",
        "  length  1,000 steps (512,000 tokens)",
    ]
    main(["config", "check", *SMALL, "training.max_steps=20", "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "config": "debug",
        "parameters": 108_928,
        "active_parameters": 108_928,
        "tokens_per_step": 512,
        "max_steps": 20,
    }


def test_check_tells_how_many_parameters_a_token_meets(capsys: Out) -> None:
    """A layer of 4 experts of width 8 has 4 * 64 more for its router, and a token meets 2."""
    groups = "model.moe={groups: [{name: experts, num_experts: 4, top_k: 2}], intermediate_size: 8}"
    main(["config", "check", *SMALL, groups, "training.max_steps=1"])
    shared = 108_928 - 2 * 3 * 64 * 176
    expert, routers = 3 * 64 * 8, 2 * 4 * 64
    total, active = (shared + routers + 2 * number * expert for number in (4, 2))
    told = f"  model   {total:,} parameters, {active:,} active (2 layers of 64, 257 tokens)"
    assert capsys.readouterr().out.splitlines()[1] == told


@pytest.mark.parametrize(
    ("length", "words"),
    [
        ("max_tokens=5000", "5,000 tokens (10 steps)"),
        ("max_minutes=2.5", "2.5 minutes; the number of steps depends on the machine"),
        ("epochs=2", "2 passes over the data"),
    ],
)
def test_check_tells_the_length_in_words(length: str, words: str, capsys: Out) -> None:
    main(["config", "check", *SMALL, f"training.{length}"])
    assert capsys.readouterr().out.splitlines()[-1] == f"  length  {words}"


def test_check_of_a_wrong_configuration_says_what_is_wrong(capsys: Out) -> None:
    err = fails(capsys, "check", "demo", "model.num_layers=x", "run.nam=1")
    assert err.startswith("error: ")
    assert "model.num_layers = 'x' (override): should be a whole number." in err
    assert "\n       " in err
    assert len(err.splitlines()) == 2


def test_docs_and_schema_are_about_all_configurations(capsys: Out) -> None:
    assert main(["config", "docs"]) == 0
    assert capsys.readouterr().out == docs.markdown(Config)
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == docs.json_schema(Config)
    assert "takes none, not 'demo'" in fails(capsys, "schema", "demo")
    assert "prints Markdown" in fails(capsys, "docs", "--json")


def test_it_says_what_it_can_do(capsys: Out) -> None:
    assert "say what to do: config show | check | docs | schema" in fails(capsys)
    assert "not 'shw'. Did you mean 'show'?" in fails(capsys, "shw")
    assert "--why goes with 'config show', not with 'config check'" in fails(
        capsys, "check", "--why"
    )


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


def test_a_part_of_the_users_own_is_an_option_like_any_other(capsys: Out, tmp_path: Path) -> None:
    plugin = tmp_path / "my_parts.py"
    plugin.write_text(PLUGIN)
    assert "no optimizer called 'sgd'" in fails(capsys, "show", "training.optimizer=sgd")
    argv = ["training.optimizer=sgd", "--plugin", str(plugin), "--json"]
    assert main(["config", "show", *argv]) == 0
    shown = json.loads(capsys.readouterr().out)["training"]["optimizer"]
    assert shown == {"type": "sgd", "lr": 0.25, "weight_decay": 0.1}
    assert "Plain gradient descent." in docs.markdown(Config)
    assert "sgd" in json.dumps(docs.json_schema(Config))


def test_a_part_without_options_is_the_mistake_of_its_author(capsys: Out, tmp_path: Path) -> None:
    plugin = tmp_path / "my_parts_2.py"
    plugin.write_text(PLUGIN.replace(", options=SgdConfig", ""))
    err = fails(capsys, "show", "training.optimizer=sgd", "--plugin", str(plugin))
    assert "optimizer 'sgd' was registered without a class for its options" in err


def test_a_plugin_that_is_not_there(capsys: Out) -> None:
    assert "--plugin nowhere.py: there is no such file." in fails(
        capsys, "show", "--plugin", "nowhere.py"
    )
