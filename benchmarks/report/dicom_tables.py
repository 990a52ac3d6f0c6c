"""The tables of docs/performance.md about DICOM."""

from __future__ import annotations

from benchmarks.report.results import load, median_and_quartiles, seconds, shape, source, table


def dicom_reading() -> str:
    """A series to voxels, beside SimpleITK."""
    document = load("dicom")
    rows = [
        (
            f"{kind}, {shape(document['shape'])}",
            f"{found['file_bytes'] / 1e6:.0f} MB",
            seconds(found["seconds"]["ours"]["median"]),
            seconds(found["seconds"]["SimpleITK"]["median"]),
            median_and_quartiles(found["times_simpleitk"]),
            f"{found['peak_volumes']:.1f}",
            found["different_voxels"],
        )
        for kind, found in document["series"].items()
    ]
    head = (
        "a series", "zip", "here", "SimpleITK", "times SimpleITK's seconds (quartiles)", "peak volumes",
        "voxels different",
    )  # fmt: skip
    return table(head, rows) + "\n\n" + source("dicom")


def dicom_writing() -> str:
    """A segmentation object, beside highdicom."""
    document = load("dicom_seg")
    rows = [
        (
            kind,
            found["frames"],
            seconds(found["seconds"]["ours"]["median"]),
            seconds(found["seconds"]["highdicom"]["median"]),
            median_and_quartiles(found["parts_of_highdicom"]),
            ", ".join(f"{found['bytes'][side] / 1e6:.1f}" for side in ("ours", "highdicom")),
            found["different_voxels"],
        )
        for kind, found in document["kinds"].items()
    ]
    head = (
        f"a SEG of {document['structures']} structures, {shape(document['shape'])}", "frames", "here", "highdicom",
        "parts of highdicom's seconds (quartiles)", "MB: here, highdicom", "voxels different",
    )  # fmt: skip
    return table(head, rows) + "\n\n" + source("dicom_seg")


def dicom_series() -> str:
    """A whole request as DICOM and as NIfTI."""
    document = load("dicom_series")
    took = document["seconds"]
    row = (
        shape(document["image"]["shape"]),
        seconds(took["NIfTI"]["median"]),
        seconds(took["DICOM"]["median"]),
        median_and_quartiles(document["times_nifti"]),
        document["different_voxels"],
    )
    head = (
        "a head with mirroring", "as NIfTI", "as a DICOM series", "times NIfTI's seconds (quartiles)",
        "voxels different",
    )  # fmt: skip
    return table(head, [row]) + "\n\n" + source("dicom_series")
