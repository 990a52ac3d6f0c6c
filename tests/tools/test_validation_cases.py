"""Which images a backend is compared on: nnU-Net's names, and nothing guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.member import Member
from nnunet_torchserve_tools.errors import UsageError
from nnunet_torchserve_tools.validation_cases import Validation, cases_of


@pytest.fixture(scope="module")
def two_channels(unpacked: Callable[[str], Path]) -> Member:
    return ModelBundle(unpacked("regions"), verify=False).lead


def files(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_folder_has_a_case_for_each_name_and_a_file_for_each_channel(two_channels: Member, tmp_path: Path) -> None:
    names = [f"{case}_{channel:04d}.nii.gz" for case in ("b", "a") for channel in (0, 1)]
    folder = files(tmp_path / "imagesTs", *names, "notes.txt")
    labels = files(tmp_path / "labelsTs", "a.nii.gz", "b.nii.gz")
    cases = cases_of(Validation((folder,), labels), two_channels)
    assert [case.name for case in cases] == ["a", "b"]
    assert [case.labels for case in cases] == [labels / "a.nii.gz", labels / "b.nii.gz"]
    assert cases[0].parts() == {"image_0000": b"a_0000.nii.gz", "image_0001": b"a_0001.nii.gz"}


def test_a_file_stands_for_its_case_with_all_channels_or_is_one_image_itself(
    two_channels: Member, tmp_path: Path
) -> None:
    folder = files(tmp_path / "some", "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "whole.nrrd")
    asked = Validation(tuple(folder / name for name in ("a_0000.nii.gz", "b_0000.nii.gz", "whole.nrrd")))
    first, second, third = cases_of(asked, two_channels)
    assert (first.name, [file.name for file in first.files]) == ("a", ["a_0000.nii.gz", "a_0001.nii.gz"])
    assert (second.name, second.parts()) == ("b", {"body": b"b_0000.nii.gz"})
    assert third.parts() == {"body": b"whole.nrrd"}


def test_what_is_missing_or_twice_is_named(two_channels: Member, tmp_path: Path) -> None:
    folder = files(tmp_path / "imagesTs", "a_0000.nii.gz", "a_0001.nii.gz")
    empty = files(tmp_path / "empty")
    half = files(tmp_path / "half", "b_0000.nii.gz")
    for asked, reason in (
        (Validation((folder,), empty), r"case a has no labels: .*a\.nii\.gz does not exist"),
        (Validation((empty,)), r"no image that ends in \.nii\.gz"),
        (Validation((half,)), "case b of .* has 1 files, and the model 2 channels"),
        (Validation((folder, folder / "a_0000.nii.gz")), "there is a case a already"),
    ):
        with pytest.raises(UsageError, match=reason):
            cases_of(asked, two_channels)
    with pytest.raises(UsageError, match="nowhere does not exist"):
        Validation((folder, tmp_path / "nowhere")).check()
