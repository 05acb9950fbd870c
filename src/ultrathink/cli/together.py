"""A command that several processes run: one prints, and a failure is reported once."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from ultrathink.core.errors import UltrathinkError
from ultrathink.core.streams import print_stderr


def is_launched() -> bool:
    """Whether torchrun or ``ultrathink launch`` started this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or "TORCHELASTIC_RUN_ID" in os.environ


def run_together(act: Callable[[], int]) -> NoReturn:
    """``act()`` on each process; only the process where a failure arose reports it.

    Ends the process without the interpreter's clean-up, which may wait for processes that are gone.
    """
    from ultrathink.cli.main import report
    from ultrathink.parallel.launching import EXCEPTION, OUT_OF_MEMORY, PEER_GONE
    from ultrathink.parallel.world import (
        PeerFailedError,
        is_first_to_fail,
        is_lost_connection,
        join_world,
        leave_status,
        leave_world,
        status_of_first,
    )
    from ultrathink.training.out_of_memory import SmallerStartError

    world = join_world()
    try:
        status = act()
        leave_world()
    except PeerFailedError:
        _end(status_of_first(world) or PEER_GONE)
    except (Exception, KeyboardInterrupt) as error:
        known = error if isinstance(error, UltrathinkError | OSError | KeyboardInterrupt) else None
        if known is None and is_lost_connection(error):
            _end(PEER_GONE)
        if not is_first_to_fail(world):
            _end(status_of_first(world) or PEER_GONE)
        if known is not None:
            status = report(known)
            status = OUT_OF_MEMORY if isinstance(known, SmallerStartError) else status
        else:
            print_stderr(f"error: process {world.rank} failed:")
            traceback.print_exc()
            status = EXCEPTION
        leave_status(world, status)
        _end(status)
    # The launcher knows which signal it passed on. A run that was stopped and saved counts as
    # successful there, so that it is not restarted.
    _end(0 if status > 128 else status)


def _end(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)
