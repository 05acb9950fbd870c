"""``ultrathink config``: show, check and explain configurations, without training anything."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ultrathink.cli.arguments import (
    add_config_arguments,
    split_config_and_overrides,
)
from ultrathink.config import docs
from ultrathink.config.loading import load_config
from ultrathink.config.overrides import flatten
from ultrathink.config.schema import Config
from ultrathink.config.size import sizes
from ultrathink.config.training import BUDGETS
from ultrathink.core.errors import ConfigError, UltrathinkError, suggestion

ACTIONS = ("show", "check", "docs", "schema")
EPILOG = """what to do:
  show    print the configuration in full, as training would use it
  check   find what training would refuse: wrong values, missing or unreadable
          files, weights that do not fit
  docs    print the reference of all options, in Markdown
  schema  print a JSON schema, with which editors complete and check YAML files

examples:
  ultrathink config show
  ultrathink config show demo training.optimizer.lr=0.01 --why
  ultrathink config check my.yaml
  ultrathink config schema > ultrathink.schema.json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    # Optional for argparse, so that the message names the actions.
    """Describe the command's arguments."""
    parser.add_argument("action", nargs="?", metavar="|".join(ACTIONS), help="see below")
    add_config_arguments(parser)
    parser.add_argument("--why", action="store_true", help="show: where each value came from")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Show, check or document configurations."""
    if args.action not in ACTIONS:
        said = f", not {args.action!r}. {suggestion(args.action, ACTIONS)}" if args.action else ""
        raise UltrathinkError(f"say what to do: ultrathink config {'|'.join(ACTIONS)}{said}")
    if args.why and args.action != "show":
        raise UltrathinkError(f"--why belongs to 'config show', not to 'config {args.action}'")
    if args.action in ("docs", "schema"):
        _print_reference(args)
        return 0
    source, overrides = split_config_and_overrides(args.positionals)
    config = load_config(source, overrides)
    if config.training.init_from is not None:
        from ultrathink.recipes.parts.pretrained import shown_with_pretrained

        config = shown_with_pretrained(config)
    if args.action == "check":
        from ultrathink.recipes.check import find_problems

        problems = find_problems(config)
        if problems:
            raise ConfigError("\n".join(problems))
        _print_check(source or "demo", config, as_json=args.json)
    else:
        _print_config(config, why=args.why, as_json=args.json)
    return 0


def _print_reference(args: argparse.Namespace) -> None:
    if args.positionals:
        raise UltrathinkError(
            f"'config {args.action}' is about all configurations and takes none, "
            f"not {args.positionals[0]!r}"
        )
    if args.action == "schema":
        _print_json(docs.json_schema(Config))
    elif args.json:
        raise UltrathinkError("'config docs' prints Markdown; for JSON there is 'config schema'")
    else:
        print(docs.markdown(Config), end="")


def _print_config(config: Config, *, why: bool, as_json: bool) -> None:
    tree = config.model_dump(mode="json")
    if as_json and why:
        leaves = flatten(tree)
        _print_json({k: {"value": v, "origin": config.origin(k)} for k, v in leaves.items()})
    elif as_json:
        _print_json(tree)
    else:
        print(docs.to_yaml(config, why=why), end="")


def _print_check(name: str, config: Config, *, as_json: bool) -> None:
    parameters = sizes(config.model)
    tokens_per_step = config.training.batch_size * config.data.seq_len
    length = next(key for key in BUDGETS if getattr(config.training, key) is not None)
    amount = getattr(config.training, length)
    if as_json:
        _print_json(
            {
                "config": name,
                "parameters": parameters.total,
                "active_parameters": parameters.active,
                "tokens_per_step": tokens_per_step,
                length: amount,
            }
        )
        return
    model = config.model
    print(f"{name}: fine")
    active = f", {parameters.active:,} active" if model.moe is not None else ""
    print(
        f"  model   {parameters.total:,} parameters{active} "
        f"({model.num_layers} layers of {model.hidden_size}, {model.vocab_size:,} tokens)"
    )
    print(
        f"  step    {tokens_per_step:,} tokens "
        f"({config.training.batch_size} sequences of {config.data.seq_len})"
    )
    print(f"  length  {_length_in_words(length, amount, tokens_per_step)}")


def _length_in_words(length: str, amount: float, tokens_per_step: int) -> str:
    if length == "max_steps":
        return f"{amount:,} steps ({amount * tokens_per_step:,} tokens)"
    if length == "max_tokens":
        return f"{amount:,} tokens ({-(-int(amount) // tokens_per_step):,} steps)"
    if length == "max_minutes":
        return f"{amount:g} minutes; the number of steps depends on the machine"
    return f"{amount:g} passes over the data"


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))
