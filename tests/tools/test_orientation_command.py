"""The command that tells how training images are stored."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
from typer.testing import CliRunner

from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.orientation import look_at
from support.dicom_files import ACQUISITIONS, series, zip_of

SHAPE = (4, 5, 6)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write(folder: Path, name: str, letters: str = "RAS") -> Path:
    """By nibabel, which knows the letters by its own arithmetic."""
    axes = nib.orientations.axcodes2ornt(letters)
    affine = np.linalg.inv(nib.orientations.inv_ornt_aff(axes, SHAPE))
    assert "".join(nib.aff2axcodes(affine)) == letters
    folder.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), affine), folder / name)
    return folder / name


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["orientation", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.mark.parametrize("letters", ["RAS", "LPS", "LAS", "PIR", "SAL"])
def test_a_folder_that_agrees_gives_the_command_that_records_it(letters: str, tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "imagesTr", f"a_{number:03}_0000.nii.gz", letters)
    code, said = run(tmp_path / "imagesTr")
    assert code == 0, said
    assert f"{letters}  3 images" in said
    assert f"archive MODEL_FOLDER --input-orientation {letters}" in said


def test_a_folder_that_does_not_agree_is_told_so_and_gives_no_command(tmp_path: Path) -> None:
    for number, letters in enumerate(["RAS", "RAS", "LAS"]):
        write(tmp_path, f"a_{number:03}_0000.nii.gz", letters)
    code, said = run(tmp_path)
    assert code == 1
    assert "LAS  1 image: a_002_0000.nii.gz" in said
    assert "do not agree" in said
    assert "record it" not in said


def test_the_letters_are_those_of_every_format(tmp_path: Path) -> None:
    image = sitk.ReadImage(str(write(tmp_path, "a.nii", "LAS")))
    for name in ("a.nrrd", "a.mha"):
        sitk.WriteImage(image, str(tmp_path / name))
        assert look_at(tmp_path / name).letters == "LAS"
    affine = ACQUISITIONS["sagittal"].affine()
    (tmp_path / "series.zip").write_bytes(zip_of(series(np.zeros(SHAPE, np.int16), affine)))
    assert look_at(tmp_path / "series.zip").letters == "".join(nib.aff2axcodes(LPS_TO_RAS @ affine))


def test_a_nifti_whose_forms_disagree_is_no_orientation(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4))
    image.set_sform(np.diag([-1.0, 1, 1, 1]), 2)
    image.set_qform(np.eye(4), 1)
    nib.save(image, tmp_path / "a.nii")
    found = look_at(tmp_path / "a.nii")
    assert (found.letters, found.remark[:28]) == (None, "RAS for SimpleITK, LAS for n")


def test_what_has_no_orientation_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(SHAPE, np.uint8))
    (tmp_path / "b.txt").write_text("no image")
    (tmp_path / "c.nii").touch()
    nib.save(nib.Nifti1Image(np.zeros((4, 5), np.uint8), np.eye(4)), tmp_path / "d.nii")
    code, said = run(tmp_path, "--json")
    assert code == 1
    document = json.loads(said[: said.rindex("}") + 1])
    assert document["agreed"] is None
    assert [each["orientation"] for each in document["images"]] == [None] * 4
    assert all(each["remark"] for each in document["images"])


def test_a_missing_file_and_an_empty_folder_are_wrong(tmp_path: Path) -> None:
    assert look_at(tmp_path / "none.nii").remark == "No such file or directory"
    code, said = run(tmp_path)
    assert code == 2, said
