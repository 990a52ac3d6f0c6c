"""The JSON report, against voxels that are counted and placed one by one."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)

from nnunet_torchserve.codecs.geometry import make_geometry
from nnunet_torchserve.codecs.report import encode_report
from nnunet_torchserve.painting import Painting
from nnunet_torchserve.volume import Geometry, LabelArray
from support import volumes

SHAPE = (19, 23, 29)
SPACING = (0.7, 1.3, 2.9)
ORIGIN = (-120.5, 33.25, 871.125)

_TURN = volumes.oblique((1, 1, 1), 0.4)[:3, :3].astype(np.float64)
_TURN = np.linalg.qr(_TURN)[0]

DIRECTIONS = {
    "patient": np.eye(3),
    "flipped": np.diag([-1.0, -1.0, 1.0]),
    "left-handed": np.diag([1.0, 1.0, -1.0]),
    "permuted": np.array([[0.0, 0, 1], [-1, 0, 0], [0, 1, 0]]),
    "oblique": _TURN,
    "oblique and left-handed": _TURN @ np.diag([1.0, -1.0, 1.0]),
    "not at right angles": _TURN @ np.array([[1.0, 0.28, 0], [0, 0.96, 0.6], [0, 0, 0.8]]),
}


def geometry_of(
    direction: npt.NDArray[np.float64],
    shape: tuple[int, int, int] = SHAPE,
    spacing: tuple[float, float, float] = SPACING,
) -> Geometry:
    return make_geometry(shape, spacing, ORIGIN, direction.ravel().tolist())


def as_labels(values: npt.ArrayLike, dtype: str) -> LabelArray:
    return np.asarray(values, np.uint16) if dtype == "uint16" else np.asarray(values, np.uint8)


def ellipsoid(label: int = 1) -> LabelArray:
    """Off the centre and aslant in its box, so that no mirrored or swapped axis gives the same numbers."""
    z, y, x = np.indices(SHAPE, dtype=np.float64)
    inside = ((z - 10 - 0.3 * (x - 12)) / 4) ** 2 + ((y - 14 + 0.4 * (x - 12)) / 5) ** 2 + ((x - 12) / 9) ** 2 < 1
    return np.where(inside, label, 0).astype(np.uint8)


def speckles(*values: int, dtype: str = "uint8") -> LabelArray:
    generator = np.random.default_rng(3)
    chosen = generator.choice([0, *values], SHAPE, p=[0.99, *[0.01 / len(values)] * len(values)])
    return as_labels(chosen, dtype)


def report(labels: LabelArray, geometry: Geometry, structures: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    document: dict[str, Any] = json.loads(encode_report(labels, geometry, Painting(structures)), parse_constant=refuse)
    return document


def structure(labels: LabelArray, geometry: Geometry, members: tuple[int, ...] = (1,)) -> dict[str, Any]:
    entry: dict[str, Any] = report(labels, geometry, {"it": members})["structures"][0]
    return entry


def check(entry: dict[str, Any], mask: npt.NDArray[np.bool_], geometry: Geometry) -> None:
    """``entry`` is what the voxels of ``mask`` say, each placed by itself, all its corners in the patient."""
    z, y, x = np.nonzero(mask)
    indices = np.stack([x, y, z, np.ones_like(x)])
    halves = (-0.5, 0.5)
    thickness = halves if geometry.ndim == 3 else (0,)
    corners = np.concatenate(
        [
            (geometry.affine @ (indices + np.array([[a], [b], [c], [0]])))[:3]
            for a, b, c in itertools.product(halves, halves, thickness)
        ],
        axis=1,
    )
    assert entry["voxels"] == len(x)
    assert entry["bounding_box_voxels"] == [[int(i.min()), int(i.max())] for i in indices[: geometry.ndim]]
    np.testing.assert_allclose(entry["bounding_box_mm"], np.stack([corners.min(1), corners.max(1)], 1), atol=2e-9)
    np.testing.assert_allclose(entry["centroid_mm"], (geometry.affine @ indices.mean(axis=1))[:3], atol=2e-9)


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
class TestInAnyGeometry:
    def test_a_marker_is_where_its_voxels_are_in_the_patient(self, direction: npt.NDArray[np.float64]) -> None:
        geometry = geometry_of(direction)
        check(structure(ellipsoid(), geometry), ellipsoid() == 1, geometry)

    def test_scattered_voxels_too(self, direction: npt.NDArray[np.float64]) -> None:
        geometry = geometry_of(direction)
        labels = speckles(1, 2, 3)
        for value in (1, 2, 3):
            check(structure(labels, geometry, (value,)), labels == value, geometry)

    def test_the_volume_is_that_of_the_voxels_edges(self, direction: npt.NDArray[np.float64]) -> None:
        geometry = geometry_of(direction)
        document = report(ellipsoid(), geometry, {"it": (1,)})
        a, b, c = (geometry.direction * geometry.spacing).T
        assert document["voxel_volume_ml"] == pytest.approx(abs(np.dot(np.cross(a, b), c)) / 1000)
        volume = (ellipsoid() == 1).sum() * document["voxel_volume_ml"]
        assert document["structures"][0]["volume_ml"] == pytest.approx(volume)

    def test_itk_places_the_centroid_and_the_boxs_first_voxel_alike(self, direction: npt.NDArray[np.float64]) -> None:
        geometry = geometry_of(direction)
        image = sitk.GetImageFromArray(ellipsoid())
        image.SetSpacing(geometry.spacing)
        image.SetOrigin(geometry.origin)
        image.SetDirection(geometry.direction.ravel().tolist())
        statistics = sitk.LabelShapeStatisticsImageFilter()
        statistics.Execute(image)
        entry = structure(ellipsoid(), geometry)
        np.testing.assert_allclose(entry["centroid_mm"], statistics.GetCentroid(1), atol=1e-6)
        assert [low for low, _ in entry["bounding_box_voxels"]] == list(statistics.GetBoundingBox(1)[:3])

    def test_the_documents_own_formula_leads_to_the_patient(self, direction: npt.NDArray[np.float64]) -> None:
        document = report(ellipsoid(), geometry_of(direction), {})
        voxel = np.array([3, 5, 7])
        place = document["origin"] + np.array(document["direction"]) @ (document["spacing"] * voxel)
        np.testing.assert_allclose(place, (geometry_of(direction).affine @ [*voxel, 1])[:3])


def test_an_oblique_box_is_that_of_the_structure_and_not_of_its_box_in_voxels() -> None:
    geometry = geometry_of(DIRECTIONS["oblique"])
    (x0, x1), (y0, y1), (z0, z1) = structure(ellipsoid(), geometry)["bounding_box_voxels"]
    full = np.zeros(SHAPE, np.uint8)
    full[z0 : z1 + 1, y0 : y1 + 1, x0 : x1 + 1] = 1
    tight = np.ptp(structure(ellipsoid(), geometry)["bounding_box_mm"], axis=1)
    loose = np.ptp(structure(full, geometry)["bounding_box_mm"], axis=1)
    assert (tight < loose - 1).all()


def test_an_oblique_box_is_exact_for_an_image_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = geometry_of(DIRECTIONS["not at right angles"])
    for tile in (1, 29, 100, 2000):
        monkeypatch.setattr("nnunet_torchserve.codecs.report._TILE_VOXELS", tile)
        for labels in (ellipsoid(), speckles(1), np.ones(SHAPE, np.uint8)):
            check(structure(labels, geometry), labels == 1, geometry)


def test_one_voxel_has_a_box_of_its_own_size() -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[3, 4, 5] = 1
    entry = structure(labels, geometry_of(np.eye(3)))
    assert entry["bounding_box_voxels"] == [[5, 5], [4, 4], [3, 3]]
    np.testing.assert_allclose(np.ptp(entry["bounding_box_mm"], axis=1), SPACING)
    np.testing.assert_allclose(np.mean(entry["bounding_box_mm"], axis=1), entry["centroid_mm"])


@pytest.mark.parametrize("direction", [np.eye(3), _TURN], ids=["patient", "oblique"])
def test_a_region_is_the_union_of_its_labels(direction: npt.NDArray[np.float64]) -> None:
    geometry, labels = geometry_of(direction), speckles(1, 2, 3)
    labels[:, :, :9][labels[:, :, :9] == 1] = 0
    structures = {"whole": (1, 2, 3), "core": (1, 3), "enhancing": (3,), "and one that does not occur": (2, 9)}
    for entry in report(labels, geometry, structures)["structures"]:
        members = structures[entry["name"]]
        assert entry["labels"] == list(members)
        check(entry, np.isin(labels, members), geometry)


def test_a_label_named_twice_in_a_region_counts_once() -> None:
    geometry = geometry_of(np.eye(3))
    assert structure(ellipsoid(), geometry, (1, 1))["voxels"] == (ellipsoid() == 1).sum()


@pytest.mark.parametrize("labels", [np.zeros(SHAPE, np.uint8), np.zeros((1, 1, 1), np.uint16), ellipsoid(5)])
@pytest.mark.parametrize("members", [(1,), (2, 4), (300,)])
def test_a_structure_without_voxels_has_no_place(labels: LabelArray, members: tuple[int, ...]) -> None:
    depth, height, width = labels.shape
    entry = structure(labels, geometry_of(_TURN, (depth, height, width)), members)
    assert entry == {
        "name": "it",
        "labels": list(members),
        "voxels": 0,
        "volume_ml": 0,
        "bounding_box_voxels": None,
        "bounding_box_mm": None,
        "centroid_mm": None,
    }


@pytest.mark.parametrize("value", [255, 256, 300, 65535])
def test_labels_above_255_are_told_apart(value: int) -> None:
    geometry, labels = geometry_of(_TURN), speckles(value, value % 256 + 1, dtype="uint16")
    check(structure(labels, geometry, (value,)), labels == value, geometry)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_an_image_may_have_fewer_voxels_than_its_labels_have_numbers(dtype: str) -> None:
    geometry = geometry_of(_TURN, (1, 2, 2))
    labels = as_labels([[[7, 200], [7, 0]]], dtype)
    check(structure(labels, geometry, (7,)), labels == 7, geometry)
    check(structure(labels, geometry, (200, 7)), labels > 0, geometry)
    everything = as_labels([[[1, 2], [3, 255]]], dtype)
    check(structure(everything, geometry, (255,)), everything == 255, geometry)


def test_any_memory_layout_gives_the_same_report() -> None:
    geometry, labels = geometry_of(_TURN), ellipsoid()
    expected = encode_report(labels, geometry, Painting({"it": (1,)}))
    read_only = labels.copy()
    read_only.setflags(write=False)
    layouts: list[LabelArray] = [labels.T.copy().T, labels[::-1].copy()[::-1], read_only]
    for layout in layouts:
        assert encode_report(layout, geometry, Painting({"it": (1,)})) == expected


def test_names_and_their_order_survive() -> None:
    names = ["Zwölffingerdarm", 'the "left" one', "心臓", "a\\b\n\0", "\ud800", "Aorta", "", "10", "9"]
    content = encode_report(ellipsoid(), geometry_of(np.eye(3)), Painting(dict.fromkeys(names, (1,))))
    assert content.isascii()
    assert [entry["name"] for entry in json.loads(content)["structures"]] == names


def test_the_document_says_which_coordinates_and_conventions_it_uses() -> None:
    document = report(ellipsoid(), geometry_of(_TURN), {})
    assert document["coordinates"] == "LPS mm"
    for said in ("counted from 0", "fastest", "inclusive", "whole voxels", "LPS"):
        assert said in document["conventions"]
    assert document["dimensions"] == 3
    assert document["shape"] == [29, 23, 19]
    assert document["structures"] == []


def test_the_geometrys_numbers_are_written_in_full() -> None:
    geometry = make_geometry(SHAPE, (1 / 3, 2 / 3, 1e-6), (1e-17, 1 / 7, -1e6 / 3), _TURN.ravel().tolist())
    document = report(ellipsoid(), geometry, {"it": (1,)})
    assert document["spacing"] == list(geometry.spacing)
    assert document["origin"] == list(geometry.origin)
    assert document["direction"] == geometry.direction.tolist()


@pytest.mark.parametrize("millimetres", [1e-6, 1e6])
def test_the_smallest_and_the_largest_voxels_keep_their_volume(millimetres: float) -> None:
    geometry = geometry_of(_TURN, spacing=(millimetres,) * 3)
    entry = structure(ellipsoid(), geometry)
    assert entry["volume_ml"] == pytest.approx(millimetres**3 / 1000 * entry["voxels"])


def test_zero_has_no_sign() -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[0, 0, 0] = 1
    geometry = replace(geometry_of(np.eye(3)), origin=(-1e-12, 0.0, 0.0))
    assert str(structure(labels, geometry)["centroid_mm"]) == "[0.0, 0.0, 0.0]"


def test_almost_parallel_axes_have_a_volume_and_no_nan() -> None:
    direction = np.array([[1, np.sqrt(1 - 1e-8), 0], [0, 1e-4, 0], [0, 0, 1]])
    geometry = geometry_of(direction)
    document = report(ellipsoid(), geometry, {"it": (1,)})
    assert document["voxel_volume_ml"] == pytest.approx(np.prod(SPACING) * 1e-4 / 1000)
    check(document["structures"][0], ellipsoid() == 1, geometry)


class TestTwoDimensions:
    labels = ellipsoid()[10:11]
    picture = make_geometry(SHAPE[1:], (0.5, 2.0), (10.0, 20.0), (0.0, -1.0, 1.0, 0.0))

    def test_a_picture_has_areas_and_no_volumes(self) -> None:
        document = report(self.labels, self.picture, {"it": (1,), "not there": (2,)})
        assert document["pixel_area_mm2"] == 1
        assert [entry["area_mm2"] for entry in document["structures"]] == [(self.labels == 1).sum(), 0]
        assert "volume" not in json.dumps(document)

    def test_voxel_axes_are_two_and_the_patients_three(self) -> None:
        document = report(self.labels, self.picture, {"it": (1,)})
        assert (document["dimensions"], document["shape"]) == (2, [29, 23])
        assert document["spacing"] == [0.5, 2]
        assert document["origin"] == [10, 20, 0]
        assert document["direction"] == [[0, -1], [1, 0], [0, 0]]
        check(document["structures"][0], self.labels == 1, self.picture)
        assert document["structures"][0]["bounding_box_mm"][2] == [0, 0]

    def test_an_oblique_slice_lies_in_the_patient(self) -> None:
        geometry = replace(self.picture, direction=DIRECTIONS["not at right angles"], origin=ORIGIN)
        document = report(self.labels, geometry, {"it": (1,)})
        check(document["structures"][0], self.labels == 1, geometry)
        a, b, _ = (geometry.direction * geometry.spacing).T
        assert document["pixel_area_mm2"] == pytest.approx(np.linalg.norm(np.cross(a, b)))


@pytest.mark.parametrize("direction", [np.eye(3), _TURN], ids=["patient", "oblique"])
@pytest.mark.parametrize("shape", [(64, 256, 256), (1, 2048, 2048)])
def test_a_large_image_takes_little_memory(shape: tuple[int, int, int], direction: npt.NDArray[np.float64]) -> None:
    labels = np.random.default_rng(1).integers(0, 20, shape, np.uint8)
    geometry = geometry_of(direction, shape)
    tracemalloc.start()
    encode_report(labels, geometry, Painting({str(value): (value,) for value in range(1, 20)}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20
