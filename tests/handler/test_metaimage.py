"""MetaImage in and out, against SimpleITK, which nnU-Net reads with."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_torchserve.codecs.geometry import make_geometry
from nnunet_torchserve.codecs.inflate import SLACK_BYTES, ByteSource
from nnunet_torchserve.codecs.metaimage import MetaImageSource, encode_metaimage, is_metaimage
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
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "0 1 0 -1 0 0 0 0 1",
    "Offset": "-10 20 30.5",
    "CenterOfRotation": "0 0 0",
    "AnatomicalOrientation": "RAI",
    "ElementSpacing": "0.5 0.75 2.5",
    "DimSize": "2 3 4",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}


def header(**changed: str | None) -> bytes:
    fields = {**FIELDS, **changed}
    data = fields.pop("ElementDataFile")
    lines = [f"{name} = {value}" for name, value in fields.items() if value is not None]
    lines += [f"ElementDataFile = {data}"] if data is not None else []
    return "\n".join([*lines, ""]).encode("latin-1")


def plain(**changed: str | None) -> bytes:
    return header(**changed) + VOXELS.tobytes()


def packed(payload: bytes, **changed: str | None) -> bytes:
    size: dict[str, str | None] = {"CompressedData": "True", "CompressedDataSize": str(len(payload))}
    return header(**{**size, **changed}) + payload


def open_image(body: bytes, limits: Limits = LIMITS) -> MetaImageSource:
    return MetaImageSource(ByteSource(body), limits)


def assert_as_nnunet(body: bytes, folder: Path) -> None:
    file = folder / "image.mha"
    file.write_bytes(body)
    itk_files.assert_as_nnunet(open_image(body), file)


@settings(max_examples=thin(80))
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
    axes = direction(random, ndim, flip=flip)
    if seed % 3 == 0:  # sheared
        axes[:, 0] += axes[:, 1] / 3
        axes[:, 0] /= np.linalg.norm(axes[:, 0])
    image.SetDirection(axes.ravel().tolist())
    image.SetMetaData("0008|0060", "MR")
    image.SetMetaData("ITK_InputFilterName", "GDCMImageIO")
    folder = tmp_path_factory.mktemp("mha")
    sitk.WriteImage(image, str(folder / "written.mha"), compress)
    assert_as_nnunet((folder / "written.mha").read_bytes(), folder)


TYPES = {
    "MET_CHAR": "i1", "MET_ASCII_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
    "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_every_type_and_byte_order_is_read_as_nnunet_reads_it(name: str, big: bool, tmp_path: Path) -> None:
    array = values(RNG, TYPES[name], (4, 3, 2)).astype((">" if big else "<") + TYPES[name])
    for field in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"):
        fields: dict[str, str | None] = {"BinaryDataByteOrderMSB": None, field: str(big), "ElementType": name}
        assert_as_nnunet(header(**fields) + array.tobytes(), tmp_path)


BARE: dict[str, str | None] = {"Offset": None, "TransformMatrix": None, "AnatomicalOrientation": None}
HAND_MADE = {
    "no change": plain(),
    "windows": header().replace(b"\n", b"\r\n") + VOXELS.tobytes(),
    "no equals space": plain().replace(b" = ", b"="),
    "blank lines": plain().replace(b"DimSize", b"\n  \nDimSize"),
    "old names": plain(**BARE, Position="1 2 3", Rotation="0 1 0 1 0 0 0 0 1"),
    "older names": plain(**BARE, Origin="1 2 3", Orientation="0 1 0 1 0 0 0 0 1"),
    "position of the image": plain(**BARE, ImagePosition="1 2 3"),
    "names that agree": plain(Position=FIELDS["Offset"], Rotation=FIELDS["TransformMatrix"]),
    "no place": plain(**BARE),
    "only what is needed": plain(**BARE, ObjectType=None, BinaryData=None, BinaryDataByteOrderMSB=None,
                                 CompressedData=None, CenterOfRotation=None),
    "element size": plain(ElementSpacing=None, ElementSize="1 2 3"),
    "element size and spacing": plain(ElementSize="1 2 3"),
    "orientation": plain(AnatomicalOrientation="LPS"),
    "centre of rotation": plain(CenterOfRotation="5 6 7"),
    "units are not looked at": plain(DistanceUnits="um"),
    "booleans": plain(BinaryData="t", BinaryDataByteOrderMSB="false", CompressedData="0"),
    "minimum and more": plain(ElementMin="0", ElementMax="23", Modality="MET_MOD_CT", ElementNBits="16",
                              ElementNumberOfChannels="1", HeaderSize="0", ID="3", ParentID="-1", Color="1 0 0 1",
                              Name="x", ElementToIntensityFunctionSlope="1", ElementToIntensityFunctionOffset="0"),
    "free text": header(Comment="caf\xe9 = a: b", AcquisitionDate="2020").replace(b"NDims", b"my_own = \xff\nNDims")
                 + VOXELS.tobytes(),
    "version": plain(FileFormatVersion="1"),
    "plane": plain(**{**BARE, "CenterOfRotation": None}, NDims="2", DimSize="4 6", ElementSpacing="1.5 0.25"),
    "zlib": packed(zlib.compress(VOXELS.tobytes())),
    "gzip": packed(gzip.compress(VOXELS.tobytes())),
    "bytes after the packed voxels": packed(zlib.compress(VOXELS.tobytes())) + b"\n",
    "17 digits": plain(Offset="0.10000000000000001 -3.3333333333333335e-05 1e2"),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND_MADE)
def test_headers_of_other_tools_are_read_as_nnunet_reads_them(name: str, tmp_path: Path) -> None:
    assert_as_nnunet(HAND_MADE[name], tmp_path)


@pytest.mark.parametrize("pack", [zlib.compress, gzip.compress])
def test_packed_voxels_need_no_size(pack: type) -> None:
    for size in (None, "0"):
        image = open_image(packed(pack(VOXELS.tobytes()), CompressedDataSize=size))
        np.testing.assert_array_equal(image.read()[0], VOXELS)


def test_a_whole_file_in_gzip_is_read_unless_it_is_packed_twice() -> None:
    np.testing.assert_array_equal(open_image(gzip.compress(plain())).read()[0], VOXELS)
    with pytest.raises(UnknownFormat, match="twice"):
        open_image(gzip.compress(packed(zlib.compress(VOXELS.tobytes()))))


def test_numbers_of_a_voxel_are_channels(tmp_path: Path) -> None:
    array = RNG.integers(0, 100, (4, 3, 2, 5)).astype("<i2")
    image = open_image(header(ElementNumberOfChannels="5") + array.tobytes())
    assert image.channels == 5
    np.testing.assert_array_equal(image.read(), np.moveaxis(array, -1, 0))
    assert image.geometry.spacing_zyx == open_image(plain()).geometry.spacing_zyx
    plane = header(**{**BARE, "CenterOfRotation": None}, NDims="2", DimSize="4 6", ElementSpacing="1 2",
                   ElementNumberOfChannels="5") + array.tobytes()  # fmt: skip
    np.testing.assert_array_equal(open_image(plane).read(), np.moveaxis(array.reshape(6, 4, 5), -1, 0)[:, None])


def test_the_fourth_axis_is_the_channel_as_in_nnunet(tmp_path: Path) -> None:
    array = RNG.integers(0, 100, (5, 4, 3, 2)).astype(np.int16)
    itk = sitk.GetImageFromArray(array, isVector=False)
    itk.SetSpacing((0.5, 0.75, 2.5, 1))
    itk.SetOrigin((1, 2, 3, 0))
    itk.SetDirection((0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1))
    file = tmp_path / "a.mha"
    sitk.WriteImage(itk, str(file))
    expected, properties = SimpleITKIO().read_images([str(file)])
    image = open_image(file.read_bytes())
    np.testing.assert_array_equal(image.read(), expected, strict=True)
    geometry = image.geometry
    assert list(geometry.spacing_zyx) == list(properties["spacing"])
    assert (geometry.origin, geometry.spacing, geometry.ndim) == ((1, 2, 3), (0.5, 0.75, 2.5), 3)
    np.testing.assert_array_equal(geometry.direction, [[0, 1, 0], [1, 0, 0], [0, 0, 1]])


def test_other_numbers_of_dimensions_are_refused() -> None:
    for fields in (
        {"NDims": "1"},
        {"NDims": "5"},
        {"NDims": "4", "DimSize": "2 3 2 2", "ElementNumberOfChannels": "2"},
    ):
        with pytest.raises(WrongChannels):
            open_image(plain(**fields))


HARMLESS = {"ObjectType", "BinaryData", "BinaryDataByteOrderMSB", "CompressedData", "TransformMatrix", "Offset",
            "CenterOfRotation", "AnatomicalOrientation"}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_that_is_missing_is_harmless_or_refused(name: str, tmp_path: Path) -> None:
    body = plain(**{name: None})
    if name in HARMLESS:
        assert_as_nnunet(body, tmp_path)
    else:
        with pytest.raises((Malformed, BadSpacing)):
            open_image(body)


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_may_come_twice(name: str) -> None:
    line = f"{name} = {FIELDS[name]}\n".encode()
    if name != "ElementDataFile":  # which ends the header
        with pytest.raises(Malformed, match="more than once"):
            open_image(plain().replace(line, line + line))
    for other in (line.swapcase(), line.replace(b" =", b":"), b"_" + line, line[:3] + b" " + line[3:]):
        with pytest.raises(Malformed, match="must be written so"):
            open_image(plain().replace(line, other + line))


NUMBERS = ["nan", "inf", "-inf", "1e999", "0x10", "1_0", "", "1,5", "9" * 5000, "\xb2", "1e", "--1"]
NUMERIC = {
    "NDims": "{}",
    "DimSize": "2 {} 4",
    "ElementSpacing": "1 {} 1",
    "Offset": "0 {} 0",
    "TransformMatrix": "1 0 0 0 {} 0 0 0 1",
    "ElementNumberOfChannels": "{}",
    "HeaderSize": "{}",
    "FileFormatVersion": "{}",
    "ElementToIntensityFunctionSlope": "{}",
}


@pytest.mark.parametrize(("name", "number"), list(itertools.product(NUMERIC, NUMBERS)))
def test_what_is_no_number_is_malformed(name: str, number: str) -> None:
    with pytest.raises(Malformed):
        open_image(plain(**{name: NUMERIC[name].format(number)}))


@pytest.mark.parametrize("number", ["0", "-1", "1e-30", "1e30"])
def test_spacing_must_be_positive(number: str) -> None:
    with pytest.raises(BadSpacing):
        open_image(plain(ElementSpacing=f"1 {number} 2"))


def test_a_file_without_spacing_is_not_taken_for_millimetres() -> None:
    with pytest.raises(BadSpacing, match="no voxel spacing"):
        open_image(plain(ElementSpacing=None))


MALFORMED = {
    "nothing": b"",
    "no end": header()[:-1],
    "no data file": plain(ElementDataFile=None),
    "a line of text": plain().replace(b"DimSize", b"hello\nDimSize"),
    "zero byte": plain().replace(b"MET_SHORT", b"MET_SHORT\0"),
    "carriage return": plain().replace(b"MET_SHORT", b"MET_SHORT\rBinaryData = True"),
    "empty axis": plain(DimSize="0 3 4"),
    "two negative axes": plain(DimSize="-2 -3 4"),
    "no channels": plain(ElementNumberOfChannels="0"),
    "negative channels": plain(ElementNumberOfChannels="-1"),
    "two axes": plain(DimSize="2 3"),
    "four axes": plain(DimSize="2 3 4 1"),
    "flat": plain(TransformMatrix="1 0 0 1 0 0 0 0 1"),
    "zero matrix": plain(TransformMatrix="0 0 0 0 0 0 0 0 0"),
    "spacing in the matrix": plain(TransformMatrix="2 0 0 0 2 0 0 0 2"),
    "mixed axes": plain(NDims="4", DimSize="2 3 2 2", ElementSpacing="1 1 1 1", Offset="0 0 0 0",
                        CenterOfRotation=None, TransformMatrix="1 0 0 1 0 1 0 0 0 0 1 0 0 0 0 1"),
    "offsets that differ": plain(Position="1 2 3"),
    "matrices that differ": plain(Rotation="1 0 0 0 1 0 0 0 1"),
    "orders that differ": plain(ElementByteOrderMSB="True"),
    "new version with old names": plain(FileFormatVersion="1", Position=FIELDS["Offset"]),
    "no boolean": plain(BinaryDataByteOrderMSB="Yes"),
    "scaled": plain(ElementToIntensityFunctionSlope="2"),
    "shifted": plain(ElementToIntensityFunctionOffset="-1024"),
    "cut voxels": plain()[:-1],
    "no voxels": header(),
    "cut zlib": packed(zlib.compress(VOXELS.tobytes()))[:-3],
    "cut zlib without a size": packed(zlib.compress(VOXELS.tobytes())[:-9], CompressedDataSize=None),
    "no zlib": packed(VOXELS.tobytes()),
    "size too large": packed(zlib.compress(VOXELS.tobytes()), CompressedDataSize="999"),
    "size far too small": packed(zlib.compress(VOXELS.tobytes()), CompressedDataSize="9") + bytes(2 * SLACK_BYTES),
    "negative size": packed(zlib.compress(VOXELS.tobytes()), CompressedDataSize="-9"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_bytes_that_break_their_format_are_malformed(name: str) -> None:
    with pytest.raises(Malformed):
        open_image(MALFORMED[name]).read()


UNKNOWN = {
    "text": plain(BinaryData="False"),
    "no image": plain(ObjectType="Tube"),
    "array of numbers": plain(ElementType="MET_FLOAT_ARRAY"),
    "no type": plain(ElementType="MET_NONE"),
    "other type": plain(ElementType="short"),
    "header to skip": plain(HeaderSize="10"),
    "voxels at the end": plain(HeaderSize="-1"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_supported_is_named(name: str) -> None:
    with pytest.raises(UnknownFormat):
        open_image(UNKNOWN[name])


def test_sizes_are_bounded_before_voxels_are_read() -> None:
    for fields in (
        {"DimSize": "10000 10000 10000"},
        {"DimSize": "999999999999999999 999999999999999999 999999999999999999"},
        {"ElementNumberOfChannels": "65"},
    ):
        with pytest.raises(TooLarge):
            open_image(plain(**fields))
    with pytest.raises(TooLarge):
        open_image(plain(), Limits(expanded_bytes=VOXELS.nbytes - 1))


def test_header_is_bounded() -> None:
    for body in (
        plain(Comment="x" * LIMITS.header_bytes),
        b"ObjectType = Image\nComment = " + b"x" * LIMITS.header_bytes,
        plain().replace(b"DimSize", b"".join(b"a%d = b\n" % n for n in range(5000)) + b"DimSize"),
    ):
        with pytest.raises(TooLarge):
            open_image(body)
    room = LIMITS.header_bytes - len(header(Comment=""))
    np.testing.assert_array_equal(open_image(plain(Comment="x" * room)).read()[0], VOXELS)
    with pytest.raises(TooLarge):
        open_image(plain(Comment="x" * (room + 1)))


@pytest.mark.parametrize("window", [15, 31])
def test_a_bomb_is_not_inflated(window: int) -> None:
    compressor = zlib.compressobj(9, zlib.DEFLATED, window)
    bomb = compressor.compress(VOXELS.tobytes())
    bomb += b"".join(compressor.compress(bytes(2**20)) for _ in range(256)) + compressor.flush()
    for size in (str(len(bomb)), None):
        image = open_image(packed(bomb, CompressedDataSize=size))
        tracemalloc.start()
        with pytest.raises(TooLarge):
            image.read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * SLACK_BYTES


DETACHED = [
    "ElementDataFile = {}", "ElementDataFile={}", "ElementDataFile: {}", "ElementDataFile : {}",
    " ElementDataFile = {}", "elementdatafile = {}", "Element Data File = {}", "ElementDataFile == {}",
    "ElementDataFile = LIST\n{}\n{}\n{}\n{}", "ElementDataFile = LIST 2\n{}", "ElementDataFile = {}%d 1 4 1",
    "ElementDataFile = LOCAL {}", "ElementDataFile = local\n{}", 'ElementDataFile = "LOCAL"\n{}',
    "ElementDataFile =\n{}", "Comment = x\rElementDataFile = {}", "Comment = x\0\nElementDataFile = {}",
]  # fmt: skip


@pytest.mark.parametrize("spelling", DETACHED)
def test_no_other_file_is_opened(spelling: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.raw"
    secret.write_bytes(VOXELS.tobytes())
    line = spelling.format(*[secret] * spelling.count("{}")).encode() + b"\n"
    watch = Watch(secret)
    try:
        for body in (header(ElementDataFile=None) + line, header(ElementDataFile=None) + line + header()):
            with pytest.raises((UnknownFormat, Malformed)):
                open_image(body + VOXELS.tobytes()).read()
        assert not watch.opened()
        if spelling == "ElementDataFile = {}":  # ITK itself would have
            (tmp_path / "a.mha").write_bytes(header(ElementDataFile=None) + line)
            sitk.ReadImage(str(tmp_path / "a.mha"))
            assert watch.opened()
    finally:
        watch.close()


def test_no_descriptor_is_left_open() -> None:
    before = open_files(collected=True)
    for body in [plain(), MALFORMED["flat"], MALFORMED["zero matrix"]] * 5:
        with contextlib.suppress(ServingError):
            open_image(body)
    assert open_files() == before


@settings(max_examples=thin(300))
@given(data=st.data())
def test_whatever_is_broken_the_answer_is_an_error_of_ours_or_nnunets(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    body = bytearray(data.draw(st.sampled_from([plain(), packed(zlib.compress(VOXELS.tobytes()))])))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"\n", b" = ", b"nan", b":", b"-", b"9" * 30]))
        )
    try:
        image = open_image(bytes(body))
        image.read()
    except ServingError:
        return
    folder = tmp_path_factory.mktemp("fuzz")
    with contextlib.suppress(RuntimeError):  # stricter than we are, in the order of fields
        sitk.ReadImage(str(write(folder, "a.mha", bytes(body))))
        if image.channels == 1 and b"CompressedData = True" not in body:  # MetaIO ignores that zlib fails
            assert_as_nnunet(bytes(body), folder)


def test_messages_hold_no_text_of_the_file() -> None:
    for name in ("ObjectType", "NDims", "BinaryData", "Offset", "ElementSpacing", "DimSize", "ElementType",
                 "ElementDataFile"):  # fmt: skip
        with pytest.raises(ServingError) as refused:
            open_image(plain(**{name: "SECRET"}))
        assert "SECRET" not in str(refused.value)


def test_files_are_recognised_by_a_field_of_metaio() -> None:
    assert is_metaimage(plain())
    assert is_metaimage(b"NDims = 3\nObjectType = Image\n")
    assert is_metaimage(b"Comment = hello\r\nObjectType = Image\r\n")
    assert is_metaimage(b"ObjectSubType=x\n")
    for text in (b"", b"Comment = hello\nName = x\n", b"key = value\n", b"hello\nNDims = 3\n", b"NDims\n", b"{}",
                 b"ndims = 3\n", b"name = NDims = 3\n", bytes(540), b"NRRD0004\n"):  # fmt: skip
        assert not is_metaimage(text)


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
def test_labels_are_written_on_their_grid_exactly(ndim: int, sheared: bool, dtype: type, tmp_path: Path) -> None:
    geometry = grid(ndim, sheared=sheared)
    labels = labels_of(geometry, dtype)
    body = encode_metaimage(labels, geometry)
    assert body == encode_metaimage(labels.copy(), geometry)
    file = tmp_path / "labels.mha"
    file.write_bytes(body)
    itk = sitk.ReadImage(str(file))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk), labels if ndim == 3 else labels[0], strict=True)
    assert itk.GetSpacing() == geometry.spacing[:ndim]
    assert itk.GetOrigin() == geometry.origin[:ndim]
    assert itk.GetDirection() == tuple(geometry.direction[:ndim, :ndim].ravel())
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
    sitk.WriteImage(image, str(tmp_path / "itk.mha"), True)
    its, ours = (
        [line for line in body[: body.index(b"LOCAL\n")].split(b"\n") if not line.startswith((b"Comp", b"Anat"))]
        for body in ((tmp_path / "itk.mha").read_bytes(), encode_metaimage(labels, geometry))
    )
    assert ours == its
