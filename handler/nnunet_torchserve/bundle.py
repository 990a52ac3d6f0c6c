"""What an archive holds, read without opening a pickle.

``bundle.json`` describes the model: its *members* (:mod:`.member`) and the *recipe* that makes one answer of them
(:mod:`.recipe`). It carries the sha256 of every other file, the serving core included; its own sha256 is the model's
digest.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path

from packaging.specifiers import SpecifierSet
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from .errors import BundleError
from .member import Member, MemberDescription
from .postprocessing import Postprocessing
from .recipe import Recipe, last_stage, members_of

SCHEMA_VERSION = 2
BUNDLE_FILE = "bundle.json"

_HASH_CHUNK_BYTES = 1024**2


class BundleDescription(BaseModel):
    """The content of ``bundle.json``.

    Attributes:
        members: in the order in which the recipe names them.
        recipe: what is made of them.
        postprocessing: what is done to the labels then, unless a request says otherwise.
        requires: package -> version specifier, checked at load.
        built_with: package -> version, for the record.
        files: file -> sha256, every file of the archive but this one, the manifest and model-config.yaml.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    name: str
    version: str
    members: tuple[MemberDescription, ...]
    recipe: Recipe
    postprocessing: Postprocessing | None = None
    requires: dict[str, str]
    built_with: dict[str, str]
    files: dict[str, str]

    @model_validator(mode="after")
    def _members_are_those_of_the_recipe(self) -> BundleDescription:
        if [member.name for member in self.members] != list(dict.fromkeys(members_of(self.recipe))):
            msg = "the recipe names other members than there are"
            raise ValueError(msg)
        return self


class ModelBundle:
    """A model folder as TorchServe unpacks it.

    Attributes:
        members: name -> member, in the order in which the recipe names them.
        lead: the member whose labels, channels and reader the whole model has, as all members of an ensemble have; of
            a cascade its last stage.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        """Read ``bundle.json``, check requirements and every file's checksum.

        Args:
            folder: of the archive.
            verify: ``False`` leaves requirements and checksums to whoever only reads what the archive says.

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
        if verify:
            self._verify()
        self.members = {member.name: Member(folder, member) for member in self.description.members}
        self.lead = self.members[last_stage(self.description.recipe)]

    def _verify(self) -> None:
        check_requirements(self.description.requires)
        for name, expected in self.description.files.items():
            if (actual := sha256_of_file(self.folder / name)) != expected:
                msg = f"{name} has sha256 {actual[:12]}…, the archive was made with {expected[:12]}…: it is damaged"
                raise BundleError(msg)


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
