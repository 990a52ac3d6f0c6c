"""What a whole case costs: the prices of its members, put together as the recipe does.

One request is one case, whatever the number of members: it is charged once, for its peak. Members are predicted one
after the other. While one is worked on, what the others have left is held: an ensemble's logits until the last is
there, a cascade's labels, the image itself until nobody needs it any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from .bundle import ModelBundle
from .cases import Price, Settings, affordable, price
from .export import postprocessing
from .limits import Limits
from .member import Member
from .options import Options
from .recipe import Cascade, Ensemble, Recipe, is_second_stage, members_of
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
    recipe = bundle.description.recipe
    prices: dict[str, Price] = {}
    for name in predicted_members(recipe, has_previous=has_previous):
        member = bundle.members[name]
        previous = len(member.labels.foreground_labels) if is_second_stage(recipe, name) else 0
        is_last = not isinstance(recipe, Cascade) or name == recipe.member
        if isinstance(recipe, Ensemble):
            wanted = _with_probabilities(options, wanted=not mean_in_blocks(bundle))
        else:
            wanted = options if is_last else _with_probabilities(options, wanted=False)
        prices[name] = price(member, geometry, channels, settings[name], wanted, previous=previous)
    return prices


def predicted_members(recipe: Recipe, *, has_previous: bool = False) -> list[str]:
    """The members that are predicted for a case, each once, in their order."""
    if isinstance(recipe, Cascade) and has_previous:
        return [recipe.member]
    return list(dict.fromkeys(members_of(recipe)))


def whole_price(bundle: ModelBundle, prices: Prices, geometry: Geometry, channels: int, options: Options) -> Price:
    """What the case costs in all.

    Args:
        bundle: the model.
        prices: of :func:`prices_of`.
        geometry: of the image.
        channels: images that came.
        options: what is asked for.
    """
    each = list(prices.values())
    last = each[-1]
    if len(each) == 1:
        return replace(last, bytes=max(last.bytes, _postprocessing_bytes(bundle, geometry, options)))
    image = channels * geometry.voxels * _FLOAT32
    kept = image + sum(price.logits_bytes for price in each) + geometry.voxels * _LABEL
    at_work = max(*(price.bytes for price in each), _postprocessing_bytes(bundle, geometry, options))
    if isinstance(bundle.description.recipe, Ensemble):
        classes = bundle.lead.classes
        at_work = max(at_work, _mean_bytes(bundle, geometry, options))
        export_s = sum(price.export_s for price in each)
    else:
        classes, export_s = 0, last.export_s
    return Price(
        grid=max((price.grid for price in each), key=math.prod),
        patches=sum(price.patches for price in each),
        passes=sum(price.passes for price in each),
        bytes=at_work + kept,
        logits_bytes=sum(price.logits_bytes for price in each) if classes else last.logits_bytes,
        preprocess_s=sum(price.preprocess_s for price in each),
        export_s=export_s,
        is_guess=any(price.is_guess for price in each),
    )


def affordable_case(prices: Prices, whole: Price, limits: Limits, geometry: Geometry) -> Price:
    """The whole price, unless it or a member's can never be paid here; see :func:`~.cases.affordable`."""
    for each in prices.values():
        affordable(each, limits, geometry)
    return affordable(whole, limits, geometry)


def _postprocessing_bytes(bundle: ModelBundle, geometry: Geometry, options: Options) -> int:
    """What the archive's postprocessing takes, beside the answer."""
    if bundle.description.postprocessing is None or options.postprocess is False:
        return 0
    answer = geometry.voxels * (_LABEL + options.probability_bytes(bundle.lead.classes))
    return answer + postprocessing.memory_bytes(geometry.voxels)


def mean_in_blocks(bundle: ModelBundle) -> bool:
    """Whether an ensemble's mean can surely be made block by block; see :mod:`.export.ensemble`."""
    members = list(bundle.members.values())

    def in_blocks(member: Member) -> bool:
        arguments = spline_arguments(member.configuration.resampling_fn_probabilities)
        known = arguments is not None and arguments.order == 1
        is_default = not member.labels.has_regions and not member.has_own_label_manager
        return known and is_default and member.plans.transpose_forward == bundle.lead.plans.transpose_forward

    return all(in_blocks(member) for member in members)


def _mean_bytes(bundle: ModelBundle, geometry: Geometry, options: Options) -> int:
    """What the mean of probabilities takes: where it is not made in blocks, all of it and all of one member's."""
    classes = bundle.lead.classes
    whole = 0 if mean_in_blocks(bundle) else classes * 2 * _FLOAT32
    return geometry.voxels * (2 * options.probability_bytes(classes) + whole)


def _with_probabilities(options: Options, *, wanted: bool) -> Options:
    """Options for a member whose probabilities only we see, if anybody."""
    return options.model_copy(update={"save_probabilities": wanted, "probability_channels": None})
