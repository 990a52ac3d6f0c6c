"""One trained configuration of an archive: what nnU-Net's files say of it, and its weights.

A *member* has a folder of its own in the archive: nnU-Net's plans.json and dataset.json, each fold's weights as
safetensors, a golden patch. What plans.json names to be imported was checked when the archive was made, and the
archive's checksums say it has not changed since.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .label_manager import decides_as_default, output_names, painting_of, paints_as_default
from .member_description import DATASET_FILE, PLANS_FILE, FoldDescription, MemberDescription
from .options import FoldName
from .own_code import Kind, OwnCode, OwnName
from .painting import Painting
from .stored_tensors import read_tensors

if TYPE_CHECKING:
    import torch
    from nnunetv2.utilities.label_handling.label_handling import LabelManager
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

    from .names import Names

REORIENTING_READERS = {"SimpleITKIOWithReorient": "RAS", "NibabelIOWithReorient": "RAS"}
"""nnU-Net's readers that turn every image, and where to."""

_UINT8_CLASSES = 255
_LARGEST = {False: 2**8 - 1, True: 2**16 - 1}
"""What fits the type that nnU-Net writes labels in: 16 bits from so many foreground labels on."""


class Member:
    """A member of an unpacked archive."""

    _own: tuple[OwnName, ...] = ()
    _code: OwnCode | None = None

    def __init__(
        self, archive: Path, description: MemberDescription, own: Iterable[OwnName] = (), code: OwnCode | None = None
    ) -> None:
        """Nothing is read yet.

        Args:
            archive: the folder of the archive.
            description: what ``bundle.json`` says.
            own: names that the archive's own code has.
            code: that code; ``None`` if it is not to be run.
        """
        self.description = description
        self.archive = archive
        self.folder = archive / description.folder
        self._own, self._code = tuple(own), code

    def __repr__(self) -> str:
        return f"Member({self.name!r})"

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.description.name

    @cached_property
    def dataset(self) -> dict[str, Any]:
        """nnU-Net's dataset.json."""
        return self._json(DATASET_FILE)

    @cached_property
    def names(self) -> Names:
        """What the names in its files mean."""
        from .names import Names

        return Names(self._own, self._code)

    @cached_property
    def plans(self) -> PlansManager:
        """nnU-Net's plans."""
        return self.names.plans(self._json(PLANS_FILE))

    @cached_property
    def configuration(self) -> ConfigurationManager:
        """The configuration that the checkpoints were trained with."""
        return self.plans.get_configuration(self.description.configuration)

    @cached_property
    def labels(self) -> LabelManager:
        """nnU-Net's label manager."""
        return self.plans.get_label_manager(self.dataset)

    @property
    def channel_names(self) -> dict[str, str]:
        """Channel number -> name; ``modality`` counts where there is one, as in nnU-Net."""
        names = self.dataset["modality"] if "modality" in self.dataset else self.dataset["channel_names"]
        numbered = names.items() if isinstance(names, Mapping) else enumerate(names)
        return {str(number): str(name) for number, name in numbered}

    @property
    def channels(self) -> int:
        """Images that a case consists of."""
        return len(self.channel_names)

    @property
    def classes(self) -> int:
        """Output channels of the network: labels with background, or regions without."""
        recorded = self.description.output_names
        return int(self.labels.num_segmentation_heads) if recorded is None else len(recorded)

    @property
    def largest_value(self) -> int:
        """The largest value that a segmentation may have."""
        if not paints_as_default(self.labels):
            return _LARGEST[len(self.labels.foreground_labels) >= _UINT8_CLASSES]
        if self.labels.has_regions:
            return max((int(value) for value in self.dataset.get("regions_class_order") or ()), default=0)
        return self.classes - 1

    @property
    def output_names(self) -> list[str]:
        """The name of each output channel: labels by value, with background; or regions in dataset.json's order."""
        if self.description.output_names is not None:
            return list(self.description.output_names)
        return output_names(self.dataset, self.labels)

    @property
    def painting(self) -> Painting:
        """What the values of a segmentation mean."""
        return painting_of(self.dataset, self.labels)

    @property
    def reader(self) -> str:
        """nnU-Net's image reader that the plan names."""
        name: str = self.plans.plans["image_reader_writer"]
        return name

    @property
    def input_orientation(self) -> str | None:
        """The orientation that the model sees, in nibabel's letters; ``None`` for the image's own."""
        return REORIENTING_READERS.get(self.reader) or self.description.input_orientation

    @cached_property
    def normalizations(self) -> list[Any]:
        """The class that normalises each channel."""
        return [self.names.needed(Kind.NORMALIZATION, name) for name in self.configuration.normalization_schemes]

    @property
    def has_own_export(self) -> bool:
        """Whether somebody's own label manager or resampling function leads from logits to labels."""
        from .resampling import is_somebodys_own

        own_function = is_somebodys_own(self.configuration.resampling_fn_probabilities)
        return own_function or not decides_as_default(self.labels)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Voxels per axis of the network's patch: (z, y, x), or (y, x) for a 2-D configuration."""
        return tuple(int(n) for n in self.configuration.patch_size)

    @property
    def folds(self) -> tuple[FoldName, ...]:
        """The folds that it has."""
        return tuple(fold.fold for fold in self.description.folds)

    def fold(self, name: FoldName) -> FoldDescription:
        """The description of one fold; raises KeyError for one that it lacks."""
        return {fold.fold: fold for fold in self.description.folds}[name]

    def weights(self, fold: FoldName) -> dict[str, torch.Tensor]:
        """The state dict of one fold, aliases restored, on the CPU.

        Raises:
            BundleError: the file is no safetensors file.
        """
        return read_tensors(self.folder / self.fold(fold).weights_file)

    def _json(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / name).read_bytes())
        return content
