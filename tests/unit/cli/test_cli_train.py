"""``ultrathink train`` on a user's text: its prompts, and the commands at the end."""

import json
import shlex
from pathlib import Path

import pytest

from ultrathink.cli.main import main
from ultrathink.config import load_config

BOOK = "".join(f"Chapter {number} begins with a storm at sea.\n" for number in range(400))


def test_prompts_are_words_of_the_users_text(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("book.txt").write_text(BOOK)
    words = ["train", "debug", "data.train=book.txt", "training.max_steps=2", "run.name=sea"]
    assert main([*words, "training.sample.max_new_tokens=3", "monitoring.sinks=[jsonl]"]) == 0
    prompts = [
        json.loads(line)["prompt"]
        for line in Path("runs/sea/samples.jsonl").read_text().splitlines()
    ]
    assert len(prompts) == 1  # one document has one beginning
    assert prompts[0] in BOOK
    assert prompts[0].startswith("Chapter 3")  # of the end, which is held out
    assert load_config("runs/sea").training.sample.prompts == tuple(prompts)
    hint = next(line for line in capsys.readouterr().err.splitlines() if "let it write" in line)
    command = shlex.split(hint.partition(":")[2])
    assert command == ["ultrathink", "generate", "runs/sea", prompts[0]]

    assert main([*command[1:], "--max-new-tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(prompts[0])
    assert err == ""
    assert main(["generate", "sea", BOOK[:100], "--max-new-tokens", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["prompt_tokens"] == 100
    assert err.startswith(
        "note: the prompt has 100 tokens, and the model was trained on sequences of 64: "
    )
    assert err.count("\n") == 1


def test_prompts_of_a_preset_are_for_the_text_of_the_preset() -> None:
    def prompts(*overrides: str) -> tuple[str, ...] | None:
        return load_config("demo", overrides).training.sample.prompts

    theirs = prompts()
    assert theirs
    for same in ("data.train.0.weight=2", "data.val=[{type: dummy}]", "training.max_steps=3"):
        assert prompts(same) == theirs
    for other in ("data.train=books/", "data.train=[{type: dummy}]", "data.train.0.type=dummy"):
        assert prompts(other) is None
        assert prompts("training.sample.prompts=[Once]", other) == ("Once",)
