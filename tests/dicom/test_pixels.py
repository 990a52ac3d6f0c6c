"""Pixels in every encoding are the numbers that were encoded, and values are what the modality says."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gdcm
import imagecodecs
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from nnunet_torchserve import codecs
from nnunet_torchserve.errors import DicomReason, DicomRefused, Malformed, ServingError
from nnunet_torchserve.limits import Limits
from support.dicom_files import (
    ACQUISITIONS,
    change,
    compressed,
    enhanced,
    file_of,
    files_of,
    series,
    set_pixels,
    zip_of,
    zipped,
)

Voxels = npt.NDArray[Any]

AFFINE = ACQUISITIONS["oblique"].affine()
SHAPE = (4, 34, 46)
TYPES = [("int16", 16), ("int16", 12), ("uint16", 16), ("uint16", 12), ("uint8", 8)]
GDCM = {
    "JPEG lossless": gdcm.TransferSyntax.JPEGLosslessProcess14,
    "JPEG lossless, first order": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "JPEG-LS": gdcm.TransferSyntax.JPEGLSLossless,
    "JPEG 2000": gdcm.TransferSyntax.JPEG2000Lossless,
    "RLE": gdcm.TransferSyntax.RLELossless,
}


def numbers(dtype: str, bits: int, shape: tuple[int, ...] = SHAPE) -> Voxels:
    """Anything that the bits hold, the smallest and the largest too."""
    low = -(1 << bits - 1) if dtype.startswith("i") else 0
    high = low + (1 << bits) - 1
    found = np.random.default_rng(bits).integers(low, high + 1, shape)
    found[:, 0, :2] = low, high
    return found.astype(dtype)


def read(body: bytes) -> npt.NDArray[np.float32]:
    found = codecs.open_image(body, Limits(), "SimpleITKIO").read()
    assert found.dtype == np.float32
    volume: npt.NDArray[np.float32] = found[0]
    return volume


def code(body: bytes) -> str:
    with pytest.raises(ServingError) as raised:
        read(body)
    return raised.value.code


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
@pytest.mark.parametrize(("dtype", "bits"), TYPES)
def test_uncompressed_pixels_are_exact(syntax: str, dtype: str, bits: int) -> None:
    stored = numbers(dtype, bits)
    written = stored.byteswap() if syntax == ExplicitVRBigEndian else stored
    found = read(zip_of(series(written, AFFINE, bits=bits), syntax))
    np.testing.assert_array_equal(found, stored.astype(np.float64) - 1024)


@pytest.mark.parametrize("form", ["OB", "OW"])
@pytest.mark.parametrize("shape", [(4, 5, 6), (3, 5, 7)])
def test_bytes_in_words_of_the_other_order_are_swapped(form: str, shape: tuple[int, int, int]) -> None:
    """Single frames, and several frames that end within a word."""
    stored = numbers("uint8", 8, shape)

    def laid(content: bytes) -> bytes:
        padded = content + bytes(len(content) % 2)
        return np.frombuffer(padded, "<u2").byteswap().tobytes() if form == "OW" else padded

    images, frames = series(stored, AFFINE), enhanced(stored, AFFINE)
    for ds in (*images, frames):
        ds.PixelData = laid(ds.PixelData)
        ds["PixelData"].VR = form
    for body in (zip_of(images, ExplicitVRBigEndian), file_of(frames, ExplicitVRBigEndian)):
        np.testing.assert_array_equal(read(body), stored.astype(np.float64) - 1024)


def test_what_has_several_orders_in_big_endian_files_is_refused() -> None:
    wide = numbers("int32", 16)
    assert code(zip_of(series(wide.byteswap(), AFFINE), ExplicitVRBigEndian)) == DicomReason.UNSUPPORTED_PIXELS
    np.testing.assert_array_equal(read(zip_of(series(wide, AFFINE))), wide.astype(np.float64) - 1024)


@pytest.mark.parametrize("syntax", GDCM)
@pytest.mark.parametrize(("dtype", "bits"), TYPES)
def test_what_gdcm_compresses_is_exact(syntax: str, dtype: str, bits: int, tmp_path: Path) -> None:
    if dtype == "uint8" and syntax.startswith("JPEG lossless"):
        pytest.skip("gdcm does not write it")
    stored = numbers(dtype, bits)
    files = {}
    for number, ds in enumerate(series(stored, AFFINE, bits=bits)):
        plain, packed = tmp_path / f"{number}.dcm", tmp_path / f"{number}.packed"
        plain.write_bytes(file_of(ds))
        reader, changer, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(plain))
        assert reader.Read()
        changer.SetTransferSyntax(gdcm.TransferSyntax(GDCM[syntax]))
        changer.SetInput(reader.GetImage())
        assert changer.Change()
        writer.SetFileName(str(packed))
        writer.SetFile(reader.GetFile())
        writer.SetImage(changer.GetOutput())
        assert writer.Write()
        files[str(number)] = packed.read_bytes()
        assert pydicom.dcmread(packed, stop_before_pixels=True).file_meta.TransferSyntaxUID.is_compressed
    np.testing.assert_array_equal(read(zipped(files)), stored.astype(np.float64) - 1024)


def jpeg_ls(frame: Voxels) -> bytes:
    """Of 16 bits, as its own header says, without a sign."""
    return bytes(imagecodecs.jpegls_encode(frame.view(np.uint16)))


def jpeg_2000(frame: Voxels) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(frame, level=0, reversible=True, codecformat="j2k"))


def jpeg_lossless(frame: Voxels, predictor: int = 1) -> bytes:
    unsigned = frame.view(np.uint16)
    return bytes(imagecodecs.jpeg8_encode(unsigned, lossless=True, predictor=predictor, bitspersample=16))


def rle(frame: Voxels) -> bytes:
    ds = set_pixels(Dataset(), frame)
    ds.SOPInstanceUID, ds.SamplesPerPixel, ds.PhotometricInterpretation = "1.2.3", 1, "MONOCHROME2"
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    packed: bytes = next(generate_frames(ds.PixelData, number_of_frames=1))
    return packed


ENCODERS: dict[str, tuple[str, Callable[[Voxels], bytes]]] = {
    "JPEG 2000": (JPEG2000Lossless, jpeg_2000),
    "JPEG lossless": (JPEGLosslessSV1, jpeg_lossless),
    "RLE": (RLELossless, rle),
}


def packed_as(encode: Callable[[Voxels], bytes], syntax: str, stored: Voxels, header: Voxels, bits: int) -> bytes:
    """Frames of ``stored``, under a header for ``header``'s type with so many bits."""
    return zipped(
        {str(z): compressed(ds, [encode(stored[z])], syntax) for z, ds in enumerate(series(header, AFFINE, bits=bits))}
    )


@pytest.mark.parametrize(("precision", "bits"), [(12, 16), (13, 16), (16, 16), (13, 12), (16, 12)])
def test_a_sign_that_the_codestream_has_is_kept_whatever_its_precision(precision: int, bits: int) -> None:
    def encode(frame: Voxels) -> bytes:
        return bytes(
            imagecodecs.jpeg2k_encode(frame, level=0, reversible=True, codecformat="j2k", bitspersample=precision)
        )

    stored = numbers("int16", 12)
    found = read(packed_as(encode, JPEG2000Lossless, stored, stored, bits))
    np.testing.assert_array_equal(found, stored.astype(np.float64) - 1024)
    if precision > bits:
        stored[1, 3, 3] = 3000
        assert code(packed_as(encode, JPEG2000Lossless, stored, stored, bits)) == DicomReason.UNSUPPORTED_PIXELS


@pytest.mark.parametrize("bits", [12, 16])
def test_a_sign_that_the_codestream_does_not_know_is_its_highest_bit(bits: int) -> None:
    def twelve_bits(frame: Voxels) -> bytes:
        unsigned = frame.view(np.uint16) & 0xFFF
        return bytes(imagecodecs.jpeg8_encode(unsigned, lossless=True, bitspersample=12))

    stored = numbers("int16", 12)
    found = read(packed_as(twelve_bits, JPEGLosslessSV1, stored, stored, bits))
    np.testing.assert_array_equal(found, stored.astype(np.float64) - 1024)


def test_bits_above_those_stored_repeat_the_sign_or_are_refused() -> None:
    stored = numbers("int16", 12)
    found = read(packed_as(jpeg_lossless, JPEGLosslessSV1, stored, stored, 12))
    np.testing.assert_array_equal(found, stored.astype(np.float64) - 1024)
    cleared = stored & 0xFFF  # 3072, or -1024: nobody knows
    for encode, syntax in ((jpeg_lossless, JPEGLosslessSV1), (jpeg_ls, JPEGLSLossless)):
        assert code(packed_as(encode, syntax, cleared, stored, 12)) == DicomReason.UNSUPPORTED_PIXELS


def test_negative_numbers_under_a_header_without_a_sign_are_refused() -> None:
    stored = numbers("int16", 12)
    body = packed_as(jpeg_2000, JPEG2000Lossless, stored, stored.view(np.uint16), 16)
    assert code(body) == DicomReason.UNSUPPORTED_PIXELS
    whole = np.abs(stored)
    found = read(packed_as(jpeg_2000, JPEG2000Lossless, whole, whole.view(np.uint16), 16))
    np.testing.assert_array_equal(found, whole.astype(np.float64) - 1024)


@pytest.mark.parametrize("predictor", range(1, 8))
def test_every_predictor_of_lossless_jpeg_is_known(predictor: int) -> None:
    stored = numbers("uint16", 16)
    files = {
        str(z): compressed(ds, [jpeg_lossless(stored[z], predictor)], "1.2.840.10008.1.2.4.57")
        for z, ds in enumerate(series(stored, AFFINE))
    }
    np.testing.assert_array_equal(read(zipped(files)), stored.astype(np.float64) - 1024)


@pytest.mark.parametrize(("fragments", "table"), [(1, True), (1, False), (3, True)])
@pytest.mark.parametrize("name", ENCODERS)
def test_frames_of_one_object_are_told_apart_in_any_pieces(name: str, fragments: int, table: bool) -> None:
    syntax, encode = ENCODERS[name]
    stored, order = numbers("int16", 16), [2, 0, 3, 1]
    ds = enhanced(stored, AFFINE, order=order)
    body = compressed(ds, [encode(stored[z]) for z in order], syntax, fragments=fragments, table=table)
    np.testing.assert_array_equal(read(body), stored.astype(np.float64) - 1024)


@pytest.mark.parametrize("name", ENCODERS)
def test_codestreams_that_are_cut_off_or_of_another_size_are_refused(name: str) -> None:
    syntax, encode = ENCODERS[name]
    stored = numbers("int16", 16)
    images = series(stored, AFFINE)
    good = [encode(frame) for frame in stored]
    for bad in (good[2][:20], good[2][: len(good[2]) // 3], bytes(4), b"\xff\xd8\xff\xd9", encode(stored[2][:-2])):
        files = {
            str(z): compressed(ds, [bad if z == 2 else good[z]], syntax)
            for z, ds in enumerate([change(each) for each in images])
        }
        assert code(zipped(files)) in {"malformed", "dicom_unsupported_pixels", "dicom_truncated_pixels"}


@pytest.mark.parametrize("marker", [b"\xff\x01", *(bytes([0xFF, 0xD0 + number]) for number in range(8))])
def test_a_second_frame_header_cannot_hide_behind_a_marker_without_a_length(marker: bytes) -> None:
    """Read with a length, the marker would hide the header that libjpeg takes, and show the one that DICOM's has."""
    stored = numbers("uint16", 16)

    def turned(frame: Voxels) -> bytes:
        """Rows and columns exchanged; the other frame header lies where 0xFFC3, taken for a length, leads to."""
        shown, hidden = jpeg_lossless(frame), jpeg_lossless(np.ascontiguousarray(frame.T))
        at, start = hidden.index(b"\xff\xc3"), shown.index(b"\xff\xc3")
        whole = hidden[:at] + marker + hidden[at:]
        whole += bytes(at + 2 + 0xFFC3 - len(whole)) + shown[start : start + 19]
        return whole + bytes(len(whole) % 2) + b"\xff\xd9"

    body = packed_as(turned, JPEGLosslessSV1, stored, stored, 16)
    assert code(body) == DicomReason.UNSUPPORTED_PIXELS


@pytest.mark.parametrize("name", ["JPEG 2000", "JPEG lossless", "JPEG-LS"])
def test_nothing_but_padding_may_follow_a_codestream(name: str) -> None:
    syntax, encode = (ENCODERS | {"JPEG-LS": (JPEGLSLossless, jpeg_ls)})[name]
    stored = numbers("int16", 16)

    def with_tail(tail: bytes) -> bytes:
        return packed_as(lambda frame: encode(frame) + tail, syntax, stored, stored, 16)

    np.testing.assert_array_equal(read(with_tail(bytes(4))), stored.astype(np.float64) - 1024)
    assert code(with_tail(b"more")) == DicomReason.UNSUPPORTED_PIXELS
    assert code(with_tail(bytes(32))) == DicomReason.TRUNCATED_PIXELS
    if name != "JPEG 2000":
        assert code(with_tail(encode(stored[0]))) == DicomReason.UNSUPPORTED_PIXELS


def test_a_lack_of_memory_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is told so may send the same series again."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    stored = numbers("int16", 16)
    monkeypatch.setattr(imagecodecs, "dicomrle_decode", fail)
    with pytest.raises(MemoryError):
        read(packed_as(rle, RLELossless, stored, stored, 16))


def test_twelve_bit_jpeg_is_refused() -> None:
    files = {str(z): compressed(ds, [b"\xff\xd8\xff\xd9"], JPEGExtended12Bit) for z, ds in enumerate(_images())}
    assert code(zipped(files)) == DicomReason.UNSUPPORTED_PIXELS


def test_a_codestream_that_claims_a_huge_image_is_not_decoded() -> None:
    """Limits of the DICOM header are those of the decoder."""
    stored = numbers("int16", 16)
    bomb = bytes(imagecodecs.jpeg2k_encode(np.zeros((4096, 4096), np.uint8), level=0, codecformat="j2k"))
    files = {str(z): compressed(ds, [bomb], JPEG2000Lossless) for z, ds in enumerate(series(stored, AFFINE))}
    with pytest.raises(DicomRefused, match="4096 × 4096"):
        read(zipped(files))


def _images(**changes: Any) -> list[Dataset]:
    return series(numbers("int16", 16), AFFINE, **changes)


# --- values -----------------------------------------------------------------------------------------------------------


def test_each_slice_has_its_own_rescale_in_full_precision() -> None:
    stored = numbers("int16", 16)
    slopes = [(1.0, -1024.0), (0.7324218, 13.5), (2.5, 0.0), (1e-3, -7.25)]
    found = read(zip_of(series(stored, AFFINE, rescale=slopes.__getitem__)))
    for z, (slope, intercept) in enumerate(slopes):
        np.testing.assert_array_equal(found[z], (stored[z].astype(np.float64) * slope + intercept).astype(np.float32))


def test_each_frame_has_its_own_rescale() -> None:
    stored = numbers("uint16", 12)
    slopes = [(1.0, -1024.0), (0.7324218, 13.5), (2.5, 0.0), (1e-3, -7.25)]
    found = read(file_of(enhanced(stored, AFFINE, order=[3, 1, 0, 2], rescale=slopes.__getitem__, bits=12)))
    for z, (slope, intercept) in enumerate(slopes):
        np.testing.assert_array_equal(found[z], (stored[z].astype(np.float64) * slope + intercept).astype(np.float32))


def test_a_rescale_that_is_not_there_is_not_made_up() -> None:
    one_without = [change(ds, RescaleSlope=None, RescaleIntercept=None) for ds in _images(modality="MR")[:1]]
    assert code(zip_of(one_without + _images(modality="MR")[1:])) == DicomReason.INCOMPLETE
    for modality in ("CT", "PT"):
        assert code(zip_of(_images(modality=modality, rescale=None))) == DicomReason.INCOMPLETE
    for half in ({"RescaleSlope": None}, {"RescaleIntercept": ""}):
        assert code(zip_of(_images(modality="MR", **half))) == DicomReason.INCOMPLETE
    stored = numbers("int16", 16)
    np.testing.assert_array_equal(read(zip_of(_images(modality="MR", rescale=None))), stored)


def test_a_rescale_at_the_top_of_an_enhanced_object_counts_as_highdicom_has_it() -> None:
    stored = numbers("int16", 16)
    ds = enhanced(stored, AFFINE)
    frames = ds.PerFrameFunctionalGroupsSequence
    del frames[1].PixelValueTransformationSequence
    assert code(file_of(ds)) == DicomReason.INCOMPLETE
    for frame in frames:
        frame.pop("PixelValueTransformationSequence", None)
    assert code(file_of(ds)) == DicomReason.INCOMPLETE
    ds.RescaleSlope, ds.RescaleIntercept = "2", "-1000"
    np.testing.assert_array_equal(read(file_of(ds)), stored * 2.0 - 1000)
    ds = change(enhanced(stored, AFFINE), RescaleSlope="2", RescaleIntercept="-1000")
    assert code(file_of(ds)) == "malformed"


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_a_modality_lut_is_applied(syntax: str) -> None:
    stored = numbers("uint8", 8)
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [200, 20, 16])
    table.ModalityLUTType = "HU"
    entries = (np.arange(200) ** 2).astype(np.uint16)
    table.add_new("LUTData", "OW", entries.tobytes())
    images = series(stored, AFFINE, rescale=None, ModalityLUTSequence=Items([table]))
    expected = entries[np.clip(stored.astype(int) - 20, 0, 199)]
    np.testing.assert_array_equal(read(zip_of(images, syntax)), expected)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("count", [200, 201])
def test_a_modality_lut_of_bytes_is_applied_in_either_order(syntax: str, count: int) -> None:
    stored = numbers("uint8", 8, (4, 6, 6))
    entries = np.arange(count)[::-1].astype(np.uint8)
    packed = np.frombuffer(entries.tobytes() + bytes(count % 2), "<u2")
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [count, 20, 8])
    table.ModalityLUTType = "HU"
    big = syntax == ExplicitVRBigEndian
    table.add_new("LUTData", "OW", (packed.byteswap() if big else packed).tobytes())
    images = series(stored, AFFINE, rescale=None, ModalityLUTSequence=Items([table]))
    for ds in images:
        ds["PixelData"].VR = "OB"
    np.testing.assert_array_equal(read(zip_of(images, syntax)), entries[np.clip(stored.astype(int) - 20, 0, count - 1)])


def test_nothing_for_the_screen_changes_a_value() -> None:
    stored = numbers("int16", 16)
    plain = read(zip_of(series(stored, AFFINE)))
    mapping = Dataset()
    mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = 17.0, 3.0
    screen: dict[str, Any] = {
        "PhotometricInterpretation": "MONOCHROME1",
        "WindowCenter": "40",
        "WindowWidth": "400",
        "PresentationLUTShape": "INVERSE",
        "RealWorldValueMappingSequence": Items([mapping]),
    }
    np.testing.assert_array_equal(read(zip_of(series(stored, AFFINE, **screen))), plain)


@pytest.mark.parametrize(("slope", "intercept"), [("0", "0"), ("nan", "1"), ("1", "inf")])
def test_a_rescale_that_makes_no_values_is_refused(slope: str, intercept: str) -> None:
    with pytest.raises(Malformed):
        read(zip_of(_images(RescaleSlope=slope, RescaleIntercept=intercept)))


def test_numbers_beyond_their_bits_are_refused() -> None:
    assert code(zip_of(series(numbers("uint16", 16), AFFINE, bits=12))) == DicomReason.UNSUPPORTED_PIXELS


def test_pixels_that_are_cut_off_are_refused() -> None:
    images = _images()
    images[2].PixelData = images[2].PixelData[:-2]
    assert code(zip_of(images)) == DicomReason.TRUNCATED_PIXELS
    files = files_of(_images())
    last = list(files)[-1]
    files[last] = files[last][:-50]
    assert code(zipped(files)) == DicomReason.TRUNCATED_PIXELS


def test_more_pixels_than_are_declared_are_refused() -> None:
    """Numbers of 16 bits under a header that says 8; a second frame that the header does not count."""
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    assert code(zip_of(_images(**eight))) == DicomReason.UNSUPPORTED_PIXELS
    doubled = _images()
    for ds in doubled:
        ds.PixelData *= 2
    assert code(zip_of(doubled)) == DicomReason.UNSUPPORTED_PIXELS
    odd = numbers("uint8", 8, (3, 5, 7))
    np.testing.assert_array_equal(read(zip_of(series(odd, AFFINE))), odd.astype(np.float64) - 1024)


@pytest.mark.parametrize(
    "changes",
    [
        {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0},
        {"PhotometricInterpretation": "PALETTE COLOR"},
    ],
)
def test_colours_are_refused(changes: dict[str, Any]) -> None:
    assert code(zip_of(_images(**changes))) == DicomReason.COLOUR


def test_the_frames_that_pydicom_finds_are_the_ones_that_we_find() -> None:
    stored = numbers("int16", 16)
    body = compressed(enhanced(stored, AFFINE), [jpeg_2000(frame) for frame in stored], JPEG2000Lossless, fragments=2)
    theirs: Sequence[bytes] = list(generate_frames(pydicom.dcmread(io.BytesIO(body)).PixelData, number_of_frames=4))
    np.testing.assert_array_equal([imagecodecs.jpeg2k_decode(frame) for frame in theirs], stored)
    np.testing.assert_array_equal(read(body), stored.astype(np.float64) - 1024)
