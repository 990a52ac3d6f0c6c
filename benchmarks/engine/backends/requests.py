"""Whole requests by a live server for each backend, beside stock's predictor, loaded.

A server for each backend runs all the time; the ones that are not asked idle. All go from image files to segmentation
files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from benchmarks.engine.backends.archives import Archives, Trained
from benchmarks.engine.backends.turns import Turns, compared
from benchmarks.harness.label_maps import different_voxels
from benchmarks.harness.material import FOLD, Material, describe_image
from benchmarks.harness.mixture import Size, cut, sizes_of
from benchmarks.harness.served import Answer, Client, serving, stage_medians
from benchmarks.harness.spread import spread
from benchmarks.request.whole_request import ask_predictor
from nnunet_torchserve.backend import Backend
from nnunet_torchserve.responses import BACKEND
from nnunet_torchserve_tools.errors import ToolError
from support import stock

STOCK = "stock, loaded"
CLIENTS, WORKERS = 8, 4
"""TorchServe lets two requests wait for each worker, so that all clients' may wait: more of them would get 503."""


@dataclass(frozen=True, slots=True)
class Servers:
    """Live ones of one model.

    Attributes:
        model: that they serve.
        clients: by backend; those that this machine cannot run are missing.
        not_run: backend -> the reason.
    """

    model: Trained
    clients: Mapping[Backend, Client]
    not_run: Mapping[str, str]

    def check(self, image: Path) -> None:
        """Each answers by its own backend, and says so."""
        for backend, client in self.clients.items():
            response = client.post(image.read_bytes())
            if response.status_code != HTTPStatus.OK:
                msg = f"{backend}: {response.status_code} {response.text[:500]}"
                raise RuntimeError(msg)
            if (ran := response.headers[BACKEND].partition(";")[0]) != backend:
                msg = f"{ran} answered in place of {backend}"
                raise RuntimeError(msg)


@contextmanager
def servers_of(
    model: Trained, backends: Sequence[Backend], archives: Archives, scratch: Path, check: Path
) -> Iterator[Servers]:
    """A server for each backend, eager among them.

    Args:
        model: what is served.
        backends: beside eager.
        archives: of the model.
        scratch: for the servers' state.
        check: an image that each is asked once.
    """
    clients: dict[Backend, Client] = {}
    not_run: dict[str, str] = {}
    with ExitStack() as stack:
        for backend in (Backend.EAGER, *backends):
            try:
                store = archives.store(model, backend)
            except ToolError as error:
                not_run[str(backend)] = str(error)
                continue
            place = scratch / f"{len(clients)}"
            clients[backend] = stack.enter_context(serving(model.folder, place, workers=WORKERS, made=store))
        servers = Servers(model, clients, not_run)
        servers.check(check)
        yield servers


def measure_request(servers: Servers, image: Path, turns: Turns, scratch: Path) -> dict[str, Any]:
    """One request at a time, warm, by all in turns."""
    scratch.mkdir(parents=True)
    predictor = stock.loaded(servers.model.folder, folds=(FOLD,), use_mirroring=False)
    answers: dict[str, list[Answer]] = {}
    files = {str(side): scratch / f"{number}.nii.gz" for number, side in enumerate((STOCK, *servers.clients))}

    def ask(backend: Backend) -> float:
        answer = servers.clients[backend].segment(image, files[backend])
        answers.setdefault(backend, []).append(answer)
        return answer.seconds

    calls: dict[str, Callable[[], float | None]] = {
        STOCK: partial(ask_predictor, predictor, image, files[STOCK]),
        **{str(backend): partial(ask, backend) for backend in servers.clients},
    }
    seconds = turns.of(calls)
    return {
        "image": describe_image(image),
        "rounds": len(seconds[STOCK]),
        **compared(seconds, str(Backend.EAGER)),
        "times_sooner_than_stock": compared(seconds, STOCK)["times_sooner"],
        "stage_medians_ms": {side: stage_medians(found[1:]) for side, found in answers.items()},
        "voxels_different_from_stock": {
            side: different_voxels(files[STOCK], file) for side, file in files.items() if side != STOCK
        },
        "not_run": servers.not_run,
    }


def measure_mixture(
    servers: Servers, material: Material, count: int, parts: int, quiet: Callable[[], None], scratch: Path
) -> dict[str, Any]:
    """Requests of mixed sizes by eight clients at once, a part at a time, and by stock one after another."""
    folder = scratch / "images"
    folder.mkdir(parents=True)
    images = [folder / f"{number:03}.nii.gz" for number in range(count)]
    cut(material, images)
    predictor = stock.loaded(servers.model.folder, folds=(FOLD,), use_mirroring=False)
    # eager's throughput has a benchmark of its own
    sides: dict[str, Callable[[Sequence[Path]], float]] = {STOCK: partial(_by_stock, predictor, scratch)}
    for backend, client in servers.clients.items():
        if backend is not Backend.EAGER:
            sides[str(backend)] = partial(_by_clients, client, backend)
    for ask in sides.values():
        ask(images[:2])
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(parts):
        part = images[number * count // parts : (number + 1) * count // parts]
        for side in list(sides)[:: -1 if number % 2 else 1]:
            quiet()
            seconds[side].append(sides[side](part))
    sizes = sizes_of(count)
    whole = {side: sum(took) for side, took in seconds.items()}
    return {
        "requests": {size: sizes.count(size) for size in Size},
        "clients": CLIENTS,
        "workers": WORKERS,
        "part_seconds": seconds,
        "requests_per_second": {side: round(count / took, 4) for side, took in whole.items()},
        "times_stock": {side: round(whole[STOCK] / took, 4) for side, took in whole.items() if side != STOCK},
        "times_stock_of_parts": {
            side: spread([slow / fast for slow, fast in zip(seconds[STOCK], took, strict=True)])
            for side, took in seconds.items()
            if side != STOCK
        },
        "not_run": servers.not_run,
    }


def _by_stock(predictor: Any, scratch: Path, part: Sequence[Path]) -> float:
    return sum(ask_predictor(predictor, image, scratch / "stock.nii.gz") for image in part)


def _by_clients(client: Client, backend: Backend, part: Sequence[Path]) -> float:
    def ask(image: Path) -> None:
        response = client.post(image.read_bytes())
        image.with_name(f"{image.stem}.{backend}").write_bytes(response.content)
        if response.status_code != HTTPStatus.OK or not response.headers[BACKEND].startswith(backend):
            msg = f"{backend}: {response.status_code} {response.text[:500]}"
            raise RuntimeError(msg)

    started = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(ask, part))
    return time.perf_counter() - started
