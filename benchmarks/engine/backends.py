"""What another backend than eager gains on this machine's processor, and how far from eager's its answers are.

One patch of nnU-Net's standard network (32 to 320 features, weights untrained) of several sizes, by eager and by the
other backend in turns; then a whole request for the trained model, in turns too, whose labels are compared voxel by
voxel. Both run in this process, on as many threads as an engine has. Beside them: how long each takes to load, and what
the archive weighs.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks.harness.material import FOLD, Material, find_material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.spread import interval_of_median, spread, two_or_more
from nnunet_torchserve.backend import Backend, parse_backend
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine.golden import load_networks
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support.untrained import standard_unet

CPU = torch.device("cpu")
LEAST_SPEEDUP = {Backend.OPENVINO_FLOAT32: 1.7}
"""Of a patch of 64³ and more."""

MOST_DIFFERENT = {Backend.OPENVINO_FLOAT32: 1e-6}
"""Share of a whole case's voxels."""

_FEATURES = (32, 64, 128, 256, 320, 320)
_LARGE = 96
"""Voxels along each axis, from which on the standard network has six stages and not five."""

_SEED = 20261129
_OPTIONS = '{"use_mirroring": false, "output_format": "nii"}'


def unpacked(model: Path, scratch: Path, backend: Backend) -> ModelBundle:
    """Its archive, made for the backend and unpacked."""
    request = ArchiveRequest(model, scratch / "store", name="m", folds=(FOLD,), backend=backend)
    [archive] = make_archives(request)
    with zipfile.ZipFile(archive) as content:
        content.extractall(scratch / "unpacked")
    return ModelBundle(scratch / "unpacked")


def in_turns(
    calls: Mapping[Backend, Callable[[], Any]], repetitions: int, quiet: Callable[[], None]
) -> dict[Backend, list[float]]:
    """Seconds of each call, one after the other and again; the first round warms up and is left out."""
    seconds: dict[Backend, list[float]] = {backend: [] for backend in calls}
    for number in range(repetitions + 1):
        quiet()
        for backend, call in calls.items():
            began = time.perf_counter()
            call()
            if number:
                seconds[backend].append(time.perf_counter() - began)
    return seconds


def compared(seconds: dict[Backend, list[float]], backend: Backend) -> dict[str, Any]:
    """Spreads, and how many times sooner the backend is, round by round."""
    ratios = [slow / fast for slow, fast in zip(seconds[Backend.EAGER], seconds[backend], strict=True)]
    return {
        "seconds": {str(each): spread(values) for each, values in seconds.items()},
        "times_sooner": spread(ratios),
        "times_sooner_95": interval_of_median(ratios),
    }


@torch.inference_mode()
def measure_patch(bundle: ModelBundle, backend: Backend, repetitions: int, quiet: Callable[[], None]) -> dict[str, Any]:
    """One patch by both."""
    name, loaded, load_s = bundle.lead.name, {}, {}
    for each in (Backend.EAGER, backend):
        began = time.perf_counter()
        loaded[each] = load_networks(bundle, CPU, each).of(name)
        load_s[str(each)] = round(time.perf_counter() - began, 3)
    networks = loaded[Backend.EAGER]
    generator = torch.Generator().manual_seed(_SEED)
    patch = torch.randn((1, networks.input_channels, *networks.patch_size), generator=generator)
    expected, logits = (loaded[each].forward(FOLD, patch) for each in (Backend.EAGER, backend))
    calls = {each: partial(loaded[each].forward, FOLD, patch) for each in loaded}
    files = {
        "weights_bytes": sum(file.stat().st_size for file in bundle.folder.glob("members/*/fold_*.safetensors")),
        "made_ahead_bytes": sum(file.stat().st_size for file in bundle.folder.glob("members/*/fold_*.openvino.*")),
    }
    return {
        "patch": list(networks.patch_size),
        "load_and_check_seconds": load_s,
        **files,
        "largest_difference_of_largest_logit": float((logits - expected).abs().max() / expected.abs().max()),
        "argmax_different": float((logits.argmax(1) != expected.argmax(1)).float().mean()),
        **compared(in_turns(calls, repetitions, quiet), backend),
    }


def measure_request(
    bundle: ModelBundle, image: Path, backend: Backend, repetitions: int, quiet: Callable[[], None]
) -> dict[str, Any]:
    """A whole request by both: decode, preprocess, network, export, encode, in one process."""
    answers: dict[Backend, Any] = {}
    body, network_s = image.read_bytes(), {Backend.EAGER: 0.0, backend: 0.0}

    def ask(each: Backend, pipeline: Pipeline) -> None:
        answers[each] = pipeline.answer(Request({"body": body}, {"X-Nnunet-Options": _OPTIONS}))
        assert answers[each].status == HTTPStatus.OK, answers[each].body
        assert answers[each].headers["X-Nnunet-Backend"] == each
        timing = re.search(r"network;dur=([\d.]+)", answers[each].headers["Server-Timing"])
        assert timing is not None
        network_s[each] = float(timing[1]) / 1000

    calls = {}
    for each in network_s:
        engine = LocalEngine(bundle, CPU, backend=each)
        calls[each] = partial(ask, each, Pipeline(bundle, engine, Limits(), 3600.0))
    found = compared(in_turns(calls, repetitions, quiet), backend)
    labels = [np.asarray(nib.Nifti1Image.from_bytes(answers[each].body).dataobj) for each in calls]
    return {
        **found,
        "network_seconds_of_the_last": {str(each): seconds for each, seconds in network_s.items()},
        "voxels": labels[0].size,
        "voxels_different": int((labels[0] != labels[1]).sum()),
    }


def standard_network(size: int, folder: Path) -> Path:
    """An untrained model folder of nnU-Net's standard network for cubic patches of that size."""
    stages = 6 if size >= _LARGE else 5
    return standard_unet(folder, features=_FEATURES[:stages], patch_size=(size,) * 3)


def targets_of(backend: Backend, patches: Sequence[dict[str, Any]], request: dict[str, Any]) -> list[Target]:
    """The promises for a backend."""
    least, most = LEAST_SPEEDUP[backend], MOST_DIFFERENT[backend]
    targets = [
        Target(
            f"{backend}: a patch of {each['patch'][0]}³ at least {least:g} times sooner than by eager",
            each["times_sooner"]["median"],
            each["times_sooner"]["median"] >= least,
        )
        for each in patches
    ]
    share = request["voxels_different"] / request["voxels"]
    return [*targets, Target(f"{backend}: at most {most:g} of a case's voxels different", share, share <= most)]


def main() -> int:
    """Measure, write ``results/backends.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", type=parse_backend, default=Backend.OPENVINO_FLOAT32)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128], help="voxels along each axis of a patch")
    parser.add_argument("--repetitions", type=two_or_more, default=9)
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine")
    arguments = parser.parse_args()
    quiet = (lambda: None) if arguments.quick else wait_for_quiet
    backend: Backend = arguments.backend
    patches = []
    with tempfile.TemporaryDirectory(prefix="bench-backends-") as folder:
        scratch = Path(folder)
        material: Material = find_material(scratch)
        for size in arguments.sizes:
            place = scratch / f"patch_{size}"
            bundle = unpacked(standard_network(size, place / "model"), place, backend)
            patches.append(measure_patch(bundle, backend, arguments.repetitions, quiet))
            print(f"  {size}³: {patches[-1]['times_sooner']['median']:.2f} times sooner")
        bundle = unpacked(material.model_folder, scratch / "trained", backend)
        trained = measure_patch(bundle, backend, arguments.repetitions, quiet)
        request = measure_request(bundle, material.fine, backend, arguments.repetitions, quiet)
    print(f"  a whole request: {request['times_sooner']['median']:.2f} times sooner")
    measured = {
        "backend": str(backend),
        "threads": torch.get_num_threads(),
        "made_with": None if bundle.description.backend is None else bundle.description.backend.made_with,
        "standard_network": patches,
        "trained_model": {"patch": trained, "request": request},
    }
    return write_results("backends", material, measured, targets_of(backend, patches, request))


if __name__ == "__main__":
    sys.exit(main())
