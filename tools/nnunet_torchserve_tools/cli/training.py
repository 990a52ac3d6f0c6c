"""Verbs of whoever trains a model that shall be light to serve."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .command_line import app, reports_errors


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
) -> None:
    """Write plans for a lighter network; train it with nnUNetv2_train -p NAME on the data preprocessed before."""
    from ..smaller_plans import write_smaller_plans

    written, changes = write_smaller_plans(plans, features, name)
    for change in changes:
        typer.echo(change.line())
    typer.echo(written)
