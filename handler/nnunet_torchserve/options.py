"""What one request may ask for.

The names are nnU-Net's own (``nnUNetPredictor``, ``nnUNetv2_predict``). What can be checked without a model and an
image is checked here; unknown names are refused, so that a misspelt option is never silently ignored. What depends on
the model or the image is checked where they are known, before a voxel is decoded unless said otherwise:

- folds, channels of probabilities, and the export of an ensemble: :mod:`.cases`;
- the number of ``series_uid``: :mod:`.intake`; whether the image is a series, and needs a place: :mod:`.codecs`;
- whether ``output_format`` can hold the answer: :mod:`.codecs.answer`;
- the export of a model with its own way to labels: :mod:`.cases`, and once more in :mod:`.export.labels`, after the
  network.
"""

from __future__ import annotations

from difflib import get_close_matches
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import BadOption, Malformed, UnknownOption
from .volume import Placement

HEADER = "X-Nnunet-Options"
PART = "options"
MAX_OPTIONS_BYTES = 4096
"""TorchServe takes 8,192 bytes of headers in all; options never need half of that."""

MIN_TILE_STEP_SIZE = 0.05
"""Stock accepts any positive step. At 0.05 a 3-D case already costs 1,000 times the patches of 0.5."""

FoldName = int | Literal["all"]

SeriesUid = Annotated[str, Field(pattern=r"^[0-9.]{1,64}$")]
"""DICOM's (PS3.5, section 9)."""

_OF_NO_CASE = frozenset({"describe", "timeout_s", "priority"})
"""Options that may stand beside ``describe``: clients send them with everything."""


class OutputFormat(StrEnum):
    """The file formats of an answer."""

    NIFTI_GZ = "nii.gz"
    NIFTI = "nii"
    NRRD = "nrrd"
    MHA = "mha"
    NPZ = "npz"
    PNG = "png"
    TIFF = "tif"
    BMP = "bmp"
    JSON = "json"
    DICOM_SEG = "dicom-seg"


class SegType(StrEnum):
    """How a DICOM segmentation stores its segments."""

    BINARY = "binary"
    LABELMAP = "labelmap"


class ProbabilityFormat(StrEnum):
    """The file formats of probabilities."""

    NPZ = "npz"
    NIFTI_GZ = "nii.gz"
    NIFTI = "nii"


class Accumulate(StrEnum):
    """In which arithmetic patches are summed."""

    HALF = "half"
    FLOAT32 = "float32"


class ExportMethod(StrEnum):
    """How logits on the network's grid become labels on the image's."""

    EXACT = "exact"
    LINEAR = "linear"
    NEAREST = "nearest"


class PreprocessMethod(StrEnum):
    """Who resamples the image."""

    EXACT = "exact"
    STOCK = "stock"


class Priority(StrEnum):
    """Who waits for a case: a person, or a folder."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class ProbabilityType(StrEnum):
    """The dtypes of probabilities."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"

    @property
    def bytes(self) -> int:
        """Of one number."""
        return 4 if self is ProbabilityType.FLOAT32 else 2


class Options(BaseModel):
    """The options of one request, with nnU-Net's defaults.

    Attributes:
        folds: folds to average; ``None`` takes every fold of the archive. ``"all"`` is nnU-Net's own ``fold_all``.
        use_mirroring: test-time mirroring; ``None`` and ``True`` mean along the axes that the checkpoint allows.
        tile_step_size: sliding-window step as a fraction of the patch size.
        use_gaussian: weight patches by nnU-Net's Gaussian, or all voxels alike.
        accumulate: ``half`` is stock's arithmetic, to the bit; ``float32`` averages the folds of a patch in float32.
        preprocess: ``exact`` resamples the image faster, ``stock`` by nnU-Net's own function; see docs/parity.md.
        export: ``exact`` gives stock's labels; ``linear`` interpolates in float32, ``nearest`` takes the nearest label.
        postprocess: remove what the archive's postprocessing removes, as nnU-Net found it best; ``None`` and ``True``
            do so where the archive has one. Probabilities stay as they are.
        save_probabilities: send probabilities too, (C, Z, Y, X).
        probability_channels: which of them, in this order; ``None`` sends all.
        probability_dtype: float32 is stock's, to the bit.
        probability_format: npz, or a 4-D NIfTI with the channels last.
        properties: send nnU-Net's properties of the case too; see :mod:`.properties`.
        output_format: ``None`` answers in the input's format; several of them come in one zip.
        spacing, origin, direction: where an array or a picture lies, which says nothing itself; as SimpleITK's
            ``GetSpacing()`` (mm, x, y, z), ``GetOrigin()`` and ``GetDirection()`` give them.
        seg_type: of a DICOM segmentation: one frame of bits for each segment and slice, which every reader takes, or
            one of numbers for each slice.
        series_uid: of several DICOM series in one archive, the SeriesInstanceUID of the one that is meant; a list has
            one for each channel.
        priority: ``interactive`` cases come first, see :mod:`.engine.scheduler` and :mod:`.engine.admission`.
        timeout_s: seconds until the request is given up with 504; never above the server's own limit.
        stream: answer with events of the request's progress, the result last; see :mod:`.events`.
        describe: answer with what the model says of itself; there need be no image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    folds: tuple[FoldName, ...] | None = None
    use_mirroring: bool | None = None
    tile_step_size: Annotated[float, Field(ge=MIN_TILE_STEP_SIZE, le=1)] = 0.5
    use_gaussian: bool = True
    accumulate: Accumulate = Accumulate.HALF
    preprocess: PreprocessMethod = PreprocessMethod.EXACT
    export: ExportMethod = ExportMethod.EXACT
    postprocess: bool | None = None
    save_probabilities: bool = False
    probability_channels: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    probability_dtype: ProbabilityType = ProbabilityType.FLOAT32
    probability_format: ProbabilityFormat = ProbabilityFormat.NPZ
    properties: bool = False
    output_format: OutputFormat | tuple[OutputFormat, ...] | None = None
    seg_type: SegType = SegType.BINARY
    spacing: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    origin: tuple[float, ...] | None = None
    direction: tuple[float, ...] | None = None
    series_uid: Annotated[tuple[SeriesUid, ...], Field(min_length=1)] | None = None
    priority: Priority = Priority.INTERACTIVE
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    stream: bool = False
    describe: bool = False

    @field_validator("output_format", "spacing", "origin", "direction", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("folds", "probability_channels", "series_uid", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        return (value,) if isinstance(value, int | str) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _a_description_has_no_case(self) -> Self:
        fields = type(self).model_fields.items()
        of_a_case = [name for name, field in fields if getattr(self, name) != field.default and name not in _OF_NO_CASE]
        if self.describe and of_a_case:
            msg = f"a description has no case that {', '.join(of_a_case)} could apply to: leave describe out, or those"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        chosen = self.probability_channels
        wanted = (
            chosen is not None
            or self.probability_dtype is not ProbabilityType.FLOAT32
            or self.probability_format is not ProbabilityFormat.NPZ
        )
        if wanted and not self.save_probabilities:
            msg = 'probability_channels, probability_dtype and probability_format need "save_probabilities": true'
            raise ValueError(msg)
        if self.save_probabilities and self.export is not ExportMethod.EXACT:
            msg = f"export {self.export} gives no probabilities: leave out export, or save_probabilities"
            raise ValueError(msg)
        if self.probability_format is not ProbabilityFormat.NPZ and self.probability_dtype is ProbabilityType.FLOAT16:
            msg = "NIfTI has no float16: leave out probability_dtype, or take probability_format npz"
            raise ValueError(msg)
        if self.spacing is None and (self.origin is not None or self.direction is not None):
            msg = "origin and direction need spacing, and are for arrays and pictures only"
            raise ValueError(msg)
        return self

    @property
    def placement(self) -> Placement | None:
        """Where the request says that its array lies."""
        return None if self.spacing is None else Placement(self.spacing, self.origin, self.direction)

    def probability_bytes(self, classes: int) -> int:
        """What the probabilities of one voxel take in the answer, of a model with so many channels."""
        if not self.save_probabilities:
            return 0
        chosen = classes if self.probability_channels is None else len(self.probability_channels)
        return chosen * self.probability_dtype.bytes

    @field_validator("folds", "probability_channels", "output_format")
    @classmethod
    def _are_distinct(cls, value: tuple[Any, ...] | str | None) -> tuple[Any, ...] | str | None:
        if isinstance(value, tuple) and (not value or len(set(value)) != len(value)):
            msg = "empty, or something twice"
            raise ValueError(msg)
        return value


def _one_of(names: type[StrEnum]) -> str:
    return "should be " + " or ".join(names)


_YES_OR_NO = "should be true or false, without quotes"
_EXPECTED = {
    "folds": 'should be a fold number, "all", or a list of them without repeats, as in [0, 1]',
    "use_mirroring": _YES_OR_NO,
    "tile_step_size": f"should be a number from {MIN_TILE_STEP_SIZE} to 1",
    "use_gaussian": _YES_OR_NO,
    "accumulate": _one_of(Accumulate),
    "preprocess": _one_of(PreprocessMethod),
    "export": _one_of(ExportMethod) + "; exact is stock's",
    "postprocess": _YES_OR_NO,
    "save_probabilities": _YES_OR_NO,
    "probability_channels": "should be a list of channel numbers without repeats, as in [1, 3]; names are no numbers",
    "probability_dtype": _one_of(ProbabilityType),
    "probability_format": _one_of(ProbabilityFormat),
    "properties": _YES_OR_NO,
    "output_format": _one_of(OutputFormat) + ", or a list of some without repeats",
    "seg_type": _one_of(SegType),
    "spacing": "should be 2 or 3 numbers above 0: mm along x, y(, z), as SimpleITK's GetSpacing() gives them",
    "origin": "should be 2 or 3 numbers, as SimpleITK's GetOrigin() gives them",
    "direction": "should be 4 or 9 numbers, row by row, as SimpleITK's GetDirection() gives them",
    "series_uid": "should be a SeriesInstanceUID, digits and dots in quotes, or a list with one for each channel",
    "priority": _one_of(Priority),
    "timeout_s": "should be a number of seconds above 0",
    "stream": _YES_OR_NO,
    "describe": _YES_OR_NO,
}
"""What is right, for each option."""


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
            name = str(first["loc"][0])[:80]
            meant = get_close_matches(name.lower(), Options.model_fields, 1)
            hint = f"did you mean {meant[0]}? " if meant else ""
            msg = f"unknown option {ascii(name)[:80]}; {hint}options are {', '.join(Options.model_fields)}"
            raise UnknownOption(msg) from None
        if first["type"] == "value_error" and not first["loc"]:
            raise BadOption(_explain(first["msg"])) from None
        if not first["loc"]:
            where = f" ({_explain(first['msg'])})" if first["type"] == "json_invalid" else ""
            msg = f'options must be one JSON object, as in {{"use_mirroring": false}}{where}'
            raise Malformed(msg) from None
        name = str(first["loc"][0])
        msg = f"option {name}: {_EXPECTED.get(name) or _explain(first['msg'])}"
        raise BadOption(msg) from None


def _explain(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should", "should")
