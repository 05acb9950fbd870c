"""Checkpoints: tensors as safetensors through torch's distributed checkpoint, the rest as JSON.

A checkpoint is a folder; nothing in it is pickled:

    model-00001-of-00002.safetensors   the model's tensors
    model-00002-of-00002.safetensors   all others: optimizer, random states
    model.safetensors.index.json       which tensor is in which file
    state.json                         the kind of checkpoint, and everything that is not a tensor
    checksums.json                     size and SHA-256 of all these files, written last
    snapshots/step_00000600/           embedded snapshot, for a steered run to roll back to

It is written under a temporary name and renamed, so a crash never leaves half of one.

With several processes each writes its own shards, all at the same time:

    shard-00001-model-00001-of-00002.safetensors   the first process's shards of the model's tensors

The header of a file says where its shards belong, the index (``shards``) which files hold a
tensor. Any number of processes can read it.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from ultrathink.core.errors import CheckpointError
from ultrathink.core.files import clean_up, replace_folder, sync_file, sync_folder, write_atomic
from ultrathink.core.protocols import State
from ultrathink.core.shards import Region, TensorShard
from ultrathink.core.store import LocalStore, SharedStore

if TYPE_CHECKING:
    from torch import Tensor

    from ultrathink.checkpoint.tensor_files import Shapes

STATE_FILE = "state.json"
INDEX_FILE = "model.safetensors.index.json"
CHECKSUM_FILE = "checksums.json"
MODEL = "model/"  # prefix of the model's tensors
# Two numbers, because a reader that does not know shards would take the first for the whole tensor.
FORMAT, FORMAT_SHARDED = 3, 5
_TENSOR = "__tensor__"  # in state.json, marks the place of a tensor, with its name

Wanted: TypeAlias = Callable[[str], bool]  # chooses tensors by name
Check: TypeAlias = Callable[[], None]
# Writes more into the folder that will become a checkpoint; every process calls it.
Addition: TypeAlias = Callable[[Path, Check, SharedStore], None]


Kind: TypeAlias = Literal["model", "adapter", "reward", "probe"]


class Header(NamedTuple):
    """The kind of a checkpoint; ``base`` is the hash of the model that an adapter belongs to."""

    kind: Kind = "model"
    base: str | None = None


WHOLE_MODEL = Header()


class DamagedCheckpointError(CheckpointError):
    """The checkpoint ``folder`` differs from what was written; ``problem`` says how."""

    def __init__(self, folder: Path, problem: str, advice: str | None = None) -> None:
        super().__init__(
            f"checkpoint {folder} is damaged: {problem}. "
            f"{advice or 'Use an earlier one: --resume RUN@STEP.'}"
        )
        self.folder = folder
        self.problem = problem

    @classmethod
    def unreadable(cls, folder: Path, what: str, error: Exception) -> DamagedCheckpointError:
        """For a file or part of ``folder`` that raised ``error``; only its first line is used."""
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        reason = text.strip().splitlines()[0] if text.strip() else repr(error)
        return cls(folder, f"{what} cannot be read ({reason})")


def everything(name: str) -> bool:
    """Selects every tensor."""
    return True


def weights(name: str) -> bool:
    """Selects the model's tensors."""
    return name.startswith(MODEL)


# -- writing and reading --------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    state: State,
    check: Check = lambda: None,
    store: SharedStore | None = None,
    once_whole: Callable[[], None] = lambda: None,
    add: Addition = lambda beside, check, store: None,
    header: Header = WHOLE_MODEL,
) -> None:
    """Write nested ``state`` (plain values, tensors, shards) to ``folder``, all of it or nothing.

    ``check`` is called often; an exception that it raises ends the save. Raises OSError, with its
    number and file, when the disk fails. Any thread may call it. All processes that share ``store``
    call it, each with its own shards; the first also writes everything that is not divided and
    calls ``once_whole``. Every process calls ``add``, which writes files with their own checksums.
    """
    store = store or LocalStore()
    tensors: dict[str, Tensor | TensorShard] = {}
    plain = _take_tensors(state, "", tensors)
    beside = folder.with_name(f".{folder.name}.tmp")
    with _disk_errors_named(folder):
        if store.rank > 0:
            [has_begun] = store.wait_for(["begun"], check)
            if has_begun:
                add(beside, check, store)
                _write_my_files(beside, tensors, check, store)
            [failure] = store.wait_for(["end"], check)
            if failure is not None:
                raise OSError(*failure)
            return
        has_begun = False
        try:
            clean_up(beside)
            beside.mkdir(parents=True)
            has_begun = True
            store.put("begun", True)
            add(beside, check, store)
            _write_my_files(beside, tensors, check, store)
            _complete(beside, plain, check, store, header)
            replace_folder(beside, folder)
            once_whole()
        except BaseException as error:
            clean_up(beside)
            if not has_begun:
                store.put("begun", False)
            store.put("end", _plainly(error))
            raise
        store.put("end", None)


def _write_my_files(
    beside: Path, tensors: dict[str, Tensor | TensorShard], check: Check, store: SharedStore
) -> None:
    """Write this process's tensors; report to the first what each file holds, with checksums."""
    from ultrathink.checkpoint.tensor_files import write_tensors  # a second to import

    process = store.rank + 1 if store.size > 1 else None
    try:
        names = write_tensors(beside, tensors, _file_numbers(tensors), check, process)
        sums = {}
        for name in names:
            check()
            sync_file(beside / name)
            sums[name] = _checksum(beside / name)
    except BaseException as error:
        store.put(f"written/{store.rank}", {"failure": _plainly(error)})
        raise
    store.put(f"written/{store.rank}", {"names": names, "sums": sums})


def _complete(beside: Path, plain: Any, check: Check, store: SharedStore, header: Header) -> None:
    """Write the other files, once all processes have written their tensors."""
    written = [f"written/{rank}" for rank in range(store.size)]
    everyones = store.wait_for(written, check)
    store.forget(written)
    for one in everyones:
        if "failure" in one:
            raise OSError(*one["failure"])
    sums = {name: entry for one in everyones for name, entry in one["sums"].items()}
    files_of_name: dict[str, list[str]] = {}
    for file, names in (item for one in everyones for item in one["names"].items()):
        for name in names:
            files_of_name.setdefault(name, []).append(file)
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(entry["size"] for entry in sums.values())},
        "weight_map": {name: files[0] for name, files in files_of_name.items()},
    }
    if store.size > 1:
        index["shards"] = files_of_name
    form = FORMAT if store.size == 1 else FORMAT_SHARDED
    content = {"format": form, **header._asdict(), "state": plain}
    (beside / STATE_FILE).write_text(json.dumps(content), encoding="utf-8")
    (beside / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    for name in (STATE_FILE, INDEX_FILE):
        check()
        sync_file(beside / name)
        sums[name] = _checksum(beside / name)
    write_atomic(beside / CHECKSUM_FILE, json.dumps(sums, separators=(",", ":"), sort_keys=True))
    sync_folder(beside)
    check()


def _plainly(error: BaseException) -> tuple[int, str]:
    """An error as number and text, for another process to raise."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror or str(error)
    return errno.EIO, f"{type(error).__name__}: {error}"


def load_checkpoint(
    folder: Path,
    wanted: Wanted = everything,
    region: Region | None = None,
    kind: Kind = "model",
) -> State:
    """Verify the checksums of a checkpoint and read it back as it was saved, on the CPU.

    ``wanted`` selects tensors by their slash-separated name ("model/layers.0…"); the others are
    None, and files without a wanted tensor are not read. ``region`` selects parts of tensors.
    Raises DamagedCheckpointError, and CheckpointError for another ``kind``.
    """
    from ultrathink.checkpoint.tensor_files import read_tensors

    verify_checkpoint(folder, files_of(folder, wanted))
    check_kind(folder, kind)
    plain = read_state(folder)
    tensors = read_tensors(folder, _holding(folder, wanted), wanted, region)
    state: State = _put_tensors(plain, tensors)
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, with the names of tensors in place of the tensors."""
    state = _read_content(folder)["state"]
    assert isinstance(state, dict)
    return state


def read_header(folder: Path) -> Header:
    """The kind of the checkpoint, and what it belongs to."""
    content = _read_content(folder)
    return Header(content["kind"], content["base"])


def check_kind(folder: Path, wanted: Kind) -> None:
    """Raise CheckpointError unless the checkpoint is of the ``wanted`` kind."""
    kind, base = read_header(folder)
    if kind != wanted:
        adds_to = f", made for the model {base[:12]}" if base is not None else ""
        raise CheckpointError(
            f"checkpoint {folder} is of kind {kind!r}{adds_to}, but this command needs kind "
            f"{wanted!r}; name a run that trained one."
        )


def _read_content(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        form = content["format"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {STATE_FILE}; "
            f"name a folder like runs/demo/checkpoints/step_00000100."
        ) from None
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedCheckpointError.unreadable(folder, STATE_FILE, error) from None
    if form not in (FORMAT, FORMAT_SHARDED):
        raise CheckpointError(
            f"{folder} was written by another version of ultrathink (format {form!r}, this version "
            f"reads {FORMAT} and {FORMAT_SHARDED}); use that version (the run's manifest.json "
            f"names it) or start a new run."
        )
    checked: dict[str, Any] = content
    return checked


def tensor_shapes(folder: Path) -> Shapes:
    """The shape and type of every tensor in a checkpoint, without reading them."""
    from ultrathink.checkpoint.tensor_files import read_shapes

    files = _holding(folder, everything)
    try:
        return read_shapes(folder, files)
    except Exception as error:  # the parser raises many kinds
        raise DamagedCheckpointError.unreadable(folder, "its tensors", error) from error


def read_few(folder: Path, wanted: Wanted) -> dict[str, Tensor]:
    """A few small tensors by name, without verifying files, which would read all of them."""
    from ultrathink.checkpoint.tensor_files import read_tensors

    try:
        found = read_tensors(folder, _holding(folder, wanted), wanted, None)
    except Exception as error:  # the parser raises many kinds
        raise DamagedCheckpointError.unreadable(folder, "its tensors", error) from error
    return {name: value for name, value in found.items() if not isinstance(value, TensorShard)}


# -- checksums ------------------------------------------------------------------------------------


def verify_checkpoint(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare files of a checkpoint (by default all) with their recorded size and SHA-256.

    Raises DamagedCheckpointError for the first that differs.
    """
    sums = _read_checksums(folder)
    for name in sorted({STATE_FILE, INDEX_FILE, *sums} if names is None else names):
        _check_size(folder, name, sums)
        try:
            differs = _checksum(folder / name) != sums[name]
        except OSError as error:
            raise DamagedCheckpointError.unreadable(folder, name, error) from None
        if differs:
            raise DamagedCheckpointError(folder, f"{name}: content differs from its checksum")


def files_of(folder: Path, wanted: Wanted) -> list[str]:
    """The files that must be read for the ``wanted`` tensors."""
    verify_checkpoint(folder, [INDEX_FILE])
    return [STATE_FILE, INDEX_FILE, *sorted(_holding(folder, wanted))]


def has_its_sizes(folder: Path) -> bool:
    """Whether every file exists and has its recorded size; the content is not checked."""
    try:
        sums = _read_checksums(folder)
        for name in {STATE_FILE, INDEX_FILE, *sums}:
            _check_size(folder, name, sums)
    except DamagedCheckpointError:
        return False
    return True


def _checksum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def _read_checksums(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        sums = json.loads((folder / CHECKSUM_FILE).read_text(encoding="utf-8"))
        if not all(entry.keys() == {"size", "sha256"} for entry in sums.values()):
            raise ValueError("not a list of sizes and checksums")
    except FileNotFoundError:
        raise DamagedCheckpointError(
            folder, f"{CHECKSUM_FILE} is missing, so the write did not finish"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError.unreadable(folder, CHECKSUM_FILE, error) from None
    checked: dict[str, dict[str, Any]] = sums
    return checked


def _check_size(folder: Path, name: str, sums: Mapping[str, Mapping[str, Any]]) -> None:
    if name not in sums:
        raise DamagedCheckpointError(folder, f"{name} is not in {CHECKSUM_FILE}")
    try:
        size = (folder / name).stat().st_size
    except FileNotFoundError:
        raise DamagedCheckpointError(folder, f"{name} is missing") from None
    except OSError as error:
        raise DamagedCheckpointError.unreadable(folder, name, error) from None
    if size != sums[name]["size"]:
        raise DamagedCheckpointError(
            folder, f"{name} has {size} bytes instead of {sums[name]['size']}"
        )


@contextmanager
def _disk_errors_named(folder: Path) -> Iterator[None]:
    """Add the folder to an OSError of a write, which lacks it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error


# -- the state without its tensors ----------------------------------------------------------------


def _take_tensors(node: Any, path: str, tensors: dict[str, Tensor | TensorShard]) -> Any:
    """A copy of ``node`` with each tensor moved to ``tensors`` and its name in its place."""
    from torch import Tensor  # not at the top: reading state.json needs no torch

    if isinstance(node, Tensor | TensorShard):
        # safetensors accepts contiguous tensors only
        tensors[path] = node.detach().contiguous() if isinstance(node, Tensor) else node
        return {_TENSOR: path}
    if isinstance(node, Mapping):
        return {
            str(key): _take_tensors(value, f"{path}/{key}" if path else str(key), tensors)
            for key, value in node.items()
        }
    if isinstance(node, list | tuple):
        return [_take_tensors(value, f"{path}/{i}", tensors) for i, value in enumerate(node)]
    if node is None or isinstance(node, str | int | float | bool):
        return node
    raise TypeError(f"a checkpoint cannot hold {type(node).__name__} (at {path})")


def _put_tensors(node: Any, tensors: Mapping[str, Tensor | TensorShard]) -> Any:
    """``node`` with the tensors back in their places, None for those that were not wanted."""
    if isinstance(node, dict):
        if _TENSOR in node:
            return tensors.get(node[_TENSOR])
        return {key: _put_tensors(value, tensors) for key, value in node.items()}
    if isinstance(node, list):
        return [_put_tensors(value, tensors) for value in node]
    return node


# -- which tensor is in which file ---------------------------------------------------------------


def _file_numbers(names: Iterable[str]) -> dict[str, int]:
    """The model's tensors go to file 1, all others to file 2; no file is empty."""
    has_weights = any(weights(name) for name in names)
    return {name: 1 if weights(name) or not has_weights else 2 for name in names}


def holding(folder: Path) -> dict[str, list[str]]:
    """The files of each tensor: one, or several with a shard each."""
    try:
        content = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        files: dict[str, list[str]] = {name: [file] for name, file in content["weight_map"].items()}
        files.update(content.get("shards", {}))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError.unreadable(folder, INDEX_FILE, error) from None
    return files


def _holding(folder: Path, wanted: Wanted) -> set[str]:
    """The files that hold ``wanted`` tensors."""
    return {file for name, files in holding(folder).items() if wanted(name) for file in files}
