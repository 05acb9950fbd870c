"""What processes tell each other beside training, through the store that they met at."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from ultrathink.core.team import Alone, Team
from ultrathink.parallel.world import World

_POLL_S = 0.02


class StoreBoard:
    """The board of a ``Team``; has a connection of its own, so that any thread may use it."""

    def __init__(self, world: World, name: str) -> None:
        self.rank, self.size = world.rank, world.size
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(name, store.clone())

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


# All processes make their teams in the same order, so the numbers agree; none is used again.
_numbers = itertools.count()


def new_team(world: World) -> Team:
    """A team of all processes of ``world``, with an empty board; all of them call this."""
    return Alone() if world.size == 1 else StoreBoard(world, f"ultrathink/board/{next(_numbers)}")
