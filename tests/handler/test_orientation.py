"""Images are turned as nnU-Net's reorienting readers turn them, and every voxel keeps its place in the patient."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient

from nnunet_torchserve import codecs
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.orientation import is_orientation, turn_towards
from nnunet_torchserve.volume import Geometry, LabelMap
from support import volumes

ORIENTATIONS = [
    "".join(letters) for axes in itertools.permutations(("LR", "AP", "SI")) for letters in itertools.product(*axes)
]
RNG = np.random.default_rng(11)


def oriented(letters: str, turn: float = 0.15) -> npt.NDArray[np.float64]:
    """An affine (RAS) of voxels of 0.8, 1.3 and 2.1 mm whose axes run towards ``letters``, nearly."""
    affine = np.eye(4)
    ornt = nib.orientations.axcodes2ornt(letters)
    for axis, (to, sign) in enumerate(ornt):
        affine[:3, axis] = 0
        affine[int(to), axis] = sign
    affine[:3, :3] = volumes.oblique((1, 1, 1), turn)[:3, :3] @ affine[:3, :3] @ np.diag([0.8, 1.3, 2.1])
    affine[:3, 3] = (-20, 11, 7)
    return affine


def geometry_of(content: bytes, reader: str) -> tuple[codecs.ImageSource, Geometry]:
    image = codecs.open_image(content, Limits(), reader)
    return image, image.geometry


@pytest.mark.parametrize("reader", [SimpleITKIOWithReorient, NibabelIOWithReorient])
@pytest.mark.parametrize("letters", ORIENTATIONS)
def test_a_turned_image_is_what_nnunets_reader_gives(letters: str, reader: type, tmp_path: Path) -> None:
    content = volumes.nifti(RNG.integers(0, 999, (4, 5, 6)).astype(np.int16), oriented(letters))
    expected, properties = reader().read_images([str(volumes.write(tmp_path, "a.nii", content))])
    image, geometry = geometry_of(content, reader.__name__)
    turn = turn_towards(geometry, "RAS", as_itk=reader is SimpleITKIOWithReorient)
    np.testing.assert_array_equal(turn.turn(image.read()), expected, strict=True)
    np.testing.assert_allclose(turn.after.spacing_zyx, properties["spacing"], rtol=1e-6)
    assert turn.after.shape == expected.shape[1:]


@pytest.mark.parametrize("reader", [SimpleITKIOWithReorient, NibabelIOWithReorient])
@pytest.mark.parametrize("letters", ["RAS", "LPS", "SAL", "ILP"])
def test_the_answer_is_written_as_nnunets_reader_writes_it(letters: str, reader: type, tmp_path: Path) -> None:
    content = volumes.nifti(RNG.integers(0, 999, (4, 5, 6)).astype(np.int16), oriented(letters))
    _, properties = reader().read_images([str(volumes.write(tmp_path, "a.nii", content))])
    _, geometry = geometry_of(content, reader.__name__)
    turn = turn_towards(geometry, "RAS", as_itk=reader is SimpleITKIOWithReorient)
    labels = RNG.integers(0, 4, turn.after.shape).astype(np.uint8)
    reader().write_seg(labels, str(tmp_path / "stock.nii"), properties)
    stock = nib.load(tmp_path / "stock.nii")
    np.testing.assert_array_equal(turn.turn_back(LabelMap(labels, turn.after)).array.T, np.asarray(stock.dataobj))
    np.testing.assert_allclose(stock.affine, oriented(letters), atol=1e-5)


@pytest.mark.parametrize("target", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("letters", ORIENTATIONS)
def test_every_voxel_keeps_its_place_and_comes_back(letters: str, target: str) -> None:
    content = volumes.nifti(np.zeros((4, 5, 6), np.int16), oriented(letters))
    _, geometry = geometry_of(content, "SimpleITKIO")
    turn = turn_towards(geometry, target)
    places = positions(geometry)
    turned = np.stack([turn.turn(places[..., k][None])[0] for k in range(3)], -1)
    np.testing.assert_allclose(turned, positions(turn.after), atol=1e-5)
    assert nib.orientations.aff2axcodes(np.diag([-1, -1, 1, 1]) @ turn.after.affine) == tuple(target)

    labels = RNG.integers(0, 9, turn.after.shape).astype(np.uint8)
    probabilities = RNG.random((2, *turn.after.shape), np.float32)
    back = turn.turn_back(LabelMap(labels, turn.after, probabilities, (0, 1)))
    np.testing.assert_array_equal(turn.turn(back.array[None])[0], labels)
    assert back.probabilities is not None
    np.testing.assert_array_equal(turn.turn(back.probabilities), probabilities)
    assert back.geometry is geometry


def positions(geometry: Geometry) -> npt.NDArray[np.float64]:
    """LPS mm of every voxel, (Z, Y, X, 3)."""
    z, y, x = np.indices(geometry.shape)
    return np.stack([x, y, z], -1) @ geometry.affine[:3, :3].T + geometry.affine[:3, 3]


def test_without_a_target_nothing_is_copied() -> None:
    image, geometry = geometry_of(volumes.nifti(np.ones((4, 5, 6), np.int16), oriented("SAL")), "SimpleITKIO")
    array = image.read()
    turn = turn_towards(geometry, None)
    assert turn.turn(array) is array
    assert turn.after is geometry


def test_a_slice_has_no_orientation() -> None:
    content = bytes(nib.Nifti1Image(np.ones((8, 9), np.int16), np.diag([-0.5, 0.8, 1, 1])).to_bytes())
    _, geometry = geometry_of(content, "SimpleITKIO")
    assert turn_towards(geometry, "LPS").after is geometry


@pytest.mark.parametrize("letters", ORIENTATIONS)
def test_orientations_are_known(letters: str) -> None:
    assert is_orientation(letters)


@pytest.mark.parametrize("letters", ["", "RA", "RAR", "RASL", "ras", "XYZ", "LRS", "RAS\n"])
def test_what_is_no_orientation(letters: str) -> None:
    assert not is_orientation(letters)
