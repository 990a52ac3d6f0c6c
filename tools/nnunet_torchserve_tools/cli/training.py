"""Verbs of whoever trains a model that shall be light to serve."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .arguments import folds_of
from .command_line import app, reports_errors, say


@app.command()
@reports_errors
def trainers(
    path: Annotated[bool, typer.Option("--path", help="Print only the folder.")] = False,
) -> None:
    """List the trainers that this project adds to nnU-Net, and the folder that nnUNet_extTrainer must name."""
    from ..added_trainers import added_trainers, external_folder

    folder = external_folder()
    if path:
        typer.echo(folder)
        return
    for name, what in added_trainers(folder).items():
        typer.echo(f"{name}  {what}")
    typer.echo(f"export nnUNet_extTrainer={shlex.quote(str(folder))}")


@app.command("shrink-plans")
@reports_errors
def shrink_plans(
    plans: Annotated[
        Path, typer.Argument(metavar="PLANS.json", help="Plans of the dataset, below nnUNet_preprocessed.")
    ],
    name: Annotated[str, typer.Option(help="Name of the new plans, which are written beside them.")],
    features: Annotated[float, typer.Option(help="Share of each stage's features to keep.")] = 0.5,
    convolutions: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many convolutions, or residual blocks, in a stage. Default: as planned."),
    ] = None,
) -> None:
    """Write plans for a lighter network; train it with nnUNetv2_train -p NAME on the data preprocessed before."""
    from ..smaller_plans import write_smaller_plans

    written, changes = write_smaller_plans(plans, features, name, convolutions)
    for change in changes:
        typer.echo(change.line())
    typer.echo(written)


@app.command("soft-targets")
@reports_errors
def soft_targets(
    plans: Annotated[
        Path, typer.Argument(metavar="PLANS.json", help="The student's plans, below nnUNet_preprocessed.")
    ],
    configuration: Annotated[str, typer.Option(help="Configuration of the student, as 3d_fullres.")],
    teacher: Annotated[
        Path | None, typer.Option(metavar="MODEL_FOLDER", help="The teacher: a trained model folder on this machine.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint of each of its folds. Default: checkpoint_final.pth.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu, for a model folder. Default: cuda if there is one.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME[/VERSION]", help="Or a model on a server, by its name there.")
    ] = None,
    server: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Where it is served. Default: NNUNET_TORCHSERVE_URL.")
    ] = None,
    verify: Annotated[
        str | None, typer.Option(metavar="FILE", help="Authorities (PEM) that may sign the server's certificate.")
    ] = None,
    folds: Annotated[
        str | None, typer.Option(help="Folds of the teacher, as 0,1. Default: every numbered one, or all served.")
    ] = None,
    disable_tta: Annotated[bool, typer.Option("--disable-tta", help="No mirroring: sooner, less accurate.")] = False,
) -> None:
    """Cache a teacher's probabilities for each preprocessed case; then train with -tr nnUNetTrainerDistill."""
    if (teacher is None) == (model is None):
        msg = "who teaches? Give --teacher with a model folder, or --model with a model's name on a server"
        raise UsageError(msg)
    of_a_server, of_a_folder = (
        {"--server": server, "--verify": verify},
        {"--checkpoint": checkpoint, "--device": device},
    )
    others = of_a_server if model is None else of_a_folder
    if given := [name for name, value in others.items() if value is not None]:
        msg = f"{given[0]} is for {'a model on a server' if model is None else 'a model folder'}"
        raise UsageError(msg)
    from nnunet_torchserve_trainers.soft_target_files import SoftTargets

    from ..soft_targets import make_soft_targets
    from ..student import Student
    from ..teachers import folder_teacher, served_teacher

    student = Student(plans, configuration)
    of_folds, use_mirroring = folds_of(folds), not disable_tta
    if teacher is not None:
        source = folder_teacher(teacher, of_folds, checkpoint, device, use_mirroring=use_mirroring)
        done = make_soft_targets(student, source, say)
    else:
        with served_teacher(
            server, str(model), verify, student.settings.resampling_fn_probabilities, of_folds,
            use_mirroring=use_mirroring,
        ) as served:  # fmt: skip
            done = make_soft_targets(student, served, say)
    typer.echo(f"{done.made} cases made, {done.there} were there: {SoftTargets.beside(student.folder).folder}")
