"""Verbs of a server of this machine: its start, its end, and what is asked of it between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nnunet_torchserve.draining import EVERY_MODEL

from ..errors import Lost, ToolError, UsageError
from .arguments import MANAGEMENT_URL, MIB, MODEL, STATE_DIR, choice_of, http_port, port
from .command_line import app, reports_errors, say, warn

if TYPE_CHECKING:
    from ..stopping import Outcome


@app.command()
@reports_errors
def serve(
    model_store: Annotated[Path, typer.Option(help="Folder with the archives.")] = Path("model_store"),
    models: Annotated[list[str] | None, typer.Option(help="NAME=FILE.mar or FILE.mar, repeatable, or all.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Workers per device; default: the archive's, else 4 on a CPU and 8 on each GPU."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:PRECISION]",
            help="What runs the networks of all models: eager, compiled, openvino:float32 if the archive holds it and "
            "OpenVINO is installed, or auto: the fastest that the archive allows. Default: what each archive was made "
            "for.",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address of this machine for the inference port; default: from --config, else 127.0.0.1."),
    ] = None,
    management_host: Annotated[
        str | None, typer.Option(help="The same for the management port; any address but loopback needs --tokens.")
    ] = None,
    metrics_host: Annotated[str | None, typer.Option(help="The same for the metrics port.")] = None,
    inference_port: Annotated[int | None, http_port(8080)] = None,
    management_port: Annotated[int | None, http_port(8081)] = None,
    metrics_port: Annotated[int | None, http_port(8082)] = None,
    grpc_inference_port: Annotated[int | None, port(7070)] = None,
    grpc_management_port: Annotated[int | None, port(7071)] = None,
    queue: Annotated[
        int | None, typer.Option(min=1, help="How many requests may wait; default: twice the workers.")
    ] = None,
    body_limit: Annotated[
        int | None, typer.Option(min=1, help="Largest request in MiB; default: from the memory.")
    ] = None,
    heap: Annotated[
        int | None, typer.Option(min=256, help="Heap of the JVM in MiB; default: a quarter of the memory.")
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="TorchServe requires its own tokens, for predictions too.")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="Another config.properties to start from.")] = None,
    state_dir: Annotated[Path, typer.Option(help="State and logs of this server.")] = Path(".nnunet-torchserve"),
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay in the foreground until SIGTERM or stop.")
    ] = False,
    health_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of /live and /ready, with --foreground; default: 8083.")
    ] = None,
    health_host: Annotated[
        str | None, typer.Option(help="Address of this machine for that port; default: 127.0.0.1.")
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds to finish requests after SIGTERM; default: the response timeout."),
    ] = None,
    ready_timeout: Annotated[float, typer.Option(min=1, help="Seconds until every worker must be ready.")] = 600,
    testing: Annotated[bool, typer.Option("--testing", hidden=True)] = False,
) -> None:
    """Start TorchServe and wait until every worker can answer."""
    from .. import launcher

    if device not in list(launcher.DeviceKind):
        msg = f"--device {device}: auto, cpu or cuda was expected"
        raise UsageError(msg)
    if not foreground and (health_port, health_host, grace) != (None, None, None):
        msg = "--health-port, --health-host and --grace are for --foreground: without it, give stop its --grace"
        raise UsageError(msg)
    request = launcher.ServeRequest(
        model_store=model_store,
        models=tuple(models or ("all",)),
        state_dir=state_dir,
        ports=launcher.AskedPorts(
            inference_port, management_port, metrics_port, grpc_inference_port, grpc_management_port
        ),
        hosts=launcher.Hosts(host, management_host, metrics_host),
        tokens=tokens,
        workers=workers,
        queue=queue,
        device=launcher.DeviceKind(device),
        backend=None if backend is None else choice_of(backend),
        body_limit=None if body_limit is None else body_limit * MIB,
        heap=None if heap is None else heap * MIB,
        config=config,
        ready_timeout_s=ready_timeout,
        testing=testing,
    )

    def started(server: launcher.Server) -> None:
        for name in server.several:
            warn(f"{name} has several versions in the model store; one of them is its default")
        typer.echo(f"ready {server.inference_url} {' '.join(server.models)}")

    if not foreground:
        say("serving: reads the archives, starts TorchServe, waits until each worker has loaded and tried its model")
        started(launcher.start(request, warn, tell=lambda _: None))
        return
    from ..foreground import Watchfulness, serve_in_foreground

    default = Watchfulness(grace_s=grace)
    care = Watchfulness(health_host or default.health_host, health_port or default.health_port, grace)
    _say_what_was_lost(serve_in_foreground(request, care, started, warn, say))


@app.command()
@reports_errors
def stop(
    grace: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds to finish requests; default: the response timeout; 0 ends the server now."),
    ] = None,
    state_dir: Annotated[Path, typer.Option(help="The server's state directory.")] = Path(".nnunet-torchserve"),
) -> None:
    """Stop the server of this folder: it refuses new requests and finishes those it has."""
    from ..stopping import stop_gracefully

    outcome = stop_gracefully(state_dir, grace, tell=say)
    if not outcome.was_running:
        typer.echo(f"no server of {state_dir.resolve()} is running", err=True)
        return
    _say_what_was_lost(outcome)
    typer.echo("stopped")


def _say_what_was_lost(outcome: Outcome) -> None:
    """Raise :class:`Lost` if anything was in hand when the server was ended."""
    if outcome.lost:
        more = "; --grace allows more time" if outcome.was_cut_short else ""
        msg = f"the server was ended although there was {outcome.lost}{more}"
        raise Lost(msg)


@app.command()
@reports_errors
def health(
    live: Annotated[
        bool,
        typer.Option("--live/--ready", help="Whether the server need not be restarted, or whether it takes requests."),
    ] = False,
    url: Annotated[str | None, typer.Option(help="URL of the health port, instead of the state directory.")] = None,
    state_dir: Annotated[Path, typer.Option(help="State directory of a server on this machine.")] = Path(
        ".nnunet-torchserve"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Output for programs.")] = False,
) -> None:
    """Say whether a server is well; exit code 0 if it is."""
    from ..asking_health import ask

    verdict = ask(url, state_dir, live=live)
    typer.echo(json.dumps(verdict.document()) if as_json else verdict.detail)
    if not verdict.ok:
        raise typer.Exit(ToolError.exit_code)


@app.command()
@reports_errors
def drain(
    model: Annotated[str | None, MODEL] = None,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait.")] = 1260,
    retry_after: Annotated[int, typer.Option(min=1, help="Seconds after which refused clients should try again.")] = 10,
    state_dir: Annotated[Path, STATE_DIR] = Path(".nnunet-torchserve"),
    management_url: Annotated[str | None, MANAGEMENT_URL] = None,
) -> None:
    """Refuse new requests (503, Retry-After) and wait until none is in flight: before you scale down or unregister."""
    from .. import drain as draining

    target = draining.find_target(state_dir, management_url, model)
    draining.drain(target, timeout, retry_after)
    typer.echo(f"drained {target.name}: it takes no requests until 'nnunet-torchserve resume'")


@app.command()
@reports_errors
def resume(
    model: Annotated[str | None, MODEL] = None,
    state_dir: Annotated[Path, STATE_DIR] = Path(".nnunet-torchserve"),
    management_url: Annotated[str | None, MANAGEMENT_URL] = None,
) -> None:
    """Take requests again: for one version, for a model with all its versions, or for every model."""
    from .. import drain as draining

    target = draining.find_target(state_dir, management_url, model, served=False)
    lifted = draining.resume(target)
    typer.echo(f"resumed {target.name}" if lifted else f"{target.name} was not drained under that name")
    if others := draining.others_standing(target):
        names = " and ".join("every model" if name == EVERY_MODEL else name for name in others)
        msg = f"{target.name} takes no requests still: {names} was drained; resume that"
        raise ToolError(msg)
