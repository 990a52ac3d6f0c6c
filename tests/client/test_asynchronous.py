"""The predictor in an event loop."""

from __future__ import annotations

import asyncio
import inspect
import io
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest

from nnunet_torchserve_client import AsyncRemotePredictor, RemotePredictor, errors
from support.peer import Peer, Received, Wire

SPACING = {"spacing": [1.0, 1.0, 1.0]}
PATIENCE_S = 120.0


@pytest.fixture
def server() -> Iterator[Peer]:
    with Peer().listening() as listening:
        yield listening


def labels(wire: Wire, received: Received) -> None:
    """An npz of what was sent, as a server answers arrays."""
    image = np.load(io.BytesIO(received.body))
    file = io.BytesIO()
    np.savez(file, labels=image[0].astype(np.uint8))
    wire.head()
    wire.result(file.getvalue())
    wire.chunk(b"")


def image(value: int) -> np.ndarray[Any, Any]:
    return np.full((1, 2, 3, 4), value, np.int16)


def arguments(method: Callable[..., object]) -> list[tuple[str, object]]:
    return [(name, each.default) for name, each in inspect.signature(method).parameters.items()]


def test_it_has_every_method_of_the_predictor_with_its_arguments() -> None:
    for name, method in inspect.getmembers(RemotePredictor, inspect.isfunction):
        if name.startswith(("predict_from", "predict_single", "initialize")):
            twin = getattr(AsyncRemotePredictor, name)
            assert inspect.iscoroutinefunction(twin)
            assert arguments(twin) == arguments(method)


def test_calls_are_awaited_at_once(server: Peer) -> None:
    """Each answer waits until both requests are there."""
    both = threading.Barrier(2)

    def reply(wire: Wire, received: Received) -> None:
        both.wait(PATIENCE_S)
        labels(wire, received)

    server.replies = [reply]

    async def ask() -> list[Any]:
        async with AsyncRemotePredictor(server.url, "blobs") as predictor:
            calls = (predictor.predict_single_npy_array(image(value), SPACING) for value in (3, 4))
            return await asyncio.gather(*calls)

    first, second = asyncio.run(ask())
    assert (first.max(), second.max(), first.shape) == (3, 4, (2, 3, 4))


def test_items_may_come_from_an_asynchronous_iterator(server: Peer) -> None:
    server.replies = [labels]

    async def items() -> AsyncIterator[dict[str, Any]]:
        for value in range(5):
            await asyncio.sleep(0)
            yield {"data": image(value), "data_properties": SPACING, "ofile": None}

    async def ask() -> list[Any]:
        async with AsyncRemotePredictor(server.url, "blobs") as predictor:
            return await predictor.predict_from_data_iterator(items())

    assert [each.max() for each in asyncio.run(ask())] == list(range(5))


def test_a_cancelled_call_ends_its_connection_and_no_other(server: Peer) -> None:
    asked, never = threading.Event(), threading.Event()

    def hold(wire: Wire, received: Received) -> None:
        wire.head()
        wire.event(event="heartbeat")
        asked.set()
        never.wait(PATIENCE_S)

    server.replies = [hold, labels]

    async def ask() -> None:
        async with AsyncRemotePredictor(server.url, "blobs") as predictor:
            held = asyncio.create_task(predictor.predict_single_npy_array(image(1), SPACING))
            await asyncio.to_thread(asked.wait, PATIENCE_S)
            held.cancel()
            with pytest.raises(asyncio.CancelledError):
                await held
            assert (await predictor.predict_single_npy_array(image(2), SPACING)).max() == 2
            with pytest.raises(errors.MissingProperty):
                await predictor.predict_single_npy_array(image(2), {})
        for thread in threading.enumerate():
            if thread.name == "remote-predictor":
                await asyncio.to_thread(thread.join, PATIENCE_S)
                assert not thread.is_alive()

    asyncio.run(ask())
    never.set()
