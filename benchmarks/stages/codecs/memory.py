"""What reading takes in memory, and every copy of the voxels on the way from a body to the network's input.

Measured in fresh processes (``python -m benchmarks.stages.codecs.memory``) that hold nothing but the body.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
import psutil
import torch

from benchmarks.harness.child import last_line_of
from benchmarks.harness.memory import with_extra_memory
from benchmarks.stages.codecs.images import SEED, Kind, image_file
from benchmarks.stages.codecs.sides import NUMPY, OURS, STOCK, decoders, opened
from nnunet_torchserve import codecs
from nnunet_torchserve.engine.shared_memory import share
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.orientation import turn_towards
from nnunet_torchserve.preprocess import preprocess
from nnunet_torchserve.volume import Volume
from support.plans import Plan, Spacing

Result = TypeVar("Result")

RESAMPLED_MM = (1.5, 1.5, 1.5)


@dataclass(frozen=True, slots=True)
class Way:
    """A way from a body to the network's input.

    Attributes:
        title: for people.
        scheme: nnU-Net's normalisation.
        spacing: of the network's grid, mm (z, y, x); ``None`` is the image's own.
        orientation: that the model was trained in; ``None`` is the image's own.
    """

    title: str
    scheme: str = "CTNormalization"
    spacing: Spacing | None = None
    orientation: str | None = None


WAYS = {
    "plain": Way("the image's grid is the network's"),
    "z_score": Way("the same, normalised by its own mean and deviation", "ZScoreNormalization"),
    "turned": Way("turned from LPS to RAS", orientation="RAS"),
    "resampled": Way("resampled to 1.5 mm", spacing=RESAMPLED_MM),
}


def memory_of_decoding(folder: Path, name: str) -> dict[str, Any]:
    """For each format the peak beside the body, in float32 volumes; a peer has the file instead of a body."""
    found = {}
    for kind in Kind:
        measured = {}
        for side in (OURS, NUMPY if kind.is_array else STOCK):
            peak = in_a_process("decode", kind.value, side, str(image_file(folder, name, kind)))
            measured[side] = round(peak["extra_bytes"] / peak["volume_bytes"], 3)
        found[kind.value] = {"title": kind.in_words, "peak_volumes": measured}
        print(f"  memory, {kind.in_words}: {measured} volumes")
    return found


def memory_of_the_path(folder: Path, name: str) -> dict[str, Any]:
    """Each way of a nii.gz to the shared memory, in float32 volumes of the image."""
    file = image_file(folder, name, Kind.NIFTI_GZ)
    return {way: {"title": WAYS[way].title, **in_a_process("path", way, str(file))} for way in WAYS}


def in_a_process(*arguments: str) -> dict[str, Any]:
    """What a fresh process measures."""
    measured: dict[str, Any] = json.loads(last_line_of("benchmarks.stages.codecs.memory", *arguments))
    return measured


def decode_in_a_process(kind: Kind, side: str, file: Path) -> dict[str, Any]:
    """The peak of one decoder, beside the body where it has one."""
    body = bytearray(file.read_bytes())  # as TorchServe hands it over
    opened(kind, body)
    work = decoders(kind, file, b"")[side] if side != OURS else lambda: opened(kind, body).read()
    if side != OURS:
        del body
    voxels, extra = with_extra_memory(work)
    return {"extra_bytes": extra, "volume_bytes": voxels.size * 4}


def path_in_a_process(way: Way, file: Path) -> dict[str, Any]:
    """What the pipeline and its engine's client do with a body, step by step.

    Returns:
        ``body_volumes``, ``network_volumes`` (the input of the network), ``peak_volumes`` beside the body, and of each
        step the memory ``before``, at its ``peak`` and ``after``; all in float32 volumes of the image.
    """
    small = nib.Nifti1Image(np.random.default_rng(SEED).normal(size=(12, 13, 14)).astype(np.float32), np.eye(4))
    steps_of(way, bytearray(small.to_bytes()))
    return steps_of(way, bytearray(file.read_bytes()))


def steps_of(way: Way, body: bytearray) -> dict[str, Any]:
    """See :func:`path_in_a_process`."""
    nothing = resident_bytes()
    image = codecs.open_image(body, Limits(), "SimpleITKIO")
    unit = image.geometry.voxels * 4
    plan = Plan(way.spacing or image.geometry.spacing_zyx, schemes=(way.scheme,))
    turn = turn_towards(image.geometry, way.orientation)
    steps: dict[str, dict[str, float]] = {}

    def step(name: str, work: Callable[[], Result]) -> Result:
        before = resident_bytes()
        result, extra = with_extra_memory(work)
        levels = {"before": before, "peak": before + extra, "after": resident_bytes()}
        steps[name] = {level: round((each - nothing) / unit, 3) for level, each in levels.items()}
        return result

    array = step("decode", image.read)
    array = step("turn", partial(turn.turn, array))
    volume = Volume(array, turn.after)
    del array
    case = step("preprocess", partial(preprocess, plan.member, volume))
    del volume
    descriptor, grid = step("share", partial(shared_copy, case.data)), case.data.nbytes
    os.close(descriptor[1])
    return {
        "body_volumes": round(len(body) / unit, 3),
        "network_volumes": round(grid / unit, 3),
        "peak_volumes": max(each["peak"] for each in steps.values()),
        "steps": steps,
    }


def shared_copy(data: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The volume in a memfd, as ``RemoteEngine`` sends it."""
    shared, descriptor = share(tuple(data.shape), torch.float32, "benchmark")
    shared.copy_(data)
    return shared, descriptor


def resident_bytes() -> int:
    """Of this process, with shared memory."""
    return int(psutil.Process().memory_info().rss)


def copies(path: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every copy of the voxels from the request's body to the network's input.

    ``volumes`` is what was measured on the way that has the copy, in float32 volumes of the image.
    """
    steps = {way: found["steps"] for way, found in path.items()}

    def added(way: str, step: str) -> float:
        return round(float(steps[way][step]["peak"] - steps[way][step]["before"]), 3)

    decoded = steps["plain"]["decode"]
    return [
        {
            "copy": "body",
            "where": "TorchServe's worker, a bytearray",
            "volumes": path["plain"]["body_volumes"],
            "until": "the request is answered",
            "why": "TorchServe hands over the whole body; it is read through a view and never copied by us.",
        },
        {
            "copy": "inflated bytes",
            "where": "codecs/voxels.py, read_voxels",
            "volumes": round(decoded["peak"] - decoded["after"], 3),
            "until": "the next slab",
            "why": "No volume: slabs of 256 KiB in the file's own type, which become float32 one by one.",
        },
        {
            "copy": "float32",
            "where": "codecs/voxels.py, read_voxels",
            "volumes": round(decoded["after"] - decoded["before"], 3),
            "until": "preprocessing is done; on the network's grid it becomes the network's input itself",
            "why": "What nnU-Net's readers give; every step after it computes in float32.",
        },
        {
            "copy": "turned",
            "where": "orientation.py, Turn.turn",
            "volumes": added("turned", "turn"),
            "until": "preprocessing is done; the array before it is freed at once",
            "why": "Only for a model with another orientation: the order in memory decides the last bit of a mean.",
        },
        {
            "copy": "nonzero mask",
            "where": "preprocess.py, _nonzero_box",
            "volumes": added("plain", "preprocess"),
            "until": "the box is known",
            "why": "No copy: one byte for each voxel, from which nnU-Net's crop is found.",
        },
        {
            "copy": "normalised",
            "where": "preprocess.py, _exact, by nnU-Net's own classes",
            "volumes": added("z_score", "preprocess"),
            "until": "the standard deviation is known",
            "why": "It happens in place; NumPy's deviation of a z-score takes a volume for a moment, as in nnU-Net.",
        },
        {
            "copy": "resampled",
            "where": "resampling.py, resample_image",
            "volumes": added("resampled", "preprocess"),
            "until": "the network is done",
            "why": "Only where the network's grid is another: the result, and what is between two axes, in float64.",
        },
        {
            "copy": "shared memory",
            "where": "engine/remote.py, RemoteEngine, a memfd",
            "volumes": added("plain", "share"),
            "until": "the engine has the last patch",
            "why": "The way into the engine's process, which maps it; the worker keeps its own to ask a second engine.",
        },
        {
            "copy": "the engine's",
            "where": "engine/accumulator.py, CaseAccumulator",
            "volumes": None,
            "until": "the network is done",
            "why": "Not measured. None on a CPU but where the patch is larger; on a GPU the one into its memory.",
        },
    ]


def main(role: str, *arguments: str) -> int:
    """Measure in this process, print JSON."""
    if role == "decode":
        kind, side, file = arguments
        measured = decode_in_a_process(Kind(kind), side, Path(file))
    else:
        way, file = arguments
        measured = path_in_a_process(WAYS[way], Path(file))
    print(json.dumps(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
