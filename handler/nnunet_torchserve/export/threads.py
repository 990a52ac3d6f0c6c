"""Blocks of one export, computed by several threads.

Each thread runs small operations of torch and numpy on its own block, which fit its cache and release the GIL; torch's
own threads would meet at a barrier after each of them, and wait there for whatever else the machine does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Block = TypeVar("Block")
Answer = TypeVar("Answer")


def each(function: Callable[[Block], Answer], blocks: Iterable[Block]) -> list[Answer]:
    """``[function(block) for block in blocks]`` on ``torch.get_num_threads()`` threads, one torch thread each.

    The first exception is raised, and the blocks that nobody has begun are dropped.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "export", initializer=_use_one_torch_thread)
    try:
        pending = [pool.submit(function, block) for block in blocks]
        wait(pending, return_when=FIRST_EXCEPTION)
        return [each.result() for each in pending if each.done()]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a thread's setting is also what threads to come start with


def _use_one_torch_thread() -> None:
    torch.get_num_threads()  # a thread's first use of torch takes the number that some thread set last
    torch.set_num_threads(1)
