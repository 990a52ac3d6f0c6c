"""Which elements of a series an answer repeats: modules of patient, study, patient in the study, frame of reference."""

from __future__ import annotations

CHARACTER_SET = 0x00080005

COPIED = {
    CHARACTER_SET: "CS",
    0x00080020: "DA",  # study date
    0x00080030: "TM",  # study time
    0x00080050: "SH",  # accession number
    0x00080090: "PN",  # referring physician
    0x00080201: "SH",  # time zone
    0x00081030: "LO",  # study description
    0x00100010: "PN",  # patient's name
    0x00100020: "LO",  # patient's number
    0x00100021: "LO",  # who gave that
    0x00100030: "DA",  # birth date
    0x00100032: "TM",  # birth time
    0x00100040: "CS",  # sex
    0x00101010: "AS",  # age
    0x00101020: "DS",  # size
    0x00101030: "DS",  # weight
    0x00120062: "CS",  # whether the identity was removed
    0x00120063: "LO",  # by what method
    0x00200010: "SH",  # study's number
    0x00201040: "LO",  # position reference indicator
    0x00280303: "CS",  # whether dates were changed
}
"""Tag -> value representation (PS3.6)."""

EMPTY_IF_UNKNOWN = (
    0x00080020, 0x00080030, 0x00080050, 0x00080090, 0x00100010, 0x00100020, 0x00100030, 0x00100040, 0x00200010,
    0x00201040,
)  # fmt: skip
"""Those that must be there, with no value if it is not known (type 2)."""

SERIES_NUMBER = 0x00200011
DATES = ((0x00080021, 0x00080031), (0x00080022, 0x00080032), (0x00080023, 0x00080033), (0x00080020, 0x00080030))
"""Date and time of series, acquisition, content and study."""

LOSSY_RATIO, LOSSY_METHOD = 0x00282112, 0x00282114
"""How an image lost some of its values, once it did (PS3.3, C.7.6.1.1.5)."""

READ = frozenset(COPIED) | {SERIES_NUMBER, LOSSY_RATIO, LOSSY_METHOD} | {tag for pair in DATES for tag in pair}
LONGEST_BYTES = 1024
"""Of such an element: the longest may have 64 characters, or three times that of a name."""
