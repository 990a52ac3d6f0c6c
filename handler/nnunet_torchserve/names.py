"""What a name of the plans or of a checkpoint means: a class or function of nnunetv2, or of the archive's own code.

nnU-Net looks such names up among the files of its own package, and trainers in nnUNet_extTrainer besides, so that what
a name means depends on the machine. Here it was decided when the archive was made: names that the archive's own files
have (:mod:`.own_code`) are written down with their file, and all others are nnunetv2's. Nothing else is looked at, and
no environment variable.

Whoever only reads what an archive says does not run its code: then such a name means a class that stands for what
nobody has read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import nnunetv2
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from .errors import BundleError
from .own_code import Kind, OwnCode, OwnName

_FOLDERS = {
    Kind.TRAINER: "training.nnUNetTrainer",
    Kind.PREPROCESSOR: "preprocessing",
    Kind.NORMALIZATION: "preprocessing.normalization",
    Kind.RESAMPLING: "preprocessing.resampling",
    Kind.LABEL_MANAGER: "utilities.label_handling",
}
"""Where nnU-Net looks, within nnunetv2; networks it imports by their full names."""


class Names:
    """What the names of a model mean.

    Attributes:
        own: those of the archive's own code.
    """

    def __init__(self, own: Iterable[OwnName] = (), code: OwnCode | None = None) -> None:
        """Nothing is imported yet.

        Args:
            own: names of the archive's own code.
            code: that code; ``None`` if it is not to be run.
        """
        self.own = tuple(own)
        self._file_of = {(each.kind, each.name): each.file for each in self.own}
        self._code = code

    def has(self, kind: Kind, name: object) -> bool:
        """Whether it is one of the archive's own code."""
        return isinstance(name, str) and (kind, name) in self._file_of

    def find(self, kind: Kind, name: str) -> Any:
        """The class or function; ``None`` if nnunetv2 has none of that name.

        Raises:
            BundleError: the file that has it cannot be imported, or does not have it here.
        """
        if not self.has(kind, name):
            return found_in_nnunetv2(kind, name)
        if self._code is None:
            return _UNREAD[kind]
        file, short = self._file_of[kind, name], name.rpartition(".")[2]
        if (found := getattr(self._code.module(file), short, None)) is None:
            msg = f"{file} has no {short} here, and had one when the archive was made"
            raise BundleError(msg)
        return found

    def needed(self, kind: Kind, name: str) -> Any:
        """As :meth:`find`.

        Raises:
            BundleError: there is none; or as there.
        """
        if (found := self.find(kind, name)) is None:
            msg = (
                f"nnunetv2 has no {kind} {name} here; if it was put into nnunetv2 by hand, make the archive again with "
                "--trainer-file and its file"
            )
            raise BundleError(msg)
        return found

    def located(self, network: str) -> str:
        """The name under which Python finds a network's class, or that of a part of it.

        Raises:
            BundleError: the file that has it cannot be imported.
        """
        file = self._file_of.get((Kind.NETWORK, network))
        if file is None or self._code is None:
            return network
        return f"{self._code.module(file).__name__}.{network.rpartition('.')[2]}"

    def plans(self, content: dict[str, Any]) -> PlansManager:
        """nnU-Net's view of plans.json, in which names mean what they mean here."""
        return _Plans(content, self) if self.own else PlansManager(content)

    def preprocessor(self, configuration: ConfigurationManager) -> Any:
        """An object of a configuration's preprocessor, which finds the archive's own normalisations too."""
        kind = configuration.preprocessor_class
        schemes = configuration.normalization_schemes
        if issubclass(kind, DefaultPreprocessor) and any(self.has(Kind.NORMALIZATION, name) for name in schemes):
            own = {name: self.needed(Kind.NORMALIZATION, name) for name in schemes}
            # before DefaultPreprocessor in the order of methods, and after all that the class brings itself
            bases = (_OwnNormalizations,) if kind is DefaultPreprocessor else (kind, _OwnNormalizations)
            kind = type(kind.__name__, bases, {"own_schemes": own})
        return kind(verbose=False)


NNUNETV2_ONLY = Names()
"""No code of an archive's own."""


def found_in_nnunetv2(kind: Kind, name: str) -> Any:
    """What nnU-Net finds in its own package, ``None`` if nothing; trainers outside of it are not looked for."""
    package = _FOLDERS[kind]
    folder = Path(nnunetv2.__path__[0], *package.split("."))
    base = nnunetv2.__path__[0] if kind is Kind.TRAINER else None
    return recursive_find_python_class(str(folder), name, f"nnunetv2.{package}", base)


class _Plans(PlansManager):  # type: ignore[misc]
    """nnU-Net's plans, with names that nnunetv2 does not have."""

    def __init__(self, content: dict[str, Any], names: Names) -> None:
        super().__init__(content)
        self._names = names
        self._configurations: dict[str, _Configuration] = {}

    def get_configuration(self, configuration_name: str) -> _Configuration:
        if configuration_name not in self._configurations:
            stock = super().get_configuration(configuration_name)
            self._configurations[configuration_name] = _Configuration(stock.configuration, self._names)
        return self._configurations[configuration_name]

    @cached_property
    def label_manager_class(self) -> Any:
        name = self.plans.get("label_manager")
        own = self._names.has(Kind.LABEL_MANAGER, name)
        return self._names.find(Kind.LABEL_MANAGER, name) if own else super().label_manager_class


class _Configuration(ConfigurationManager):  # type: ignore[misc]
    """One configuration of such plans."""

    def __init__(self, content: dict[str, Any], names: Names) -> None:
        super().__init__(content)
        self._names = names

    @cached_property
    def preprocessor_class(self) -> Any:
        return self._names.find(Kind.PREPROCESSOR, self.preprocessor_name)

    @cached_property
    def resampling_fn_data(self) -> Any:
        return self._resampling("resampling_fn_data")

    @cached_property
    def resampling_fn_seg(self) -> Any:
        return self._resampling("resampling_fn_seg")

    @cached_property
    def resampling_fn_probabilities(self) -> Any:
        return self._resampling("resampling_fn_probabilities")

    @property
    def network_arch_class_name(self) -> str:
        return self._names.located(super().network_arch_class_name)

    @property
    def network_arch_init_kwargs(self) -> dict[str, Any]:
        arguments: dict[str, Any] = super().network_arch_init_kwargs
        imported = self.network_arch_init_kwargs_req_import
        return {
            name: self._names.located(value) if name in imported and isinstance(value, str) else value
            for name, value in arguments.items()
        }

    def _resampling(self, key: str) -> Any:
        name = self.configuration[key]
        if (function := self._names.find(Kind.RESAMPLING, name)) is None:
            msg = f"nnU-Net has no resampling function {name!r}"
            raise RuntimeError(msg)
        return partial(function, **self.configuration[f"{key}_kwargs"])


class _OwnNormalizations(DefaultPreprocessor):  # type: ignore[misc]
    """nnU-Net's preprocessor, that normalises by classes which it is told."""

    own_schemes: Mapping[str, Any]

    def _normalize(
        self, data: Any, seg: Any, configuration_manager: Any, foreground_intensity_properties_per_channel: Any
    ) -> Any:
        """``DefaultPreprocessor._normalize``, but for where the classes come from."""
        for channel in range(data.shape[0]):
            normalizer = self.own_schemes[configuration_manager.normalization_schemes[channel]](
                use_mask_for_norm=configuration_manager.use_mask_for_norm[channel],
                intensityproperties=foreground_intensity_properties_per_channel[str(channel)],
            )
            data[channel] = normalizer.run(data[channel], seg[0])
        return data


class _UnreadPreprocessor(DefaultPreprocessor):  # type: ignore[misc]
    """Somebody's own, whose code is not run."""


class _UnreadNormalization(ImageNormalization):  # type: ignore[misc]
    """Somebody's own, whose code is not run."""

    def run(self, image: Any, seg: Any = None) -> Any:
        return _unread(image, seg)


class _UnreadLabelManager(LabelManager):  # type: ignore[misc]
    """Somebody's own, whose code is not run."""

    def _determine_ignore_label(self) -> None:
        """None: nnU-Net makes demands on the number of one, which may not be the other's."""


def _unread(*_arguments: Any, **_named: Any) -> Any:
    msg = "the archive's own code is not run where it is only described"
    raise BundleError(msg)


_UNREAD: Mapping[Kind, Any] = {
    Kind.TRAINER: None,
    Kind.NETWORK: None,
    Kind.PREPROCESSOR: _UnreadPreprocessor,
    Kind.NORMALIZATION: _UnreadNormalization,
    Kind.RESAMPLING: _unread,
    Kind.LABEL_MANAGER: _UnreadLabelManager,
}
