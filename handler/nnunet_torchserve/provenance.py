"""Where an answer comes from: which images, which model, which options, and what of it is not stock's.

It stands in reports and DICOM objects, and UIDs are made of its :attr:`~Provenance.key`: the same images, model and
options are the same object, also when a client asks again.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from . import __version__
from .backend import Backend
from .bundle import ModelBundle
from .options import Accumulate, ExportMethod, Options

_DECIDES_NO_LABELS = frozenset({
    "timeout_s", "stream", "describe", "priority", "output_format", "seg_type", "series_uid", "properties",
    "save_probabilities", "probability_channels", "probability_dtype", "probability_format",
})  # fmt: skip
"""Options on which no voxel depends."""

_PACKAGES = ("nnunetv2", "torch", "numpy", "scipy", "SimpleITK", "pydicom", "torchserve")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an answer comes from.

    Attributes:
        model, version: of the archive.
        digest: sha256 of its bundle.json, which has the sha256 of everything else in it.
        images: sha256 of each image, see :func:`~.codecs.digest_of`.
        previous_stage: sha256 of the labels of a cascade's first stage, if they were sent.
        options: those on which the labels depend, as JSON has them.
        deviations: sentences on what is not as stock nnU-Net does it.
        backends: what ran the networks.
    """

    model: str
    version: str
    digest: str
    images: tuple[str, ...]
    previous_stage: str | None
    options: Mapping[str, Any]
    deviations: tuple[str, ...] = ()
    backends: tuple[Backend, ...] = (Backend.EAGER,)

    @property
    def key(self) -> str:
        """All that decides the labels, in one text."""
        return json.dumps([self.digest, self.images, self.previous_stage, self.options, self.backends], sort_keys=True)

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return {
            "model": {"name": self.model, "version": self.version, "digest": f"sha256:{self.digest}"},
            "images": [f"sha256:{digest}" for digest in self.images],
            "previous_stage": self.previous_stage and f"sha256:{self.previous_stage}",
            "options": dict(self.options),
            "backends": list(self.backends),
            "software": {"nnunet-torchserve": __version__, **_installed()},
            "deviations": list(self.deviations),
        }


def provenance_of(
    bundle: ModelBundle,
    options: Options,
    images: Sequence[str],
    previous_stage: str | None,
    backends: Collection[Backend],
) -> Provenance:
    """Where an answer comes from.

    Args:
        bundle: the model.
        options: of the request.
        images: sha256 of each.
        previous_stage: sha256 of the labels that came with them, if any did.
        backends: what ran the networks.
    """
    description = bundle.description
    return Provenance(
        description.name,
        description.version,
        bundle.digest,
        tuple(images),
        previous_stage,
        options.model_dump(mode="json", exclude=set(_DECIDES_NO_LABELS)),
        tuple(_deviations(bundle, options, backends)),
        tuple(sorted(backends)),
    )


def _deviations(bundle: ModelBundle, options: Options, backends: Collection[Backend]) -> list[str]:
    """What stock nnU-Net does otherwise, of what was asked for or archived; docs/parity.md has the rest."""
    others = sorted(set(backends) - {Backend.EAGER})
    found = [f"The network was run by {backend}, whose logits are not stock's to the bit." for backend in others]
    if options.accumulate is Accumulate.FLOAT32:
        found.append("The logits of patches were summed in float32, where stock sums in float16.")
    if options.export is not ExportMethod.EXACT:
        found.append(f"Labels were exported by {options.export}, not as stock's.")
    if (letters := bundle.lead.description.input_orientation) is not None:
        found.append(f"The image was turned to {letters} for the network; stock takes it as it is stored.")
    return found


@cache
def _installed() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
