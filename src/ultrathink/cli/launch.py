"""``ultrathink launch``: one run on several processes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ultrathink.cli import train
from ultrathink.core.errors import UltrathinkError
from ultrathink.core.streams import print_stderr

EPILOG = """examples:
  ultrathink launch --nproc 2 debug     two processes on this machine
  ultrathink launch my.yaml             one process for each of its GPUs
  ultrathink launch --nproc 4 my.yaml parallel.dp_replicate=2
  ultrathink launch --nproc 2 --resume demo
                                        resume, with any number of processes
  ultrathink launch --nnodes 2 --rdzv-endpoint node0:29400 my.yaml
                                        the same command on both machines
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ultrathink launch``: its own, and those of ``train``."""
    train.configure(parser)
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--nproc", type=int, metavar="N", help="processes on this machine (default: its GPUs)"
    )
    group.add_argument(
        "--nnodes", type=int, default=1, metavar="M", help="machines that train together"
    )
    group.add_argument(
        "--rdzv-endpoint",
        metavar="HOST:PORT",
        help="one of several machines, and a port that is free there",
    )
    group.add_argument(
        "--rdzv-id", default="ultrathink", metavar="ID", help="a name for this job among others"
    )
    group.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="K",
        help="restarts of all processes after one was killed or hung (default: 3)",
    )
    group.add_argument(
        "--log-dir", type=Path, metavar="FOLDER", help="write what each process prints to files"
    )


def run(args: argparse.Namespace) -> int:
    """Start the processes and wait for them; returns what ``train`` would."""
    if args.nnodes > 1 and args.rdzv_endpoint is None:
        raise UltrathinkError(
            f"--nnodes {args.nnodes}: name one of the machines and a port, the same on all of "
            f"them, for example --rdzv-endpoint node0:29400."
        )
    num_processes = args.nproc if args.nproc is not None else _num_gpus()
    if num_processes < 1:
        raise UltrathinkError(f"--nproc is {num_processes}; it must be at least 1.")
    from ultrathink.parallel.launching import Launch, launch

    command = (sys.executable, "-u", "-m", "ultrathink", "train", *_train_arguments(args))
    result = launch(
        Launch(
            command,
            num_processes,
            num_nodes=args.nnodes,
            endpoint=args.rdzv_endpoint,
            run_id=args.rdzv_id,
            max_restarts=args.max_restarts,
            log_folder=args.log_dir,
        ),
        report=print_stderr,
    )
    if result.reason and result.status not in (2, 70):
        print_stderr(f"error: {result.reason}.")
    return result.status


def _num_gpus() -> int:
    import torch

    if not torch.cuda.is_available():
        raise UltrathinkError(
            "this machine shows no GPU; say how many processes to start, for example --nproc 2."
        )
    return torch.cuda.device_count()


def _train_arguments(args: argparse.Namespace) -> list[str]:
    """The arguments that each process is started with."""
    words = [*args.positionals]
    if args.resume is not None:
        words += ["--resume", args.resume]
    for part in args.reset:
        words += ["--reset", part]
    for plugin in args.plugin:
        words += ["--plugin", str(plugin)]
    words += ["--json"] * args.json + ["--debug"] * args.debug
    return words
