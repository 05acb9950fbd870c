"""Options from the documentation of other trainers, and what has to be written here.

Names and values are those of public examples: Transformers' ``TrainingArguments`` and TRL's
``SFTConfig``; axolotl, ``examples/llama-3/fft-8b.yaml``; LLaMA-Factory,
``examples/extras/muon/qwen2_full_sft.yaml``; nanoGPT, ``config/train_shakespeare_char.py``;
Megatron-LM, ``examples/gpt3/train_gpt3_175b_distributed.sh``; torchtune,
``recipes/configs/llama3/8B_full.yaml``.
"""

# The option, its value as YAML, and the line that is right here: an override, or words of a
# sentence where nothing is to be set.
TRANSFORMERS = """
max_steps | 10 | training.max_steps=10
max_steps | -1 | training.epochs=1
num_train_epochs | 3.0 | training.epochs=3.0
per_device_train_batch_size | 8 | training.micro_batch_size=8
per_device_eval_batch_size | 4 | training.eval.batch_size=4
gradient_accumulation_steps | 4 | batch_size = micro_batch_size x accumulation x devices
learning_rate | 2e-5 | training.optimizer.lr=2e-05
weight_decay | 0.01 | training.optimizer.weight_decay=0.01
adam_beta1 | 0.9 | training.optimizer.betas=[0.9, 0.95]
adam_beta2 | 0.999 | training.optimizer.betas=[0.9, 0.999]
adam_epsilon | 1e-8 | training.optimizer.eps=1e-08
max_grad_norm | 1.0 | training.clip=1.0
lr_scheduler_type | cosine | training.schedule=cosine
lr_scheduler_type | linear | training.schedule={type: wsd, decay: 95%}
lr_scheduler_type | constant_with_warmup | training.schedule={type: wsd, decay: 0}
warmup_ratio | 0.03 | training.schedule.warmup=0.03
warmup_steps | 100 | training.schedule.warmup=100
optim | adamw_torch_fused | training.optimizer=adamw
bf16 | true | training.precision=bf16
bf16 | false | training.precision=fp32
fp16 | true | There is no fp16
gradient_checkpointing | true | training.activation_checkpointing=full
gradient_checkpointing | false | training.activation_checkpointing=none
torch_compile | true | training.compile=true
logging_steps | 10 | training.log_every=10
eval_steps | 500 | training.eval.every_steps=500
eval_strategy | steps | training.eval.every_steps=500
save_steps | 500 | training.checkpoint.every_steps=500
save_total_limit | 2 | training.checkpoint.keep=2
load_best_model_at_end | true | training.checkpoint.best_by=loss
report_to | wandb | monitoring.sinks=[console, jsonl, tensorboard]
report_to | none | monitoring.sinks=[console, jsonl]
run_name | first | run.name=first
output_dir | out/first | run.dir=out/first
seed | 42 | run.seed=42
dataloader_num_workers | 4 | data.num_workers=4
resume_from_checkpoint | true | ultrathink train --resume RUN
attn_implementation | flash_attention_2 | model.attention.backend=auto
max_length | 1024 | data.seq_len=1024
packing | true | data.packing.enabled=true
deepspeed | ds_config.json | parallel.zero_stage=3
num_hidden_layers | 12 | model.num_layers=12
max_position_embeddings | 2048 | model.max_positions=2048
"""
AXOLOTL = """
base_model | meta-llama/Meta-Llama-3-8B | training.init_from=hf:meta-llama/Meta-Llama-3-8B
datasets | [{path: tatsu-lab/alpaca, type: alpaca}] | data.train=[{type: text, path: books/}]
val_set_size | 0.05 | data.train.0.val_fraction=0.05
sequence_len | 512 | data.seq_len=512
sample_packing | true | data.packing.enabled=true
micro_batch_size | 2 | training.micro_batch_size=2
num_epochs | 1 | training.epochs=1
optimizer | paged_adamw_8bit | training.optimizer=adamw
lr_scheduler | cosine | training.schedule=cosine
flash_attention | true | model.attention.backend=auto
load_in_4bit | true | no LoRA and no quantized training yet
adapter | lora | no LoRA and no quantized training yet
wandb_project | llama | no sink for W&B
group_by_length | false | leave it out
early_stopping_patience | 3 | orchestrator.mode=act
fsdp | full_shard | parallel.zero_stage=3
"""
LLAMA_FACTORY = """
model_name_or_path | Qwen/Qwen2-1.5B | training.init_from=hf:Qwen/Qwen2-1.5B
stage | sft | no chat templates yet
do_train | true | leave it out
finetuning_type | full | All weights are trained
use_muon | true | training.optimizer=muon
dataset | identity,alpaca_en_demo | data.train=[{type: text, path: books/}]
template | qwen | no chat templates yet
cutoff_len | 2048 | data.seq_len=2048
overwrite_output_dir | true | leave it out
plot_loss | true | ultrathink report RUN
val_size | 0.1 | data.train.0.val_fraction=0.1
"""
NANOGPT = """
out_dir | out-shakespeare | run.dir=out-shakespeare
eval_interval | 250 | training.eval.every_steps=250
eval_iters | 200 | training.eval.max_tokens=100000
log_interval | 10 | training.log_every=10
init_from | scratch | run.seed=0
init_from | gpt2-xl | training.init_from=hf:gpt2-xl
batch_size | 64 | training.batch_size=64
block_size | 256 | data.seq_len=256
n_layer | 6 | model.num_layers=6
n_head | 4 | model.num_heads=4
n_embd | 384 | model.hidden_size=384
bias | false | no biases
max_iters | 5000 | training.max_steps=5000
lr_decay_iters | 5000 | leave it out
min_lr | 1e-4 | training.schedule.min_ratio=0.1
beta2 | 0.99 | training.optimizer.betas=[0.9, 0.99]
warmup_iters | 100 | training.schedule.warmup=100
grad_clip | 0.0 | training.clip=null
dtype | bfloat16 | training.precision=bf16
"""
MEGATRON = """
num-layers | 24 | model.num_layers=24
hidden-size | 1024 | model.hidden_size=1024
num-attention-heads | 16 | model.num_heads=16
num-query-groups | 2 | model.num_kv_heads=2
seq-length | 2048 | data.seq_len=2048
global-batch-size | 1536 | training.batch_size=1536
train-iters | 500000 | training.max_steps=500000
lr | 6.0e-5 | training.optimizer.lr=6e-05
lr-warmup-fraction | .001 | training.schedule.warmup=0.001
clip-grad | 1.0 | training.clip=1.0
init-method-std | 0.006 | model.init.std=0.006
tensor-model-parallel-size | 8 | not built yet
pipeline-model-parallel-size | 16 | not built yet
data-path | corpus.jsonl | data.train=[{type: jsonl, path: corpus.jsonl}]
split | 949,50,1 | val_fraction
save-interval | 10000 | training.checkpoint.every_steps=10000
num-experts | 8 | model.moe.groups=[{name: experts, num_experts: 8, top_k: 2}]
untie-embeddings-and-output-weights | true | model.tie_embeddings=false
swiglu | true | model.feed_forward=swiglu
"""
TORCHTUNE = """
epochs | 3 | training.epochs=3
compile | false | training.compile=false
enable_activation_checkpointing | true | training.activation_checkpointing=full
device | cuda | training.device=cuda
log_every_n_steps | 1 | training.log_every=1
nproc_per_node | 4 | ultrathink launch --nproc 4
"""
HABITS = {
    f"{trainer}: {row.split(' | ')[0]} {row.split(' | ')[1]}": tuple(row.split(" | "))
    for trainer, rows in {
        "transformers": TRANSFORMERS,
        "axolotl": AXOLOTL,
        "llama-factory": LLAMA_FACTORY,
        "nanogpt": NANOGPT,
        "megatron": MEGATRON,
        "torchtune": TORCHTUNE,
    }.items()
    for row in rows.strip().splitlines()
}
