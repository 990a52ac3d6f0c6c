"""Clients that send one request after another and come again when they are told to, in a pod of the cluster.

It runs by itself, with what the server's image has: URL IMAGE OPTIONS CLIENTS. Each line of stdout says what a client
met, as JSON. A line on stdin ends them, after their answers. Half of the clients have a connection of their own for
each request, as behind a balancer that closes them; the others keep theirs. A client whose request was lost goes on.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from http import HTTPStatus
from pathlib import Path

import httpx

_TIMEOUT_S = 1800
_PAUSE_S = 1.0


class Clients:
    """All of them."""

    def __init__(self, url: str, image: str, options: str) -> None:
        self.url, self.body, self.headers = url, Path(image).read_bytes(), {"X-Nnunet-Options": options}
        self.stopped = threading.Event()
        self._out = threading.Lock()

    def run(self, number: int) -> None:
        """Be one of them."""
        if number % 2:
            with httpx.Client(timeout=_TIMEOUT_S, trust_env=False) as client:
                while not self.stopped.is_set():
                    self._ask(number, client)
        while not self.stopped.is_set():
            with httpx.Client(timeout=_TIMEOUT_S, trust_env=False) as client:
                self._ask(number, client)

    def _ask(self, number: int, client: httpx.Client) -> None:
        began = time.monotonic()
        try:
            answer = client.post(self.url, content=self.body, headers=self.headers)
        except httpx.HTTPError as error:
            words = f"client {number}: {type(error).__name__} after {time.monotonic() - began:.1f} s"
            self._tell(kind="lost", words=f"{words}: {error}")
            self.stopped.wait(_PAUSE_S)
            return
        again = answer.headers.get("retry-after")
        if answer.status_code == HTTPStatus.OK:
            sha256 = hashlib.sha256(answer.content).hexdigest()
            self._tell(kind="answer", client=number, model=answer.headers["x-nnunet-model"], sha256=sha256)
        elif answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE and again:
            self._tell(kind="refused")
            self.stopped.wait(float(again))
        else:
            self._tell(kind="lost", words=f"client {number}: {answer.status_code} {answer.text[:200]}")
            self.stopped.wait(_PAUSE_S)

    def _tell(self, **what: object) -> None:
        with self._out:
            sys.stdout.write(json.dumps(what) + "\n")
            sys.stdout.flush()


def main(url: str, image: str, options: str, count: str) -> None:
    """Let them run until a line comes."""
    clients = Clients(url, image, options)
    threads = [threading.Thread(target=clients.run, args=[number]) for number in range(int(count))]
    for thread in threads:
        thread.start()
    sys.stdin.readline()
    clients.stopped.set()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
