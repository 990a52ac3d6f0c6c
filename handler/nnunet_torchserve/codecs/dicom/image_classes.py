"""Which objects are images that can be segmented: by their class (PS3.4, annex B.5)."""

from __future__ import annotations

from enum import StrEnum


class Modality(StrEnum):
    """What made the image, by the class of the object."""

    CT = "CT"
    MR = "MR"
    PET = "PT"


_CLASS = "1.2.840.10008.5.1.4.1.1."
IMAGE_CLASSES = {
    f"{_CLASS}2": Modality.CT,
    f"{_CLASS}2.1": Modality.CT,
    f"{_CLASS}2.2": Modality.CT,
    f"{_CLASS}4": Modality.MR,
    f"{_CLASS}4.1": Modality.MR,
    f"{_CLASS}4.3": Modality.MR,
    f"{_CLASS}4.4": Modality.MR,
    f"{_CLASS}128": Modality.PET,
    f"{_CLASS}130": Modality.PET,
    f"{_CLASS}128.1": Modality.PET,
}
"""Classes of images (PS3.4, annex B.5): single-frame, enhanced, enhanced colour, converted from single frames."""
