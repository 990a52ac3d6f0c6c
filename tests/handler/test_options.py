from __future__ import annotations

import json

import pytest

from nnunet_torchserve.errors import BadOption, Malformed, UnknownOption
from nnunet_torchserve.options import _EXPECTED, MAX_OPTIONS_BYTES, Options, OutputFormat, parse_options


def test_no_options_are_nnunets_defaults() -> None:
    options = parse_options(None)
    assert options == Options()
    assert (options.folds, options.use_mirroring, options.tile_step_size, options.use_gaussian) == (
        None,
        None,
        0.5,
        True,
    )


@pytest.mark.parametrize(
    ("folds", "expected"), [(3, (3,)), ([0, 4], (0, 4)), ("all", ("all",)), (["all", 1], ("all", 1))]
)
def test_folds_are_one_or_a_list(folds: object, expected: tuple[object, ...]) -> None:
    assert parse_options(json.dumps({"folds": folds}).encode()).folds == expected


def test_output_format_is_one_that_exists() -> None:
    assert parse_options(b'{"output_format": "npz"}').output_format is OutputFormat.NPZ


@pytest.mark.parametrize(
    "text",
    [
        '{"folds": []}',
        '{"series_uid": []}',
        '{"folds": [0, 0]}',
        '{"folds": true}',
        '{"folds": "two"}',
        '{"folds": [1.5]}',
        '{"folds": {"0": 1}}',
        '{"use_mirroring": 1}',
        '{"use_mirroring": "false"}',
        '{"tile_step_size": 0}',
        '{"tile_step_size": 1.01}',
        '{"tile_step_size": 1e-300}',
        '{"tile_step_size": NaN}',
        '{"tile_step_size": "0.5"}',
        '{"timeout_s": 0}',
        '{"timeout_s": -3}',
        '{"timeout_s": Infinity}',
        '{"output_format": "exe"}',
        '{"save_probabilities": null}',
        '{"export": "cubic"}',
        '{"export": "nearest", "save_probabilities": true}',
        '{"preprocess": true}',
        '{"probability_channels": [1]}',
        '{"probability_channels": [], "save_probabilities": true}',
        '{"probability_channels": [1, 1], "save_probabilities": true}',
        '{"probability_channels": [-1], "save_probabilities": true}',
        '{"probability_channels": [1.0], "save_probabilities": true}',
        '{"probability_channels": "1", "save_probabilities": true}',
        '{"probability_dtype": "float16"}',
        '{"probability_dtype": "float64", "save_probabilities": true}',
        '{"probability_format": "nii"}',
        '{"probability_format": "nrrd", "save_probabilities": true}',
        '{"output_format": "gif"}',
        '{"output_format": []}',
        '{"output_format": ["nii", "nii"]}',
        '{"output_format": ["nii", "gif"]}',
        '{"output_format": {"nii": true}}',
        '{"spacing": 1}',
        '{"spacing": "1, 1, 1"}',
        '{"spacing": [1, 1, 0]}',
        '{"spacing": [1, 1, null]}',
        '{"origin": [0, 0, 0]}',
        '{"direction": [1, 0, 0, 0, 1, 0, 0, 0, 1]}',
        '{"direction": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "spacing": [1, 1, 1]}',
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadOption) as refused:
        parse_options(text.encode())
    assert next(iter(json.loads(text))) in str(refused.value)


def test_a_misspelt_option_is_not_ignored() -> None:
    with pytest.raises(UnknownOption, match="use_miroring"):
        parse_options(b'{"use_miroring": false}')


def test_the_name_of_an_unknown_option_comes_back_as_short_ascii() -> None:
    with pytest.raises(UnknownOption) as refused:
        parse_options(json.dumps({"ö\r\n" * 200: 1}).encode())
    assert str(refused.value).isascii()
    assert "\n" not in str(refused.value)
    name, _, options = str(refused.value).partition("; options are ")
    assert len(name) < 100
    assert options.split(", ") == list(Options.model_fields)


@pytest.mark.parametrize("text", [b"[]", b"7", b"not json", b'{"folds": 0', b"\xff\xfe", b'"folds"', b"[" * 4000])
def test_what_is_no_json_object_is_malformed(text: bytes) -> None:
    with pytest.raises(Malformed):
        parse_options(text)


def test_options_are_short() -> None:
    with pytest.raises(Malformed, match=str(MAX_OPTIONS_BYTES)):
        parse_options(b" " * (MAX_OPTIONS_BYTES + 1))


def test_every_option_says_what_would_be_right() -> None:
    assert _EXPECTED.keys() == Options.model_fields.keys()


def test_defaults_may_be_sent() -> None:
    defaults = json.dumps(Options().model_dump(mode="json")).encode()
    assert parse_options(defaults) == Options()


def test_one_channel_is_a_list_of_one() -> None:
    assert parse_options(b'{"save_probabilities": true, "probability_channels": 2}').probability_channels == (2,)
