"""Orphans below ``serve --foreground`` are taken in and leave no zombie."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, time
from pathlib import Path
from nnunet_torchserve_tools.children import become_subreaper, reap

assert become_subreaper()
assert reap() == 0
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    if os.fork() == 0:  # an engine forks away from its starter like this
        os.read(reading, 1)
        os._exit(0)
    os._exit(0)
os.waitpid(child, 0)
children = lambda: Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
orphans = children()
os.write(writing, b"x")
while Path(f"/proc/{orphans[0]}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
    time.sleep(0.01)
print(len(orphans), reap(), len(children()))
"""


def test_an_orphan_is_taken_in_and_reaped() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout == "1 1 0\n", done.stderr
