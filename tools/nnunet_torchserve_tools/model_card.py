"""``nnunet-torchserve describe FILE.mar``: what a model is, what its images must be, what a case of it costs.

Read from the archive alone: no weights are loaded, and no code of it is run. What a running server says of itself is
TorchServe's describe API, or the option ``describe`` of a request.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_torchserve.accuracy import ACCURACY_FILE
from nnunet_torchserve.bundle import BUNDLE_FILE, ModelBundle
from nnunet_torchserve.cases import settings_of
from nnunet_torchserve.description import describe
from nnunet_torchserve.errors import BundleError, RequestError
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.member import Member
from nnunet_torchserve.member_description import DATASET_FILE, PLANS_FILE, NetworkBuilder
from nnunet_torchserve.options import Options
from nnunet_torchserve.pricing import prices_of, whole_price
from nnunet_torchserve.segments import SEGMENTS_FILE
from nnunet_torchserve.settings import HandlerSettings
from nnunet_torchserve.volume import Geometry

from .accuracy_table import calibrated, held, in_short, in_whole_numbers, worst
from .errors import ToolError, UsageError

_WANTED = (PLANS_FILE, DATASET_FILE)
"""Of each member."""

_OF_THE_WHOLE = (SEGMENTS_FILE, ACCURACY_FILE)
_MOST_BYTES = 2**28
"""Of one of these files."""

_MIB = 1024**2
_DIMENSIONS = 3
_SHOWN = 12
"""Of a digest of which there are many; JSON has the whole."""


@dataclass(frozen=True, slots=True)
class Shape:
    """An image, for whose case a price is wanted: voxels and mm along x, y, z."""

    voxels: tuple[int, int, int]
    spacing: tuple[float, float, float]

    def geometry(self) -> Geometry:
        """Somewhere in the patient."""
        x, y, z = self.voxels
        sx, sy, sz = self.spacing
        return Geometry((z, y, x), (sz, sy, sx), self.spacing, (0.0, 0.0, 0.0), np.eye(_DIMENSIONS), _DIMENSIONS)


def model_card(file: Path, shape: Shape | None = None) -> dict[str, Any]:
    """What an archive says of itself, as a JSON object: as its description, with what that leaves out.

    Args:
        file: the archive.
        shape: of an image whose price is wanted; all folds of the archive, mirroring as the checkpoints allow.

    Raises:
        UsageError: it is no archive, or no image of that shape can be predicted.
        ToolError: it is damaged, or of another schema.
    """
    try:
        with zipfile.ZipFile(file) as archive, tempfile.TemporaryDirectory(prefix="nnunet-torchserve-card-") as scratch:
            bundle = _described(archive, Path(scratch))
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            return _card(bundle, sizes, file, shape)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        msg = f"{file} is no archive of 'nnunet-torchserve archive', or it is damaged"
        raise UsageError(msg) from error
    except BundleError as error:
        msg = f"{file}: {error}"
        raise ToolError(msg) from error


def _described(archive: zipfile.ZipFile, folder: Path) -> ModelBundle:
    """The bundle without its weights; the files that are read have the checksums that the archive names."""
    text = _content(archive, BUNDLE_FILE)
    (folder / BUNDLE_FILE).write_bytes(text)
    for name in _OF_THE_WHOLE:
        if name in archive.namelist():
            (folder / name).write_bytes(_content(archive, name))
    bundle = ModelBundle(folder, verify=False)
    checksums = bundle.description.files
    for name in _OF_THE_WHOLE:
        if name in checksums:
            _check(name, (folder / name).read_bytes(), checksums)
    for member in bundle.members.values():
        member.folder.mkdir(parents=True)
        for name in _WANTED:
            inside = f"{member.description.folder}/{name}"
            content = _content(archive, inside)
            _check(inside, content, checksums)
            (member.folder / name).write_bytes(content)
    bundle.check_members()
    return bundle


def _check(name: str, content: bytes, checksums: Mapping[str, str]) -> None:
    if hashlib.sha256(content).hexdigest() != checksums.get(name):
        msg = f"{name} is not what the archive was made with: it is damaged"
        raise BundleError(msg)


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).file_size > _MOST_BYTES:
        msg = f"{name} is too large to be what it should be"
        raise BundleError(msg)
    return archive.read(name)


def _card(bundle: ModelBundle, sizes: Mapping[str, int], file: Path, shape: Shape | None) -> dict[str, Any]:
    described = describe(bundle, Limits(), HandlerSettings(), math.inf)
    ours = ("settings", "limits", "options", "serving_core", "axis_order")  # of a server, not of a file
    card: dict[str, Any] = {name: value for name, value in described.items() if name not in ours}
    values = card.pop("channel_values")
    card |= {
        "file": file.name,
        "bytes": file.stat().st_size,
        "channels": [
            {"number": number, "name": name, "values": values[number]}
            for number, name in bundle.lead.channel_names.items()
        ],
        "requires": bundle.description.requires,
        "networks": {name: _network(member) for name, member in bundle.members.items()},
    }
    for name, member in bundle.members.items():
        files = [f"{member.description.folder}/{fold.weights_file}" for fold in member.description.folds]
        card["members"][name]["weights_bytes"] = sum(sizes[file] for file in files)
    if shape is not None:
        card["case"] = _case(bundle, shape)
    return card


def _network(member: Member) -> str:
    trained = member.description.network_trainer or member.description.trainer
    if member.description.network_builder is NetworkBuilder.TRAINER:
        return f"what {trained.rpartition('.')[2]} builds"
    name = member.description.network_class or trained
    return name.rpartition(".")[2]


def _case(bundle: ModelBundle, shape: Shape) -> dict[str, Any]:
    geometry, options, channels = shape.geometry(), Options(), bundle.lead.channels
    try:
        prices = prices_of(bundle, geometry, channels, settings_of(bundle, options), options)
    except RequestError as error:
        msg = f"no case of that shape can be predicted: {error}"
        raise UsageError(msg) from error
    whole = whole_price(bundle, prices, geometry, channels, options)
    return {
        "shape": list(shape.voxels),
        "spacing": list(shape.spacing),
        "forward_passes": whole.passes,
        "memory_bytes": whole.bytes,
        "is_guess": whole.is_guess,
        "members": {
            name: {"grid_zyx": list(price.grid), "patches": price.patches, "forward_passes": price.passes}
            for name, price in prices.items()
        },
    }


def lines(card: Mapping[str, Any]) -> Iterator[str]:
    """A card for people."""
    yield f"{card['name']} {card['version']}  ({card['file']}, {card['bytes'] / _MIB:.1f} MiB)"
    yield f"  digest {card['digest']}"
    yield f"  {card['dataset']}: {card['recipe_in_words']}"
    for channel in card["channels"]:
        low, high = channel["values"]
        yield f"  channel {channel['number']}: {channel['name']}, values of about {low:g} to {high:g}"
    yield f"  labels: {', '.join(f'{name} {_label(value)}' for name, value in card['labels'].items())}"
    if card["regions_class_order"] is not None:
        yield f"  regions, painted in the order {', '.join(map(str, card['regions_class_order']))}"
    for name, member in card["members"].items():
        folds = ", ".join(map(str, member["folds"]))
        yield f"  {name}: {member['folder_trainer']}, {member['plans']}, {card['networks'][name]}, folds {folds}"
        spacing, patch = _times(member["spacing"]), _times(member["patch_size"])
        weights = member["weights_bytes"] / _MIB
        yield f"    {spacing} mm, patches of {patch}, {member['checkpoint']}, weights {weights:.1f} MiB"
        for what in ("checkpoint", "weights"):
            digests = member[f"{what}_digests"].items()
            shown = ", ".join(f"{fold} {value.partition(':')[2][:_SHOWN]}…" for fold, value in digests)
            yield f"    sha256 of each fold's {what}: {shown}"
    yield from _code_lines(card["code"])
    steps = (card["postprocessing"] or {}).get("steps")
    if steps:
        kept = "; ".join(", ".join(map(str, step["labels"])) for step in steps)
        yield f"  postprocessing: only the largest component stays of each of: {kept}"
    if (backend := card["backend"]["archive"]) is not None:
        needs = ", ".join(f"{package}{version}" for package, version in backend["requires"].items())
        yield f"  served by {backend['backend']} where there is {needs}, else by eager"
        yield from _accuracy_lines(card["backend"]["accuracy"])
    yield f"  reader {card['reader']}, orientation {card['input_orientation'] or 'as sent'}"
    built = card["built_with"]
    yield f"  made with nnunetv2 {built.get('nnunetv2')}, torch {built.get('torch')}; needs nnunetv2 " + str(
        card["requires"].get("nnunetv2")
    )
    if (case := card.get("case")) is not None:
        guess = " (a guess: the plan's own function decides)" if case["is_guess"] else ""
        memory = case["memory_bytes"] / _MIB
        yield f"  a case of {_times(case['shape'])} voxels (x, y, z) of {_times(case['spacing'])} mm{guess}:"
        most = "about" if case["is_guess"] else "at most"
        yield f"    {case['forward_passes']} forward passes, {most} {memory:.0f} MiB in worker and engine"


def _accuracy_lines(accuracy: Mapping[str, Any] | None) -> Iterator[str]:
    """What was measured of the backend that the archive is made for."""
    if accuracy is None:
        yield "    its accuracy was not measured: archive --validate"
        return
    yield f"    measured on {accuracy['processor']}: {in_short(accuracy)}"
    yield from (f"    {line}" for told in (worst, in_whole_numbers, calibrated, held) for line in told(accuracy))


def _code_lines(code: Mapping[str, Any] | None) -> Iterator[str]:
    for file in (code or {}).get("files", ()):
        taken = ", ".join(f"{own['kind'].replace('_', ' ')} {own['name']}" for own in file["names"])
        yield f"  code that its servers run: {file['file']}, {file['sha256'][:12]}…: {taken or 'for the others'}"
    if code and code["requires"]:
        yield f"  that code needs {', '.join(f'{package}{version}' for package, version in code['requires'].items())}"


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def _label(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def read_shape(voxels: str | None, spacing: str | None) -> Shape | None:
    """The flags ``--shape 512,512,300`` and ``--spacing 0.7,0.7,1``.

    Raises:
        UsageError: one without the other, or no three numbers above 0.
    """
    if voxels is None and spacing is None:
        return None
    if voxels is None or spacing is None:
        msg = "--shape and --spacing belong together: voxels and mm along x, y, z"
        raise UsageError(msg)
    x, y, z = _three(voxels, "--shape", int)
    sx, sy, sz = _three(spacing, "--spacing", float)
    return Shape((int(x), int(y), int(z)), (sx, sy, sz))


def _three(text: str, flag: str, kind: type[int | float]) -> tuple[float, float, float]:
    try:
        first, second, third = (kind(part) for part in text.split(","))
    except ValueError:
        first = second = third = 0
    if not (0 < first < math.inf and 0 < second < math.inf and 0 < third < math.inf):
        msg = f"{flag} {text}: three numbers above 0 with commas were expected, along x, y, z"
        raise UsageError(msg)
    return first, second, third
