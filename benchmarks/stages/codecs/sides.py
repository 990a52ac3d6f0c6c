"""How each side reads an image and writes a label map: ours from and to memory, the peers' with files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from benchmarks.stages.codecs.images import CT_SPACING_MM, Case, Kind, Labels
from nnunet_torchserve import codecs
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import Options, OutputFormat
from nnunet_torchserve.painting import Painting
from nnunet_torchserve.volume import LabelMap, Placement

Arrays = npt.NDArray[np.generic]

OURS, STOCK, NIBABEL, NUMPY = "ours", "nnU-Net", "nibabel", "numpy"


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
    about = codecs.About([source], painting)
    sides: dict[str, Callable[[], object]] = {OURS: lambda: codecs.encode(answer, form, about).body}
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
