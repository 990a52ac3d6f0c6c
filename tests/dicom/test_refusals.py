"""What is no volume, or not surely one, is refused: with a stable code, what is wrong, and what would be right."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import math
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pydicom.dataset import Dataset

from nnunet_torchserve import codecs
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.codecs.dicom import elements, header, library
from nnunet_torchserve.codecs.dicom.problem import Problem
from nnunet_torchserve.errors import DicomReason, DicomRefused, Malformed, ServingError, TooLarge, WrongChannels
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from support.dicom_files import (
    ACQUISITIONS,
    SECRET,
    SECRET_DATE,
    SECRET_ID,
    change,
    enhanced,
    file_of,
    files_of,
    series,
    tarred,
    zip_of,
    zipped,
)

SHAPE = (6, 5, 4)
VOXELS = np.arange(120, dtype=np.int16).reshape(SHAPE)
AFFINE = ACQUISITIONS["axial"].affine((1, 1, 2.5), origin=(0, 0, 100))
ENOUGH_WORDS = 40
"""Characters of a message that says something."""


def images(**changes: Any) -> list[Dataset]:
    return series(VOXELS, AFFINE, **changes)


def moved(z: int, x: float = 0, y: float = 0, by: float = 0) -> list[Dataset]:
    """The series with one slice elsewhere."""
    found = images()
    place = [float(mm) for mm in found[z].ImagePositionPatient]
    return [
        change(ds, ImagePositionPatient=[place[0] + x, place[1] + y, place[2] + by]) if number == z else ds
        for number, ds in enumerate(found)
    ]


def tilted(degrees: float) -> list[Dataset]:
    affine = AFFINE.copy()
    found = series(VOXELS, affine)
    for z, ds in enumerate(found):
        ds.ImagePositionPatient = [0, f"{z * 2.5 * math.tan(math.radians(degrees)):.6f}", 100 + z * 2.5]
    return found


def with_one(z: int, **changes: Any) -> list[Dataset]:
    return [change(ds, **changes) if number == z else ds for number, ds in enumerate(images())]


def another(seed: str, **changes: Any) -> list[Dataset]:
    return series(VOXELS, AFFINE, seed=seed, **changes)


SERIES: dict[str, tuple[Callable[[], list[Dataset]], DicomReason, str]] = {
    "a missing slice": (lambda: [*images()[:2], *images()[3:]], DicomReason.MISSING_SLICES, "102.50 and 107.50 mm"),
    "two gaps": (lambda: [images()[z] for z in (0, 2, 3, 5)], DicomReason.MISSING_SLICES, "2 slices are missing"),
    "a doubled slice": (
        lambda: [*images(), change(images()[2], SOPInstanceUID="1.2.3.4")],
        DicomReason.DOUBLED_SLICES,
        "105.00 mm",
    ),
    "one UID, two objects": (
        lambda: [*images(), change(images()[2], RescaleIntercept="0")],
        DicomReason.DOUBLED_SLICES,
        "SOPInstanceUID",
    ),
    "an uneven slice": (lambda: moved(3, by=0.8), DicomReason.UNEVEN_SLICES, "1.700 mm"),
    "a slice beside the others": (lambda: moved(3, x=0.5), DicomReason.UNEVEN_SLICES, "0.50 mm"),
    "tilt of 15 degrees": (lambda: tilted(15), DicomReason.GANTRY_TILT, "15.00 degrees"),
    "tilt of 2 degrees": (lambda: tilted(2), DicomReason.GANTRY_TILT, "2.00 degrees"),
    "tilt of half a degree": (lambda: tilted(-0.5), DicomReason.GANTRY_TILT, "0.50 degrees"),
    "two series": (lambda: images() + another("b"), DicomReason.SEVERAL_SERIES, "(CT, 6 images)"),
    "another patient's image": (lambda: with_one(2, PatientID="OTHER"), DicomReason.SEVERAL_PATIENTS, "2 different"),
    "another frame of reference": (
        lambda: with_one(2, FrameOfReferenceUID="1.2.9"),
        DicomReason.SEVERAL_FRAMES_OF_REFERENCE,
        "positions",
    ),
    "a localizer": (lambda: images(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), DicomReason.LOCALIZER, "6 of 6"),
    "a localizer among others": (
        lambda: with_one(0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        DicomReason.LOCALIZER,
        "1 of 6",
    ),
    "a single image": (lambda: images()[:1], DicomReason.SINGLE_IMAGE, "at least two"),
    "no position": (lambda: with_one(1, ImagePositionPatient=None), DicomReason.NO_POSITION, "ImagePositionPatient"),
    "an empty position": (lambda: with_one(1, ImagePositionPatient=""), DicomReason.NO_POSITION, "ImagePosition"),
    "no orientation": (lambda: images(ImageOrientationPatient=None), DicomReason.NO_POSITION, "ImageOrientation"),
    "no pixel spacing": (lambda: images(PixelSpacing=None), DicomReason.NO_POSITION, "PixelSpacing"),
    "an orientation that is none": (
        lambda: images(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]),
        DicomReason.NO_POSITION,
        "right angles",
    ),
    "positions that are no numbers": (
        lambda: images(ImagePositionPatient=["nan", "0", "0"]),
        DicomReason.NO_POSITION,
        "no number",
    ),
    "mixed orientations": (
        lambda: with_one(2, ImageOrientationPatient=[0, 1, 0, 0, 0, -1]),
        DicomReason.UNEQUAL_IMAGES,
        "1 of 6 images",
    ),
    "mixed pixel spacings": (lambda: with_one(2, PixelSpacing=[2, 2]), DicomReason.UNEQUAL_IMAGES, "(2.0, 2.0)"),
    "mixed sizes": (
        lambda: [*images()[:5], *series(np.zeros((6, 7, 4), np.int16), AFFINE)[5:]],
        DicomReason.UNEQUAL_IMAGES,
        "(7, 4)",
    ),
    "a time series": (
        lambda: [change(ds, SOPInstanceUID=f"1.2.{t}.{z}") for t in range(3) for z, ds in enumerate(images())],
        DicomReason.TIME_SERIES,
        "3 times",
    ),
    "no UID of the series": (lambda: images(SeriesInstanceUID=None), DicomReason.INCOMPLETE, "6 of 6"),
    "a blank UID of the study": (lambda: images(StudyInstanceUID=""), DicomReason.INCOMPLETE, "6 of 6"),
    "no class": (lambda: images(SOPClassUID=None), DicomReason.INCOMPLETE, "SOPClassUID"),
    "no image of these": (
        lambda: images(SOPClassUID="1.2.840.10008.5.1.4.1.1.7"),
        DicomReason.NO_IMAGES,
        "none of 6 DICOM files",
    ),
    "no pixels": (lambda: with_one(4, PixelData=None), DicomReason.TRUNCATED_PIXELS, "no pixels"),
}


def refusal(body: bytes, limits: Limits | None = None, **more: Any) -> ServingError:
    with pytest.raises(ServingError) as raised:
        codecs.open_image(body, limits or Limits(), "SimpleITKIO", **more).read()
    return raised.value


def outcome(body: bytes) -> ServingError | None:
    """``None`` if it was read."""
    try:
        codecs.open_image(body, Limits(), "SimpleITKIO").read()
    except ServingError as error:
        return error
    return None


@pytest.mark.parametrize("name", SERIES)
def test_a_series_that_is_no_volume_is_refused(name: str) -> None:
    make, reason, words = SERIES[name]
    error = refusal(zip_of(make()))
    assert (error.code, error.status) == (reason, HTTPStatus.UNPROCESSABLE_ENTITY), error
    assert words in str(error), error
    assert len(str(error)) > ENOUGH_WORDS
    assert "CANARY" not in str(error)


def test_every_reason_is_met_and_documented() -> None:
    documented = Path(__file__).parents[2].joinpath("docs", "dicom.md").read_text()
    http = Path(__file__).parents[2].joinpath("docs", "http.md").read_text()
    met = {reason for _, reason, _ in SERIES.values()}
    elsewhere = {DicomReason.COLOUR, DicomReason.UNSUPPORTED_PIXELS, DicomReason.UNKNOWN_SERIES}
    assert met | elsewhere == set(DicomReason)
    for reason in DicomReason:
        assert f"`{reason}`" in documented, reason
    assert "`dicom_unavailable`" in documented
    assert "`orientation_unknown`" in http


def test_the_list_of_several_series_names_no_more_than_uids_modalities_and_numbers() -> None:
    other = series(VOXELS, AFFINE, "MR", "b")
    error = refusal(zip_of(images() + other))
    uids = {ds.SeriesInstanceUID: ds.Modality for ds in (*images(), *other)}
    for uid, modality in uids.items():
        assert f"{uid} ({modality}, 6 images)" in str(error)
    assert SECRET not in str(error)
    unknown = refusal(zip_of(images() + other), series_uid="1.2.3")
    assert unknown.code == DicomReason.UNKNOWN_SERIES
    assert all(uid in str(unknown) for uid in uids)


def test_frames_of_an_enhanced_object_are_checked_as_images_are() -> None:
    ds = enhanced(VOXELS, AFFINE)
    frames = ds.PerFrameFunctionalGroupsSequence
    frames[2].PlanePositionSequence[0].ImagePositionPatient = [0, 0, 103.9]
    assert refusal(file_of(ds)).code == DicomReason.UNEVEN_SLICES
    del frames[2].PlanePositionSequence
    assert refusal(file_of(ds)).code == DicomReason.NO_POSITION
    del frames[2:]
    assert refusal(file_of(ds)).code == "malformed"


def pieces(*counts: int, total: int | None = None) -> list[Dataset]:
    """An enhanced object whose frames were split into several; they come from the last to the first."""
    made, first = [], 0
    for number, count in enumerate(counts, start=1):
        made.append(
            change(
                enhanced(VOXELS, AFFINE, order=range(first, first + count)),
                SOPInstanceUID=f"1.2.3.{number}",
                ConcatenationUID="1.2.3.9",
                InConcatenationNumber=number,
                InConcatenationTotalNumber=total,
                ConcatenationFrameOffsetNumber=first,
            )
        )
        first += count
    return made[::-1]


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2"])
def test_an_end_is_missed_where_objects_say_how_many_there_are(syntax: str) -> None:
    whole = pieces(2, 2, 2, total=3)
    assert outcome(zip_of(whole, syntax)) is None
    assert refusal(zip_of(whole[1:], syntax)).code == DicomReason.MISSING_SLICES
    assert refusal(zip_of(whole[:-1], syntax)).code == DicomReason.MISSING_SLICES
    unsaid = pieces(2, 2, 2)
    assert refusal(zip_of(unsaid[:-1], syntax)).code == DicomReason.MISSING_SLICES
    pet = series(VOXELS, AFFINE, "PT", NumberOfSlices=6)
    assert outcome(zip_of(pet, syntax)) is None
    error = refusal(zip_of(pet[:-1], syntax))
    assert error.code == DicomReason.MISSING_SLICES
    assert "5 slices" in str(error)


def test_what_is_wrong_with_an_image_is_kept_without_its_bytes() -> None:
    assert {field.name for field in dataclasses.fields(Problem)} == {"code", "message"}
    for error in (Malformed("damaged"), TooLarge("large"), DicomRefused(DicomReason.COLOUR, "colour")):
        again = Problem.of(error).error()
        assert (type(again), again.code, str(again)) == (type(error), error.code, str(error))


def test_several_frames_that_do_not_say_where_they_lie_are_refused() -> None:
    ds = images()[0]
    ds.NumberOfFrames, ds.PixelData = 6, VOXELS.tobytes()
    assert refusal(file_of(ds)).code == DicomReason.NO_POSITION


def test_an_archive_without_dicom_is_no_format() -> None:
    for body in (zipped({"a.txt": b"x" * 200}), tarred({"a.txt": b"x" * 200})):
        error = refusal(body)
        assert (error.status, error.code) == (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unknown_format")


def test_a_place_in_the_options_is_refused() -> None:
    from nnunet_torchserve.volume import Placement

    assert refusal(zip_of(images()), placement=Placement((1.0, 1.0, 1.0))).code == "bad_option"


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_more_files_frames_elements_or_bytes_than_allowed_are_too_large() -> None:
    body = zip_of(images())
    tar = tarred(files_of(images()))
    one = file_of(enhanced(VOXELS, AFFINE))
    for limits in (
        Limits(dicom_files=5),
        Limits(dicom_frames=5),
        Limits(dicom_elements=100),
        Limits(expanded_bytes=3000),
        Limits(voxels=119),
    ):
        for packed in (body, tar):
            error = refusal(packed, limits)
            assert (error.status, error.code) == (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large"), error
    for limits in (Limits(dicom_frames=5), Limits(voxels=119)):
        assert refusal(one, limits).code == "too_large"


def test_a_header_longer_than_allowed_is_too_large() -> None:
    found = images()
    found[0].add_new(0x00091001, "OB", b"x" * 200_000)
    assert refusal(zip_of(found), Limits(dicom_header_bytes=10_000)).code == "too_large"


@pytest.mark.parametrize("undefined", [True, False])
@pytest.mark.parametrize("tag", [0x00081140, 0x52009230])
def test_sequences_within_each_other_are_counted_before_anything_reads_them(undefined: bool, tag: int) -> None:
    """100,000 of them in less than a megabyte of an archive."""
    depth = 100_000
    group, element = struct.pack("<H", tag >> 16), struct.pack("<H", tag & 0xFFFF)
    if undefined:
        deep = (group + element + b"SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * depth
    else:
        pieces = []
        inside = 20 * depth
        for _ in range(depth):
            inside -= 12
            pieces.append(group + element + b"SQ\0\0" + struct.pack("<L", inside))
            inside -= 8
            pieces.append(b"\xfe\xff\x00\xe0" + struct.pack("<L", inside))
        deep = b"".join(pieces)
    files = files_of(images())
    name = next(iter(files))
    pixels = files[name].index(b"\xe0\x7f\x10\x00")
    files[name] = files[name][:pixels] + deep + files[name][pixels:]
    error = outcome(zipped(files, zipfile.ZIP_DEFLATED))
    if undefined or tag == 0x52009230:
        assert error is not None
        assert error.code == "too_large"
    else:
        assert error is None  # it is stepped over: nobody wants it


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
@pytest.mark.parametrize("what", ["items", "elements", "shared"])
def test_items_beyond_the_frames_are_refused_before_anything_reads_them(
    what: str, syntax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of defined length, which files of implicit encoding do not show to be any."""
    read: list[int] = []

    def noted(wanted: list[bytes], encoding: elements.Encoding) -> Any:
        read.append(1)
        return library.data_set(wanted, encoding)

    monkeypatch.setattr(header, "data_set", noted)
    monkeypatch.setattr(elements, "_ELEMENTS_A_FRAME", 100)
    ds = enhanced(VOXELS, AFFINE)
    assert outcome(file_of(ds, syntax)) is None
    assert read == [1]
    frames = ds.PerFrameFunctionalGroupsSequence
    if what == "items":
        frames.extend([Dataset() for _ in range(10_000)])
    elif what == "shared":
        ds.SharedFunctionalGroupsSequence.extend([Dataset() for _ in range(100)])
    else:
        for number in range(2000):
            frames[0].add_new(0x00091000 + number % 200 + (number // 200 << 17), "LO", "")
    assert refusal(file_of(ds, syntax)).code == ("too_large" if what == "elements" else "malformed")
    assert read == [1]
    if what == "items":
        ds.NumberOfFrames = 10_006
        assert refusal(file_of(ds, syntax), Limits(dicom_frames=6)).code == "too_large"
        assert read == [1]
        monkeypatch.setattr(elements, "_MOST_AT_ONCE", 10_000)  # whatever frames are declared
        assert refusal(file_of(ds, syntax), Limits(dicom_frames=20_000)).code == "too_large"
        assert read == [1]


def test_sequences_that_an_implicit_file_does_not_show_are_counted_too() -> None:
    depth = 100_000
    tag = struct.pack("<HH", 0x5200, 0x9230)
    pieces = [
        tag + struct.pack("<L", 16 * left + 8) + b"\xfe\xff\x00\xe0" + struct.pack("<L", 16 * left)
        for left in reversed(range(depth))
    ]
    files = files_of(images(), "1.2.840.10008.1.2")
    name = next(iter(files))
    pixels = files[name].index(b"\xe0\x7f\x10\x00")
    files[name] = files[name][:pixels] + b"".join(pieces) + files[name][pixels:]
    assert refusal(zipped(files, zipfile.ZIP_DEFLATED)).code == "too_large"


def test_a_sequence_that_is_said_to_be_bytes_is_refused() -> None:
    """pydicom would read it all the same."""
    whole = file_of(enhanced(VOXELS, AFFINE))
    at = whole.index(struct.pack("<HH", 0x5200, 0x9230) + b"SQ") + 4
    assert refusal(whole[:at] + b"UN" + whole[at + 2 :]).code == "malformed"


def test_no_more_of_a_bomb_is_unpacked_than_is_allowed() -> None:
    """Zeros that a zip, a tar.gz and a deflated data set would unpack to."""
    size = 64 * 1024**2
    bomb = {"a": bytes(size)}
    limits = Limits(expanded_bytes=1024**2)
    import tracemalloc

    for body in (zipped(bomb, zipfile.ZIP_DEFLATED), tarred(bomb, packed=True)):
        tracemalloc.start()
        assert refusal(body, limits).code == "too_large"
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 * 1024**2


def test_bytes_that_no_file_of_an_archive_has_are_counted_too() -> None:
    """Deflated data sets of a few packed bytes; a tar's entries that are no files; zeros behind its end."""
    limits = Limits(expanded_bytes=1024**2)
    sparse = images()
    for ds in sparse:
        ds.add_new(0x00091001, "OB", bytes(300_000))
    deflated = zip_of(sparse, "1.2.840.10008.1.2.1.99")
    assert len(deflated) < 20_000
    assert outcome(deflated) is None
    assert refusal(deflated, limits).code == "too_large"
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 2 * 1024**2
    long = name.tobuf() + bytes(name.size) + tarred(files_of(images()))
    assert outcome(gzip.compress(long)) is None
    assert refusal(gzip.compress(long), limits).code == "too_large"
    assert refusal(gzip.compress(tarred(files_of(images())) + bytes(2 * 1024**2)), limits).code == "too_large"


def test_a_tar_behind_a_tar_is_not_lost() -> None:
    files = list(files_of(images()).items())
    for packed in (False, True):
        halves = [tarred(dict(half), packed=packed) for half in (files[:3], files[3:])]
        assert outcome(halves[0]) is None
        assert refusal(b"".join(halves)).code == "malformed"
        assert outcome(tarred(dict(files), packed=packed)) is None


@pytest.mark.parametrize(
    "body", [zip_of(images()), tarred(files_of(images())), tarred(files_of(images()), packed=True)]
)
def test_an_archive_that_is_cut_off_is_refused_wherever(body: bytes) -> None:
    whole = len(body.rstrip(b"\0"))
    for end in range(300, whole, whole // 40):
        error = refusal(body[:end])
        assert error.code in {"malformed", "too_large", "unknown_format", DicomReason.TRUNCATED_PIXELS}, (end, error)


def test_a_zip_whose_bytes_were_changed_is_noticed() -> None:
    body = bytearray(zip_of(images()))
    at = bytes(body).index(b"\xe0\x7f\x10\x00") + 20
    body[at] ^= 0xFF
    assert refusal(bytes(body)).code == "malformed"


def test_every_length_in_a_header_may_lie() -> None:
    """Bytes of a header, one after the other: an answer or a refusal, and never anything else."""
    files = files_of(images()[:2])
    name = next(iter(files))
    original = files[name]
    end = original.index(b"\xe0\x7f\x10\x00") + 12
    for at in range(132, end, 5):
        for value in (0x7F, 0xFF):
            changed = bytearray(original)
            changed[at] = value
            error = outcome(zipped(files | {name: bytes(changed)}))
            assert error is None or error.status < HTTPStatus.INTERNAL_SERVER_ERROR, error
            assert "CANARY" not in str(error)


def test_names_in_an_archive_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute ones, ones that climb out, links, and the file names in a DICOMDIR."""
    monkeypatch.chdir(tmp_path)
    names = ("/etc/passwd", "../../escape", "C:\\x", "http://127.0.0.1:9/x", "a/../b", "\0")
    files = dict(zip(names, files_of(images()).values(), strict=True))
    opened: list[str] = []
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    before = set(tmp_path.rglob("*"))
    codecs.open_image(zipped(files), Limits(), "SimpleITKIO").read()
    seen = list(opened)
    assert set(tmp_path.rglob("*")) == before
    assert not [name for name in seen if name in names]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("x")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert refusal((tmp_path / "a.tar").read_bytes()).code == "unknown_format"


# --- the whole request ------------------------------------------------------------------------------------------------


@pytest.fixture
def served(pipeline: Callable[[str], Pipeline]) -> Callable[[str], Pipeline]:
    def serve(name: str) -> Pipeline:
        model = pipeline(name)
        bundle = ModelBundle(model.bundle.folder)
        bundle.lead.description = bundle.lead.description.model_copy(update={"input_orientation": "LPS"})
        return Pipeline(bundle, model.engine, Limits(), 600.0)

    return serve


def ask(served: Pipeline, parts: dict[str, bytes], **options: object) -> dict[str, Any]:
    asked = json.dumps({"folds": [0], "use_mirroring": False, "output_format": "json"} | options).encode()
    response = served.answer(Request(parts | {"options": asked}, {}))
    found: dict[str, Any] = json.loads(response.body)
    return {"status": int(response.status), "headers": dict(response.headers)} | found


def volumes(shape: tuple[int, int, int] = (16, 16, 16)) -> npt.NDArray[np.int16]:
    return np.random.default_rng(0).integers(0, 500, shape).astype(np.int16)


def test_channels_are_series_of_one_patient_in_one_place(served: Callable[[str], Pipeline]) -> None:
    model = served("regions")
    affine = ACQUISITIONS["axial"].affine()
    first = series(volumes(), affine, "MR", "a")
    frame = first[0].FrameOfReferenceUID

    def answer(second: list[Dataset], first: list[Dataset] = first) -> tuple[int, str | None]:
        found = ask(model, {"image_0000": zip_of(first), "image_0001": zip_of(second)})
        return found["status"], found.get("code")

    assert answer(series(volumes(), affine, "MR", "b", FrameOfReferenceUID=frame)) == (200, None)
    backwards = series(volumes(), affine, "MR", "b", FrameOfReferenceUID=frame, backwards=True)
    assert answer(backwards) == (200, None)
    other = series(volumes(), affine, "MR", "b", FrameOfReferenceUID=frame, PatientID="OTHER")
    assert answer(other) == (422, DicomReason.SEVERAL_PATIENTS)
    assert answer(series(volumes(), affine, "MR", "b")) == (422, DicomReason.SEVERAL_FRAMES_OF_REFERENCE)
    assert answer(first) == (422, "channels_disagree")
    nowhere = series(volumes(), affine, "MR", "a", FrameOfReferenceUID=None)
    study = first[0].StudyInstanceUID
    elsewhere = series(volumes(), affine, "MR", "b", FrameOfReferenceUID=None)
    assert answer(elsewhere, nowhere) == (422, DicomReason.SEVERAL_FRAMES_OF_REFERENCE)
    together = series(volumes(), affine, "MR", "b", FrameOfReferenceUID=None, StudyInstanceUID=study)
    assert answer(together, nowhere) == (200, None)
    shifted = ACQUISITIONS["axial"].affine(origin=(-20, 11, 7.2))
    assert answer(series(volumes(), shifted, "MR", "b", FrameOfReferenceUID=frame)) == (422, "channels_disagree")


def test_a_channel_that_is_named_after_a_modality_takes_no_other() -> None:
    found = {name: open_dicom(series(VOXELS, AFFINE, name, name)) for name in ("CT", "MR", "PT")}
    for name, source in found.items():
        others = {"CT", "MR", "PT"} - {name}
        for channel in (name, name.lower(), "T1", "CT and MR", "CTA"):
            codecs.check_one_body([source], [channel], [source.geometry])
        for channel in others | ({"PET"} if name != "PT" else set()):
            with pytest.raises(WrongChannels, match=name):
                codecs.check_one_body([source], [channel], [source.geometry])


def open_dicom(found: list[Dataset]) -> codecs.DicomSource:
    source = codecs.open_image(zip_of(found), Limits(), "SimpleITKIO")
    assert isinstance(source, codecs.DicomSource)
    return source


def test_one_zip_may_hold_the_series_of_several_channels(served: Callable[[str], Pipeline]) -> None:
    affine = ACQUISITIONS["axial"].affine()
    first = series(volumes(), affine, "MR", "a")
    second = series(volumes(), affine, "MR", "b", FrameOfReferenceUID=first[0].FrameOfReferenceUID)
    body = zip_of(first + second)
    uids = [first[0].SeriesInstanceUID, second[0].SeriesInstanceUID]
    parts = {"image_0000": body, "image_0001": body}
    assert ask(served("regions"), parts, series_uid=uids)["status"] == 200
    assert ask(served("regions"), parts, series_uid=uids[0])["code"] == "bad_option"
    assert ask(served("regions"), parts, series_uid="no uid")["code"] == "bad_option"
    assert ask(served("regions"), parts)["code"] == DicomReason.SEVERAL_SERIES


def test_files_of_a_series_may_be_fields_of_the_request(served: Callable[[str], Pipeline]) -> None:
    found = series(volumes((90, 16, 16)), ACQUISITIONS["axial"].affine((1.5, 1.5, 0.3)))
    fields = {f"dicom_{z:04}.dcm": file_of(ds) for z, ds in enumerate(found)}
    assert ask(served("five_folds"), fields)["status"] == 200
    assert ask(served("five_folds"), fields | {"image": b"x"})["code"] == "malformed"


def test_a_series_uid_for_what_is_no_series_is_refused(served: Callable[[str], Pipeline]) -> None:
    from support.volumes import nifti

    body = nifti(volumes())
    assert ask(served("five_folds"), {"image": body}, series_uid="1.2.3")["code"] == "bad_option"


def test_nothing_of_a_patient_leaves_but_in_the_answer(
    served: Callable[[str], Pipeline], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A series full of canaries, good and bad: they are looked for in answers, logs, and what is printed."""
    caplog.set_level(logging.DEBUG)
    model = served("five_folds")
    whole = series(volumes(), ACQUISITIONS["axial"].affine())
    broken = series(volumes(), ACQUISITIONS["axial"].affine(), rescale=None)
    for ds in broken:
        ds.add_new(0x00281053, "LO", SECRET)  # RescaleSlope
    answers = [ask(model, {"image": zip_of(whole)})]
    bodies: Iterator[bytes] = (zip_of(make()) for make, _, _ in SERIES.values())
    answers += [ask(model, {"image": body}) for body in (*bodies, zip_of(broken), zip_of(whole)[:-5000])]
    answers.append(ask(model, {f"dicom_{SECRET}.dcm": file_of(whole[0])}))
    assert answers[-1]["code"] == "malformed"
    assert [answer["status"] for answer in answers].count(200) == 1
    uids = {str(ds[name].value) for ds in whole for name in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")}
    uids -= {whole[0].SeriesInstanceUID}
    said = json.dumps(answers) + caplog.text + "".join(capfd.readouterr())
    for secret in {SECRET, "CANARY", SECRET_ID, SECRET_DATE} | uids:
        assert secret not in said, secret


def test_what_no_segmentation_can_repeat_is_refused_before_anything_is_decoded(
    served: Callable[[str], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings(action="ignore"):  # of its length
        body = zip_of(series(volumes(), ACQUISITIONS["axial"].affine(), StudyDescription="x" * 2000))
    model = served("five_folds")
    assert ask(model, {"image": body})["status"] == 200  # a report repeats nothing
    monkeypatch.setattr(codecs.DicomSource, "read", lambda _: pytest.fail("was decoded"))
    assert ask(model, {"image": body}, output_format="dicom-seg")["code"] == "malformed"


def test_a_case_is_charged_for_making_its_segmentation(
    served: Callable[[str], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = zip_of(series(volumes(), ACQUISITIONS["axial"].affine()))
    monkeypatch.setattr("nnunet_torchserve.codecs.answer.dicom.memory_bytes", lambda *_: 10**15)
    found = ask(served("five_folds"), {"image": body}, output_format="dicom-seg")
    assert (found["status"], found["code"]) == (507, "out_of_memory")
    assert ask(served("five_folds"), {"image": body})["status"] == 200


def test_a_server_without_pydicom_says_what_to_install() -> None:
    """In an interpreter that cannot import it; the server's own modules do not need it."""
    program = """
import sys
sys.modules["pydicom"] = None
from nnunet_torchserve import codecs
from nnunet_torchserve.errors import ServingError
from nnunet_torchserve.limits import Limits
try:
    codecs.open_image(sys.stdin.buffer.read(), Limits(), "SimpleITKIO")
except ServingError as error:
    print(int(error.status), error.code, error)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], input=zip_of(images()), capture_output=True, check=True, timeout=300
    )
    said = run.stdout.decode()
    assert said.startswith("415 dicom_unavailable")
    assert "its owner install nnunet-torchserve's extra dicom" in said
