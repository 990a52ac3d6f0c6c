"""What one request may ask for.

The names are nnU-Net's own (``nnUNetPredictor``, ``nnUNetv2_predict``). Everything is validated here, once, before
any voxel is touched; unknown names are refused, so that a misspelt option is never silently ignored.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import BadOption, Malformed, UnknownOption

HEADER = "X-Nnunet-Options"
PART = "options"
MAX_OPTIONS_BYTES = 4096
"""TorchServe takes 8,192 bytes of headers in all; options never need half of that."""

MIN_TILE_STEP_SIZE = 0.05
"""Stock accepts any positive step. At 0.05 a 3-D case already costs 1,000 times the patches of 0.5."""

FoldName = int | Literal["all"]


class OutputFormat(StrEnum):
    """The file formats of an answer."""

    NIFTI_GZ = "nii.gz"
    NIFTI = "nii"
    NPZ = "npz"


class Accumulate(StrEnum):
    """In which arithmetic patches are summed."""

    HALF = "half"
    FLOAT32 = "float32"


class Options(BaseModel):
    """The options of one request, with nnU-Net's defaults.

    Attributes:
        folds: folds to average; ``None`` takes every fold of the archive. ``"all"`` is nnU-Net's own ``fold_all``.
        use_mirroring: test-time mirroring; ``None`` and ``True`` mean along the axes that the checkpoint allows.
        tile_step_size: sliding-window step as a fraction of the patch size.
        use_gaussian: weight patches by nnU-Net's Gaussian, or all voxels alike.
        accumulate: ``half`` is stock's arithmetic, to the bit; ``float32`` averages the folds of a patch in float32.
        save_probabilities: send probabilities too, float32 (C, Z, Y, X).
        output_format: ``None`` answers in the input's format.
        timeout_s: seconds until the request is given up with 504; never above the server's own limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    folds: tuple[FoldName, ...] | None = None
    use_mirroring: bool | None = None
    tile_step_size: Annotated[float, Field(ge=MIN_TILE_STEP_SIZE, le=1)] = 0.5
    use_gaussian: bool = True
    accumulate: Accumulate = Accumulate.HALF
    save_probabilities: bool = False
    output_format: OutputFormat | None = None
    timeout_s: Annotated[float, Field(gt=0)] | None = None

    @field_validator("folds", mode="before")
    @classmethod
    def _one_fold_is_a_list_of_one(cls, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        return (value,) if isinstance(value, int | str) and not isinstance(value, bool) else value

    @field_validator("folds")
    @classmethod
    def _folds_are_distinct(cls, value: tuple[FoldName, ...] | None) -> tuple[FoldName, ...] | None:
        if value is not None and (not value or len(set(value)) != len(value)):
            msg = 'folds must be a number, "all", or a non-empty list of them without repeats'
            raise ValueError(msg)
        return value


def parse_options(text: bytes | None) -> Options:
    """Options from their JSON text; ``None`` or nothing gives the defaults.

    Raises:
        Malformed: no JSON object, or more than 4,096 bytes.
        UnknownOption: a name that is no option.
        BadOption: a value of the wrong type or out of range.
    """
    if not text:
        return Options()
    if len(text) > MAX_OPTIONS_BYTES:
        msg = f"options take at most {MAX_OPTIONS_BYTES} bytes of JSON; these have {len(text)}"
        raise Malformed(msg)
    try:
        return Options.model_validate_json(text)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False, include_input=False)[0]
        if first["type"] == "extra_forbidden":
            msg = f"unknown option {ascii(str(first['loc'][0]))[:80]}; options are {', '.join(Options.model_fields)}"
            raise UnknownOption(msg) from None
        if not first["loc"]:
            msg = 'options must be one JSON object, as in {"use_mirroring": false}'
            raise Malformed(msg) from None
        msg = f"option {first['loc'][0]}: {_explain(first['msg'])}"
        raise BadOption(msg) from None


def _explain(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should", "should")
