"""One trained configuration of an archive: what nnU-Net's files say of it, and its weights.

A *member* has a folder of its own in the archive: nnU-Net's plans.json and dataset.json, each fold's weights as
safetensors, a golden patch. What plans.json names to be imported was checked when the archive was made, and the
archive's checksums say it has not changed since.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open

from .errors import BundleError
from .options import FoldName
from .own_code import Kind, OwnCode, OwnName
from .painting import Painting, integers, read_painting, unknown_painting

if TYPE_CHECKING:
    import torch
    from nnunetv2.utilities.label_handling.label_handling import LabelManager
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

    from .names import Names

MEMBERS_FOLDER = "members"
PLANS_FILE = "plans.json"
DATASET_FILE = "dataset.json"
GOLDEN_FILE = "golden.safetensors"
ALIASES_KEY = "aliases"
"""Key of the safetensors metadata: JSON, name of an aliased tensor -> name under which it is stored."""

REORIENTING_READERS = {"SimpleITKIOWithReorient": "RAS", "NibabelIOWithReorient": "RAS"}
"""nnU-Net's readers that turn every image, and where to."""

_HASH_CHUNK_BYTES = 1024**2

_UINT8_CLASSES = 255
_LARGEST = {False: 2**8 - 1, True: 2**16 - 1}
"""What fits the type that nnU-Net writes labels in: 16 bits from so many foreground labels on."""

MemberName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
"""A folder's name, and what requests and messages call the member."""


class NetworkBuilder(StrEnum):
    """Who builds the network: nnU-Net's ``get_network_from_plans``, or the trainer class's own method."""

    PLANS = "plans"
    TRAINER = "trainer"


class FoldDescription(BaseModel):
    """One trained fold.

    Attributes:
        fold: its number, or ``"all"``.
        mirroring_axes: the checkpoint's ``inference_allowed_mirroring_axes``, spatial axes from 0.
        checkpoint_sha256: of the .pth file it came from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fold: FoldName
    mirroring_axes: tuple[int, ...] | None
    checkpoint_sha256: str

    @property
    def weights_file(self) -> str:
        """Where the archive keeps the weights."""
        return f"fold_{self.fold}.safetensors"


class MemberDescription(BaseModel):
    """What ``bundle.json`` says of a member.

    Attributes:
        name: of its folder.
        dataset, trainer, plans, configuration: nnU-Net's names; ``trainer`` is the checkpoints' word.
        network_class: full name of the network's class, as nnU-Net resolved the name in plans.json when the archive was
            made; ``None`` if the plans name none.
        network_trainer: the class, of nnunetv2 or the archive's own code, whose ``build_network_architecture`` builds
            the network, where the plans alone do not say what is built.
        output_names: of the network's channels, where a label manager of the archive's own code says how many there
            are.
        source: trained model folder (its last two names) and checkpoint file name.
        input_orientation: nibabel's letters of the orientation that every image is brought into; ``None``: as sent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: MemberName
    dataset: str
    trainer: str
    plans: str
    configuration: str
    network_builder: NetworkBuilder
    folds: tuple[FoldDescription, ...]
    source: dict[str, str]
    input_orientation: str | None = None
    network_class: str | None = None
    network_trainer: str | None = None
    output_names: tuple[str, ...] | None = None

    @property
    def folder(self) -> str:
        """Where the archive keeps it."""
        return f"{MEMBERS_FOLDER}/{self.name}"

    @property
    def folder_trainer(self) -> str:
        """See :func:`folder_trainer`."""
        return folder_trainer(self.source.get("folder"), self.plans, self.configuration) or self.trainer

    @property
    def files(self) -> list[str]:
        """The archive's files that say what it predicts; the golden patch, which is made of them, is none."""
        return [f"{self.folder}/{name}" for name in (PLANS_FILE, DATASET_FILE, *(f.weights_file for f in self.folds))]


def folder_trainer(folder: str | None, plans: str | None, configuration: str | None) -> str | None:
    """The trainer that nnU-Net's folder of a model is named after, which ``-tr`` of its commands means.

    Checkpoints may name another: the one whose network they hold, so that they predict without the first.

    Args:
        folder: where the model came from, as ``source`` of a member has it: ``DATASET/TRAINER__PLANS__CONFIGURATION``.
        plans: of the model.
        configuration: of the model.

    Returns:
        ``None`` if the folder has been named otherwise.

    >>> folder_trainer("Dataset004_Hippocampus/nnUNetTrainerMine__nnUNetPlans__3d_fullres", "nnUNetPlans", "3d_fullres")
    'nnUNetTrainerMine'
    >>> folder_trainer("models/hippocampus", "nnUNetPlans", "3d_fullres")
    """
    trainer, mark, rest = (folder or "").rpartition("/")[2].partition("__")
    return trainer if trainer.isidentifier() and mark and rest == f"{plans}__{configuration}" else None


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


class OpenWeights:
    """The weights of an archive's members, readable while this process lives, also when the archive's folder is gone.

    The files are kept open and not mapped: that takes no memory, and whoever deletes them only takes their names away
    (the disk has the space again when this process ends). What is read is a copy that nobody else can change, and its
    checksum is that of the archive: a file that was cut or overwritten in its place is an error, where a map of it
    would end the process or, worse, change weights in use. Not thread-safe: one thread reads.
    """

    def __init__(self, members: Iterable[Member], checksums: Mapping[str, str], others: Iterable[str] = ()) -> None:
        """Open every fold's file.

        Args:
            members: of one archive.
            checksums: file of the archive -> sha256.
            others: further files, by their names in the archive.

        Raises:
            BundleError: one cannot be opened.
        """
        self._weights: dict[tuple[str, FoldName], str] = {}
        self._files: dict[str, tuple[int, str]] = {}
        folder = None
        for member in members:
            folder = member.archive
            for fold in member.description.folds:
                name = f"{member.description.folder}/{fold.weights_file}"
                self._weights[member.name, fold.fold] = name
                self._open(folder, name, checksums)
        for name in others:
            if folder is not None:
                self._open(folder, name, checksums)

    def _open(self, folder: Path, name: str, checksums: Mapping[str, str]) -> None:
        try:
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            msg = f"{name} cannot be opened"
            raise BundleError(msg) from error
        self._files[name] = (descriptor, checksums[name])

    def read(self, member: str, fold: FoldName) -> dict[str, torch.Tensor]:
        """As :meth:`Member.weights`; while the result is in use it takes as much memory as the file is long.

        Raises:
            BundleError: the file is no longer what the archive held.
            MemoryError: there is no memory for it.
            OSError: it cannot be read.
        """
        name = self._weights[member, fold]
        with os.fdopen(os.memfd_create("nnunet-weights", os.MFD_CLOEXEC), "wb") as copy:
            self._copy(name, copy)
            copy.flush()
            try:
                return read_tensors(Path(f"/proc/self/fd/{copy.fileno()}"))
            except BundleError as error:  # the checksum says that nothing is wrong with it
                msg = f"no memory to read {name}"
                raise MemoryError(msg) from error

    def content(self, file: str) -> bytes:
        """One of the further files; raises what :meth:`read` raises."""
        copy = io.BytesIO()
        self._copy(file, copy)
        return copy.getvalue()

    def _copy(self, name: str, target: BinaryIO) -> None:
        """Copy a file, and compare what was copied with the archive's checksum."""
        descriptor, expected = self._files[name]
        digest, position = hashlib.sha256(), 0
        while chunk := os.pread(descriptor, _HASH_CHUNK_BYTES, position):
            digest.update(chunk)
            target.write(chunk)
            position += len(chunk)
        if digest.hexdigest() != expected:
            msg = f"{name} has changed since this process started"
            raise BundleError(msg)


def output_names(dataset: Mapping[str, Any], labels: LabelManager) -> list[str]:
    """The name of each of a network's output channels.

    Args:
        dataset: nnU-Net's dataset.json.
        labels: its label manager; one whose channels are not labels or regions of that file has numbers for names.
    """
    declared = {name: label for name, label in dataset["labels"].items() if name != "ignore"}
    if labels.has_regions:
        names = [name for name, label in declared.items() if labels.filter_background([label])]
    else:
        named = {name: integers(label) for name, label in declared.items()}
        names = [" / ".join(name for name, values in named.items() if value in values) for value in labels.all_labels]
    count = int(labels.num_segmentation_heads)
    return names if len(names) == count else [f"channel {number}" for number in range(count)]


def painting_of(dataset: Mapping[str, Any], labels: LabelManager) -> Painting:
    """What the values of a segmentation mean.

    Args:
        dataset: nnU-Net's dataset.json.
        labels: its label manager.
    """
    if not paints_as_default(labels):
        return unknown_painting(dataset["labels"], type(labels).__name__)
    return read_painting(dataset["labels"], dataset.get("regions_class_order"), has_regions=labels.has_regions)


def paints_as_default(labels: LabelManager) -> bool:
    """Whether the values of a segmentation mean what they mean to nnU-Net's default label manager.

    Another nonlinearity changes nothing of that.
    """
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    kind = type(labels)
    if kind is LabelManager:
        return True
    paint = ("convert_probabilities_to_segmentation", "convert_logits_to_segmentation")
    if any(getattr(kind, name, None) is not getattr(LabelManager, name) for name in paint):
        return False
    try:
        default = LabelManager(labels.label_dict, labels.regions_class_order)
    except AssertionError:  # labels that it does not take
        return False
    says = ("has_regions", "all_regions", "all_labels", "num_segmentation_heads", "regions_class_order")
    return all(getattr(labels, name) == getattr(default, name) for name in says)


def decides_as_default(labels: LabelManager) -> bool:
    """Whether nnU-Net's default label manager decides, with its default nonlinearity."""
    import torch
    from nnunetv2.utilities.helpers import softmax_helper_dim0
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    nonlinearity = torch.sigmoid if labels.has_regions else softmax_helper_dim0
    return type(labels) is LabelManager and labels.inference_nonlin is nonlinearity


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file; names in its alias map share the stored tensor's memory."""
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
            aliases: dict[str, str] = json.loads((stored.metadata() or {}).get(ALIASES_KEY, "{}"))
    except Exception as error:
        msg = f"{file.name} cannot be read as safetensors"
        raise BundleError(msg) from error
    return tensors | {name: tensors[target] for name, target in aliases.items()}
