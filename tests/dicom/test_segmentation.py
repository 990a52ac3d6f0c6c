"""A label map as DICOM SEG lies where its series lies, is the same whenever it is asked for, and others read it.

highdicom and dcmqi read every object; dciodvfy, which knows the standard, finds no error in any.
"""

from __future__ import annotations

import tracemalloc
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest

from nnunet_torchserve import codecs
from nnunet_torchserve.backend import Backend
from nnunet_torchserve.codecs import DicomSource
from nnunet_torchserve.codecs.dicom.frames import Frames
from nnunet_torchserve.codecs.dicom.places import check_places
from nnunet_torchserve.errors import BadOption, Malformed, ResponseTooLarge
from nnunet_torchserve.options import Options, OutputFormat, SegType
from nnunet_torchserve.painting import Painting, read_painting
from nnunet_torchserve.provenance import Provenance
from nnunet_torchserve.segments import Code, SegmentCodes
from nnunet_torchserve.volume import LabelMap
from support.dicom_files import (
    ACQUISITIONS,
    SECRET,
    change,
    enhanced,
    file_of,
    files_of,
    series,
    tarred,
    zip_of,
    zipped,
)
from support.segmentations import by_dcmqi, by_highdicom, by_pydicom, check_object, check_set, voxels, voxels_of
from support.written_segmentations import PROVENANCE, label_map, segmentation_of, source_of

SHAPE = (5, 6, 7)
"""z, y, x: 42 pixels a slice, which are no whole bytes of bits."""

VOXELS = np.random.default_rng(3).integers(0, 3000, SHAPE).astype(np.int16)
SPACING = (0.7, 0.9, 2.5)
AFFINE = ACQUISITIONS["oblique"].affine(SPACING)
LIVER = SegmentCodes(
    category=Code(value="91723000", scheme="SCT", meaning="Anatomical Structure"),
    type=Code(value="10200004", scheme="SCT", meaning="Liver"),
    color=(221, 130, 101),
)
KIDNEY = SegmentCodes(
    category=LIVER.category,
    type=Code(value="64033007", scheme="SCT", meaning="Kidney"),
    laterality=Code(value="24028007", scheme="SCT", meaning="Right"),
)
TUMOUR = SegmentCodes(
    category=Code(value="49755003", scheme="SCT", meaning="Morphologically Abnormal Structure"),
    type=Code(value="108369006", scheme="SCT", meaning="Neoplasm"),
    region=LIVER.type,
)


LABELS = label_map(SHAPE)


def written(
    source: DicomSource, labels: npt.NDArray[Any] = LABELS, kind: SegType = SegType.BINARY, **more: Any
) -> bytes:
    return segmentation_of(source, labels, kind, **more)


def plain(**changes: Any) -> DicomSource:
    return source_of(zip_of(series(VOXELS, AFFINE, **changes)))


def is_where(found: tuple[Any, Any], source: DicomSource, mask: npt.NDArray[np.bool_]) -> bool:
    """Whether a mask that another reader found has the voxels of ours (z, y, x), by their places in the patient."""
    return voxels(*found, source.geometry.affine) == voxels_of(mask)


def check_by_others(body: bytes, source: DicomSource, folder: Path, labels: npt.NDArray[Any] = LABELS) -> None:
    """Both readers find every structure where it lies, voxel by voxel in the patient, and nothing else."""
    check_object(body, folder)
    for found in (by_highdicom(body), by_dcmqi(body, folder)):
        for number in np.unique(labels[labels > 0]).tolist():
            assert is_where(found[number], source, labels == number)
        for number in set(found) - {0, *np.unique(labels).tolist()}:
            assert not found[number][0].any()


@pytest.mark.parametrize("kind", SegType)
@pytest.mark.parametrize("name", ACQUISITIONS)
def test_others_find_every_voxel_where_it_lies_in_the_patient(name: str, kind: SegType, tmp_path: Path) -> None:
    acquisition = ACQUISITIONS[name]
    source = source_of(zip_of(series(VOXELS, acquisition.affine(SPACING), backwards=acquisition.backwards)))
    np.testing.assert_allclose(source.geometry.affine, acquisition.affine(SPACING), atol=1e-6)
    check_by_others(written(source, kind=kind), source, tmp_path)


@pytest.mark.parametrize("kind", SegType)
def test_an_enhanced_object_is_referred_to_frame_by_frame(kind: SegType, tmp_path: Path) -> None:
    order = [3, 1, 0, 4, 2]
    whole = enhanced(VOXELS, AFFINE, order=order)
    source = source_of(file_of(whole))
    body = written(source, kind=kind)
    check_by_others(body, source, tmp_path)
    for group in by_pydicom(body).PerFrameFunctionalGroupsSequence:
        [reference] = group.DerivationImageSequence[0].SourceImageSequence
        assert reference.ReferencedSOPInstanceUID == whole.SOPInstanceUID
        theirs = whole.PerFrameFunctionalGroupsSequence[reference.ReferencedFrameNumber - 1]
        assert group.PlanePositionSequence == theirs.PlanePositionSequence


@pytest.mark.parametrize("kind", SegType)
def test_every_image_is_referred_to_and_every_frame_refers_to_its_own(kind: SegType) -> None:
    images = series(VOXELS, AFFINE)
    found = by_pydicom(written(source_of(zip_of(images)), kind=kind))
    uids = {ds.SOPInstanceUID for ds in images}
    [referenced] = found.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == images[0].SeriesInstanceUID
    assert {each.ReferencedSOPInstanceUID for each in referenced.ReferencedInstanceSequence} == uids
    assert {each.ReferencedSOPInstanceUID for each in found.SourceImageSequence} == uids
    position_of = {ds.SOPInstanceUID: ds.ImagePositionPatient for ds in images}
    assert len(found.PerFrameFunctionalGroupsSequence) == found.NumberOfFrames == (4 if kind is SegType.BINARY else 5)
    for group in found.PerFrameFunctionalGroupsSequence:
        [reference] = group.DerivationImageSequence[0].SourceImageSequence
        assert group.PlanePositionSequence[0].ImagePositionPatient == position_of[reference.ReferencedSOPInstanceUID]


def test_it_is_the_patient_s_in_the_study_and_frame_of_reference_of_the_source(tmp_path: Path) -> None:
    images = series(VOXELS, AFFINE, StudyTime="101112.5", StudyID="7", AccessionNumber="A1", SeriesNumber=4)
    found = by_pydicom(written(source_of(zip_of(images))))
    for keyword in (
        *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "FrameOfReferenceUID"),
        *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName", "StudyDescription"),
    ):
        assert found[keyword].value == images[0][keyword].value, keyword
    assert found.SeriesInstanceUID != images[0].SeriesInstanceUID
    assert (found.Modality, found.SeriesNumber, found.ContentDate) == ("SEG", 1004, images[0].SeriesDate)
    check_set([file_of(ds) for ds in images] + [written(source_of(zip_of(images)), kind=k) for k in SegType], tmp_path)


@pytest.mark.parametrize(
    ("terms", "name"),
    [
        ("ISO_IR 100", "Müller^Jörg".encode("latin-1")),
        ("ISO_IR 192", "Müller^Jörg=名前".encode()),
        ("\\ISO 2022 IR 87", b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B"),
        ("GB18030", "王^小东".encode("gb18030")),
    ],
)
def test_a_name_is_copied_byte_for_byte(terms: str, name: bytes, tmp_path: Path) -> None:
    """And our own texts are in its character set, or in ASCII where that is a set of several."""
    name += b" " * (len(name) % 2)
    stand_in = "N" * len(name)
    files = files_of(series(VOXELS, AFFINE, SpecificCharacterSet=terms.split("\\"), PatientName=stand_in))
    source = source_of(zipped({key: file.replace(stand_in.encode(), name) for key, file in files.items()}))
    painting = read_painting({"background": 0, "Gefäß": 1, "b": 2}, None, has_regions=False)
    body = written(source, painting=painting)
    check_object(body, tmp_path)
    assert name in body
    found = by_pydicom(body)
    assert found.PatientName.original_string == name.rstrip(b" ")
    assert found.SegmentSequence[0].SegmentLabel == ("Gefa?" if "2022" in terms else "Gefäß")


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"])
def test_whose_it_is_is_read_in_every_encoding(syntax: str) -> None:
    stored = VOXELS.byteswap() if syntax.endswith(".2.2") else VOXELS
    found = by_pydicom(written(source_of(zip_of(series(stored, AFFINE, PatientWeight="71.5"), syntax))))
    assert (str(found.PatientName), found.PatientWeight) == (SECRET, 71.5)


def test_what_is_not_known_of_a_patient_is_empty_and_a_date_is_there_all_the_same(tmp_path: Path) -> None:
    nothing = dict.fromkeys(
        ["PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "SeriesDate", "ContentDate"]
    )
    body = written(plain(**nothing, PatientIdentityRemoved="YES", SpecificCharacterSet=None))
    check_object(body, tmp_path)
    found = by_pydicom(body)
    assert (found.PatientName, found.PatientID, found.StudyDate) == ("", "", "")
    assert (found.ContentDate, found.ContentTime) == ("19700101", "000000")
    assert found.PatientIdentityRemoved == "YES"


def with_other_bytes(images: Sequence[pydicom.Dataset], old: str, new: str) -> DicomSource:
    """The series where files have ``new``, padded to the same length, for a text ``old``."""
    files = {name: file.replace(old.encode(), new.ljust(len(old)).encode()) for name, file in files_of(images).items()}
    return source_of(zipped(files))


@pytest.mark.parametrize("is_said", [False, True])
def test_a_series_without_a_frame_of_reference_gets_one_that_is_always_the_same(is_said: bool, tmp_path: Path) -> None:
    """Or with one that is no UID."""

    def source(seed: str = "a") -> DicomSource:
        images = series(VOXELS, AFFINE, seed=seed)
        if is_said:
            return with_other_bytes(images, images[0].FrameOfReferenceUID, "the patient's bed")
        return plain(seed=seed, FrameOfReferenceUID=None)

    body = written(source())
    check_object(body, tmp_path)
    made = by_pydicom(body).FrameOfReferenceUID
    assert made == by_pydicom(written(source(), kind=SegType.LABELMAP)).FrameOfReferenceUID
    assert made != by_pydicom(written(source("b"))).FrameOfReferenceUID


def test_a_character_set_that_nobody_knows_is_copied_like_the_texts() -> None:
    body = written(with_other_bytes(series(VOXELS, AFFINE), "ISO_IR 100", "ISO_IR 999"))
    assert b"ISO_IR 999" in body
    assert SECRET.encode() in body


@pytest.mark.parametrize("terms", ["ISO_IR 192", "ISO 2022 IR 87", "ISO_IR 192\\GBK", "\\ISO 2022 IR 149", "ISO_IR 13"])
@pytest.mark.parametrize(
    "number", [b"M\xfcller\xff 12", b"\\\\\\12", b"\x1b$B;3ED\x1b(B\x1b(B", b" 007 ", b"A\0B", b"\xe5\x90"]
)
def test_a_number_is_copied_byte_for_byte_whatever_its_bytes_mean(terms: str, number: bytes) -> None:
    """A PACS files an object with whose number it has; what is decoded and encoded anew may be another's."""
    number += b" " * (len(number) % 2)
    files = files_of(series(VOXELS, AFFINE, SpecificCharacterSet="S" * len(terms), PatientID="P" * len(number)))
    said = {"S" * len(terms): terms.encode(), "P" * len(number): number}
    for old, new in said.items():
        files = {name: file.replace(old.encode(), new) for name, file in files.items()}
    body = written(source_of(zipped(files)))
    head = b"\x10\0\x20\0LO" + len(number).to_bytes(2, "little")
    assert head + number + b"\x10\0\x30\0DA" in body
    with warnings.catch_warnings(action="ignore"):  # of the set
        found = [each.SegmentLabel for each in by_pydicom(body).SegmentSequence]
    assert found == ["liver", "spleen", "not there"]


def test_a_text_that_is_far_too_long_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = files_of(series(VOXELS, AFFINE, StudyDescription="x" * 2000))
    with pytest.raises(Malformed, match=r"far longer than its kind.*nii\.gz"):
        written(source_of(zipped(files)))


# --- the same for the same --------------------------------------------------------------------------------------------


def _identity(source: DicomSource, **more: Any) -> tuple[str, str]:
    provenance = Provenance("model", "1.0", more.pop("digest", "ab" * 32), (source.origin.digest,), None, {"folds": 0})
    found = by_pydicom(written(source, provenance=provenance, **more))
    return str(found.SeriesInstanceUID), str(found.SOPInstanceUID)


@pytest.mark.parametrize("kind", SegType)
def test_the_same_request_gives_the_same_bytes(kind: SegType) -> None:
    assert written(plain(), kind=kind) == written(plain(), kind=kind)


def test_how_files_are_packed_named_and_ordered_changes_nothing() -> None:
    images = series(VOXELS, AFFINE)
    files = files_of(images)
    ways = [
        source_of(zipped(files)),
        source_of(tarred(files, packed=True)),
        source_of(*files.values()),
        source_of(zip_of(images[::-1])),
        source_of(zipped({"README": b"junk"} | dict(reversed(files.items())))),
    ]
    assert len({_identity(source) for source in ways}) == 1
    assert len({source.origin.digest for source in ways}) == 1
    for kind in SegType:
        assert len({written(source, kind=kind) for source in ways}) == 1


def test_the_order_of_files_decides_no_digit_of_what_slices_say_in_several_ways() -> None:
    """Of one UID there must not be two objects."""
    images = series(VOXELS, AFFINE)
    for z, ds in enumerate(images):
        change(ds, PixelSpacing=["0.9", f"0.70000{z}"])
    bodies = {written(source_of(zip_of([images[z] for z in order]))) for order in ([0, 1, 2, 3, 4], [3, 1, 4, 2, 0])}
    assert len(bodies) == 1
    assert by_pydicom(bodies.pop()).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing == [
        0.9,
        0.7,
    ]


def test_another_image_model_or_kind_is_another_object() -> None:
    other = VOXELS.copy()
    other[2, 3, 4] += 1
    found = [
        _identity(plain()),
        _identity(source_of(zip_of(series(other, AFFINE)))),
        _identity(plain(PatientName="DOE^JOHN")),
        _identity(plain(), digest="cd" * 32),
        _identity(plain(), kind=SegType.LABELMAP),
    ]
    assert len({series for series, _ in found}) == len({instance for _, instance in found}) == len(found)
    assert all(len(uid) <= 64 for pair in found for uid in pair)


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_a_structure_that_was_not_found_is_named_and_has_no_frame() -> None:
    found = by_pydicom(written(plain()))
    assert [each.SegmentLabel for each in found.SegmentSequence] == ["liver", "spleen", "not there"]
    shown = {g.SegmentIdentificationSequence[0].ReferencedSegmentNumber for g in found.PerFrameFunctionalGroupsSequence}
    assert shown == {1, 2}


@pytest.mark.parametrize("kind", SegType)
def test_an_empty_mask_is_an_answer(kind: SegType, tmp_path: Path) -> None:
    source = plain()
    body = written(source, np.zeros(SHAPE, np.uint8), kind)
    check_by_others(body, source, tmp_path, np.zeros(SHAPE, np.uint8))
    assert by_pydicom(body).NumberOfFrames == (1 if kind is SegType.BINARY else SHAPE[0])


def test_codes_are_those_of_the_archive_and_never_guessed(tmp_path: Path) -> None:
    painting = read_painting(
        {"background": 0, "liver": 1, "kidney": 2, "lesion": 3, "spleen": 4}, None, has_regions=False
    )
    codes = {"liver": LIVER, "kidney": KIDNEY, "lesion": TUMOUR}
    body = written(plain(), painting=painting, codes=codes)
    check_object(body, tmp_path)
    liver, kidney, lesion, spleen = by_pydicom(body).SegmentSequence
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    [side] = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence
    assert (side.CodeValue, side.CodeMeaning) == ("24028007", "Right")
    assert lesion.AnatomicRegionSequence[0].CodeMeaning == "Liver"
    assert spleen.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"
    assert spleen.SegmentLabel == "spleen"


def test_each_segment_says_which_algorithm_made_it_from_what() -> None:
    [first, *_] = by_pydicom(written(plain())).SegmentSequence
    [algorithm] = first.SegmentationAlgorithmIdentificationSequence
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("model", "1.0")
    assert f"digest=sha256:{'ab' * 32}" in algorithm.AlgorithmParameters
    assert "backends=eager " in algorithm.AlgorithmParameters
    assert f"images=sha256:{'cd' * 32}" in algorithm.AlgorithmParameters
    assert first.SegmentAlgorithmType == "AUTOMATIC"


def test_what_ran_the_network_is_said_in_the_object_too() -> None:
    """A header of the answer does not come with it into an archive."""
    other = replace(PROVENANCE, backends=(Backend.OPENVINO_FLOAT32,))
    [first, *_] = by_pydicom(written(plain(), provenance=other)).SegmentSequence
    [algorithm] = first.SegmentationAlgorithmIdentificationSequence
    assert "backends=openvino:float32 " in algorithm.AlgorithmParameters


def test_what_an_image_lost_its_segmentation_has_lost_too(tmp_path: Path) -> None:
    """PS3.3, C.7.6.1.1.5: whatever became of it since."""
    assert by_pydicom(written(plain())).LossyImageCompression == "00"
    lossy = {"LossyImageCompressionRatio": ["7.5", "2"], "LossyImageCompressionMethod": ["ISO_14495_1", "ISO_15444_1"]}
    images = series(VOXELS, AFFINE)
    change(images[0], **lossy)
    change(images[3], LossyImageCompression="01")
    for kind in SegType:
        body = written(source_of(zip_of(images)), kind=kind)
        check_object(body, tmp_path)
        found = by_pydicom(body)
        assert found.LossyImageCompression == "01"
        assert found.LossyImageCompressionRatio == [7.5, 2]
        assert found.LossyImageCompressionMethod == lossy["LossyImageCompressionMethod"]


def test_colors_are_the_archive_s_or_unlike_each_other(tmp_path: Path) -> None:
    import highdicom

    found = by_pydicom(written(plain(), codes={"liver": LIVER})).SegmentSequence
    values = [tuple(each.RecommendedDisplayCIELabValue) for each in found]
    assert len(set(values)) == len(values)
    shown = highdicom.color.CIELabColor.from_dicom_value(values[0]).to_rgb()
    np.testing.assert_allclose(shown, LIVER.color or (), atol=1)


def test_long_and_odd_names_are_said_as_far_as_dicom_can(tmp_path: Path) -> None:
    long = "a structure whose name has more characters than a label of DICOM may have, by far"
    painting = read_painting({"background": 0, long: 1, "left\\right\n": 2}, None, has_regions=False)
    body = written(plain(), painting=painting)
    check_object(body, tmp_path)
    first, second = by_pydicom(body).SegmentSequence
    assert (first.SegmentLabel, first.SegmentDescription) == (long[:64].strip(), long)
    assert second.SegmentLabel == "left/right"


def test_regions_overlap_as_segments(tmp_path: Path) -> None:
    order, labels = (1, 2, 3), {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    painting = read_painting(labels, order, has_regions=True)
    painted = LABELS.copy()
    painted[2, 3, 4] = 3
    source = plain()
    body = written(source, painted, painting=painting)
    check_object(body, tmp_path)
    assert by_pydicom(body).SegmentsOverlap == "YES"
    for found in (by_highdicom(body), by_dcmqi(body, tmp_path)):
        for number, values in {1: [1, 2, 3], 2: [2, 3], 3: [3]}.items():
            assert is_where(found[number], source, np.isin(painted, values))
    with pytest.raises(BadOption, match=r"'whole' and 'core' have voxels in common; take binary"):
        written(source, painted, SegType.LABELMAP, painting=painting)


@pytest.mark.parametrize("kind", SegType)
def test_more_segments_than_a_byte_counts(kind: SegType, tmp_path: Path) -> None:
    names = {"background": 0} | {f"structure {number}": number for number in range(1, 301)}
    painting = read_painting(names, None, has_regions=False)
    labels = np.zeros(SHAPE, np.uint16)
    labels[1, 2:4, 1:3], labels[2, 0, :4], labels[3, 1, 1:6] = 7, 256, 300
    source = plain()
    body = written(source, labels, kind, painting=painting)
    check_object(body, tmp_path)
    for number, found in by_highdicom(body, (7, 256, 300)).items():
        assert is_where(found, source, labels == number)


@pytest.mark.parametrize("shape", [(3, 1, 1), (9, 3, 5), (17, 8, 8), (4, 5, 200)])
@pytest.mark.parametrize("kind", SegType)
def test_noise_of_any_size_comes_back(kind: SegType, shape: tuple[int, int, int], tmp_path: Path) -> None:
    """Bits of frames that are no whole bytes follow each other; RLE ends with each row."""
    random = np.random.default_rng(sum(shape))
    source = source_of(zip_of(series(np.zeros(shape, np.int16), AFFINE)))
    labels = random.integers(0, 4, shape).astype(np.uint8)
    body = written(source, labels, kind)
    check_object(body, tmp_path)
    found = by_pydicom(body)
    pixels = np.reshape(found.pixel_array, (-1, *shape[1:]))
    if kind is SegType.LABELMAP:
        np.testing.assert_array_equal(pixels, labels)
        return
    z_of = {str(each.plane.position.round(3)): z for z, each in enumerate(source.slices)}
    back = np.zeros(shape, np.uint8)
    for frame, group in zip(pixels, found.PerFrameFunctionalGroupsSequence, strict=True):
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        back[z_of[str(position.round(3))]][frame > 0] = number
    np.testing.assert_array_equal(back, labels)


def test_channels_of_several_studies_are_all_referred_to(tmp_path: Path) -> None:
    first = plain()
    images = series(VOXELS, AFFINE, "MR", seed="b", FrameOfReferenceUID=first.series.frame_of_reference)
    second = source_of(zip_of(images))
    body = written(first, others=[second])
    check_object(body, tmp_path)
    found = by_pydicom(body)
    [other] = found.StudiesContainingOtherReferencedInstancesSequence
    assert other.StudyInstanceUID == images[0].StudyInstanceUID
    assert other.ReferencedSeriesSequence[0].SeriesInstanceUID == images[0].SeriesInstanceUID
    assert len(found.SourceImageSequence) == 2 * SHAPE[0]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_an_object_that_would_lie_elsewhere_is_never_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a slice, which no reader would notice."""
    source = plain()
    for each in source.slices:
        each.plane.position[:] += source.geometry.affine[:3, 2] / 2
    with pytest.raises(RuntimeError, match=r"lies elsewhere than its source, by 1\.250 mm"):
        written(source)


def test_an_object_whose_frames_are_out_of_order_is_never_sent() -> None:
    source = plain()
    source.slices.reverse()
    with pytest.raises(RuntimeError, match="lies elsewhere than its source"):
        written(source)


def test_a_label_map_on_another_grid_is_never_sent() -> None:
    source, other = plain(), source_of(zip_of(series(VOXELS, ACQUISITIONS["axial"].affine(SPACING))))
    frames = Frames(range(5), b"", [])
    with pytest.raises(RuntimeError, match="another grid"):
        check_places(b"", frames, other.geometry, source.geometry)


def test_far_more_bits_than_an_answer_may_have_are_refused_before_they_are_made() -> None:
    with pytest.raises(ResponseTooLarge, match="seg_type labelmap"):
        written(plain(), limit=1000)
    written(plain(), kind=SegType.LABELMAP, limit=1000)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (SegType.BINARY, OutputFormat.DICOM_SEG),
        (SegType.BINARY, (OutputFormat.DICOM_SEG, OutputFormat.NIFTI)),
        (SegType.LABELMAP, OutputFormat.DICOM_SEG),
    ],
)
def test_what_making_an_object_takes_is_known_before(kind: SegType, form: Any) -> None:
    """Every structure in every slice, in pixels that do not pack."""
    shape, names = (12, 256, 256), {"background": 0} | {f"structure {number}": number for number in range(1, 31)}
    painting = read_painting(names, None, has_regions=False)
    source = source_of(zip_of(series(np.zeros(shape, np.int16), AFFINE)))
    labels = np.random.default_rng(0).integers(0, 31, shape).astype(np.uint8)
    asked = codecs.answer_form(Options(output_format=form, seg_type=kind), source.native_format, source.geometry)
    about = codecs.About([source], painting, {}, PROVENANCE, 10**9)
    making = codecs.making_bytes(source.geometry, asked, len(painting.structures), 10**9)
    tracemalloc.start()
    file = codecs.encode(LabelMap(labels, source.geometry), asked, about)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(file.body) + labels.size < peak
    assert peak < making + 3 * labels.size  # what every format takes beside


def test_only_a_series_becomes_a_segmentation() -> None:
    source = plain()
    wanted = Options(output_format=OutputFormat.DICOM_SEG)
    with pytest.raises(BadOption, match="this image is none"):
        codecs.answer_form(wanted, OutputFormat.NIFTI, source.geometry)
    with pytest.raises(BadOption, match="seg_type labelmap is for output_format dicom-seg"):
        codecs.answer_form(
            Options(output_format=OutputFormat.JSON, seg_type=SegType.LABELMAP), source.native_format, source.geometry
        )


def test_structures_that_cannot_be_told_apart_are_no_segments() -> None:
    with pytest.raises(BadOption, match=r"does not tell 'a' from others.*nii\.gz"):
        written(plain(), painting=Painting({"a": None, "b": (2,)}))


def test_jitter_of_directions_is_written_as_the_grid_has_it(tmp_path: Path) -> None:
    images = series(VOXELS, AFFINE)
    for z, ds in enumerate(images):
        row = np.array(ds.ImageOrientationPatient[:3], float) + (1e-5 if z % 2 else -1e-5)
        change(ds, ImageOrientationPatient=[f"{n:.9f}" for n in (*row, *ds.ImageOrientationPatient[3:])])
    source = source_of(zip_of(images))
    check_by_others(written(source), source, tmp_path)
