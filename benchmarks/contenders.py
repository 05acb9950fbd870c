"""What trains in the processes of the benchmarks: a turn for every line on standard input."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Turns:
    """Counts the tokens of a turn, and waits for the next one when its seconds are over."""

    def __init__(self, shape: dict[str, Any]) -> None:
        self._tokens_per_step = shape["batch_size"] * shape["seq_len"]
        self._is_cuda = shape["device"].startswith("cuda")
        # Standard output is for answers only; everything else goes to standard error.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.beside: dict[str, float] = {}  # what else is to be answered
        self._is_first = os.environ.get("RANK", "0") == "0"  # others wait for it
        self._seconds = math.inf
        self._steps, self._began = 0, time.perf_counter()
        if self._is_first:
            self._begin()

    def step_is_done(self) -> None:
        """Call after each step, when the device has done it; blocks between turns."""
        self._steps += 1
        now = time.perf_counter()
        if now - self._began < self._seconds:
            return
        answer = {
            "tokens_per_second": self._steps * self._tokens_per_step / (now - self._began),
            "peak_memory_mib": peak_memory_mib(self._is_cuda),
            **self.beside,
        }
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()
        self._begin()

    def _begin(self) -> None:
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        self._seconds, self._steps, self._began = float(line), 0, time.perf_counter()


def peak_memory_mib(is_cuda: bool) -> float:
    """The most that this process has held: of the GPU's memory, or resident."""
    if is_cuda:
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def config_of(shape: dict[str, Any], folder: str, *overrides: str) -> Any:
    """The configuration that a user would write for ``shape``; the rest is left to `auto`."""
    from ultrathink import load_config

    return load_config(
        "debug",
        [
            f"run.dir={folder}",
            f"model={json.dumps(shape['model'])}",
            f"tokenizer={{type: bpe, vocab_size: {shape['model']['vocab_size']}}}",
            "data.train=[{type: stdlib}]",
            f"data.seq_len={shape['seq_len']}",
            "data.packing.isolate_documents=false",  # as the peers do
            f"training.device={shape['device']}",
            f"training.batch_size={shape['batch_size']}",
            "training.max_steps=1000000",
            "training.precision=auto",
            "training.compile=auto",
            "training.log_every=10",
            "training.optimizer={type: adamw, lr: 0.001}",
            "training.sample.prompts=[]",
            "training.checkpoint.every_steps=1000000",
            "training.eval.every_steps=1000000",
            "monitoring.sinks=[console, jsonl, tensorboard]",
            *overrides,
        ],
    )


def ultrathink(shape: dict[str, Any]) -> None:
    """The whole trainer: loader, step, callbacks, sinks, bookkeeping."""
    from ultrathink import build_trainer

    turns = Turns(shape)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(shape, folder, *shape.get("overrides", []))
        build_trainer(config, controllers=[_paced(turns)]).fit()


def _paced(turns: Turns) -> Any:
    """A controller that counts steps, and holds up training between turns."""
    from ultrathink.training.callbacks import Controller, StepReport
    from ultrathink.training.control import TrainerControl

    class Paced(Controller):
        def at_boundary(self, report: StepReport, control: TrainerControl) -> None:
            if "communication_share" in report.timing:
                turns.beside["communication_share"] = report.timing["communication_share"]
            turns.step_is_done()

    return Paced()


def bare_loop(shape: dict[str, Any]) -> None:
    """The same compiled model and optimizer on one batch, without anything around it."""
    _bare_loop(shape, whole_logits=False)


def whole_logits(shape: dict[str, Any]) -> None:
    """As ``bare_loop``, with the logits of the whole batch and torch's own cross-entropy."""
    _bare_loop(shape, whole_logits=True)


def _bare_loop(shape: dict[str, Any], *, whole_logits: bool) -> None:
    import torch
    import torch.nn.functional as F

    from ultrathink import build_trainer
    from ultrathink.training.compiling import compile_function
    from ultrathink.training.objectives.pretrain import Sums

    turns = Turns(shape)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(config_of(shape, folder))
        batch = trainer.loader.next_batch()
        input_ids, labels = batch.on(trainer.device, "input_ids", "labels")
        stepper, optimizers = trainer.stepper, trainer.stepper.optimizers
        trainer.model.train()
        losses = trainer.objective.sums
        if whole_logits:

            def plain(ids: Any, labels: Any, *_: Any) -> Any:
                logits = trainer.model(ids).logits.float()
                loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
                return Sums(loss, {}, {})

            losses = compile_function(plain)
        while True:
            loss = losses(input_ids, labels, None, None).loss
            (loss / labels.numel()).backward()
            torch.nn.utils.clip_grad_norm_(stepper.parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            loss.item()
            turns.step_is_done()


def _start_others(shape: dict[str, Any]) -> None:
    """Start the other processes of a contender of several, each as this one; all meet at a file."""
    if "RANK" in os.environ:
        return
    meeting = str(Path(tempfile.mkdtemp(prefix="benchmark-")) / "meeting")
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE=str(shape["processes"]),
        ULTRATHINK_RENDEZVOUS=meeting,
        GLOO_SOCKET_IFNAME="lo",
    )
    for rank in range(1, shape["processes"]):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        subprocess.Popen([sys.executable, *sys.argv], stdin=subprocess.DEVNULL, env=environment)


def ultrathink_together(shape: dict[str, Any]) -> None:
    """The whole trainer on several processes."""
    _start_others(shape)
    overrides = [f"parallel.zero_stage={shape['zero_stage']}"]
    folder = str(Path(os.environ["ULTRATHINK_RENDEZVOUS"]).parent / "runs")  # the same for all
    from ultrathink import build_trainer

    turns = Turns(shape)

    config = config_of(shape, folder, *overrides)
    build_trainer(config, controllers=[_paced(turns)]).fit()


def plain_fsdp2(shape: dict[str, Any]) -> None:
    """What a person would write with FSDP2 for the same model, on batches that lie ready."""
    _start_others(shape)
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from ultrathink.config.model import ModelConfig
    from ultrathink.model.transformer import Transformer
    from ultrathink.parallel.world import join_world
    from ultrathink.training.hardware import choose_precision

    turns, world, device = Turns(shape), join_world(), torch.device(shape["device"])
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**shape["model"])).to(device)
    is_bf16 = choose_precision("auto", device)[0] == "bf16"
    model.compute_dtype = torch.bfloat16 if is_bf16 else None
    model.rope.reserve(shape["seq_len"])
    model.set_attention_backend("blocks" if device.type == "cpu" else "sdpa")
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(model.compute_dtype, torch.float32, cast_forward_inputs=False)
    whole = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)
    reshard = shape["zero_stage"] == 3
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=whole, reshard_after_forward=reshard)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    rows = shape["batch_size"] // world.size
    ids = torch.randint(shape["model"]["vocab_size"], (rows, shape["seq_len"]), device=device)
    while True:
        loss = model(ids, labels=ids.roll(-1, 1)).loss / ids.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        turns.step_is_done()


def _hugging_face(shape: dict[str, Any], *, bf16: bool, compiled: bool) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_hugging_face_sizes(shape)))
    _train_hugging_face(shape, model, bf16=bf16, compiled=compiled)


def _hugging_face_sizes(shape: dict[str, Any]) -> dict[str, Any]:
    sizes = shape["model"]
    return {
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["intermediate_size"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"],
        "num_key_value_heads": sizes["num_kv_heads"],
        "max_position_embeddings": shape["seq_len"],
        "tie_word_embeddings": True,
        "use_cache": False,
    }


def _train_hugging_face(shape: dict[str, Any], model: Any, *, bf16: bool, compiled: bool) -> None:
    import torch

    sizes, device = shape["model"], torch.device(shape["device"])
    model = model.to(device).train()
    call: Callable[..., Any] = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = torch.randint(sizes["vocab_size"], (8, shape["batch_size"], shape["seq_len"]))
    batches = batches.to(device)
    turns, number = Turns(shape), 0
    while True:
        batch = batches[number % len(batches)]
        number += 1
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = call(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        turns.step_is_done()


def hf_compiled_bf16(shape: dict[str, Any]) -> None:
    """Hugging Face's Llama as it is fastest here: bf16 products, compiled."""
    _hugging_face(shape, bf16=True, compiled=True)


def hf_mixtral(shape: dict[str, Any]) -> None:
    """Hugging Face's Mixtral by its grouped products: bf16 products, eager."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    moe = shape["model"]["moe"]
    (group,) = moe["groups"]
    torch.manual_seed(0)
    sizes = _hugging_face_sizes(shape) | {
        "intermediate_size": moe["intermediate_size"],
        "num_local_experts": group["num_experts"],
        "num_experts_per_tok": group["top_k"],
        "experts_implementation": "grouped_mm",
    }
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    assert model.config._experts_implementation == "grouped_mm"
    _train_hugging_face(shape, model, bf16=True, compiled=False)


def hf_default_fp32(shape: dict[str, Any]) -> None:
    """Hugging Face's Llama as a user meets it: fp32, eager."""
    _hugging_face(shape, bf16=False, compiled=False)


if __name__ == "__main__":
    globals()[sys.argv[1]](json.loads(sys.argv[2]))
