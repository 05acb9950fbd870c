"""States of a run in the memory of the host, to go back to.

From a GPU they are copied while training goes on: into pinned memory, on a stream of their own.
Three rules keep a copy equal to what was asked for: it begins after all that was computed so far;
whatever writes to a copied tensor in place first calls ``HostStates.before_writing``; who reads a
copy waits until it is whole. What a forward pass may write to (live controls of routing) is small,
and is copied on the device before anything else.
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
    """``source``, on a device, is to be copied to ``target``, on the host."""

    source: Tensor
    target: Tensor


class Transfer(Protocol):
    """Copies under way from a device to the host."""

    def hold_back_writes(self) -> None:
        """Let the device do what it is asked to from here on only after the copies."""

    def wait(self) -> None:
        """Return once the copies are whole."""


class Copier(Protocol):
    """Copies tensors to the host while training goes on."""

    def target(self, source: Tensor) -> Tensor | None:
        """Memory to copy ``source`` to later; None where it is to be copied at once."""

    def begin(self, copies: Sequence[Copy]) -> Transfer:
        """Start ``copies``, of tensors as all that was asked of the device so far leaves them."""


class GpuCopier:
    """Copies from CUDA devices to pinned memory, on a stream of its own; from others at once."""

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
                source.record_stream(self._stream)  # where it is freed, its memory waits
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
    transfer: Transfer | None  # None: the state is whole


class HostStates(MutableMapping[int, State]):
    """States by key, none of which changes; ``snapshots[key]`` waits until that one is whole."""

    def __init__(self) -> None:
        self.copier: Copier = GpuCopier()
        self._held: dict[int, _Held] = {}
        self._under_way: list[Transfer] = []  # for which writes were not held back yet

    def take(self, key: int, state: State) -> None:
        """Copy ``state``, which may be written to again after ``before_writing``."""
        copies: list[Copy] = []
        copied = copied_to_host(state, self.copier, copies)
        transfer = self.copier.begin(copies) if copies else None
        if transfer is not None:
            self._under_way.append(transfer)
        self._held[key] = _Held(copied, transfer)

    def before_writing(self, *_: object) -> None:
        """Let what is written in place from here on wait for the copies under way.

        Takes what optimizers hand to the hooks before their steps.
        """
        while self._under_way:
            self._under_way.pop().hold_back_writes()

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
        """Copy ``state`` to the memory of the host, while training goes on where there is a GPU."""
        self.states.take(key, state)
        if in_checkpoints:
            self.embedded.add(key)

    def keep(self, key: int, state: State, *, in_checkpoints: bool) -> None:
        """Hold ``state``, which nobody changes any more."""
        self.states[key] = state
        if in_checkpoints:
            self.embedded.add(key)

    def forget(self, key: int) -> None:
        """Nobody can ask for it any more."""
        self.states.pop(key, None)
        self.embedded.discard(key)


def copied_to_host(
    state: Any, copier: Copier | None = None, copies: list[Copy] | None = None
) -> Any:
    """Nested ``state`` with a copy of every tensor on the host, of divided ones the local part.

    With a ``copier`` those that it copies later are added to ``copies``, and filled when these are
    made.
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
        assert copies is not None, "what is copied later is kept somewhere"
        is_small = source.numel() * source.element_size() <= _SMALL_BYTES
        copies.append(Copy(source.clone() if is_small else source, target))
        return target
    if isinstance(state, dict):
        return {key: copied_to_host(value, copier, copies) for key, value in state.items()}
    if isinstance(state, list):
        return [copied_to_host(value, copier, copies) for value in state]
    return state


def host_bytes(state: Any) -> int:
    """The bytes that a copy of nested ``state`` takes in the memory of this process.

    The allocator of pinned memory rounds them up to powers of two.
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
