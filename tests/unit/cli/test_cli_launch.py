"""What ``ultrathink launch`` answers before it starts anything, and what it hands on."""

import pytest
import torch

from ultrathink.cli import launch
from ultrathink.cli.main import load_command, main

Out = pytest.CaptureFixture[str]


def fails(capsys: Out, *words: str) -> str:
    assert main(["launch", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_several_machines_must_be_told_where_to_meet(capsys: Out) -> None:
    told = fails(capsys, "--nnodes", "2", "debug")
    assert "--nnodes 2: say where the machines meet" in told
    assert "--rdzv-endpoint node0:29400" in told


def test_no_processes_are_not_enough(capsys: Out) -> None:
    assert "--nproc is 0; it must be at least 1" in fails(capsys, "--nproc", "0", "debug")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to start with")
def test_without_a_gpu_the_number_must_be_given(capsys: Out) -> None:
    told = fails(capsys, "debug")
    assert "this machine shows no GPU; say how many processes to start" in told


def test_a_flag_that_is_not_known_has_a_suggestion(capsys: Out) -> None:
    assert "did you mean --nproc?" in fails(capsys, "--nprocs=2", "debug")


def test_the_processes_are_started_with_the_arguments_of_train() -> None:
    words = [
        *("--nproc", "2", "debug", "training.max_steps=3", "--plugin", "parts.py", "--json"),
        *("--max-restarts", "1", "--log-dir", "logs"),
    ]
    args = load_command("launch").parser.parse(words)
    assert launch._train_arguments(args) == [
        *("debug", "training.max_steps=3", "--plugin", "parts.py", "--json"),
    ]
    args = load_command("launch").parser.parse(["--resume", "demo@5", "--reset", "data"])
    assert launch._train_arguments(args) == ["--resume", "demo@5", "--reset", "data"]
