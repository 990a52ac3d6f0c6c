"""How an archive is served: TorchServe's ``model-config.yaml`` and the handler's section in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.settings import HandlerSettings

from .errors import UsageError

MODEL_CONFIG_FILE = "model-config.yaml"


def read_model_config(text: bytes) -> dict[str, Any]:
    """What an archive's model-config.yaml says.

    Raises:
        BundleError: it is no mapping.
        yaml.YAMLError: it is no YAML.
    """
    config = yaml.safe_load(text) or {}
    if not isinstance(config, dict):
        msg = f"{MODEL_CONFIG_FILE} should be a mapping of settings"
        raise BundleError(msg)
    return config


@dataclass(frozen=True, slots=True)
class ServingSettings:
    """What goes to model-config.yaml.

    Attributes:
        workers: TorchServe workers in all; ``None`` leaves it to ``serve``, or to ``default_workers_per_model`` of a
            bare TorchServe.
        response_timeout_s: seconds before TorchServe kills a worker that has not answered.
        startup_timeout_s: seconds that a worker may take to load.
        max_patch_batch: passes in a batch; ``auto`` is 1 on a CPU and probed on a GPU.
        policy: which case goes first, of :class:`nnunet_torchserve.engine.scheduler.Policy`.
        limits: overrides of :class:`nnunet_torchserve.limits.Limits`.
        golden_interval_s: seconds between two checks of the golden patch in a running engine; ``None``: at its start.
        cache_bytes: preprocessed volumes that an engine keeps for later requests with the same image.
        single_flight: equal requests at the same time are computed once.
        unload_after_s: seconds without a request after which an engine unloads its networks; ``None``: never.
        device_ids: GPUs that serve the model, in TorchServe's numbers; ``None``: all. Without meaning on a CPU.
    """

    workers: int | None = None
    response_timeout_s: int = 1200
    startup_timeout_s: int = 600
    max_patch_batch: int | Literal["auto"] = "auto"
    policy: str = "shortest_remaining"
    limits: Mapping[str, int] = field(default_factory=dict)
    golden_interval_s: float | None = None
    cache_bytes: int = 0
    single_flight: bool = False
    unload_after_s: float | None = None
    device_ids: tuple[int, ...] | None = None

    @property
    def handler(self) -> HandlerSettings:
        """What a worker will read of it.

        Raises:
            UsageError: a value that a worker would refuse.
        """
        try:
            return HandlerSettings.read(self._handler_section())
        except BundleError as error:
            raise UsageError(str(error)) from error

    def _handler_section(self) -> dict[str, Any]:
        return {
            "max_patch_batch": self.max_patch_batch,
            "policy": str(self.policy),
            "limits": dict(self.limits),
            "golden_interval_s": self.golden_interval_s,
            "cache_bytes": self.cache_bytes,
            "single_flight": self.single_flight,
            "unload_after_s": self.unload_after_s,
        }

    def to_yaml(self) -> str:
        """The file's text. ``batchSize`` is 1: patches are batched by the engine, not requests by TorchServe."""
        workers = {} if self.workers is None else {"minWorkers": self.workers, "maxWorkers": self.workers}
        devices = {} if self.device_ids is None else {"deviceIds": list(self.device_ids)}
        document = (workers | devices) | {
            "batchSize": 1,
            "maxBatchDelay": 1,
            "responseTimeout": self.response_timeout_s,
            "startupTimeout": self.startup_timeout_s,
            "handler": self._handler_section(),
        }
        return yaml.safe_dump(document, sort_keys=False)


def check_device_ids(ids: object) -> tuple[int, ...]:
    """GPU numbers as TorchServe takes them, which drops the whole list and says so in its log only; empty for none.

    Raises:
        UsageError: they are no list of different numbers from 0.
    """
    numbers = ids if isinstance(ids, list | tuple) else () if ids is None else (ids,)
    if any(type(each) is not int or each < 0 for each in numbers) or len(set(numbers)) != len(numbers):
        msg = f"deviceIds {ids}: different numbers from 0, separated by commas, were expected"
        raise UsageError(msg)
    return tuple(numbers)
