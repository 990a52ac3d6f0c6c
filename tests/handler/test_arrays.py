"""npy and npz in, npz out, against NumPy."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nnunet_torchserve.codecs.arrays import ArraySource, Placements, encode_npz, is_npy, open_npy, open_npz
from nnunet_torchserve.codecs.geometry import make_geometry
from nnunet_torchserve.codecs.inflate import SLACK_BYTES, ByteSource
from nnunet_torchserve.codecs.zips import is_zip
from nnunet_torchserve.errors import (
    BadOption,
    BadSpacing,
    Malformed,
    ServingError,
    TooLarge,
    UnknownFormat,
    WrongChannels,
)
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import OutputFormat
from nnunet_torchserve.volume import LabelMap, Placement

LIMITS = Limits(expanded_bytes=10_000_000, voxels=1_000_000)
HERE = Placement((0.5, 0.75, 2.0), (1.0, -2.0, 3.0), (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
RNG = np.random.default_rng(7)
Array = npt.NDArray[Any]


def npy(array: Array, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def npz(save: Any = np.savez, **arrays: Any) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def open_array(body: bytes, placement: Placement | None = HERE, limits: Limits = LIMITS) -> ArraySource:
    if is_zip(body):
        return open_npz(memoryview(body), limits, Placements(placement))
    assert is_npy(body)
    return open_npy(ByteSource(body), limits, Placements(placement))


def some(shape: tuple[int, ...], dtype: str = "int16") -> Array:
    return (RNG.standard_normal(shape) * 100).astype(dtype)


PLAIN = some((4, 5, 6))
DTYPES = [kind + str(size) for kind, sizes in {"i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8)}.items()
          for size in sizes]  # fmt: skip


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("endian", "<>")
@pytest.mark.parametrize("dtype", [*DTYPES, "?"])
@pytest.mark.filterwarnings("ignore:Stored array in format:UserWarning")
def test_voxels_are_those_that_numpy_loads(dtype: str, endian: str, order: Any, version: tuple[int, int]) -> None:
    array = np.asarray(abs(some((3, 4, 5), "f8")).astype(endian + dtype), order=order)
    content = npy(array, version)
    voxels = open_array(content).read()
    np.testing.assert_array_equal(voxels, np.asarray(np.load(io.BytesIO(content)), np.float32)[None], strict=True)
    assert voxels.flags.c_contiguous


@pytest.mark.parametrize("shape", [(5, 6), (4, 5, 6), (1, 4, 5, 6), (3, 4, 5, 6), (2, 1, 5, 6)])
@pytest.mark.parametrize("packed", ["npy", "stored", "deflated"])
def test_axes_are_channel_z_y_x(shape: tuple[int, ...], packed: str) -> None:
    array = some(shape, "f4")
    content = (
        npy(array) if packed == "npy" else npz(np.savez_compressed if packed == "deflated" else np.savez, image=array)
    )
    image = open_array(content)
    full = array.reshape((1,) * (4 - array.ndim) + shape)
    assert (image.channels, image.geometry.shape) == (full.shape[0], full.shape[1:])
    np.testing.assert_array_equal(image.read(), full, strict=True)
    assert image.native_format is OutputFormat.NPZ
    assert image.nifti_header is None


def test_the_request_says_where_an_array_lies() -> None:
    geometry = open_array(npy(PLAIN)).geometry
    assert geometry.spacing_zyx == (2.0, 0.75, 0.5)
    assert geometry.origin == (1.0, -2.0, 3.0)
    np.testing.assert_array_equal(geometry.direction, [[0, 1, 0], [-1, 0, 0], [0, 0, 1]])


def test_two_numbers_place_one_slice_as_a_two_dimensional_image() -> None:
    for shape in ((5, 6), (1, 5, 6), (3, 1, 5, 6)):
        geometry = open_array(npy(some(shape)), Placement((0.5, 0.75))).geometry
        assert (geometry.ndim, geometry.spacing_zyx) == (2, (999 * 0.75, 0.75, 0.5))
    with pytest.raises(BadSpacing):
        open_array(npy(PLAIN), Placement((0.5, 0.75)))


@pytest.mark.parametrize("flat", [True, False])
def test_an_npz_with_its_own_geometry_needs_no_options(flat: bool) -> None:
    turned = np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    direction = turned.ravel() if flat else turned
    content = npz(image=PLAIN, spacing=[0.5, 0.75, 2], origin=(1, -2, 3), direction=direction)
    inside, outside = open_array(content, None).geometry, open_array(npy(PLAIN)).geometry
    assert inside.spacing_zyx == outside.spacing_zyx
    np.testing.assert_array_equal(inside.affine, outside.affine)


@pytest.mark.parametrize("names", [{"image"}, {"data"}, {"anything"}, {"image", "other"}])
def test_the_image_is_found_by_its_name_or_because_it_is_alone(names: set[str]) -> None:
    arrays: dict[str, Any] = {name: PLAIN if name != "other" else some((2, 2)) for name in names}
    np.testing.assert_array_equal(open_array(npz(**arrays)).read()[0], PLAIN)


@pytest.mark.parametrize("arrays", [{"image": PLAIN, "data": PLAIN}, {"a": PLAIN, "b": PLAIN}, {"spacing": PLAIN}])
def test_two_candidates_or_none_are_refused(arrays: dict[str, Any]) -> None:
    with pytest.raises(Malformed, match="name it image"):
        open_array(npz(**arrays))


def test_geometry_in_the_file_and_in_the_request_is_refused() -> None:
    with pytest.raises(BadOption, match="send one of them"):
        open_array(npz(image=PLAIN, spacing=[1, 1, 1]))


def test_an_array_without_spacing_is_refused_and_told_the_option() -> None:
    for content in (npy(PLAIN), npz(image=PLAIN)):
        with pytest.raises(BadSpacing, match="option spacing"):
            open_array(content, None)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_our_own_answer_is_an_input(dtype: str, ndim: int) -> None:
    shape = (1, 5, 6) if ndim == 2 else (4, 5, 6)
    c, s = np.cos(0.3), np.sin(0.3)
    direction = [c, -s, s, c] if ndim == 2 else [c, -s, 0, s, c, 0, 0, 0, 1]
    geometry = make_geometry(shape[-ndim:], (0.5, 0.75, 2)[:ndim], (1, 2, 3)[:ndim], direction)
    labels = RNG.integers(0, 200, shape).astype(dtype)
    image = open_array(encode_npz(LabelMap(labels, geometry), with_labels=True), None)
    np.testing.assert_array_equal(image.read()[0], labels)
    np.testing.assert_allclose(image.geometry.affine, geometry.affine)


def test_the_same_answer_has_the_same_bytes_and_holds_what_was_asked_for() -> None:
    geometry = make_geometry((2, 3, 4), (1, 2, 3), (0, 0, 0), np.eye(3).ravel().tolist())
    labels = np.ones((2, 3, 4), np.uint8)
    probabilities = np.zeros((2, 2, 3, 4), np.float32)
    for answer in (LabelMap(labels, geometry), LabelMap(labels, geometry, probabilities, (0, 3))):
        for with_labels in (True, False):
            content = encode_npz(answer, with_labels=with_labels)
            assert content == encode_npz(answer, with_labels=with_labels)
            loaded = np.load(io.BytesIO(content))
            assert ("labels" in loaded) == with_labels
            assert ("probabilities" in loaded) == (answer.probabilities is not None)
    assert loaded["channels"].tolist() == [0, 3]
    assert loaded["spacing"].tolist() == [1, 2, 3]


def with_header(text: bytes, version: bytes = b"\x01\x00", data: bytes = b"") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text + data


def header(descr: str = "'<i2'", order: str = "False", shape: str = "(4, 5, 6)") -> bytes:
    return with_header(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}\n".encode(), data=bytes(240))


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
        archive.comment = comment
    return file.getvalue()


def patched(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


STORED, DEFLATED = npz(image=PLAIN), npz(np.savez_compressed, image=PLAIN)
MIDDLE = STORED.index(PLAIN.tobytes()) + 100
LONG = npy(PLAIN) + bytes(SLACK_BYTES + 1)

HOSTILE: dict[str, tuple[bytes, type[ServingError]]] = {
    "a pickle": (npy(np.array([{}, []], object)), UnknownFormat),
    "a pickle in an npz": (npz(image=np.array([{}], object)), UnknownFormat),
    "complex": (npy(some((4, 5)).astype("c8")), UnknownFormat),
    "strings": (npy(np.array([["a"]])), UnknownFormat),
    "bytes": (npy(np.array([[b"a"]])), UnknownFormat),
    "fields": (npy(np.zeros((2, 2), [("a", "i2"), ("b", "f4")])), UnknownFormat),
    "void": (header("'|V8'"), UnknownFormat),
    "times": (npy(np.zeros((2, 2), "M8[s]")), UnknownFormat),
    "long double": (npy(np.zeros((2, 2), np.longdouble)), UnknownFormat),
    "an unknown type": (header("'<q9'"), Malformed),
    "a type that is code": (header("__import__('os').getcwd()"), Malformed),
    "a shape that is no tuple": (header(shape="5"), Malformed),
    "a negative axis": (header(shape="(-4, -5, 6)"), Malformed),
    "an axis of zero": (npy(np.zeros((0, 5, 6))), Malformed),
    "a shape of floats": (header(shape="(4.0, 5, 6)"), Malformed),
    "a shape of 2**80": (header(shape=f"({2**80}, 5, 6)"), TooLarge),
    "a trillion voxels": (header(shape="(10000, 10000, 10000)"), TooLarge),
    "too many channels": (header(shape="(100, 2, 2, 2)"), TooLarge),
    "one axis": (npy(np.zeros(5)), Malformed),
    "no axis": (npy(np.float32(3)), Malformed),  # type: ignore[arg-type]
    "five axes": (npy(np.zeros((1, 1, 1, 2, 2))), WrongChannels),
    "version 9": (with_header(b"{}", b"\x09\x00"), Malformed),
    "no header": (b"\x93NUMPY", Malformed),
    "an empty header": (with_header(b""), Malformed),
    "brackets without end": (with_header(b"(" * 5000), Malformed),
    "brackets in brackets": (with_header(b"[" * 4000 + b"]" * 4000), Malformed),
    "a header of 4 GB": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100), TooLarge),
    "a header that is cut": (npy(PLAIN)[:40], Malformed),
    "no voxels": (npy(PLAIN)[:128], Malformed),
    "cut voxels": (npy(PLAIN)[:-1], Malformed),
    "far more voxels": (LONG, TooLarge),
    "an npz with far more voxels": (zipped(("image.npy", LONG)), TooLarge),
    "an npz with cut voxels": (zipped(("image.npy", npy(PLAIN)[:-1])), Malformed),
    "no array in the zip": (zipped(("readme.txt", b"hello")), UnknownFormat),
    "no npy in the npy": (zipped(("image.npy", b"hello")), Malformed),
    "an empty zip": (b"PK\x03\x04", Malformed),
    "a cut zip": (STORED[:-30], Malformed),
    "a cut comment": (zipped(("image.npy", npy(PLAIN)), comment=b"hello")[:-1], Malformed),
    "bytes after a comment": (zipped(("image.npy", npy(PLAIN)), comment=b"hello") + b"\0", Malformed),
    "another end in a comment": (zipped(("image.npy", npy(PLAIN)), comment=b"PK\5\6" + bytes(30)), Malformed),
    "half an end in a comment": (zipped(("image.npy", npy(PLAIN)), comment=b"hello PK\5\6"), Malformed),
    "a directory of 4 GB before a comment": (STORED[:-10] + b"\xff\xff\xff\x7f" + STORED[-6:-2] + b"\2\0hi", TooLarge),
    "bytes after the zip": (STORED + bytes(100), Malformed),
    "bzip2": (zipped(("image.npy", npy(PLAIN)), method=zipfile.ZIP_BZIP2), Malformed),
    "lzma": (zipped(("image.npy", npy(PLAIN)), method=zipfile.ZIP_LZMA), Malformed),
    "the same name twice": (patched(npz(aaaaa=PLAIN, image=PLAIN), b"aaaaa", b"image"), Malformed),
    "a wrong checksum": (STORED[:MIDDLE] + bytes([STORED[MIDDLE] ^ 1]) + STORED[MIDDLE + 1 :], Malformed),
    "a damaged stream": (DEFLATED[:100] + b"\xff" * 40 + DEFLATED[140:], Malformed),
    "an encrypted member": (patched(STORED, b"\x01\x02-\x03-\0\0\0", b"\x01\x02-\x03-\0\1\0"), Malformed),
    "a directory that lies elsewhere": (STORED[:-6] + b"\xff\xff\xff\x7f\0\0", Malformed),
    "a directory of 4 GB": (STORED[:-10] + b"\xff\xff\xff\x7f" + STORED[-6:], TooLarge),
    "many members": (zipped(*((f"{n}.npy", b"") for n in range(300))), TooLarge),
}  # fmt: skip


@pytest.mark.parametrize("comment", [b"Created by Orthanc", b"x" * 65535, b"\0\0", b"PK\5"])
def test_a_comment_of_a_zip_is_stepped_over(comment: bytes) -> None:
    found = open_array(zipped(("image.npy", npy(PLAIN)), comment=comment)).read()
    np.testing.assert_array_equal(found[0], PLAIN)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_named_for_what_they_are(name: str) -> None:
    content, expected = HOSTILE[name]
    with pytest.raises(ServingError) as refused:
        open_array(content).read()
    assert type(refused.value) is expected


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"spacing": np.ones(10)}, Malformed),
        ({"spacing": np.ones(1_000_000)}, Malformed),
        ({"spacing": 1.0}, Malformed),
        ({"spacing": [1, 1]}, BadSpacing),
        ({"spacing": [1, 1, 0]}, BadSpacing),
        ({"spacing": [1, 1, np.nan]}, BadSpacing),
        ({"spacing": ["1", "1", "1"]}, UnknownFormat),
        ({"spacing": [1, 1, 1], "origin": [0, 0, np.inf]}, Malformed),
        ({"spacing": [1, 1, 1], "direction": np.zeros((3, 3))}, Malformed),
        ({"spacing": [1, 1, 1], "direction": np.eye(2)}, Malformed),
    ],
)
def test_a_geometry_that_is_none_is_refused(numbers: dict[str, Any], expected: type[ServingError]) -> None:
    with pytest.raises(ServingError) as refused:
        open_array(npz(image=PLAIN, **numbers), None)
    assert type(refused.value) is expected


def peak_of(content: bytes, limits: Limits = LIMITS) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(ServingError):
            open_array(content, HERE, limits).read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_deflate_bomb_in_an_npz_is_not_inflated() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(npy(PLAIN)) + b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush()
    honest = zipped(("image.npy", npy(PLAIN) + bytes(64 * 2**20)), method=zipfile.ZIP_DEFLATED)
    assert peak_of(honest) < 4 * 2**20
    size = len(npy(PLAIN))  # a directory that declares the array alone
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, len(packed), size, 9, 0) + b"image.npy"
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 8, 0, 0, 0, len(packed), size, 9, 0, 0, 0, 0, 0, 0)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(entry) + 9, len(local) + len(packed), 0)
    assert peak_of(local + packed + entry + b"image.npy" + end) < 8 * 2**20


def test_a_directory_of_a_million_entries_is_not_read() -> None:
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    for count in (1_000_000, 0):  # said and unsaid
        directory = entry * 1_000_000
        end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count % 2**16, count % 2**16, len(directory), 0, 0)
        content = b"PK\3\4" + directory + end
        assert peak_of(content) < 2**20


def test_zip64_cannot_hide_a_directory() -> None:
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    directory = b"PK\3\4" + entry * 100_000
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 10**5, 10**5, len(directory) - 4, 4)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(directory), 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 47, 0, 0)
    content = directory + record + locator + end
    assert peak_of(content) < 2**20


def test_a_header_that_claims_much_allocates_nothing() -> None:
    assert peak_of(header(shape="(1000, 1000, 1000)")) < 2**20
    small = zipped(("image.npy", header("'<f8'", shape="(100, 100, 100)")))
    assert peak_of(small, Limits()) < 2**20


def test_names_in_a_zip_are_no_paths() -> None:
    content = zipped(("../../etc/passwd.npy", npy(PLAIN)))
    np.testing.assert_array_equal(open_array(content).read()[0], PLAIN)


def test_every_cut_of_an_npz_is_refused() -> None:
    for length in range(4, len(DEFLATED), 7):
        with pytest.raises(ServingError):
            open_array(DEFLATED[:length]).read()


def test_an_npz_with_an_origin_is_told_to_hold_the_spacing_too() -> None:
    with pytest.raises(BadSpacing, match="into it too"):
        open_array(npz(image=PLAIN, origin=[0, 0, 0]), None)


@pytest.mark.parametrize("descr", ["()", "('<f4',)", "[()]", "('<f4', (1,), 3)"])
def test_a_description_that_numpy_stumbles_over_is_malformed(descr: str) -> None:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (2, 3, 4)}}".encode()
    body = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + bytes(96)
    with pytest.raises((Malformed, UnknownFormat)):
        open_array(body)
