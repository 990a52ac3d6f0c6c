"""Heads that a recipe trains on: one anatomy in other forms, the same ones each time."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import warped_heads
from warped_heads import Template, warped

SHAPE = (40, 44, 36)


@pytest.fixture(scope="module")
def template() -> Template:
    """Shells: white matter within grey matter within fluid, in the middle of the image."""
    middle = (np.asarray(SHAPE) - 1) / 2
    radius = np.sqrt(sum((axis - at) ** 2 for axis, at in zip(np.indices(SHAPE), middle, strict=True)))
    bounds = (14.0, 11.0, 7.0)
    within = [radius < bound for bound in bounds]
    background, white = ~within[0], within[2]
    fluid, grey = within[0] & ~within[1], within[1] & ~white
    t1 = 0.3 * fluid + 0.6 * grey + 0.9 * white
    channels = np.stack([t1, background, fluid, grey, white]).astype(np.float32)
    return Template(channels, np.asarray([-20.0, -22.0, -18.0]))


def test_a_seed_gives_the_same_head_and_another_seed_another_one(template: Template) -> None:
    one, again, other = (warped(template, (2.0, 2.0, 2.0), seed) for seed in (1, 1, 2))
    for first, second, third in zip(one, again, other, strict=True):
        np.testing.assert_array_equal(first.dataobj, second.dataobj)
        assert (np.asarray(first.dataobj) != np.asarray(third.dataobj)).mean() > 0.02


def test_image_and_labels_show_the_same_anatomy_on_one_grid(template: Template) -> None:
    image, labels = warped(template, (1.9, 2.1, 2.2), 3)
    assert image.shape == labels.shape == (21, 21, 16)
    np.testing.assert_array_equal(image.affine, labels.affine)
    np.testing.assert_allclose(image.header.get_zooms(), (1.9, 2.1, 2.2), rtol=1e-6)
    assert (image.get_data_dtype(), labels.get_data_dtype()) == (np.int16, np.uint8)
    found, intensity = np.asarray(labels.dataobj), np.asarray(image.dataobj)
    means = [float(intensity[found == label].mean()) for label in range(4)]
    assert means == sorted(means)
    truth = template.channels[1:].sum((1, 2, 3))
    voxels = np.bincount(found.ravel(), minlength=4) * np.prod((1.9, 2.1, 2.2))
    np.testing.assert_allclose(voxels[1:], truth[1:], rtol=0.5)


def test_cases_are_named_as_nnunet_finds_them(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warped_heads, "load_template", lambda: template)
    warped_heads.write_heads(tmp_path / "imagesTr", tmp_path / "labelsTr", "head", (7, 8, 9))
    images, labels = (sorted(file.name for file in (tmp_path / each).iterdir()) for each in ("imagesTr", "labelsTr"))
    assert images == [f"head_00{number}_0000.nii.gz" for number in range(3)]
    assert labels == [f"head_00{number}.nii.gz" for number in range(3)]
    last = nib.load(tmp_path / "imagesTr" / images[2])
    np.testing.assert_allclose(last.header.get_zooms(), warped_heads.SPACINGS_MM[2], rtol=1e-6)
