"""How a launch ends, whatever happens to its temporary files."""

import subprocess
import sys

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


LAUNCH = """
import sys
from ultrathink.parallel.launching import Launch, launch
print(launch(Launch([sys.executable, "-c", sys.argv[1]], 1), print))
"""


def test_files_that_cannot_be_removed_do_not_change_how_it_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, LEAVES_A_WRITER], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.returncode) == ("LaunchResult(status=0, reason='')\n", 0), done.stderr
