"""What an archive's model-config.yaml says to the handler: its section ``handler``, checked.

The file has no checksum, so that an operator may change it: what is wrong in it must be refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from .backend import Choice, parse_choice
from .engine.scheduler import Policy
from .errors import BundleError
from .limits import Limits


class HandlerSettings(BaseModel):
    """The section ``handler``; what is not there, or null, has its default.

    Attributes:
        max_patch_batch, golden_interval_s, cache_bytes, unload_after_s: see
            :class:`~.engine.engine_settings.EngineSettings`.
        policy: how cases are ordered.
        limits: overrides of :class:`~.limits.Limits`.
        single_flight: equal requests at the same time are computed once.
        backend: that runs the networks; ``auto``: the fastest that the archive allows; ``None``: the one that it was
            made with. ``serve --backend`` wins.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_patch_batch: Annotated[int, Field(ge=1, strict=True)] | Literal["auto"] = "auto"
    policy: Policy = Policy.SHORTEST_REMAINING
    limits: dict[str, Annotated[int, Field(ge=0, strict=True)]] = Field(default_factory=dict)
    golden_interval_s: Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)] | None = None
    cache_bytes: Annotated[int, Field(ge=0, strict=True)] = 0
    single_flight: Annotated[bool, Field(strict=True)] = False
    unload_after_s: Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)] | None = None
    backend: Annotated[Choice, BeforeValidator(parse_choice)] | None = None

    @field_validator("limits")
    @classmethod
    def _are_limits(cls, value: dict[str, int]) -> dict[str, int]:
        known = [each.name for each in fields(Limits)]
        if unknown := set(value) - set(known):
            msg = f"no limit has the name {min(unknown)}; there are {', '.join(known)}"
            raise ValueError(msg)
        return value

    @classmethod
    def read(cls, section: object) -> HandlerSettings:
        """Check the section.

        Raises:
            BundleError: it is no mapping, or something in it has no such name or value.
        """
        if section is None:
            return cls()
        if not isinstance(section, Mapping):
            msg = "model-config.yaml: handler should be a mapping of settings"
            raise BundleError(msg)
        given: dict[str, Any] = {str(name): value for name, value in section.items() if value is not None}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            wrong = [f"handler.{'.'.join(map(str, each['loc'][:2]))}: {each['msg']}" for each in error.errors()]
            msg = f"model-config.yaml: {'; '.join(wrong)}"
            raise BundleError(msg) from error
