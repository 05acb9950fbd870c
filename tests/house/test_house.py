"""The rules of the house: style, types, layers, and files and functions that fit a screen."""

import ast
import subprocess
import sys
from collections.abc import Iterator
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


def test_ruff_finds_nothing_and_all_is_formatted() -> None:
    check("-m", "ruff", "check", "--no-cache")
    check("-m", "ruff", "format", "--no-cache", "--diff")


@pytest.mark.long
def test_mypy_finds_nothing() -> None:
    check("-m", "mypy")


def test_layers_import_from_below_only() -> None:
    # The command lint-imports has no module to run, but this is all it does.
    check("-c", "from importlinter.cli import lint_imports_command as run; run()")


def test_files_fit_a_screen_and_say_what_they_hold() -> None:
    assert len(FILES) > 50
    found = [f"{file.relative_to(ROOT)}{offence}" for file in FILES for offence in _offences(file)]
    assert found == []


def _offences(file: Path) -> Iterator[str]:
    """What a file does that the house forbids, each beginning with the place in the file."""
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    if len(text.splitlines()) >= MAX_FILE_LINES:
        yield f": {len(text.splitlines())} lines"
    if file.stem in ("utils", "helpers", "misc", "common"):
        yield ": collects strangers"
    if any(word in file.stem for word in ("advanced", "enhanced")):
        yield ": praises itself"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length >= MAX_FUNCTION_LINES:
                yield f":{node.lineno} {node.name}: {length} lines"
    if not file.is_relative_to(ROOT / "src"):
        return
    if tree.body and not ast.get_docstring(tree):
        yield ": no docstring"
    for node in tree.body:
        is_public = isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_"
        is_overload = any(
            ast.unparse(one) == "overload" for one in getattr(node, "decorator_list", ())
        )
        if is_public and not is_overload and not ast.get_docstring(node):
            yield f":{node.lineno} {node.name}: no docstring"
