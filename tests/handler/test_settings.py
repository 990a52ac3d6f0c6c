"""The section of model-config.yaml that an operator may write by hand."""

from __future__ import annotations

import pytest
import yaml

from nnunet_torchserve.backend import Backend
from nnunet_torchserve.engine.scheduler import Policy
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.settings import HandlerSettings
from nnunet_torchserve_tools.serving_settings import ServingSettings


def test_what_the_packager_writes_is_read_as_it_was_meant() -> None:
    written = ServingSettings(golden_interval_s=90, cache_bytes=5, single_flight=True, unload_after_s=60.5)
    read = HandlerSettings.read(yaml.safe_load(written.to_yaml())["handler"])
    assert read == HandlerSettings(golden_interval_s=90, cache_bytes=5, single_flight=True, unload_after_s=60.5)
    assert HandlerSettings.read(yaml.safe_load(ServingSettings().to_yaml())["handler"]) == HandlerSettings()


def test_nothing_and_null_are_defaults() -> None:
    nulls = dict.fromkeys(HandlerSettings.model_fields)
    assert HandlerSettings.read(None) == HandlerSettings.read({}) == HandlerSettings.read(nulls) == HandlerSettings()
    assert HandlerSettings.read({"policy": "fifo"}).policy is Policy.FIFO


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("single_flight", "false"),
        ("single_flight", 1),
        ("cache_bytes", "2G"),
        ("cache_bytes", -1),
        ("cache_bytes", 1.5),
        ("cache_bytes", True),
        ("max_patch_batch", 0),
        ("max_patch_batch", "many"),
        ("unload_after_s", 0),
        ("unload_after_s", "60"),
        ("unload_after_s", float("inf")),
        ("golden_interval_s", -5),
        ("policy", "last"),
        ("limits", [1]),
        ("limits", {"voxels": "many"}),
        ("limits", {"voxel": 5}),
        ("cache", 5),
        ("backend", "openvino:int4"),
        ("backend", ["eager"]),
    ],
)
def test_what_is_wrong_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(BundleError, match=f"handler.{name}"):
        HandlerSettings.read({name: value})


def test_a_backend_is_set_by_hand() -> None:
    """What the archive was made with holds where nothing is said."""
    assert HandlerSettings().backend is None
    assert HandlerSettings.read({"backend": "openvino"}).backend is Backend.OPENVINO_FLOAT32


@pytest.mark.parametrize("section", ["fast", 7, [1]])
def test_it_is_a_mapping(section: object) -> None:
    with pytest.raises(BundleError, match="mapping"):
        HandlerSettings.read(section)
