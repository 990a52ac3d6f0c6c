"""What is promised of the backends, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.harness.results import Target
from nnunet_torchserve.backend import Backend

_FLOAT32, _BF16, _INT8 = Backend.OPENVINO_FLOAT32, Backend.OPENVINO_BFLOAT16, Backend.OPENVINO_INT8
LEAST_OF_PATCH = {_FLOAT32: 1.7, _BF16: 2.5}
LEAST_OF_PATCH_WITH_AMX = {_FLOAT32: 1.7, _BF16: 5.0}
"""Times sooner than eager, one patch of the standard network."""

LEAST_OF_REQUEST = {_FLOAT32: 1.5, _BF16: 2.5}
"""Times sooner than eager, a whole warm request at 1 mm."""

LEAST_OF_MIXTURE = {_FLOAT32: 2.0, _BF16: 3.0}
"""Times the requests of stock's loaded predictor."""

MOST_DIFFERENT = 1e-6
"""Share of voxels, of float32."""

MOST_LOST = 0.001
"""Of eager's mean Dice to labels."""

_AMX = "amx_bf16"


def targets_of(parts: Mapping[str, Any]) -> list[Target]:
    """Of the parts that there are; what this machine could not run is no promise."""
    return [*_of_patches(parts), *_of_accuracy(parts), *_of_requests(parts)]


def _of_patches(parts: Mapping[str, Any]) -> Iterator[Target]:
    if "patches" not in parts:
        return
    least_of = LEAST_OF_PATCH_WITH_AMX if _AMX in parts["patches"]["cpu_flags"] else LEAST_OF_PATCH
    for name, found in parts["patches"]["networks"].items():
        if found["network"] != "standard":
            continue
        for backend, least in least_of.items():
            if (ratio := found["times_sooner"].get(backend)) is not None:
                claim = f"{backend}: a patch of {name}, at least {least:g} times sooner than by eager"
                yield Target(claim, ratio["median"], ratio["median"] >= least)


def _of_accuracy(parts: Mapping[str, Any]) -> Iterator[Target]:
    for model, backends in parts.get("accuracy", {}).get("models", {}).items():
        for backend, found in backends.items():
            if "not_run" in found:
                continue
            if backend == _FLOAT32:
                different, most = found["different_voxels"], max(1, MOST_DIFFERENT * found["voxels"])
                claim = (
                    f"{model}, {backend}: voxels that differ from eager's, at most {most:.1f}: one of a million, or one"
                )
                yield Target(claim, different, different <= most)
            elif "mean_dice_to_labels_eager" in found:
                lost = found["mean_dice_to_labels_eager"] - found["mean_dice_to_labels_backend"]
                claim = f"{model}, {backend}: mean Dice to labels, at most {MOST_LOST:g} less than eager's"
                yield Target(claim, lost, lost <= MOST_LOST)


def _of_requests(parts: Mapping[str, Any]) -> Iterator[Target]:
    for part in ("request", "request_40"):
        if part in parts:
            different = parts[part]["voxels_different_from_stock"][Backend.EAGER]
            yield Target(f"{part}: voxels of eager's that differ from stock's", different, different == 0)
    for backend, least in LEAST_OF_REQUEST.items() if "request" in parts else ():
        if (ratio := parts["request"]["times_sooner"].get(backend)) is not None:
            claim = f"{backend}: a warm request at 1 mm, at least {least:g} times sooner than by eager"
            yield Target(claim, ratio["median"], ratio["median"] >= least)
    for backend, least in LEAST_OF_MIXTURE.items() if "mixture" in parts else ():
        if (times := parts["mixture"]["times_stock"].get(backend)) is not None:
            claim = f"{backend}: mixed requests, at least {least:g} times those of stock, loaded"
            yield Target(claim, times, times >= least)
