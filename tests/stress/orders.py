"""Run the tests in random orders, and each of their files alone: every test stands on its own.

    python -m tests.stress.orders                          five orders, of the seeds 1 to 5
    python -m tests.stress.orders --seeds 7 8 --long       others, with the long tests as well
    python -m tests.stress.orders --each-file-alone        each file in a process of its own
    python -m tests.stress.orders --each-file-alone --only tests/unit/data

Ends with status 1 where a test failed. The same order is had again with
``pytest -p randomly --randomly-seed=SEED``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
PASSED, NONE_FOUND = 0, 5  # pytest's exit statuses


def run(name: str, arguments: Sequence[str]) -> bool:
    """Run pytest with ``arguments``, and say under ``name`` how it ended; whether all passed."""
    began = time.monotonic()
    # pytest processes that share a folder for temporary files delete each other's old ones, and
    # one that lists the folder meanwhile fails with a warning.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--tb=short", f"--basetemp={folder}/t", *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    is_good = done.returncode in (PASSED, NONE_FOUND)
    verdict = "passed" if is_good else "FAILED"
    print(f"{verdict}  {time.monotonic() - began:6.0f} s  {name}", flush=True)
    if not is_good:
        print(done.stdout[-8000:], done.stderr[-2000:], flush=True)
    return is_good


def main() -> int:
    """Say of each order, or of each file, whether its tests passed; 1 where some did not."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--each-file-alone", action="store_true", help="instead of whole orders")
    parser.add_argument("--long", action="store_true", help="the long tests as well")
    parser.add_argument("--only", default="tests", help="tests below this path")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="files at a time")
    args = parser.parse_args()
    marked = ["-m", ""] if args.long else []
    if not args.each_file_alone:
        # Named tests run in one process by default.
        where = [args.only, "-n", str(min(os.cpu_count() or 1, 4))] if args.only != "tests" else []
        orders = [[*marked, "-p", "randomly", f"--randomly-seed={seed}"] for seed in args.seeds]
        results = [
            run(f"seed {seed}", [*order, *where])
            for seed, order in zip(args.seeds, orders, strict=True)
        ]
    else:
        below = ROOT / args.only
        files = [below] if below.is_file() else sorted(below.rglob("test_*.py"))
        names = [str(file.relative_to(ROOT)) for file in files]
        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(pool.map(lambda name: run(name, [*marked, "-n0", name]), names))
    print(f"{sum(results)} of {len(results)} passed")
    return 0 if all(results) and results else 1


if __name__ == "__main__":
    sys.exit(main())
