"""Verbs of archives and of the models that they are made of."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ToolError
from ..model_folders import check_sources
from ..openmp import let_threads_sleep
from .arguments import MIB, backend_of, device_ids_of, folds_of, postprocessing_of, tolerance_of, validation_of
from .command_line import app, reports_errors, say, warn, warnings_as_lines

_MAX_DICE_LOSS_HELP = (
    "Dice that may be lost: in the mean, and of a structure in a case; one number is both. Default: with labels "
    "0.001,0.005 of eager's Dice to them, and 0.01 of the Dice of both answers where a case's labels lack the "
    "structure; without 0.005,0.01 of the Dice of both answers."
)


@app.command()
@reports_errors
def archive(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            help="nnU-Net's TRAINER__PLANS__CONFIGURATION folder, or a zip of nnUNetv2_export_model_to_zip; several "
            "with --ensemble."
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="In place of a folder: what nnUNetv2_find_best_configuration recommends for the dataset of this name "
            "or number, below nnUNet_results or in the zip that is named."
        ),
    ] = None,
    configuration: Annotated[
        list[str] | None, typer.Option(help="Which model, if the zip holds several; repeatable with --ensemble.")
    ] = None,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="One archive answers with the mean of the models' probabilities.")
    ] = False,
    previous_stage: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder or zip of a cascade's first stage, which the server then predicts too; repeatable. Default: "
            "the one in the same zip."
        ),
    ] = None,
    postprocessing: Annotated[
        str | None,
        typer.Option(
            help="nnU-Net's postprocessing.pkl or .json; auto: the one for exactly these models and folds; none. "
            "Default: none, as in nnUNetv2_predict; with --dataset what nnU-Net recommends."
        ),
    ] = None,
    folds: Annotated[str | None, typer.Option(help="Folds, as 0,1,2 or all (nnU-Net's fold_all).")] = None,
    per_fold: Annotated[bool, typer.Option("--per-fold", help="Also one archive for each fold.")] = False,
    name: Annotated[str | None, typer.Option(help="Model name; default: dataset and configuration.")] = None,
    version: Annotated[str, typer.Option(help="Model version.")] = "1.0",
    checkpoint: Annotated[str, typer.Option(help="Checkpoint file in each fold's folder.")] = "checkpoint_final.pth",
    output: Annotated[Path, typer.Option(help="Folder for the archives.")] = Path("model_store"),
    input_orientation: Annotated[
        str | None,
        typer.Option(
            help="Orientation of the training images, what the axes run towards, e.g. RAS (the command orientation "
            "tells you). Every image is turned into it, and the answer back. Without it images are taken as sent, "
            "as nnU-Net takes them, and DICOM is refused."
        ),
    ] = None,
    segments: Annotated[
        Path | None,
        typer.Option(
            help="JSON with the codes of each structure, for DICOM segmentations; the command segments proposes one."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="TorchServe workers in total; default: the server decides.")
    ] = None,
    response_timeout: Annotated[int, typer.Option(min=20, help="Longest time for one request, in seconds.")] = 1200,
    max_patch_batch: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Patches in one forward pass; default: 1 on a CPU, probed on a GPU."),
    ] = None,
    golden_interval: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="Minutes between two checks of the weights in a running engine; default: at its start only."
        ),
    ] = None,
    cache: Annotated[
        int,
        typer.Option(min=0, help="MiB of preprocessed images that each engine keeps for later requests; 0 keeps none."),
    ] = 0,
    single_flight: Annotated[
        bool, typer.Option("--single-flight", help="Compute equal requests once if they come at the same time.")
    ] = False,
    unload_after: Annotated[
        float | None,
        typer.Option(min=0.001, help="Minutes without a request until the weights are unloaded; default: never."),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME[:PRECISION]",
            help="What runs the network: eager, as stock does; openvino:float32, for CPUs, which rounds differently; "
            "openvino:bf16, for CPUs that compute in it, needs --validate; openvino:int8 needs --calibrate; compiled, "
            "by torch.compile. A server that cannot run it uses eager.",
        ),
    ] = "eager",
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE_OR_FOLDER",
            help="Images that openvino:int8 is calibrated on, and compared on if there is no --validate; a folder in "
            "nnU-Net's naming, or an image; repeatable.",
        ),
    ] = None,
    validate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE_OR_FOLDER",
            help="Compare the backend's answers with eager's on these images, keep the report with the archive, and "
            "refuse the backend if it loses too much; a folder in nnU-Net's naming, or an image; repeatable.",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the labels of the images of --validate (or --calibrate without it): what is lost is lost "
            "against them."
        ),
    ] = None,
    max_dice_loss: Annotated[str | None, typer.Option(metavar="MEAN[,STRUCTURE]", help=_MAX_DICE_LOSS_HELP)] = None,
    device_ids: Annotated[
        str | None,
        typer.Option(help="GPUs that serve the model, e.g. 1,2; default: all. Ignored by serve --device cpu."),
    ] = None,
    trust_checkpoint: Annotated[
        bool,
        typer.Option("--trust-checkpoint", help="Open checkpoints as pickles, which can run code: only for your own."),
    ] = False,
    trainer_file: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.py",
            help="Code that the model needs and nnunetv2 lacks: its trainer, network, preprocessor, normalisation, "
            "resampling or label manager; repeatable. It runs now, and in every server of the archive.",
        ),
    ] = None,
    requires: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PACKAGE==VERSION",
            help="A package that those files import; a server checks its version and installs nothing; repeatable.",
        ),
    ] = None,
) -> None:
    """Package a trained nnU-Net model for TorchServe."""
    chosen_folds, chosen_devices, chosen_backend = folds_of(folds), device_ids_of(device_ids), backend_of(backend)
    if dataset is None:
        check_sources(models or (), previous_stage or ())
    if calibrate and not validate:
        say("it will be measured on the images that it is calibrated on, which flatters: --validate names others")
    say("packaging: loads PyTorch and nnU-Net, then reads the model, checks it and tries it on a small case")
    let_threads_sleep(os.environ)
    from ..archive import make_archives
    from ..archive_request import ArchiveRequest
    from ..selection import Choice, selected
    from ..serving_settings import ServingSettings

    serving = ServingSettings(
        workers=workers,
        response_timeout_s=response_timeout,
        max_patch_batch=max_patch_batch or "auto",
        golden_interval_s=None if golden_interval is None else golden_interval * 60,
        cache_bytes=cache * MIB,
        single_flight=single_flight,
        unload_after_s=None if unload_after is None else unload_after * 60,
        device_ids=chosen_devices,
    )
    choice = Choice(
        sources=tuple(models or ()),
        dataset=dataset,
        configurations=tuple(configuration or ()),
        ensemble=ensemble,
        previous_stages=tuple(previous_stage or ()),
        postprocessing=postprocessing_of(postprocessing),
        folds=chosen_folds,
        checkpoint=checkpoint,
    )
    with warnings_as_lines(), selected(choice) as selection:
        for line in selection.remarks:
            say(line)
        request = ArchiveRequest(
            model_folder=selection.models[0],
            output=output,
            others=selection.models[1:],
            previous_stages=selection.previous_stages,
            postprocessing=selection.postprocessing,
            postprocessing_folds=selection.postprocessing_folds,
            folds=selection.folds,
            per_fold=per_fold,
            name=name,
            version=version,
            checkpoint=checkpoint,
            trust_checkpoint=trust_checkpoint,
            trainer_files=tuple(trainer_file or ()),
            requires=tuple(requires or ()),
            input_orientation=input_orientation and input_orientation.upper(),
            segments=segments,
            backend=chosen_backend,
            calibration=tuple(calibrate or ()),
            validation=validation_of(validate or calibrate, labels, max_dice_loss),
            serving=serving,
        )
        files = make_archives(request, say)
    for file in files:
        typer.echo(f"{file}  {file.stat().st_size / MIB:.1f} MiB")


@app.command()
@reports_errors
def fetch(
    url: Annotated[
        str | None,
        typer.Argument(
            help="https address of the archive; default: NNUNET_TORCHSERVE_FETCH_URL, for a secret address."
        ),
    ] = None,
    sha256: Annotated[str, typer.Option(help="Of the file, as sha256sum prints it.")] = "",
    max_bytes: Annotated[int, typer.Option(min=1, help="Largest file accepted; default: 8 GiB.")] = 8 * 1024**3,
    into: Annotated[Path, typer.Option(help="The model store.")] = Path("model_store"),
    name: Annotated[str | None, typer.Option(help="Name of the file there; default: the address's last part.")] = None,
    verify: Annotated[
        Path | None, typer.Option(help="Authorities (PEM) that may sign the server's certificate.")
    ] = None,
) -> None:
    """Download an archive into a model store, if it has this sha256."""
    from .. import fetch as fetching

    wanted = fetching.Wanted(
        url=fetching.wanted_url(url),
        sha256=sha256,
        max_bytes=max_bytes,
        into=into,
        name=name,
        authorities=verify,
        token=fetching.given_token(),
    )
    typer.echo(fetching.fetch(wanted, tell=warn))


@app.command(name="describe")
@reports_errors
def describe_(
    archive_file: Annotated[Path, typer.Argument(metavar="FILE.mar", help="The archive.")],
    shape: Annotated[str | None, typer.Option(help="Voxels of an image along x, y, z, e.g. 512,512,300.")] = None,
    spacing: Annotated[str | None, typer.Option(help="Its spacing in mm along x, y, z, e.g. 0.7,0.7,1.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Output for programs.")] = False,
) -> None:
    """Describe an archive: its models, the images it takes, and what a case of a given shape costs."""
    from ..model_card import lines, model_card, read_shape

    card = model_card(archive_file, read_shape(shape, spacing))
    if as_json:
        typer.echo(json.dumps(card, indent=2))
    else:
        for line in lines(card):
            typer.echo(line)


@app.command(name="validate")
@reports_errors
def validate_(
    archive_file: Annotated[Path, typer.Argument(metavar="FILE.mar", help="An archive made with --backend.")],
    images: Annotated[list[Path], typer.Option(help="Folder of images in nnU-Net's naming, or an image; repeatable.")],
    labels: Annotated[Path | None, typer.Option(help="Folder with the labels of all these images.")] = None,
    max_dice_loss: Annotated[str | None, typer.Option(metavar="MEAN[,STRUCTURE]", help=_MAX_DICE_LOSS_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Output for programs.")] = False,
) -> None:
    """Compare an archive's backend with eager on images of yours; fails if it loses too much Dice.

    Code of its owner that the archive brings along is run.
    """
    let_threads_sleep(os.environ)
    from ..accuracy_gate import check, unseen
    from ..accuracy_table import lines
    from ..validate import validate
    from ..validation_cases import Validation

    report = validate(archive_file, Validation(tuple(images), labels, tolerance_of(max_dice_loss)), say)
    if as_json:
        document = {"summary": report.summary()} | report.model_dump(mode="json")
        typer.echo(json.dumps(document, indent=2))
    else:
        for line in lines(report):
            typer.echo(line)
    if missing := unseen(report):
        warn(f"{', '.join(missing)}: no answer has any of it, so nothing is known of its accuracy")
    check(report)


@app.command(name="orientation")
@reports_errors
def orientation_(
    images: Annotated[list[Path], typer.Argument(help="Training images, or the folder imagesTr.")],
    as_json: Annotated[bool, typer.Option("--json", help="Output for programs.")] = False,
) -> None:
    """Tell the orientation of training images, and whether all agree: the value of archive --input-orientation."""
    from ..orientation import survey

    found = survey(images)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        for line in found.lines():
            typer.echo(line)
    if found.agreed is None:
        msg = "the images do not agree, or not all say how they lie: no single orientation is right for this model"
        raise ToolError(msg)


@app.command(name="segments")
@reports_errors
def segments_(
    model: Annotated[Path, typer.Argument(metavar="MODEL_FOLDER", help="A trained model's folder, or dataset.json.")],
) -> None:
    """Propose codes for a model's structures, as JSON for archive --segments; check it before you use it."""
    from ..segments import propose

    found = propose(model)
    typer.echo(found.as_json())
    for line in found.lines():
        say(line)
