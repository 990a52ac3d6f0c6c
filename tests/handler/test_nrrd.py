"""NRRD in and out, against SimpleITK, which nnU-Net reads with, and pynrrd."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import itertools
import tracemalloc
import zlib
from pathlib import Path

import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_torchserve.codecs.geometry import make_geometry
from nnunet_torchserve.codecs.inflate import SLACK_BYTES, ByteSource
from nnunet_torchserve.codecs.nrrd import NrrdSource, encode_nrrd, is_nrrd
from nnunet_torchserve.errors import BadSpacing, Malformed, ServingError, TooLarge, UnknownFormat, WrongChannels
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.volume import Geometry, LabelArray
from support import itk_files
from support.descriptors import open_files
from support.examples import thin
from support.itk_files import DTYPES, Watch, direction, values
from support.volumes import write

LIMITS = Limits(expanded_bytes=10_000_000, voxels=1_000_000, memory_bytes=1)
RNG = np.random.default_rng(5)

VOXELS = np.arange(24, dtype="<i2").reshape(4, 3, 2)
FIELDS = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "2 3 4",
    "space directions": "(0.5,0,0) (0,0.75,0) (0,0,2.5)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(-10,20,30.5)",
}


def header(**changed: str | None) -> bytes:
    fields = {**FIELDS, **{name.replace("_", " "): value for name, value in changed.items()}}
    lines = ["NRRD0005", *(f"{name}: {value}" for name, value in fields.items() if value is not None), "", ""]
    return "\n".join(lines).encode("latin-1")


def plain(**changed: str | None) -> bytes:
    return header(**changed) + VOXELS.tobytes()


def spaced(**changed: str | None) -> bytes:
    """Without a space: spacings only."""
    return plain(**{"space": None, "space_directions": None, "space_origin": None, "spacings": "1 2 3"} | changed)


def open_image(body: bytes, limits: Limits = LIMITS) -> NrrdSource:
    return NrrdSource(ByteSource(body), limits)


def assert_as_nnunet(body: bytes, folder: Path) -> None:
    file = folder / "image.nrrd"
    file.write_bytes(body)
    itk_files.assert_as_nnunet(open_image(body), file)


@settings(max_examples=thin(60))
@given(
    dtype=st.sampled_from(DTYPES),
    ndim=st.sampled_from([2, 3]),
    compress=st.booleans(),
    flip=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_simpleitk_writes_is_read_as_nnunet_reads_it(
    dtype: str, ndim: int, compress: bool, flip: bool, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    random = np.random.default_rng(seed)
    image = sitk.GetImageFromArray(values(random, dtype, tuple(random.integers(1, 7, ndim))))
    image.SetSpacing(random.uniform(0.01, 20, ndim).tolist())
    image.SetOrigin(random.uniform(-500, 500, ndim).tolist())
    image.SetDirection(direction(random, ndim, flip=flip).ravel().tolist())
    folder = tmp_path_factory.mktemp("nrrd")
    sitk.WriteImage(image, str(folder / "written.nrrd"), compress)
    assert_as_nnunet((folder / "written.nrrd").read_bytes(), folder)


@settings(max_examples=thin(60))
@given(
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from("<>"),
    encoding=st.sampled_from(["raw", "gzip", "gz"]),
    space=st.sampled_from(
        ["LPS", "right-anterior-superior", "Left Anterior Superior", "scanner-xyz", "3D-left-handed"]
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_pynrrd_writes_is_read_as_nnunet_reads_it(
    dtype: str, order: str, encoding: str, space: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    random = np.random.default_rng(seed)
    array = values(random, dtype, tuple(random.integers(1, 6, 3))).astype(order + np.dtype(dtype).str[1:])
    directions = direction(random, 3, flip=bool(seed % 2)) * random.uniform(0.1, 9, 3)
    if seed % 3 == 0:
        directions[0, 1] += directions[0, 0] / 3  # sheared
    fields = {
        "space": space,
        "space directions": directions,
        "space origin": random.uniform(-500, 500, 3),
        "kinds": ["domain", "space", "domain"],
        "encoding": encoding,
        "space units": ["mm", "mm", "mm"],
        "measurement frame": np.eye(3),
        "my key": "and: its := value",
    }
    folder = tmp_path_factory.mktemp("nrrd")
    nrrd.write(str(folder / "written.nrrd"), array, fields)
    assert_as_nnunet((folder / "written.nrrd").read_bytes(), folder)


SLICER = plain(
    space="left-posterior-superior", space_units='"mm" "mm" "mm"', measurement_frame="(1,0,0) (0,1,0) (0,0,1)"
)
HAND_MADE = {
    "no change": plain(),
    "Slicer's": SLICER.replace(b"type:", b"# Complete NRRD file format specification at:\n#\xe9\ntype:"),
    "RAS": plain(space="RAS"),
    "LAS by name": plain(space="left-anterior-superior"),
    "other space": plain(space="3D-right-handed"),
    "space dimension": plain(space=None, space_dimension="3", kinds=None).replace(b"space dimension: 3\n", b"").replace(
        b"sizes:", b"space dimension: 3\nsizes:"
    ),
    "no origin": plain(space_origin=None),
    "no kinds": plain(kinds=None),
    "unknown kinds": plain(kinds="??? none domain"),
    "spacings": spaced(),
    "centres of cells": spaced(axis_mins="10 20 30"),
    "centres of nodes": spaced(axis_mins="10 20 30", centerings="node cell node"),
    "maximums": spaced(axis_mins="10 20 30", axis_maxs="12 26 42"),
    "unknown minimums": spaced(axis_mins="nan nan nan"),
    "units are not looked at": spaced(units='"cm" "cm" "cm"'),
    "windows": header().replace(b"\n", b"\r\n") + VOXELS.tobytes(),
    "key/value pairs": plain().replace(b"type:", b"DICOM_0010_0010:=A^B\nfoo:=bar: baz\n:=\ntype:"),
    "free text": plain().replace(b"endian:", b'content: caf\xc3\xa9: \xff\nlabels: "x" "\xe9" "z"\nendian:'),
    "harmless fields": spaced(
        number="24", old_min="0", oldmax="3", min="1", max="2", thicknesses="1 1 nan", sampleunits="HU"
    ).replace(b"old min: 0", b"oldmin: 0"),
    "no skip": plain(line_skip="0", byteskip="0"),
    "names in capitals": plain().replace(b"sizes:", b"Sizes:").replace(b"type:", b"TYPE:"),
    "time as third axis": spaced(kinds="domain domain time"),
    "stub": plain(dimension="4", sizes="1 2 3 4", kinds="stub domain domain domain",
                  space_directions="none (0.5,0,0) (0,0.75,0) (0,0,2.5)"),
    "plane": spaced(dimension="2", sizes="4 6", spacings="1.5 0.25", kinds=None),
    "17 digits": plain(space_origin="(0.10000000000000001,-3.3333333333333335e-05,1e2)"),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND_MADE)
def test_headers_of_other_tools_are_read_as_nnunet_reads_them(name: str, tmp_path: Path) -> None:
    assert_as_nnunet(HAND_MADE[name], tmp_path)


TYPE_NAMES = """signed char|int8|int8_t|uchar|unsigned char|uint8|uint8_t|short|short int|signed short|signed short int|
int16|int16_t|ushort|unsigned short|unsigned short int|uint16|uint16_t|int|signed int|int32|int32_t|uint|unsigned int|
uint32|uint32_t|longlong|long long|long long int|signed long long|signed long long int|int64|int64_t|ulonglong|
unsigned long long|unsigned long long int|uint64|uint64_t|float|double""".replace("\n", "").split("|")


@pytest.mark.parametrize("name", TYPE_NAMES)
def test_every_name_of_a_type_is_known(name: str, tmp_path: Path) -> None:
    body = header(type=name, endian="big") + RNG.integers(0, 60, 24 * 8, np.uint8).tobytes()
    size = max(1, 24 * {"1": 1, "2": 2, "4": 4, "8": 8}[str(_itk_bytes(body, tmp_path))])
    assert_as_nnunet(body[: len(header(type=name, endian="big")) + size], tmp_path)


def _itk_bytes(body: bytes, folder: Path) -> int:
    (folder / "a.nrrd").write_bytes(body)
    return int(sitk.GetArrayViewFromImage(sitk.ReadImage(str(folder / "a.nrrd"))).itemsize)


@pytest.mark.parametrize("encoding", ["bz2", "bzip2", "gz", "gzip"])
def test_packed_voxels_are_read(encoding: str) -> None:
    pack = bz2.compress if "bz" in encoding else gzip.compress
    image = open_image(header(encoding=encoding) + pack(VOXELS.tobytes()))
    np.testing.assert_array_equal(image.read()[0], VOXELS)


def test_a_whole_file_in_gzip_is_read_unless_it_is_packed_twice() -> None:
    np.testing.assert_array_equal(open_image(gzip.compress(plain())).read()[0], VOXELS)
    with pytest.raises(UnknownFormat, match="twice"):
        open_image(gzip.compress(header(encoding="gz") + gzip.compress(VOXELS.tobytes())))


@pytest.mark.parametrize("kind", ["list", "vector", "none", "???", "domain"])
@pytest.mark.parametrize("last", [False, True])
def test_the_axis_that_is_not_in_space_is_the_channel(kind: str, last: bool, tmp_path: Path) -> None:
    array = RNG.integers(0, 100, (5, 4, 3, 2)).astype("<i2")  # c, z, y, x
    stored = array if last else array.transpose(1, 2, 3, 0)
    where = 3 if last else 0

    def with_channel(words: str, channel: str) -> str:
        parts = words.split()
        parts.insert(where, channel)
        return " ".join(parts)

    body = (
        header(
            dimension="4",
            sizes=with_channel("2 3 4", "5"),
            kinds=with_channel("domain domain domain", kind),
            space_directions=with_channel(FIELDS["space directions"], "none"),
        )
        + np.ascontiguousarray(stored).tobytes()
    )
    image = open_image(body)
    assert image.channels == 5
    np.testing.assert_array_equal(image.read(), array)
    alone = open_image(plain()).geometry
    assert image.geometry.spacing_zyx == alone.spacing_zyx
    np.testing.assert_array_equal(image.geometry.affine, alone.affine)


def test_of_four_axes_without_a_space_the_last_is_the_channel_as_in_nnunet(tmp_path: Path) -> None:
    array = RNG.integers(0, 100, (5, 4, 3, 2)).astype("<i2")
    body = spaced(dimension="4", sizes="2 3 4 5", spacings="1 2 3 1", kinds=None)[: -VOXELS.nbytes] + array.tobytes()
    (tmp_path / "a.nrrd").write_bytes(body)
    expected, properties = SimpleITKIO().read_images([str(tmp_path / "a.nrrd")])
    image = open_image(body)
    np.testing.assert_array_equal(image.read(), expected, strict=True)
    assert list(image.geometry.spacing_zyx) == list(properties["spacing"])


@pytest.mark.parametrize(
    "kinds",
    ["HSV-color domain domain", "complex domain domain", "3D-matrix domain domain", "list vector domain",
     "domain list domain", "3-normal domain domain", "list domain list"],
)  # fmt: skip
def test_colours_matrices_and_two_axes_of_channels_are_refused(kinds: str) -> None:
    with pytest.raises(WrongChannels):
        open_image(spaced(kinds=kinds))


@pytest.mark.parametrize("sizes", ["5", "1 2 3 4 5"])
def test_other_numbers_of_dimensions_are_refused(sizes: str) -> None:
    with pytest.raises(WrongChannels):
        open_image(spaced(dimension=str(len(sizes.split())), sizes=sizes))


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_that_is_missing_is_harmless_or_refused(name: str, tmp_path: Path) -> None:
    body = plain(**{name: None})
    if name in {"kinds", "space origin"}:
        assert_as_nnunet(body, tmp_path)
    else:
        with pytest.raises((Malformed, BadSpacing)):
            open_image(body)


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_may_come_twice(name: str) -> None:
    line = f"{name}: {FIELDS[name]}\n".encode()
    for again in (line, line.replace(b" ", b"", 1) if name.startswith("space ") else line.upper()):
        with pytest.raises(Malformed, match="more than once"):
            open_image(plain().replace(line, line + again))


NUMBERS = ["nan", "inf", "-inf", "1e999", "0x10", "1_0", "", "1,5", "9" * 5000, "١", "1e", "--1", "none"]
NUMERIC = {
    "dimension": "{}",
    "sizes": "2 {} 4",
    "space directions": "(1,0,0) (0,{},0) (0,0,1)",
    "space origin": "(0,{},0)",
}


@pytest.mark.parametrize(("name", "number"), list(itertools.product(NUMERIC, NUMBERS)))
def test_what_is_no_number_is_malformed(name: str, number: str) -> None:
    body = plain(**{name: "?"}).replace(b"?", NUMERIC[name].format(number).encode(), 1)
    with pytest.raises(Malformed):
        open_image(body)


@pytest.mark.parametrize("number", ["nan", "inf", "0", "-1", "1e-30", "1e30"])
def test_spacing_must_be_positive_and_finite(number: str) -> None:
    with pytest.raises((BadSpacing, Malformed)):
        open_image(spaced(spacings=f"1 {number} 2"))


@pytest.mark.parametrize("number", ["0", "1e30", "1e200", "1e-30"])
def test_length_of_a_direction_must_be_a_spacing(number: str) -> None:
    with pytest.raises(BadSpacing):
        open_image(plain(space_directions=f"(1,0,0) (0,{number},0) (0,0,1)"))


def test_a_file_without_spacing_is_not_taken_for_millimetres() -> None:
    for fields in ({"spacings": None}, {"spacings": None, "axis_mins": "0 0 0", "axis_maxs": "2 6 12"}):
        with pytest.raises(BadSpacing, match="no voxel spacing"):
            open_image(spaced(**fields))


MALFORMED = {
    "nothing": b"",
    "magic only": b"NRRD0005\n",
    "no end": header()[:-1],
    "another line": plain().replace(b"type:", b"hello\ntype:"),
    "unknown field": plain().replace(b"type:", b"direction: 1\ntype:"),
    "no space after the colon": plain().replace(b"type: ", b"type:"),
    "zero byte": plain().replace(b"type: short", b"type: short\0"),
    "carriage return": plain().replace(b"type: short", b"type: short\rencoding: raw"),
    "three and two axes": plain(sizes="2 3"),
    "one axis too many": plain(sizes="2 3 4 5"),
    "empty axis": plain(sizes="0 3 4"),
    "negative axis": plain(sizes="-2 3 4"),
    "two negative axes": plain(sizes="-2 -3 4"),
    "space and dimension": plain(space_dimension="3"),
    "directions without a space": plain(space=None, space_origin=None),
    "spacings in a space": plain(space_directions=None, spacings="1 1 1"),
    "a plane in a volume's space": plain(dimension="2", sizes="4 6", space_directions="(1,0,0) (0,1,0)", kinds=None),
    "flat": plain(space_directions="(1,0,0) (1,0,0) (0,0,1)"),
    "half a vector": plain(space_directions="(1,0,0) (0,1,0) (0,0,1"),
    "too many vectors": plain(space_directions="(1,0,0) (0,1,0) (0,0,1) (0,0,1)"),
    "nan in a vector": plain(space_directions="(1,0,nan) (0,1,0) (0,0,1)"),
    "some minimums": spaced(axis_mins="1 nan 1"),
    "unknown centre": spaced(centerings="cell cell left"),
    "two kinds": plain(kinds="domain domain"),
    "endian": plain(endian="middle"),
    "large stub": plain(dimension="4", sizes="2 2 3 4", kinds="stub domain domain domain",
                        space_directions="none (0.5,0,0) (0,0.75,0) (0,0,2.5)"),
    "cut voxels": plain()[:-1],
    "no voxels": header(),
    "cut gzip": (header(encoding="gzip") + gzip.compress(VOXELS.tobytes()))[:-9],
    "no gzip": plain(encoding="gzip"),
    "no bzip2": plain(encoding="bz2"),
    "wrong checksum": (header(encoding="gzip") + gzip.compress(VOXELS.tobytes()))[:-8] + b"\1" * 8,
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_bytes_that_break_their_format_are_malformed(name: str) -> None:
    with pytest.raises(Malformed):
        open_image(MALFORMED[name]).read()


UNKNOWN = {
    "hexadecimal": plain(encoding="hex"),
    "text": plain(encoding="ascii"),
    "block": plain(type="block", block_size="4"),
    "char without a sign": plain(type="char"),
    "skipped lines": plain(line_skip="1"),
    "skipped bytes": plain(byte_skip="2"),
    "voxels at the end": plain(byte_skip="-1"),
    "time in space": plain(space="LPST"),
    "time in a space that ITK takes for another": plain(space="RAST"),
    "a space of more dimensions": spaced(space_dimension="4"),
    "version 6": plain().replace(b"NRRD0005", b"NRRD0006"),
    "old": plain().replace(b"NRRD0005", b"NRRD00.01"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_supported_is_named(name: str) -> None:
    with pytest.raises(UnknownFormat):
        open_image(UNKNOWN[name])


def test_sizes_are_bounded_before_voxels_are_read() -> None:
    with pytest.raises(TooLarge):
        open_image(plain(sizes="10000 10000 10000"))
    with pytest.raises(TooLarge):
        open_image(plain(sizes="999999999999999999 999999999999999999 999999999999999999"))
    with pytest.raises(TooLarge):
        open_image(plain(dimension="4", sizes="65 2 3 4", kinds="list domain domain domain",
                         space_directions="none (0.5,0,0) (0,0.75,0) (0,0,2.5)"))  # fmt: skip
    with pytest.raises(TooLarge):
        open_image(plain(), Limits(expanded_bytes=VOXELS.nbytes - 1))


def test_header_is_bounded() -> None:
    long = plain().replace(b"type:", b"content: " + b"x" * LIMITS.header_bytes + b"\ntype:")
    with pytest.raises(TooLarge):
        open_image(long)
    with pytest.raises(TooLarge):
        open_image(b"NRRD0005\n" + b"x" * LIMITS.header_bytes)
    with pytest.raises(TooLarge):
        open_image(plain().replace(b"type:", b"a:=b\n" * 5000 + b"type:"))
    exact = LIMITS.header_bytes - len(header()) - len(b"content: \n")
    for room, fits in ((exact, True), (exact + 1, False)):
        body = plain().replace(b"type:", b"content: " + b"x" * room + b"\ntype:")
        if fits:
            np.testing.assert_array_equal(open_image(body).read()[0], VOXELS)
        else:
            with pytest.raises(TooLarge):
                open_image(body)


@pytest.mark.parametrize("encoding", ["gzip", "bz2"])
def test_a_bomb_is_not_inflated(encoding: str) -> None:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb") if encoding == "gzip" else bz2.BZ2File(packed, "wb") as file:
        file.write(VOXELS.tobytes())
        for _ in range(32 if encoding == "bz2" else 256):
            file.write(bytes(2**20))
    image = open_image(header(encoding=encoding) + packed.getvalue())
    tracemalloc.start()
    with pytest.raises(TooLarge):
        image.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * SLACK_BYTES


DETACHED = [
    "data file: {}", "datafile: {}", "Data File: {}", "DATAFILE: {}", "data file:   {}", "data file: ./{}",
    "data file: LIST\n{}", "data file: LIST 2\n{}\n{}", "data file: {}%d 1 4 1 2", "data file: skip {}",
    "data file : {}", " data file: {}", "data  file: {}", "data file:{}", "data\tfile: {}",
    "# x\r\ndata file: {}", "data file: x:={}", "content: x\rdata file: {}",
]  # fmt: skip


@pytest.mark.parametrize("spelling", DETACHED)
@pytest.mark.parametrize("first", [False, True])
def test_no_other_file_is_opened(spelling: str, first: bool, tmp_path: Path) -> None:
    secret = tmp_path / "secret.raw"
    secret.write_bytes(VOXELS.tobytes())
    line = spelling.format(*[secret] * spelling.count("{}")).encode() + b"\n"
    body = plain().replace(b"type:", line + b"type:") if first else header()[:-1] + line + b"\n" + VOXELS.tobytes()
    watch = Watch(secret)
    try:
        with pytest.raises((UnknownFormat, Malformed)):
            open_image(body).read()
        assert not watch.opened()
        if spelling == "data file: {}":  # ITK itself would have
            (tmp_path / "a.nrrd").write_bytes(body)
            sitk.ReadImage(str(tmp_path / "a.nrrd"))
            assert watch.opened()
    finally:
        watch.close()


def test_no_descriptor_is_left_open() -> None:
    bodies = [plain(), plain(space_directions="(1,0,0) (1,0,0) (0,0,1)"), MALFORMED["spacings in a space"]]
    before = open_files(collected=True)
    for body in bodies * 5:
        try:
            open_image(body)
        except ServingError:
            continue
    assert open_files() == before


@settings(max_examples=thin(300))
@given(data=st.data())
def test_whatever_is_broken_the_answer_is_an_error_of_ours_or_nnunets(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    body = bytearray(
        data.draw(st.sampled_from([plain(), spaced(), SLICER, header(encoding="gzip") + gzip.compress(b"")]))
    )
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"\n", b": ", b"nan", b"(", b")", b"-", b"9" * 30]))
        )
    try:
        image = open_image(bytes(body))
        image.read()
    except ServingError:
        return
    folder = tmp_path_factory.mktemp("fuzz")
    with contextlib.suppress(RuntimeError):  # stricter than we are, in the order of fields
        sitk.ReadImage(str(write(folder, "a.nrrd", bytes(body))))
        if image.channels == 1:
            assert_as_nnunet(bytes(body), folder)


def test_messages_hold_no_text_of_the_file() -> None:
    for body in (
        plain().replace(b"type:", b"SECRET: x\ntype:"),
        plain(type="SECRET"),
        plain(encoding="SECRET"),
        plain(space="SECRET"),
        plain(kinds="SECRET domain domain"),
        plain(sizes="SECRET 2 3"),
        plain(data_file="SECRET"),
    ):
        with pytest.raises(ServingError) as refused:
            open_image(body)
        assert "SECRET" not in str(refused.value)


def test_files_are_recognised_by_their_first_bytes() -> None:
    assert all(is_nrrd(b"NRRD000%d\n" % version) for version in range(1, 6))
    assert not any(is_nrrd(head) for head in (b"", b"NRRD", b"NRRD0006\n", b"NRRD00.01", b"nrrd0001", b" NRRD0001"))


def grid(ndim: int, *, sheared: bool = False) -> Geometry:
    shape, n = ((4, 3, 2), 3) if ndim == 3 else ((4, 3), 2)
    axes = direction(np.random.default_rng(2), n, flip=True)
    if sheared:
        axes[:, 0] = (axes[:, 0] + axes[:, 1] / 3) / np.linalg.norm(axes[:, 0] + axes[:, 1] / 3)
    return make_geometry(shape, [0.7, 1 / 3, 2.9][:n], [-10.1, 1e-7, 333.3][:n], axes.ravel().tolist())


def labels_of(geometry: Geometry, dtype: type) -> LabelArray:
    labels = RNG.integers(0, 300, geometry.shape)
    return labels.astype(np.uint8) if dtype is np.uint8 else labels.astype(np.uint16)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("ndim", "sheared"), [(2, False), (3, False), (3, True)])
def test_labels_are_written_on_their_grid(ndim: int, sheared: bool, dtype: type, tmp_path: Path) -> None:
    geometry = grid(ndim, sheared=sheared)
    labels = labels_of(geometry, dtype)
    body = encode_nrrd(labels, geometry)
    assert body == encode_nrrd(labels.copy(), geometry)
    file = tmp_path / "labels.nrrd"
    file.write_bytes(body)
    itk = sitk.ReadImage(str(file))
    expected = labels if ndim == 3 else labels[0]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk), expected, strict=True)
    np.testing.assert_allclose(itk.GetSpacing(), geometry.spacing[:ndim], rtol=1e-15)
    assert itk.GetOrigin() == geometry.origin[:ndim]
    np.testing.assert_allclose(itk.GetDirection(), geometry.direction[:ndim, :ndim].ravel(), rtol=1e-14)
    array, fields = nrrd.read(str(file), index_order="C")
    np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(fields["space directions"], geometry.affine[:ndim, :ndim].T)
    np.testing.assert_array_equal(open_image(body).read()[0], labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("ndim", [2, 3])
def test_header_is_the_one_that_itks_writer_writes(ndim: int, dtype: type, tmp_path: Path) -> None:
    geometry = grid(ndim)
    labels = labels_of(geometry, dtype)
    image = sitk.GetImageFromArray(labels if ndim == 3 else labels[0])
    image.SetSpacing(geometry.spacing[:ndim])
    image.SetOrigin(geometry.origin[:ndim])
    image.SetDirection(geometry.direction[:ndim, :ndim].ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / "itk.nrrd"), True)
    its, ours = (
        [line for line in body.partition(b"\n\n")[0].split(b"\n") if not line.startswith(b"#")]
        for body in ((tmp_path / "itk.nrrd").read_bytes(), encode_nrrd(labels, geometry))
    )
    assert ours == its


def test_an_answer_is_smaller_than_its_voxels_and_its_checksum_holds() -> None:
    geometry = make_geometry((40, 50, 60), (1, 1, 1), (0, 0, 0), np.eye(3).ravel().tolist())
    body = encode_nrrd(np.zeros(geometry.shape, np.uint8), geometry)
    assert len(body) < 5000
    assert zlib.decompress(body.partition(b"\n\n")[2], 31) == bytes(120_000)
