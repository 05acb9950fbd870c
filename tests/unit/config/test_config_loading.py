"""Where values come from: defaults, preset or file, overrides; and what is recorded of it."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ultrathink.config import Config, load_config, preset_names
from ultrathink.config.docs import to_yaml
from ultrathink.config.loading import CONFIG_FILE, ORIGINS_FILE, change_config
from ultrathink.config.optimizer import AdamWConfig, MuonConfig
from ultrathink.config.overrides import Draft
from ultrathink.core.errors import ConfigError


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_default_is_the_preset_demo() -> None:
    assert load_config() == load_config("demo")
    assert load_config().run.name == "demo"


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_complete_and_survives_its_own_yaml(name: str, in_folder: Path) -> None:
    config = load_config(name)
    write(in_folder / "again.yaml", to_yaml(config))
    assert load_config("again.yaml") == config
    for size in ("num_kv_heads", "head_dim", "intermediate_size", "vocab_size"):
        assert getattr(config.model, size) is not None


def test_values_override_each_other_in_order(in_folder: Path) -> None:
    write(
        in_folder / "my.yaml",
        "training: {max_steps: 7, batch_size: 4}\nmodel: {num_layers: 3}\n",
    )
    config = load_config("my.yaml", ["training.batch_size=2", "training.batch_size=6"])
    assert config.training.batch_size == 6
    assert config.training.max_steps == 7
    assert config.model.num_layers == 3
    assert config.model.hidden_size == 256
    assert config.run.name == "my"


def test_each_value_knows_its_origin(in_folder: Path) -> None:
    write(in_folder / "my.yaml", "training: {max_steps: 7}\ntokenizer: byte\n")
    config = load_config("my.yaml", ["model.num_layers=2", "training.schedule={type: wsd}"])
    assert config.origin("training.max_steps") == "file my.yaml"
    assert config.origin("tokenizer.type") == "file my.yaml"
    assert config.origin("model.num_layers") == "override model.num_layers=2"
    assert config.origin("training.schedule.type") == "override training.schedule={type: wsd}"
    assert config.origin("training.schedule.warmup") == "default"
    assert config.origin("model.vocab_size") == "derived from the tokenizer"
    assert config.origin("model.head_dim") == "derived from hidden_size / num_heads"
    assert config.origin("run.name") == "derived from the config's name"
    assert config.origin("run.seed") == "default"


def test_a_run_folder_is_a_configuration(in_folder: Path) -> None:
    config = load_config("debug", ["run.name=first", "training.batch_size=2"])
    run = in_folder / "first"
    run.mkdir()
    write(run / CONFIG_FILE, to_yaml(config))
    assert load_config(run) == config
    assert load_config("first", ["training.batch_size=4"]).training.batch_size == 4
    write(run / ORIGINS_FILE, yaml.safe_dump(config.origins))
    again = load_config("first")
    assert again == config
    assert again.origins == config.origins


def test_what_overrode_a_run_before_is_overridden_like_any_value(in_folder: Path) -> None:
    run = in_folder / "first"
    run.mkdir()
    config = load_config("debug", ["training.max_minutes=2", "training.optimizer.lr=0.5"])
    write(run / CONFIG_FILE, to_yaml(config))
    write(run / ORIGINS_FILE, yaml.safe_dump(config.origins))
    again = load_config("first", ["training.max_steps=7", "training.optimizer=muon"])
    assert (again.training.max_steps, again.training.max_minutes) == (7, None)
    assert again.training.optimizer == MuonConfig()
    changed = load_config("first", ["training.optimizer.type=muon"])
    assert changed.training.optimizer == MuonConfig()


def test_a_folder_does_not_hide_the_preset_of_its_name(in_folder: Path) -> None:
    (in_folder / "demo").mkdir()
    assert load_config("demo").training.max_minutes == 5


def test_a_mapping_changes_the_keys_it_names_and_no_others() -> None:
    config = load_config("demo", ["training.optimizer={lr: 0.5}", "model={num_layers: 2}"])
    before = load_config("demo")
    assert config.training.optimizer == before.training.optimizer.model_copy(update={"lr": 0.5})
    assert config.model == before.model.model_copy(update={"num_layers": 2})


def test_a_list_is_replaced_and_its_items_can_be_changed() -> None:
    config = load_config(
        "debug",
        [
            "data.train=[{type: dummy, name: a}, {type: stdlib}]",
            "data.train.1.weight=3",
            "data.train.0.seed=5",
        ],
    )
    first, second = config.data.train
    assert (first.name, first.weight, second.weight) == ("a", 1, 3)
    assert first.model_dump()["seed"] == 5
    assert config.origin("data.train.1.weight") == "override data.train.1.weight=3"


@pytest.mark.parametrize("override", ["training.optimizer.type=adamw", "training.optimizer=adamw"])
def test_another_type_starts_from_its_own_defaults(override: str) -> None:
    config = load_config("demo", [override])
    assert config.training.optimizer == AdamWConfig()
    assert config.origin("training.optimizer.type") == f"override {override}"
    assert config.origin("training.optimizer.lr") == "default"


def test_the_same_type_again_changes_nothing() -> None:
    assert load_config("demo", ["training.optimizer.type=muon"]) == load_config("demo")


@pytest.mark.parametrize("reverse", [False, True])
def test_an_override_outlives_a_change_of_type_whatever_their_order(reverse: bool) -> None:
    overrides = ["training.optimizer.lr=0.5", "training.optimizer.type=adamw"]
    config = load_config("demo", overrides[::-1] if reverse else overrides)
    assert config.training.optimizer == AdamWConfig(lr=0.5)
    assert config.origin("training.optimizer.lr") == "override training.optimizer.lr=0.5"


def test_the_short_form_of_a_part_can_be_changed_further(in_folder: Path) -> None:
    write(in_folder / "my.yaml", "training: {max_steps: 7, optimizer: muon}\n")
    config = load_config("my.yaml", ["training.optimizer.momentum=0.5"])
    assert config.training.optimizer == MuonConfig(momentum=0.5)
    assert config.origin("training.optimizer.type") == "file my.yaml"


def test_a_part_without_a_type_is_of_the_default_type(in_folder: Path) -> None:
    write(in_folder / "my.yaml", "training: {max_steps: 7, optimizer: {lr: 0.5}}\n")
    assert load_config("my.yaml").training.optimizer == AdamWConfig(lr=0.5)


def test_a_section_without_keys_has_its_defaults(in_folder: Path) -> None:
    write(in_folder / "my.yaml", "model:\n#  num_layers: 3\ntraining:\n  max_steps: 7\n")
    assert load_config("my.yaml").model.num_layers == 4


@pytest.mark.parametrize(
    "length", ["max_steps=3", "max_tokens=4096", "epochs=0.5", "max_minutes=1"]
)
def test_a_length_replaces_the_one_of_the_preset(length: str) -> None:
    config = load_config("demo", [f"training.{length}"])
    name = length.partition("=")[0]
    given = {
        budget: value
        for budget in ("max_steps", "max_tokens", "max_minutes", "epochs")
        if (value := getattr(config.training, budget)) is not None
    }
    assert list(given) == [name]
    assert config.origin("training.max_minutes").startswith(
        "override" if name == "max_minutes" else "default"
    )


def test_a_new_length_forgets_the_steps_that_the_old_one_came_to(in_folder: Path) -> None:
    write(in_folder / "my.yaml", "training: {max_minutes: 5, step_budget: 900}\n")
    assert load_config("my.yaml").training.step_budget == 900
    assert load_config("my.yaml", ["training.max_minutes=1"]).training.step_budget is None
    assert load_config("my.yaml", ["training.step_budget=5"]).training.max_minutes == 5


def test_null_lengths_replace_nothing() -> None:
    assert load_config("demo", ["training.max_steps=null"]) == load_config("demo")


def test_numbers_with_an_exponent_are_numbers_and_dates_are_text() -> None:
    config = load_config(
        "demo", ["training.optimizer.lr=1e-3", "training.max_tokens=2e6", "run.name=2024-01-01"]
    )
    assert config.training.optimizer.lr == 0.001
    assert config.training.max_tokens == 2_000_000
    assert config.run.name == "2024-01-01"


def test_off_and_false_mean_the_mode_none() -> None:
    for word in ("off", "false", "none"):
        config = load_config("demo", [f"training.activation_checkpointing={word}"])
        assert config.training.activation_checkpointing == "none"
    assert load_config("demo", ["orchestrator.mode=off"]).orchestrator.mode == "off"


def test_a_configuration_never_changes() -> None:
    config = load_config("demo")
    with pytest.raises(ValidationError, match="frozen"):
        config.model.num_layers = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.run = config.run  # type: ignore[misc]


def test_replace_gives_a_checked_copy_with_the_origin() -> None:
    config = load_config("demo")
    changed = config.replace({"training.precision": "fp32"}, origin="chosen at run time: cpu")
    assert changed.training.precision == "fp32"
    assert config.training.precision == "auto"
    assert changed.origin("training.precision") == "chosen at run time: cpu"
    assert changed.origin("run.name") == config.origin("run.name")
    with pytest.raises(ValidationError):
        config.replace({"training.batch_size": -1}, origin="nowhere")


def test_a_draft_leaves_nothing_of_what_it_replaces() -> None:
    draft = Draft({"a": {"b": 1, "c": {"d": 2}}}, {"a.b": "file", "a.c.d": "file"})
    draft.override("a.c=3")
    assert draft.tree == {"a": {"b": 1, "c": 3}}
    assert draft.origins == {"a.b": "file", "a.c": "override a.c=3"}


# -- changing a resolved configuration ------------------------------------------------------------


def resolved() -> Config:
    config = load_config("debug", ["training.max_tokens=4096"])
    chosen = {
        "training.micro_batch_size": 4,
        "training.precision": "fp32",
        "training.device": "cpu",
        "model.attention.backend": "sdpa",
        "training.step_budget": 100,
    }
    return config.replace(chosen, origin="chosen at run time: test")


def test_a_change_opens_the_choices_that_rest_on_it_and_no_others() -> None:
    changed = change_config(resolved(), ["training.batch_size=6"])
    assert changed.training.batch_size == 6
    assert changed.training.micro_batch_size == "auto"
    assert changed.training.step_budget is None  # the tokens come to other steps
    assert (changed.training.precision, changed.model.attention.backend) == ("fp32", "sdpa")
    assert changed.origin("training.batch_size") == "override training.batch_size=6"
    other = change_config(resolved(), ["training.precision=bf16"])
    assert (other.training.precision, other.model.attention.backend) == ("bf16", "auto")
    assert other.training.step_budget == 100


def test_a_change_leaves_what_was_configured() -> None:
    config = resolved().replace({"training.micro_batch_size": 2}, origin="file my.yaml")
    changed = change_config(config, ["training.batch_size=6"])
    assert changed.training.micro_batch_size == 2
    with pytest.raises(ConfigError, match=r"batch_size \(5\) must be a multiple"):
        change_config(config, ["training.batch_size=5"])
    assert change_config(config, ["training.max_steps=9"]).training.max_tokens is None
