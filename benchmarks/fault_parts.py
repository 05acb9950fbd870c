"""Faults and controllers by name: those of this folder, and those of somebody else's files."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_injection import GROUPS, Fault

from ultrathink.core.errors import UltrathinkError, suggestion

HERE = Path(__file__).parent
MODELS = ("dense", "moe")
BARE = "none"  # the controller that all are compared with


@dataclass(frozen=True)
class Part:
    """A fault or a controller: its name, its file, and the hash of that."""

    name: str
    file: str
    sha256: str


def known_faults(files: Iterable[Path] = ()) -> dict[str, Part]:
    """The faults of ``fault_cases/`` and of ``files``, by the names that they give themselves."""
    found: dict[str, Part] = {}
    for file in [*_files_of("fault_cases"), *files]:
        fault = fault_of(file)()
        _add(found, fault.name, file, "fault")
    return found


def known_controllers(files: Iterable[Path] = ()) -> dict[str, Part]:
    """The controllers of ``fault_controllers/`` and of ``files``, called like their files."""
    found: dict[str, Part] = {}
    for file in [*_files_of("fault_controllers"), *files]:
        controller_of(file)
        _add(found, file.stem, file, "controller")
    return {BARE: found.pop(BARE), **found}


def fault_of(file: Path) -> type[Fault]:
    """What a file calls ``FAULT``; UltrathinkError where that is no fault."""
    fault = _named_in(file, "FAULT", "class MyFault(Fault): …; FAULT = MyFault")
    if not (isinstance(fault, type) and issubclass(fault, Fault)):
        raise UltrathinkError(
            f"FAULT in {file} is {fault!r}, and no class derived from fault_injection.Fault."
        )
    for field, allowed in (
        ("group", GROUPS),
        ("model", MODELS),
        ("follows", ("time", "data")),
    ):
        value = getattr(fault, field)
        if value not in allowed:
            raise UltrathinkError(
                f"{field} = {value!r} of the fault in {file} is none of {', '.join(allowed)}."
            )
    if not fault.name:
        raise UltrathinkError(f"the fault in {file} has no name; give the class one: name = '…'.")
    return fault


def controller_of(file: Path) -> Callable[[], Any]:
    """What a file calls ``CONTROLLER``: it makes one for a run. UltrathinkError where it cannot."""
    factory = _named_in(file, "CONTROLLER", "class MyController: …; CONTROLLER = MyController")
    if not callable(factory):
        raise UltrathinkError(
            f"CONTROLLER in {file} is {factory!r}, and nothing that makes a controller when called."
        )
    made: Callable[[], Any] = factory
    return made


def chosen(names: Iterable[str] | None, known: dict[str, Part], what: str) -> dict[str, Part]:
    """Those of ``known`` that are named, or all; UltrathinkError for a name there is not."""
    if names is None:
        return known
    for name in names:
        if name not in known:
            raise UltrathinkError(f"{name!r} is no {what}. {suggestion(name, known)}")
    return {name: known[name] for name in dict.fromkeys(names)}


def _files_of(folder: str) -> list[Path]:
    return sorted((HERE / folder).glob("*.py"))


def _add(found: dict[str, Part], name: str, file: Path, what: str) -> None:
    if name in found:
        raise UltrathinkError(
            f"{file} calls its {what} {name!r}, and so does {found[name].file}; rename one of them."
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    found[name] = Part(name, str(file.resolve()), digest)


def _named_in(file: Path, name: str, example: str) -> Any:
    if not file.is_file():
        raise UltrathinkError(f"there is no file {file}.")
    spec = importlib.util.spec_from_file_location(f"fault_part_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UltrathinkError(f"{file} is no Python file; give one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UltrathinkError(
            f"{file} cannot be run: {type(error).__name__}: {error}. Mend it, and restart."
        ) from error
    if not hasattr(module, name):
        raise UltrathinkError(f"{file} does not say what its {name} is. Write in it: {example}.")
    return getattr(module, name)
