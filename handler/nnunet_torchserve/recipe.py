"""How one answer is made of an archive's members.

A recipe is a value that ``bundle.json`` holds. What is done is told by :mod:`.predicting`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .member_description import MemberName


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Single(_Value):
    """One member's answer."""

    kind: Literal["single"] = "single"
    member: MemberName


class Cascade(_Value):
    """One stage's labels are another input of the next.

    Attributes:
        first: what makes those labels; ``None``: they come with each request.
        member: the last stage.
    """

    kind: Literal["cascade"] = "cascade"
    first: Single | None
    member: MemberName


Stage = Annotated[Single | Cascade, Field(discriminator="kind")]


class Ensemble(_Value):
    """The mean of the probabilities of several models.

    Attributes:
        of: in nnU-Net's order, which decides the last bit of a mean.
    """

    kind: Literal["ensemble"] = "ensemble"
    of: Annotated[tuple[Stage, ...], Field(min_length=2)]


Recipe = Annotated[Single | Cascade | Ensemble, Field(discriminator="kind")]


def members_of(recipe: Single | Cascade | Ensemble) -> Iterator[str]:
    """The members that a recipe names, in the order in which they are needed; one may be named twice."""
    if isinstance(recipe, Ensemble):
        for each in recipe.of:
            yield from members_of(each)
        return
    if isinstance(recipe, Cascade) and recipe.first is not None:
        yield from members_of(recipe.first)
    yield recipe.member


def last_stage(recipe: Single | Cascade | Ensemble) -> str:
    """The member that the whole model looks like: the last stage of the first of an ensemble."""
    return last_stage(recipe.of[0]) if isinstance(recipe, Ensemble) else recipe.member


def models_of(recipe: Single | Cascade | Ensemble) -> list[str]:
    """The members whose logits make the answer: the last stages."""
    models = recipe.of if isinstance(recipe, Ensemble) else (recipe,)
    return [model.member for model in models]


def is_second_stage(recipe: Single | Cascade | Ensemble, member: str) -> bool:
    """Whether a member sees the labels of another, or of the client."""
    if isinstance(recipe, Ensemble):
        return any(is_second_stage(each, member) for each in recipe.of)
    return isinstance(recipe, Cascade) and member == recipe.member


def in_words(recipe: Single | Cascade | Ensemble) -> str:
    """For people, as ``ensemble of 3d_fullres and (3d_lowres, then 3d_cascade_fullres)``.

    The client, which knows nothing of this package, says the same of the same recipe (its ``recipe_in_words``).
    """
    if isinstance(recipe, Ensemble):
        each = [f"({in_words(model)})" if isinstance(model, Cascade) else in_words(model) for model in recipe.of]
        return f"ensemble of {', '.join(each[:-1])} and {each[-1]}"
    if isinstance(recipe, Cascade):
        first = "labels that a request brings" if recipe.first is None else in_words(recipe.first)
        return f"{first}, then {recipe.member}"
    return recipe.member
