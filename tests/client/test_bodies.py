"""What is sent: arrays in few bytes and without loss, files as they are."""

from __future__ import annotations

import io
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nnunet_torchserve_client import errors
from nnunet_torchserve_client.arrays import smallest
from nnunet_torchserve_client.bodies import CHUNK_BYTES, FileBody, body_of

DTYPES = ["bool", "u1", "i1", "<u2", ">i2", "<i4", "<u8", "<f2", ">f4", "<f8"]
IN_ORDER = ["u1", "i1", "u2", "i2", "f2", "f4"]


def content(image: Any) -> bytes:
    body = body_of(image)
    sent = b"".join(body.chunks())
    assert len(sent) == body.length
    assert sent == b"".join(body.chunks()), "a second try sends the same"
    return sent


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<f8"])
def test_a_view_of_any_items_is_its_bytes(dtype: str) -> None:
    array = np.arange(CHUNK_BYTES // 4, dtype=dtype)
    for view in (array.data, array.reshape(2, -1).data, array[::2].data):
        assert content(view) == view.tobytes()


@given(
    st.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=2, max_dims=4))),
    st.booleans(),
)
def test_an_array_comes_as_float32_has_it_in_the_smallest_type(array: np.ndarray[Any, Any], turned: bool) -> None:
    array = array.T if turned else array
    with np.errstate(over="ignore", invalid="ignore"):
        exact = array.astype(np.float32)
        came = np.load(io.BytesIO(content(array)), allow_pickle=False)
        smaller = [dtype for dtype in IN_ORDER if np.array_equal(exact.astype(dtype), exact, equal_nan=True)]
    assert came.dtype.itemsize == np.dtype(smaller[0]).itemsize
    assert np.array_equal(came.astype(np.float32), exact, equal_nan=True)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 255], np.uint8),
        ([-128, 127], np.int8),
        ([0, 65535], np.uint16),
        ([-1024, 3071], np.int16),
        ([0.5, -2.25], np.float16),
        ([0.1, 65536], np.float32),
        ([np.nan, 1], np.float16),
        ([2**24 + 1, 0], np.float32),
    ],
)
def test_the_type_follows_from_the_values(values: list[float], dtype: type) -> None:
    assert smallest(np.array([values], np.float64)).dtype == dtype


def test_one_value_among_many_decides() -> None:
    array = np.zeros((1, 40, 40, 40))
    array[0, 17, 3, 5] = 0.1
    assert smallest(array).dtype == np.float32


@pytest.mark.parametrize("array", [np.zeros((1, 2), complex), np.array([["a"]]), np.array([[{}]])])
def test_what_holds_no_numbers_is_no_image(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(errors.WrongUse, match="is no image"):
        content(array)


def test_files_are_sent_as_they_are_without_their_names(tmp_path: Path) -> None:
    files = []
    for channel in range(2):
        file = tmp_path / f"Patient^Name_{channel:04d}.nii.gz"
        file.write_bytes(np.random.default_rng(channel).bytes(CHUNK_BYTES + 7))
        files.append(file)
    assert content(files[:1]) == files[0].read_bytes()
    form = content(files)
    assert b"Patient" not in form
    head = f"Content-Type: {body_of(files).content_type}\r\n\r\n".encode()  # another boundary
    boundary = form[2 : form.index(b"\r\n")]
    message = BytesParser().parsebytes(head.partition(b"boundary=")[0] + b"boundary=" + boundary + b"\r\n\r\n" + form)
    parts = message.get_payload()
    assert [part.get_param("name", header="content-disposition") for part in parts] == ["image_0000", "image_0001"]  # type: ignore[union-attr]
    assert [part.get_payload(decode=True) for part in parts] == [file.read_bytes() for file in files]  # type: ignore[union-attr]


def test_a_file_that_changes_while_it_is_sent_is_an_error_of_its_case(tmp_path: Path) -> None:
    file = tmp_path / "image"
    for before, after in ((100, 40), (40, 100)):
        file.write_bytes(bytes(before))
        body = FileBody(file)
        file.write_bytes(bytes(after))
        with pytest.raises(errors.UnreadableFile, match="changed while it was sent"):
            list(body.chunks())


@pytest.mark.parametrize("image", [[], 3, None, [np.zeros((1, 2)), np.zeros((1, 2))]])
def test_what_is_no_image(image: Any) -> None:
    with pytest.raises(errors.WrongUse, match=r"image|array"):
        body_of(image)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path, reason in (
        (tmp_path, "no file; a DICOM series is sent as a zip"),
        (tmp_path / "empty", "empty"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(errors.UnreadableFile, match=reason):
            body_of(path)
