"""How a launch ends, whatever happens to its temporary files."""

import sys
from pathlib import Path

import pytest

from ultrathink.parallel.launching import Launch, LaunchResult, launch

# Leaves a process behind that writes into the launcher's temporary folder for two seconds.
LEAVES_A_WRITER = """
import os, subprocess, sys
writer = '''
import os, shutil, sys, time
folder, until, number = sys.argv[1], time.monotonic() + 2, 0
while time.monotonic() < until:
    number += 1
    os.makedirs(folder, exist_ok=True)
    try:
        open(os.path.join(folder, str(number % 997)), "w").close()
    except FileNotFoundError:
        pass
shutil.rmtree(folder)
'''
folder = os.path.dirname(os.environ["ULTRATHINK_RENDEZVOUS"])
subprocess.Popen(
    [sys.executable, "-c", writer, folder],
    start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
)
while len(os.listdir(folder)) < 100:
    pass
"""


@pytest.mark.parametrize("status", [0, 2])
def test_files_that_cannot_be_removed_do_not_change_how_it_ends(
    status: int, tmp_path: Path
) -> None:
    script = f"{LEAVES_A_WRITER}\nsys.exit({status})"
    said: list[str] = []
    result = launch(Launch([sys.executable, "-c", script], 1, log_folder=tmp_path), said.append)
    reason = f"process 0 ended with status {status}" if status else ""
    assert result == LaunchResult(status, reason)
    assert said == []
