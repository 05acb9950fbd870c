"""The reference, the schema for editors, and the estimate of a model's size."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import ultrathink.config
from ultrathink.config import Config, docs, load_config, preset_names
from ultrathink.config.base import PartConfig
from ultrathink.config.reflection import all_fields, field_at, options_of, sections_of
from ultrathink.config.size import sizes

ROOT = Path(__file__).parents[3]
PRESETS = Path(ultrathink.config.__file__).parent / "presets"


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads(json.dumps(docs.json_schema(Config), allow_nan=False))


def test_the_reference_in_the_repository_is_current() -> None:
    kept = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert kept == docs.markdown(Config), "run: ultrathink config docs > docs/configuration.md"


def test_every_option_is_described_and_says_what_resuming_does(schema: dict[str, Any]) -> None:
    page = docs.markdown(Config).splitlines()
    rows = {row.split("`")[1]: row for row in page if row.startswith("| `")}
    assert {row.replace("\\|", "").count("|") for row in rows.values()} == {6}
    rules = options_of(Config)
    described = json.dumps(schema)
    for key in all_fields(Config):
        found = field_at(Config, key.split("."), None)
        assert found is not None
        section, field = found
        if key.endswith(".type") and issubclass(section, PartConfig):
            continue
        assert field.description, f"{key} has no description"
        shown = key.replace("data.train.", "data.train.N.").replace("data.val.", "data.train.N.")
        if key.startswith("training.evaluators.source."):  # of the types of data.train
            continue
        for listed in ("moe.groups.", "model.paths.", "training.evaluators."):
            shown = shown.replace(listed, f"{listed}N.")
        if sections_of(field) and key not in rules:
            assert any(other.startswith(f"{key}.") for other in rules), key
            assert any(line.endswith(f"# `{shown}`") for line in page), key
            continue
        assert key in rules, f"{key}: declare it with felt, free or fixed"
        rule = rules[key]
        assert bool(rule.because) == (rule.rule == "fixed"), key
        assert set(rule.rests_on) <= rules.keys(), key
        assert shown not in rows or f"| {rule.rule} |" in rows[shown], key
        assert shown in rows or sections_of(field), key
        assert f'"description": {json.dumps(field.description)}' in described, key
    assert described.count('"x-resume"') >= len(rows)


def test_markdown_of_its_own_is_escaped() -> None:
    assert docs._cell("a | b * c <d> 1 < 2 `e * f`") == "a \\| b \\* c &lt;d> 1 < 2 `e * f`"


def test_the_schema_is_a_schema(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("name", preset_names())
def test_presets_fit_the_schema_as_written_and_as_resolved(
    name: str, schema: dict[str, Any]
) -> None:
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8")))
    validator.validate(yaml.safe_load(docs.to_yaml(load_config(name))))


@pytest.mark.parametrize(
    "wrong",
    [
        {"training": {"max_stepz": 3}},
        {"training": {"max_steps": 0}},
        {"training": {"optimizer": {"type": "adamw", "momentum": 0.9}}},
        {"training": {"optimizer": "admw"}},
        {"data": {"train": [{"type": "text"}]}, "training": {}},
        {"modle": {}, "training": {}},
    ],
)
def test_the_schema_refuses_what_the_program_refuses(
    wrong: dict[str, Any], schema: dict[str, Any]
) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema, cls=jsonschema.Draft202012Validator)


def test_why_stands_beside_every_value() -> None:
    config = load_config("demo", ["training.batch_size=3"])
    lines = docs.to_yaml(config, why=True).splitlines()
    shown = [line for line in lines if line.startswith("training.batch_size: 3  ")]
    assert [line.partition("  # ")[2] for line in shown] == ["override training.batch_size=3"]
    assert len(lines) == len(docs.flatten(config.model_dump(mode="json")))
    assert all("  # " in line for line in lines)
    columns = [line.index("  # ") for line in lines if len(line.partition("  # ")[0]) < 57]
    assert len(set(columns)) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.tie_embeddings=false", "model.qk_norm=false"],
        ["model.feed_forward=relu2", "model.num_kv_heads=1", "model.head_dim=24"],
        ["model.qkv_bias=true", "model.num_kv_heads=1", "model.head_dim=24"],
    ],
)
def test_the_estimated_size_is_the_size_of_the_model(overrides: list[str]) -> None:
    from ultrathink import build_model

    config = load_config("demo", ["model.num_layers=2", "tokenizer.vocab_size=300", *overrides])
    model = build_model(config)
    assert sizes(config.model).total == sum(p.numel() for p in model.parameters())
