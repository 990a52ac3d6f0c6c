"""A zip that nnU-Net exports is a source of models; one that is made to harm is refused before anything is unpacked."""

from __future__ import annotations

import io
import json
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.model_sharing import model_export, model_import
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation
from nnunetv2.utilities import file_path_utilities

from nnunet_torchserve.postprocessing import KeepLargest
from nnunet_torchserve_tools import zip_source
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.errors import ToolError, UsageError
from nnunet_torchserve_tools.postprocessing_file import postprocessing_of_folds
from nnunet_torchserve_tools.zip_source import WantedWeights, ZippedModel, is_zip, models_in, unzipped

DATASET = "Dataset901_Blobs"
FULL, LOW = "nnUNetTrainer__nnUNetPlans__3d_fullres", "nnUNetTrainer__nnUNetPlans__3d_lowres"
FOLDS = (0, 1)

pytestmark = pytest.mark.usefixtures("private")


@pytest.fixture
def results(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's results folder: two configurations, what training leaves beside them, and what was found to be best."""
    home = tmp_path / "results"
    for name in (FULL, LOW):
        shutil.copytree(models["five_folds"], home / DATASET / name)
        (home / DATASET / name / "dataset_fingerprint.json").write_text("{}")
        for fold in FOLDS:
            folder = home / DATASET / name / f"fold_{fold}"
            shutil.copy(folder / "checkpoint_final.pth", folder / "checkpoint_best.pth")
            (folder / "validation").mkdir()
            for other in ("progress.png", "debug.json", "validation/summary.json"):
                (folder / other).write_text("{}")
    ensemble = home / DATASET / "ensembles" / f"ensemble___{FULL}___{LOW}___0_1"
    for folder in (home / DATASET / FULL / "crossval_results_folds_0_1", ensemble):
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text("{}")
        steps = ([remove_all_but_largest_component_from_segmentation], [{"labels_or_regions": [1, 2, 3]}])
        save_pickle(steps, folder / "postprocessing.pkl")
    (home / DATASET / "inference_information.json").write_text("{}")
    (home / DATASET / "nnUNetTrainer.py").write_text("import somebodys_code\n")
    for module in (model_export, file_path_utilities, model_import):
        monkeypatch.setattr(module, "nnUNet_results", str(home))
    return home


def export(target: Path, *configurations: str, **more: Any) -> Path:
    """``nnUNetv2_export_model_to_zip``."""
    model_export.export_pretrained_model(DATASET, str(target), configurations, folds=FOLDS, **more)
    return target


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
    }


def test_an_export_gives_the_archive_that_its_folder_gives(results: Path, tmp_path: Path, private: Path) -> None:
    exported = export(tmp_path / "model.zip", "3d_fullres")
    with unzipped(exported) as found:
        [folder] = found.folders
        [of_zip] = make_archives(ArchiveRequest(folder, tmp_path / "of_zip", folds=(0,)))
        assert stat.S_IMODE(found.results.stat().st_mode) == 0o700
        assert postprocessing_of_folds(folder, FOLDS).postprocessing.steps == (KeepLargest(labels=(1, 2, 3)),)
    [of_folder] = make_archives(ArchiveRequest(results / DATASET / FULL, tmp_path / "of_folder", folds=(0,)))
    assert of_zip.read_bytes() == of_folder.read_bytes()
    assert not list(private.glob("nnunet-torchserve-*"))


def test_only_what_archives_are_made_of_is_unpacked_and_as_stock_unpacks_it(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = ("checkpoint_final.pth", "checkpoint_best.pth")
    exported = export(tmp_path / "model.zip", "3d_lowres", "3d_fullres", save_checkpoints=checkpoints)
    with zipfile.ZipFile(exported, "a") as more:
        for name in ("nnUNetTrainer.py", f"{FULL}/nnUNetTrainer.py", f"{FULL}/fold_0/__init__.py"):
            more.writestr(f"{DATASET}/{name}", "import somebodys_code\n")
        more.writestr(f"{DATASET}/{FULL}/", "")
    monkeypatch.setattr(model_import, "nnUNet_results", str(tmp_path / "installed"))
    model_import.install_model_from_zip_file(str(exported))
    installed = files_of(tmp_path / "installed")
    with unzipped(exported) as found:
        unpacked = files_of(found.results)
    assert unpacked == {name: installed[name] for name in unpacked}
    of_model = {"plans.json", "dataset.json", *(f"fold_{fold}/{name}" for fold in FOLDS for name in checkpoints)}
    assert set(unpacked) == {
        *(f"{DATASET}/{model}/{name}" for model in (FULL, LOW) for name in of_model),
        f"{DATASET}/{FULL}/crossval_results_folds_0_1/postprocessing.pkl",
        f"{DATASET}/ensembles/ensemble___{FULL}___{LOW}___0_1/postprocessing.pkl",
        f"{DATASET}/inference_information.json",
    }


def test_its_models_are_listed_and_chosen_by_configuration(results: Path, tmp_path: Path, private: Path) -> None:
    exported = export(tmp_path / "model.zip", "3d_lowres", "3d_fullres")
    assert is_zip(exported)
    found = models_in(exported)
    assert [(each.dataset, each.folder_name, each.configuration) for each in found] == [
        (DATASET, FULL, "3d_fullres"),
        (DATASET, LOW, "3d_lowres"),
    ]
    assert not list(private.iterdir())
    with unzipped(exported, ["3d_lowres"]) as chosen:
        assert chosen.models == (found[1],)
        assert chosen.folders == (chosen.results / DATASET / LOW,)
        assert not (chosen.results / DATASET / FULL).exists()
        assert chosen.models[0].bytes == sum(len(content) for content in files_of(chosen.folders[0]).values())
    with unzipped(exported, ["3d_lowres", "3d_fullres"]) as both:
        assert [folder.name for folder in both.folders] == [LOW, FULL]
    with (
        pytest.raises(UsageError, match="no configuration 2d; it has 3d_fullres, 3d_lowres"),
        unzipped(exported, ["2d"]),
    ):
        pass


def test_what_is_said_of_models_can_be_had_without_their_weights(results: Path, tmp_path: Path) -> None:
    with unzipped(export(tmp_path / "model.zip", "3d_lowres", "3d_fullres")) as whole:
        expected = {name: content for name, content in files_of(whole.results).items() if not name.endswith(".pth")}
    with unzipped(tmp_path / "model.zip", weights=False) as described:
        assert files_of(described.results) == expected
        assert len(described.folders) == 2


@pytest.mark.parametrize(
    ("weights", "needed"),
    [
        (WantedWeights((1,), "checkpoint_final.pth"), ["fold_1/checkpoint_final.pth"]),
        (WantedWeights(("all",), "checkpoint_best.pth"), ["fold_all/checkpoint_best.pth"]),
        (
            WantedWeights(None, "checkpoint_best.pth"),
            ["fold_0/checkpoint_best.pth", "fold_1/checkpoint_best.pth"],
        ),
        (WantedWeights((2,), "checkpoint_final.pth"), []),
    ],
)
def test_weights_that_are_not_asked_for_are_not_unpacked_and_do_not_count(
    weights: WantedWeights, needed: list[str], tmp_path: Path
) -> None:
    """Their names are there, for messages."""
    of_model = [
        f"fold_{fold}/checkpoint_{which}.pth" for fold in (0, 1, "all") for which in ("final", "best", "latest")
    ]
    file = zip_of(tmp_path / "model.zip", *((f"{DATASET}/{FULL}/{name}", bytes(100)) for name in of_model))
    with unzipped(file, weights=weights, most_bytes=len(b"{}") + 100 * len(needed)) as found:
        contents = {name: len(content) for name, content in files_of(found.folders[0]).items()}
    assert contents == {name: 100 * (name in needed) for name in of_model} | {"plans.json": 2}
    with pytest.raises(ToolError, match="choose with --configuration or --folds"), unzipped(file, most_bytes=901):
        pass


def test_nothing_is_left_when_the_work_fails(results: Path, tmp_path: Path, private: Path) -> None:
    exported = export(tmp_path / "model.zip", "3d_lowres")
    with pytest.raises(FileExistsError), unzipped(exported) as found:
        found.folders[0].mkdir()
    assert not list(private.iterdir())


# Zips that are not nnU-Net's

PLANS, FINAL = f"{DATASET}/{FULL}/plans.json", f"{DATASET}/{FULL}/fold_0/checkpoint_final.pth"


def zip_of(target: Path, *entries: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(target, "w", method) as archive:
        for entry, content in ((PLANS, b"{}"), *entries):
            archive.writestr(entry, content)
    return target


def link(name: str, kind: int = stat.S_IFLNK) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (kind | 0o777) << 16
    return entry


def check_refused(file: Path, said: str, kind: type[ToolError] = ToolError, **more: Any) -> None:
    for read in (lambda: models_in(file), lambda: unzipped(file, **more).__enter__()):
        with pytest.raises(kind, match=said):
            read()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("/etc/passwd", "absolute"), ("C:/file", "absolute"), ("../file", "leads out"),
        (f"{DATASET}/../../x", "leads out"), (f"{DATASET}/./x", "leads out"),
        (f"{DATASET}//x", "empty name"), ("..\\file", "read differently"),
        ("file\x00.txt", "read differently"), ("file\x1b[2J", r"file\\x1b.* read differently"), ("..", "leads out"),
        (link(FINAL), "link"), (link("anything"), "link"), (link("pipe", stat.S_IFIFO), "link or a device"),
        (link("disk", stat.S_IFBLK), "link or a device"),
    ],
)  # fmt: skip
def test_an_entry_that_may_lie_elsewhere_is_refused_whatever_it_is(
    entry: str | zipfile.ZipInfo, said: str, tmp_path: Path
) -> None:
    if isinstance(entry, str) and "\x00" in entry:  # zipfile cuts it when it writes, too
        file = zip_of(tmp_path / "model.zip", ("file_0.txt", b""))
        file.write_bytes(file.read_bytes().replace(b"file_0.txt", b"file\x00o.txt"))
    else:
        file = zip_of(tmp_path / "model.zip", (entry, b"/etc/passwd"))
    check_refused(file, said)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", [PLANS, f"{PLANS}/", "anything", "anything/"])
def test_a_doubled_entry_is_refused(name: str, tmp_path: Path) -> None:
    check_refused(zip_of(tmp_path / "model.zip", ("anything", b""), (name, b"[]")), "twice")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_another_way_to_pack_is_refused(method: int, tmp_path: Path) -> None:
    check_refused(zip_of(tmp_path / "model.zip", method=method), "packed in another way")


def test_an_encrypted_entry_is_refused(tmp_path: Path) -> None:
    file = zip_of(tmp_path / "model.zip")
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(content)
    check_refused(file, "is encrypted")


def central(content: bytes, name: str) -> int:
    """Where the list has the entry of this name."""
    return content.rindex(b"PK\x01\x02", 0, content.rindex(name.encode()))


def with_size(file: Path, name: str, size: int) -> None:
    """Change the size that the list declares."""
    content = bytearray(file.read_bytes())
    at = central(bytes(content), name) + 24
    content[at : at + 4] = size.to_bytes(4, "little")
    file.write_bytes(content)


@pytest.mark.parametrize("size", [0, 50, 101])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_other_bytes_than_the_list_declares_are_refused(size: int, method: int, tmp_path: Path, private: Path) -> None:
    file = zip_of(tmp_path / "model.zip", (FINAL, b"x" * 100), method=method)
    with unzipped(file) as found:
        assert (found.results / FINAL).read_bytes() == b"x" * 100
    with_size(file, FINAL, size)
    with pytest.raises(ToolError, match="list of its entries"), unzipped(file):
        pass
    assert not list(private.iterdir())


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    file = zip_of(tmp_path / "model.zip", (FINAL, b"weights"), method=zipfile.ZIP_STORED)
    file.write_bytes(file.read_bytes().replace(b"weights", b"weighty"))
    with pytest.raises(ToolError, match=r"checkpoint_final\.pth is not what the list"), unzipped(file):
        pass


def test_what_expands_beyond_a_total_is_refused_before_it_is_unpacked(
    tmp_path: Path, private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = zip_of(tmp_path / "model.zip", (FINAL, b"\0" * 10**6), (f"{DATASET}/{FULL}/video.bin", b"\0" * 10**7))
    with unzipped(file, most_bytes=10**6 + 2):
        pass
    monkeypatch.setattr(zip_source, "_unpack", None)
    with (
        pytest.raises(ToolError, match="would expand to 1000002 bytes, at most 1000001"),
        unzipped(file, most_bytes=10**6 + 1),
    ):
        pass
    monkeypatch.setattr(zip_source, "_SMALL_BYTES", 10**5)
    with pytest.raises(ToolError, match="no weights get so much shorter"), unzipped(file):
        pass
    with_size(file, FINAL, 2**32 - 2)
    monkeypatch.undo()
    with pytest.raises(ToolError, match="no weights get so much shorter"), unzipped(file):
        pass
    large = zip_of(tmp_path / "large.zip", (f"{DATASET}/{FULL}/dataset.json", b" " * (2**26 + 1)))
    with pytest.raises(ToolError, match=r"dataset\.json has 67108865 bytes"), unzipped(large):
        pass


def test_where_there_is_no_room_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = zip_of(tmp_path / "model.zip", (FINAL, b"x" * 100))
    usage = shutil.disk_usage(tmp_path)._replace(free=101)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(ToolError, match="needs 102 bytes for a while, 101 are free"), unzipped(file):
        pass


def test_more_entries_than_any_export_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_source, "_MOST_ENTRIES", 3)
    check_refused(zip_of(tmp_path / "model.zip", *((f"file_{n}", b"") for n in range(3))), "has 4 entries")


@pytest.mark.parametrize(
    ("make", "said", "kind"),
    [
        (lambda file: file.write_bytes(b""), "no zip", ToolError),
        (lambda file: file.write_bytes(b"PK\x03\x04" + b"\0" * 100), "no zip", ToolError),
        (lambda file: file.write_bytes(zip_of(file).read_bytes()[:-30]), "no zip", ToolError),
        (lambda file: file.mkdir(), "does not exist or is no file", UsageError),
        (lambda file: file.with_suffix(".other").touch(), "does not exist or is no file", UsageError),
    ],
)
def test_what_is_no_zip_is_said_to_be_none(
    make: Callable[[Path], object], said: str, kind: type[ToolError], tmp_path: Path
) -> None:
    make(tmp_path / "model.zip")
    check_refused(tmp_path / "model.zip", said, kind)


@pytest.mark.parametrize("names", [[], ["plans.json", "fold_0/checkpoint_final.pth"], [f"{FULL}/plans.json"], [FINAL]])
def test_a_zip_without_a_model_is_told_what_was_expected(names: list[str], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for name in names:
            archive.writestr(name, "{}")
    check_refused(tmp_path / "model.zip", "holds no trained nnU-Net model: .*TRAINER__PLANS__CONFIGURATION")


def test_a_configuration_of_two_trainers_is_told_apart_by_its_whole_name(tmp_path: Path) -> None:
    other = "nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres"
    file = zip_of(tmp_path / "model.zip", (f"{DATASET}/{other}/plans.json", b"{}"))
    models = (ZippedModel(DATASET, other, 2), ZippedModel(DATASET, FULL, 2))
    assert models_in(file) == models
    said = f"several times; name one whole: --configuration {models[0].path} or {models[1].path}"
    with pytest.raises(UsageError, match=said), unzipped(file, ["3d_fullres"]):
        pass
    for name in (other, f"{DATASET}/{other}"):
        with unzipped(file, [name, name]) as found:
            assert found.models == models[:1]
            assert files_of(found.results) == {f"{DATASET}/{other}/plans.json": b"{}"}


def test_no_damage_to_a_zip_comes_as_another_error(results: Path, tmp_path: Path, private: Path) -> None:
    """Each byte of the list, and of where it is, in turn."""
    file = zip_of(tmp_path / "model.zip", (FINAL, b"x" * 100), method=zipfile.ZIP_STORED)
    whole = file.read_bytes()
    assert json.loads(zipfile.ZipFile(io.BytesIO(whole)).read(PLANS)) == {}
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        file.write_bytes(damaged)
        try:
            with unzipped(file) as found:
                assert all((found.results / each).resolve().is_relative_to(private) for each in files_of(found.results))
        except ToolError:
            pass
        assert not list(private.iterdir())
