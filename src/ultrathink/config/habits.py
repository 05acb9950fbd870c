"""Habits from other trainers, each with the line that means it here.

The names are those of Hugging Face (Trainer, TRL, accelerate), axolotl, LLaMA-Factory, nanoGPT,
Megatron-LM and torchtune, with underscores; a flag or a key in another case means the same.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from ultrathink.config.yaml_format import dump_yaml

ANYTHING = "*"
_LINE = re.compile(r"^(?P<key>\w+(?:\.\w+)+)=(?P<value>.*[^.])$")  # a sentence has a full stop

_NEEDLESS = "Nothing here needs it: leave it out."
_UNBUILT = (
    "This kind of parallelism is not built yet: leave it out; parallel.dp_shard=-1 divides the "
    "model over the processes of ultrathink launch."
)
_ALL_WEIGHTS = "All weights are trained: leave it out."
_NO_ADAPTERS = f"There is no LoRA and no quantized training yet. {_ALL_WEIGHTS}"
_PLAIN_TEXT = "There are no chat templates yet: documents are trained as plain text; leave it out."
_TEXT = "data.train=[{type: text, path: {}}]"
_LINES = "data.train=[{type: jsonl, path: {}}]"
_ACCUMULATION = (
    "It follows from training.batch_size (sequences of a whole step) and "
    "training.micro_batch_size (of one forward pass on one device): batch_size = "
    "micro_batch_size x accumulation x devices."
)
_PATHS = ("*.txt", "*.md", "/*", "./*", "../*", "~*", "*/")

# Names -> the answer: a line (`key=value`, {} is the user's value) or a sentence; where it depends
# on the value, by pattern.
_ANSWERS: dict[str, str | dict[str, str]] = {
    # How long, how large.
    "max_steps": {
        "-1": "Leave it out: training.epochs=1 is a length too.",
        ANYTHING: "training.max_steps={}",
    },
    "max_iters train_iters total_steps num_training_steps": "training.max_steps={}",
    "num_train_epochs num_epochs max_epochs n_epochs": "training.epochs={}",
    "total_tokens train_tokens": "training.max_tokens={}",
    "global_batch_size train_batch_size total_batch_size": "training.batch_size={}",
    "per_device_train_batch_size micro_batch_size device_batch_size local_batch_size": (
        "training.micro_batch_size={}"
    ),
    "gradient_accumulation_steps gradient_accumulation grad_accum_steps accumulate_grad_batches": (
        _ACCUMULATION
    ),
    "block_size sequence_len sequence_length seq_length max_seq_length max_seq_len max_length "
    "cutoff_len context_length model_max_length": "data.seq_len={}",
    # The optimizer and its schedule.
    "learning_rate peak_lr max_lr": "training.optimizer.lr={}",
    "wd": "training.optimizer.weight_decay={}",
    "adam_beta1 beta1": "training.optimizer.betas=[{}, 0.95]",
    "adam_beta2 beta2": "training.optimizer.betas=[0.9, {}]",
    "adam_epsilon adam_eps": "training.optimizer.eps={}",
    "optim optimizer optimizer_type": {
        "*adam*": "training.optimizer=adamw",
        "*muon*": "training.optimizer=muon",
        ANYTHING: "The optimizers are training.optimizer=adamw and training.optimizer=muon.",
    },
    "use_muon": "training.optimizer=muon",
    "max_grad_norm grad_clip clip_grad clip_grad_norm gradient_clipping gradient_clip_val": {
        "0": "training.clip=null",
        "0.0": "training.clip=null",
        ANYTHING: "training.clip={}",
    },
    "warmup_steps warmup_ratio warmup_iters num_warmup_steps lr_warmup_iters lr_warmup_fraction": (
        "training.schedule.warmup={}"
    ),
    "lr_scheduler_type lr_scheduler lr_decay_style": {
        "cosine*": "training.schedule=cosine",
        "linear": "training.schedule={type: wsd, decay: 95%}",
        "constant*": "training.schedule={type: wsd, decay: 0}",
        "w*s*d*": "training.schedule=wsd",
        ANYTHING: "The schedules are training.schedule=cosine and training.schedule=wsd.",
    },
    "min_lr min_learning_rate": (
        "The last learning rate is a share of the peak: training.schedule.min_ratio=0.1 where "
        "min_lr is a tenth of it."
    ),
    "min_lr_ratio cosine_min_lr_ratio": "training.schedule.min_ratio={}",
    "lr_decay_iters lr_decay_steps decay_lr": "The schedule ends with the run: leave it out.",
    # Numbers, memory, kernels.
    "bf16 bfloat16": {"false": "training.precision=fp32", ANYTHING: "training.precision=bf16"},
    "fp16 float16 half": {
        "false": _NEEDLESS,
        ANYTHING: "There is no fp16, whose range is too small without loss scaling: "
        "training.precision=bf16.",
    },
    "dtype torch_dtype mixed_precision": {
        "*bf*16": "training.precision=bf16",
        "*32": "training.precision=fp32",
        "no": "training.precision=fp32",
        ANYTHING: "The formats are training.precision=bf16 and training.precision=fp32.",
    },
    "tf32 allow_tf32": "training.precision=auto chooses the format for the device: leave it out.",
    "gradient_checkpointing enable_activation_checkpointing recompute_activations "
    "recompute_granularity use_activation_checkpointing": {
        "false": "training.activation_checkpointing=none",
        "selective": "training.activation_checkpointing=selective",
        ANYTHING: "training.activation_checkpointing=full",
    },
    "torch_compile compile_model": "training.compile={}",
    "flash_attention flash_attn use_flash_attn use_flash_attention_2 attn_implementation "
    "sdp_attention xformers_attention attention_backend": (
        "model.attention.backend=auto chooses the kernel for the device: leave it out."
    ),
    "use_cpu no_cuda": {"false": _NEEDLESS, ANYTHING: "training.device=cpu"},
    "dataloader_num_workers num_workers": "data.num_workers={}",
    # What is logged, kept and scored.
    "logging_steps log_interval log_every_n_steps log_freq": "training.log_every={}",
    "eval_steps eval_interval val_interval": "training.eval.every_steps={}",
    "eval_strategy evaluation_strategy evals_per_epoch": (
        "training.eval.every_steps=500 validates after so many steps; the last step always is."
    ),
    "per_device_eval_batch_size eval_batch_size": "training.eval.batch_size={}",
    "eval_iters limit_val_batches": (
        "training.eval.max_tokens=100000 scores so many held-out tokens; all of them when unset."
    ),
    "save_steps save_interval": "training.checkpoint.every_steps={}",
    "save_strategy saves_per_epoch": (
        "training.checkpoint.every_steps=500 saves after so many steps; the last always is."
    ),
    "save_total_limit": "training.checkpoint.keep={}",
    "load_best_model_at_end metric_for_best_model always_save_checkpoint": (
        "The best checkpoint is always kept, by training.checkpoint.best_by=loss: leave it out."
    ),
    "early_stopping_patience early_stopping": (
        "orchestrator.mode=act ends a run that overfits, with its best weights."
    ),
    "report_to log_with": {
        "none": "monitoring.sinks=[console, jsonl]",
        "tensorboard": "monitoring.sinks=[console, jsonl, tensorboard]",
        ANYTHING: "The sinks are console, jsonl and tensorboard, all of them by default: "
        "monitoring.sinks=[console, jsonl, tensorboard].",
    },
    "wandb_project wandb_log wandb_entity wandb_watch wandb_log_model use_wandb": (
        "There is no sink for W&B; figures go to the terminal, metrics.jsonl and TensorBoard."
    ),
    "tensorboard_dir logging_dir": "The files lie in the run folder: tensorboard --logdir runs",
    "plot_loss": "A run's page has its curves: ultrathink report RUN",
    "run_name exp_name experiment_name wandb_name wandb_run_name": "run.name={}",
    "output_dir out_dir save": "run.dir={}",
    "data_seed random_seed": "run.seed={}",
    # The text.
    "data dataset datasets train_file train_data data_path data_files path": {
        "*.json*": _LINES,
        **dict.fromkeys(_PATHS, _TEXT),
        ANYTHING: "Text comes from files of this machine: data.train=[{type: text, path: books/}] "
        "or data.train=[{type: jsonl, path: lines.jsonl, field: text}].",
    },
    "validation_file eval_dataset eval_file test_datasets valid_data_path val_data": (
        "data.val=[{type: text, path: held-out/}]; when unset, a share of data.train is held out."
    ),
    "val_set_size val_size validation_split": (
        "val_fraction: {} in a source of data.train (data.train.0.val_fraction={})."
    ),
    "split": "val_fraction in a source of data.train is the held-out share: leave it out.",
    "dataset_text_field text_column": "field: {} in a source of type jsonl (data.train.0.field={})",
    "sample_packing packing packed": "data.packing.enabled={}",
    "tokenizer_type tokenizer_name tokenizer_name_or_path tokenizer_model vocab_file merge_file": (
        "The tokenizer comes with training.init_from=hf:NAME, or is chosen: tokenizer=bpe, "
        "tokenizer=byte."
    ),
    "template chat_template train_on_inputs completion_only_loss assistant_only_loss stage": (
        _PLAIN_TEXT
    ),
    # The model.
    "model base_model model_name_or_path pretrained_model_name_or_path": (
        "training.init_from=hf:{}"
    ),
    "init_from": {
        "scratch": "Leave it out: weights are drawn from run.seed=0.",
        "resume": "A run is resumed with ultrathink train --resume RUN",
        "gpt2*": "training.init_from=hf:{}",
        ANYTHING: "training.init_from={}",
    },
    "n_embd d_model embed_dim dim": "model.hidden_size={}",
    "n_layer n_layers num_hidden_layers": "model.num_layers={}",
    "n_head n_heads num_attention_heads": "model.num_heads={}",
    "n_kv_head n_kv_heads num_key_value_heads num_query_groups": "model.num_kv_heads={}",
    "kv_channels": "model.head_dim={}",
    "ffn_hidden_size d_ff": "model.intermediate_size={}",
    "max_position_embeddings": "model.max_positions={}",
    "rotary_base rope_base": "model.rope_theta={}",
    "tie_word_embeddings": "model.tie_embeddings={}",
    "untie_embeddings_and_output_weights": "model.tie_embeddings=false",
    "rms_norm_eps norm_epsilon layer_norm_eps": "model.norm_eps={}",
    "hidden_dropout resid_pdrop": "model.dropout={}",
    "init_method_std initializer_range": "model.init.std={}",
    "num_local_experts num_experts": (
        "model.moe.groups=[{name: experts, num_experts: {}, top_k: 2}]"
    ),
    "moe_router_topk num_experts_per_tok": (
        "top_k of a group: model.moe.groups=[{name: experts, num_experts: 8, top_k: {}}]"
    ),
    "moe_aux_loss_coeff router_aux_loss_coef": "model.moe.balance.load={}",
    "hidden_act activation_function": {
        "silu": "model.feed_forward=swiglu",
        "relu*2*": "model.feed_forward=relu2",
        ANYTHING: "The kinds are model.feed_forward=swiglu and model.feed_forward=relu2.",
    },
    "swiglu": "model.feed_forward=swiglu",
    "bias disable_bias_linear": "There are no biases, except model.qkv_bias=true: leave it out.",
    "normalization position_embedding_type rotary_percent": (
        "The model is of the Llama family, with RMSNorm and rotary positions: leave it out."
    ),
    "finetuning_type": {"full": _ALL_WEIGHTS, ANYTHING: _NO_ADAPTERS},
    "adapter use_peft lora_r lora_rank lora_alpha lora_dropout lora_target lora_target_modules "
    "lora_target_linear load_in_8bit load_in_4bit quantization_bit": _NO_ADAPTERS,
    # Several processes.
    "deepspeed fsdp fsdp_config use_distributed_optimizer distributed_backend": (
        "ultrathink launch --nproc 2 divides the model over two processes; parallel.zero_stage=3 "
        "says what of it."
    ),
    "nproc_per_node num_processes num_gpus gpus devices": "ultrathink launch --nproc {}",
    "tensor_model_parallel_size tensor_parallel_size pipeline_model_parallel_size "
    "context_parallel_size expert_model_parallel_size sequence_parallel": _UNBUILT,
    "cpu_offload fsdp_cpu_offload": "parallel.offload=params",
    # The command.
    "config config_file config_name": "Name the file itself: ultrathink train {}",
    "resume resume_from_checkpoint auto_resume_from_checkpoints load": (
        "A run is resumed with ultrathink train --resume RUN (auto: the newest)."
    ),
    "do_train do_eval overwrite_output_dir trust_remote_code strict group_by_length ddp_timeout "
    "pad_to_sequence_len dataset_prepared_path overwrite_cache preprocessing_num_workers shuffle "
    "save_only_model remove_unused_columns ddp_find_unused_parameters push_to_hub model_type": (
        _NEEDLESS
    ),
}
HABITS: dict[str, dict[str, str]] = {
    name: {ANYTHING: answer} if isinstance(answer, str) else answer
    for names, answer in _ANSWERS.items()
    for name in names.split()
}

# What a value here counts, where another trainer's counts something else.
_NOTES = {
    "training.batch_size": "the sequences of a whole step, over all devices",
    "training.micro_batch_size": (
        "training.batch_size counts the sequences of a whole step, over all devices"
    ),
    "run.dir": "each run is a folder in it, called run.name",
}


def answer(name: str, value: Any, *, in_file: bool) -> str | None:
    """What another trainer's option ``name`` means here, in a sentence; None where it is unknown.

    ``value`` is the user's, None where there is none. The line is one for a YAML file where
    ``in_file``, for the command line otherwise.
    """
    word = shown(value)
    meant = word or ("false" if in_file else "true")  # `fp16:` is off, --fp16 is on
    for pattern, text in HABITS.get(plain_name(name), {}).items():
        if fnmatchcase(meant.lower(), pattern):
            line = _LINE.match(text)
            if line is None:
                return text.replace("{}", word or "…")
            known = word is not None or "{}" not in text
            text = line["value"].replace("{}", word or "")
            return write(line["key"], text if known else None, in_file=in_file)
    return None


def plain_name(name: str) -> str:
    """The name that HABITS knows an option by, given a flag or a key."""
    return name.lstrip("-").replace("-", "_").lower()


def write(key: str, value: str | None, *, in_file: bool) -> str:
    """The sentence that asks for ``key`` to be set to ``value``, which is YAML or None."""
    if value is None:
        return f"The key is {key} here."
    line = f"{key}={value}"
    if in_file and not any(part.isdigit() for part in key.split(".")):
        *sections, name = key.split(".")
        line = ": {".join([*sections, f"{name}: {value}"]) + "}" * len(sections)
    elif not in_file:
        line = shlex.quote(line)
    note = _NOTES.get(key)
    return f"Write {line} ({note})." if note else f"Write {line}."


def shown(value: Any) -> str | None:
    """A value as a line shows it; None where there is none, or it is a section."""
    if value is None or isinstance(value, dict):
        return None
    if isinstance(value, (str, bool, Sequence)):
        return dump_yaml(value, one_line=True)
    return str(value)  # 2e-05, which YAML would write as 2.0e-05
