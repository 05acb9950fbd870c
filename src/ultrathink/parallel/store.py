"""A ``SharedStore`` on top of torch.distributed's own store (TCP or a file)."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from ultrathink.core.store import LocalStore, SharedStore
from ultrathink.parallel.world import World

_POLL_S = 0.02


class DistributedStore:
    """The ``SharedStore`` of several processes; its own connection is safe on any thread."""

    def __init__(self, world: World, prefix: str) -> None:
        self.rank, self.size = world.rank, world.size
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(prefix, store.clone())

    def put(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def wait_for(self, keys: Sequence[str], check: Callable[[], None]) -> list[Any]:
        while not self._store.check(list(keys)):
            check()
            time.sleep(_POLL_S)
        return [json.loads(self._store.get(key)) for key in keys]

    def forget(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._store.delete_key(key)


# All processes create their stores in the same order, so the numbers agree; none is reused.
_numbers = itertools.count()


def new_store(world: World) -> SharedStore:
    """An empty store that all processes of ``world`` share; all of them call this."""
    if world.size == 1:
        return LocalStore()
    return DistributedStore(world, f"ultrathink/store/{next(_numbers)}")
