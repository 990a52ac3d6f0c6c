"""Python files that an archive brings along, imported under names that nothing else has.

A trainer that builds a network of its own, a preprocessor, a normalisation: what nnU-Net's plans name and nnunetv2 does
not have is somebody's own code. Its files are modules of a package whose name is made of their content. So two models
may have files of one name, and no file can take the place of a module of Python's or of an installed package, or be
taken for one. Nothing of it is looked for on disk: what runs are the bytes that were compared with the archive's
checksums, also after the archive's folder has been deleted.

The files may import each other, by ``from .helper import X`` or, as in a folder of nnUNet_extTrainer, by ``import
helper`` and ``from helper import X``, which are read as the former. A name of Python's library or of a package that
nnU-Net needs means that, whatever the files are called. Nothing else about their code is changed.

Threads: any; Python's import lock does the rest. Global state: one finder for each set of files in ``sys.meta_path``,
and the imported modules, under names of their own.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import decode_source
from types import CodeType, ModuleType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from .errors import BundleError

CODE_FOLDER = "code"
"""Where an archive keeps such files."""

_PACKAGE = "nnunet_torchserve_code_"
_NAMED_BY = 16
"""Hexadecimal digits of the content's sha256."""

_MEANS_A_PACKAGE = sys.stdlib_module_names | {
    "SimpleITK", "acvl_utils", "batchgenerators", "batchgeneratorsv2", "blosc2", "dynamic_network_architectures",
    "einops", "graphviz", "imagecodecs", "matplotlib", "nibabel", "nnunetv2", "numpy", "pandas", "requests", "scipy",
    "seaborn", "skimage", "sklearn", "tifffile", "torch", "tqdm", "yacs",
}  # fmt: skip
"""What an import of such a name means, also where a file has that name."""


class Kind(StrEnum):
    """What a name is of."""

    TRAINER = "trainer"
    NETWORK = "network"
    """The network's class, or that of a part of it that the plans import."""

    PREPROCESSOR = "preprocessor"
    NORMALIZATION = "normalization"
    RESAMPLING = "resampling"
    LABEL_MANAGER = "label_manager"


FileName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\.py$")]
"""Of a module."""


class OwnName(BaseModel):
    """A name that one of the archive's own files has.

    Attributes:
        kind: what is named.
        name: as the plans or the checkpoint have it; of a network with its module.
        file: which file; there it has the name's last part.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    name: str
    file: FileName


class CodeDescription(BaseModel):
    """What ``bundle.json`` says of the archive's own code.

    Attributes:
        files: their names, below the archive's folder for them.
        names: what is taken from them.
        requires: package -> version specifier, of what they need beside nnU-Net; checked at load, never installed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: tuple[FileName, ...]
    names: tuple[OwnName, ...]
    requires: dict[str, str]


class OwnCode:
    """A set of files, each of which is imported when it is first asked for."""

    def __init__(self, sources: Mapping[str, bytes]) -> None:
        """Nothing is run yet.

        Args:
            sources: file name, as ``trainer.py`` -> content.
        """
        self._sources = {name.removesuffix(".py"): content for name, content in sorted(sources.items())}
        digest = hashlib.sha256()
        for stem, content in self._sources.items():
            digest.update(f"{stem} {len(content)}\n".encode() + content)
        self.package = _PACKAGE + digest.hexdigest()[:_NAMED_BY]

    def __repr__(self) -> str:
        return f"OwnCode({', '.join(self._sources)})"

    def module(self, file: str) -> ModuleType:
        """A file, imported.

        Raises:
            BundleError: it cannot be imported; the message says why.
        """
        if not any(isinstance(finder, _Finder) and finder.package == self.package for finder in sys.meta_path):
            sys.meta_path.append(_Finder(self.package, self._sources))
        try:
            return importlib.import_module(f"{self.package}.{file.removesuffix('.py')}")
        except ModuleNotFoundError as error:
            msg = f"{file} imports {self._as_written(error.name)}, which is not installed here"
            raise BundleError(msg) from error
        except (Exception, SystemExit) as error:
            msg = f"{file} cannot be imported: {type(error).__name__} {self._as_written(error)}"
            raise BundleError(msg) from error

    def _as_written(self, said: object) -> str:
        """Without the package, which nobody has written."""
        return str(said).replace(f"{self.package}.", "").replace(self.package, "the folder of it")

    def imports(self, file: str) -> tuple[set[str], set[str]]:
        """What a file imports, as far as its text says: files of this set, and installed modules by their first name.

        Raises:
            SyntaxError: it is no Python of this version.
        """
        siblings: set[str] = set()
        others: set[str] = set()
        tree = _tree(self._sources[file.removesuffix(".py")], file, self._sources)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                named = [node.module] if node.module else [each.name for each in node.names]
                siblings.update(f"{name}.py" for name in named if name in self._sources)
            elif isinstance(node, ast.ImportFrom) and node.module:
                others.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                others.update(each.name.split(".")[0] for each in node.names)
        return siblings, others


class _Finder(MetaPathFinder, InspectLoader):
    """Finds and loads the modules of one package, and nothing else."""

    def __init__(self, package: str, sources: Mapping[str, bytes]) -> None:
        self.package = package
        self._sources = sources

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See :meth:`importlib.abc.MetaPathFinder.find_spec`."""
        del path, target
        package, _, stem = fullname.partition(".")
        if package != self.package or (stem and stem not in self._sources):
            return None
        return ModuleSpec(fullname, self, origin=self._file(fullname), is_package=not stem)

    def is_package(self, fullname: str) -> bool:
        """See :meth:`importlib.abc.InspectLoader.is_package`."""
        return fullname == self.package

    def get_source(self, fullname: str) -> str:
        """Its text, which tracebacks show."""
        return "" if self.is_package(fullname) else decode_source(self._content(fullname))

    def get_code(self, fullname: str) -> CodeType:
        """Compiled, with imports of other files of the set made relative."""
        if self.is_package(fullname):
            return compile("", self._file(fullname), "exec")
        tree = _tree(self._content(fullname), self._file(fullname), self._sources)
        return compile(tree, self._file(fullname), "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        """Run it. Its ``__file__`` names no file of this machine: there need be none."""
        module.__file__ = self._file(module.__name__)
        super().exec_module(module)

    def _content(self, fullname: str) -> bytes:
        return self._sources[fullname.partition(".")[2]]

    def _file(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.py"


def _tree(content: bytes, file: str, siblings: Mapping[str, bytes]) -> ast.Module:
    return _Relative(siblings).visit(ast.parse(decode_source(content), file))  # type: ignore[no-any-return]


class _Relative(ast.NodeTransformer):
    """Makes imports of some modules relative."""

    def __init__(self, siblings: Mapping[str, bytes]) -> None:
        self._siblings = siblings.keys() - _MEANS_A_PACKAGE

    def visit_Import(self, node: ast.Import) -> list[ast.stmt]:
        return list(self._split(node))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        if not node.level and node.module in self._siblings:
            node.level = 1
        return node

    def _split(self, node: ast.Import) -> Iterator[ast.stmt]:
        """One statement for each module."""
        for each in node.names:
            relative = each.name in self._siblings
            split: ast.stmt = ast.ImportFrom(None, [each], 1) if relative else ast.Import([each])
            yield ast.copy_location(split, node)
