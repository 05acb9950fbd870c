"""States of a run in host memory, for rollbacks.

From a GPU they are copied while training continues, into pinned memory on a separate stream.
Three rules keep each copy correct: it starts after everything queued so far; code that writes to a
copied tensor in place first calls ``HostStates.before_writing``; reading a copy waits until it is
complete. Tensors that a forward pass may write to (live controls of routing) are small, and are
first copied on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ultrathink.core.protocols import State
from ultrathink.core.shards import TensorShard
from ultrathink.parallel.placement import on_host

_SMALL_BYTES = 1 << 20


class Copy(NamedTuple):
    """A pending copy of ``source``, on a device, to ``target``, on the host."""

    source: Tensor
    target: Tensor


class Transfer(Protocol):
    """Running copies from a device to the host."""

    def hold_back_writes(self) -> None:
        """Make the device finish the copies before any work queued from now on."""

    def wait(self) -> None:
        """Return once the copies are complete."""


class Copier(Protocol):
    """Copies tensors to the host while training continues."""

    def target(self, source: Tensor) -> Tensor | None:
        """Memory to copy ``source`` to later; None if it must be copied at once."""

    def begin(self, copies: Sequence[Copy]) -> Transfer:
        """Start ``copies``, after all work queued on the device so far."""


class GpuCopier:
    """Copies from CUDA devices to pinned memory on a separate stream; from others at once."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def target(self, source: Tensor) -> Tensor | None:
        if not source.is_cuda:
            return None
        return torch.empty(source.shape, dtype=source.dtype, pin_memory=True)

    def begin(self, copies: Sequence[Copy]) -> Transfer:
        device = copies[0].source.device  # a process has one
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for source, target in copies:
                target.copy_(source, non_blocking=True)
                source.record_stream(self._stream)  # its memory is not reused before the copy
        return _GpuTransfer(self._stream.record_event(), device)


@dataclass(frozen=True)
class _GpuTransfer:
    copied: torch.cuda.Event
    device: torch.device

    def hold_back_writes(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.copied)

    def wait(self) -> None:
        self.copied.synchronize()


class _Held(NamedTuple):
    state: State
    transfer: Transfer | None  # None: the state is complete


class HostStates(MutableMapping[int, State]):
    """Immutable states by key; ``states[key]`` waits until that one is complete."""

    def __init__(self) -> None:
        self.copier: Copier = GpuCopier()
        self._held: dict[int, _Held] = {}
        self._running: list[Transfer] = []  # whose writes were not held back yet

    def take(self, key: int, state: State) -> None:
        """Copy ``state``, which may be modified again after ``before_writing``."""
        copies: list[Copy] = []
        copied = copied_to_host(state, self.copier, copies)
        transfer = self.copier.begin(copies) if copies else None
        if transfer is not None:
            self._running.append(transfer)
        self._held[key] = _Held(copied, transfer)

    def before_writing(self, *_: object) -> None:
        """Make in-place writes from now on wait for the running copies.

        Its arguments are those of an optimizer's step hook, and are ignored.
        """
        while self._running:
            self._running.pop().hold_back_writes()

    def __getitem__(self, key: int) -> State:
        state, transfer = self._held[key]
        if transfer is not None:
            transfer.wait()
            self._held[key] = _Held(state, None)
        return state

    def __setitem__(self, key: int, state: State) -> None:
        self._held[key] = _Held(state, None)

    def __delitem__(self, key: int) -> None:
        del self._held[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


@dataclass
class Snapshots:
    """The states of snapshots, by key."""

    states: HostStates = field(default_factory=HostStates)
    embedded: set[int] = field(default_factory=set)  # keys of those that checkpoints include

    def take(self, key: int, state: State, *, in_checkpoints: bool) -> None:
        """Copy ``state`` to host memory; from a GPU, while training continues."""
        self.states.take(key, state)
        if in_checkpoints:
            self.embedded.add(key)

    def keep(self, key: int, state: State, *, in_checkpoints: bool) -> None:
        """Keep ``state``, which must not change any more."""
        self.states[key] = state
        if in_checkpoints:
            self.embedded.add(key)

    def forget(self, key: int) -> None:
        """Free the state of ``key``."""
        self.states.pop(key, None)
        self.embedded.discard(key)


def copied_to_host(
    state: Any, copier: Copier | None = None, copies: list[Copy] | None = None
) -> Any:
    """Nested ``state`` with every tensor copied to the host, of sharded ones the local shard.

    With a ``copier``, tensors that it copies later are added to ``copies``, and have no valid
    content until then.
    """
    if isinstance(state, DTensor):
        return on_host(copied_to_host(state.to_local(), copier, copies), state)
    if isinstance(state, TensorShard):
        return replace(state, local=copied_to_host(state.local, copier, copies))
    if isinstance(state, Tensor):
        source = state.detach()
        target = copier.target(source) if copier is not None else None
        if target is None:
            return source.to("cpu", copy=True)
        assert copies is not None, "a copier needs a list of copies"
        is_small = source.numel() * source.element_size() <= _SMALL_BYTES
        copies.append(Copy(source.clone() if is_small else source, target))
        return target
    if isinstance(state, dict):
        return {key: copied_to_host(value, copier, copies) for key, value in state.items()}
    if isinstance(state, list):
        return [copied_to_host(value, copier, copies) for value in state]
    return state


def host_bytes(state: Any) -> int:
    """The host memory that a copy of nested ``state`` takes in this process, in bytes.

    The allocator of pinned memory rounds each tensor up to a power of two.
    """
    if isinstance(state, DTensor):
        return host_bytes(state.to_local())
    if isinstance(state, Tensor):
        size = state.numel() * state.element_size()
        return 1 << (size - 1).bit_length() if state.is_cuda and size else size
    if isinstance(state, dict):
        return sum(host_bytes(value) for value in state.values())
    if isinstance(state, list):
        return sum(host_bytes(value) for value in state)
    return 0
