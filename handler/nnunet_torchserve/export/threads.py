"""Blocks of one export, computed by several threads.

Each thread runs small operations of torch and numpy on its own block, which fit its cache and release the GIL; torch's
own threads would meet at a barrier after each of them, and wait there for whatever else the machine does.

A lock lets one export at a time have its threads: each takes all processors anyway, and while threads start torch's
process-wide number, which new threads take over, is one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from ..errors import Deadline
from ..machine import torch_threads

Block = TypeVar("Block")
Answer = TypeVar("Answer")

_one_at_a_time = threading.Lock()


def in_threads(
    function: Callable[[Block], Answer], blocks: Iterable[Block], deadline: float | None = None
) -> list[Answer]:
    """``[function(block) for block in blocks]`` on :func:`~..machine.torch_threads` threads, one torch thread each.

    The first exception is raised, and the blocks that nobody has begun are dropped.

    Raises:
        Deadline: ``time.monotonic()`` reached it before the last block was begun.
    """

    def run(block: Block) -> Answer:
        check(deadline)
        return function(block)

    with _one_at_a_time:
        threads, before = torch_threads(), torch.get_num_threads()
        started = threading.Barrier(threads + 1)
        pool = ThreadPoolExecutor(threads, "export", initializer=_use_one_torch_thread)
        try:
            for _ in range(threads):
                pool.submit(started.wait)
            started.wait()
            torch.set_num_threads(before)  # the number of this thread, and of threads to come
            pending = [pool.submit(run, block) for block in blocks]
            wait(pending, return_when=FIRST_EXCEPTION)
            return [future.result() for future in pending if future.done()]
        finally:
            pool.shutdown(cancel_futures=True)


def check(deadline: float | None) -> None:
    """Raise :class:`~..errors.Deadline` if it has passed."""
    if deadline is not None and time.monotonic() >= deadline:
        msg = "the time for this request ran out during the export"
        raise Deadline(msg)


def _use_one_torch_thread() -> None:
    torch.get_num_threads()  # a thread's first use of torch takes the number that some thread set last
    torch.set_num_threads(1)
