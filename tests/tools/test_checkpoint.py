"""A checkpoint is opened without running what is in it; what it is refused for has a name."""

from __future__ import annotations

import collections
import copyreg
import io
import os
import pathlib
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from nnunet_torchserve_tools import cli
from nnunet_torchserve_tools.checkpoint import read_checkpoint
from nnunet_torchserve_tools.errors import ToolError
from nnunet_torchserve_tools.harmless import SAFE_GLOBALS, Refused


def checkpoint(**more: object) -> dict[str, object]:
    """What nnU-Net's trainer stores."""
    return {
        "network_weights": {"first.weight": torch.arange(3000.0).reshape(30, 100), "first.bias": torch.zeros(30)},
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(4)}}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": {"scale": 65536.0, "_growth_tracker": 3},
        "logging": {"mean_fg_dice": [np.float64(0.5)], "dice_per_class_or_region": [[np.float32(0.5)]], "lrs": [1e-2]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 10,
        "init_args": {"configuration": "2d", "fold": 0, "unpack_dataset": True, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
    } | more


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint_final.pth"


def as_numpy_1(file: Path) -> None:
    """Change the names of NumPy 2 in a file to those of NumPy 1, or the other way round."""
    edit_pickle(file, lambda content: content.replace(b"numpy._core.", b"numpy.core."))


def edit_pickle(file: Path, change: Callable[[bytes], bytes]) -> None:
    source = zipfile.ZipFile(io.BytesIO(file.read_bytes()))
    with zipfile.ZipFile(file, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            target.writestr(entry.filename, change(content) if entry.filename.endswith("data.pkl") else content)


NUMBERS = [
    *(
        kind(1)
        for kind in (
            np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, np.float16,
            np.float32, np.float64, np.longdouble, np.complex64, np.complex128, np.clongdouble,
        )
    ),
    np.float64("nan"), np.str_("Kopf äö"), np.str_(""), np.bytes_(b"ab"), np.bytes_(b""),
    np.datetime64("2024-05-01"), np.datetime64("2024-05-01T10", "ns"), np.datetime64("NaT"), np.timedelta64(5, "ms"),
    np.timedelta64(3), np.datetime64("2024-05-01T10:00:25", ("s", 25)),
]  # fmt: skip

ARRAYS = [
    *(np.arange(6).astype(kind).reshape(2, 3) for kind in "?bhlBHLefdgFDG"),
    np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)), np.arange(24).reshape(2, 3, 4)[:, ::2], np.array(5.0),
    np.zeros(0), np.zeros((0, 3)), np.array(["a", "bcd"]), np.array([b"x"]), np.arange(3).astype(">i4"),
    np.array(["2024", "NaT"], "M8[Y]"), np.array([1, 2], "m8"),
]  # fmt: skip


def restricted(value: object, change: Callable[[bytes], bytes] = bytes) -> Any:
    """A value from its file, by torch's restricted loader."""
    file = io.BytesIO()
    torch.save(value, file)
    source, target = zipfile.ZipFile(file), io.BytesIO()
    with zipfile.ZipFile(target, "w") as changed:
        for entry in source.infolist():
            content = source.read(entry)
            changed.writestr(entry.filename, change(content) if entry.filename.endswith("data.pkl") else content)
    target.seek(0)
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        return torch.load(target, weights_only=True)


@pytest.mark.parametrize("package", [b"numpy.core.", b"numpy._core."])
def test_numbers_and_arrays_of_numpy_come_back_as_they_were(package: bytes) -> None:
    for value in (*NUMBERS, *ARRAYS):
        loaded = restricted(value, lambda content: content.replace(b"numpy._core.", package))
        loaded = getattr(loaded, "value", loaded)
        assert (type(loaded), loaded.dtype, np.shape(loaded)) == (type(value), value.dtype, np.shape(value))
        np.testing.assert_array_equal(loaded, value)


@pytest.mark.parametrize(
    "value",
    [
        collections.OrderedDict(a=1), collections.defaultdict(list, a=[1]), collections.Counter("ab"), frozenset([1]),
        {1, 2}, slice(1, 2), 1j, b"", b"ab", torch.Size([1]), torch.float16, torch.device("cuda", 1),
    ],
)  # fmt: skip
def test_plain_containers_are_harmless(value: object) -> None:
    assert restricted(value) == value


@pytest.mark.parametrize("of_numpy_1", [False, True])
def test_a_checkpoint_that_holds_all_of_them_is_read(of_numpy_1: bool, file: Path) -> None:
    held = checkpoint(inference_allowed_mirroring_axes=np.array([0, 1]), more={"numbers": NUMBERS, "arrays": ARRAYS})
    torch.save(held, file)
    if of_numpy_1:
        as_numpy_1(file)
    read = read_checkpoint(file)
    assert (read.trainer, read.configuration, read.mirroring_axes) == ("nnUNetTrainer", "2d", (0, 1))


def test_a_checkpoint_as_torch_wrote_them_before_1_6_is_read(file: Path) -> None:
    torch.save(checkpoint(), file, _use_new_zipfile_serialization=False)
    assert read_checkpoint(file).trainer == "nnUNetTrainer"


class Call:
    """Unpickled, it calls something."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self._call


class Settings:
    """Somebody's own class."""


@pytest.mark.parametrize(
    ("held", "name"),
    [
        (pathlib.PurePosixPath("/data"), "pathlib.PurePosixPath"),
        (Settings(), "test_checkpoint.Settings"),
        (Settings, "test_checkpoint.Settings"),
        (Call(eval, "1 + 1"), "builtins.eval"),
        (Call(os.system, "true"), "posix.system"),
        (np.random.default_rng(0), "numpy.random"),
        (np.array([{}]), "an object array, numpy.dtype('O8')"),
        (np.zeros(2, [("a", "i4")]), "a structured array, numpy.dtype('V4')"),
        (np.zeros(2, [("a", "i4")]).view(np.recarray), "numpy.rec.recarray"),
        (np.void(b"ab"), "raw bytes, numpy.dtype('V2')"),
        (Call(bytes, 10**15), "builtins.bytes"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (print, "builtins.print"),
    ],
)
def test_what_could_run_code_is_refused_by_its_full_name(held: object, name: str, file: Path) -> None:
    torch.save(checkpoint(extra=held), file)
    with pytest.raises(ToolError) as refusal:
        read_checkpoint(file)
    assert name in str(refusal.value)
    assert "--trust-checkpoint" in str(refusal.value)
    assert "GLOBAL" not in str(refusal.value)


def test_a_name_cannot_write_to_the_terminal(file: Path) -> None:
    torch.save(checkpoint(extra=Settings), file)
    edit_pickle(file, lambda content: content.replace(b"checkpoint\nSettings\n", b"checkpoint\nS\x1b[2Jngs\n"))
    with pytest.raises(ToolError, match=r"S\\x1b\[2Jngs"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("dtype", "raw"),
    [(("f8", False, True), b"\0" * 7), (("U1000000000", False, True), b""), (("f8", False, True), 8.0)],
)
def test_numbers_without_their_bytes_are_not_made(dtype: tuple[object, ...], raw: object) -> None:
    scalar = np.float64(1).__reduce__()[0]
    with pytest.raises((ValueError, Refused)):
        restricted(Call(scalar, Call(np.dtype, *dtype), raw))


def nested(levels: int = 200) -> list[Any]:
    """A list that holds another one twice, and so on: to spell, compare or hash it would never end."""
    inside: list[Any] = ["x"]
    for _ in range(levels):
        inside = [inside, inside]
    return inside


def nested_tuples() -> tuple[Any, ...]:
    inside: tuple[Any, ...] = ()
    for _ in range(200):
        inside = (inside, inside)
    return inside


class NewObject:
    """Unpickled, it is an object of a class whose ``__init__`` is not called."""

    def __init__(self, kind: type, *arguments: object) -> None:
        self._kind, self._arguments = kind, arguments

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # as pickle asks for
        return self._kind

    def __reduce_ex__(self, _protocol: object) -> Any:
        return copyreg.__newobj__, (self._kind, *self._arguments)  # type: ignore[attr-defined]


PLAIN = [bool, int, float, str, list, tuple, dict, bytes, frozenset]
VERSION = type(torch.__version__)


@pytest.mark.parametrize("kind", [*PLAIN, VERSION])
@pytest.mark.parametrize("how", [Call, NewObject])
def test_no_type_of_python_is_called_with_whatever_a_pickle_gives(how: type, kind: type, file: Path) -> None:
    torch.save(checkpoint(extra=how(kind, nested())), file)
    with pytest.raises(ToolError) as refusal:
        read_checkpoint(file)
    if how is Call:
        assert f"{kind.__module__}.{kind.__name__}" in str(refusal.value)


@pytest.mark.parametrize(
    "members", [[nested_tuples()], list(range(101)), "x" * 10**6, [frozenset([1])], collections.Counter("ab"), 3]
)
def test_a_frozen_set_of_more_than_a_few_numbers_is_refused(members: object, file: Path) -> None:
    torch.save(checkpoint(extra=Call(frozenset, members)), file)
    with pytest.raises(ToolError, match=r"builtins\.frozenset"):
        read_checkpoint(file)


def test_types_by_their_names_and_a_version_are_harmless(file: Path) -> None:
    torch.save(checkpoint(extra=[*PLAIN, slice], version=torch.__version__, more=collections.defaultdict(int)), file)
    assert read_checkpoint(file).trainer == "nnUNetTrainer"
    assert restricted(torch.__version__) == str(torch.__version__)
    torch.save(checkpoint(version=NewObject(VERSION, "1" * 101)), file)
    with pytest.raises(ToolError, match="TorchVersion"):
        read_checkpoint(file)


class AsPickled:
    """Something of NumPy's with the state that somebody wrote into the file."""

    def __init__(self, maker: object, arguments: tuple[object, ...], state: object) -> None:
        self._reduced = (maker, arguments, state)

    def __reduce__(self) -> Any:
        return self._reduced


def array_of(shape: object, *before: object) -> AsPickled:
    maker, arguments, state = cast("tuple[Any, ...]", np.zeros(1).__reduce__())
    return AsPickled(maker, arguments, (*before, state[0], shape, *state[2:]))


def number_of(*arguments: object, state: object = None) -> Call:
    return Call(np.float64(1).__reduce__()[0], AsPickled(np.dtype, arguments, state), b"")


@pytest.mark.parametrize(
    "held",
    [
        array_of(("x", 10**12)), array_of(("x" * 100, 2**62)), array_of(([0], 10**12)), array_of((2**200,) * 100),
        array_of((1,) * 65), array_of((2.0, 0.5)), array_of((-1, -1)), array_of(nested()), array_of("1"),
        number_of(nested()), number_of("f8", state=(3, nested_tuples(), None, None, None, -1, -1, 0)),
        number_of("M8", state=(4, "<", None, None, None, -1, -1, 0, ({}, (nested_tuples(), 1, 1, 1)))),
    ],
)  # fmt: skip
def test_nothing_of_numpy_is_made_of_what_only_looks_like_its_parts(held: object, file: Path) -> None:
    torch.save(checkpoint(extra=held), file)
    with pytest.raises(ToolError, match=r"numpy|NumPy|damaged"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (number_of("f8", state=(3, "<", None, None, None, -1, -1, 0, *[None] * 100)), "NumPy does not write"),
        (number_of("f8", state=[3, "<", None, None, None, -1, -1, 0]), "NumPy does not write"),
        (number_of("M8", state=(4, "<", None, None, None, -1, -1, 0, ({}, ("s", 1, *[1] * 100)))), "an unknown unit"),
        (array_of((1,), *[1] * 100), "NumPy does not write"),
    ],
)
def test_a_state_that_is_longer_than_numpys_is_not_taken_apart(held: object, said: str, file: Path) -> None:
    """As often as the pickle names it."""
    torch.save(checkpoint(extra=held), file)
    with pytest.raises(ToolError, match=said):
        read_checkpoint(file)


@pytest.mark.parametrize("name", ["trainer_name", "inference_allowed_mirroring_axes", "init_args"])
def test_what_stands_in_place_of_a_name_is_not_spelled_out(name: str, file: Path) -> None:
    bomb = {"configuration": nested()} if name == "init_args" else nested()
    for held in (bomb, collections.OrderedDict(configuration=nested())):
        torch.save(checkpoint(**{name: held}), file)
        with pytest.raises(ToolError, match=r"is no name but|are not axes but") as refusal:
            read_checkpoint(file)
        assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    ("axes", "read"),
    [
        (NewObject(np.ndarray), None),
        (np.array([0, 1]), (0, 1)), (np.array([2], np.uint8), (2,)), ([np.int64(0)], (0,)),
        (torch.tensor([0, 1]), (0, 1)), ({0, 1}, (0, 1)), (np.array([]), None), ((), None), (None, None),
    ],
)  # fmt: skip
def test_axes_are_read_from_whatever_holds_a_few_integers(
    axes: object, read: tuple[int, ...] | None, file: Path
) -> None:
    torch.save(checkpoint(inference_allowed_mirroring_axes=axes), file)
    assert read_checkpoint(file).mirroring_axes == read


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (np.array(1), "array(1)"), (np.array([[0, 1]]), "array([[0, 1]])"), (np.array([0.5, 1]), "array([0.5, 1. ])"),
        (np.array(["x"]), "array(['x'], dtype='<U1')"), (1, "1"), ("all", "'all'"), ([0.0], "[0.0]"),
        ({0: 1}, "{0: 1}"), (torch.zeros(1).expand(10**12), "a tensor of torch.float32 and shape (1000000000000,)"),
        (np.arange(10**4), "array([ 0, 1, 2, ...,"), (torch.tensor([[0, 1]]), "a tensor of torch.int64"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("trust", [False, True])
def test_what_are_no_axes_is_shown_in_the_words_of_its_library(
    axes: object, said: str, trust: bool, file: Path
) -> None:
    torch.save(checkpoint(inference_allowed_mirroring_axes=axes), file)
    with pytest.raises(ToolError) as refusal:
        read_checkpoint(file, trust=trust)
    assert f"not axes but {said}" in str(refusal.value)


def test_another_pickle_protocol_is_named(file: Path) -> None:
    torch.save(checkpoint(), file, pickle_protocol=4)
    with pytest.raises(ToolError, match="pickle protocol 4"):
        read_checkpoint(file)
    assert read_checkpoint(file, trust=True).trainer == "nnUNetTrainer"


# With --trust-checkpoint


def own_class(module: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    there = sys.modules.get(module) or types.ModuleType(module)
    monkeypatch.setitem(sys.modules, module, there)
    own = type("Settings", (), {"__module__": module})
    monkeypatch.setattr(there, "Settings", own, raising=False)
    return own()


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("somebodys_project", "needs the module somebodys_project, which is not installed"),
        ("colorsys", "colorsys.Settings, which the installed module colorsys does not have"),
    ],
)
def test_a_class_that_is_not_here_is_said_to_be(
    module: str, said: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as there:
        torch.save(checkpoint(extra=own_class(module, there)), file)
    with pytest.raises(ToolError, match=said):
        read_checkpoint(file, trust=True)


def fail(kind: type[BaseException]) -> None:
    msg = "what it said"
    raise kind(msg)


@pytest.mark.parametrize(
    "kind",
    [ValueError, RuntimeError, KeyError, OSError, NotImplementedError, RecursionError, MemoryError, AttributeError,
     ImportError, SystemExit, AssertionError],
)  # fmt: skip
def test_what_an_object_raises_is_told_as_what_it_is(kind: type[BaseException], file: Path) -> None:
    torch.save(checkpoint(extra=Call(fail, kind)), file)
    with pytest.raises(ToolError, match=f"{kind.__name__}: .*what it said") as told:
        read_checkpoint(file, trust=True)
    assert "damaged" not in str(told.value)


def test_a_path_of_another_system_is_told(file: Path) -> None:
    torch.save(checkpoint(extra=pathlib.PosixPath("/data")), file)
    edit_pickle(file, lambda content: content.replace(b"PosixPath", b"WindowsPath"))
    with pytest.raises(ToolError, match="cannot instantiate 'WindowsPath'"):
        read_checkpoint(file, trust=True)


def test_the_command_blames_nobody_else(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Callable[..., None]:
        def archive(*_arguments: object) -> None:
            raise ModuleNotFoundError(name=name)

        return archive

    from nnunet_torchserve_tools import archive

    said = []
    file.touch()
    for name in ("monai.networks", "nnunetv2"):
        monkeypatch.setattr(archive, "make_archives", missing(name))
        result = CliRunner().invoke(cli.app, ["archive", str(file)])
        assert result.exit_code == 1
        said.append(result.stderr)
    assert "nnunet-torchserve[server]" not in said[0]
    assert "nnunet-torchserve[server]" in said[1]


# Files that are none


def test_a_flipped_bit_is_noticed(file: Path) -> None:
    torch.save(checkpoint(), file)
    content = bytearray(file.read_bytes())
    content[content.find(torch.arange(3000.0).numpy().tobytes()) + 5000] ^= 1
    file.write_bytes(content)
    for trust in (False, True):
        with pytest.raises(ToolError, match="damaged"):
            read_checkpoint(file, trust=trust)


def test_a_file_without_checksums_is_read(file: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(checkpoint(), file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(file).trainer == "nnUNetTrainer"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged or cut off"),
        (b"PK\3", "damaged or cut off"),
        (b"PK\3\4" + bytes(100), "damaged or cut off"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "a page"),
        (b"\x1f\x8b\x08", "gzip"),
        (pickle.dumps({"network_weights": {}}), "a pickle, but none that torch.save wrote"),
        (b"hello", "no PyTorch file"),
    ],
)
@pytest.mark.parametrize("trust", [False, True])
def test_what_is_no_checkpoint_is_said_to_be_none(content: bytes, said: str, trust: bool, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(ToolError, match=said):
        read_checkpoint(file, trust=trust)


@pytest.mark.parametrize("keep", [20, 500, 5000, -200])
@pytest.mark.parametrize("as_zip", [False, True])
def test_a_file_that_is_cut_off_is_said_to_be(keep: int, as_zip: bool, file: Path) -> None:
    torch.save(checkpoint(), file, _use_new_zipfile_serialization=as_zip)
    file.write_bytes(file.read_bytes()[:keep])
    for trust in (False, True):
        with pytest.raises(ToolError, match="damaged or cut off"):
            read_checkpoint(file, trust=trust)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        for number in range(12):
            bomb.writestr(f"archive/data/{number}", bytes(10 * 2**20))
    content = bytearray(file.read_bytes())
    honest = (10 * 2**20).to_bytes(4, "little")
    file.write_bytes(bytes(content).replace(honest, (2**31).to_bytes(4, "little")))
    with pytest.raises(ToolError, match="would expand to"):
        read_checkpoint(file)


def test_weights_that_repeat_a_number_without_end_are_refused(file: Path) -> None:
    torch.save(checkpoint(network_weights={"w": torch.zeros(1).expand(10**6, 10**6)}), file)
    with pytest.raises(ToolError, match="views that repeat"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"weights": torch.zeros(3)}, "'network_weights' is missing"),
        ([1], "it holds a list"),
        (checkpoint(network_weights=[1]), "no state dict"),
        (checkpoint(network_weights={"w": torch.eye(3).to_sparse()}), "no plain tensor"),
        (checkpoint(inference_allowed_mirroring_axes="all"), "are not axes"),
    ],
)
def test_a_file_of_something_else_is_refused(content: object, said: str, file: Path) -> None:
    torch.save(content, file)
    with pytest.raises(ToolError, match=said):
        read_checkpoint(file)


def test_a_torchscript_archive_is_named(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", b"")
        archive.writestr("model/constants.pkl", b"")
    with pytest.raises(ToolError, match="TorchScript"):
        read_checkpoint(file)


def test_a_zip_of_something_else_is_named(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("fold_0/checkpoint_final.pth", b"")
    with pytest.raises(ToolError, match=r"none that torch.save wrote"):
        read_checkpoint(file)
