"""A label map as a DICOM segmentation (PS3.3, A.51 and A.86) of the series that it was made from.

What lies around the frames is written by pydicom, the frames by :mod:`.frames`. The object is of the source's patient
and study, in its frame of reference, and refers to every one of its images. Before it is handed over, what was written
of places is read back and compared with the source, in mm.

Nothing in it is random, and nothing says when it was made; see :mod:`.uids`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from ... import __version__
from ...options import SegType
from ...provenance import Provenance
from ...segments import Code, color_of
from ...volume import Geometry, LabelMap
from .copied import CHARACTER_SET, COPIED, DATES, EMPTY_IF_UNKNOWN, LOSSY_METHOD, LOSSY_RATIO, SERIES_NUMBER
from .frames import GROUPS_BYTES, MOST_OF_RLE, Frames, binary_frames, labelmap_frames
from .header import ImageHeader
from .library import silenced
from .origin import Origin
from .places import check_places
from .segment import Segment
from .texts import Texts
from .uids import date_and_time, uid_of
from .volume import DicomSource
from .written import decimal, element

_CLASSES = {SegType.BINARY: "1.2.840.10008.5.1.4.1.1.66.4", SegType.LABELMAP: "1.2.840.10008.5.1.4.1.1.66.7"}
_SYNTAXES = {SegType.BINARY: "1.2.840.10008.1.2.1", SegType.LABELMAP: "1.2.840.10008.1.2.5"}
"""BINARY frames are bits, which no lossless codec that readers know takes; LABELMAP frames are packed by RLE, because
readers refuse it in JPEG-LS."""

_IMPLEMENTATION, _MAKER = uid_of("implementation"), "nnunet-torchserve"
_ARTIFICIAL_INTELLIGENCE = Code(value="123110", scheme="DCM", meaning="Artificial Intelligence")
_BACKGROUND = Code(value="125040", scheme="DCM", meaning="Background")
_SERIES_AFTER = 1000
"""Added to the source's series number: a viewer lists the segmentation after what the scanner made."""

_LARGEST_SERIES_NUMBER = 10**6
_SAME_DIRECTION = 1e-6
"""Of a component: a thousandth of a millimetre at the edge of any image."""


@dataclass(frozen=True, slots=True)
class SegmentationRequest:
    """What a segmentation is made of.

    Attributes:
        sources: the series of the case; the answer lies on the grid of the first.
        segments: of the model.
        kind: how they are stored.
        provenance: where it comes from.
        remarks: what the values do not say; see :class:`~...painting.Painting`.
    """

    sources: Sequence[DicomSource]
    segments: Sequence[Segment]
    kind: SegType
    provenance: Provenance
    remarks: Sequence[str] = ()


def encode_segmentation(answer: LabelMap, request: SegmentationRequest, most_bytes: int) -> bytes:
    """The segmentation as a DICOM file.

    Args:
        answer: on the grid of the first source.
        request: what is made of it.
        most_bytes: that its pixels may take.

    Raises:
        ResponseTooLarge: they would take more.
        Malformed: see :meth:`~.volume.DicomSource.check_texts`, which is to be asked before.
        RuntimeError: it would lie elsewhere than its source.
    """
    source = request.sources[0]
    source.check_texts()
    if request.kind is SegType.LABELMAP:
        frames = labelmap_frames(answer.array, source.slices, request.segments)
    else:
        frames = binary_frames(answer.array, source.slices, request.segments, most_bytes)
    with silenced():
        head = _header(answer, request, frames)
    check_places(head, frames, answer.geometry, source.geometry)
    return b"".join([head, frames.groups, *frames.pixels])


def memory_bytes(geometry: Geometry, segments: int, kind: SegType, most_bytes: int) -> int:
    """What making a segmentation takes at most, beside the label map: it is held in parts, and once as a whole.

    Args:
        geometry: of the label map.
        segments: how many there are.
        kind: how they are stored.
        most_bytes: that an answer may have; a binary one that has more is never made.
    """
    depth = geometry.shape[0]
    if kind is SegType.BINARY:
        frames = segments * depth
        return 2 * min(most_bytes, segments * geometry.voxels // 8 + frames * GROUPS_BYTES)
    voxel_bytes = 1 if segments < 2**8 else 2
    return 2 * (MOST_OF_RLE * voxel_bytes * geometry.voxels + depth * GROUPS_BYTES)


def _header(answer: LabelMap, request: SegmentationRequest, frames: Frames) -> bytes:
    """The file up to the functional groups of each frame."""
    from pydicom import Dataset, FileMetaDataset, dcmwrite
    from pydicom.dataset import FileDataset

    source, key = request.sources[0], f"{request.kind} {request.provenance.key}"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = _CLASSES[request.kind]
    meta.MediaStorageSOPInstanceUID = uid_of("instance", key)
    meta.TransferSyntaxUID = _SYNTAXES[request.kind]
    meta.ImplementationClassUID = _IMPLEMENTATION
    meta.ImplementationVersionName = f"NNUNETTS_{__version__}"[:16]
    ds = Dataset()
    texts = Texts.of(source.origin, [segment.name for segment in request.segments])
    copied = _copied(source.origin, texts)
    texts.declare(ds)
    _say_series(ds, request, key, texts)
    _say_sources(ds, request.sources)
    _say_image(ds, answer, request, frames)
    copied |= _losses(ds, request.sources)
    _say_dimensions(ds, request.kind, uid_of("dimensions", key))
    ds.SegmentSequence = [
        *([_background(request.provenance.model)] if request.kind is SegType.LABELMAP else []),
        *(_segment(segment, request.provenance, texts) for segment in request.segments),
    ]
    ds.SharedFunctionalGroupsSequence = [_shared(source)]
    if source.origin.text(0x00120062) == "YES" and not source.origin.text(0x00120063):
        ds.DeidentificationMethod = "as in the source images"  # one of the two that are required
    file = io.BytesIO()
    dcmwrite(file, FileDataset("", Dataset(), preamble=bytes(128), file_meta=meta), enforce_file_format=True)
    return file.getvalue() + _in_order(ds, copied, texts)


def _copied(origin: Origin, texts: Texts) -> dict[int, bytes]:
    """Tag -> element: patient and study as they stand in the source, whether their values are of their kind or not."""
    copied = {}
    for tag, vr in COPIED.items():
        value = origin.elements.get(tag, b"" if tag in EMPTY_IF_UNKNOWN else None)
        if value is not None and not (tag == CHARACTER_SET and texts.declared is not None):
            copied[tag] = element(tag, vr, value)
    return copied


def _in_order(ds: Any, copied: Mapping[int, bytes], texts: Texts) -> bytes:
    """The elements of a data set, written by pydicom, and those that are copied, which it would decode and encode anew.

    An element that is in both is the data set's.
    """
    from pydicom import Dataset
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset

    file = DicomBytesIO()
    file.is_implicit_VR, file.is_little_endian = False, True
    made = {int(tag) for tag in ds.keys()}  # noqa: SIM118 (a data set iterates over its elements)
    for is_made, tags in groupby(sorted(made | set(copied)), key=made.__contains__):
        if is_made:
            part = Dataset()
            part.update({tag: ds[tag] for tag in tags})
            write_dataset(file, part, texts.term)
        else:
            file.write(b"".join(copied[tag] for tag in tags))
    written: bytes = file.getvalue()
    return written


def _say_series(ds: Any, request: SegmentationRequest, key: str, texts: Texts) -> None:
    """What the object is, what made it, and where it belongs."""
    source, provenance = request.sources[0], request.provenance
    ds.SOPClassUID, ds.SOPInstanceUID = _CLASSES[request.kind], uid_of("instance", key)
    ds.StudyInstanceUID, ds.SeriesInstanceUID = source.series.study, uid_of("series", key)
    ds.FrameOfReferenceUID = source.series.frame_of_reference if source.has_frame_of_reference else _made_frame(source)
    date, time = date_and_time([(source.origin.text(day), source.origin.text(clock)) for day, clock in DATES])
    ds.SeriesDate = ds.ContentDate = date
    ds.SeriesTime = ds.ContentTime = time
    ds.Modality = "SEG"
    number = source.origin.text(SERIES_NUMBER)
    is_number = number.isdecimal() and int(number) < _LARGEST_SERIES_NUMBER
    ds.SeriesNumber = str(_SERIES_AFTER + (int(number) if is_number else 0))
    ds.InstanceNumber = "1"
    ds.SeriesDescription = texts.long(f"Segmentation {provenance.model}")
    ds.Manufacturer, ds.ManufacturerModelName = _MAKER, texts.long(provenance.model)
    ds.DeviceSerialNumber = provenance.digest[:16]
    ds.SoftwareVersions = [f"{_MAKER} {__version__}", f"model {provenance.version}"]
    ds.ContentLabel, ds.ContentCreatorName = "SEGMENTATION", ""
    ds.ContentDescription = texts.long(f"Automatic segmentation by {provenance.model}")
    if request.remarks:
        ds.ImageComments = texts.free(" ".join(request.remarks), 10240)


def _made_frame(source: DicomSource) -> str:
    """A frame of reference for a series that names none: the same for all answers of it."""
    return uid_of("frame of reference", source.series.study, source.series.uid)


def _say_sources(ds: Any, sources: Sequence[DicomSource]) -> None:
    """References to every image of every series."""
    ds.SourceImageSequence = [_reference(image) for source in sources for image in source.images]
    own = sources[0].series.study
    by_study = groupby(sorted(sources, key=lambda each: each.series.study), key=lambda each: each.series.study)
    others = []
    for study, found in by_study:
        series = [_series_reference(source) for source in found]
        if study == own:
            ds.ReferencedSeriesSequence = series
        else:
            others.append(_data_set(StudyInstanceUID=study, ReferencedSeriesSequence=series))
    if others:
        ds.StudiesContainingOtherReferencedInstancesSequence = others


def _series_reference(source: DicomSource) -> Any:
    images = [_reference(image) for image in source.images]
    return _data_set(ReferencedInstanceSequence=images, SeriesInstanceUID=source.series.uid)


def _reference(image: ImageHeader) -> Any:
    return _data_set(ReferencedSOPClassUID=image.sop_class, ReferencedSOPInstanceUID=image.sop_instance)


def _say_image(ds: Any, answer: LabelMap, request: SegmentationRequest, frames: Frames) -> None:
    is_binary = request.kind is SegType.BINARY
    bits = 1 if is_binary else 8 if len(request.segments) < 2**8 else 16
    values = [value for segment in request.segments for value in segment.values]
    ds.ImageType = ["DERIVED", "PRIMARY"]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.NumberOfFrames = str(len(frames.slices))
    ds.Rows, ds.Columns = answer.array.shape[1:]
    ds.BitsAllocated = ds.BitsStored = bits
    ds.HighBit = bits - 1
    ds.SegmentationType = "BINARY" if is_binary else "LABELMAP"
    ds.SegmentsOverlap = "YES" if len(values) > len(set(values)) else "NO"
    if not is_binary:
        ds.PixelPaddingValue = 0
        ds.PresentationLUTShape = "IDENTITY"


def _losses(ds: Any, sources: Sequence[DicomSource]) -> dict[int, bytes]:
    """Say whether anything that it was made of had lost some of its values, and copy how.

    Once is for ever (PS3.3, C.7.6.1.1.5).
    """
    lossy = [source for source in sources if any(image.lossy for image in source.images)]
    ds.LossyImageCompression = "01" if lossy else "00"
    if not lossy:
        return {}
    known = lossy[0].origin.elements
    return {
        tag: element(tag, vr, known[tag]) for tag, vr in ((LOSSY_RATIO, "DS"), (LOSSY_METHOD, "CS")) if tag in known
    }


def _say_dimensions(ds: Any, kind: SegType, organization: str) -> None:
    segment = _dimension(organization, 0x0062000B, 0x0062000A, "Referenced Segment Number")
    position = _dimension(organization, 0x00200032, 0x00209113, "Image Position Patient")
    ds.DimensionOrganizationSequence = [_data_set(DimensionOrganizationUID=organization)]
    ds.DimensionIndexSequence = [segment, position] if kind is SegType.BINARY else [position]


def _dimension(organization: str, pointer: int, group: int, label: str) -> Any:
    return _data_set(
        DimensionOrganizationUID=organization,
        DimensionIndexPointer=pointer,
        FunctionalGroupPointer=group,
        DimensionDescriptionLabel=label,
    )


def _segment(segment: Segment, provenance: Provenance, texts: Texts) -> Any:
    codes = segment.said
    name = texts.long(segment.name)
    ds = _data_set(
        SegmentedPropertyCategoryCodeSequence=[_coded(codes.category)],
        SegmentNumber=segment.number,
        SegmentLabel=name,
        SegmentAlgorithmType="AUTOMATIC",
        SegmentAlgorithmName=texts.long(provenance.model),
        SegmentedPropertyTypeCodeSequence=[_coded(codes.type)],
        RecommendedDisplayCIELabValue=cielab(color_of(segment.number, codes)),
        SegmentationAlgorithmIdentificationSequence=[_algorithm(provenance, texts)],
    )
    if name != segment.name:
        ds.SegmentDescription = texts.free(segment.name, 1024)
    if codes.laterality is not None:
        [kind] = ds.SegmentedPropertyTypeCodeSequence
        kind.SegmentedPropertyTypeModifierCodeSequence = [_coded(codes.laterality)]
    if codes.region is not None:
        ds.AnatomicRegionSequence = [_coded(codes.region)]
    return ds


def _background(model: str) -> Any:
    """What a LABELMAP's 0 is: it has a number of its own, as every value has."""
    return _data_set(
        SegmentedPropertyCategoryCodeSequence=[_coded(_BACKGROUND)],
        SegmentNumber=0,
        SegmentLabel="Background",
        SegmentAlgorithmType="AUTOMATIC",
        SegmentAlgorithmName=model[:64],
        SegmentedPropertyTypeCodeSequence=[_coded(_BACKGROUND)],
    )


def _algorithm(provenance: Provenance, texts: Texts) -> Any:
    said = provenance.as_json()
    parameters = f"digest=sha256:{provenance.digest} backends={','.join(said['backends'])} "
    parameters += f"images={','.join(said['images'])} options={said['options']}"
    return _data_set(
        AlgorithmFamilyCodeSequence=[_coded(_ARTIFICIAL_INTELLIGENCE)],
        AlgorithmVersion=texts.long(provenance.version),
        AlgorithmParameters=texts.free(parameters, 10240),
        AlgorithmName=texts.long(provenance.model),
        AlgorithmSource=f"{_MAKER} {__version__}",
    )


def _shared(source: DicomSource) -> Any:
    """What all frames have in common: the grid's directions and steps.

    Directions are written as the first slice has them, digit for digit, if those are the grid's: viewers look whether
    they are equal. Of several that were rounded each in its own way the grid's are right for all.
    """
    first, grid = source.slices[0].plane, source.geometry
    own = np.concatenate([first.along_row, first.along_column])
    common = grid.direction[:, :2].T.ravel()
    x, y, z = grid.spacing
    orientation = (own if np.abs(own - common).max() <= _SAME_DIRECTION else common).tolist()
    return _data_set(
        PlaneOrientationSequence=[_data_set(ImageOrientationPatient=[decimal(number) for number in orientation])],
        PixelMeasuresSequence=[
            _data_set(SliceThickness=decimal(z), SpacingBetweenSlices=decimal(z), PixelSpacing=[decimal(y), decimal(x)])
        ],
    )


def _coded(code: Code) -> Any:
    return _data_set(CodeValue=code.value, CodingSchemeDesignator=code.scheme, CodeMeaning=code.meaning)


def _data_set(**elements: Any) -> Any:
    from pydicom import Dataset

    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def cielab(color: tuple[int, int, int]) -> list[int]:
    """Red, green and blue (0 to 255, sRGB) as PS3.3, C.10.7.1.1 stores CIELab: 16 bits each.

    Of the white D65, as readers take it (highdicom, dcmqi).
    """
    from skimage.color import rgb2lab

    lightness, a, b = rgb2lab(np.array(color) / 255).tolist()
    scaled = (lightness / 100, (a + 128) / 255, (b + 128) / 255)
    return [round(min(max(share, 0), 1) * 65535) for share in scaled]
