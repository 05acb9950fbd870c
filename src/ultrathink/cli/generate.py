"""``ultrathink generate``: continue a text with a trained model."""

from __future__ import annotations

import argparse
import json
import sys
import time

from ultrathink.core.streams import print_stderr

EPILOG = """examples:
  ultrathink generate demo "def main():"
  ultrathink generate runs/demo@last "import " --temperature 0
  ultrathink generate demo "def main():" --path fast
  ultrathink generate demo "class " --top-k 40 --seed 1 --stop "\\nclass"
  echo "def f(x):" | ultrathink generate demo -
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ultrathink generate``."""
    parser.add_argument("run", metavar="RUN", help="run name or folder, or RUN@best|last|step")
    parser.add_argument(
        "prompt", metavar="PROMPT", help="text to continue; - reads it from standard input"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=200,
        metavar="N",
        help="tokens to write (default: 200)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="0 is greedy (default: 0.7)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest tokens that sum to P"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed writes the same text")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text (repeatable)",
    )
    parser.add_argument(
        "--path",
        metavar="NAME",
        help="compute path: fast, standard, expert, deep, ultra_deep, or one of model.paths "
        "(default: the whole model)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of streaming"
    )


def run(args: argparse.Namespace) -> int:
    """Print the text as the model writes it, or one JSON object at the end."""
    from ultrathink.inference.engine import Engine
    from ultrathink.inference.sampling import SamplingParams
    from ultrathink.model.compute_path import path_of
    from ultrathink.runs.folder import find_run, split_run
    from ultrathink.runs.loading import load_model
    from ultrathink.training.hardware import choose_device

    params = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in args.stop),
    )
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    name, checkpoint = split_run(args.run, "best")
    model, tokenizer = load_model(name, checkpoint, device=choose_device(args.device))
    path_of(args.path, model.config)  # before the prompt is printed
    engine = Engine(model, tokenizer)
    config, given = find_run(name).read_config(), len(tokenizer.encode(prompt))
    trained = max(config.data.seq_len, config.model.max_positions or 0)
    if given > trained:
        print_stderr(
            f"note: the prompt has {given:,} tokens, and the model was trained on sequences of "
            f"{trained:,}: it reads them all, but what it writes may be poor. Shorten the prompt, "
            f"or train with a larger data.seq_len."
        )
    if not args.json:
        print(prompt, end="", flush=True)
        for piece in engine.stream(prompt, params, path=args.path):
            print(piece, end="", flush=True)
        print()
        return 0
    began = time.perf_counter()
    result = engine.generate(prompt, params, path=args.path)
    seconds = time.perf_counter() - began
    print(
        json.dumps(
            {
                "run": name,
                "path": args.path,
                "prompt": prompt,
                "text": result.text,
                "prompt_tokens": result.prompt_tokens,
                "new_tokens": result.new_tokens,
                "finish_reason": result.finish_reason,
                "tokens_per_sec": result.new_tokens / max(seconds, 1e-9),
            },
        )
    )
    return 0
