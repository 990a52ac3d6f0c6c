"""Volumes in and label maps out: our codecs, from and to memory, beside nnU-Net's reader, nibabel and NumPy with files.

Two images: a real T1 head at 1 mm, and a made volume of 300 x 512 x 512 int16 that compresses like a CT (``ct_like``
says how it is made). SimpleITK and NumPy write them in each format, as their users would.

Decoding is from an encoded image to float32 voxels. Ours has the bytes in memory, as a worker has; a peer opens a file
that was just written, in memory (tmpfs) where there is room, so that no disk is measured. Encoding is from a label map
to a file's bytes, ours in memory, a peer's in such a file. All give the same voxels, which is checked. The sides take
turns, and who goes first alternates too; what counts is the lower quartile of the ratios of the rounds.

Memory is measured in fresh processes that hold nothing but the body: how much the resident set grows at most, in
volumes: the bytes of the image as float32. The same for the worker's whole path from a body to the shared memory
that the engine maps, step by step, where the image's grid is the network's, and where it is not. ``copies`` lists
every copy of the voxels on that path with what was measured, and why it is made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `serve` sets it; read when torch is loaded

import nibabel as nib
import numpy as np
import numpy.typing as npt
import psutil
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy.ndimage import gaussian_filter

from benchmarks.harness.child import last_line_of
from benchmarks.harness.material import describe_image, find_material
from benchmarks.harness.memory import with_extra_memory
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.spread import spread
from nnunet_torchserve import codecs
from nnunet_torchserve.engine import channel
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import Options, OutputFormat
from nnunet_torchserve.orientation import turn_towards
from nnunet_torchserve.painting import Painting
from nnunet_torchserve.preprocess import preprocess
from nnunet_torchserve.volume import LabelMap, Placement, Volume
from support.plans import Plan, Spacing

Result = TypeVar("Result")
Labels = npt.NDArray[np.uint8]
Arrays = npt.NDArray[np.generic]

SEED = 20261123
REPEATS, QUICK_REPEATS = 7, 2

CT_SHAPE, QUICK_CT_SHAPE = (300, 512, 512), (150, 256, 256)
CT_SPACING_MM = (0.75, 0.75, 1.0)
"""Along x, y, z."""

RESAMPLED_MM = (1.5, 1.5, 1.5)

_NOISE_HU = 10
_BANDS = (9, 13)
"""Of two smooth fields; each pair of bands is one of 117 labels."""

OURS, STOCK, NIBABEL, NUMPY = "ours", "nnU-Net", "nibabel", "numpy"

LEAST_RATIO = 1.0
"""Promised against nnU-Net's own writer, and for the large volume against its reader; a head takes either of them
some hundredths of a second. The other peers are reported only: nibabel and NumPy do the same work as ours where nothing
is compressed, and NumPy writes our npz."""

MOST_VOLUMES = 2.1
"""On the path, beside the body: the volume and one more, which at first is the decoder's, and in the end the shared
one; the rest is for what does not grow with the volume."""

_ROOM_BYTES = 4 * 1024**3
_TMPFS = Path("/dev/shm")  # noqa: S108 (only where it has room, with a random name)


class Kind(StrEnum):
    """A way to store an image; the end of its file's name."""

    NIFTI_GZ = "nii.gz"
    NIFTI = "nii"
    NRRD = "nrrd"
    MHA = "mha"
    MHA_PLAIN = "plain.mha"
    NPY = "npy"
    NPZ = "npz"
    NIFTI_SCALED = "scaled.nii"
    NIFTI_FLOAT = "float32.nii"

    @property
    def in_words(self) -> str:
        """For people."""
        return _TITLES.get(self, self.value)

    @property
    def is_array(self) -> bool:
        """Whether it has no geometry of its own."""
        return self in (Kind.NPY, Kind.NPZ)


_TITLES = {
    Kind.NRRD: "nrrd, gzip",
    Kind.MHA: "mha, compressed",
    Kind.MHA_PLAIN: "mha, plain",
    Kind.NPZ: "npz, deflated",
    Kind.NIFTI_SCALED: "nii with a slope and an intercept",
    Kind.NIFTI_FLOAT: "nii of float32",
}
TIMED = (Kind.NIFTI_GZ, Kind.NIFTI, Kind.NRRD, Kind.MHA, Kind.MHA_PLAIN, Kind.NPY, Kind.NPZ)
ANSWERS = (OutputFormat.NIFTI_GZ, OutputFormat.NRRD, OutputFormat.MHA, OutputFormat.NPZ, OutputFormat.JSON)


@dataclass(frozen=True, slots=True)
class Case:
    """One image and the label maps to be encoded on its grid.

    Attributes:
        title: for people.
        image: with its geometry.
        labels: by what they are, each (Z, Y, X).
    """

    title: str
    image: sitk.Image
    labels: Mapping[str, Labels]


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


def head(file: Path) -> Case:
    """The real one; the labels are four bands of its smoothed intensity."""
    image = sitk.ReadImage(str(file))
    for key in image.GetMetaDataKeys():  # NIfTI's fields, which ITK warns of in other formats
        image.EraseMetaData(key)
    smooth = gaussian_filter(sitk.GetArrayFromImage(image).astype(np.float32), 1.5)
    bands = np.quantile(smooth[smooth > 0.1 * smooth.max()], [0.05, 0.3, 0.6, 0.85])
    labels: Labels = np.digitize(smooth, bands).astype(np.uint8)
    return Case("a T1 head", image, {"4 labels": labels})


def ct_like(shape: tuple[int, int, int]) -> Case:
    """A made volume, int16 HU (Z, Y, X), with 4 and with 117 labels.

    An elliptic cylinder in air (-1000) with a rim of fat (-100). Within, a field of normal numbers on a coarse grid,
    interpolated linearly, decides what is lung (-850), fat (-90), soft tissue (about 50, with a second such field of
    20 HU) and bone (600). White noise of 10 HU lies over all, and nothing is below -1024, which stands outside of the
    largest circle in a slice, too. The 4 labels are those tissues; the 117 are the pairs of 9 bands of one field and
    13 of another.
    """
    generator = torch.Generator().manual_seed(SEED)
    depth, height, width = shape
    tissue, tint, other = (smooth_field(shape, coarse, generator) for coarse in ((8, 12, 12), (20, 40, 40), (6, 9, 9)))
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    radius = torch.sqrt((y / 0.75) ** 2 + (x / 0.95) ** 2)
    inside = radius < 0.92

    kinds = torch.bucketize(tissue, torch.tensor([-0.6, -0.1, 0.9]), out_int32=True)
    hounsfield = torch.tensor([-850.0, -90.0, 50.0, 600.0])[kinds] + 20 * tint * (kinds == 2)
    hounsfield = torch.where(inside, hounsfield, torch.where(radius < 1, -100.0, -1000.0))
    hounsfield += _NOISE_HU * torch.randn(shape, generator=generator)
    hounsfield = torch.where(x**2 + y**2 < 1, hounsfield, -1024.0)
    voxels = hounsfield.round_().clamp_(-1024, 3071).to(torch.int16)

    few = ((kinds + 1) * inside).to(torch.uint8)
    one, two = (
        torch.bucketize(field, torch.linspace(-1, 1, bands - 1), out_int32=True)
        for field, bands in zip((tissue, other), _BANDS, strict=True)
    )
    many = ((one * _BANDS[1] + two + 1) * inside).to(torch.uint8)
    image = sitk.GetImageFromArray(voxels.numpy())
    image.SetSpacing(CT_SPACING_MM)
    image.SetOrigin((-0.75 * width / 2, -0.75 * height / 2, -float(depth)))
    return Case("made like a CT", image, {"4 labels": few.numpy(), "117 labels": many.numpy()})


def smooth_field(shape: tuple[int, ...], coarse: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal numbers on a coarse grid (z, y, x), interpolated linearly to ``shape``."""
    grid = torch.randn((1, 1, *coarse), generator=generator)
    return F.interpolate(grid, size=shape, mode="trilinear", align_corners=True)[0, 0]


def image_file(folder: Path, name: str, kind: Kind) -> Path:
    """Where an image is kept in one format.

    Each has a name of its own: ITK takes the voxels of a ``.nii`` for those of the ``.nii.gz`` that lies beside it.
    """
    return folder / f"{name}-{kind.name.lower()}.{kind}"


def write_image(case: Case, kind: Kind, file: Path) -> None:
    """Store a case's image as SimpleITK, or NumPy, does by default."""
    voxels = sitk.GetArrayViewFromImage(case.image)
    if kind is Kind.NPY:
        np.save(file, voxels)
    elif kind is Kind.NPZ:
        np.savez_compressed(file, image=voxels)
    elif kind is Kind.NIFTI_FLOAT:
        sitk.WriteImage(sitk.Cast(case.image, sitk.sitkFloat32), str(file))
    elif kind is Kind.NIFTI_SCALED:
        sitk.WriteImage(case.image, str(file))
        with file.open("r+b") as stored:
            stored.seek(112)  # scl_slope and scl_inter (nifti1.h)
            stored.write(np.array([0.5, -100], "<f4").tobytes())
    else:
        sitk.WriteImage(case.image, str(file), kind is not Kind.MHA_PLAIN)


def decoders(kind: Kind, file: Path, body: bytes) -> dict[str, Callable[[], Arrays]]:
    """How each side gets float32 voxels (C, Z, Y, X); ours is the first."""
    sides: dict[str, Callable[[], Arrays]] = {OURS: lambda: opened(kind, body).read()}
    if kind.is_array:
        sides[NUMPY] = partial(decode_by_numpy, kind, file)
    else:
        sides[STOCK] = lambda: SimpleITKIO().read_images([str(file)])[0]
    if kind in (Kind.NIFTI, Kind.NIFTI_GZ):
        sides[NIBABEL] = lambda: np.asarray(nib.load(file).dataobj, np.float32).T[np.newaxis]
    return sides


def opened(kind: Kind, body: bytes | bytearray) -> codecs.ImageSource:
    """As a worker opens it."""
    placement = Placement(CT_SPACING_MM) if kind.is_array else None
    return codecs.open_image(body, Limits(), "SimpleITKIO", placement)


def decode_by_numpy(kind: Kind, file: Path) -> Arrays:
    """As a user of NumPy would."""
    if kind is Kind.NPY:
        return np.asarray(np.load(file), np.float32)[np.newaxis]
    with np.load(file) as arrays:
        return np.asarray(arrays["image"], np.float32)[np.newaxis]


def encoders(
    case: Case, labels: Labels, output: OutputFormat, source: codecs.ImageSource, file: Path
) -> dict[str, Callable[[], object]]:
    """How each side writes a label map; ours is the first and gives the bytes, the others write to ``file``."""
    form = codecs.answer_form(Options(output_format=output), source.native_format, source.geometry)
    answer = LabelMap(labels, source.geometry)
    painting = Painting({f"organ {value}": (value,) for value in range(1, int(labels.max()) + 1)})
    spacing, origin, direction = case.image.GetSpacing(), case.image.GetOrigin(), case.image.GetDirection()
    sides: dict[str, Callable[[], object]] = {OURS: lambda: codecs.encode(answer, form, source, painting).body}
    if output is OutputFormat.JSON:
        sides["SimpleITK's statistics"] = partial(label_statistics, labels)
        return sides
    if output is OutputFormat.NPZ:
        sides[NUMPY] = lambda: np.savez_compressed(
            file, labels=labels, spacing=spacing, origin=origin, direction=direction
        )
        return sides
    properties = {"sitk_stuff": {"spacing": spacing, "origin": origin, "direction": direction}}
    sides[STOCK] = lambda: SimpleITKIO().write_seg(labels, str(file), properties)
    if output is OutputFormat.NIFTI_GZ:
        affine = source.nifti_header.get_best_affine() if source.nifti_header is not None else np.eye(4)
        sides[NIBABEL] = lambda: nib.save(nib.Nifti1Image(labels.T, affine), file)
    return sides


def label_statistics(labels: Labels) -> int:
    """Voxels, boxes and centroids of all labels by SimpleITK; it writes no report of them."""
    statistics = sitk.LabelShapeStatisticsImageFilter()
    statistics.ComputePerimeterOff()
    statistics.Execute(sitk.GetImageFromArray(labels))
    return int(statistics.GetNumberOfLabels())


def decode(case: Case, name: str, folder: Path, repeats: int, *, quick: bool) -> dict[str, Any]:
    """Every format of one image."""
    voxels = case.image.GetNumberOfPixels()
    plain_bytes = voxels * case.image.GetSizeOfPixelComponent()
    found = {}
    for kind in TIMED:
        file = image_file(folder, name, kind)
        sides = decoders(kind, file, file.read_bytes())
        ours = sides[OURS]()
        assert ours.dtype == np.float32
        assert ours.size == voxels
        different = {side: int(np.count_nonzero(work() != ours)) for side, work in sides.items() if side != OURS}
        del ours
        found[kind.value] = {
            "title": kind.in_words,
            "file_bytes": file.stat().st_size,
            "compression": round(plain_bytes / file.stat().st_size, 3),
            **timed(sides, repeats, quick=quick),
            "different_voxels": different,
        }
        report(f"decode {name}", kind.in_words, found[kind.value])
    return found


def encode(case: Case, name: str, folder: Path, repeats: int, *, quick: bool) -> dict[str, Any]:
    """Every label map and format of one image."""
    source = opened(Kind.NIFTI_GZ, image_file(folder, name, Kind.NIFTI_GZ).read_bytes())
    found: dict[str, Any] = {}
    for title, labels in case.labels.items():
        for output in ANSWERS:
            file = folder / f"answer.{output}"
            sides = encoders(case, labels, output, source, file)
            body = sides[OURS]()
            assert isinstance(body, bytes)
            file.write_bytes(body)
            different = different_labels(output, file, labels)
            sizes = {OURS: len(body)}
            for side, work in sides.items():  # the first of each is not counted
                if side != OURS:
                    file.unlink(missing_ok=True)
                    work()
                    sizes |= {side: file.stat().st_size} if file.exists() else {}
            found.setdefault(title, {})[output.value] = {
                "bytes": sizes,
                **timed(sides, repeats, quick=quick),
                "different_voxels": different,
            }
            file.unlink(missing_ok=True)
            report(f"encode {name}, {title}", output.value, found[title][output.value])
    return found


def different_labels(output: OutputFormat, file: Path, labels: Labels) -> int:
    """Voxels whose label another reader finds to be another in our answer; for a report, voxels miscounted."""
    if output is OutputFormat.JSON:
        counts = np.bincount(labels.ravel())[1:]
        said = [structure["voxels"] for structure in json.loads(file.read_text())["structures"]]
        return int(np.abs(counts - said).sum())
    if output is OutputFormat.NPZ:
        with np.load(file) as arrays:
            return int(np.count_nonzero(arrays["labels"] != labels))
    return int(np.count_nonzero(sitk.GetArrayFromImage(sitk.ReadImage(str(file))) != labels))


def timed(sides: Mapping[str, Callable[[], object]], repeats: int, *, quick: bool) -> dict[str, Any]:
    """Let the sides take turns; seconds of each, and how many times ours a peer takes."""
    rounds: list[dict[str, float]] = []
    names = list(sides)
    for number in range(repeats):
        if not quick:
            wait_for_quiet()
        seconds = {side: seconds_of(sides[side]) for side in (names[::-1] if number % 2 else names)}
        rounds.append({side: round(seconds[side], 4) for side in names})
    peers = [side for side in names if side != OURS]
    return {
        "rounds_seconds": rounds,
        "seconds": {side: spread([each[side] for each in rounds]) for side in names},
        "ratio": {peer: spread([each[peer] / each[OURS] for each in rounds]) for peer in peers},
    }


def seconds_of(work: Callable[[], object]) -> float:
    """Until ``work`` returns; what it gives is freed afterwards."""
    began = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    del result
    return seconds


def report(what: str, form: str, found: Mapping[str, Any]) -> None:
    """Print a line while the benchmark runs."""
    ours = found["seconds"][OURS]["median"]
    ratios = ", ".join(f"{peer} {ratio['median']:.2f} times" for peer, ratio in found["ratio"].items())
    print(f"  {what}, {form}: {ours:.3f} s, {ratios}")


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
    measured: dict[str, Any] = json.loads(last_line_of("benchmarks.stages.codecs", "--be-a-process", *arguments))
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
    case = step("preprocess", partial(preprocess, plan.bundle, volume))
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
    shared, descriptor = channel.share(tuple(data.shape), torch.float32, "benchmark")
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


def targets_of(document: Mapping[str, Any]) -> list[Target]:
    """What is promised, and what was found."""
    targets = []
    for name, formats in document["decode"].items():
        for found in formats.values():
            if name == "ct" and STOCK in found["ratio"]:
                ratio = found["ratio"][STOCK]["q1"]
                claim = (
                    f"decode {name}, {found['title']}: nnU-Net's reader takes at least as long (times ours, quartile)"
                )
                targets.append(Target(claim, ratio, ratio >= LEAST_RATIO))
        different = sum(sum(found["different_voxels"].values()) for found in formats.values())
        targets.append(Target(f"decode {name}: voxels that differ from any peer's", different, different == 0))
    for name, label_maps in document["encode"].items():
        for title, formats in label_maps.items():
            for output, found in formats.items():
                if STOCK in found["ratio"]:
                    ratio = found["ratio"][STOCK]["q1"]
                    claim = f"encode {name}, {title}, {output}: nnU-Net's writer takes at least as long (times ours)"
                    targets.append(Target(claim, ratio, ratio >= LEAST_RATIO))
            different = sum(found["different_voxels"] for found in formats.values())
            targets.append(Target(f"encode {name}, {title}: labels read back otherwise", different, different == 0))
    for found in document["path"].values():
        claim = f"body to engine, {found['title']}: peak beside the body, at most {MOST_VOLUMES} float32 volumes"
        targets.append(Target(claim, found["peak_volumes"], found["peak_volumes"] <= MOST_VOLUMES))
    return targets


def fast_folder() -> tuple[str | None, str]:
    """Where files are kept, and in words."""
    if _TMPFS.is_dir() and shutil.disk_usage(_TMPFS).free > _ROOM_BYTES:
        return str(_TMPFS), "tmpfs"
    return None, "the local disk, in its page cache"


def be_a_process(role: str, *arguments: str) -> int:
    """Measure in this process, print JSON."""
    if role == "decode":
        kind, side, file = arguments
        measured = decode_in_a_process(Kind(kind), side, Path(file))
    else:
        way, file = arguments
        measured = path_in_a_process(WAYS[way], Path(file))
    print(json.dumps(measured))
    return 0


def main(arguments: Sequence[str]) -> int:
    """Measure, write ``results/codecs.json``."""
    if list(arguments[:1]) == ["--be-a-process"]:
        return be_a_process(*arguments[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a trial: small images, two rounds, no waiting; may miss targets"
    )
    quick = parser.parse_args(arguments).quick
    where, place = fast_folder()
    measured: dict[str, Any] = {"files_on": place, "images": {}, "decode": {}, "encode": {}}
    with tempfile.TemporaryDirectory(prefix="bench-codecs-", dir=where) as name_of_folder:
        folder = Path(name_of_folder)
        material = find_material(folder)
        repeats = QUICK_REPEATS if quick else REPEATS
        for name in ("head", "ct"):
            if name == "head":
                case = head(material.coarse if quick else material.fine)
            else:
                case = ct_like(QUICK_CT_SHAPE if quick else CT_SHAPE)
            for kind in Kind:
                write_image(case, kind, image_file(folder, name, kind))
            measured["images"][name] = {
                "title": case.title,
                **describe_image(image_file(folder, name, Kind.NIFTI_GZ)),
                "volume_bytes": case.image.GetNumberOfPixels() * 4,
            }
            measured["decode"][name] = decode(case, name, folder, repeats, quick=quick)
            measured["encode"][name] = encode(case, name, folder, repeats, quick=quick)
            del case
        measured["images"]["ct"]["made"] = " ".join(str(ct_like.__doc__).split())
        measured["decode_memory"] = memory_of_decoding(folder, "ct")
        measured["path"] = memory_of_the_path(folder, "ct")
    measured["copies"] = copies(measured["path"])
    return write_results("codecs", material, measured, targets_of(measured))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
