"""Which failures are reported: each kind once, the recovery, and few that alternate."""

import errno

from tests.unit.monitoring.screens import Clock
from ultrathink.monitoring.health import REPEAT_S, Health

FULL = OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")
FULL_ELSEWHERE = OSError(errno.ENOSPC, "No space left on device", "runs/a/samples.jsonl")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")


def test_each_kind_of_failure_is_reported_once() -> None:
    health = Health("the jsonl sink", "training continues")
    assert health.failed("write", FULL) == [
        (
            "the jsonl sink failed: OSError: [Errno 28] No space left on device: "
            "'runs/a/metrics.jsonl'; training continues",
            "warning",
        )
    ]
    assert health.failed("write", FULL) == []
    assert health.failed("sample", FULL_ELSEWHERE) == []
    assert len(health.failed("write", READ_ONLY)) == 1
    assert len(health.failed("write", ValueError("a"))) == 1
    assert health.failed("write", ValueError("b")) == []


def test_it_works_again_when_all_that_failed_does() -> None:
    health = Health("it", "so what")
    assert health.worked("write") == []
    health.failed("write", FULL)
    health.failed("sample", FULL)
    assert health.worked("progress") == []
    assert health.worked("write") == []
    assert health.worked("sample") == [("it works again", "info")]
    assert health.worked("sample") == []


def test_a_failure_that_comes_back_is_reported_again_but_not_every_time() -> None:
    clock = Clock()
    health = Health("it", "so what", clock)
    count = 0
    for _ in range(1000):  # alternates every second
        clock.now += 1
        count += len(health.failed("write", FULL))
        clock.now += 1
        count += len(health.worked("write"))
    assert count == 2 * (1 + 2000 // REPEAT_S)
