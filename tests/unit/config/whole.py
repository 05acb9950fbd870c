"""Configurations that between them have every option: each type of each part."""

GROUPS = "groups: [{name: a, num_experts: 4, top_k: 1}, {name: b, num_experts: 2, top_k: 1}]"
SECTIONS = (
    "model.rope_scaling={type: yarn, factor: 2}",
    "data.train=[{type: dummy}, {type: jsonl, path: a}, {type: text, path: b}, {type: stdlib}]",
    "data.val=[{type: dummy, seed: 1}]",
)
WHOLE = {
    "experts": (*SECTIONS, f"model.moe={{{GROUPS}}}", "tokenizer=bpe", "training.optimizer=adamw"),
    "other-parts": (
        *SECTIONS,
        "training.optimizer=muon",
        "training.schedule=wsd",
        "tokenizer={type: hf, vocab_size: 300}",
    ),
}
