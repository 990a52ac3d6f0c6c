"""Verbs of whoever asks a server, wherever it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .command_line import app, reports_errors


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@reports_errors
def predict(context: typer.Context) -> None:
    """Predict a folder on a server, with the arguments of nnUNetv2_predict (predict -h lists them)."""
    from .. import predict as predicting

    predicting.run(context.args)


@app.command("list")
@reports_errors
def list_(
    server: Annotated[
        list[str] | None, typer.Option(help="URL of the inference port; default: NNUNET_TORCHSERVE_URL.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Any model of the server: it knows the others.")] = None,
    management_url: Annotated[str | None, typer.Option(help="URL of the server's management port.")] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="State directory of a server on this machine, which has all addresses.")
    ] = None,
    verify: Annotated[str | None, typer.Option(help="Authorities (PEM) that may sign the certificate.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Output for programs.")] = False,
) -> None:
    """List a server's models: what they are made of, their labels, their workers and requests."""
    from ..list_models import Sources, addresses, list_models, of_state_dir

    sources = Sources(addresses(server), model, management_url, None, verify)
    listing = list_models(sources if state_dir is None else of_state_dir(state_dir, sources))
    if as_json:
        typer.echo(json.dumps(listing.as_json(), indent=2))
    else:
        for line in listing.lines():
            typer.echo(line)
