"""What a request asks for: all that its images' headers tell, and that can be refused, before a voxel is decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from . import codecs
from .bundle import ModelBundle
from .cases import Price, Settings
from .codecs import DicomSource, ImageSource
from .errors import (
    BadOption,
    ChannelsDisagree,
    NonFinite,
    OrientationUnknown,
    ResponseTooLarge,
    TooLarge,
    WrongChannels,
)
from .limits import Limits
from .member import REORIENTING_READERS, Member
from .options import Options, OutputFormat
from .orientation import Turn, turn_towards
from .previous_stage import PreviousStage, check_grid, labels_of, said_of_the_labels
from .pricing import affordable_case, prices_of, whole_price
from .recipe import Cascade
from .request import PREVIOUS_STAGE, Request
from .responses import Warnings, too_large_message
from .telemetry import RequestRecord
from .volume import Geometry, Volume

_ALIGNED_MM, _ALIGNED_DIRECTION = 1e-2, 1e-3


@dataclass(frozen=True, slots=True)
class Asked:
    """A request whose headers were read.

    Attributes:
        images: one, or one a channel.
        turns: how each of them becomes what the model sees.
        geometry: of that.
        prices: what each member costs that is predicted, in their order.
        price: what the case costs in all.
        making: the part of it that making the answer's files takes, in bytes.
        previous: the labels of a cascade's first stage, if they came with the request.
        form: of the answer.
        warnings: of :class:`~.responses.Warnings`, as far as headers give cause.
    """

    images: Sequence[ImageSource]
    turns: Sequence[Turn]
    geometry: Geometry
    prices: Mapping[str, Price]
    price: Price
    making: int
    previous: PreviousStage | None
    form: codecs.AnswerForm
    warnings: list[str]

    def decode(self) -> tuple[Volume, bool]:
        """All channels as the model sees them, and whether every voxel has one value.

        Raises:
            NonFinite: a voxel is NaN or infinite, which its smallest or largest value then is too.
        """
        channels = [turn.turn(image.read()) for image, turn in zip(self.images, self.turns, strict=True)]
        array = channels[0] if len(channels) == 1 else np.concatenate(channels)
        low, high = array.min(), array.max()
        if not np.isfinite(low) or not np.isfinite(high):
            msg = "the image holds NaN or infinite voxels; replace them by a number that means background"
            raise NonFinite(msg)
        return Volume(array, self.geometry), bool(low == high)


def read_headers(
    bundle: ModelBundle,
    limits: Limits,
    request: Request,
    record: RequestRecord,
    options: Options,
    settings: Mapping[str, Settings],
) -> Asked:
    """Read the headers of a request's images.

    Args:
        bundle: the model.
        limits: what a request may ask for.
        request: what came.
        record: is told the image's shape and the case's passes.
        options: of the request.
        settings: those options, completed by each member.

    Raises:
        RequestError: the images are none, or none that this model can take, or above a limit.
        OutOfMemory: within the limits, but above the memory for all cases together.
    """
    member = bundle.lead
    images = _open_images(member, limits, request, options)
    names = list(member.channel_names.values())
    codecs.check_channels(images, names)
    turns = [_turn(member, image) for image in images]
    seen = [turn.after for turn in turns]
    geometry = _common_geometry(seen)
    series = [image for image in images if isinstance(image, DicomSource)]
    if series:
        firsts = accumulate((image.channels for image in images), initial=0)
        named = [names[first] for first, image in zip(firsts, images, strict=False) if isinstance(image, DicomSource)]
        codecs.check_one_body(series, named, seen)
    record.shape = images[0].geometry.shape
    warnings = _warnings(seen, len(member.patch_size))
    if any(image.left_out for image in series):
        warnings.append(str(Warnings.DICOM_FILES_IGNORED))
    previous = _previous_stage(bundle, limits, request, images[0])
    grid, native = images[0].geometry, images[0].native_format
    form = codecs.answer_form(options, native, grid, member.largest_value, member.painting)
    if OutputFormat.DICOM_SEG in form.labels:
        series[0].check_texts()
        warnings += _segmentation_warnings(bundle, series[0])
    channels = sum(image.channels for image in images)
    prices = prices_of(bundle, geometry, channels, settings, options, has_previous=previous is not None)
    making = codecs.making_bytes(grid, form, len(member.painting.structures), limits.response_bytes)
    cost = whole_price(bundle, prices, geometry, channels, options, making)
    record.patches, record.passes = cost.patches, cost.passes
    cost = affordable_case(prices, cost, limits, geometry)
    _check_answer_fits(member, limits, geometry, form, options)
    return Asked(images, turns, geometry, prices, cost, making, previous, form, warnings)


def _open_images(member: Member, limits: Limits, request: Request, options: Options) -> Sequence[ImageSource]:
    if request.fields > limits.parts:
        msg = f"the request has {request.fields} fields, this server takes at most {limits.parts}"
        raise TooLarge(msg)
    bodies = request.images()
    size = sum(len(file) for body in bodies for file in body) + len(request.previous_stage() or b"")
    if size > limits.body_bytes:
        msg = f"the images have {size} bytes, this server takes at most {limits.body_bytes}"
        raise TooLarge(msg)
    uids = options.series_uid or (None,) * len(bodies)
    if len(uids) != len(bodies):
        msg = f"option series_uid names {len(uids)} series, and {len(bodies)} images came; name one for each"
        raise BadOption(msg)
    placement, reader = options.placement, member.reader
    return [codecs.open_image(body, limits, reader, placement, uid) for body, uid in zip(bodies, uids, strict=True)]


def _previous_stage(bundle: ModelBundle, limits: Limits, request: Request, image: ImageSource) -> PreviousStage | None:
    """The labels that came for a cascade.

    Raises:
        WrongChannels: labels for a model that takes none, or none for a model that cannot make them.
        ChannelsDisagree: they lie on another grid than the image.
    """
    recipe, body = bundle.description.recipe, request.previous_stage()
    if body is None:
        if isinstance(recipe, Cascade) and recipe.first is None:
            msg = f"this model is the last stage of a cascade: send the first stage's labels too, as {PREVIOUS_STAGE}"
            raise WrongChannels(msg)
        return None
    if not isinstance(recipe, Cascade):
        msg = f"this model is no cascade, and takes no {PREVIOUS_STAGE}; leave it out"
        raise WrongChannels(msg)
    with said_of_the_labels():
        labels = codecs.open_labels(body, limits, bundle.lead.reader, image.geometry)
    check_grid(labels, image.geometry)
    return PreviousStage(labels, _turn(bundle.lead, labels), labels_of(bundle.lead))


def _turn(member: Member, image: ImageSource) -> Turn:
    """How an image becomes what the model sees.

    Raises:
        OrientationUnknown: a DICOM series, and nobody said how the images of the training lay. Converters to NIfTI
            store rows and columns in another order than DICOM, each in its own: the network might see a mirrored body.
    """
    if isinstance(image, DicomSource) and member.input_orientation is None:
        msg = (
            "this model does not say in which orientation it was trained, and a DICOM series might be mirrored for it. "
            "Its owner can mend that: 'nnunet-torchserve orientation imagesTr' tells the orientation of the training "
            "images, 'nnunet-torchserve archive MODEL_FOLDER --input-orientation' with its letters records it. Until "
            "then send the series as the training images were made, as NIfTI for example"
        )
        raise OrientationUnknown(msg)
    as_itk = member.reader.startswith("SimpleITK") and member.reader in REORIENTING_READERS
    return turn_towards(image.geometry, member.input_orientation, as_itk=as_itk)


def _check_answer_fits(
    member: Member, limits: Limits, geometry: Geometry, form: codecs.AnswerForm, options: Options
) -> None:
    size = codecs.smallest_answer(geometry, form, options.probability_bytes(member.classes))
    if size > limits.response_bytes:
        raise ResponseTooLarge(too_large_message(size, limits.response_bytes))


def _common_geometry(geometries: Sequence[Geometry]) -> Geometry:
    """The first image's; shapes and spacings must agree, as nnU-Net's readers demand."""
    first = geometries[0]
    for number, other in enumerate(geometries[1:], start=1):
        if other.shape != first.shape or not np.allclose(other.spacing_zyx, first.spacing_zyx):
            pictures = first.assumed and other.assumed
            right = "send pictures of one size" if pictures else "resample them to one grid"
            msg = f"channel {number} has {_extent(other)}, channel 0 has {_extent(first)}; {right}"
            raise ChannelsDisagree(msg)
    return first


def _extent(geometry: Geometry) -> str:
    """An image's size in words; of a picture nobody knows the spacing, and of a plane there is none between slices."""
    axes = slice(1, None) if geometry.is_flat else slice(None)
    names = "(y, x)" if geometry.is_flat else "(z, y, x)"
    if geometry.assumed:
        return f"{geometry.shape[axes]} pixels {names}"
    return f"shape {geometry.shape[axes]} and spacing {geometry.spacing_zyx[axes]} mm {names}"


def _segmentation_warnings(bundle: ModelBundle, series: DicomSource) -> list[str]:
    """What a DICOM segmentation says only because it must say something."""
    warnings = []
    if not set(bundle.lead.painting.structures) <= set(bundle.codes):
        warnings.append(Warnings.SEGMENTS_UNCODED)
    if not series.has_frame_of_reference:
        warnings.append(Warnings.FRAME_OF_REFERENCE_MADE)
    return [str(warning) for warning in warnings]


def _warnings(geometries: Sequence[Geometry], dimensions: int) -> list[str]:
    """What stock would print a warning for, or should, from the headers."""
    first = geometries[0]
    aligned = all(
        np.allclose(other.origin, first.origin, atol=_ALIGNED_MM)
        and np.allclose(other.direction, first.direction, atol=_ALIGNED_DIRECTION)
        for other in geometries
    )
    warnings = [] if aligned else [Warnings.CHANNELS_MISALIGNED]
    if first.ndim < dimensions:
        warnings.append(Warnings.SINGLE_SLICE)
    if first.assumed:
        warnings.append(Warnings.SPACING_ASSUMED)
    return [str(warning) for warning in warnings]
