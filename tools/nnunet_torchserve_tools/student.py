"""The dataset that a student is trained on: nnU-Net's preprocessed cases, their images, and the grids they lie on."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from .errors import ToolError, UsageError
from .json_files import read_object

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the voxels of a preprocessed case lie.

    Axes are those of the preprocessed array; spacings are mm along them.

    Attributes:
        shape: of the array without channels.
        spacing: of its voxels.
        original_spacing: of the image's.
        uncropped_shape: of the image.
        box: the part of the image that preprocessing kept, a (first, beyond the last) for each axis.
        order: which axis of the image each of these axes is (``transpose_forward``).
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    original_spacing: tuple[float, ...]
    uncropped_shape: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], properties: Mapping[str, Any], manager: Any, settings: Any) -> Self:
        """The grid of an array.

        Args:
            shape: (Z, Y, X) of it.
            properties: that the preprocessor has written down.
            manager: nnU-Net's ``PlansManager``.
            settings: its ``ConfigurationManager``.
        """
        order = tuple(manager.transpose_forward)
        original = tuple(float(properties["spacing"][axis]) for axis in order)
        spacing = tuple(map(float, settings.spacing))
        if len(spacing) < len(original):  # a network of planes: slices stay where they are
            spacing = (original[0], *spacing)
        return cls(
            tuple(shape), spacing, original, tuple(map(int, properties["shape_before_cropping"])),
            tuple((int(first), int(end)) for first, end in properties["bbox_used_for_cropping"]), order,
        )  # fmt: skip


def image_channels_of(dataset: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the images of a case, in order.

    Args:
        dataset: dataset.json; nnU-Net takes its older key for them too.
    """
    named: Mapping[str, Any] = dataset.get("channel_names") or dataset["modality"]
    return tuple(str(named[key]) for key in sorted(named, key=int))


def reader_of(manager: Any) -> str:
    """nnU-Net's image reader that plans name.

    Args:
        manager: nnU-Net's ``PlansManager``.
    """
    return str(manager.plans["image_reader_writer"])


class Student:
    """A configuration of plans, and the cases that were preprocessed by it.

    Attributes:
        manager: nnU-Net's ``PlansManager``.
        settings: its ``ConfigurationManager``.
        dataset: dataset.json.
        folder: of the preprocessed cases.
    """

    def __init__(self, plans_file: Path, configuration: str) -> None:
        """Read the plans.

        Args:
            plans_file: of the dataset's folder below ``nnUNet_preprocessed``; dataset.json is beside it.
            configuration: as ``3d_fullres``.

        Raises:
            UsageError: files that are not there, or no such configuration.
            ToolError: they are not nnU-Net's.
        """
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        hint = "name the plans in the dataset's folder below nnUNet_preprocessed"
        plans = read_object(plans_file, f"{plans_file} cannot be read; {hint}")
        dataset_file = plans_file.with_name("dataset.json")
        self.dataset: Json = read_object(dataset_file, f"{dataset_file} cannot be read; {hint}")
        named = plans.get("configurations")
        if not isinstance(named, dict) or configuration not in named:
            msg = f"{plans_file} has no configuration {configuration}; it has {', '.join(named or ()) or 'none'}"
            raise UsageError(msg)
        self.manager = PlansManager(copy.deepcopy(plans))
        self.settings = self.manager.get_configuration(configuration)
        self.folder = plans_file.parent / self.settings.data_identifier
        if not self.folder.is_dir():
            msg = f"{self.folder} is not there: nnUNetv2_preprocess makes it"
            raise UsageError(msg)

    @cached_property
    def label_manager(self) -> Any:
        """nnU-Net's ``LabelManager``."""
        return self.manager.get_label_manager(self.dataset)

    @cached_property
    def image_channels(self) -> tuple[str, ...]:
        """Names of the images of a case, in order."""
        return image_channels_of(self.dataset)

    @cached_property
    def cases(self) -> list[str]:
        """Names of the preprocessed cases, sorted."""
        return sorted(self._preprocessed.identifiers)

    @property
    def reader(self) -> str:
        """nnU-Net's image reader, by which the cases were preprocessed."""
        return reader_of(self.manager)

    def grid(self, case: str) -> Grid:
        """Where the voxels of a preprocessed case lie."""
        image, _, _, properties = self._preprocessed.load_case(case)
        return Grid.of(image.shape[1:], properties, self.manager, self.settings)

    def images(self, case: str) -> list[str]:
        """The image files of a case, one for each channel.

        Raises:
            UsageError: ``nnUNet_raw`` is not set.
            ToolError: the dataset's folder there does not have them.
        """
        if case not in self._images:
            msg = f"nnUNet_raw has no images of {case}, which was preprocessed: its dataset must be the same"
            raise ToolError(msg)
        return self._images[case]

    @cached_property
    def _preprocessed(self) -> Any:
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

        try:
            return infer_dataset_class(str(self.folder))(str(self.folder))
        except (AssertionError, KeyError) as error:
            msg = f"{self.folder} holds no preprocessed cases: nnUNetv2_preprocess makes them"
            raise ToolError(msg) from error

    @cached_property
    def _images(self) -> dict[str, list[str]]:
        from nnunetv2.paths import nnUNet_raw
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

        if not nnUNet_raw.is_set():
            msg = "nnUNet_raw is not set: the teacher predicts the images below it"
            raise UsageError(msg)
        folder = Path(str(nnUNet_raw)) / self.manager.dataset_name
        try:
            files = get_filenames_of_train_images_and_targets(str(folder), copy.deepcopy(self.dataset))
        except (OSError, KeyError) as error:
            msg = f"{folder} has no images of the dataset in imagesTr: set nnUNet_raw to the folder that has it"
            raise ToolError(msg) from error
        return {case: [str(file) for file in each["images"]] for case, each in files.items()}
