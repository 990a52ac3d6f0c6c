"""A trained folder becomes archives; whatever is wrong with it is said."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nnunet_torchserve.bundle import BUNDLE_FILE, ModelBundle
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.member_description import GOLDEN_FILE
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.checkpoint import without_aliases
from nnunet_torchserve_tools.errors import ModelWarning, ToolError, UsageError
from nnunet_torchserve_tools.mar import write_zip
from nnunet_torchserve_tools.serving_settings import ServingSettings
from support.odd_models import OddModel


@pytest.fixture
def folder(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a trained folder, to be damaged."""
    return Path(shutil.copytree(models["flat"], tmp_path / "Dataset902_BlobsFlat" / models["flat"].name))


def edit_plans(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "plans.json"
    plans = json.loads(file.read_text())
    change(plans)
    file.write_text(json.dumps(plans))


def edit_checkpoint(folder: Path, change: Callable[[dict[str, object]], None], fold: int = 0) -> None:
    file = folder / f"fold_{fold}" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    change(checkpoint)
    torch.save(checkpoint, file)


def make(folder: Path, tmp_path: Path, **fields: object) -> list[Path]:
    return make_archives(ArchiveRequest(folder, tmp_path / "store", **fields))  # type: ignore[arg-type]


def member_of(archive: Path) -> dict[str, Any]:
    """What an archive says of its one member."""
    with zipfile.ZipFile(archive) as content:
        [member] = json.loads(content.read(BUNDLE_FILE))["members"]
    description: dict[str, Any] = member
    return description


def test_the_same_folder_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    [first] = make(folder, tmp_path)
    content = first.read_bytes()
    [second] = make(folder, tmp_path)
    assert content == second.read_bytes()
    assert first.name == "Dataset902_BlobsFlat_2d.mar"


def test_one_archive_for_each_fold(models: dict[str, Path], tmp_path: Path) -> None:
    files = make(models["five_folds"], tmp_path, name="blobs", folds=(0, 3), per_fold=True)
    assert [file.name for file in files] == ["blobs.mar", "blobs_fold_0.mar", "blobs_fold_3.mar"]
    folds = [member_of(file)["folds"] for file in files]
    assert [[fold["fold"] for fold in each] for each in folds] == [[0, 3], [0], [3]]


def test_a_folder_for_the_member_costs_less_than_a_hundredth(archive_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Beside the same content as archives had it before they had members: all of it at the top."""
    archive, before = archive_of("five_folds"), tmp_path / "before"
    zipfile.ZipFile(archive).extractall(before)
    description = json.loads((before / BUNDLE_FILE).read_text())
    [member], _recipe = description.pop("members"), description.pop("recipe")
    folder = before / "members" / member.pop("name")
    within = folder.relative_to(before).as_posix() + "/"
    description["files"] = {name.removeprefix(within): digest for name, digest in description["files"].items()}
    (before / BUNDLE_FILE).write_text(json.dumps(description | member, indent=1))
    for file in folder.iterdir():
        file.rename(before / file.name)
    folder.rmdir()
    folder.parent.rmdir()
    write_zip(before, tmp_path / "before.mar")
    assert archive.stat().st_size <= 1.01 * (tmp_path / "before.mar").stat().st_size


def test_an_archive_holds_no_pickle_no_path_and_no_date(folder: Path, tmp_path: Path) -> None:
    [file] = make(folder, tmp_path)
    archive = zipfile.ZipFile(file)
    assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
    assert not [name for name in archive.namelist() if name.endswith((".pth", ".pkl", ".pyc"))]
    assert str(tmp_path).encode() not in file.read_bytes()
    assert "createdOn" not in json.loads(archive.read("MAR-INF/MANIFEST.json"))


def test_weights_survive_bit_for_bit_and_are_stored_once(
    models: dict[str, Path], unpacked: Callable[[str], Path]
) -> None:
    file = models["flat"] / "fold_0" / "checkpoint_final.pth"
    expected = torch.load(file, weights_only=False)["network_weights"]
    member = ModelBundle(unpacked("flat")).lead
    weights = member.weights(0)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    stored = load_file(member.folder / "fold_0.safetensors")
    assert len(stored) < len(expected) / 2
    assert len({t.untyped_storage().data_ptr() for t in weights.values()}) == len(stored)


def test_equal_but_separate_tensors_are_no_aliases() -> None:
    base = torch.arange(6.0)
    stored, aliases = without_aliases({"a": base, "b": base.clone(), "c": base, "d": base[:3]})
    assert (sorted(stored), aliases) == (["a", "b", "d"], {"c": "a"})


def test_settings_go_to_model_config(folder: Path, tmp_path: Path) -> None:
    import yaml

    serving = ServingSettings(workers=3, response_timeout_s=77, max_patch_batch=4, device_ids=(2, 0))
    [file] = make(folder, tmp_path, serving=serving)
    config = yaml.safe_load(zipfile.ZipFile(file).read("model-config.yaml"))
    assert (config["minWorkers"], config["maxWorkers"], config["batchSize"]) == (3, 3, 1)
    assert (config["responseTimeout"], config["handler"]["max_patch_batch"]) == (77, 4)
    assert config["deviceIds"] == [2, 0]
    assert "deviceIds" not in yaml.safe_load(ServingSettings().to_yaml())


@pytest.mark.parametrize("ids", [(1, 1), (-1,)])
def test_gpus_that_cannot_be_meant_are_refused(ids: tuple[int, ...], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="different numbers from 0"):
        make(folder, tmp_path, serving=ServingSettings(device_ids=ids))


class Attack:
    """Unpickled, it would run a command."""

    def __init__(self, mark: Path) -> None:
        self._command = f"touch {mark}"

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self._command,)


def test_a_malicious_checkpoint_is_refused_by_name_and_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "pwned"
    edit_checkpoint(folder, lambda checkpoint: checkpoint.update(payload=Attack(mark)))
    with pytest.raises(ToolError, match="system"):
        make(folder, tmp_path)
    assert not mark.exists()


def test_a_bare_malicious_pickle_is_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "pwned"
    (folder / "fold_0" / "checkpoint_final.pth").write_bytes(pickle.dumps(Attack(mark)))
    with pytest.raises(ToolError):
        make(folder, tmp_path)
    assert not mark.exists()


def test_the_owner_may_trust_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    edit_checkpoint(folder, lambda checkpoint: checkpoint.update(note=np.random.default_rng(0)))
    with pytest.raises(ToolError, match="--trust-checkpoint"):
        make(folder, tmp_path)
    assert make(folder, tmp_path, trust_checkpoint=True)


@pytest.mark.parametrize("keep", [0, 10, 1000, 50_000])
def test_a_truncated_checkpoint_is_said_to_be_damaged(keep: int, folder: Path, tmp_path: Path) -> None:
    file = folder / "fold_0" / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ToolError, match="damaged"):
        make(folder, tmp_path)


def test_a_file_that_is_no_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(ToolError, match="network_weights"):
        make(folder, tmp_path)


def test_a_missing_fold_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"fold 3 has no checkpoint_final.pth .* which has it for fold_0$"):
        make(folder, tmp_path, folds=(0, 3))


def folds_with(tmp_path: Path, folds: dict[str, list[str]]) -> Path:
    """A trained folder whose checkpoints are not real ones."""
    for name, files in folds.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    for name in ("plans.json", "dataset.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


FINAL, BEST, LATEST = "checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth"


@pytest.mark.parametrize(
    ("folds", "said"),
    [
        ({f"fold_{k}": [] if k == 3 else [FINAL] for k in range(5)}, "^fold_3 of .* --folds 0,1,2,4 makes"),
        ({"fold_0": [FINAL], "fold_1": [LATEST], "fold_2": []}, "^fold_1, fold_2 of .* --folds 0 makes .* them$"),
        (
            {"fold_0": [FINAL, BEST], "fold_1": [LATEST, BEST]},
            "^fold_1 of .* --folds 0 .*, --checkpoint checkpoint_best",
        ),
        ({"fold_all": [FINAL]}, "fold_all has it: take that with --folds all$"),
        ({"fold_0": [], "fold_all": [FINAL, BEST]}, "--folds all$"),
        ({"fold_0": [BEST], "fold_1": [BEST, LATEST]}, "fold_0, fold_1 have .* with --checkpoint checkpoint_best.pth$"),
        ({"fold_0": [BEST], "fold_1": []}, "with --folds 0 --checkpoint checkpoint_best.pth$"),
        ({"fold_all": [BEST]}, "--folds all --checkpoint checkpoint_best.pth$"),
        ({"fold_0": [BEST], "fold_1": [LATEST]}, "different names"),
        ({"fold_0": ["progress.png"]}, "was the training ended"),
        ({}, "was the training ended"),
    ],
)
def test_what_a_folder_lacks_is_said_with_the_flag_that_takes_what_it_has(
    folds: dict[str, list[str]], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        make(folds_with(tmp_path, folds), tmp_path)


def test_a_fold_that_has_another_checkpoint_only_is_told_the_flag(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"for no fold; --checkpoint checkpoint_best.pth takes what fold 0 has"):
        make(folds_with(tmp_path, {"fold_0": [BEST]}), tmp_path, folds=(0,))


def test_a_fold_of_another_trainer_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["anisotropic"], tmp_path / "model"))
    edit_checkpoint(folder, lambda checkpoint: checkpoint.update(trainer_name="nnUNetTrainer_5epochs"), fold=1)
    with pytest.raises(ToolError, match="fold 1 has the trainer nnUNetTrainer_5epochs"):
        make(folder, tmp_path)


def test_weights_of_another_network_are_refused(folder: Path, tmp_path: Path) -> None:
    edit_plans(folder, lambda plans: arch(plans).update(features_per_stage=[4, 8, 24]))
    with pytest.raises(ToolError, match="do not fit"):
        make(folder, tmp_path)


def arch(plans: dict[str, object]) -> dict[str, object]:
    kwargs: dict[str, object] = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]  # type: ignore[index]
    return kwargs


def configuration(plans: dict[str, object]) -> dict[str, object]:
    found: dict[str, object] = plans["configurations"]["2d"]  # type: ignore[index]
    return found


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "torch.nn.functional.os.system",
        "torch.nn.modules.module.functools.partial",
        "torch.nn.Parameter",
        "nnunetv2.paths.os.system",
        "builtins.eval",
        "torch.nn",
        "torch.nn.Conv2d; import os",
        7,
    ],
)
@pytest.mark.parametrize("key", ["conv_op", "nonlin"])
def test_plans_that_would_import_something_else_are_refused(
    name: object, key: str, folder: Path, tmp_path: Path
) -> None:
    edit_plans(folder, lambda plans: arch(plans).update({key: name}))
    with pytest.raises(ToolError, match="allowed"):
        make(folder, tmp_path)


def test_a_network_class_from_elsewhere_is_refused(folder: Path, tmp_path: Path) -> None:
    def change(plans: dict[str, object]) -> None:
        configuration(plans)["architecture"]["network_class_name"] = "subprocess.Popen"  # type: ignore[index]

    edit_plans(folder, change)
    with pytest.raises(ToolError, match=r"subprocess\.Popen"):
        make(folder, tmp_path)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("resampling_fn_data", "np"),
        ("resampling_fn_probabilities", "resize"),
        ("resampling_fn_seg", "no_such_function"),
        ("preprocessor_name", "SimpleITK"),
        ("normalization_schemes", ["np"]),
    ],
)
def test_names_that_lead_out_of_nnunet_are_refused(key: str, name: object, folder: Path, tmp_path: Path) -> None:
    edit_plans(folder, lambda plans: configuration(plans).update({key: name}))
    with pytest.raises(ToolError, match="nnunetv2"):
        make(folder, tmp_path)


def test_a_reader_that_is_not_served_is_named(folder: Path, tmp_path: Path) -> None:
    edit_plans(folder, lambda plans: plans.update(image_reader_writer="BaseReaderWriter"))
    with pytest.raises(ToolError, match="BaseReaderWriter"):
        make(folder, tmp_path)


def test_a_folder_that_is_none_of_nnunets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"plans\.json"):
        make(tmp_path, tmp_path)


@pytest.mark.parametrize(("field", "value"), [("name", "a b"), ("name", "../up"), ("version", "latest")])
def test_names_and_versions_are_torchserves(field: str, value: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=value):
        make(folder, tmp_path, **{field: value})


@pytest.mark.parametrize(
    "file",
    [
        "members/2d/plans.json",
        "members/2d/fold_0.safetensors",
        f"members/2d/{GOLDEN_FILE}",
        "nnunet_torchserve/tiling.py",
    ],
)
def test_a_damaged_archive_is_not_served(file: str, unpacked: Callable[[str], Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(unpacked("flat"), tmp_path / "model"))
    content = bytearray((model / file).read_bytes())
    content[len(content) // 2] ^= 1
    (model / file).write_bytes(content)
    with pytest.raises(BundleError, match=file.rsplit("/", maxsplit=1)[-1]):
        ModelBundle(model)
    (model / file).unlink()
    with pytest.raises(BundleError, match="missing"):
        ModelBundle(model)


def test_requirements_are_checked(unpacked: Callable[[str], Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(unpacked("flat"), tmp_path / "model"))
    description = json.loads((model / BUNDLE_FILE).read_text())
    description["requires"]["nnunetv2"] = ">=99"
    (model / BUNDLE_FILE).write_text(json.dumps(description))
    with pytest.raises(BundleError, match=r"needs nnunetv2>=99; 2\.\d"):
        ModelBundle(model)


def test_wrong_logits_of_the_golden_patch_stop_the_engine(unpacked: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = ModelBundle(Path(shutil.copytree(unpacked("flat"), tmp_path / "model")))  # its checksums were right
    golden = load_file(bundle.lead.folder / GOLDEN_FILE)
    golden["fold_0"][0, 0] += 1
    save_file(golden, bundle.lead.folder / GOLDEN_FILE)
    with pytest.raises(BundleError, match="golden patch"):
        LocalEngine(bundle, torch.device("cpu"))


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    from nnunet_torchserve_tools.cli import app

    runner = CliRunner()
    missing = runner.invoke(app, ["archive", str(tmp_path)])
    assert missing.exit_code == 2
    assert missing.stderr.startswith("error: ")
    assert missing.stderr.count("\n") == 1
    for option, value in (("--folds", "one"), ("--device-ids", "0,one")):
        refused = runner.invoke(app, ["archive", str(tmp_path), option, value])
        assert (refused.exit_code, option in refused.stderr) == (2, True)


def test_the_input_orientation_is_recorded(folder: Path, tmp_path: Path) -> None:
    [archive] = make_archives(ArchiveRequest(folder, tmp_path / "store", input_orientation="LPI"))
    assert member_of(archive)["input_orientation"] == "LPI"


@pytest.mark.parametrize("letters", ["ras", "RAX", "RA", "RRS", "R,A,S", ""])
def test_an_input_orientation_that_is_none_is_refused(letters: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="three letters"):
        make_archives(ArchiveRequest(folder, tmp_path / "store", input_orientation=letters))


def test_an_input_orientation_that_contradicts_the_plans_reader_is_refused(folder: Path, tmp_path: Path) -> None:
    edit_plans(folder, lambda plans: plans.update(image_reader_writer="NibabelIOWithReorient"))
    with pytest.raises(UsageError, match="RAS itself"):
        make_archives(ArchiveRequest(folder, tmp_path / "store", input_orientation="LPS"))


def test_a_model_whose_values_are_not_those_of_dataset_json_is_archived_with_a_warning(
    models: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(models["regions"], tmp_path / "model"))
    dataset = json.loads((folder / "dataset.json").read_text())
    labels = {"background": 0, "all": [1, 2, 3], "core": [1, 2], "centre": [1]}
    (folder / "dataset.json").write_text(json.dumps(dataset | {"labels": labels}))
    with pytest.warns(ModelWarning, match="3 is centre"):
        make(folder, tmp_path)


def test_a_disk_that_does_not_hold_the_archive_is_said_and_nothing_is_left(
    models: dict[str, Path], tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = tmp_path / "store"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
        with pytest.raises(ToolError, match=f"^the archive cannot be written into {store}, by way of .*: File too"):
            make_archives(ArchiveRequest(models["flat"], store))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(store.iterdir())


def test_a_warning_is_one_line_of_the_command_after_the_one_that_says_what_it_does(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunet_torchserve_tools import archive, cli

    def warn(_request: ArchiveRequest, _tell: Callable[[str], None]) -> list[Path]:
        warnings.warn("look at this", ModelWarning, stacklevel=1)
        return []

    monkeypatch.setattr(archive, "make_archives", warn)
    result = CliRunner().invoke(cli.app, ["archive", str(models["flat"])])
    first, *others = result.stderr.splitlines()
    assert (result.exit_code, first.partition(":")[0], others) == (0, "packaging", ["warning: look at this"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plans: plans.pop("transpose_forward"), r"Dataset950_Odd/nnUNetTrainer__nnUNetPlans__2d: plans\.json"),
        (
            lambda plans: plans["configurations"]["2d"]["architecture"]["arch_kwargs"].update(n_stages=9),
            r"of 2d make no network",
        ),
        (
            lambda plans: plans["configurations"]["2d"]["architecture"]["arch_kwargs"].update(conv_bias=False),
            r"weights of 2d, fold 0, do not fit",
        ),
    ],
)
def test_of_several_models_the_one_that_is_wrong_is_named(
    change: Callable[[dict[str, Any]], object], said: str, tmp_path: Path
) -> None:
    sound, wrong = OddModel().write(tmp_path), OddModel(2).write(tmp_path)
    edit_plans(wrong, change)
    with pytest.raises(ToolError, match=said):
        make_archives(ArchiveRequest(sound, tmp_path / "store", others=(wrong,)))
