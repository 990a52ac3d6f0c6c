"""Which images a backend is compared on: nnU-Net's names, and nothing guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.member import Member
from nnunet_torchserve_tools.errors import UsageError
from nnunet_torchserve_tools.validation_cases import Validation, cases_of, digests_of


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


def test_a_folder_may_have_all_channels_of_a_case_in_one_file(two_channels: Member, tmp_path: Path) -> None:
    """As nnU-Net has colour pictures. How many channels it really has, only the server sees, and refuses it."""
    folder = files(tmp_path / "imagesTs", "a_0000.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz")
    first, second = cases_of(Validation((folder,)), two_channels)
    assert (first.name, first.parts()) == ("a", {"body": b"a_0000.nii.gz"})
    assert (second.name, list(second.parts())) == ("b", ["image_0000", "image_0001"])


def test_an_image_under_two_names_is_no_second_case(two_channels: Member, tmp_path: Path) -> None:
    folder = files(tmp_path / "imagesTs", "a_0000.nii.gz", "a_0001.nii.gz", "c_0000.nii.gz", "c_0001.nii.gz")
    cases = cases_of(Validation((folder,)), two_channels)
    assert {name: len(digests) for name, digests in digests_of(cases).items()} == {"a": 2, "c": 2}
    (folder / "c_0000.nii.gz").write_bytes((folder / "a_0000.nii.gz").read_bytes())
    assert len(digests_of(cases)) == len(cases)  # one channel may be the same
    (folder / "c_0001.nii.gz").write_bytes((folder / "a_0001.nii.gz").read_bytes())
    with pytest.raises(UsageError, match="the cases a and c are of the same image"):
        digests_of(cases)


def test_what_is_missing_or_twice_is_named(two_channels: Member, tmp_path: Path) -> None:
    folder = files(tmp_path / "imagesTs", "a_0000.nii.gz", "a_0001.nii.gz")
    empty = files(tmp_path / "empty")
    more = files(tmp_path / "more", *(f"b_000{channel}.nii.gz" for channel in range(3)))
    for asked, reason in (
        (Validation((folder,), empty), r"case a has no labels: .*a\.nii\.gz does not exist"),
        (Validation((empty,)), r"no image that ends in \.nii\.gz"),
        (Validation((more,)), "case b of .* has 3 files, and the model 2 channels"),
        (Validation((folder, folder / "a_0000.nii.gz")), "there is a case a already"),
    ):
        with pytest.raises(UsageError, match=reason):
            cases_of(asked, two_channels)
    with pytest.raises(UsageError, match="nowhere does not exist"):
        Validation((folder, tmp_path / "nowhere")).check()
