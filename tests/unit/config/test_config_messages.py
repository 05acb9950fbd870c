"""Every mistake in a configuration is answered with the key, the value, its origin and the fix."""

from pathlib import Path

import pytest

from ultrathink.config import load_config
from ultrathink.core.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def message(*overrides: str, source: str = "demo") -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


MESSAGES = {
    # An unknown key is answered with the nearest known one.
    "model.hiden_size=3": "model.hiden_size (override): there is no such key. "
    "Did you mean 'model.hidden_size'?",
    "modle.hidden_size=3": "modle (override modle.hidden_size=3): there is no such key. "
    "Did you mean 'model'?",
    "lr=3": "lr (override): there is no such key. Write training.optimizer.lr=3.",
    "temperature=1": "Did you mean 'training.objective.temperature' or 'training.sample.temp",
    "checkpoint.keep=3": "there is no such key. Did you mean 'training.checkpoint'?",
    "training.zzz=3": "training.zzz (override): there is no such key. Known keys: max_steps, ",
    "data.train.0.path=x": "data.train.0.path (override): there is no such key. 'path' belongs to "
    "type text and jsonl, and data.train.0 is of type stdlib, with: type, name, weight, groups.",
    "data.train.0.pth=x": "'path' belongs to type text and jsonl, and data.train.0 is of type",
    "tokenizer={type: byte, vocab_size: 300}": "'vocab_size' belongs to type bpe and hf, and "
    "tokenizer is of type byte, with: type.",
    "training.schedule={type: cosine, decay: 3}": "'decay' belongs to type wsd, and "
    "training.schedule is of type cosine",
    # A wrong value with what it should be.
    "training.optimizer.lr=.inf": "= .inf (override): should be a finite number.",
    "training.batch_size=3.5": "training.batch_size = 3.5 (override): should be a whole number.",
    "run.name=a b": "run.name = 'a b' (override): should be a name of letters, digits,",
    "data=3": "data = 3 (override): should be a section of keys.",
    "model=gpt2": "should be a section of keys. Write training: {init_from: hf:gpt2}.",
    "data=books/": "should be a section of keys. Write data: {train: [{type: text, path: books/}]}",
    "data.train=[]": "data.train = [] (override): should be a list with at least one item.",
    "data.train=[{type: text}]": "data.train.0.path: a value is needed here. (A file, a folder",
    "data.train=[{path: x}]": "name the data source, for example {type: stdlib}.",
    "training.optimizer.betas=[0.9]": "betas = [0.9] (override): should have more items.",
    "training.optimizer.betas=[a, 0.9]": "betas.0 = 'a' (override training.optimizer.betas=[a, "
    "0.9]): should be a number.",
    "training.optimizer.betas=[0.9, 2]": "betas.1 = 2 (override training.optimizer.betas=[0.9, "
    "2]): should be less than 1.",
    "training.schedule.warmup=1.5": "a share of the run is between 0 and 1 (0% and 100%), not",
    "training.schedule.warmup=[1]": "'[1]' is not a length of training; write steps",
    "model.rope_scaling={type: linear}": "model.rope_scaling.factor: a value is needed here. (How",
    # An unknown part with the known ones.
    "training.optimizer=admw": "training.optimizer (override): there is no optimizer called "
    "'admw'. Did you mean 'adamw'? To load your own parts use --plugin FILE.py.",
    "training.optimizer.type=zz": "there is no optimizer called 'zz'. Known: adamw, muon.",
    "tokenizer=bep": "there is no tokenizer called 'bep'. Did you mean 'bpe'?",
    "data.train=[books]": "there is no data source called 'books'. Known: dummy, jsonl, stdlib, "
    "text. To load your own parts use --plugin FILE.py. Text of your own: {type: text, "
    "path: books}.",
    "data.train=books": "data.train.0 (override data.train=books): there is no data source called "
    "'books'. Known: dummy, jsonl, stdlib, text.",
    "data.train.0.type=texts": "there is no data source called 'texts'. Did you mean 'text'?",
    "monitoring.sinks=[consol]": "there is no sink called 'consol'. Did you mean 'console'?",
    "model.attention.backend=flash": "there is no attention backend called 'flash'. Known: ",
    "model.feed_forward=gelu": "there is no feed-forward called 'gelu'. Known: relu2, swiglu.",
    # Values that do not fit each other are named together.
    "orchestrator.limits.lr_factor=[1.0, 0.1]": "lr_factor [1, 0.1] leaves no room",
    "orchestrator.limits.lr_factor=[0, 1]": "leaves no room",
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
    # A malformed override is quoted with the right form.
    "training.max_steps": "'training.max_steps' is not an override; write dotted.key=value, "
    "for example training.max_steps=100.",
    "=3": "'=3' is not an override",
    "a..b=3": "'a..b=3' is not an override",
    # One message for a flow mapping without spaces, in which YAML sees keys without values.
    "data.train=[{type:text,path:/nope}]": "there is no space after the colon in 'type:text': "
    "write type: text",
    "model.moe.groups=[{name:x,num_experts:4,top_k:1}]": "'name:x': write name: x",
    "training.max_steps=[1": "the value of 'training.max_steps=[1' is not valid YAML: ",
    "data.train.3.type=text": "data.train.3 names item '3' of a list of 1, counted from 0. To add "
    "an item, set the whole list: data.train=[...].",
    "data.train.last.type=text": "names item 'last' of a list of 1",
    "training.schedule.warmup.x=3": "training.schedule.warmup is 50 and has no keys.",
}


@pytest.mark.parametrize("override", MESSAGES)
def test_a_mistake_in_an_override_is_answered(override: str) -> None:
    assert MESSAGES[override] in message(override)


SOURCES = {
    "dmo": "there is no preset 'dmo'. Did you mean 'demo'?",
    "nothing": "Known: debug, demo, demo-elastic, demo-moe.",
    "my.yaml": "there is no file my.yaml. Presets: debug, demo, demo-elastic, demo-moe.",
    "runs/x": "there is no file or run folder runs/x.",
    "empty": "the folder empty is not a run folder: it has no config.yaml.",
    "x.yaml": "the folder x.yaml is not a run folder",
    "notes.txt": "notes.txt: a configuration file's name ends in .yaml",
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_no_configuration_is_named(source: str) -> None:
    for folder in ("empty", "x.yaml"):
        Path(folder).mkdir()
    Path("notes.txt").touch()
    assert SOURCES[source] in message(source=source)


FILES: dict[str | bytes, str] = {
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
    b"run: {name: \xe9}": "my.yaml is not UTF-8 text (byte 12); save it as UTF-8.",
    "run:\n".encode("utf-16"): "my.yaml is not",
    "training: {max_steps: 3, optimizer: {type: null}}": "training.optimizer: name the optimizer,",
}


@pytest.mark.parametrize("text", FILES)
def test_a_file_that_cannot_be_read_is_answered_with_the_place(text: str | bytes) -> None:
    Path("my.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert FILES[text] in message(source="my.yaml")


def test_all_that_is_wrong_is_reported_at_once() -> None:
    lines = message("model.num_layers=x", "run.nam=3", "training.clip=-1").splitlines()
    assert {line.split()[0] for line in lines} == {"model.num_layers", "training.clip", "run.nam"}
    assert len(lines) == 3
    for override in ("data.train=[{type:text,path:/nope}]", "model.moe.groups=[{name:x,top_k:1}]"):
        assert len(message(override).splitlines()) == 1
    # An item that is wrong does not make its list too short.
    assert len(message("data.train=[{type: text}]").splitlines()) == 1
    text = message(f"training.optimizer.lr={'x' * 500}")
    assert "xxx..." in text
    assert len(text) < 250
