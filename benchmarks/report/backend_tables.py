"""The tables of docs/performance.md about the backends of the networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.report.results import load, median_and_quartiles, percent, seconds, shape, source, table, times
from nnunet_torchserve.backend import Backend
from nnunet_torchserve.layer_precisions import whole_layers

_STOCK = "stock, loaded"


def backend_patches() -> str:
    """One patch by each backend."""
    rows = []
    for name, found in _part("patches")["networks"].items():
        for backend, rate in found["patches_per_second"].items():
            sooner = found["times_sooner"].get(backend)
            rows.append(
                (
                    name,
                    f"`{backend}`",
                    seconds(found["seconds"][backend]["median"]),
                    f"{rate:.2f}",
                    median_and_quartiles(sooner) if sooner else "",
                    percent(found["share_of_peak"][backend]),
                    _int8_layers(found["layers"].get(backend)),
                )
            )
    head = (
        "network, patch", "backend", "a patch", "patches a second", "times sooner than eager (quartiles)",
        "of the processor's peak", "layers in int8",
    )  # fmt: skip
    peaks = ", ".join(f"{kind} {rate / 1e9:,.0f}" for kind, rate in _part("patches")["peaks"].items())
    product = "a product of two matrices of 4096 × 4096, by PyTorch or OpenVINO, whichever is faster"
    notes = f"Peak: {product}, in 10⁹ operations a second: {peaks}. Convolutions can be somewhat faster."
    return f"{table(head, rows)}\n\n{notes}\n\n{source('backends')}"


def _int8_layers(layers: Mapping[str, int] | None) -> str:
    whole, computing = whole_layers(layers or {})
    return f"{whole} of {computing}" if whole else ""


def backend_requests() -> str:
    """Whole requests by each backend."""
    rows = [row for name in ("request", "request_40") if name in _parts() for row in _requests(name)]
    head = (
        "image", "by", "takes", "of it the network", "times sooner than eager (quartiles)",
        "than stock, loaded (quartiles)", "voxels different from stock",
    )  # fmt: skip
    return table(head, rows) + "\n\n" + source("backends")


def _requests(part: str) -> Iterator[tuple[object, ...]]:
    found = _part(part)
    classes = "40 classes" if part == "request_40" else "4 classes"
    title = f"{classes}, {shape(found['image']['shape'])}"
    for side, took in found["seconds"].items():
        sooner, than_stock = found["times_sooner"].get(side), found["times_sooner_than_stock"].get(side)
        network = found["stage_medians_ms"].get(side, {}).get("network")
        yield (
            title,
            side if side == _STOCK else f"`{side}`",
            seconds(took["median"]),
            "" if network is None else seconds(network / 1000),
            median_and_quartiles(sooner) if sooner else "",
            median_and_quartiles(than_stock) if than_stock else "",
            found["voxels_different_from_stock"].get(side, ""),
        )


def backend_mixture() -> str:
    """Many requests at once by each backend."""
    found = _part("mixture")
    rows = [
        (
            side if side == _STOCK else f"`{side}`, {found['clients']} clients",
            f"{rate:.2f}",
            times(found["times_stock"][side]) if side in found["times_stock"] else "",
        )
        for side, rate in found["requests_per_second"].items()
    ]
    count = sum(found["requests"].values())
    return table((f"{count} mixed requests", "requests a second", "times stock"), rows) + "\n\n" + source("backends")


def backend_accuracy() -> str:
    """How far answers of each backend are from eager's."""
    rows = []
    for model, backends in _part("accuracy")["models"].items():
        for backend, found in backends.items():
            if "not_run" in found:
                rows.append((model, f"`{backend}`", "not run here", "", "", "", ""))
                continue
            passes = found["gate"] == "passes"
            without = found["gate_without_labels"] == "passes"
            rows.append(
                (
                    model,
                    f"`{backend}`",
                    f"{found['different_voxels']:,} of {found['voxels']:,}",
                    _dice(found["dice"]),
                    _dice(found.get("mean_dice_to_labels_eager")),
                    _dice(found.get("mean_dice_to_labels_backend")),
                    "yes" if passes and without else "with labels only" if passes else "no",
                )
            )
    head = (
        "model", "backend", "voxels different from eager", "mean Dice to eager", "to labels: eager", "the backend",
        "passes by default",
    )  # fmt: skip
    return table(head, rows) + "\n\n" + source("backends")


def backend_cold_start() -> str:
    """Seconds until a graph is ready."""
    rows = []
    for model, backends in _part("cold_start")["models"].items():
        eager = seconds(backends[Backend.EAGER]["loaded"]["median"])
        for backend, found in backends.items():
            if backend != Backend.EAGER:
                anew, kept = (seconds(found[key]["median"]) for key in ("compiled", "from_cache"))
                rows.append((model, f"`{backend}`", eager, anew, kept, f"{found['cache_bytes'] / 1e6:.0f} MB"))
    head = ("one fold of", "backend", "eager loads in", "compiled in", "from a cache in", "which takes")
    return table(head, rows) + "\n\n" + source("backends")


def _parts() -> dict[str, Any]:
    found: dict[str, Any] = load("backends")["parts"]
    return found


def _part(name: str) -> Any:
    """A part of the result file.

    Raises:
        FileNotFoundError: it is not there yet.
    """
    if name not in _parts():
        raise FileNotFoundError(2, "not measured", f"backends.json, {name}")
    return _parts()[name]


def _dice(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
