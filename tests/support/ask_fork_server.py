"""``python -IS ask_fork_server.py SOCKET COMMAND...``: has the fork server run a command, with what this process has.

It waits in the command's place: signals that it gets are the command's, it ends as the command does, and when it is
killed, so is the command.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGABRT)


def ask(
    path: str,
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    streams: tuple[int, int, int],
    forward: tuple[signal.Signals, ...] = (),
) -> int:
    """Return the exit status when the command has ended; below 0 it is a signal's number."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        for number in forward:
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
        request = {"arguments": arguments, "environment": environment, "folder": folder}
        line = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(connection, [line], streams)
        connection.sendall(line[sent:])
        return int(connection.recv(16) or 1)


if __name__ == "__main__":
    status = ask(sys.argv[1], sys.argv[2:], dict(os.environ), str(Path.cwd()), (0, 1, 2), FORWARDED)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)
