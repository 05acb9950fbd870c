"""What other trainers taught is answered with the line that means it here, wherever it is given."""

import re
import shlex
from pathlib import Path

import pytest

from tests.unit.config.habits_table import HABITS
from ultrathink.config import Config, load_config
from ultrathink.config.explain import known_flag
from ultrathink.config.habits import table
from ultrathink.config.reflection import field_at
from ultrathink.core.errors import ConfigError

LINE = re.compile(r"(?<![\w.])((?:\w+\.)+\w+|tokenizer)=(\[.*?\]|\{.*?\}|[^\s;,)']*[^\s;,)'.:])")
TEXT = "data.train=[{type: jsonl, path: x}]"  # of the type that has every key of a source


def lines_of(answer: str) -> list[str]:
    """The overrides that an answer names."""
    return [f"{key}={value}" for key, value in LINE.findall(answer)]


def in_a_file(line: str) -> str:
    """An override as a file has it: ``a.b=c`` is ``a: {b: c}``."""
    key, _, value = line.partition("=")
    *sections, name = key.split(".")
    return ": {".join([*sections, f"{name}: {value}"]) + "}" * len(sections)


def message(*overrides: str, source: str | Path = "debug") -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


def test_there_are_enough_of_enough_trainers() -> None:
    assert len({name.partition(": ")[2].split()[0] for name in HABITS}) >= 60
    assert len({name.partition(":")[0] for name in HABITS}) >= 4


@pytest.mark.parametrize("habit", HABITS)
def test_a_habit_is_answered_with_the_line_that_means_it(habit: str, tmp_path: Path) -> None:
    name, value, right = HABITS[habit]
    flag = known_flag(f"--{name}", value, Config)
    assert flag is not None
    assert right in flag
    key = name.replace("-", "_")
    for place in (key, f"training.{key}", f"model.{key}"):
        if field_at(Config, place.split("."), None) is not None:
            continue  # it is an option of ours there
        assert right in message(f"{place}={value}"), place
    file = tmp_path / "mine.yaml"
    file.write_text(f"training: {{max_steps: 3}}\n{key}: {value}\n")
    said = message(source=file)
    is_line = LINE.fullmatch(right) and f"Write {shlex.quote(right)}" in flag
    assert (in_a_file(right) if is_line else right) in said
    for line in lines_of(flag):
        load_config("debug", [TEXT, line])  # the sources are not opened


def test_every_line_of_the_table_is_accepted() -> None:
    texts = {text for answers in table().values() for text in answers.values()}
    lines = {line for text in texts for line in lines_of(text)}
    assert len(lines) > 60
    for line in lines:
        assert field_at(Config, line.partition("=")[0].split("."), None) is not None, line
        if "{}" not in line:
            load_config("debug", [TEXT, line])


def test_a_length_among_them_is_the_only_complaint_about_the_length(tmp_path: Path) -> None:
    file = tmp_path / "hf.yaml"
    file.write_text("learning_rate: 2e-5\nnum_train_epochs: 3\n")
    assert message(source=file).splitlines() == [
        f"learning_rate (file {file}): there is no such key. "
        "Write training: {optimizer: {lr: 2e-05}}.",
        f"num_train_epochs (file {file}): there is no such key. Write training: {{epochs: 3}}.",
    ]


def test_keys_with_dots_and_missing_spaces_are_shown_nested(tmp_path: Path) -> None:
    file = tmp_path / "dots.yaml"
    file.write_text("training.max_steps: 10\noptimizer.lr: 1\n")
    said = message(source=file)
    assert "keys of a file are nested. Write training: {max_steps: 10}." in said
    assert "Write training: {optimizer: {lr: 1}}." in said
    file.write_text("training: max_steps:10\n")
    assert "There is no space after the colon in 'max_steps:10': write max_steps: 10." in message(
        source=file
    )
    file.write_text("max_steps:10\n")
    assert "there is no space after the colon" in message(source=file)
