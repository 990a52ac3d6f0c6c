"""What an archive holds, read without opening a pickle.

``bundle.json`` describes the model and carries the sha256 of every other file, the serving core included; its own
sha256 is the model's digest. Weights are safetensors; plans.json and dataset.json are nnU-Net's own. What plans.json
names to be imported was checked when the archive was made, and the checksum says it has not changed since.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open

from .errors import BundleError
from .options import FoldName
from .painting import Painting, integers, read_painting

if TYPE_CHECKING:
    import torch
    from nnunetv2.utilities.label_handling.label_handling import LabelManager
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

SCHEMA_VERSION = 1
BUNDLE_FILE = "bundle.json"
PLANS_FILE = "plans.json"
DATASET_FILE = "dataset.json"
GOLDEN_FILE = "golden.safetensors"
ALIASES_KEY = "aliases"
"""Key of the safetensors metadata: JSON, name of an aliased tensor -> name under which it is stored."""

REORIENTING_READERS = {"SimpleITKIOWithReorient": "RAS", "NibabelIOWithReorient": "RAS"}
"""nnU-Net's readers that turn every image, and where to."""

_HASH_CHUNK_BYTES = 1024**2


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


class BundleDescription(BaseModel):
    """The content of ``bundle.json``.

    Attributes:
        requires: package -> version specifier, checked at load.
        network_class: full name of the network's class, as nnU-Net resolved the name in plans.json when the archive was
            made; ``None`` if the plans name none.
        network_trainer: the class of nnunetv2 whose ``build_network_architecture`` builds the network, where the plans
            alone do not say what is built.
        built_with: package -> version, for the record.
        files: file -> sha256, every file of the archive but this one, the manifest and model-config.yaml.
        source: trained model folder (its last two names) and checkpoint file name.
        input_orientation: nibabel's letters of the orientation that every image is brought into; ``None``: as sent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    name: str
    version: str
    dataset: str
    trainer: str
    plans: str
    configuration: str
    network_builder: NetworkBuilder
    folds: tuple[FoldDescription, ...]
    requires: dict[str, str]
    built_with: dict[str, str]
    source: dict[str, str]
    files: dict[str, str]
    input_orientation: str | None = None
    network_class: str | None = None
    network_trainer: str | None = None


class ModelBundle:
    """A model folder as TorchServe unpacks it."""

    def __init__(self, folder: Path) -> None:
        """Read ``bundle.json``, check requirements and every file's checksum.

        Raises:
            BundleError: damaged, of another schema, or its requirements are not met; the message says which.
        """
        self.folder = folder
        try:
            text = (folder / BUNDLE_FILE).read_bytes()
            schema = json.loads(text).get("schema_version")
        except (OSError, ValueError, AttributeError) as error:
            msg = f"the archive has no readable {BUNDLE_FILE}; make it with 'nnunet-torchserve archive'"
            raise BundleError(msg) from error
        if schema != SCHEMA_VERSION:
            msg = f"the archive has schema {schema}, this serving core reads {SCHEMA_VERSION}; make the archive again"
            raise BundleError(msg)
        try:
            self.description = BundleDescription.model_validate_json(text)
        except ValidationError as error:
            msg = f"{BUNDLE_FILE} is not valid: {error}"
            raise BundleError(msg) from error
        self.digest = hashlib.sha256(text).hexdigest()
        check_requirements(self.description.requires)
        for name, expected in self.description.files.items():
            if (actual := sha256_of_file(folder / name)) != expected:
                msg = f"{name} has sha256 {actual[:12]}…, the archive was made with {expected[:12]}…: it is damaged"
                raise BundleError(msg)

    @cached_property
    def dataset(self) -> dict[str, Any]:
        """nnU-Net's dataset.json."""
        return self._json(DATASET_FILE)

    @cached_property
    def plans(self) -> PlansManager:
        """nnU-Net's plans."""
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        return PlansManager(self._json(PLANS_FILE))

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
        return int(self.labels.num_segmentation_heads)

    @property
    def largest_value(self) -> int:
        """The largest value that a segmentation may have."""
        if self.labels.has_regions:
            return max((int(value) for value in self.dataset.get("regions_class_order") or ()), default=0)
        return self.classes - 1

    @property
    def output_names(self) -> list[str]:
        """The name of each output channel: labels by value, with background; or regions in dataset.json's order."""
        declared = {name: label for name, label in self.dataset["labels"].items() if name != "ignore"}
        if self.labels.has_regions:
            return [name for name, label in declared.items() if self.labels.filter_background([label])]
        named = {name: integers(label) for name, label in declared.items()}
        return [
            " / ".join(name for name, values in named.items() if value in values) for value in self.labels.all_labels
        ]

    @property
    def painting(self) -> Painting:
        """What the values of a segmentation mean."""
        order = self.dataset.get("regions_class_order")
        return read_painting(self.dataset["labels"], order, has_regions=self.labels.has_regions)

    @property
    def reader(self) -> str:
        """nnU-Net's image reader that the plan names."""
        name: str = self.plans.plans["image_reader_writer"]
        return name

    @property
    def input_orientation(self) -> str | None:
        """The orientation that the model sees, in nibabel's letters; ``None`` for the image's own."""
        return REORIENTING_READERS.get(self.reader) or self.description.input_orientation

    @property
    def has_own_label_manager(self) -> bool:
        """Whether the plan names another label manager than nnU-Net's default."""
        return not decides_as_default(self.labels)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Voxels per axis of the network's patch: (z, y, x), or (y, x) for a 2-D configuration."""
        return tuple(int(n) for n in self.configuration.patch_size)

    @property
    def folds(self) -> tuple[FoldName, ...]:
        """The folds in the archive."""
        return tuple(fold.fold for fold in self.description.folds)

    def fold(self, name: FoldName) -> FoldDescription:
        """The description of one fold; raises KeyError for a fold that the archive lacks."""
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
    """The weights of an archive, readable for as long as this process lives, also when the archive's directory is gone.

    The files are kept open and not mapped: that takes no memory, and whoever deletes them only takes their names away
    (the disk has the space again when this process ends). What is read is a copy that nobody else can change, and its
    checksum is that of the archive: a file that was cut or overwritten in its place is an error, where a map of it
    would end the process or, worse, change weights in use. Not thread-safe: one thread reads.
    """

    def __init__(self, bundle: ModelBundle) -> None:
        """Open every fold's file.

        Raises:
            BundleError: one cannot be opened.
        """
        self._files: dict[FoldName, tuple[str, int, str]] = {}
        for fold in bundle.description.folds:
            name = fold.weights_file
            try:
                descriptor = os.open(bundle.folder / name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                msg = f"{name} cannot be opened"
                raise BundleError(msg) from error
            self._files[fold.fold] = (name, descriptor, bundle.description.files[name])

    def read(self, fold: FoldName) -> dict[str, torch.Tensor]:
        """As :meth:`ModelBundle.weights`; while the result is in use it takes as much memory as the file is long.

        Raises:
            BundleError: the file is no longer what the archive held.
            MemoryError: there is no memory for it.
            OSError: it cannot be read.
        """
        name, descriptor, expected = self._files[fold]
        digest, position = hashlib.sha256(), 0
        with os.fdopen(os.memfd_create("nnunet-weights", os.MFD_CLOEXEC), "wb") as copy:
            while chunk := os.pread(descriptor, _HASH_CHUNK_BYTES, position):
                digest.update(chunk)
                copy.write(chunk)
                position += len(chunk)
            copy.flush()
            if digest.hexdigest() != expected:
                msg = f"{name} has changed since this process started"
                raise BundleError(msg)
            try:
                return read_tensors(Path(f"/proc/self/fd/{copy.fileno()}"))
            except BundleError as error:  # the checksum says that nothing is wrong with it
                msg = f"no memory to read {name}"
                raise MemoryError(msg) from error


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


def check_requirements(requires: Mapping[str, str]) -> None:
    """Raise :class:`BundleError` unless every package is installed in a version that fits."""
    for package, specifier in requires.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            msg = f"the archive needs {package}{specifier}, which is not installed"
            raise BundleError(msg) from None
        if not SpecifierSet(specifier).contains(installed, prereleases=True):
            msg = f"the archive needs {package}{specifier}; {installed} is installed"
            raise BundleError(msg)


def sha256_of_file(file: Path) -> str:
    """Hex sha256 of a file; raises :class:`BundleError` if it is missing."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        msg = f"{file.name} is missing from the archive"
        raise BundleError(msg) from error
    return digest.hexdigest()
