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

from .accuracy import ACCURACY_FILE, AccuracyReport, read_accuracy
from .agreement import Trained, check_recipe
from .backend import StoredBackend
from .errors import BundleError
from .member import Member
from .member_description import PLANS_FILE, MemberDescription
from .own_code import CODE_FOLDER, CodeDescription, OwnCode
from .postprocessing import Postprocessing
from .recipe import Recipe, last_stage, members_of
from .segments import SEGMENTS_FILE, Codes, read_segments

SCHEMA_VERSION = 2
BUNDLE_FILE = "bundle.json"

_HASH_CHUNK_BYTES = 1024**2


class BundleDescription(BaseModel):
    """The content of ``bundle.json``.

    Attributes:
        members: in the order in which the recipe names them.
        recipe: what is made of them.
        postprocessing: what is done to the labels then, unless a request says otherwise.
        code: what the archive brings along of somebody's own, if anything.
        backend: what was made ahead for another backend than eager, if anything.
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
    code: CodeDescription | None = None
    backend: StoredBackend | None = None
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
        codes: what its structures are, as far as its owner said it.
        accuracy: how far its other backend's answers are from eager's, where that was measured; a server whose
            answers are others (:mod:`.measured_here`) sets it to ``None``.
        lead: the member whose labels, channels and reader the whole model has, as all members of an ensemble have; of
            a cascade its last stage.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        """Read ``bundle.json``, check requirements and every file's checksum.

        Args:
            folder: of the archive.
            verify: ``False`` leaves requirements, checksums and :meth:`check_members` to whoever only reads what the
                archive says; no code of the archive's own is run then.

        Raises:
            BundleError: damaged, of another schema, its requirements are not met, or the recipe contradicts its
                members; the message says which.
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
        code = None
        if verify:
            self._verify()
            code = self._own_code()
        own = self.description.code.names if self.description.code is not None else ()
        self.members = {member.name: Member(folder, member, own, code) for member in self.description.members}
        self.lead = self.members[last_stage(self.description.recipe)]
        self.codes = self._read_codes()
        self.accuracy = self._read_accuracy()
        if verify:
            self.check_members()

    def check_members(self) -> None:
        """Refuse what ``bundle.json`` says of the members and nnU-Net's own files do not.

        Raises:
            BundleError: a member has another dataset or other plans, or the recipe contradicts the members; see
                :func:`~.agreement.check_recipe`.
        """
        members = {name: _trained(member) for name, member in self.members.items()}
        check_recipe(self.description.recipe, members)

    def _read_codes(self) -> Codes:
        if SEGMENTS_FILE not in self.description.files:
            return {}
        try:
            return read_segments((self.folder / SEGMENTS_FILE).read_bytes())
        except (OSError, ValueError) as error:
            msg = f"{SEGMENTS_FILE} of the archive cannot be read: {error}"
            raise BundleError(msg) from error

    def _read_accuracy(self) -> AccuracyReport | None:
        if ACCURACY_FILE not in self.description.files:
            return None
        try:
            text = (self.folder / ACCURACY_FILE).read_bytes()
        except OSError as error:
            msg = f"{ACCURACY_FILE} is missing from the archive"
            raise BundleError(msg) from error
        return read_accuracy(text, self.description.backend, self.description.files)

    def _own_code(self) -> OwnCode | None:
        """The archive's own code as the checksums know it, whatever becomes of the files; nothing is run."""
        if self.description.code is None:
            return None
        sources = {}
        for file in self.description.code.files:
            name = f"{CODE_FOLDER}/{file}"
            try:
                sources[file] = (self.folder / name).read_bytes()
            except OSError as error:
                msg = f"{name} is missing from the archive"
                raise BundleError(msg) from error
            _check_digest(name, hashlib.sha256(sources[file]).hexdigest(), self.description.files.get(name))
        return OwnCode(sources)

    def _verify(self) -> None:
        check_requirements(self.description.requires)
        if self.description.code is not None:
            check_requirements(self.description.code.requires, "the archive's own code")
        for name, expected in self.description.files.items():
            _check_digest(name, _sha256_of(self.folder, name), expected)
        for member in self.description.members:
            for name in member.files:
                if name not in self.description.files:
                    msg = f"{name} has no sha256 in {BUNDLE_FILE}: it is damaged; make the archive again"
                    raise BundleError(msg)


def _trained(member: Member) -> Trained:
    """A member, as far as others must agree with it.

    Raises:
        BundleError: its plans are not those that ``bundle.json`` says, or cannot be read.
    """
    said = member.description
    try:
        has = {"dataset": member.plans.dataset_name, "plans": member.plans.plans_name}
        trained = Trained(
            member.name,
            member.plans,
            member.dataset,
            said.configuration,
            said.trainer,
            member.folds,
            member.input_orientation,
        )
    except BundleError:
        raise
    except Exception as error:
        msg = f"{member.name}: {PLANS_FILE} and dataset.json cannot be read: {type(error).__name__} {error}"
        raise BundleError(msg) from error
    for what, name in has.items():
        if name != (wrong := getattr(said, what)):
            msg = f"{BUNDLE_FILE} says that {said.name} has the {what} {wrong}, its {PLANS_FILE} says {name}"
            raise BundleError(msg)
    return trained


def _check_digest(name: str, actual: str, expected: str | None) -> None:
    if actual != expected:
        was = "without it" if expected is None else f"with {expected[:12]}…"
        msg = f"{name} has sha256 {actual[:12]}…, the archive was made {was}: it is damaged"
        raise BundleError(msg)


def check_requirements(requires: Mapping[str, str], who: str = "the archive") -> None:
    """Raise :class:`BundleError` unless every package is installed in a version that fits; nothing is installed.

    Args:
        requires: package -> version specifier.
        who: needs them, for the message.
    """
    for package, specifier in requires.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            msg = f"{who} needs {package}{specifier}, which is not installed"
            raise BundleError(msg) from None
        if not SpecifierSet(specifier).contains(installed, prereleases=True):
            msg = f"{who} needs {package}{specifier}; {installed} is installed"
            raise BundleError(msg)


def _sha256_of(folder: Path, name: str) -> str:
    """Hex sha256 of a file of the archive; raises :class:`BundleError` if it is missing."""
    digest = hashlib.sha256()
    try:
        with (folder / name).open("rb") as stream:
            while chunk := stream.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        msg = f"{name} is missing from the archive"
        raise BundleError(msg) from error
    return digest.hexdigest()
