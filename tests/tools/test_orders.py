"""Orders to drain: which of them `resume` takes back, and which go on standing."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_torchserve.draining import EVERY_MODEL, ORDERS
from nnunet_torchserve_tools.drain import others_standing, resume
from nnunet_torchserve_tools.orders import Target

STANDING = {"brain", "brain@1.0", "brain@2.0", "brain_2", "brainstem@1.0", EVERY_MODEL}


@pytest.fixture
def control(tmp_path: Path) -> Path:
    (tmp_path / ORDERS).mkdir()
    for name in STANDING:
        (tmp_path / ORDERS / name).write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("model", "version", "lifted", "others"),
    [
        (None, None, STANDING, []),
        ("brain", None, {"brain", "brain@1.0", "brain@2.0"}, [EVERY_MODEL]),
        ("brain", "1.0", {"brain@1.0"}, [EVERY_MODEL, "brain"]),
        ("head", "1.0", set(), [EVERY_MODEL]),
    ],
)
def test_resume_takes_back_what_it_names(
    control: Path, model: str | None, version: str | None, lifted: set[str], others: list[str]
) -> None:
    target = Target("http://127.0.0.1:1", control, model, version)
    assert set(resume(target)) == lifted
    assert {order.name for order in (control / ORDERS).iterdir()} == STANDING - lifted
    assert others_standing(target) == others
    assert resume(target) == []
