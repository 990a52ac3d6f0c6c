"""The serving core behind HTTP in the test's own process: models of every kind, without a TorchServe for each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import BytesParser

from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import RAW_BODY, Request
from nnunet_torchserve.responses import Response

from .peer import Peer, Received, Wire


@contextmanager
def serving(pipeline: Pipeline) -> Iterator[Peer]:
    """Answer with this pipeline for the length of the block, one request at a time, as a worker does."""
    one = threading.Lock()

    def reply(wire: Wire, received: Received) -> None:
        begun = False

        def send(part: Response) -> None:
            nonlocal begun
            if not begun:
                wire.head()
            begun = True
            wire.chunk(part.body)

        with one:
            last = pipeline.answer(Request(_parts(received), received.headers, "server"), send)
        if begun:
            if last.body:
                wire.chunk(last.body)
            wire.chunk(b"")
        else:
            wire.whole(int(last.status), last.body, {"Content-Type": last.content_type, **last.headers})

    with Peer([reply], description=None).listening() as peer:
        yield peer


def _parts(received: Received) -> dict[str, object]:
    """As TorchServe hands them over."""
    content_type = received.headers.get("content-type", "")
    if not content_type.startswith("multipart/"):
        return {RAW_BODY: received.body} if received.body else {}
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    fields = BytesParser().parsebytes(head + received.body).walk()
    named = ((field.get_param("name", header="content-disposition"), field) for field in fields)
    return {str(name): field.get_payload(decode=True) for name, field in named if name}
