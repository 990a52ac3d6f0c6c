"""``--trainer-file`` and ``--requires``: somebody's own code, which an archive carries and its servers run.

Here it is decided what is taken from which file: every name of the plans or of the checkpoint that a file has and
nnunetv2 does not. A name that both have is taken from the file if nnunetv2 has it from that same file, as where
somebody wrote a trainer within the installed package; else nobody could say which one was trained with.

To look into a file is to run it: whoever names it here trusts it.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import keyword
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nnunetv2
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from nnunet_torchserve.bundle import check_requirements
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.names import Names, found_in_nnunetv2
from nnunet_torchserve.own_code import CodeDescription, Kind, OwnCode, OwnName

from .errors import ModelWarning, ToolError, UsageError

_WHO = "the code of --trainer-file"


@dataclass(frozen=True, slots=True)
class TrainerFiles:
    """The files, read.

    Attributes:
        sources: file name -> content.
        requires: package -> version specifier.
        code: the same, importable.
    """

    sources: Mapping[str, bytes]
    requires: Mapping[str, str]
    code: OwnCode

    def names(self, wanted: Iterable[tuple[Kind, Any]]) -> Names:
        """What is taken from the files.

        Args:
            wanted: what a model names; what is no text is no name.

        Raises:
            ToolError: a file cannot be imported; it has a name that another one has too, or nnunetv2 has otherwise.
        """
        names = dict.fromkeys((kind, name) for kind, name in wanted if isinstance(name, str))
        own = []
        for kind, name in names:
            if (file := self._file_of(kind, name)) is not None:
                own.append(OwnName(kind=kind, name=name, file=file))
        return Names(own, self.code)

    def described(self, models: Iterable[Names]) -> CodeDescription:
        """What an archive of some models says of the files.

        Raises:
            UsageError: nothing is taken from a file, directly or by another one that imports it.
        """
        taken = sorted({name for names in models for name in names.own}, key=lambda own: (own.file, own.kind, own.name))
        used = {name.file for name in taken}
        while more := {other for file in used for other in self.code.imports(file)[0]} - used:
            used |= more
        if unused := [file for file in self.sources if file not in used]:
            msg = f"--trainer-file {unused[0]}: it has nothing that the model names, and no other file imports it"
            raise UsageError(msg)
        return CodeDescription(files=tuple(self.sources), names=tuple(taken), requires=dict(self.requires))

    def _file_of(self, kind: Kind, name: str) -> str | None:
        short = name.rpartition(".")[2]
        having: dict[str, Any] = {}
        for file in self.sources:
            try:
                module = self.code.module(file)
            except BundleError as error:
                msg = f"--trainer-file {error}"
                if isinstance(error.__cause__, ModuleNotFoundError):
                    msg += "; if it is a file of your own, name it with another --trainer-file"
                raise ToolError(msg) from error
            if (found := getattr(module, short, None)) is not None:
                having[file] = found
        if not having:
            return None
        there = _in_installed_packages(kind, name)
        owners = [file for file, found in having.items() if self._defines(file, found)]
        if there is not None and all(found is there for found in having.values()):
            return None  # imported from there
        if len({id(found) for found in having.values()}) > 1:
            msg = f"--trainer-file: {' and '.join(having)} have different things of the name {short}; rename one"
            raise ToolError(msg)
        file = next(iter(owners or having))
        if there is not None and not self._is_from(file, there):
            if kind is Kind.NETWORK:
                return None  # the plans have its module, too
            msg = (
                f"--trainer-file {file} has a {kind} {short}, and {there.__module__} another one of that name, which "
                "nnU-Net would take; rename it in the file and in what was trained with it, or leave the file out"
            )
            raise ToolError(msg)
        return file

    def _defines(self, file: str, found: Any) -> bool:
        return getattr(found, "__module__", None) == self.code.module(file).__name__

    def _is_from(self, file: str, found: Any) -> bool:
        """Whether an installed class or function comes from a copy of a file."""
        try:
            return Path(inspect.getfile(found)).read_bytes() == self.sources[file]
        except (OSError, TypeError):
            return False


NO_FILES = TrainerFiles({}, {}, OwnCode({}))
"""Nothing of somebody's own."""


def read_trainer_files(files: Sequence[Path], requires: Sequence[str]) -> TrainerFiles:
    """Read what the flags name; nothing is run yet.

    Raises:
        UsageError: a file is none, or has a name that no module can have; a requirement is none.
        ToolError: a file is no Python; a requirement is not met here.
    """
    if not files:
        if requires:
            msg = "--requires says what the code of --trainer-file needs; there is none"
            raise UsageError(msg)
        return NO_FILES
    sources: dict[str, bytes] = {}
    for file in files:
        name = _module_file(file)
        if name in sources:
            msg = f"--trainer-file: two files are called {name}; rename one"
            raise UsageError(msg)
        try:
            sources[name] = file.read_bytes()
        except OSError as error:
            msg = f"--trainer-file {file}: {error.strerror}"
            raise UsageError(msg) from error
    found = TrainerFiles(sources, dict(map(_requirement, requires)), OwnCode(sources))
    try:
        check_requirements(found.requires, _WHO)
    except BundleError as error:
        msg = f"{error}; the archive was made with other versions than the code was trained with"
        raise ToolError(msg) from error
    _warn_of_packages(found)
    return found


def say_aloud(code: CodeDescription) -> None:
    """Warn that the archive holds code."""
    for file in code.files:
        taken = ", ".join(f"{name.kind.replace('_', ' ')} {name.name}" for name in code.names if name.file == file)
        msg = (
            f"{file} goes into the archive as code: every server that serves this archive will run it "
            f"({taken or 'another file imports it'}). Serve it only where you trust that file."
        )
        warnings.warn(msg, ModelWarning, stacklevel=3)


def warn_of_copies(wanted: Iterable[tuple[Kind, Any]], names: Names) -> None:
    """Warn of what somebody has copied into the installed nnunetv2: another machine's has it not.

    Args:
        wanted: see :meth:`TrainerFiles.names`.
        names: what they mean.
    """
    released = _released_files()
    for kind, name in dict.fromkeys((kind, name) for kind, name in wanted if isinstance(name, str)):
        found = None if names.has(kind, name) or not released else _in_installed_packages(kind, name)
        if found is None or not str(getattr(found, "__module__", "")).startswith("nnunetv2."):
            continue
        file = Path(str(getattr(sys.modules.get(found.__module__), "__file__", ""))).resolve()
        if file not in released:
            msg = (
                f"the {kind.replace('_', ' ')} {name} is in a file that was added to the installed nnunetv2; a server "
                f"whose nnunetv2 lacks it will refuse the archive: pack it with --trainer-file {file}"
            )
            warnings.warn(msg, ModelWarning, stacklevel=4)


@cache
def _released_files() -> set[Path]:
    """The files of the installed nnunetv2; none if it was installed from a folder that somebody works in."""
    distribution = importlib.metadata.distribution("nnunetv2")
    files = {Path(str(distribution.locate_file(file))).resolve() for file in distribution.files or ()}
    return files if Path(nnunetv2.__file__).resolve() in files else set()


def wanted_names(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], trainer: str
) -> Iterator[tuple[Kind, Any]]:
    """What a model names that nnU-Net looks up: none of it is checked.

    Args:
        plans: the content of plans.json.
        configuration: the one that was trained, without inheritance.
        trainer: of the checkpoint.
    """
    yield Kind.TRAINER, trainer
    yield Kind.LABEL_MANAGER, plans.get("label_manager")
    yield Kind.PREPROCESSOR, configuration.get("preprocessor_name")
    for what in ("data", "seg", "probabilities"):
        yield Kind.RESAMPLING, configuration.get(f"resampling_fn_{what}")
    schemes = configuration.get("normalization_schemes")
    for scheme in schemes if isinstance(schemes, list) else ():
        yield Kind.NORMALIZATION, scheme
    architecture = configuration.get("architecture")
    if not isinstance(architecture, Mapping):
        return
    yield Kind.NETWORK, architecture.get("network_class_name")
    arguments, imported = architecture.get("arch_kwargs"), architecture.get("_kw_requires_import")
    if isinstance(arguments, Mapping) and isinstance(imported, list):
        for key in imported:
            yield Kind.NETWORK, arguments.get(key)


def _in_installed_packages(kind: Kind, name: str) -> Any:
    """What nnU-Net finds without the files."""
    if kind is Kind.NETWORK:
        from .plans_check import installed_network

        return installed_network(name)
    return found_in_nnunetv2(kind, name)


def _module_file(file: Path) -> str:
    if file.is_dir():
        msg = f"--trainer-file {file} is a folder; name each of its files that is needed"
        raise UsageError(msg)
    stem = file.stem
    sound = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", stem) and not keyword.iskeyword(stem) and stem != "__init__"
    if file.suffix != ".py" or not sound:
        msg = f"--trainer-file {file}: the name of a Python module was expected, as my_trainer.py"
        raise UsageError(msg)
    return file.name


def _requirement(text: str) -> tuple[str, str]:
    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        requirement = None
    if requirement is None or not requirement.specifier or requirement.url or requirement.extras or requirement.marker:
        msg = f"--requires {text}: PACKAGE==VERSION was expected, as monai==1.5.0"
        raise UsageError(msg)
    return requirement.name, str(requirement.specifier)


def _warn_of_packages(files: TrainerFiles) -> None:
    """A package that the code imports and nobody has named may be missing on a server, or another one there."""
    known = {canonicalize_name(name) for name in (*files.requires, *_of_nnunet())}
    distributions = _distributions()
    for file in files.sources:
        try:
            imported = files.code.imports(file)[1]
        except (SyntaxError, UnicodeDecodeError) as error:
            msg = f"--trainer-file {file} is no Python: {error}"
            raise ToolError(msg) from error
        for module in sorted(imported - sys.stdlib_module_names):
            having = [name for name in distributions.get(module, ()) if canonicalize_name(name) not in known]
            if having and len(having) == len(distributions[module]):
                need = f"--requires {having[0]}=={importlib.metadata.version(having[0])}"
                msg = f"{file} imports {module}: with {need} a server that has another version, or none, says so"
                warnings.warn(msg, ModelWarning, stacklevel=4)


@cache
def _distributions() -> Mapping[str, Sequence[str]]:
    """Module -> the installed packages that have it."""
    return importlib.metadata.packages_distributions()


def _of_nnunet() -> Iterator[str]:
    """nnunetv2, and what it needs itself."""
    yield "nnunetv2"
    for text in importlib.metadata.requires("nnunetv2") or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name
