"""Files are there whole, or not at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
import pytest

from nnunet_torchserve_client import errors
from nnunet_torchserve_client.array_cases import direction_towards
from nnunet_torchserve_client.cases import case_name, check_part, files_in, output_format, part, placement
from nnunet_torchserve_client.outputs import write_aside, write_side_files
from nnunet_torchserve_client.results import stock_properties, turn


def full(file: BinaryIO) -> None:
    """What a full disk does in the middle of a file."""
    file.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "Kopf groß.nii.gz"
    with pytest.raises(errors.UnwritableFile, match="No space left"):
        write_aside(target, full)
    assert not list(tmp_path.iterdir())
    write_aside(target, lambda file: file.write(b"old"))
    for broken in (full, lambda _: 1 // 0):
        with pytest.raises((errors.UnwritableFile, ZeroDivisionError)):
            write_aside(target, broken)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(target.name, b"old")]


@pytest.mark.parametrize("name", ["case", "ä" * 124], ids=["a name", "as long as a name can be"])
def test_a_file_is_not_seen_before_it_is_whole(name: str, tmp_path: Path) -> None:
    target = tmp_path / f"{name}.nii.gz"

    def write(file: BinaryIO) -> None:
        file.write(b"first half")
        file.flush()
        assert not target.exists()
        assert not list(tmp_path.glob("*.nii.gz"))

    write_aside(target, write)
    assert target.read_bytes() == b"first half"


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(errors.UnwritableFile, match="cannot be made"):
        write_side_files(tmp_path / "out", {}, {}, {})
    with pytest.raises(errors.UnwritableFile, match="cannot be written"):
        write_aside(tmp_path / "out" / "case.nii.gz", lambda file: file.write(b""))


def test_a_folder_is_listed_as_nnunet_does_it(tmp_path: Path) -> None:
    for name in ("b_0000.nii.gz", "b_0001.nii.gz", "ä b_0000.nii.gz", "a_1_0000.nii.gz", "note.txt", "a.nii"):
        (tmp_path / name).touch()
    (tmp_path / "folder_0000.nii.gz").mkdir()
    found = files_in(tmp_path, ".nii.gz")
    assert [case_name(files, ".nii.gz") for files in found] == ["a_1", "b", "ä b"]
    assert found[1] == [str(tmp_path / "b_0000.nii.gz"), str(tmp_path / "b_0001.nii.gz")]
    (tmp_path / "c.nii.gz").touch()
    with pytest.raises(errors.WrongUse, match=r"c\.nii\.gz does not end in the number of its channel"):
        files_in(tmp_path, ".nii.gz")


def test_parts_are_disjoint_and_whole() -> None:
    items = list(range(17))
    parts = [part(items, 4, number) for number in range(4)]
    assert sorted(item for each in parts for item in each) == items
    assert parts[1] == items[1::4]
    for count, number in ((4, 4), (4, -1), (0, 0)):
        with pytest.raises(errors.WrongPart, match="numbered from 0"):
            check_part(count, number)


def test_what_a_server_does_not_write_is_refused_by_name() -> None:
    assert output_format(".nii.gz") == "nii.gz"
    with pytest.raises(errors.NotServed, match=r"\.gipl"):
        output_format(".gipl")


def test_the_json_beside_a_stack_says_where_it_lies(tmp_path: Path) -> None:
    image = tmp_path / "case_0000.tif"
    assert placement("Tiff3DIO", [image]) == {}
    (tmp_path / "case.json").write_text('{"spacing": [5, 0.5, 0.25]}')
    assert placement("Tiff3DIO", [image]) == {"spacing": [0.25, 0.5, 5.0]}
    assert placement("SimpleITKIO", [image]) == {}
    for wrong in ("{}", "[", '{"spacing": [1, 2]}', '{"spacing": "abc"}'):
        (tmp_path / "case.json").write_text(wrong)
        with pytest.raises(errors.UnreadableFile, match=r"case\.json"):
            placement("Tiff3DIO", [image])


def test_properties_have_the_types_of_nnunets_readers() -> None:
    said = {
        "reader": "SimpleITKIO",
        "properties": {
            "sitk_stuff": {"spacing": [1.0, 2.0, 3.0], "origin": [0.0, 0.0, 0.0], "direction": [1.0] * 9},
            "spacing": [3.0, 2.0, 1.0],
            "shape_before_cropping": [4, 5, 6],
            "bbox_used_for_cropping": [[0, 4], [0, 5], [1, 6]],
        },
    }
    found = stock_properties(json.loads(json.dumps(said)))
    assert found["sitk_stuff"]["spacing"] == (1.0, 2.0, 3.0)
    assert [type(size) for size in found["spacing"]] == [np.float64] * 3
    assert found["shape_before_cropping"] == (4, 5, 6)
    assert found["bbox_used_for_cropping"] == [[0, 4], [0, 5], [1, 6]]
    affine = {"reader": "NibabelIO", "properties": {"nibabel_stuff": {"original_affine": np.eye(4).tolist()}}}
    assert np.array_equal(stock_properties(affine)["nibabel_stuff"]["original_affine"], np.eye(4))
    pictures = {"reader": "NaturalImage2DIO", "properties": {"spacing": [999, 1, 1]}}
    assert stock_properties(pictures)["spacing"] == (999, 1, 1)


def test_a_turned_image_comes_as_the_reader_sees_it() -> None:
    volume = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    how = {"axes": [2, 0, 1], "flip": [0, 2]}
    expected = volume.transpose(0, 3, 1, 2)[:, ::-1, :, ::-1]
    assert np.array_equal(turn(volume, how), expected)
    assert np.array_equal(turn(volume[0], how), expected[0])
    assert turn(volume, None) is volume


@pytest.mark.parametrize("letters", ["RAS", "LPI", "PSR", "IAL"])
def test_an_array_is_sent_as_lying_where_the_model_wants_it(letters: str) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ np.array(direction_towards(letters)).reshape(3, 3)
    assert "".join(nib.aff2axcodes(affine)) == letters
