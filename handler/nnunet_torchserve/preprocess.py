"""A volume onto the network's grid: transpose, crop, normalise, resample, as nnU-Net's own preprocessor does it.

``exact`` restates ``DefaultPreprocessor.run_case_npy`` without what inference throws away (a segmentation of zeros and
its resampling), with fewer copies, and with :mod:`.resampling`. A cascade's last stage has the labels of the stage
before as more channels, one for each label. The normalisation classes are nnU-Net's own and see
arrays of the same layout in memory, because it decides the last bit of a float32 mean. A plan with another
preprocessor class gets that class as it is, and one with other normalisations or resampling functions calls them as
nnU-Net's preprocessor does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice, get_bbox_from_mask
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.normalization.default_normalization_schemes import (
    CTNormalization,
    NoNormalization,
    RescaleTo01Normalization,
    RGBTo01Normalization,
    ZScoreNormalization,
)
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

from .cases import network_grid, too_thin_message
from .errors import TooThin, WrongRange
from .intensities import refuses_others
from .label_resampling import resample_labels
from .member import Member
from .options import PreprocessMethod
from .resampling import Target, resample_image, target_of
from .volume import LabelArray, Volume

_WITHOUT_MASK = (CTNormalization, NoNormalization, RescaleTo01Normalization, RGBTo01Normalization)
"""nnU-Net's normalisations that never look at the mask; :class:`ZScoreNormalization` does if the plan says so."""


_WHITE = 255

_INT8_LABELS = 127
"""``run_case_npy`` gives int16 above this."""


@dataclass(frozen=True, slots=True)
class PreprocessedCase:
    """What the engine and the export need of a case.

    Attributes:
        data: float32 (C, z, y, x) on the network's grid, in the plan's axis order.
        properties: nnU-Net's ``data_properties`` of this case: spacing, crop box, shapes.
    """

    data: torch.Tensor
    properties: dict[str, Any]


def preprocess(
    member: Member,
    volume: Volume,
    method: PreprocessMethod = PreprocessMethod.EXACT,
    previous: LabelArray | None = None,
) -> PreprocessedCase:
    """What the plan's preprocessor (``run_case_npy``) makes of a volume.

    Args:
        member: the model.
        volume: the case; it is used up: ``exact`` normalises in its array where it can, and the result may be a view.
        method: who resamples.
        previous: (Z, Y, X) labels of the stage before, for a cascade's last stage.

    Raises:
        TooThin: cropped to its nonzero region, the volume has no voxel left on an axis of the network's grid.
        WrongRange: a channel is normalised as an 8-bit picture and is none.
    """
    if member.configuration.preprocessor_class is DefaultPreprocessor:
        _check_pictures(member, volume)  # somebody's own may make pictures of an image
    if method is PreprocessMethod.EXACT and member.configuration.preprocessor_class is DefaultPreprocessor:
        return _exact(member, volume, previous)
    return _stock(member, volume, previous)


def _check_pictures(member: Member, volume: Volume) -> None:
    """nnU-Net asserts this when it normalises."""
    for channel, scheme in enumerate(member.normalizations[: len(volume.array)]):
        if not refuses_others(scheme):
            continue
        low, high = volume.array[channel].min(), volume.array[channel].max()
        if low < 0 or high > _WHITE:
            msg = (
                f"channel {channel} has values from {low:g} to {high:g}; "
                f"this model takes 8-bit pictures, with values from 0 to {_WHITE}"
            )
            raise WrongRange(msg)


def _exact(member: Member, volume: Volume, previous: LabelArray | None) -> PreprocessedCase:
    """``DefaultPreprocessor.run_case_npy``, without its sampling of foreground, which is for a training."""
    configuration, order = member.configuration, member.plans.transpose_forward
    schemes = member.normalizations
    data = _own_array(volume.array).transpose(0, *(axis + 1 for axis in order))
    spacing = [volume.geometry.spacing_zyx[axis] for axis in order]
    properties: dict[str, Any] = {"spacing": list(volume.geometry.spacing_zyx)}
    properties["shape_before_cropping"] = data.shape[1:]

    box = _nonzero_box(data)
    data = data[(slice(None), *bounding_box_to_slice(box))]
    mask: npt.NDArray[Any] | None = None
    if previous is not None:
        labels = previous.astype(np.float32).transpose(order)[bounding_box_to_slice(box)]  # as nnU-Net's readers do
        _, [mask], _ = crop_to_nonzero(data, labels[None])  # which also writes -1 where there is no image
    elif any(map(_needs_mask, schemes, configuration.use_mask_for_norm)):
        _, [mask], _ = crop_to_nonzero(data)  # there is nothing left to crop, and fewer voxels to look for holes in
    shape = data.shape[1:]
    properties["bbox_used_for_cropping"] = box
    properties["shape_after_cropping_and_before_resampling"] = shape

    target = list(configuration.spacing)
    target = [*spacing[: len(spacing) - len(target)], *target]
    new_shape = compute_new_shape(shape, spacing, target)
    if min(new_shape) < 1 and target_of(configuration.resampling_fn_data) is Target.NEW_SHAPE:
        raise TooThin(too_thin_message(shape, spacing, volume.geometry))

    intensities = member.plans.foreground_intensity_properties_per_channel
    for channel in range(len(data)):
        normalization = schemes[channel](
            use_mask_for_norm=configuration.use_mask_for_norm[channel], intensityproperties=intensities[str(channel)]
        )
        data[channel] = normalization.run(data[channel], mask)  # numpy sees where this is a copy onto itself
    resampled = resample_image(data, new_shape, spacing, target, configuration.resampling_fn_data)
    if previous is not None and mask is not None:
        stage = resample_labels(mask[None], new_shape, spacing, target, configuration.resampling_fn_seg)
        stage = stage.astype(np.int16 if np.max(stage) > _INT8_LABELS else np.int8)
        resampled = np.vstack((resampled, _one_hot(member, stage, resampled.dtype)))
    return PreprocessedCase(_as_float32(resampled), properties)


def _one_hot(member: Member, stage: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A channel for each foreground label of a segmentation (1, z, y, x) on the network's grid, as nnU-Net has it."""
    channels: npt.NDArray[Any] = convert_labelmap_to_one_hot(stage[0], member.labels.foreground_labels, dtype)
    return channels


def _as_float32(data: npt.NDArray[Any]) -> torch.Tensor:
    """What nnU-Net makes of an array for its network, whatever somebody's own code has made it of."""
    return torch.from_numpy(data).to(torch.float32)


def _own_array(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The array itself where it has the layout that stock's copy would have and may be written, else that copy."""
    return array if array.dtype == np.float32 and array.flags.carray else array.astype(np.float32)


def _needs_mask(scheme: Any, use_mask: bool | None) -> bool:
    if scheme is ZScoreNormalization:
        return bool(use_mask)
    return scheme not in _WITHOUT_MASK


def _nonzero_box(data: npt.NDArray[np.float32]) -> list[list[int]]:
    """The box of ``crop_to_nonzero``. It fills holes first, which never reach beyond the mask's own box."""
    nonzero = data[0] != 0
    for channel in data[1:]:
        nonzero |= channel != 0
    box: list[list[int]] = get_bbox_from_mask(nonzero)
    return box


def _stock(member: Member, volume: Volume, previous: LabelArray | None) -> PreprocessedCase:
    """The plan's own preprocessor, in memory."""
    preprocessor = member.names.preprocessor(member.configuration)
    copies = member.configuration.preprocessor_class is DefaultPreprocessor
    image = volume.array if copies else _own_array(volume.array)  # which another class may write to
    properties: dict[str, Any] = {"spacing": list(volume.geometry.spacing_zyx)}
    try:
        labels = None if previous is None else previous.astype(np.float32)[None]
        data, stage, properties = preprocessor.run_case_npy(
            image, labels, properties, member.plans, member.configuration, member.dataset
        )
        if previous is not None:
            data = np.vstack((data, _one_hot(member, stage, data.dtype)))
    except Exception as error:
        shape = properties.get("shape_after_cropping_and_before_resampling")
        spacing = [properties["spacing"][axis] for axis in member.plans.transpose_forward]
        if shape is not None and min(network_grid(member, shape, spacing)) < 1:
            raise TooThin(too_thin_message(shape, spacing, volume.geometry)) from error
        raise
    _check_shape(properties, volume, member)
    return PreprocessedCase(_as_float32(data), properties)


def _check_shape(properties: Mapping[str, Any], volume: Volume, member: Member) -> None:
    """Somebody's own preprocessor must lead back to the image that came."""
    shape = [volume.geometry.shape[axis] for axis in member.plans.transpose_forward]
    if (said := list(properties["shape_before_cropping"])) != shape:
        msg = f"the preprocessor says that the image had {said} voxels, it has {shape}: the labels would not fit it"
        raise ValueError(msg)
