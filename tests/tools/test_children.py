"""What a process 1 has to do: take orphans in, and end when it is told to."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nnunet_torchserve_tools.server import runs
from support.chaos import wait_for

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


def test_a_verb_that_is_process_1_ends_at_sigterm(tmp_path: Path) -> None:
    """As the init container that fetches an archive: a pod that is deleted meanwhile would wait for its whole grace."""
    spaces = ["unshare", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*spaces, "true"], check=False).returncode != 0:
        pytest.skip("this user makes no namespaces here")
    program = "from nnunet_torchserve_tools.console import main; main()"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"https://127.0.0.1:{silent.getsockname()[1]}/brain.mar"
        fetch = ["fetch", address, "--sha256", "0" * 64, "--into", str(tmp_path)]
        with subprocess.Popen([*spaces, sys.executable, "-c", program, *fetch]) as process:
            connection, _ = silent.accept()
            [first] = psutil.Process(process.pid).children()
            first.terminate()
        connection.close()
    assert process.returncode == 143
    assert list(tmp_path.iterdir()) == []


FIRST_THREAD_ENDS = """
import ctypes, threading
library = ctypes.CDLL(None)
threading.Thread(target=library.pause).start()
print("ready", flush=True)
library.pthread_exit(None)
"""


def test_a_process_whose_first_thread_alone_has_ended_still_runs() -> None:
    """It looks like a zombie, and has its ports still: a killed JVM's must be free when it is said to have ended."""
    with subprocess.Popen([sys.executable, "-c", FIRST_THREAD_ENDS], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        process = psutil.Process(child.pid)
        wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE)
        assert runs(process)
        child.kill()
        wait_for(lambda: not runs(process))
        assert process.status() == psutil.STATUS_ZOMBIE
