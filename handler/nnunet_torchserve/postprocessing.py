"""What is done to a label map after the network: a value that bundle.json can hold.

nnU-Net pickles functions and their arguments (``postprocessing.pkl``). Of its own functions there is one that it ever
writes there. So a step says whose it is by nnU-Net's own name, and has that function's arguments as numbers; nothing
of it has to be imported.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

LARGEST_LABEL = 2**16 - 1
"""nnU-Net writes label maps of at most 16 bits."""

Label = Annotated[int, Field(strict=True, ge=0, le=LARGEST_LABEL)]


class KeepLargest(BaseModel):
    """Only the largest component of some labels stays; where several are the largest, all of them.

    Attributes:
        function: nnU-Net's name of it.
        labels: values of the label map, taken together: what any of them touches is one component. Of a model that
            was trained on regions these are values that were painted, as nnU-Net takes them. None: nothing is done.
        background: the value of what is removed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    function: Literal["remove_all_but_largest_component_from_segmentation"] = (
        "remove_all_but_largest_component_from_segmentation"
    )
    labels: tuple[Label, ...]
    background: Label = 0


class Postprocessing(BaseModel):
    """Steps, in the order in which they are done.

    Attributes:
        steps: none is what nnU-Net finds when no step improves a model's Dice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[KeepLargest, ...] = ()
