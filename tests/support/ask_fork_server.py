"""``python -IS ask_fork_server.py SOCKET COMMAND...``: has the fork server run a command, in this environment."""

import json
import os
import socket
import sys


def ask(path: str, arguments: list[str], environment: dict[str, str]) -> None:
    """Return when the command has forked away."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        connection.sendall(json.dumps({"arguments": arguments, "environment": environment}).encode())
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)


if __name__ == "__main__":
    ask(sys.argv[1], sys.argv[2:], dict(os.environ))
