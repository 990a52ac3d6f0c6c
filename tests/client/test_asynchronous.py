"""The predictor in an event loop."""

from __future__ import annotations

import asyncio
import inspect
import io
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_torchserve_client import AsyncRemotePredictor, RemotePredictor, asynchronous, errors
from nnunet_torchserve_client.stopping import Stop
from support import peer
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


def ours() -> list[str]:
    """Threads of calls, if they do not end now, and of cases."""
    for thread in threading.enumerate():
        if thread.name == "remote-predictor":
            thread.join(PATIENCE_S)
    names = ("remote-predictor", "case-")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_call_that_is_given_up_ends_before_its_last_file_could_be_missed(
    how: str, server: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file is being written when the call is given up; the second answer comes after that."""
    writes, go_on = threading.Event(), threading.Event()
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        if "/.a.nii.gz" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            writes.set()
            assert go_on.wait(PATIENCE_S)
        fsync(descriptor)

    for name in "ab":
        (tmp_path / f"{name}_0000.nii.gz").write_bytes(b"image")
    targets = [str(tmp_path / "out" / name) for name in "ab"]
    (tmp_path / "out").mkdir()

    def second(wire: Wire, received: Received) -> None:
        go_on.wait(PATIENCE_S)
        peer.echo(wire, received)

    server.replies = [peer.echo, second]

    async def ask() -> None:
        async with AsyncRemotePredictor(server.url, "blobs") as predictor:
            await predictor.describe()
            monkeypatch.setattr(os, "fsync", sync)
            files = [[str(tmp_path / f"{name}_0000.nii.gz")] for name in "ab"]
            call = asyncio.create_task(predictor.predict_from_files_sequential(files, targets))
            await asyncio.to_thread(writes.wait, PATIENCE_S)
            giving_up = asyncio.create_task(predictor.close()) if how == "close" else call
            if how == "cancel":
                call.cancel()
            for _ in range(20):
                await asyncio.sleep(0)
            assert not giving_up.done(), "it waits for the file"
            go_on.set()
            await asyncio.wait({giving_up})
            assert not ours()
            with pytest.raises((asyncio.CancelledError, errors.Cancelled)):
                await call

    asyncio.run(ask())
    assert not (tmp_path / "out" / "b.nii.gz").exists()


def test_a_cancelled_call_gives_its_asynchronous_iterator_up(server: Peer) -> None:
    async def ask() -> None:
        asked, given_up = asyncio.Event(), asyncio.Event()

        async def items() -> AsyncIterator[dict[str, Any]]:
            asked.set()
            try:
                await asyncio.Event().wait()
                yield {}
            finally:
                given_up.set()

        async with AsyncRemotePredictor(server.url, "blobs") as predictor:
            call = asyncio.create_task(predictor.predict_from_data_iterator(items()))
            await asked.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert not ours()
            assert given_up.is_set()

    asyncio.run(ask())


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
        assert not ours()

    asyncio.run(ask())
    never.set()


def test_a_stop_that_comes_while_an_item_is_asked_for_gives_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, ask_in_thread = Stop(), asyncio.run_coroutine_threadsafe

    def stopped_at_once(*arguments: Any) -> Any:
        asked = ask_in_thread(*arguments)
        stop.set()
        return asked

    async def ask() -> None:
        async def items() -> AsyncIterator[dict[str, Any]]:
            await asyncio.Event().wait()
            yield {}

        drawing: set[asyncio.Task[Any]] = set()
        drawn = asynchronous._drawn(items(), stop, drawing)
        with pytest.raises(errors.Cancelled):
            await asyncio.to_thread(next, drawn)
        if drawing:
            await asyncio.wait(drawing, timeout=PATIENCE_S)
        assert not drawing

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", stopped_at_once)
    asyncio.run(ask())
