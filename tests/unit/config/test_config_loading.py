"""Where values come from: defaults, preset or file, overrides; and what is recorded of it."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ultrathink.config import Config, load_config, preset_names
from ultrathink.config.docs import to_yaml
from ultrathink.config.loading import CONFIG_FILE, ORIGINS_FILE, change_config
from ultrathink.config.optimizer import MuonConfig
from ultrathink.config.training import BUDGETS
from ultrathink.core.errors import ConfigError


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keep(config: Config, run: Path, *, with_origins: bool = True) -> None:
    """Write ``config`` as a run folder has it."""
    run.mkdir(exist_ok=True)
    (run / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
    if with_origins:
        (run / ORIGINS_FILE).write_text(yaml.safe_dump(config.origins))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_complete_and_survives_its_own_yaml(name: str, in_folder: Path) -> None:
    (in_folder / name).mkdir()  # a folder does not hide the preset of its name
    config = load_config(name)
    (in_folder / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config("again.yaml") == config
    assert (load_config() == config) == (name == "demo")
    for size in ("num_kv_heads", "head_dim", "intermediate_size", "vocab_size"):
        assert getattr(config.model, size) is not None


# The text of my.yaml (none: the preset demo), overrides, and lines of `config show --why` then.
LOADED = [
    (
        "training: {max_steps: 7, batch_size: 4}\nmodel: {num_layers: 3}\ntokenizer: byte\n",
        ["training.batch_size=2", "training.batch_size=6", "training.schedule={type: wsd}"],
        """
        training.batch_size: 6 # override training.batch_size=6
        training.max_steps: 7 # file my.yaml
        model.num_layers: 3 # file my.yaml
        model.hidden_size: 256 # default
        tokenizer.type: byte # file my.yaml
        training.schedule.type: wsd # override training.schedule={type: wsd}
        training.schedule.warmup: 0.05 # default
        model.vocab_size: 257 # derived from the tokenizer
        model.head_dim: 32 # derived from hidden_size / num_heads
        run.name: my # derived from the config's name
        run.seed: 0 # default
        """,
    ),
    (  # a mapping changes the keys it names and no others
        "",
        ["training.optimizer={lr: 0.5}", "model={num_layers: 2}"],
        """
        training.optimizer.lr: 0.5 # override training.optimizer={lr: 0.5}
        training.optimizer.adamw_lr: 0.008 # preset demo
        training.optimizer.type: muon # preset demo
        model.num_layers: 2 # override model={num_layers: 2}
        model.num_heads: 4 # preset demo
        """,
    ),
    (  # a list is replaced, and its items can be changed
        "",
        ["data.train=[{type: dummy}, {type: stdlib}]", "data.train.1.weight=3"],
        """
        data.train.0.weight: 1.0 # default
        data.train.1.type: stdlib # override data.train=[{type: dummy}, {type: stdlib}]
        data.train.1.weight: 3.0 # override data.train.1.weight=3
        """,
    ),
    (  # another type starts from its own defaults
        "",
        ["training.optimizer=adamw"],
        """
        training.optimizer.type: adamw # override training.optimizer=adamw
        training.optimizer.lr: 0.0003 # default
        """,
    ),
    (  # but for what is overridden
        "",
        ["training.optimizer.lr=0.5", "training.optimizer.type=adamw"],
        """
        training.optimizer.type: adamw # override training.optimizer.type=adamw
        training.optimizer.lr: 0.5 # override training.optimizer.lr=0.5
        training.optimizer.weight_decay: 0.1 # default
        """,
    ),
    (  # the short form of a part can be changed further
        "training: {max_steps: 7, optimizer: muon}\n",
        ["training.optimizer.lr=0.5"],
        """
        training.optimizer.type: muon # file my.yaml
        training.optimizer.lr: 0.5 # override training.optimizer.lr=0.5
        """,
    ),
    (
        "training: {max_steps: 7, optimizer: muon}\n",
        ["training.optimizer.lr=0.5", "training.optimizer.type=adamw"],
        """
        training.optimizer.type: adamw # override training.optimizer.type=adamw
        training.optimizer.lr: 0.5 # override training.optimizer.lr=0.5
        """,
    ),
    (  # a part without a type is of the default type, a section without keys has its defaults
        "model:\n#  num_layers: 3\ntraining: {max_steps: 7, optimizer: {lr: 0.5}}\n",
        [],
        """
        model.num_layers: 4 # file my.yaml
        training.optimizer.type: adamw # default
        training.optimizer.lr: 0.5 # file my.yaml
        """,
    ),
    (  # numbers with an exponent are numbers, dates are text, and off and false are modes
        "",
        [
            *("training.optimizer.lr=1e-3", "training.max_tokens=2e6", "run.name=2024-01-01"),
            *("training.activation_checkpointing=false", "orchestrator.mode=off"),
        ],
        """
        training.optimizer.lr: 0.001 # override training.optimizer.lr=1e-3
        training.max_tokens: 2000000 # override training.max_tokens=2e6
        run.name: '2024-01-01' # override run.name=2024-01-01
        training.activation_checkpointing: none # override training.activation_checkpointing=false
        orchestrator.mode: 'off' # override orchestrator.mode=off
        """,
    ),
]


@pytest.mark.parametrize(("text", "overrides", "expected"), LOADED)
def test_values_and_where_they_come_from(
    in_folder: Path, text: str, overrides: list[str], expected: str
) -> None:
    (in_folder / "my.yaml").write_text(text)
    config = load_config("my.yaml" if text else "demo", overrides)
    shown = {" ".join(line.split()) for line in to_yaml(config, why=True).splitlines()}
    assert {line.strip() for line in expected.strip().splitlines()} - shown == set()


def test_the_order_of_overrides_does_not_matter_and_the_same_type_changes_nothing() -> None:
    overrides = ["training.optimizer.lr=0.5", "training.optimizer.type=adamw"]
    assert load_config("demo", overrides) == load_config("demo", overrides[::-1])
    for nothing in ("training.optimizer.type=muon", "training.max_steps=null"):
        assert load_config("demo", [nothing]) == load_config("demo")


def test_a_run_folder_is_a_configuration_and_what_overrode_it_is_like_any_value(
    in_folder: Path,
) -> None:
    given = ["run.name=first", "training.max_minutes=2", "training.optimizer.lr=0.5"]
    config = load_config("debug", given)
    keep(config, in_folder / "first", with_origins=False)
    assert load_config(in_folder / "first") == config
    keep(config, in_folder / "first")
    again = load_config("first")
    assert (again, again.origins) == (config, config.origins)
    again = load_config("first", ["training.max_steps=7", "training.optimizer=muon"])
    assert (again.training.max_steps, again.training.max_minutes) == (7, None)
    assert again.training.optimizer == MuonConfig()
    changed = load_config("first", ["training.optimizer.type=muon"])
    assert changed.training.optimizer == MuonConfig()


@pytest.mark.parametrize("length", BUDGETS)
def test_a_length_replaces_the_one_of_the_preset(length: str) -> None:
    config = load_config("demo", [f"training.{length}=3"])
    given = [name for name in BUDGETS if getattr(config.training, name) is not None]
    assert given == [length]
    is_the_presets = length == "max_minutes"
    assert (config.origin("training.max_minutes") == "default") != is_the_presets


def test_a_new_length_forgets_the_steps_that_the_old_one_came_to(in_folder: Path) -> None:
    (in_folder / "my.yaml").write_text("training: {max_minutes: 5, step_budget: 900}\n")
    assert load_config("my.yaml").training.step_budget == 900
    assert load_config("my.yaml", ["training.max_minutes=1"]).training.step_budget is None
    assert load_config("my.yaml", ["training.step_budget=5"]).training.max_minutes == 5


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
