"""What an engine is started with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..backend import Backend


class EngineSettings(BaseModel):
    """What an engine is started with; part of its identity.

    Attributes:
        device: ``cpu`` or ``cuda:<n>``; ``cpu:<n>`` stands in for a GPU in tests.
        max_patch_batch: passes in a batch; ``auto`` probes what is fastest on CUDA, and is 1 on a CPU.
        policy: of :class:`~.scheduler.Policy`.
        memory_bytes, passes, waiting_cases: see :class:`~..limits.Limits`.
        machine_bytes: memory that the cases of all engines may take together.
        golden_interval_s: seconds between two checks of the golden patch; ``None``: it is checked at the start only.
        cache_bytes: of preprocessed volumes that are kept for later cases.
        unload_after_s: seconds without a case after which the networks give their memory back; ``None``: never.
        backend: that is to run; eager does where the machine cannot.
        only_if_faster: eager runs where it is as fast, too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    max_patch_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    policy: str
    memory_bytes: int
    machine_bytes: int
    passes: int
    waiting_cases: int
    golden_interval_s: Annotated[float, Field(gt=0)] | None = None
    cache_bytes: Annotated[int, Field(ge=0)] = 0
    unload_after_s: Annotated[float, Field(gt=0)] | None = None
    backend: Backend = Backend.EAGER
    only_if_faster: bool = False
