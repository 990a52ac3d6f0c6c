"""What many or odd files may make a server hold before it knows what a series is: little, whatever they declare."""

from __future__ import annotations

import io
import tarfile
import warnings
import zipfile
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

from nnunet_torchserve import codecs
from nnunet_torchserve.codecs import DicomSource
from nnunet_torchserve.codecs.dicom import series as series_module
from nnunet_torchserve.codecs.dicom.header import ImageHeader, read_header
from nnunet_torchserve.codecs.inflate import ByteSource, Compression
from nnunet_torchserve.errors import DicomReason, ServingError
from nnunet_torchserve.limits import Limits
from support.dicom_files import ACQUISITIONS, compressed, enhanced, file_of, files_of, series, zip_of, zipped

RLE = "1.2.840.10008.1.2.5"
VOXELS = np.arange(120, dtype=np.int16).reshape(6, 5, 4)
AFFINE = ACQUISITIONS["axial"].affine((1, 1, 2.5), origin=(0, 0, 100))


def open_series(body: bytes, limits: Limits | None = None, **more: Any) -> DicomSource:
    source = codecs.open_image(body, limits or Limits(), "SimpleITKIO", **more)
    assert isinstance(source, DicomSource)
    return source


def code(body: bytes, limits: Limits | None = None, **more: Any) -> str:
    with pytest.raises(ServingError) as raised:
        open_series(body, limits, **more)
    return raised.value.code


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> list[ImageHeader]:
    """Those that were read."""
    found: list[ImageHeader] = []

    def noted(*arguments: Any) -> ImageHeader:
        found.append(read_header(*arguments))
        return found[-1]

    monkeypatch.setattr(series_module, "read_header", noted)
    return found


def many_in_one_place(frames: int, number: int, seed: str = "a") -> bytes:
    """A file of about a kilobyte that declares many frames, all described by what they share."""
    whole = enhanced(VOXELS[:1, :1, :1], AFFINE, seed=seed, SOPInstanceUID=f"1.2.3.{number}")
    [shared], [own] = whole.SharedFunctionalGroupsSequence, whole.PerFrameFunctionalGroupsSequence
    shared.PlanePositionSequence = own.PlanePositionSequence
    shared.PixelValueTransformationSequence = own.PixelValueTransformationSequence
    del whole.PerFrameFunctionalGroupsSequence
    whole.NumberOfFrames = frames
    return compressed(whole, [bytes(4)], RLE)


def test_the_frames_of_all_files_are_counted_as_they_come(headers: list[ImageHeader]) -> None:
    """Each file alone is within the limit; of each frame an object is kept until the series is known."""
    body = zipped({str(number): many_in_one_place(90, number) for number in range(20)}, zipfile.ZIP_DEFLATED)
    assert code(body, Limits(dicom_frames=100)) == "too_large"
    assert len(headers) == 2


def test_frames_of_a_series_that_is_not_asked_for_are_not_looked_at(headers: list[ImageHeader]) -> None:
    chosen = series(VOXELS, AFFINE)
    others = {str(number): many_in_one_place(90, number, "b") for number in range(3)}
    source = open_series(
        zipped(files_of(chosen) | others), Limits(dicom_frames=100), series_uid=chosen[0].SeriesInstanceUID
    )
    np.testing.assert_array_equal(source.read()[0], VOXELS - 1024.0)
    assert source.left_out == 3
    assert sum(len(header.planes) for header in headers) == len(chosen)


def lut(entries: int) -> Dataset:
    item = Dataset()
    item.add_new(0x00283002, "US", [entries % 2**16, 0, 16])
    item.add_new(0x00283003, "LO", "")
    item.add_new(0x00283004, "LO", "HU")
    item.add_new(0x00283006, "OW", (np.arange(entries) * 3 % 2**16).astype("<u2").tobytes())
    return item


def test_frames_share_one_modality_lut_and_all_tables_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = enhanced(VOXELS, AFFINE, ModalityLUTSequence=Items([lut(2**16)]))
    for frame in whole.PerFrameFunctionalGroupsSequence:
        del frame.PixelValueTransformationSequence
    source = open_series(file_of(whole))
    [image] = source.series.images
    assert len({id(rescale) for rescale in image.rescales}) == 1
    np.testing.assert_array_equal(source.read()[0], VOXELS * 3.0)

    images = series(VOXELS, AFFINE, rescale=None, ModalityLUTSequence=Items([lut(200)]))
    open_series(zip_of(images))
    monkeypatch.setattr(series_module, "_MOST_TABLE_BYTES", 5 * 200 * 4)
    assert code(zip_of(images)) == "too_large"


def test_of_a_uid_no_more_is_kept_than_one_may_have() -> None:
    """What is longer is none, and two of them are still told apart."""
    long = "1." * 20_000

    def images(*ends: str) -> list[Dataset]:
        made = series(VOXELS, AFFINE)
        with warnings.catch_warnings(action="ignore"):  # that such are none
            for ds, end in zip(made, ends * len(made), strict=False):
                ds.add_new(0x00200052, "LO", long + end)  # FrameOfReferenceUID
        return made

    source = open_series(zip_of(images("1")))
    assert not source.has_frame_of_reference
    assert len(source.series.frame_of_reference or "") < 100
    assert code(zip_of(images("1", "2"))) == DicomReason.SEVERAL_FRAMES_OF_REFERENCE


def tar_of(files: dict[str, bytes], odd: tarfile.TarInfo, content: bytes = b"") -> bytes:
    """A tar with one more entry in the middle."""
    body = io.BytesIO()
    with tarfile.open(mode="w", fileobj=body, format=tarfile.PAX_FORMAT) as archive:
        for number, (name, file) in enumerate(files.items()):
            if number == len(files) // 2:
                odd.size = len(content)
                archive.addfile(odd, io.BytesIO(content))
            entry = tarfile.TarInfo(name)
            entry.size = len(file)
            archive.addfile(entry, io.BytesIO(file))
    return body.getvalue()


def odd_entry(kind: bytes, **more: Any) -> tarfile.TarInfo:
    entry = tarfile.TarInfo("slice")
    entry.type = kind
    for name, value in more.items():
        setattr(entry, name, value)
    return entry


@pytest.mark.parametrize(
    "odd",
    [
        odd_entry(tarfile.GNUTYPE_SPARSE),
        odd_entry(tarfile.REGTYPE, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
        odd_entry(b"M"),
    ],
    ids=["sparse, GNU", "sparse, pax", "the rest of one in another tar"],
)
def test_a_file_in_a_form_that_is_not_read_is_not_left_out_in_silence(odd: tarfile.TarInfo) -> None:
    """It may be the last slice, which nothing else would show."""
    images = series(VOXELS, AFFINE)
    body = tar_of(files_of(images[:-1]), odd, file_of(images[-1]))
    assert code(body) == "malformed"


def test_a_link_in_a_tar_is_a_file_that_was_left_out() -> None:
    files = files_of(series(VOXELS, AFFINE))
    linked = open_series(tar_of(files, odd_entry(tarfile.SYMTYPE, linkname="/somewhere/else")))
    assert linked.left_out == 1
    np.testing.assert_array_equal(linked.read()[0], VOXELS - 1024.0)
    assert open_series(tar_of(files, odd_entry(b"V"))).left_out == 0


def test_what_was_looked_at_ahead_is_skipped_too() -> None:
    content = bytes(range(256)) * 1024
    for ahead, skipped in ((0, 7), (1000, 7), (1000, 1000), (1000, 200_000)):
        source = ByteSource(content, Compression.NONE)
        source.peek(ahead)
        source.skip(skipped)
        assert source.read(9) == content[skipped : skipped + 9]
        assert bytes(source.read_exactly(50)) == content[skipped + 9 : skipped + 59]


def test_an_image_of_a_long_text_is_read_all_the_same() -> None:
    with warnings.catch_warnings(action="ignore"):  # of its length
        source = open_series(zip_of(series(VOXELS, AFFINE, StudyDescription="x" * 2000)))
    np.testing.assert_array_equal(source.read()[0], VOXELS - 1024.0)
    assert len(source.origin.digest) == 64
    with pytest.raises(ServingError, match="far longer than its kind"):
        source.check_texts()
