"""Regions as one number a voxel: what is decoded is what stock's transform makes, whatever the labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from nnunet_torchserve_trainers.packed_transforms import DownsampleCodesTransform, EncodeRegionsTransform
from nnunet_torchserve_trainers.region_codes import Region, RegionCode, bitmask_code, label_code
from support.examples import examples

CODES = [label_code, bitmask_code]
LEAST, MOST = -(2**15), 2**15 - 1
"""Of the loader's int16."""

a_label = st.one_of(st.integers(-1, 6), st.sampled_from((252, 253, 254, 255, 256, MOST - 1, MOST)))
regions_of_labels = st.lists(st.lists(a_label, min_size=1, max_size=5).map(tuple), min_size=1, max_size=63)


def stock(labels: torch.Tensor, regions: list[Region]) -> torch.Tensor:
    made: torch.Tensor = ConvertSegmentationToRegionsTransform(regions)(segmentation=labels)["segmentation"]
    return made


def there_and_back(code: RegionCode, labels: torch.Tensor) -> torch.Tensor:
    encoded = EncodeRegionsTransform(code)(segmentation=labels)["segmentation"]
    assert encoded.dtype == code.dtype
    assert encoded.shape == labels.shape
    return code.decode(encoded[None])[0]


def numbered(count: int) -> list[Region]:
    """Regions of which no two are alike."""
    return [(1 + k, 1 + (k + 1) % count, 1 + (k + 2) % count) for k in range(count)]


@pytest.mark.parametrize("make", CODES)
@examples(60)
@given(
    regions=regions_of_labels,
    labels=numpy_strategies.arrays(
        np.int16, (1, 3, 4, 5), elements=st.one_of(a_label, st.integers(LEAST, MOST), st.just(LEAST))
    ),
)
def test_what_comes_back_is_what_stock_makes(
    make: Callable[[list[Region]], RegionCode | None], regions: list[Region], labels: npt.NDArray[np.int16]
) -> None:
    code, image = make(regions), torch.from_numpy(labels)
    assert code is not None
    before = image.clone()
    assert torch.equal(there_and_back(code, image), stock(image, regions))
    assert torch.equal(image, before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("make", CODES)
def test_labels_of_any_type_are_encoded(make: Callable[[list[Region]], RegionCode | None], dtype: torch.dtype) -> None:
    regions: list[Region] = [(1, 2, 120), (0, 2), (127,)]
    labels = torch.arange(128).to(dtype).view(1, 4, 4, 8)
    code = make(regions)
    assert code is not None
    assert torch.equal(there_and_back(code, labels), stock(labels, regions))


@pytest.mark.parametrize(
    ("regions", "dtype"),
    [
        ([(1, 254)], torch.uint8),
        ([(0, 253)], torch.uint8),
        ([(1, 255)], torch.int16),
        ([(3, 30_000)], torch.int16),
        ([(0, MOST)], torch.int32),
        ([(2**17 + 1, 2**17 + 3)], torch.uint8),
    ],
)
def test_a_label_takes_a_byte_while_it_can(regions: list[Region], dtype: torch.dtype) -> None:
    code = label_code(regions)
    assert code.dtype == dtype
    labels = torch.tensor([*regions[0], *(label + 1 for label in regions[0])], dtype=torch.int32).view(1, 1, -1)
    assert there_and_back(code, labels).flatten().tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("count", "dtype"), [(1, torch.int32), (31, torch.int32), (32, torch.int64), (63, torch.int64), (64, None)]
)
def test_bits_take_the_smallest_integer_that_holds_them(count: int, dtype: torch.dtype | None) -> None:
    code = bitmask_code(numbered(count))
    assert (code and code.dtype) == dtype
    labels = torch.arange(count + 2, dtype=torch.int16).view(1, 1, -1)
    if code is not None:
        assert torch.equal(there_and_back(code, labels), stock(labels, numbered(count)))


def test_a_label_map_holds_more_regions_than_bits_do() -> None:
    labels = torch.arange(202, dtype=torch.int16).view(1, 1, -1)
    assert torch.equal(there_and_back(label_code(numbered(200)), labels), stock(labels, numbered(200)))


@pytest.mark.parametrize("make", CODES)
def test_regions_lie_in_memory_as_stocks_do(make: Callable[[list[Region]], RegionCode | None]) -> None:
    """So that sums over them are made in the same order, and losses are equal to the last bit."""
    code = make(numbered(5))
    assert code is not None
    codes = code.encode(torch.randint(0, 7, (3, 1, 4, 5, 6), dtype=torch.int16))
    regions = code.decode(codes)
    assert regions.shape == (3, 5, 4, 5, 6)
    assert regions.is_contiguous()


@pytest.mark.parametrize("code", [label_code(numbered(3)), bitmask_code(numbered(40)), bitmask_code(numbered(63))])
@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((9, 14, 11), [[1, 1, 1], [0.5, 0.5, 0.5], [0.25, 0.5, 1], [1 / 3, 0.3, 0.7], [1 / 9, 1 / 14, 0.1]]),
        ((13, 16), [[1, 1], [1, 0.5], [0.5, 0.25]]),
        ((8, 8, 8), [1, 0.5, 0.125]),
        # where a voxel lies in the middle between two others, and float32 and float64 take different ones
        ((26, 28, 30), [[11 / 26, 23 / 28, 29 / 30]]),
        ((52, 54), [[22 / 52, 19 / 54]]),
    ],
)
def test_a_scale_takes_the_voxels_that_stock_takes(
    code: RegionCode, shape: tuple[int, ...], scales: list[float | list[float]]
) -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(-1, 65, (1, *shape), generator=generator, dtype=torch.int16)
    encoded = code.encode(labels)
    ours = DownsampleCodesTransform(scales)(segmentation=encoded)["segmentation"]
    stocks = DownsampleSegForDSTransform(scales)(segmentation=code.decode(encoded[None])[0])["segmentation"]
    assert len(ours) == len(scales)
    for mine, theirs in zip(ours, stocks, strict=True):
        assert mine.dtype == code.dtype
        assert torch.equal(code.decode(mine[None])[0], theirs)


def test_stocks_own_resampling_would_round_what_takes_more_than_24_bits() -> None:
    """Why the codes have one of their own."""
    bits = torch.full((1, 2, 2), 2**25 + 1, dtype=torch.int32)
    [rounded] = DownsampleSegForDSTransform([0.5])(segmentation=bits)["segmentation"]
    [exact] = DownsampleCodesTransform([0.5])(segmentation=bits)["segmentation"]
    assert rounded.flatten().tolist() != exact.flatten().tolist() == [2**25 + 1]
