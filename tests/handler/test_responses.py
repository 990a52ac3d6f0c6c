from __future__ import annotations

import json
from http import HTTPStatus

import pytest

from nnunet_torchserve import errors
from nnunet_torchserve.errors import BundleError, RequestError, ServingError
from nnunet_torchserve.responses import ResponseMaker, usable_request_id

MAKER = ResponseMaker(model="name=m; version=1.0; digest=sha256:0", limit=10)

EXPECTED = {
    "Malformed": (400, "malformed"),
    "UnknownOption": (400, "unknown_option"),
    "BadOption": (400, "bad_option"),
    "TooLarge": (413, "too_large"),
    "ResponseTooLarge": (413, "response_too_large"),
    "UnknownFormat": (415, "unknown_format"),
    "WrongChannels": (422, "wrong_channels"),
    "ChannelsDisagree": (422, "channels_disagree"),
    "NonFinite": (422, "non_finite"),
    "WrongRange": (422, "wrong_range"),
    "TooThin": (422, "too_thin"),
    "BadSpacing": (422, "bad_spacing"),
    "UnknownFold": (422, "unknown_fold"),
    "OrientationUnknown": (422, "orientation_unknown"),
    "DicomUnavailable": (415, "dicom_unavailable"),
    "DicomRefused": (422, "malformed"),  # each has its reason's
    "Busy": (429, "busy"),
    "NoEngine": (503, "internal"),
    "Draining": (503, "draining"),
    "CaseFailed": (500, "case_failed"),
    "NonFiniteLogits": (500, "case_failed"),
    "ServingError": (500, "internal"),
    "Deadline": (504, "deadline"),
    "OutOfMemory": (507, "out_of_memory"),
}


def test_every_error_has_its_status_and_code() -> None:
    classes = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception) and value not in (BundleError, RequestError)
    }
    assert {name: (int(c.status), c.code) for name, c in classes.items() if issubclass(c, ServingError)} == EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_a_problem_says_what_was_wrong(name: str) -> None:
    reason = (errors.DicomReason.NO_IMAGES,) if name == "DicomRefused" else ()
    error: ServingError = getattr(errors, name)(*reason, "what was wrong")
    response = MAKER.problem(error, "id-1")
    document = json.loads(response.body)
    assert response.content_type == "application/problem+json"
    assert (response.status, document["status"]) == (error.status, int(error.status))
    assert (document["code"], document["detail"], document["request_id"]) == (error.code, "what was wrong", "id-1")


def test_an_answer_above_the_limit_is_not_sent() -> None:
    with pytest.raises(errors.ResponseTooLarge):
        MAKER.result(b"x" * 11, "application/gzip", "id", "", backends=("eager",))
    assert MAKER.result(b"x" * 10, "application/gzip", "id", "", backends=("eager",)).status == HTTPStatus.OK


def test_a_line_break_never_reaches_a_header() -> None:
    with pytest.raises(ValueError, match="header"):
        MAKER.result(b"", "application/gzip", "id\r\nSet-Cookie: x", "", backends=("eager",))


@pytest.mark.parametrize("candidate", ["a", "study 7/series 2", "x" * 128])
def test_a_plain_request_id_is_kept(candidate: str) -> None:
    assert usable_request_id(candidate) == candidate


@pytest.mark.parametrize("candidate", [None, "", " ", "x" * 129, "ä", "a\r\nb", "a\x00", " a", "a\n"])
def test_an_id_that_cannot_stand_in_a_header_is_dropped(candidate: str | None) -> None:
    assert usable_request_id(candidate) is None
