"""A DICOM series as an image: its header at once, its voxels on demand.

The headers are read first and the pixels in a second walk, so that neither an archive that is not wanted after all nor
its unpacked bytes are ever in memory. Beside the volume there are one frame and, of compressed pixels, those of one
object as they are packed and the frames that wait for a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ...errors import DicomReason, DicomRefused, Malformed
from ...limits import Limits
from ...options import OutputFormat
from ..geometry import check_size
from ..inflate import SLACK_BYTES, Payload
from .compressed import decompress, is_supported
from .container import Container, File, Meter, Several, open_container, walk
from .crew import Crew
from .elements import DEFLATED, EXPLICIT_BIG, EXPLICIT_LITTLE, IMPLICIT_LITTLE
from .fragments import frames_of
from .header import UID, ImageHeader
from .library import require_pydicom
from .origin import Origin, read_origin
from .pixels import check_range, native_frames
from .planes import Stack, stacked
from .rescale import Rescale
from .series import Series, data_set_stream, find_series
from .slices import Slice, slices_of
from .stored_pixels import Pixels

_MOST_TIMES = 2
"""Of the uncompressed bytes: noise grows a little when it is compressed, and a table and fragments have headers."""

_NATIVE = frozenset({IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG, DEFLATED})


class DicomSource:
    """One series of CT, MR or PET images, as an :class:`~..source.ImageSource`.

    Attributes:
        series: its objects, for whoever writes an answer that refers to them.
        stack: their frames in the order of the slices, and the grid.
        geometry: of that: x along a row and y along a column of the pixels as stored, z along their cross product.
    """

    nifti_header = None
    native_format = OutputFormat.DICOM_SEG
    channels = 1

    def __init__(self, container: Container, limits: Limits, series_uid: str | None = None) -> None:
        """Read the headers.

        Args:
            container: the files.
            limits: what is allowed.
            series_uid: which series; ``None`` if there is only one.

        Raises:
            DicomUnavailable: pydicom is not installed.
            UnknownFormat: no file is DICOM.
            DicomRefused: there is no such series, or it is no volume.
            Malformed, TooLarge, BadSpacing: a header says so.
        """
        require_pydicom()
        self._container, self._limits = container, limits
        self.series: Series = find_series(container, limits, series_uid)
        images = self.series.images
        for image in images:
            _check_syntax(_pixels(image))
        self.stack: Stack = stacked([plane for image in images for plane in image.planes])
        self.geometry = self.stack.geometry
        check_size(self.geometry.shape, 1, max(_pixels(image).bits_allocated // 8 for image in images), limits)

    @property
    def has_frame_of_reference(self) -> bool:
        """Whether its images name one by a UID."""
        return UID.fullmatch(self.series.frame_of_reference or "") is not None

    @property
    def left_out(self) -> int:
        """Files that were ignored, and images of other series."""
        return self.series.ignored + self.series.others

    def channels_advice(self, wanted: int) -> str:
        """What would be right for a model of so many channels."""
        return f"a DICOM series is one channel: send a zip for each of {wanted} series (image_0000, image_0001, …)"

    @cached_property
    def slices(self) -> list[Slice]:
        """Each slice of the volume: where it lies, and which object and frame it is of."""
        return slices_of(self.series.images, self.stack.order)

    @cached_property
    def images(self) -> list[ImageHeader]:
        """The objects of the series in the order of their first slices, however they came."""
        return list({each.image.file: each.image for each in self.slices}.values())

    @cached_property
    def origin(self) -> Origin:
        """Whose the series is, and its digest; read in a walk of its own."""
        return read_origin(self._container, self._limits, self.images)

    def check_texts(self) -> None:
        """Refuse a series whose texts a segmentation could not repeat.

        Raises:
            Malformed: one is far longer than its kind may be.
        """
        if self.images[0].has_long_texts:
            msg = "a text of patient or study in a DICOM header is far longer than its kind may be, so no segmentation "
            msg += "can repeat it; send the files as the scanner wrote them, or take output_format nii.gz"
            raise Malformed(msg)

    def read(self) -> npt.NDArray[np.float32]:
        """Decode the pixels: float32 (1, Z, Y, X) of the modality's values (Hounsfield units of CT).

        Raises:
            Malformed: they are damaged.
            DicomRefused: they end early, or are none that this server decodes.
            MemoryError: there is no memory for them.
        """
        voxels = np.empty((1, *self.geometry.shape), np.float32)
        slices = np.argsort(self.stack.order)  # where each frame goes
        images = {image.file: image for image in self.series.images}
        places: dict[int, npt.NDArray[np.intp]] = {}
        first = 0
        for image in self.series.images:
            places[image.file] = slices[first : first + len(image.planes)]
            first += len(image.planes)
        meter = Meter(self._limits)
        with Crew() as crew:
            for number, file in enumerate(walk(self._container, self._limits, meter)):
                if number in images:
                    _read_image(file, images[number], [voxels[0, place] for place in places[number]], crew, meter)
        return voxels


def open_series(bodies: Sequence[Payload], limits: Limits, series_uid: str | None = None) -> DicomSource:
    """A series in a zip, a tar, one file, or several of those; see :class:`DicomSource`."""
    return DicomSource(Several([open_container(body, limits) for body in bodies]), limits, series_uid)


def _pixels(image: ImageHeader) -> Pixels:
    assert image.pixels is not None  # noqa: S101 (else it had a problem)
    return image.pixels


def _check_syntax(pixels: Pixels) -> None:
    syntax = pixels.encoding.transfer_syntax
    if syntax not in _NATIVE and not is_supported(pixels):
        msg = "the pixels are compressed in a way that this server does not decode; send them uncompressed, or as RLE, "
        raise DicomRefused(DicomReason.UNSUPPORTED_PIXELS, f"{msg}JPEG-LS, JPEG 2000 or lossless JPEG")
    if (pixels.length is None) is (syntax in _NATIVE):
        msg = "pixels are stored in frames and not compressed, or the other way round; send the files as written"
        raise DicomRefused(DicomReason.UNSUPPORTED_PIXELS, msg)


def _read_image(
    file: File, image: ImageHeader, out: Sequence[npt.NDArray[np.float32]], crew: Crew, meter: Meter
) -> None:
    """One object's frames, each into its slice; compressed ones by the crew."""
    pixels = _pixels(image)
    opened = file.open()
    stream = data_set_stream(opened, pixels.encoding, meter)
    stream.skip(pixels.at)
    if pixels.length is not None:
        for stored, rescale, target in zip(native_frames(stream, pixels), image.rescales, out, strict=True):
            rescale.apply(stored, target)
    else:
        size = file.size - pixels.encoding.start - pixels.at
        if size > _MOST_TIMES * pixels.frame_bytes * pixels.frames + SLACK_BYTES:
            msg = "the compressed pixels of an image have far more bytes than they would have uncompressed"
            raise Malformed(msg)
        frames = frames_of(stream.read_exactly(size).data, pixels)
        for frame, rescale, target in zip(frames, image.rescales, out, strict=True):
            crew.do(_read_frame, frame, pixels, rescale, target)
    opened.finish()


def _read_frame(frame: bytes, pixels: Pixels, rescale: Rescale, target: npt.NDArray[np.float32]) -> None:
    stored = decompress(frame, pixels)
    check_range(stored, pixels)
    rescale.apply(stored, target)
