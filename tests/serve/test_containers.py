"""What a container does to ``serve --foreground``: process 1, a user without a name, a read-only root, hardly any
``/dev/shm``. Here with the kernel's own means; an image is built and run by other tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nnunet_torchserve_tools import launcher
from support.chaos import Case, engine_processes, wait_for
from support.foreground import foreground
from support.server import LiveServer

pytestmark = [pytest.mark.serve, pytest.mark.long]  # tests/tools/test_children.py has orphans without a server

NOBODYS_UID = 54321
CASE = Case((40, 38, 6))

CONTAINER = """\
set -e
root=$1 writable=$2 uid=$3 python=$4 closed=$5
shift 5
mount --make-rprivate /
mount --rbind / "$root"
if [ -n "$closed" ]; then  # this machine's Python lies where nobody else may look
    mount -t tmpfs -o mode=755 closed "$root$closed"
    mkdir -p "$root$python"
    mount --bind "$python" "$root$python"
fi
mount --bind "$writable" "$root$writable"
mount -t tmpfs -o size=64k,mode=1777 shm "$root/dev/shm"
while read -r _ _ _ _ point _; do
    case $point in
        "$root$writable" | "$root"/proc* | "$root"/dev* | "$root"/sys*) ;;
        "$root" | "$root"/*) mount -o remount,bind,ro "$point" ;;
    esac
done < /proc/self/mountinfo
exec chroot "$root" setpriv --reuid "$uid" --regid "$uid" --clear-groups --inh-caps=-all --bounding-set=-all \\
    --no-new-privs env -u HOME -u USER -u LOGNAME "$@"
"""


@pytest.fixture
def container(tmp_path: Path) -> list[str]:
    """What runs a command as process 1 of such a container."""
    tools = ("unshare", "setpriv", "chroot")
    if os.getuid() != 0 or not all(shutil.which(tool) for tool in tools):
        pytest.skip("only root with util-linux can make a container here")
    (tmp_path / "root").mkdir()
    spaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]
    if subprocess.run([*spaces, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this system makes no namespaces")
    python = Path(sys.base_prefix).resolve()
    closed = next((each for each in reversed(python.parents) if not each.stat().st_mode & 0o001), "")
    values = [tmp_path / "root", tmp_path / "own", NOBODYS_UID, python, closed]
    return [*spaces, "sh", "-c", CONTAINER, "container", *map(str, values)]


def test_a_server_lives_and_stops_as_process_1_of_nobody_in_a_read_only_root(
    container: list[str], archive_of: Callable[[str], Path], tmp_path: Path
) -> None:
    own = tmp_path / "own"
    store = own / "store"
    store.mkdir(parents=True)
    shutil.copy(archive_of("flat"), store)
    (own / "tmp").mkdir()
    for path in (own, *own.rglob("*")):
        os.chown(path, NOBODYS_UID, NOBODYS_UID)
    for parent in own.parents:
        parent.chmod(parent.stat().st_mode | 0o055)
    with foreground(
        store,
        own,
        *("--workers", "2"),
        wrapper=container,
        environment={"TMPDIR": str(own / "tmp")},
        python=Path(sys.executable),
    ) as serve:
        serve.wait_until_ready()
        server = launcher.read_state(serve.state_dir)
        assert server is not None
        live = LiveServer(server, serve.state_dir)
        [first] = psutil.Process(serve.process.pid).children()
        assert first.uids().real == NOBODYS_UID
        assert "NSpid:" in (status := Path(f"/proc/{first.pid}/status").read_text())
        assert status.partition("NSpid:")[2].split("\n")[0].split()[-1] == "1"
        answer = live.predict("flat", CASE.body, options=CASE.options)
        assert answer.status_code == 200

        [engine] = engine_processes(serve.runtime)
        assert first in engine.parents(), "orphans come to process 1"
        engine.kill()
        wait_for(lambda: not psutil.pid_exists(engine.pid))
        wait_for(lambda: serve.says("ready", "ok"))
        assert live.predict("flat", CASE.body, options=CASE.options).content == answer.content
        assert not [each for each in first.children(recursive=True) if each.status() == psutil.STATUS_ZOMBIE]

        first.terminate()
        code, said = serve.end()
        assert code == 0, said
