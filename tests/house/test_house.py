"""The rules of the house: style, types, layers, and files and functions that fit a screen."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
FOLDERS = ("src", "tests", "benchmarks", "examples")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))


def check(*command: str) -> None:
    """Run a tool of this interpreter's environment; what it prints is the failure."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_ruff_finds_nothing() -> None:
    check("-m", "ruff", "check", "--no-cache")


def test_files_are_formatted() -> None:
    check("-m", "ruff", "format", "--no-cache", "--diff")


@pytest.mark.slow
def test_mypy_finds_nothing() -> None:
    check("-m", "mypy")


def test_layers_import_from_below_only() -> None:
    # The command lint-imports has no module to run, but this is all it does.
    check("-c", "from importlinter.cli import lint_imports_command as run; run()")


def test_there_are_files_to_look_at() -> None:
    assert len(FILES) > 50


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_fit_a_screen(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    num_lines = len(text.splitlines())
    assert num_lines < MAX_FILE_LINES, f"{file}: {num_lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length < MAX_FUNCTION_LINES, f"{file}:{node.lineno} {node.name}: {length} lines"


PACKAGE = [file for file in FILES if file.is_relative_to(ROOT / "src")]


@pytest.mark.parametrize("file", PACKAGE, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_is_public_says_what_it_is(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if tree.body:
        assert ast.get_docstring(tree), f"{file} does not say what it holds"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{file}:{node.lineno} {node.name} has no docstring"


def test_no_file_collects_strangers() -> None:
    bad = ("utils", "helpers", "misc", "common")
    assert [str(file) for file in FILES if file.stem in bad] == []
    assert [
        str(file) for file in FILES if any(word in file.stem for word in ("advanced", "enhanced"))
    ] == []
