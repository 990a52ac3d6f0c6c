"""One case and its price: what it will cost in voxels, patches and bytes, known from its header alone.

What a header gives away of it is refused here, before a voxel is decoded: a volume that vanishes on the network's grid,
more work than the limits allow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from .bundle import ModelBundle
from .errors import LONGEST_NAMES, BadOption, OutOfMemory, TooLarge, TooThin, UnknownFold
from .label_resampling import resamples_boundaries
from .limits import Limits
from .machine import torch_threads
from .member import Member
from .options import Accumulate, ExportMethod, FoldName, Options, PreprocessMethod, Priority, ProbabilityFormat
from .recipe import Ensemble
from .resampling import LONGEST_BY_MATRIX, Target, spline_arguments, target_of
from .tiling import count_windows, padded_shape
from .volume import MOST_COLOURS, Geometry

_HALF, _FLOAT32, _FLOAT64 = 2, 4, 8

_DECODE_BYTES = 48
"""Bytes for a voxel while it is decoded, at worst: 64-bit voxels with a scaling, as sent, copied, scaled, rounded."""

_PREPROCESS_BYTES = 36
"""Bytes for a voxel as sent and padded, beside the volume, while stock's preprocessor works on it; measured."""

_SPLINE_PADDING = 24
"""Voxels by which ``scipy.ndimage`` lengthens every axis before it filters a spline (12 at either end): a single slice
becomes 25."""

_EXACT_PREPROCESS_BYTES = 16
"""Bytes for a voxel as sent, beside the volume, while ``preprocess: exact`` works on it; measured with a mask."""

MAX_AXIS = 2**15 - 1
"""Voxels: NIfTI-1 has no longer axis, and no scanner; what has one is a trap."""

SAFETY = 1.2
"""By which what is counted is multiplied."""

_EXPORT_BYTES, _EXPORT_GRID_BYTES = 12, 4
"""Bytes for a voxel of the image and one of the network's grid during the export: labels, their copies, and codes."""

_COORDINATE_BYTES = 80
"""Bytes for a voxel while nnU-Net's own function takes the nearest slices (``mgrid`` and ``map_coordinates``)."""

_EXPORT_BLOCK_BYTES = 96 * 2**20
"""What one thread of the export holds at most."""

_PREPROCESS_S, _LABEL_S, _EXPORT_S, _PROBABILITIES_S = 1e-8, 1e-8, 5e-10, 2e-9
"""Seconds that preprocessing takes for a voxel, nnU-Net's own resampling of labels for a voxel and label, and the
export for a voxel and class, on a fast machine: a request that has less time left than that is given up before and not
after the stage."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How one case is predicted: the request's options, completed by the model.

    Attributes:
        member: whose networks.
        folds: in the order of the request, else of the archive.
        mirroring_axes: spatial axes from 0, or empty.
        tile_step_size, use_gaussian, accumulate, priority: as in :class:`~.options.Options`.
    """

    member: str
    folds: tuple[FoldName, ...]
    mirroring_axes: tuple[int, ...]
    tile_step_size: float
    use_gaussian: bool
    accumulate: Accumulate = Accumulate.HALF
    priority: Priority = Priority.INTERACTIVE


@dataclass(frozen=True, slots=True)
class Price:
    """What a member costs of a case; cropping to the nonzero region can only make it cheaper.

    Attributes:
        grid: (z, y, x) on the network's grid, after transposing, before padding.
        patches: windows of one fold.
        passes: forward passes in all: patches x folds x mirrorings.
        bytes: peak of the worker's arrays for this case: input, resampling scratch, logits and export.
        preprocess_s: seconds that preprocessing takes at least.
        export_s: seconds that the export takes at least.
        is_guess: the plan's own function says what the grid is, when it has run: nothing may be refused for this one.
        logits_bytes: the part of ``bytes`` that stays until the export.
    """

    grid: tuple[int, int, int]
    patches: int
    passes: int
    bytes: int
    preprocess_s: float
    export_s: float
    is_guess: bool = False
    logits_bytes: int = 0


def settings_of(bundle: ModelBundle, options: Options) -> dict[str, Settings]:
    """Complete the options by what each member holds; see :func:`settings_for`.

    Raises:
        UnknownFold: a member lacks one of the folds.
        BadOption: a member, or an ensemble, knows no such export; or a channel is none of theirs.
    """
    if isinstance(bundle.description.recipe, Ensemble) and options.export is not ExportMethod.EXACT:
        msg = "export: an ensemble's labels are those of the mean of probabilities, which only exact gives"
        raise BadOption(msg)
    found = {}
    for name, member in bundle.members.items():
        try:
            found[name] = settings_for(member, options)
        except UnknownFold as error:
            if len(bundle.members) == 1:
                raise
            msg = f"{name}: {error}"
            raise UnknownFold(msg) from error
    return found


def is_default(bundle: ModelBundle, options: Options, settings: Mapping[str, Settings]) -> bool:
    """Whether a request's labels are made as those of a request without options, however it says so.

    Args:
        bundle: the model.
        options: of the request.
        settings: those options, completed by each member.
    """
    default = Options(priority=options.priority)
    skips = options.postprocess is False and bundle.description.postprocessing is not None
    how = (options.preprocess, options.export)
    return not skips and how == (default.preprocess, default.export) and settings == settings_of(bundle, default)


def settings_for(member: Member, options: Options) -> Settings:
    """Complete the options by what the archive holds.

    Mirroring axes are those of the first fold, as in ``nnUNetPredictor``.

    Raises:
        UnknownFold: the archive lacks one of the folds.
        BadOption: the model has no such channel, or knows no such export.
    """
    folds = member.folds if options.folds is None else options.folds
    for fold in folds:
        if fold not in member.folds:
            hint = "; without the option all of them are averaged" if fold == "all" else ""
            msg = f"this archive has no fold {fold}; it has {', '.join(map(str, member.folds))}{hint}"
            raise UnknownFold(msg)
    if options.probability_channels is not None and (last := max(options.probability_channels)) >= member.classes:
        names = ", ".join(f"{number} {ascii(name)[1:-1]}" for number, name in enumerate(member.output_names))
        msg = f"probability_channels: {last} is no channel of this model; they are {names[:LONGEST_NAMES]}"
        raise BadOption(msg)
    if options.export is not ExportMethod.EXACT and member.has_own_export:
        msg = "export: this model's own way from logits to labels allows exact only"
        raise BadOption(msg)
    allowed = member.fold(folds[0]).mirroring_axes or ()
    return Settings(
        member=member.name,
        folds=folds,
        mirroring_axes=() if options.use_mirroring is False else allowed,
        tile_step_size=options.tile_step_size,
        use_gaussian=options.use_gaussian,
        accumulate=options.accumulate,
        priority=options.priority,
    )


def price(
    member: Member,
    geometry: Geometry,
    channels: int,
    settings: Settings,
    options: Options,
    known_grid: tuple[int, int, int] | None = None,
    previous: int = 0,
) -> Price:
    """What a member will cost of a case at most.

    Args:
        member: the model.
        geometry: of the image, as the model sees it.
        channels: images that came, as many as the model takes.
        settings: how the case is predicted.
        options: what is asked for.
        known_grid: (z, y, x) on the network's grid, where the case has been preprocessed; else it is computed.
        previous: labels of the stage before, each of which is one more channel of the network.

    Raises:
        TooThin: no voxel would be left on an axis of the network's grid.
        TooLarge: an axis is longer than any image's.
    """
    order = member.plans.transpose_forward
    shape = [geometry.shape[axis] for axis in order]
    is_guess = known_grid is None and not knows_grid(member)
    grid = known_grid or network_grid(member, shape, [geometry.spacing_zyx[axis] for axis in order])
    if min(grid) < 1:
        raise TooThin(too_thin_message(geometry.shape, geometry.spacing_zyx, geometry))
    if (longest := max(geometry.shape)) > MAX_AXIS:
        msg = f"an axis has {longest} voxels, at most {MAX_AXIS} are served; send a part of the image"
        raise TooLarge(msg)
    if (longest := max(grid)) > MAX_AXIS:
        msg = (
            f"an axis would have {longest} voxels at the network's spacing, at most {MAX_AXIS} are served; "
            f"{_spacing_advice(geometry)}"
        )
        raise TooLarge(msg)
    padded = padded_shape(grid, member.patch_size)
    patches = count_windows(padded, member.patch_size, settings.tile_step_size)
    grid_voxels, padded_voxels = math.prod(grid), math.prod(padded)
    classes = member.classes
    volume = channels * geometry.voxels * _FLOAT32
    decode = channels * geometry.voxels * _DECODE_BYTES
    resample = volume + channels * _preprocess_bytes(member, shape, grid, options)
    if previous:  # the labels in float32, nnU-Net's resampling of one of them, and all of them as channels
        labels = geometry.voxels * _FLOAT32 + _padded(shape) * _PREPROCESS_BYTES + grid_voxels * (_FLOAT64 + _FLOAT32)
        resample += labels + (channels + 2 * previous) * grid_voxels * _FLOAT32
    exact = settings.accumulate is Accumulate.HALF
    result = classes * padded_voxels * (_HALF if exact else _FLOAT32)
    logits = result * (min(2, len(settings.folds)) if exact else 1)
    # the worker's, shared, padded
    network = (channels + previous) * (2 * grid_voxels + padded_voxels) * _FLOAT32 + logits
    export = logits + export_bytes(member, shape, grid, options)
    export_s = _PROBABILITIES_S if options.save_probabilities else _EXPORT_S
    return Price(
        grid=grid,
        patches=patches,
        passes=forward_passes(member, grid, settings),
        bytes=int(SAFETY * max(decode, resample, network, export)),
        preprocess_s=_preprocess_s(member, geometry.voxels, grid_voxels, channels, previous),
        export_s=classes * geometry.voxels * (export_s if _resamples_logits(member) else 0),
        is_guess=is_guess,
        logits_bytes=result,
    )


def forward_passes(member: Member, grid: Sequence[int], settings: Settings) -> int:
    """Forward passes that a case needs: patches x folds x mirrorings.

    Args:
        member: the model.
        grid: (z, y, x) on the network's grid.
        settings: how it is predicted.
    """
    padded = padded_shape(grid, member.patch_size)
    patches = count_windows(padded, member.patch_size, settings.tile_step_size)
    return patches * len(settings.folds) * (1 << len(settings.mirroring_axes))


def _preprocess_bytes(member: Member, shape: Sequence[int], grid: Sequence[int], options: Options) -> int:
    """What preprocessing holds of a channel beside it; axes of the image and of the network's grid in one order."""
    voxels, grid_voxels = math.prod(shape), math.prod(grid)
    separable = spline_arguments(member.configuration.resampling_fn_data) is not None
    if options.preprocess is PreprocessMethod.EXACT and separable and max(*shape, *grid) <= LONGEST_BY_MATRIX:
        half_way = max(n * grid_voxels // m for n, m in zip(shape, grid, strict=True))  # one axis is yet to come
        return voxels * _EXACT_PREPROCESS_BYTES + half_way * _FLOAT64 + grid_voxels * _FLOAT32
    return _padded(shape) * _PREPROCESS_BYTES + grid_voxels * (_FLOAT64 + _FLOAT32)


def _preprocess_s(member: Member, voxels: int, grid_voxels: int, channels: int, previous: int) -> float:
    """What preprocessing takes at least; nnU-Net's own resampling of labels takes its time for each of them."""
    if not _resamples_image(member):
        return 0.0
    one_by_one = previous if not resamples_boundaries(member.configuration.resampling_fn_seg) else 0
    return channels * voxels * _PREPROCESS_S + one_by_one * grid_voxels * _LABEL_S


def _padded(shape: Sequence[int]) -> int:
    """Voxels that scipy filters for a spline."""
    return math.prod(n + _SPLINE_PADDING for n in shape)


def export_bytes(member: Member, shape: Sequence[int], grid: Sequence[int], options: Options) -> int:
    """What the export holds beside the logits; at most, whatever way the plan makes it take.

    Args:
        member: the model.
        shape: voxels of the image, axes in the plan's order.
        grid: voxels on the network's grid, in that order.
        options: of the request.
    """
    classes, voxels, grid_voxels = member.classes, math.prod(shape), math.prod(grid)
    blocks = min(torch_threads() * _EXPORT_BLOCK_BYTES, classes * (voxels + grid_voxels) * _FLOAT64)
    export = voxels * _EXPORT_BYTES + grid_voxels * _EXPORT_GRID_BYTES + blocks
    if options.save_probabilities:
        whole = classes * _FLOAT32  # regions need all classes once
        copies = 3 if options.probability_format is ProbabilityFormat.NIFTI_GZ else 2  # and the answer is written
        export += voxels * (copies * options.probability_bytes(classes) + whole)
    function = member.configuration.resampling_fn_probabilities
    arguments = spline_arguments(function)
    stays = target_of(function) is Target.UNCHANGED and list(grid) == list(shape)
    if (stays or (arguments is not None and arguments.order == 1)) and not member.has_own_export:
        return export
    # nnU-Net's own function: slices by torch, other splines, or a whole export
    all_classes = classes * (grid_voxels * _FLOAT64 + voxels * 3 * _FLOAT32)
    return export + all_classes + voxels * _COORDINATE_BYTES + _padded(grid) * _PREPROCESS_BYTES


def affordable(case: Price, limits: Limits, geometry: Geometry) -> Price:
    """The price, unless it can never be paid here; a guess is no reason to refuse, and is taken for less then.

    Args:
        case: what it costs.
        limits: what is allowed.
        geometry: of the image, which the messages are about.

    Raises:
        TooLarge: above a configured limit.
        OutOfMemory: within the limits, but above the memory for all cases together.
    """
    if case.is_guess:
        return replace(case, bytes=min(case.bytes, limits.memory_bytes), passes=min(case.passes, limits.passes))
    voxels = case.grid[0] * case.grid[1] * case.grid[2]
    if voxels > limits.grid_voxels:
        msg = (
            f"the image would have {voxels} voxels at the network's spacing, the limit is {limits.grid_voxels}; "
            f"{_spacing_advice(geometry)}"
        )
        raise TooLarge(msg)
    if case.passes > limits.passes:
        fewer = ", fewer folds or no mirroring" if case.passes > case.patches else ""
        msg = (
            f"the case needs {case.passes} forward passes, the limit is {limits.passes}; "
            f"use a larger tile_step_size{fewer}, or send a smaller image"
        )
        raise TooLarge(msg)
    if case.bytes > (memory := limits.memory_bytes):
        msg = f"the case needs about {case.bytes} bytes of memory, this server has {memory} for all cases"
        raise OutOfMemory(msg)
    return case


def network_grid(member: Member, shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, int, int]:
    """The grid on which the network will see an image.

    That of the network's spacing (nnU-Net's ``compute_new_shape``), or the image's own if the plan's function resamples
    nothing, or if only that function knows (:func:`knows_grid`).

    Args:
        member: the model; a 2-D configuration keeps the first axis.
        shape: voxels of three axes in the plan's order.
        spacing: mm of three axes in the plan's order.
    """
    first, second, third = shape
    if _resamples_image(member):
        target = list(member.configuration.spacing)
        target = [*spacing[: 3 - len(target)], *target]
        resampled = zip(shape, spacing, target, strict=True)
        first, second, third = (int(round(have / want * n)) for n, have, want in resampled)
    return first, second, third


def knows_grid(member: Member) -> bool:
    """Whether :func:`network_grid` is sure: the preprocessor and its resampling function are nnU-Net's own."""
    is_stock = member.configuration.preprocessor_class is DefaultPreprocessor
    return is_stock and target_of(member.configuration.resampling_fn_data) is not Target.UNKNOWN


def _resamples_image(member: Member) -> bool:
    """Whether the image surely gets the network's spacing."""
    return knows_grid(member) and target_of(member.configuration.resampling_fn_data) is Target.NEW_SHAPE


def _resamples_logits(member: Member) -> bool:
    """Whether the logits are surely resampled to the image's grid."""
    return target_of(member.configuration.resampling_fn_probabilities) is Target.NEW_SHAPE


def too_thin_message(shape: Sequence[int], spacing: Sequence[float], geometry: Geometry) -> str:
    """The one sentence that says an image is too thin.

    Args:
        shape: its voxels, or those of its nonzero region, along three axes.
        spacing: mm along the same axes.
        geometry: of the image.
    """
    sizes = list(zip(shape, spacing, strict=True))
    if geometry.is_flat:
        sizes.remove(max(sizes, key=lambda size: size[1]))  # nnU-Net's placeholder
    counts = tuple(int(count) for count, _ in sizes)
    nothing = "on an axis of the network's grid"
    if geometry.assumed:
        return (
            f"a picture of {counts} pixels, taken for 1 mm each, has no pixel left {nothing}; send a larger one, or "
            "give the size of its pixels as option spacing"
        )
    what = "an image" if geometry.is_flat else "a volume"
    msg = f"{what} of {counts} voxels at {tuple(mm for _, mm in sizes)} mm has no voxel left {nothing}; "
    if geometry.placed and not geometry.is_flat and geometry.shape[2] <= MOST_COLOURS < min(geometry.shape[:2]):
        msg += "is it (z, y, x)? If its last axis holds channels, send (channel, z, y, x). Else: "
    return f"{msg}is the spacing in mm?"


def _spacing_advice(geometry: Geometry) -> str:
    """What may be wrong with an image that becomes too large on the network's grid."""
    if geometry.assumed:
        return "its pixels are taken for 1 mm: send a smaller picture, or the size of its pixels as option spacing"
    return f"check the voxel spacing {'that was sent with it' if geometry.placed else 'in the header'}"
