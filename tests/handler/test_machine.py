"""What a process may use of its machine."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_torchserve.cases import price, settings_for
from nnunet_torchserve.export.threads import in_threads
from nnunet_torchserve.machine import MOST_THREADS, count_threads, cpu_quota, processor_name, usable_threads
from nnunet_torchserve.options import Options
from nnunet_torchserve.pipeline import Pipeline
from support.plans import volume_of


def tree(folder: Path, files: dict[str, str], groups: str) -> float:
    """The quota that a made-up hierarchy of control groups allows."""
    for name, content in files.items():
        file = folder / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    (folder / "membership").write_text(groups)
    return cpu_quota(folder / "membership", folder / "cgroup")


@pytest.mark.parametrize(
    ("files", "groups", "quota"),
    [
        ({"cpu.max": "200000 100000"}, "0::/\n", 2.0),
        ({"cpu.max": "max 100000"}, "0::/\n", math.inf),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, "0::/a/b\n", 1.5),
        ({"a/b/cpu.max": "50000 100000", "a/cpu.max": "150000 100000"}, "0::/a/b\n", 0.5),
        ({"a/cpu.max": "50000 100000"}, "0::/b\n", math.inf),
        ({"cpu.max": "300000 100000"}, "0::/kubepods/pod7/of-the-host\n", 3.0),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/\n", 4.0),
        ({"cpu,cpuacct/x/cpu.cfs_quota_us": "25000", "cpu,cpuacct/x/cpu.cfs_period_us": "10000"},
         "4:cpu,cpuacct:/x\n", 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/\n0::/\n", math.inf),
        ({"cpu.max": "nonsense"}, "0::/\n", math.inf),
        ({}, "", math.inf),
    ],
)  # fmt: skip
def test_quotas_of_both_versions_and_of_parents(
    files: dict[str, str], groups: str, quota: float, tmp_path: Path
) -> None:
    assert tree(tmp_path, files, groups) == quota


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "nothing", tmp_path) == math.inf


def test_the_smallest_bound_counts() -> None:
    processors = len(os.sched_getaffinity(0))
    assert count_threads({}, math.inf) == min(processors, MOST_THREADS)
    assert count_threads({}, 0.2) == 1
    assert count_threads({"OMP_NUM_THREADS": "1"}, 64.0) == 1
    assert count_threads({"OMP_NUM_THREADS": "1,8"}, 64.0) == 1
    for nonsense in ("", "many", "0", "-3"):
        assert count_threads({"OMP_NUM_THREADS": nonsense}, math.inf) == min(processors, MOST_THREADS)


def test_a_processor_has_a_name() -> None:
    assert processor_name().strip()


def test_affinity_counts() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
    code += "from nnunet_torchserve.machine import usable_threads; print(usable_threads())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["1"]


def test_a_host_with_many_processors_prices_and_works_as_this_process_may(
    pipeline: Callable[[str], Pipeline],
) -> None:
    member, before = pipeline("five_folds").bundle.lead, torch.get_num_threads()
    geometry = volume_of(np.zeros((1, 100, 256, 256), np.float32), (1.0, 1.0, 1.0)).geometry
    prices, workers = set(), set()
    try:
        for threads in (usable_threads(), 16, 128):
            torch.set_num_threads(threads)
            prices.add(price(member, geometry, 1, settings_for(member, Options()), Options()).bytes)
            workers |= set(in_threads(lambda _: threading.get_ident(), range(400)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(prices) == 1
    assert len(workers) <= 3 * usable_threads()
