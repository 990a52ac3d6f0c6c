"""An answer's files: which ones a request gets, how large they are at least, and their bytes.

The label map goes into one file format or several; probabilities into a file of their own, except that an npz holds
both. What is more than one file comes as a zip.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ..errors import BadOption
from ..limits import Limits
from ..options import Options, OutputFormat, ProbabilityFormat, SegType
from ..painting import Painting
from ..provenance import Provenance
from ..segments import Codes
from ..volume import Geometry, LabelMap
from . import dicom
from .arrays import encode_npz
from .bmp import encode_bmp
from .dicom import DicomSource, SegmentationRequest, check_segments, encode_segmentation, segments_of
from .inflate import gzipped
from .metaimage import encode_metaimage
from .nifti_headers import encode_nifti
from .nrrd import encode_nrrd
from .pictures import MOST_OF_8_BITS
from .png import encode_png
from .report import encode_report
from .source import ImageSource
from .tiff import encode_tiff

PROPERTIES_FILE = "properties.json"

_BINARY = "application/octet-stream"
_CONTENT_TYPE = {
    OutputFormat.NIFTI_GZ: "application/gzip",
    OutputFormat.NIFTI: _BINARY,
    OutputFormat.NRRD: _BINARY,
    OutputFormat.MHA: _BINARY,
    OutputFormat.NPZ: _BINARY,
    OutputFormat.PNG: "image/png",
    OutputFormat.TIFF: "image/tiff",
    OutputFormat.BMP: "image/bmp",
    OutputFormat.JSON: "application/json",
    OutputFormat.DICOM_SEG: "application/dicom",
}
_NAMES = {OutputFormat.JSON: "report.json", OutputFormat.DICOM_SEG: "labels.dcm"}
"""Of files in a zip, where they are not ``labels`` and the format."""

_ONE_SLICE = {OutputFormat.PNG, OutputFormat.BMP}


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """An answer's body and its content type."""

    body: bytes
    content_type: str


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """The files of one answer.

    Attributes:
        labels: formats of the label map.
        seg_type: of a DICOM segmentation among them.
        probabilities: format of the probabilities; ``None`` if there are none.
        properties: whether the case's properties come too.
        zipped: in a zip, or a single file.
    """

    labels: tuple[OutputFormat, ...]
    probabilities: ProbabilityFormat | None
    properties: bool
    zipped: bool
    seg_type: SegType = SegType.BINARY

    @property
    def says_where_from(self) -> bool:
        """Whether a file of the answer says where it comes from."""
        return not {OutputFormat.JSON, OutputFormat.DICOM_SEG}.isdisjoint(self.labels)

    @property
    def one_npz(self) -> bool:
        """Whether labels and probabilities share a single npz."""
        return not self.zipped and self.probabilities is not None


@dataclass(frozen=True, slots=True)
class About:
    """What files say of an answer beside its voxels.

    Attributes:
        images: the input; a NIfTI answer repeats the first one's header in part, a DICOM one refers to all.
        painting: what the labels mean.
        codes: what the structures are, as far as the archive says it.
        provenance: where the answer comes from; ``None`` where no file says it.
        limit: bytes that an answer may have.
    """

    images: Sequence[ImageSource]
    painting: Painting
    codes: Codes = field(default_factory=dict)
    provenance: Provenance | None = None
    limit: int = Limits().response_bytes


def answer_form(
    options: Options, native: OutputFormat, geometry: Geometry, largest: int = 0, painting: Painting | None = None
) -> AnswerForm:
    """What a request asks for, in the input's own format where it names none.

    Args:
        options: of the request.
        native: the input's own format.
        geometry: the image's.
        largest: the largest value that the model may give a voxel.
        painting: what the values mean, which decides whether they can be segments.

    Raises:
        BadOption: a volume cannot be a png or bmp, nor 16 bits a bmp, nor anything but a DICOM series a DICOM
            segmentation; or the model's structures can be none.
    """
    asked = options.output_format
    labels = asked if isinstance(asked, tuple) else (asked or native,)
    pictures = [each for each in labels if each in _ONE_SLICE]
    if pictures and geometry.shape[0] > 1:
        msg = f"output_format {pictures[0]} holds one slice, the image has {geometry.shape[0]}; take another format"
        raise BadOption(msg)
    if OutputFormat.BMP in labels and largest > MOST_OF_8_BITS:
        msg = f"output_format bmp holds values up to {MOST_OF_8_BITS}, this model's go to {largest}; take png or tif"
        raise BadOption(msg)
    if OutputFormat.DICOM_SEG in labels:
        if native is not OutputFormat.DICOM_SEG:
            msg = "output_format dicom-seg refers to the images of a DICOM series, and this image is none; take another"
            raise BadOption(msg)
        if painting is not None:
            check_segments(painting, options.seg_type)
    elif options.seg_type is not SegType.BINARY:
        msg = f"seg_type {options.seg_type} is for output_format dicom-seg; leave it out"
        raise BadOption(msg)
    probabilities = options.probability_format if options.save_probabilities else None
    in_one = labels == (OutputFormat.NPZ,) and probabilities is ProbabilityFormat.NPZ
    zipped = isinstance(asked, tuple) or options.properties or (probabilities is not None and not in_one)
    return AnswerForm(labels, probabilities, options.properties, zipped, options.seg_type)


def smallest_answer(geometry: Geometry, form: AnswerForm, probability_bytes: int) -> int:
    """Bytes that an answer has at least, known from the header alone.

    Probabilities travel uncompressed unless they go to a nii.gz; a compressed label map may be close to nothing.

    Args:
        geometry: the image's.
        form: the files.
        probability_bytes: what the probabilities of one voxel take.
    """
    plain = form.one_npz or OutputFormat.NIFTI in form.labels
    if form.probabilities is ProbabilityFormat.NIFTI_GZ:
        probability_bytes = 0
    return (plain + probability_bytes) * geometry.voxels


def making_bytes(geometry: Geometry, form: AnswerForm, structures: int, limit: int) -> int:
    """Bytes that the answer's files take while they are made, where that may be more than decoding took.

    Label maps are a byte or two a voxel in every format but one: a DICOM segmentation with a bit for each structure.

    Args:
        geometry: the image's.
        form: the files.
        structures: of the model.
        limit: bytes that an answer may have.
    """
    if OutputFormat.DICOM_SEG not in form.labels:
        return 0
    making = dicom.memory_bytes(geometry, structures, form.seg_type, limit)
    return making + making // 2 if form.zipped else making  # as a file of its own, and in the zip


def encode(answer: LabelMap, form: AnswerForm, about: About, properties: bytes | None = None) -> EncodedFile:
    """Write the answer.

    Args:
        answer: labels, and probabilities where they were asked for.
        form: the files.
        about: what they say beside them.
        properties: the case's, where the form has them.

    Raises:
        ResponseTooLarge: a DICOM segmentation has more bytes than an answer may have.
    """
    if not form.zipped:
        [output] = form.labels
        body = encode_npz(answer, with_labels=True) if form.one_npz else _labels(answer, output, form, about)
        return EncodedFile(body, _CONTENT_TYPE[output])
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as files:
        for output in form.labels:
            name = _NAMES.get(output, f"labels.{output}")
            files.writestr(_zip_entry(name), _labels(answer, output, form, about))
        if form.probabilities is not None:
            name = f"probabilities.{form.probabilities}"
            files.writestr(_zip_entry(name), _probabilities(answer, form.probabilities, about.images[0]))
        if properties is not None:
            files.writestr(_zip_entry(PROPERTIES_FILE), properties)
    return EncodedFile(archive.getvalue(), "application/zip")


def _labels(answer: LabelMap, output: OutputFormat, form: AnswerForm, about: About) -> bytes:
    labels, geometry = answer.array, answer.geometry
    nifti = partial(encode_nifti, labels, geometry, about.images[0].nifti_header)
    writers: dict[OutputFormat, Callable[[], bytes]] = {
        OutputFormat.NIFTI_GZ: lambda: gzipped(nifti()),
        OutputFormat.NIFTI: nifti,
        OutputFormat.NRRD: lambda: encode_nrrd(labels, geometry.in_space()),
        OutputFormat.MHA: lambda: encode_metaimage(labels, geometry.in_space()),
        OutputFormat.NPZ: lambda: encode_npz(LabelMap(labels, geometry), with_labels=True),
        OutputFormat.PNG: lambda: encode_png(labels),
        OutputFormat.TIFF: lambda: encode_tiff(labels, flat=geometry.is_flat),
        OutputFormat.BMP: lambda: encode_bmp(labels),
        OutputFormat.JSON: lambda: encode_report(labels, geometry, about.painting, about.provenance),
        OutputFormat.DICOM_SEG: lambda: _segmentation(answer, form.seg_type, about),
    }
    return writers[output]()


def _segmentation(answer: LabelMap, kind: SegType, about: About) -> bytes:
    sources = [image for image in about.images if isinstance(image, DicomSource)]
    segments = segments_of(about.painting, about.codes)
    assert about.provenance is not None  # noqa: S101 (the form says where it comes from)
    request = SegmentationRequest(sources, segments, kind, about.provenance, about.painting.remarks)
    return encode_segmentation(answer, request, about.limit)


def _probabilities(answer: LabelMap, form: ProbabilityFormat, image: ImageSource) -> bytes:
    if form is ProbabilityFormat.NPZ:
        return encode_npz(answer, with_labels=False)
    probabilities = np.asarray(answer.probabilities)
    body = encode_nifti(probabilities, answer.geometry, image.nifti_header)
    return gzipped(body) if form is ProbabilityFormat.NIFTI_GZ else body


def _zip_entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
