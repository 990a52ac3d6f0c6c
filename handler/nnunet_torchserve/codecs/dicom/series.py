"""Which objects of a container are the series that is asked for, and whether they belong together.

Objects that are no CT, MR or PET images (structured reports, segmentations, DICOMDIR) and files that are no DICOM are
left out and counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from ...errors import DicomReason, DicomRefused, Malformed, TooLarge, UnknownFormat
from ...limits import Limits
from ..inflate import ByteSource, Compression
from .container import Container, File, Meter, Stream, StreamFile, walk
from .elements import (
    DEFLATED,
    HEAD_BYTES,
    Budget,
    Encoding,
    Selection,
    Walk,
    encoding_of,
    is_dicom,
    walk_elements,
)
from .header import SELECTION, ImageHeader, Piece, read_header
from .image_classes import Modality
from .rescale import UNSCALED

FIRST_BYTES = 16 * 1024
"""Of a file, looked at first: most headers are shorter."""

_MOST_TABLE_BYTES = 64 * 1024**2
"""Of the Modality LUTs of all images together; a usual one has 16 kB."""

_MOST_NAMED = 20
_CHUNK_BYTES = 1024**2


class Left(Enum):
    """Why a file was left out."""

    NO_IMAGE = "no image of CT, MR or PET"
    OTHER_SERIES = "damaged, and of another series than the one that is asked for"


@dataclass(frozen=True, slots=True)
class Series:
    """The images of one series.

    Attributes:
        images: in the container's order, each object once.
        ignored: files beside them that are no images of CT, MR or PET.
        others: images of other series, which were not asked for.
    """

    images: Sequence[ImageHeader]
    ignored: int
    others: int

    @property
    def patient(self) -> str:
        """A digest of who it is."""
        return self.images[0].patient

    @property
    def study(self) -> str:
        """UID."""
        return self.images[0].study

    @property
    def uid(self) -> str:
        """Of the series."""
        return self.images[0].series

    @property
    def frame_of_reference(self) -> str | None:
        """UID, if there is one."""
        return self.images[0].frame_of_reference


def find_series(container: Container, limits: Limits, uid: str | None) -> Series:
    """Read all headers, and choose.

    Args:
        container: the files.
        limits: what is allowed.
        uid: of the series; ``None`` if there is only one.

    Raises:
        UnknownFormat: no file is DICOM.
        DicomRefused: there is no such series, or more than one, or it is none that could be a volume.
        Malformed, TooLarge: a header says so.
    """
    found: list[ImageHeader] = []
    ignored = others = dicom = 0
    budget, meter = Budget.of(limits), Meter(limits)
    frames = table_bytes = 0
    for number, file in enumerate(walk(container, limits, meter)):
        stream = file.open()
        if not is_dicom(stream.peek(HEAD_BYTES)):
            ignored += 1
            continue
        dicom += 1
        header = _read(number, file, stream, uid, budget, meter, limits)
        ignored += header is Left.NO_IMAGE
        others += header is Left.OTHER_SERIES
        if isinstance(header, ImageHeader):
            found.append(header)
            frames += len(header.planes)
            table_bytes += header.table_bytes
        _check_kept(frames, table_bytes, limits)
    if not found and not others:
        raise _no_images(ignored, dicom)
    images = _chosen(found, uid)
    images = _each_once(images, container, limits)
    _check_one(images)
    _check_whole(images)
    return Series(images, ignored, others + len(found) - len(images))


def _check_kept(frames: int, table_bytes: int, limits: Limits) -> None:
    """A few bytes of a file can declare many frames that all lie in one place; of each an object is kept."""
    if frames > limits.dicom_frames:
        msg = f"the images have more than {limits.dicom_frames} frames together, the limit; send one series, or name "
        msg += "it with option series_uid"
        raise TooLarge(msg)
    if table_bytes > _MOST_TABLE_BYTES:
        msg = f"the images' Modality LUTs have more than {_MOST_TABLE_BYTES} bytes together, the limit; send one volume"
        raise TooLarge(msg)


def data_set_stream(stream: Stream, encoding: Encoding, meter: Meter) -> Stream:
    """A file's data set, which may be deflated.

    Args:
        stream: the file, from its first byte.
        encoding: how it is stored.
        meter: counts what is inflated.
    """
    stream.skip(encoding.start)
    if encoding.transfer_syntax != DEFLATED:
        return stream
    inflated = ByteSource.over(StreamFile(stream), Compression.DEFLATE)
    return ByteSource.over(StreamFile(inflated, meter), Compression.NONE)


def _read(
    number: int, file: File, stream: Stream, uid: str | None, budget: Budget, meter: Meter, limits: Limits
) -> ImageHeader | Left:
    """One header. What is wrong with an object that says that it is of another series than ``uid`` does not matter."""
    encoding = encoding_of(stream.peek(min(FIRST_BYTES, file.size)))
    if encoding.is_directory:
        return Left.NO_IMAGE
    stream = data_set_stream(stream, encoding, meter)
    size = None if encoding.transfer_syntax == DEFLATED else file.size - encoding.start
    seen = Walk()
    try:
        walk_header(stream, encoding, SELECTION, budget, seen)
        budget.take(seen.elements)
        if seen.is_other:
            return Left.NO_IMAGE
        if seen.sop_class is None:
            _check_without_class(seen)
            return Left.NO_IMAGE
        return read_header(number, size, seen, encoding, limits, uid)
    except (Malformed, DicomRefused):
        if uid is None or seen.series is None or seen.series == uid:
            raise
        return Left.OTHER_SERIES


def walk_header(stream: Stream, encoding: Encoding, selection: Selection, budget: Budget, seen: Walk) -> None:
    """Walk over more and more bytes of a data set, until its header's end is among them.

    Args:
        stream: the data set, of which nothing is taken.
        encoding: how it is stored.
        selection: what it is for.
        budget: what it may hold.
        seen: what is found is noted there.

    Raises:
        Malformed, TooLarge: as of :func:`~.elements.walk_elements`.
    """
    wanted = FIRST_BYTES
    while True:
        data = stream.peek(wanted)
        is_all = len(data) < wanted
        walk_elements(data, encoding, selection, budget, seen, is_all=is_all)
        if seen.is_whole or is_all or seen.is_other:
            return
        if wanted >= budget.header_bytes:
            msg = f"the header of a DICOM file has more than {budget.header_bytes} bytes, the limit"
            raise TooLarge(msg)
        wanted = min(4 * wanted, budget.header_bytes)


def _check_without_class(found: Walk) -> None:
    """A DICOMDIR has no class and no pixels; an image without a class is broken."""
    if found.pixels is not None:
        msg = (
            "an image has no SOPClassUID, so nobody knows what it is; send the files as the scanner or PACS wrote them"
        )
        raise DicomRefused(DicomReason.INCOMPLETE, msg)


def _no_images(ignored: int, dicom: int) -> UnknownFormat | DicomRefused:
    if dicom:
        beside = f"; {ignored - dicom} other files lay beside them" if ignored > dicom else ""
        msg = f"none of {dicom} DICOM files is an image of CT, MR or PET{beside}; send the series of images"
        return DicomRefused(DicomReason.NO_IMAGES, msg)
    msg = (
        f"no DICOM file among the {ignored} that came (archives in archives are not opened), and no .npz; send a DICOM "
        "series, the .npz that numpy.savez writes, or unpack the archive and send the image"
    )
    return UnknownFormat(msg)


def _chosen(found: Sequence[ImageHeader], uid: str | None) -> Sequence[ImageHeader]:
    chosen = found if uid is None else [header for header in found if header.series == uid]
    if missing := sum(not header.has_uids for header in chosen):
        msg = f"{missing} of {len(chosen)} images have no valid UID of the object, the study or the series, so nobody "
        raise DicomRefused(DicomReason.INCOMPLETE, f"{msg}knows what belongs together")
    counts = Counter((header.study, header.series, header.modality) for header in found if header.has_uids)
    if uid is None and len({key[:2] for key in counts}) == 1:
        return found
    listed = "; ".join(
        f"{series} ({modality}, {number} image{'' if number == 1 else 's'})"
        for (_, series, modality), number in counts.most_common(_MOST_NAMED)
    )
    listed += "; …" if len(counts) > _MOST_NAMED else ""
    if uid is None:
        several = len({key[:2] for key in counts})
        msg = f"there are {several} series: {listed}. Send one, or name it with option series_uid"
        raise DicomRefused(DicomReason.SEVERAL_SERIES, msg)
    if not chosen:
        msg = f"no image belongs to the series that option series_uid names; there are {listed}"
        raise DicomRefused(DicomReason.UNKNOWN_SERIES, msg)
    if len({header.study for header in chosen}) > 1:
        msg = "the series that option series_uid names is in several studies; send one of them"
        raise DicomRefused(DicomReason.SEVERAL_SERIES, msg)
    return chosen


def _each_once(images: Sequence[ImageHeader], container: Container, limits: Limits) -> Sequence[ImageHeader]:
    """Without copies of one object; two objects of one UID that differ are refused."""
    counts = Counter(header.sop_instance for header in images)
    twice = {header.file: header for header in images if counts[header.sop_instance] > 1}
    if not twice:
        return images
    digests = _digests(twice.keys(), container, limits)
    kept: dict[str, ImageHeader] = {}
    for header in images:
        before = kept.setdefault(header.sop_instance, header)
        if before is not header and digests[before.file] != digests[header.file]:
            msg = "two images have one SOPInstanceUID and differ; send the files as the scanner or PACS wrote them"
            raise DicomRefused(DicomReason.DOUBLED_SLICES, msg)
    return list(kept.values())


def _digests(files: Collection[int], container: Container, limits: Limits) -> dict[int, str]:
    """sha256 of the data sets of some files: what stands before says only who sent them."""
    digests = {}
    for number, file in enumerate(walk(container, limits, Meter(limits))):
        if number not in files:
            continue
        stream, digest = file.open(), hashlib.sha256()
        encoding = encoding_of(stream.peek(min(FIRST_BYTES, file.size)))
        stream.skip(encoding.start)
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
        digests[number] = digest.hexdigest()
    return digests


def _check_one(images: Sequence[ImageHeader]) -> None:
    """Refuse what is no series of one body."""
    if (patients := len({header.patient for header in images})) > 1:
        msg = f"the images of the series name {patients} different patients; send those of one"
        raise DicomRefused(DicomReason.SEVERAL_PATIENTS, msg)
    if (frames := len({header.frame_of_reference for header in images})) > 1:
        msg = f"the images have {frames} different frames of reference: their positions have nothing to do with each "
        raise DicomRefused(DicomReason.SEVERAL_FRAMES_OF_REFERENCE, f"{msg}other. Send those of one")
    if localizers := sum(header.localizer for header in images):
        msg = f"{localizers} of {len(images)} images are localizers; send the series that was planned with them"
        raise DicomRefused(DicomReason.LOCALIZER, msg)
    for header in images:
        if header.problem is not None:
            raise header.problem.error()
    if len({header.modality for header in images}) > 1:
        msg = "the series holds images of several modalities; send those of one"
        raise DicomRefused(DicomReason.UNEQUAL_IMAGES, msg)
    rescales = [rescale for header in images for rescale in header.rescales]
    if (unscaled := sum(rescale is UNSCALED for rescale in rescales)) not in {0, len(rescales)}:
        msg = f"{unscaled} of {len(rescales)} images have no RescaleSlope and RescaleIntercept, and the others have: "
        raise DicomRefused(DicomReason.INCOMPLETE, f"{msg}their values do not go together")


def _check_whole(images: Sequence[ImageHeader]) -> None:
    """Refuse fewer images than the objects themselves say that there are: a gap shows, a missing end does not."""
    split: dict[str, list[tuple[Piece, int]]] = {}
    for header in images:
        if header.piece is not None:
            split.setdefault(header.piece.concatenation, []).append((header.piece, len(header.planes)))
    for pieces in split.values():
        frames, totals = 0, {piece.total for piece, _ in pieces if piece.total}
        for piece, own in sorted(pieces, key=lambda each: each[0].offset):
            if piece.offset != frames or totals - {len(pieces)}:
                msg = f"the series was split into pieces of several frames; {len(pieces)} came, which are not all of "
                raise DicomRefused(DicomReason.MISSING_SLICES, f"{msg}them; send the whole series")
            frames += own
    frames = sum(len(header.planes) for header in images)
    slices = max((header.slices for header in images if header.modality is Modality.PET), default=0)
    if frames < slices:
        msg = f"the series has {frames} slices, and says of itself that it has {slices}; send the whole series"
        raise DicomRefused(DicomReason.MISSING_SLICES, msg)
