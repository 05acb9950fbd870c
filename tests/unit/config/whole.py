"""Configurations that between them have every option: each type of each part.

And for each option a value that is not the one that a configuration has.
"""

from types import NoneType
from typing import Any, Literal, get_args, get_origin

from ultrathink.config import Config
from ultrathink.config.reflection import field_at

GROUPS = "groups: [{name: a, num_experts: 4, top_k: 1}, {name: b, num_experts: 2, top_k: 1}]"
SECTIONS = (
    "model.rope_scaling={type: yarn, factor: 2}",
    "model.paths=[{name: half, layers: 0.5}]",
    "model.mod={layers: all}",
    "data.train=[{type: dummy}, {type: jsonl, path: a}, {type: text, path: b}, {type: stdlib}]",
    "data.val=[{type: dummy, seed: 1}]",
    "training.evaluators=[{type: text, name: a, source: {type: text, path: b}}, "
    "{type: samples, prompts: [c]}]",
)
WHOLE = {
    "experts": (*SECTIONS, f"model.moe={{{GROUPS}}}", "tokenizer=bpe", "training.optimizer=adamw"),
    "elastic": (
        *SECTIONS,
        f"model.moe={{{GROUPS}, shared_size: 8}}",
        "training.objective={type: elastic, sub_paths: {names: [fast]}}",
    ),
    "other-parts": (
        *SECTIONS,
        "training.objective={type: distill, teacher: runs/large}",
        "training.optimizer=muon",
        "training.schedule=wsd",
        "tokenizer={type: hf, vocab_size: 300}",
    ),
}

# Where a rule of the value, or of its neighbours, leaves little room.
ANOTHER = {
    "data.cache_dir": "elsewhere",
    **{f"data.train.{index}.groups": None for index in range(4)},  # needs a model with group gates
    "model.attention.backend": "eager",
    "model.moe.backend": "loop",
    "model.paths": [{"name": "half", "layers": 1}],
    "training.eval.paths": ["half", "fast"],
    "model.mod.layers": "interleaved",
    "model.mod.schedule": [0.75, 0.5],
    "training.objective.sub_paths.names": ["standard"],
    "model.rope_scaling.type": None,  # another starts from its own defaults
    "monitoring.sinks": [],
    "orchestrator.limits.lr_factor": [0.1, 0.5],
    "orchestrator.limits.memory": [0.2, 0.3],
    **{f"parallel.{axis}": None for axis in ("cp", "tp", "pp", "ep")},  # not built yet
    "parallel.dp_shard": 2,
    "parallel.engine": None,
    "parallel.offload": "params",
    "data.mode": None,
    "data.train": [{"type": "dummy", "seed": 7}],
    "data.val": [{"type": "dummy", "seed": 7}],
    "run.name": "another",
    "training.checkpoint.best_by": "token_accuracy",
    "training.device": "cuda",
    "training.evaluators": [{"type": "samples", "prompts": ["d"]}],
    "training.sample.prompts": ["another"],
    "training.schedule.warmup": 7,
    "training.schedule.decay": 9,
    "training.step_budget": None,  # follows from the others
    "training.micro_batch_size": 1,
}


TYPES = {"training.optimizer": ("adamw", "muon"), "training.schedule": ("cosine", "wsd")}


def another(key: str, value: Any) -> Any:
    """A valid value of an option that is not ``value``; None where there is no other."""
    if key in ANOTHER:
        return ANOTHER[key]
    if key in TYPES:
        return {"type": next(name for name in TYPES[key] if name != value)}
    found = field_at(Config, key.split("."), None)
    assert found is not None, key
    annotation = found[1].annotation
    members = (annotation,) if get_origin(annotation) is Literal else get_args(annotation)
    kinds = [kind for kind in members or (annotation,) if kind is not NoneType]
    if get_origin(kinds[0]) is Literal:
        return next((name for name in get_args(kinds[0]) if name != value), None)
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [0.5, 0.25] if value and isinstance(value[0], float) else ["another"]
    if isinstance(value, int) and float not in kinds:
        return 2 * value if value else 1
    if isinstance(value, int | float) and value:
        return value / 2
    return 0.25 if float in kinds else 3 if int in kinds else "another"
