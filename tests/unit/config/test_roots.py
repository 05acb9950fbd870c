"""A root of another kind of job is one class, and all that training's has works for it."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from pydantic import Field

from ultrathink.config import docs, load_config
from ultrathink.config.base import Section
from ultrathink.config.data import DataConfig
from ultrathink.config.loading import change_config, preset_names
from ultrathink.config.root import Root
from ultrathink.config.run import RunConfig
from ultrathink.core.errors import ConfigError


class ScoringConfig(Section):
    """How scores are taken."""

    batch_size: int = Field(16, gt=0)
    """Sequences at once."""


class ScoringRoot(Root):
    """Every option of a job that only scores."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    scoring: ScoringConfig = ScoringConfig()

    def derived(self, name: str) -> "ScoringRoot":
        return self.replace({"run.name": name}, origin="derived from the config's name")


def test_values_overrides_and_origins(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("scoring: {batch_size: 4}\ndata: {seq_len: 64, train: [dummy]}\n")
    config = load_config(file, ["data.seq_len=32", "data.train.0.seed=3"], ScoringRoot)
    assert isinstance(config, ScoringRoot)
    assert (config.scoring.batch_size, config.data.seq_len, config.run.name) == (4, 32, "mine")
    assert config.origin("scoring.batch_size") == f"file {file}"
    assert config.origin("data.seq_len") == "override data.seq_len=32"
    changed = change_config(config, ["scoring.batch_size=2"])
    assert changed.scoring.batch_size == 2
    file.write_text(docs.to_yaml(changed))
    assert load_config(file, (), ScoringRoot) == changed != config
    assert config != load_config("debug")


def test_without_a_source_the_defaults_hold_and_presets_are_of_their_root() -> None:
    assert load_config(None, (), ScoringRoot).scoring == ScoringConfig()
    assert preset_names(ScoringRoot) == []
    with pytest.raises(ConfigError, match="there is no preset 'demo'"):
        load_config("demo", (), ScoringRoot)


MISTAKES = {
    "training.max_steps=3": "training .*: there is no such key. Known keys: run, data, sco",
    "batch_size=3": r"Write scoring\.batch_size=3\.",
    "scoring.batch_size=0": r"batch_size = 0 \(override\): .* greater than 0. \(Sequences at once",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_are_answered_with_its_own_keys(override: str) -> None:
    with pytest.raises(ConfigError, match=MISTAKES[override]):
        load_config(None, [override], ScoringRoot)


def test_reference_and_schema() -> None:
    page = docs.markdown(ScoringRoot)
    for key in ("scoring.batch_size", "data.seq_len", "training.batch_size"):
        assert (f"`{key}`" in page) == (not key.startswith("training"))
    schema = json.loads(json.dumps(docs.json_schema(ScoringRoot)))
    assert set(schema["properties"]) == {"run", "data", "scoring"}
    config = load_config(None, (), ScoringRoot)
    Draft202012Validator(schema).validate(config.model_dump(mode="json"))
