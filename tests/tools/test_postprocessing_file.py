"""What nnU-Net wrote of a postprocessing is read, its pickle is never unpickled, and all else is refused by name."""

from __future__ import annotations

import io
import json
import multiprocessing
import multiprocessing.pool
import os
import pickle
import shutil
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK
from batchgenerators.utilities.file_and_folder_operations import save_json, save_pickle
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.postprocessing.remove_connected_components import (
    apply_postprocessing,
    determine_postprocessing,
    remove_all_but_largest_component_from_segmentation,
)
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunet_torchserve.export.postprocessing import postprocess
from nnunet_torchserve.postprocessing import KeepLargest, Postprocessing
from nnunet_torchserve_tools.errors import ToolError, UsageError
from nnunet_torchserve_tools.postprocessing_file import (
    FoundPostprocessing,
    postprocessing_in,
    postprocessing_of_ensemble,
    postprocessing_of_folds,
    read_postprocessing,
)
from support.examples import examples

STOCK = remove_all_but_largest_component_from_segmentation
Labels = npt.NDArray[np.uint8]


def keep(*labels: int, background: int = 0) -> KeepLargest:
    return KeepLargest(labels=labels, background=background)


def write(folder: Path, *arguments: dict[str, Any], what: str = "pkl json") -> Path:
    """As ``determine_postprocessing`` does; gives the pickle."""
    folder.mkdir(parents=True, exist_ok=True)
    functions = [STOCK] * len(arguments)
    if "pkl" in what:
        save_pickle((functions, list(arguments)), folder / "postprocessing.pkl")
    if "json" in what:
        document = {
            "postprocessing_fns": [each.__name__ for each in functions],
            "postprocessing_kwargs": list(arguments),
        }
        recursive_fix_for_json_export(document)
        save_json(document, str(folder / "postprocessing.json"))
    return folder / "postprocessing.pkl"


# What nnU-Net itself determines


def label_map(strays: bool) -> Labels:
    """Three nested boxes, and strays of each label."""
    labels = np.zeros((18, 20, 22), np.uint8)
    labels[2:12, 2:12, 2:12], labels[4:9, 4:9, 4:9], labels[6:8, 6:8, 6:8] = 1, 2, 3
    if strays:
        for label in (1, 2, 3):
            labels[5 * label : 5 * label + 2, 16:18, 16:18] = label
    return labels


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's pools are threads: processes would import it all again."""
    context = types.SimpleNamespace(Pool=multiprocessing.pool.ThreadPool)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _method: context)


@pytest.mark.parametrize("model", ["five_folds", "regions"])
def test_what_nnunet_determines_is_read_and_does_the_same(
    model: str, models: dict[str, Path], in_threads: None, tmp_path: Path
) -> None:
    predictions, truth = tmp_path / "predictions", tmp_path / "truth"
    for folder, strays in ((predictions, True), (truth, False)):
        folder.mkdir()
        for case in ("a", "b"):
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(label_map(strays)), str(folder / f"{case}.nii.gz"))
    plans, dataset = (str(models[model] / f"{name}.json") for name in ("plans", "dataset"))
    functions, arguments = determine_postprocessing(str(predictions), str(truth), plans, dataset, 1)
    assert functions
    found = postprocessing_in(predictions)
    assert found is not None
    assert found.file == predictions / "postprocessing.pkl"
    assert read_postprocessing(predictions / "postprocessing.json") == found.postprocessing
    labels = label_map(strays=True)
    expected = apply_postprocessing(labels.astype(np.float32), functions, arguments)
    assert np.any(expected != labels)
    np.testing.assert_array_equal(postprocess(found.postprocessing, labels), expected)


# Its forms


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ([], []),
        (
            [{"labels_or_regions": [np.int64(2), np.int64(1)]}, {"labels_or_regions": np.int64(3)}],
            [keep(1, 2), keep(3)],
        ),
        ([{"labels_or_regions": (1, 2, 3)}, {"labels_or_regions": (3,)}], [keep(1, 2, 3), keep(3)]),
        ([{"labels_or_regions": [(1, 300), 2, [65535]]}], [keep(1, 2, 300, 65535)]),
        ([{"labels_or_regions": []}], [keep()]),
        ([{"labels_or_regions": 1, "background_label": 7}], [keep(1, background=7)]),
        ([{"labels_or_regions": [np.uint8(1), np.int32(2)]}], [keep(1, 2)]),
    ],
)
@pytest.mark.parametrize("what", ["pkl", "json", "pkl json"])
def test_every_form_of_labels_and_regions_is_read(
    arguments: list[dict[str, Any]], steps: list[KeepLargest], what: str, tmp_path: Path
) -> None:
    file = write(tmp_path, *arguments, what=what)
    expected = Postprocessing(steps=tuple(steps))
    assert read_postprocessing(file if "pkl" in what else file.with_suffix(".json")) == expected


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("label", [1, np.int64(1), np.uint16(1)])
def test_a_pickle_of_another_protocol_is_read(protocol: int, label: Any, tmp_path: Path) -> None:
    file = tmp_path / "postprocessing.pkl"
    file.write_bytes(pickle.dumps(([STOCK], [{"labels_or_regions": [label, 2]}]), protocol))
    assert read_postprocessing(file).steps == (keep(1, 2),)


def test_numbers_of_numpy_1_are_read(tmp_path: Path) -> None:
    file = tmp_path / "postprocessing.pkl"
    content = pickle.dumps(([STOCK], [{"labels_or_regions": [np.int64(1)]}]), 3)
    assert b"numpy._core." in content
    file.write_bytes(content.replace(b"numpy._core.", b"numpy.core."))
    assert read_postprocessing(file).steps == (keep(1),)


def test_a_pickle_and_its_json_must_say_the_same(tmp_path: Path) -> None:
    file = write(tmp_path, {"labels_or_regions": 1})
    write(tmp_path, {"labels_or_regions": 2}, what="json")
    with pytest.raises(ToolError, match="say different things"):
        read_postprocessing(file)
    assert read_postprocessing(file.with_suffix(".json")).steps == (keep(2),)


def test_a_file_that_is_not_there_or_another_one_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"labels_or_regions": 1})
    for name, said in (("other.pkl", "does not exist"), ("", "neither"), ("summary.txt", "neither")):
        with pytest.raises(UsageError, match=said):
            read_postprocessing(tmp_path / name)


# What is not nnU-Net's


class Call:
    """Unpickled, it calls something."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self._call


class Stateful:
    """Unpickled, a function gets a state."""

    def __reduce__(self) -> Any:
        return STOCK, (), {"__code__": 1}


def somebodys_own(labels: Labels) -> Labels:
    return labels


OS_SYSTEM = f"{os.name}.system"


@pytest.mark.parametrize(
    ("held", "name"),
    [
        (([somebodys_own], [{}]), "test_postprocessing_file.somebodys_own"),
        (([STOCK], [{"labels_or_regions": Call(os.system, "exit")}]), OS_SYSTEM),
        (Call(eval, "1"), "builtins.eval"),
        (([STOCK], [{"labels_or_regions": Call(STOCK, 1, 2)}]), f"a call of {STOCK.__module__}.{STOCK.__name__}"),
        (([STOCK], [{"labels_or_regions": Stateful()}]), f"a call of {STOCK.__module__}"),
        (([np.dtype], [{"labels_or_regions": 1}]), "the function numpy.dtype"),
        (([STOCK], [{"labels_or_regions": {1, 2}}]), "EMPTY_SET"),
        (([STOCK], [{"labels_or_regions": bytearray(b"1")}]), "builtins.bytearray"),
        (([STOCK], [{"labels_or_regions": np.arange(2)}]), "multiarray._reconstruct"),
        (([STOCK], [{"labels_or_regions": Path("/etc")}]), "pathlib.PosixPath"),
        (([STOCK], [{"labels_or_regions": 1.0}]), "BINFLOAT"),
        (([STOCK], [{"labels_or_regions": np.float64(1)}]), "a float64 in place of a label"),
        (([STOCK], [{"labels_or_regions": True}]), "a bool in place of a label"),
        (([STOCK], [{"labels_or_regions": "1"}]), "a str in place of a label"),
        (([STOCK], [{"labels_or_regions": [[[1]]]}]), "a list in place of a label"),
        (([STOCK], [{"labels_or_regions": -1}]), "not from 0 to 65535"),
        (([STOCK], [{"labels_or_regions": 2**70}]), "not from 0 to 65535"),
        (([STOCK], [{"labels_or_regions": 1, "background_label": None}]), "a NoneType in place of a label"),
        (([STOCK], [{"labels_or_regions": 1, "min_size": 5}]), "the argument min_size"),
    ],
)
def test_anything_else_is_refused_by_its_name(held: object, name: str, tmp_path: Path) -> None:
    file = tmp_path / "postprocessing.pkl"
    file.write_bytes(pickle.dumps(held, 4))
    with pytest.raises(ToolError) as refusal:
        read_postprocessing(file)
    assert name in str(refusal.value)
    assert "is the only function that can be served" in str(refusal.value)


@pytest.mark.parametrize(
    "held",
    [
        None, [], ([STOCK],), ([STOCK], []), ([STOCK], [1]), ([STOCK], [{}]), ({}, {}), [[STOCK], [{}]],
        ([STOCK.__name__], [{"labels_or_regions": 1}]), (STOCK, [{"labels_or_regions": 1}]),
        ([STOCK], [{1: 2}]), ([[STOCK]], [{"labels_or_regions": 1}]),
    ],
)  # fmt: skip
def test_a_pickle_of_another_shape_is_said_to_be_none_of_nnunets(held: object, tmp_path: Path) -> None:
    (tmp_path / "postprocessing.pkl").write_bytes(pickle.dumps(held, 4))
    with pytest.raises(ToolError, match="is damaged or no postprocessing file"):
        read_postprocessing(tmp_path / "postprocessing.pkl")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", "{}", "[" * 10**5, '{"postprocessing_fns": ["f"], "postprocessing_kwargs": []}', "\udc80",
        '{"postprocessing_fns": [["f"]], "postprocessing_kwargs": [{}]}',
    ],
)  # fmt: skip
def test_a_json_of_another_shape_is_said_to_be_none_of_nnunets(text: str, tmp_path: Path) -> None:
    (tmp_path / "postprocessing.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ToolError, match="is damaged or no postprocessing file"):
        read_postprocessing(tmp_path / "postprocessing.json")


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (("fill_holes", {}), "the function fill_holes"),
        ((f"{STOCK.__name__}\u001b[2J", {}), r"the function remove_all_but_largest_component_from_segmentation\\x1b"),
        ((STOCK.__name__, {"labels_or_regions": 1.5}), "a float in place of a label"),
        ((STOCK.__name__, {"labels_or_regions": {"1": 1}}), "a dict in place of a label"),
    ],
)
def test_what_a_json_names_is_refused_too(step: tuple[str, object], name: str, tmp_path: Path) -> None:
    document = {"postprocessing_fns": [step[0]], "postprocessing_kwargs": [step[1]]}
    (tmp_path / "postprocessing.json").write_text(json.dumps(document))
    with pytest.raises(ToolError, match=name):
        read_postprocessing(tmp_path / "postprocessing.json")


# Pickles that are made to harm

NAME = f"c{STOCK.__module__}\n{STOCK.__name__}\n".encode()
KEY = b"\x8c\x11labels_or_regions"


def nested(levels: int, one: bytes, inside: bytes) -> bytes:
    """``inside`` twice, that twice, and so on, by references."""
    levels_of = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + one for n in range(levels))
    return inside + levels_of


HOSTILE = {
    "inst": b"\x80\x04(ios\nsystem\n.",
    "obj": b"\x80\x04(cos\nsystem\nX\x04\x00\x00\x00trueo.",
    "newobj": b"\x80\x04" + NAME + b")\x81.",
    "extension": b"\x80\x04\x82\x01.",
    "persistent": b"\x80\x04Pname\n.",
    "build_function": b"\x80\x04" + NAME + b"}b.",
    "build_dtype": b"\x80\x04cnumpy\ndtype\n}b.",
    "append_to_function": b"\x80\x04" + NAME + b"K\x01a.",
    "set_item_of_list": b"\x80\x04]K\x00K\x01s.",
    "dtype_of_a_list": b"\x80\x04cnumpy\ndtype\n]\x85R}b.",
    "memo_of_billions": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "memo_that_is_empty": b"\x80\x04h\x05.",
    "bytes_of_terabytes": b"\x80\x04\x8e" + (2**42).to_bytes(8, "little") + b".",
    "text_of_gigabytes": b"\x80\x04X\xff\xff\xff\xff.",
    "byte_array": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "number_of_gigabytes": b"\x80\x04\x8b\xff\xff\xff\x7f.",
    "number_of_many_digits": b"I" + b"9" * 10**5 + b"\n.",
    "marks": b"\x80\x04" + b"(" * 10**5 + b".",
    "lists_in_lists": b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "tuples_in_tuples": b"\x80\x04N" + b"\x85" * 10**5 + b".",
    "tuples_that_double": b"\x80\x04" + nested(120, b"\x86", b")") + b".",
    "a_key_that_doubles": b"\x80\x04}" + nested(120, b"\x86", b")") + b"K\x01s.",
    "labels_that_double": b"\x80\x04]" + NAME + b"a]}" + KEY + nested(120, b"\x86", b")") + b"sa\x86.",
    "no_stop": b"\x80\x04N",
    "nothing": b"",
    "zip": b"PK\x03\x04",
    "of_python_2": b"(lp0\n.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_is_made_to_harm_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "postprocessing.pkl"
    file.write_bytes(HOSTILE[name])
    with pytest.raises(ToolError) as refusal:
        read_postprocessing(file)
    assert len(str(refusal.value)) < 500 + len(str(tmp_path))


SHARED: dict[str, list[dict[str, Any]]] = {
    "a_list_of_a_list": [{"labels_or_regions": [list(range(1000))] * 200}],
    "steps_of_one_list": [{"labels_or_regions": list(range(300, 3300))}] * 200,
    "steps_of_a_list_of_nothing": [{"labels_or_regions": [()] * 2000}] * 200,
    "steps": [{"labels_or_regions": 1}] * 5000,
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("suffix", ["pkl", "json"])
def test_labels_and_steps_without_end_are_refused(name: str, suffix: str, tmp_path: Path) -> None:
    """In a pickle they may share one list, so that its file is short."""
    functions, arguments, file = [STOCK] * len(SHARED[name]), SHARED[name], tmp_path / f"postprocessing.{suffix}"
    if suffix == "pkl":
        file.write_bytes(pickle.dumps((functions, arguments)))
        assert file.stat().st_size < 25_000
    else:
        names = [each.__name__ for each in functions]
        file.write_text(json.dumps({"postprocessing_fns": names, "postprocessing_kwargs": arguments}))
    said = "5000 steps, more than 4096" if name == "steps" else "more than 131072 labels in its steps"
    with pytest.raises(ToolError, match=said):
        read_postprocessing(file)


def test_what_nnunet_writes_of_many_labels_is_read(tmp_path: Path) -> None:
    """All of them in one step, and each in a step of its own."""
    labels = list(range(1, 1001))
    steps: list[dict[str, Any]] = [{"labels_or_regions": labels}]
    steps += [{"labels_or_regions": label} for label in labels]
    assert len(read_postprocessing(write(tmp_path, *steps)).steps) == 1001


def of_numpy(size: int, count: int) -> bytes:
    """A list of so many texts of NumPy's, all of the same bytes."""
    spec = f"S{size}".encode()
    dtype = b"cnumpy\ndtype\n\x8c" + bytes([len(spec)]) + spec + b"\x85Rq\x00"
    raw = b"B" + size.to_bytes(4, "little") + b"x" * size + b"q\x01"
    scalar = b"cnumpy._core.multiarray\nscalar\nq\x02"
    return b"\x80\x04" + dtype + raw + scalar + b"](" + b"h\x02h\x00h\x01\x86R" * count + b"e."


def test_a_text_of_numpys_is_not_made_again_and_again(tmp_path: Path) -> None:
    """One of half a megabyte, named 60,000 times, would be 30 GB."""
    (tmp_path / "postprocessing.pkl").write_bytes(of_numpy(2**19, 60_000))
    with pytest.raises(ToolError, match="a NumPy number of more than 32 bytes"):
        read_postprocessing(tmp_path / "postprocessing.pkl")


@pytest.mark.parametrize(("name", "length"), [("postprocessing.pkl", 2**20 + 1), ("postprocessing.json", 2**24 + 1)])
def test_a_file_that_is_too_long_is_not_read(name: str, length: int, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(length)
    with pytest.raises(ToolError, match=f"more than {length - 1} bytes"):
        read_postprocessing(tmp_path / name)


def test_a_pickle_that_was_cut_is_damaged_wherever_it_was(tmp_path: Path) -> None:
    file = write(tmp_path, {"labels_or_regions": [np.int64(1), np.int64(2)]}, {"labels_or_regions": (1, 2)}, what="pkl")
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(ToolError, match="is damaged"):
            read_postprocessing(file)


WHOLE = pickle.dumps(([STOCK] * 2, [{"labels_or_regions": [np.int64(1)]}, {"labels_or_regions": (1, 2)}]))


@examples(500)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_whatever_bytes_are_changed_nothing_else_comes_of_it(changes: list[tuple[int, int]]) -> None:
    from nnunet_torchserve_tools import postprocessing_file

    content = bytearray(WHOLE)
    for place, byte in changes:
        content[place] = byte
    file = io.BytesIO(bytes(content))
    fake = types.SimpleNamespace(suffix=".pkl", open=lambda _mode: file)
    try:
        read = postprocessing_file._read(fake, postprocessing_file._from_pickle)  # type: ignore[arg-type]
    except ToolError:
        return
    assert isinstance(read, Postprocessing)


# Which one belongs to the folds


def test_the_one_of_exactly_the_packed_folds_is_found(tmp_path: Path) -> None:
    write(tmp_path / "crossval_results_folds_0_1_2_3_4", {"labels_or_regions": 1})
    two = write(tmp_path / "crossval_results_folds_3_1", {"labels_or_regions": 2})
    (tmp_path / "crossval_results_folds_0").mkdir()
    (tmp_path / "crossval_results_folds_x").mkdir()
    found = postprocessing_of_folds(tmp_path, (1, 3))
    assert found == FoundPostprocessing(two, Postprocessing(steps=(keep(2),)))
    assert postprocessing_of_folds(tmp_path, (0, 1, 2, 3, 4)).postprocessing.steps == (keep(1),)
    two.unlink()
    assert postprocessing_of_folds(tmp_path, (3, 1)).file == two.with_suffix(".json")


@pytest.mark.parametrize(
    ("folds", "said"),
    [
        ((0, 1), r"for exactly the folds 0, 1; there is crossval_results_folds_0_1_2_3_4"),
        ((0,), "holds no postprocessing.pkl: nnU-Net determines one for what nnUNetv2_find_best_configuration"),
        (("all",), "fold_all of .* has no cross-validation"),
    ],
)
def test_where_there_is_none_the_message_says_what_there_is(folds: Sequence[Any], said: str, tmp_path: Path) -> None:
    write(tmp_path / "crossval_results_folds_0_1_2_3_4", {"labels_or_regions": 1})
    (tmp_path / "crossval_results_folds_0").mkdir()
    with pytest.raises(UsageError, match=said):
        postprocessing_of_folds(tmp_path, folds)
    shutil.rmtree(tmp_path / "crossval_results_folds_0_1_2_3_4")
    with pytest.raises(UsageError):
        postprocessing_of_folds(tmp_path, folds)


def test_two_of_the_same_folds_must_say_the_same(tmp_path: Path) -> None:
    write(tmp_path / "crossval_results_folds_0_1", {"labels_or_regions": [1, 2]})
    write(tmp_path / "crossval_results_folds_1_0", {"labels_or_regions": (2, 1)})
    assert postprocessing_of_folds(tmp_path, (0, 1)).postprocessing.steps == (keep(1, 2),)
    write(tmp_path / "crossval_results_folds_1_0", {"labels_or_regions": 2})
    with pytest.raises(ToolError, match="of the same folds and say different things"):
        postprocessing_of_folds(tmp_path, (0, 1))


def test_an_ensemble_has_a_postprocessing_of_its_own(tmp_path: Path) -> None:
    """That of exactly its models and folds, named in any order."""
    one, other, third = (tmp_path / f"T__P__{name}" for name in ("2d", "3d_fullres", "3d_lowres"))
    of_pair = "ensemble___T__P__2d___T__P__3d_fullres"
    write(tmp_path / "ensembles" / f"{of_pair}___0_1", {"labels_or_regions": 1})
    write(tmp_path / "ensembles" / f"{of_pair}___0", {"labels_or_regions": 2})
    (tmp_path / "ensembles" / "notes").mkdir()
    for models, folds, label in (((one, other), (0, 1), 1), ((other, one), (1, 0), 1), ((one, other), (0,), 2)):
        assert postprocessing_of_ensemble(models, folds).postprocessing.steps == (keep(label),)
    for others in ([one, third], [one, other, third]):
        with pytest.raises(UsageError, match="holds no postprocessing for exactly"):
            postprocessing_of_ensemble(others, (0,))
    with pytest.raises(UsageError, match="with the folds 2; nnU-Net determines one if"):
        postprocessing_of_ensemble((one, other), (2,))
    with pytest.raises(UsageError, match="several datasets"):
        postprocessing_of_ensemble((one, tmp_path / "elsewhere" / other.name), (0,))
    write(tmp_path / "ensembles" / f"{of_pair}___1_0", {"labels_or_regions": 3})
    with pytest.raises(ToolError, match="say different things"):
        postprocessing_of_ensemble((one, other), (0, 1))


def test_a_folder_that_is_none_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        postprocessing_of_folds(tmp_path / "nowhere", (0,))
    assert postprocessing_in(tmp_path) is None
