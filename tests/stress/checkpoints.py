"""Checkpoints of every mesh on every other: weights, optimizer and order of samples, bit for bit.

    python -m tests.stress.checkpoints        1, 2 and 4 processes at every stage: two minutes

Each run is saved after three steps and loaded by 1, 2 and 4 processes. What they hold then, put
together, is compared with what one process reads from the files. Ends with status 1 where one bit
differs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.distributed import tasks
from tests.distributed.pool import Pool
from tests.distributed.test_parity import assert_close, saved

MESHES: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "ddp 2": (2, ["parallel.dp_replicate=2"]),
    **{f"zero {n} on 2": (2, [f"parallel.zero_stage={n}"]) for n in (1, 2, 3)},
    "ddp 4": (4, ["parallel.dp_replicate=4"]),
    **{f"zero {n} on 4": (4, [f"parallel.zero_stage={n}"]) for n in (1, 2, 3)},
    "hybrid 2 x 2": (4, ["parallel.dp_replicate=2"]),
}
OPTIMIZERS = ("adamw", "muon")


def main() -> int:
    failures = 0
    pools = {2: Pool(2), 4: Pool(4)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for optimizer in OPTIMIZERS:
                for name, (size, words) in MESHES.items():
                    place = str(Path(folder) / f"{optimizer}-{name}".replace(" ", "-"))
                    words = [
                        "training.max_steps=3",
                        f"training.optimizer={{type: {optimizer}, lr: 0.01}}",
                        *words,
                    ]
                    run = (
                        pools[size].run(tasks.train, place, *words)[0]
                        if size > 1
                        else tasks.train(place, *words)
                    )
                    for loaders in (1, 2, 4):
                        failures += not _loads(run, name, optimizer, loaders, pools)
    finally:
        for pool in pools.values():
            pool.close()
    return int(failures > 0)


def _loads(run: str, name: str, optimizer: str, loaders: int, pools: dict[int, Pool]) -> bool:
    """Whether so many processes load ``run`` as it was saved."""
    mesh = ["parallel.dp_replicate=1"]  # what the run was saved with need not fit
    try:
        if loaders == 1:
            assert_close(saved(run), tasks.loaded_state(run, "last", *mesh))
        else:
            for loaded in pools[loaders].run(tasks.loaded_state, run, "last", *mesh):
                assert_close(saved(run), loaded)
    except AssertionError as error:
        print(f"{optimizer}: {name} on {loaders}: {error}", flush=True)
        return False
    print(f"{optimizer}: saved by {name}, loaded by {loaders}: the same bits", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
