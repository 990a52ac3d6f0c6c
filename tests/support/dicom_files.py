"""DICOM series for tests, made by pydicom: small, of any body, in any position, in any encoding."""

from __future__ import annotations

import gzip
import io
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, FileMetaDataset, dcmwrite
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)

from support.volumes import rotation

Matrix = npt.NDArray[np.float64]
Voxels = npt.NDArray[Any]

SECRET = "DOE^JANE^CANARY"  # noqa: S105 (a name)
"""Stands wherever a text of a patient may stand."""

SECRET_ID, SECRET_DATE = "CANARY4711", "19530427"
CLASSES = {
    "CT": CTImageStorage,
    "MR": MRImageStorage,
    "PT": PositronEmissionTomographyImageStorage,
    "enhanced CT": EnhancedCTImageStorage,
    "enhanced MR": EnhancedMRImageStorage,
    "enhanced PT": EnhancedPETImageStorage,
    "converted CT": LegacyConvertedEnhancedCTImageStorage,
    "converted MR": LegacyConvertedEnhancedMRImageStorage,
    "converted PT": LegacyConvertedEnhancedPETImageStorage,
}
SEVERAL_FRAMES = tuple(CLASSES)[3:]
"""Those of :data:`CLASSES` whose objects hold a frame for each slice."""


@dataclass(frozen=True)
class Acquisition:
    """How a patient lay, and how the slices were cut.

    Attributes:
        row, column: LPS directions in which column and row numbers grow.
        backwards: the files' order and InstanceNumber run against the normal.
    """

    row: tuple[float, float, float]
    column: tuple[float, float, float]
    backwards: bool = False

    def affine(self, spacing: Sequence[float] = (1.5, 1.5, 1.5), origin: Sequence[float] = (-20, 11, 7)) -> Matrix:
        """Voxel (x, y, z) to LPS mm; z runs along the normal."""
        row, column = np.array(self.row), np.array(self.column)
        affine = np.eye(4)
        affine[:3, :3] = np.stack([row, column, np.cross(row, column)], axis=1) * spacing
        affine[:3, 3] = origin
        return affine


def _turned(angles: Sequence[float]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    turn = rotation(angles)
    row, column = turn[:, 0], turn[:, 1]
    return (row[0], row[1], row[2]), (column[0], column[1], column[2])


ACQUISITIONS = {
    "axial": Acquisition((1, 0, 0), (0, 1, 0)),
    "coronal": Acquisition((1, 0, 0), (0, 0, -1)),
    "sagittal": Acquisition((0, 1, 0), (0, 0, -1)),
    "oblique": Acquisition(*_turned((0.3, -0.2, 0.25))),
    "prone": Acquisition((-1, 0, 0), (0, -1, 0)),
    "feet first": Acquisition((-1, 0, 0), (0, 1, 0)),
    "reversed": Acquisition((1, 0, 0), (0, 1, 0), backwards=True),
    "reversed sagittal": Acquisition((0, 1, 0), (0, 0, -1), backwards=True),
}


def header(modality: str = "CT", seed: str = "a", **changes: object) -> Dataset:
    """What all images of a series say; ``changes`` are pydicom's keywords, ``None`` leaves one out."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID = CLASSES[modality]
    ds.Modality = modality[-2:]
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = SECRET, SECRET_ID, SECRET_DATE, "O"
    ds.InstitutionName = ds.ReferringPhysicianName = ds.SeriesDescription = ds.StudyDescription = SECRET
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = SECRET_DATE
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[seed, "study"])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[seed, "series"])
    ds.FrameOfReferenceUID = generate_uid(entropy_srcs=[seed, "frame"])
    ds.SliceThickness = "3"  # which it is not
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    change(ds, **changes)
    return ds


def change(ds: Dataset, **changes: object) -> Dataset:
    """Set elements by keyword, or leave them out where the value is ``None``."""
    for name, value in changes.items():
        if value is None:
            if name in ds:
                delattr(ds, name)
        else:
            setattr(ds, name, value)
    return ds


def _numbers(values: Iterable[float]) -> list[str]:
    """DS of at most 16 characters, as scanners write them."""
    return [np.format_float_positional(np.float64(f"{value:.9g}"), trim="-")[:16] for value in values]


def set_pixels(ds: Dataset, stored: Voxels, bits: int | None = None) -> Dataset:
    """Pixels (rows, columns) or (frames, rows, columns)."""
    ds.Rows, ds.Columns = stored.shape[-2:]
    if stored.ndim == 3:
        ds.NumberOfFrames = stored.shape[0]
    ds.BitsAllocated = stored.dtype.itemsize * 8
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.PixelData = stored.tobytes()
    ds["PixelData"].VR = "OW" if stored.dtype.itemsize > 1 else "OB"
    return ds


def series(
    voxels: Voxels,
    affine: Matrix,
    modality: str = "CT",
    seed: str = "a",
    *,
    backwards: bool = False,
    bits: int | None = None,
    rescale: Callable[[int], tuple[float, float]] | None = lambda _: (1.0, -1024.0),
    **changes: object,
) -> list[Dataset]:
    """One object a slice.

    Args:
        voxels: stored numbers (Z, Y, X).
        affine: voxel (x, y, z) to LPS mm.
        modality: of :data:`CLASSES`.
        seed: of its UIDs.
        backwards: the slices come, and are numbered, from the last to the first.
        bits: stored of each number.
        rescale: slice -> slope and intercept.
        changes: of every header.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    axes = affine[:3, :3] / spacing
    made = []
    for z, stored in enumerate(voxels):
        ds = header(modality, seed)
        ds.SOPInstanceUID = generate_uid(entropy_srcs=[seed, "image", str(z)])
        ds.InstanceNumber = len(voxels) - z if backwards else z + 1
        ds.ImagePositionPatient = _numbers(affine[:3, 3] + z * affine[:3, 2])
        ds.ImageOrientationPatient = _numbers([*axes[:, 0], *axes[:, 1]])
        ds.PixelSpacing = _numbers([spacing[1], spacing[0]])
        if rescale is not None:
            ds.RescaleSlope, ds.RescaleIntercept = _numbers(rescale(z))
        set_pixels(ds, stored, bits)
        made.append(change(ds, **changes))
    return made[::-1] if backwards else made


def file_of(ds: Dataset, syntax: str = ExplicitVRLittleEndian, *, preamble: bool = True) -> bytes:
    """A DICOM file of one object, its numbers in ``syntax``'s order already."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ds.get("SOPClassUID", CTImageStorage)
    meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID", "1.2.3")
    meta.TransferSyntaxUID = syntax
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are meant to be wrong
        if preamble:
            whole = FileDataset("", ds, preamble=b"\0" * 128, file_meta=meta)
            dcmwrite(file, whole, enforce_file_format=True)
        else:
            implicit = syntax == ImplicitVRLittleEndian
            dcmwrite(file, ds, implicit_vr=implicit, little_endian=True, force_encoding=True)
    return file.getvalue()


def files_of(datasets: Iterable[Dataset], syntax: str = ExplicitVRLittleEndian) -> dict[str, bytes]:
    """Files with names that say nothing of their order."""
    return {f"{SECRET}/IM{number * 7919 % 10007:05}": file_of(ds, syntax) for number, ds in enumerate(datasets)}


def zipped(files: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of them."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, method, 1)
    return body.getvalue()


def tarred(files: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT, *, packed: bool = False) -> bytes:
    """A tar of them, in gzip or not."""
    body = io.BytesIO()
    with tarfile.open(mode="w", fileobj=body, format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return gzip.compress(body.getvalue(), 1, mtime=0) if packed else body.getvalue()


def zip_of(datasets: Iterable[Dataset], syntax: str = ExplicitVRLittleEndian) -> bytes:
    """A zip of a series."""
    return zipped(files_of(datasets, syntax))


def enhanced(
    voxels: Voxels,
    affine: Matrix,
    modality: str = "enhanced CT",
    seed: str = "a",
    *,
    order: Sequence[int] | None = None,
    rescale: Callable[[int], tuple[float, float]] = lambda _: (1.0, -1024.0),
    bits: int | None = None,
    **changes: object,
) -> Dataset:
    """One object with a frame a slice, in any order, each with its own rescale."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    axes = affine[:3, :3] / spacing
    order = range(len(voxels)) if order is None else order
    ds = header(modality, seed)
    ds.SOPInstanceUID = generate_uid(entropy_srcs=[seed, "image"])
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = _numbers([*axes[:, 0], *axes[:, 1]])
    measures.PixelSpacing = _numbers([spacing[1], spacing[0]])
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Items([orientation]), Items([measures])
    ds.SharedFunctionalGroupsSequence = Items([shared])
    frames = []
    for z in order:
        frame, position, values = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = _numbers(affine[:3, 3] + z * affine[:3, 2])
        values.RescaleSlope, values.RescaleIntercept = _numbers(rescale(z))
        values.RescaleType = "HU"
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = Items([position]), Items([values])
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = Items(frames)
    set_pixels(ds, np.ascontiguousarray(voxels[list(order)]), bits)
    return change(ds, **changes)


def compressed(ds: Dataset, frames: Sequence[bytes], syntax: str, *, fragments: int = 1, table: bool = True) -> bytes:
    """A file whose pixels are these compressed frames.

    Args:
        ds: with the pixels' description; its pixels are replaced.
        frames: codestreams.
        syntax: what they are.
        fragments: pieces of each.
        table: whether the basic offset table says where each begins.
    """
    whole = change(ds, PixelData=encapsulate(list(frames), fragments_per_frame=fragments, has_bot=table))
    whole["PixelData"].VR = "OB"
    whole["PixelData"].is_undefined_length = True
    return file_of(whole, syntax)
