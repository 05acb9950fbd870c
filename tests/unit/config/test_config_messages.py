"""Every mistake in a configuration is answered with the key, the value, its origin and the fix."""

from pathlib import Path

import pytest

from ultrathink.config import Config, load_config
from ultrathink.config.reflection import all_keys
from ultrathink.core.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def message(*overrides: str, source: str = "demo") -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


def message_of_file(text: str | bytes, *overrides: str) -> str:
    data = text if isinstance(text, bytes) else text.encode()
    Path("my.yaml").write_bytes(data)
    return message(*overrides, source="my.yaml")


UNKNOWN_KEYS = {
    "model.hiden_size=3": "model.hiden_size (override): there is no such key. "
    "Did you mean 'model.hidden_size'?",
    "modle.hidden_size=3": "modle (override modle.hidden_size=3): there is no such key. "
    "Did you mean 'model'?",
    "lr=3": "lr (override): there is no such key. Did you mean 'training.optimizer.lr'?",
    "training.zzz=3": "training.zzz (override): there is no such key. Known keys: max_steps, ",
    "data.train.0.path=x": "data.train.0.path (override): there is no such key. 'path' belongs to "
    "type text and jsonl, and data.train.0 is of type stdlib, with: type, name, weight.",
    "data.train.0.pth=x": "'path' belongs to type text and jsonl, and data.train.0 is of type",
    "tokenizer={type: byte, vocab_size: 300}": "'vocab_size' belongs to type bpe and hf, and "
    "tokenizer is of type byte, with: type.",
    "training.schedule={type: cosine, decay: 3}": "'decay' belongs to type wsd, and "
    "training.schedule is of type cosine",
}


@pytest.mark.parametrize("override", UNKNOWN_KEYS)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(override: str) -> None:
    assert UNKNOWN_KEYS[override] in message(override)


@pytest.mark.parametrize(
    "key", [key for key in all_keys(Config) if len(key.rpartition(".")[2]) > 3]
)
def test_a_slip_in_any_key_is_answered_with_that_key(key: str) -> None:
    prefix, _, name = key.rpartition(".")
    slip = f"{name[:-2]}{name[-1]}{name[-2]}" if name[-1] != name[-2] else name[:-1]
    where = prefix.replace("data.train", "data.train.0").replace("data.val", "data.val.0")
    where = where.replace("moe.groups", "moe.groups.0")
    # A type that has the key, so that the message need not name another.
    file = Path("all.yaml")
    for optimizer in ("adamw", "muon"):
        for source in ("stdlib", "{type: jsonl, path: x}", "dummy"):
            file.write_text(
                f"model: {{rope_scaling: {{type: linear, factor: 2}}, "
                f"moe: {{groups: [{{name: a, num_experts: 8, top_k: 2}}]}}}}\n"
                f"training: {{max_steps: 3, optimizer: {optimizer}, schedule: wsd, "
                f"objective: {{type: distill, teacher: x}}}}\n"
                f"data: {{train: [{source}], val: [{source}]}}\n"
            )
            text = message(f"{where}.{slip}=1".lstrip("."), source="all.yaml")
            expected = f"{where}.{name}".lstrip(".")
            if f"Did you mean {expected!r}?" in text:
                return
    pytest.fail(text)


VALUES = {
    "training.optimizer.lr=fast": "training.optimizer.lr = 'fast' (override): should be a number. "
    "(Peak learning rate of the hidden matrices.)",
    "training.optimizer.lr=-1": "training.optimizer.lr = -1 (override): should be greater than 0.",
    "training.optimizer.lr=.inf": "= .inf (override): should be a finite number.",
    "training.batch_size=3.5": "training.batch_size = 3.5 (override): should be a whole number.",
    "training.batch_size=0": "training.batch_size = 0 (override): should be greater than 0.",
    "training.compile=maybe": "'maybe' (override): should be true or false or 'auto'.",
    "training.micro_batch_size=x": "should be a whole number or 'auto'. (Sequences in one forward",
    "training.precision=fp8": "'fp8' (override): should be 'auto', 'fp32', 'bf16' or 'fp64'.",
    "training.eval.every_steps=off": "= false (override): should be a whole number, or null.",
    "model.hidden_size=true": "model.hidden_size = true (override): should be a whole number.",
    "model.dropout=yes": "model.dropout = true (override): should be a number.",
    "model.qk_norm=3": "model.qk_norm = 3 (override): should be true or false.",
    "run.name=a b": "run.name = 'a b' (override): should be a name of letters, digits,",
    "run.name=3": "run.name = 3 (override): should be text (in quotes), or null.",
    "data=3": "data = 3 (override): should be a section with keys of its own.",
    "data.train=stdlib": "data.train = 'stdlib' (override): should be a list, like [a, b].",
    "data.train=[]": "data.train = [] (override): should be a list with at least one item.",
    "data.train=[{type: text}]": "data.train.0.path: a value is needed here. (A file, a folder",
    "data.train=[{path: x}]": "name the data source, for example {type: stdlib}.",
    "training.optimizer.betas=[0.9]": "betas = [0.9] (override): should have more items.",
    "training.optimizer.betas=[a, 0.9]": "betas.0 = 'a' (override training.optimizer.betas=[a, "
    "0.9]): should be a number.",
    "training.optimizer.betas=[0.9, 2]": "betas.1 = 2 (override training.optimizer.betas=[0.9, "
    "2]): should be less than 1.",
    "training.schedule.warmup=soon": "training.schedule.warmup (override): 'soon' is not a length "
    "of training; write steps (100),",
    "training.schedule.warmup=1.5": "a share of the run lies between 0 and 1 (0% and 100%), not",
    "training.schedule.warmup=[1]": "'[1]' is not a length of training; write steps",
    "model.rope_scaling={type: linear}": "model.rope_scaling.factor: a value is needed here. (How",
}


@pytest.mark.parametrize("override", VALUES)
def test_a_wrong_value_is_answered_with_what_it_should_be(override: str) -> None:
    assert VALUES[override] in message(override)


PARTS = {
    "training.optimizer=admw": "training.optimizer (override): there is no optimizer called "
    "'admw'. Did you mean 'adamw'? A part of your own is loaded with --plugin FILE.py.",
    "training.optimizer.type=zz": "there is no optimizer called 'zz'. Known: adamw, muon.",
    "tokenizer=bep": "there is no tokenizer called 'bep'. Did you mean 'bpe'?",
    "data.train.0.type=texts": "there is no data source called 'texts'. Did you mean 'text'?",
    "monitoring.sinks=[consol]": "there is no sink called 'consol'. Did you mean 'console'?",
    "model.attention.backend=flash": "there is no attention backend called 'flash'. Known: ",
    "model.feed_forward=gelu": "there is no feed-forward called 'gelu'. Known: relu2, swiglu.",
}


@pytest.mark.parametrize("override", PARTS)
def test_an_unknown_part_is_answered_with_the_known_ones(override: str) -> None:
    assert PARTS[override] in message(override)


CROSS_FIELD = {
    "training.max_minutes=null": "give exactly one of max_steps, max_tokens, max_minutes, "
    "epochs; none is given.",
    "training={max_steps: 5, epochs: 1}": "given: max_steps and epochs.",
    "training.micro_batch_size=3": "training (override training.micro_batch_size=3): batch_size "
    "(8) must be a multiple of micro_batch_size (3), or micro_batch_size must be auto.",
    "model.num_kv_heads=3": "num_heads (4) must be a multiple of num_kv_heads (3); divisors: 1, 2, "
    "4.",
    "model={num_heads: 12, num_kv_heads: 3}": "hidden_size (256) must be a multiple of num_heads "
    "(12), or head_dim must be set.",
    "model.head_dim=15": "the head dimension (15) must be even for rotary positions",
    "model.vocab_size=100": "model.vocab_size (100) is smaller than the tokenizer's vocabulary "
    "(4096); raise it, or leave it unset to follow the tokenizer.",
    "model.rope_scaling={type: llama3, factor: 2, low_freq_factor: 5}": "high_freq_factor (4.0) "
    "must exceed low_freq_factor (5.0).",
    "model.rope_scaling={type: yarn, factor: 2, beta_slow: 50}": "beta_fast (32.0) must exceed "
    "beta_slow (50.0).",
    "data.train=[{type: dummy, name: a}, {type: dummy, name: a}]": "two sources are called 'a'; "
    "give each its own name.",
}


@pytest.mark.parametrize("override", CROSS_FIELD)
def test_values_that_do_not_fit_each_other_are_named_together(override: str) -> None:
    assert CROSS_FIELD[override] in message(override)


BAD_OVERRIDES = {
    "training.max_steps": "'training.max_steps' is not an override; write dotted.key=value, "
    "for example training.max_steps=100.",
    "=3": "'=3' is not an override",
    "a..b=3": "'a..b=3' is not an override",
    "training.max_steps=[1": "the value of 'training.max_steps=[1' is not valid YAML: ",
    "data.train.3.type=text": "data.train.3 names item '3' of a list of 1, counted from 0. To add "
    "an item, set the whole list: data.train=[...].",
    "data.train.last.type=text": "names item 'last' of a list of 1",
    "training.schedule.warmup.x=3": "training.schedule.warmup is 50 and has no keys.",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_a_malformed_override_is_quoted_with_the_right_form(override: str) -> None:
    assert BAD_OVERRIDES[override] in message(override)


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    assert "there is no preset 'dmo'. Did you mean 'demo'?" in message(source="dmo")
    assert "Known: debug, demo, demo-moe." in message(source="nothing")


def test_a_missing_file_or_folder_is_named() -> None:
    assert message(source="my.yaml") == "there is no file my.yaml. Presets: debug, demo, demo-moe."
    assert "there is no file or run folder runs/x." in message(source="runs/x")
    Path("empty").mkdir()
    text = "the folder empty is not a run folder: it has no config.yaml."
    assert text in message(source="empty")
    Path("notes.txt").write_text("")
    assert "notes.txt: a configuration file's name ends in .yaml" in message(source="notes.txt")


def test_a_folder_in_the_place_of_a_file_is_named() -> None:
    Path("x.yaml").mkdir()
    assert "the folder x.yaml is not a run folder" in message(source="x.yaml")


FILES = {
    "run: [a": "my.yaml is not valid YAML: expected ',' or ']', but got '<stream end>' (line 1, "
    "column 8).",
    "run:\n\tname: a": r"found character '\t' that cannot start any token (line 2, column 1)",
    "- a": "my.yaml must hold sections (run:, model:, ...), not ['a'].",
    "hello": "my.yaml must hold sections (run:, model:, ...), not 'hello'.",
    "training: {max_steps: 3}\ntraining: {}": "the key 'training' is given twice (line 2, col",
    "training: {max_steps: 3}\n1: 2": "the key 1 is not text; put it in quotes (line 2, col",
    "training: {max_steps: 3}\non: 2": "the key on is not text",
    "": "training: give exactly one of max_steps, max_tokens, max_minutes, epochs; none is given.",
    "a: &x {b: *x}": "found unconstructable recursive node (line 1, column 4).",
    "[" * 2000: "my.yaml is not valid YAML: it is nested too deeply.",
    "---\n---\n": "but found another document (line 2",
    "training: {max_steps: 3, max_tokens: 5}": "given: max_steps and max_tokens.",
    "training: {max_steps: 3, optimizer: {momentum: 0.9}}": "'momentum' belongs to type muon, and "
    "training.optimizer is of type adamw",
    "training: {max_steps: x}": "training.max_steps = 'x' (file my.yaml): should be a whole number",
    "training: {max_steps: 3, optimizer: {type: null}}": "training.optimizer: name the optimizer,",
}


@pytest.mark.parametrize("text", FILES)
def test_a_file_that_cannot_be_read_is_answered_with_the_place(text: str) -> None:
    assert FILES[text] in message_of_file(text)


def test_a_file_in_another_encoding_is_named() -> None:
    assert "my.yaml is not UTF-8 text (byte 12); save it as UTF-8." in message_of_file(
        b"run: {name: \xe9}"
    )
    assert "my.yaml is not" in message_of_file("run:\n".encode("utf-16"))


def test_all_that_is_wrong_is_told_at_once() -> None:
    lines = message("model.num_layers=x", "run.nam=3", "training.clip=-1").splitlines()
    assert len(lines) == 3
    assert {line.split()[0] for line in lines} == {"model.num_layers", "run.nam", "training.clip"}


def test_an_item_that_is_wrong_does_not_make_its_list_too_short() -> None:
    (line,) = message("data.train=[{type: text}]").splitlines()
    assert line.startswith("data.train.0.path: a value is needed")


def test_a_long_value_is_shortened() -> None:
    text = message(f"training.optimizer.lr={'x' * 500}")
    assert "xxx..." in text
    assert len(text) < 250
