"""What a whole case costs: the prices of its members, put together as the recipe does.

One request is one case, whatever the number of members: it is charged once, for its peak. Members are predicted one
after the other. While one is worked on, what the others have left is held: an ensemble's logits until the last is
there, a cascade's labels, the image itself until nobody needs it any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from .bundle import ModelBundle
from .cases import SAFETY, Price, Settings, affordable, export_bytes, price
from .export import postprocessing
from .limits import Limits
from .member import Member
from .options import Options
from .recipe import Cascade, Ensemble, Recipe, is_second_stage, members_of, models_of
from .resampling import spline_arguments
from .volume import Geometry

Prices = Mapping[str, Price]
"""Of each member that is predicted."""

_FLOAT32, _LABEL = 4, 2


def prices_of(
    bundle: ModelBundle,
    geometry: Geometry,
    channels: int,
    settings: Mapping[str, Settings],
    options: Options,
    *,
    has_previous: bool = False,
) -> dict[str, Price]:
    """What each member costs that the case needs.

    Args:
        bundle: the model.
        geometry: of the image, as the model sees it.
        channels: images that came.
        settings: of each member.
        options: what is asked for.
        has_previous: the labels of a cascade's first stage came with the request, so that it is not predicted.

    Raises:
        TooThin: no voxel would be left on an axis of a network's grid.
        TooLarge: an axis is longer than any image's.
    """
    return {
        name: price_of(bundle, name, geometry, channels, settings[name], options)
        for name in predicted_members(bundle.description.recipe, has_previous=has_previous)
    }


def price_of(
    bundle: ModelBundle,
    name: str,
    geometry: Geometry,
    channels: int,
    settings: Settings,
    options: Options,
    known_grid: tuple[int, int, int] | None = None,
) -> Price:
    """What one member costs that the case needs; arguments as those of :func:`prices_of` and :func:`~.cases.price`."""
    recipe, member = bundle.description.recipe, bundle.members[name]
    previous = len(member.labels.foreground_labels) if is_second_stage(recipe, name) else 0
    if isinstance(recipe, Ensemble):
        wanted = _with_probabilities(options, wanted=not mean_in_blocks(bundle))
    else:
        wanted = options if name == recipe.member else _with_probabilities(options, wanted=False)
    return price(member, geometry, channels, settings, wanted, known_grid, previous)


def predicted_members(recipe: Recipe, *, has_previous: bool = False) -> list[str]:
    """The members that are predicted for a case, each once, in their order."""
    if isinstance(recipe, Cascade) and has_previous:
        return [recipe.member]
    return list(dict.fromkeys(members_of(recipe)))


def whole_price(
    bundle: ModelBundle, prices: Prices, geometry: Geometry, channels: int, options: Options, making: int = 0
) -> Price:
    """What the case costs in all.

    Args:
        bundle: the model.
        prices: of :func:`prices_of`.
        geometry: of the image.
        channels: images that came.
        options: what is asked for.
        making: bytes that the answer's files take while they are made, beside the label map and probabilities.
    """
    recipe, each = bundle.description.recipe, list(prices.values())
    last = each[-1]
    answer = geometry.voxels * (_LABEL + options.probability_bytes(bundle.lead.classes))
    at_work = max(
        *(price.bytes for price in each),
        _postprocessing_bytes(bundle, geometry, answer, options),
        int(SAFETY * (answer + making)),
    )
    if len(each) == 1:
        return replace(last, bytes=at_work)
    stay = [prices[name] for name in models_of(recipe)] if isinstance(recipe, Ensemble) else []
    if stay:
        at_work = max(at_work, _mean_bytes(bundle, prices, geometry, options))
    image_and_labels = geometry.voxels * (channels * _FLOAT32 + _LABEL)
    return Price(
        grid=max((price.grid for price in each), key=math.prod),
        patches=sum(price.patches for price in each),
        passes=sum(price.passes for price in each),
        bytes=at_work + image_and_labels + sum(price.logits_bytes for price in stay),
        preprocess_s=sum(price.preprocess_s for price in each),
        export_s=sum(price.export_s for price in stay or [last]),
        is_guess=any(price.is_guess for price in each),
    )


def affordable_case(prices: Prices, whole: Price, limits: Limits, geometry: Geometry) -> Price:
    """The whole price, unless it or a member's can never be paid here; see :func:`~.cases.affordable`."""
    for each in prices.values():
        affordable(each, limits, geometry)
    return affordable(whole, limits, geometry)


def _postprocessing_bytes(bundle: ModelBundle, geometry: Geometry, answer: int, options: Options) -> int:
    """What the archive's postprocessing takes, with the answer."""
    if bundle.description.postprocessing is None or options.postprocess is False:
        return 0
    return answer + postprocessing.memory_bytes(geometry.voxels)


def mean_in_blocks(bundle: ModelBundle) -> bool:
    """Whether an ensemble's mean can surely be made block by block; see :mod:`.export.ensemble`."""
    members = list(bundle.members.values())

    def in_blocks(member: Member) -> bool:
        arguments = spline_arguments(member.configuration.resampling_fn_probabilities)
        known = arguments is not None and arguments.order == 1
        is_default = not member.labels.has_regions and not member.has_own_export
        # somebody's own may crop where nnU-Net's does not
        is_default = is_default and member.configuration.preprocessor_class is DefaultPreprocessor
        return known and is_default and member.plans.transpose_forward == bundle.lead.plans.transpose_forward

    return all(in_blocks(member) for member in members)


def _mean_bytes(bundle: ModelBundle, prices: Prices, geometry: Geometry, options: Options) -> int:
    """What an ensemble's export takes: as much as one model's; two whole ones where the mean is not made in blocks."""
    whole = 0 if mean_in_blocks(bundle) else bundle.lead.classes * 2 * _FLOAT32 * geometry.voxels

    def one(name: str) -> int:
        member = bundle.members[name]
        shape = [geometry.shape[axis] for axis in member.plans.transpose_forward]
        return export_bytes(member, shape, prices[name].grid, options)

    return int(SAFETY * (max(map(one, models_of(bundle.description.recipe))) + whole))


def _with_probabilities(options: Options, *, wanted: bool) -> Options:
    """Options for a member whose probabilities only we see, if anybody."""
    return options.model_copy(update={"save_probabilities": wanted, "probability_channels": None})
