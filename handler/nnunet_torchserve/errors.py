"""Every way a request, an archive or a server can fail, with the HTTP answer that belongs to it.

::

    ServingError                    500 internal
    ├── RequestError                the client can mend it
    │   ├── Malformed               400 malformed
    │   ├── UnknownOption           400 unknown_option
    │   ├── BadOption               400 bad_option
    │   ├── TooLarge                413 too_large
    │   ├── ResponseTooLarge        413 response_too_large
    │   ├── UnknownFormat           415 unknown_format
    │   │   └── DicomUnavailable    415 dicom_unavailable
    │   ├── WrongChannels           422 wrong_channels
    │   ├── ChannelsDisagree        422 channels_disagree
    │   ├── NonFinite               422 non_finite
    │   ├── WrongRange              422 wrong_range
    │   ├── TooThin                 422 too_thin
    │   ├── BadSpacing              422 bad_spacing
    │   ├── OrientationUnknown      422 orientation_unknown
    │   ├── DicomRefused            422 dicom_…, see :class:`DicomReason`
    │   └── UnknownFold             422 unknown_fold
    ├── Busy                        429 busy
    ├── CaseFailed                  500 case_failed
    │   └── NonFiniteLogits         500 case_failed
    ├── NoEngine                    503 internal
    ├── Draining                    503 draining
    ├── Deadline                    504 deadline
    └── OutOfMemory                 507 out_of_memory
    BundleError                     the archive cannot be served; the worker does not become READY

Above a configured limit is 413; what the format cannot mean is 400; a valid file that this model cannot take is 422.
The message of a :class:`ServingError` goes to the client: it says what was wrong and what would be right, and never
holds a path, a header field's text or anything else that could name a patient.
"""

from __future__ import annotations

from enum import StrEnum
from http import HTTPStatus
from typing import ClassVar

LONGEST_NAMES = 2000
"""Characters of a list of names in a message."""


class ServingError(Exception):
    """A request failed. The message is safe to send.

    Attributes:
        status: a class constant.
        code: of the class, but for errors that have several.
        retry_after_s: seconds after which the same request may succeed, or ``None`` if waiting does not help.
    """

    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    code: str = "internal"

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestError(ServingError):
    """The request is at fault; the same request will fail again."""

    status = HTTPStatus.BAD_REQUEST
    code = "malformed"


class Malformed(RequestError):
    """Bytes that break their own format: a cut gzip stream, a header that contradicts itself, JSON that is none."""


class UnknownOption(RequestError):
    """An option that this server does not have."""

    code = "unknown_option"


class BadOption(RequestError):
    """A known option with a value that it cannot have."""

    code = "bad_option"


class TooLarge(RequestError):
    """Above a configured limit: body bytes, expanded bytes, voxels, patches."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "too_large"


class ResponseTooLarge(RequestError):
    """The answer would not fit the response limit; refused before anything is computed."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "response_too_large"


class UnknownFormat(RequestError):
    """The bytes are no image format that this server reads."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    code = "unknown_format"


class WrongChannels(RequestError):
    """Another number of channels than the model was trained with."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "wrong_channels"


class ChannelsDisagree(RequestError):
    """Channels of one case with different shapes or spacings."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "channels_disagree"


class NonFinite(RequestError):
    """NaN or infinite voxels: stock nnU-Net would answer with a silent all-zero mask."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "non_finite"


class WrongRange(RequestError):
    """Voxels with values that the model's normalisation cannot take."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "wrong_range"


class TooThin(RequestError):
    """The volume would have no voxel left on the network's grid."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "too_thin"


class BadSpacing(RequestError):
    """A voxel spacing that is zero, negative or not finite."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "bad_spacing"


class OrientationUnknown(RequestError):
    """DICOM for a model whose archive does not say how the images of its training lay: it might be mirrored."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "orientation_unknown"


class DicomUnavailable(UnknownFormat):
    """DICOM for a server without the packages that read it."""

    code = "dicom_unavailable"


class DicomReason(StrEnum):
    """Why a DICOM series is no volume that could be segmented: the codes of :class:`DicomRefused`."""

    NO_IMAGES = "dicom_no_images"
    INCOMPLETE = "dicom_incomplete"
    SEVERAL_SERIES = "dicom_several_series"
    UNKNOWN_SERIES = "dicom_unknown_series"
    SEVERAL_PATIENTS = "dicom_several_patients"
    SEVERAL_FRAMES_OF_REFERENCE = "dicom_several_frames_of_reference"
    LOCALIZER = "dicom_localizer"
    SINGLE_IMAGE = "dicom_single_image"
    NO_POSITION = "dicom_no_position"
    UNEQUAL_IMAGES = "dicom_unequal_images"
    MISSING_SLICES = "dicom_missing_slices"
    DOUBLED_SLICES = "dicom_doubled_slices"
    UNEVEN_SLICES = "dicom_uneven_slices"
    GANTRY_TILT = "dicom_gantry_tilt"
    TIME_SERIES = "dicom_time_series"
    COLOUR = "dicom_colour"
    TRUNCATED_PIXELS = "dicom_truncated_pixels"
    UNSUPPORTED_PIXELS = "dicom_unsupported_pixels"


class DicomRefused(RequestError):
    """A DICOM series that is no volume, or not surely one.

    Attributes:
        code: the reason's.
    """

    status = HTTPStatus.UNPROCESSABLE_ENTITY

    def __init__(self, reason: DicomReason, message: str) -> None:
        super().__init__(message)
        self.code = str(reason)


class UnknownFold(RequestError):
    """A fold that the archive does not hold."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "unknown_fold"


class Busy(ServingError):
    """As many cases as allowed wait for memory already, or there is none to load an idle model's networks again."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "busy"


class NoEngine(ServingError):
    """No engine could be started, or it died again and again under other cases."""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class Draining(ServingError):
    """The model takes no new requests, because its workers or its version are about to change."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "draining"


class CaseFailed(ServingError):
    """The network gave no usable answer for this case."""

    code = "case_failed"


class NonFiniteLogits(CaseFailed):
    """The network's logits hold NaN or infinity: stock nnU-Net would answer with background there, silently."""

    def __init__(
        self,
        message: str = "the network's logits for this case are not finite; no segmentation can be given",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message, retry_after_s)


class Deadline(ServingError):
    """The request's time ran out."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    code = "deadline"


class OutOfMemory(ServingError):
    """Within the limits, but more than this server's memory holds."""

    status = HTTPStatus.INSUFFICIENT_STORAGE
    code = "out_of_memory"


class BundleError(Exception):
    """The archive cannot be served here: damaged, of another schema, or its requirements are not met."""
