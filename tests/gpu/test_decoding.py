"""Packed region targets become channels on a GPU; skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nnunet_torchserve_trainers.region_codes import Region, RegionCode, bitmask_code, label_code

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

REGIONS: list[Region] = [(1 + k, 1 + (k + 5) % 40, 1 + (k + 11) % 40) for k in range(40)]


@pytest.mark.parametrize("make", [label_code, bitmask_code])
def test_a_gpu_decodes_what_a_cpu_does(make: Callable[[list[Region]], RegionCode | None]) -> None:
    code, device = make(REGIONS), torch.device("cuda:0")
    assert code is not None
    codes = code.encode(torch.randint(-1, 45, (2, 1, 16, 20, 24), dtype=torch.int16))
    found = code.to(device).decode(codes.to(device))
    assert found.device == device
    assert torch.equal(found.cpu(), code.decode(codes))
