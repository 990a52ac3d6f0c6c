"""What a body is that is no image of ours: for the people who send what they have.

Only the first bytes are looked at, and nothing is parsed.
"""

from __future__ import annotations

import codecs

_DICOM_AT = 128
_UNPACK = "unpack it and send the image"

_STARTS = {
    b"\xff\xd8\xff": "a JPEG, which has lost part of the picture",
    b"\xff\x4f\xff\x51": "a JPEG 2000",
    b"\0\0\0\x0cjP  ": "a JPEG 2000",
    b"GIF8": "a GIF",
    b"BM": "a BMP of a kind that is not read; save it as PNG",
    b"RIFF": "a WebP picture or another RIFF file",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "a file that was packed by gzip twice",
    b"BZh": f"a file packed by bzip2; {_UNPACK}",
    b"\xfd7zXZ\0": f"a file packed by xz; {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"a file packed by zstd; {_UNPACK}",
    b"7z\xbc\xaf\x27\x1c": f"a 7z archive; {_UNPACK}",
    b"Rar!": f"a RAR archive; {_UNPACK}",
    b"PK": "a zip that is empty or in parts",
    b"\x5c\x01\0\0": "an Analyze header or image",
    b"\0\0\x01\x5c": "an Analyze header or image",
    b"\0\0\0\x01": "an image of FreeSurfer (.mgh, .mgz); convert it, with mri_convert for example",
    b"\x89HDF": "an HDF5 file (also MINC 2 or MATLAB 7.3); convert it first",
    b"CDF": "a NetCDF or MINC 1 file; convert it first",
    b"MATLAB": "a MATLAB file; send the array as npy",
    b"\x80": "a pickle, which is never opened; send the array as npy, by numpy.save",
    b"<": "a page or an XML document",
    b"{": "a JSON document; send the image itself",
}
"""First bytes -> what it is, and sometimes what to do."""

_IN_GZIP = {
    b"\x89PNG": "a PNG packed by gzip; send it as it is",
    b"BM": "a BMP packed by gzip; send it as it is",
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "a TIFF packed by gzip; send it as it is"),
    b"PK\x03\x04": "a zip or npz packed by gzip; send it as it is",
}
"""The same of what is taken, but not in gzip."""


def name_of(head: bytes, *, packed: bool) -> str:
    """What such a body is.

    Args:
        head: its first bytes, unpacked.
        packed: whether it came in gzip.
    """
    if not head:
        return "an empty file in gzip" if packed else "an empty body"
    if packed and head[_DICOM_AT:].startswith(b"DICM"):
        return "a DICOM file packed by gzip; send it as it is, or the series in a zip"
    for names in (_IN_GZIP, _STARTS) if packed else (_STARTS,):
        for magic, name in names.items():
            if head.startswith(magic):
                return name
    if _is_text(head):
        return "text packed by gzip, and no image" if packed else "text, and no image"
    return "bytes of no format that is served"


def _is_text(head: bytes) -> bool:
    """Whether these are characters that people write; the last one may be cut."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return text.replace("\t", "").replace("\r", "").replace("\n", "").isprintable()
