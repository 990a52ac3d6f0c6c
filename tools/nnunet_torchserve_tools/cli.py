"""``nnunet-torchserve``: the verbs, wired.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 stopped although not everything was answered.
"""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from nnunet_torchserve.draining import EVERY_MODEL

from .console import explained
from .errors import Lost, ModelWarning, ToolError, UsageError

if TYPE_CHECKING:
    from nnunet_torchserve.backend import Backend
    from nnunet_torchserve.options import FoldName

    from .stopping import Outcome

app = typer.Typer(
    help="Serve trained nnU-Net v2 models with TorchServe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_P = ParamSpec("_P")
_MIB = 1024**2
_LARGEST_HTTP_PORT = 65534  # TorchServe refuses 65535


def _reports_errors(command: Callable[_P, None]) -> Callable[_P, None]:
    """A :class:`ToolError` becomes one line on stderr and its exit code."""

    @wraps(command)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (ToolError, ModuleNotFoundError) as error:
            line, code = explained(error)
            typer.echo(line, err=True)
            raise typer.Exit(code) from error

    return wrapper


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """A :class:`ModelWarning` becomes one line on stderr; others are shown as ever."""
    show = warnings.showwarning

    def show_one(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, ModelWarning):
            typer.echo(f"warning: {message}", err=True)
        else:
            show(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", ModelWarning)
        warnings.showwarning = show_one
        yield


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(importlib.metadata.version("nnunet-torchserve"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
@_reports_errors
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
        list[str] | None, typer.Option(help="Which model of a zip that holds several; repeatable with --ensemble.")
    ] = None,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="The models are one: the mean of their probabilities.")
    ] = False,
    previous_stage: Annotated[
        list[Path] | None,
        typer.Option(
            help="The folder or zip of a cascade's first stage, which is then predicted too; repeatable. Default: that "
            "of the same zip."
        ),
    ] = None,
    postprocessing: Annotated[
        str | None,
        typer.Option(
            help="nnU-Net's postprocessing.pkl or .json; auto for that of exactly the models and folds of an archive; "
            "none. Default: none, as nnUNetv2_predict does none; with --dataset what is recommended."
        ),
    ] = None,
    folds: Annotated[str | None, typer.Option(help="Folds, as 0,1,2 or all (nnU-Net's fold_all).")] = None,
    per_fold: Annotated[bool, typer.Option("--per-fold", help="Also one archive for each fold.")] = False,
    name: Annotated[str | None, typer.Option(help="Model name; default: dataset and configuration.")] = None,
    version: Annotated[str, typer.Option(help="Model version.")] = "1.0",
    checkpoint: Annotated[str, typer.Option(help="Checkpoint file in each fold's folder.")] = "checkpoint_final.pth",
    output: Annotated[Path, typer.Option(help="Where the archives go.")] = Path("model_store"),
    input_orientation: Annotated[
        str | None,
        typer.Option(
            help="Orientation that the model was trained in, what the axes run towards, as RAS (command orientation "
            "tells it); every image is brought into it and the answer back. Without it images are taken as they are "
            "sent, as nnU-Net takes them, and no DICOM."
        ),
    ] = None,
    segments: Annotated[
        Path | None,
        typer.Option(
            help="JSON with what each structure is in codes, for DICOM segmentations; command segments proposes one."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="TorchServe workers in all; default: left to the server.")
    ] = None,
    response_timeout: Annotated[int, typer.Option(min=20, help="Seconds for one request.")] = 1200,
    max_patch_batch: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Patches in one forward pass; default: 1 on a CPU, probed on a GPU."),
    ] = None,
    golden_interval: Annotated[
        float | None, typer.Option(min=0.1, help="Minutes between checks of the weights in a running engine.")
    ] = None,
    cache: Annotated[
        int,
        typer.Option(min=0, help="MiB of preprocessed images that each engine keeps for later requests; 0: none."),
    ] = 0,
    single_flight: Annotated[
        bool, typer.Option("--single-flight", help="Compute equal requests that come at the same time once.")
    ] = False,
    unload_after: Annotated[
        float | None,
        typer.Option(min=0.001, help="Minutes without a request after which the weights leave the memory."),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME[:PRECISION]",
            help="What is to run the network: eager, as stock does, or openvino:float32, which is sooner on a CPU and "
            "gives other bits. Whoever has no OpenVINO is served by eager.",
        ),
    ] = "eager",
    device_ids: Annotated[
        str | None,
        typer.Option(help="GPUs that serve the model, as 1,2; default: all. Without meaning with serve --device cpu."),
    ] = None,
    trust_checkpoint: Annotated[
        bool, typer.Option("--trust-checkpoint", help="Open checkpoints as pickles, which can run code: only your own.")
    ] = False,
    trainer_file: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.py",
            help="What the model needs and nnunetv2 does not have: its trainer, network, preprocessor, normalisation, "
            "resampling or label manager; repeatable. It is run now, and by every server of the archive.",
        ),
    ] = None,
    requires: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PACKAGE==VERSION",
            help="What those files import; a server checks it and installs nothing; repeatable.",
        ),
    ] = None,
) -> None:
    """Package what nnU-Net trained for TorchServe."""
    from .archive import ArchiveRequest, make_archives
    from .selection import Choice, selected
    from .serving_settings import ServingSettings

    serving = ServingSettings(
        workers=workers,
        response_timeout_s=response_timeout,
        max_patch_batch=max_patch_batch or "auto",
        golden_interval_s=None if golden_interval is None else golden_interval * 60,
        cache_bytes=cache * _MIB,
        single_flight=single_flight,
        unload_after_s=None if unload_after is None else unload_after * 60,
        device_ids=_device_ids(device_ids),
    )
    choice = Choice(
        sources=tuple(models or ()),
        dataset=dataset,
        configurations=tuple(configuration or ()),
        ensemble=ensemble,
        previous_stages=tuple(previous_stage or ()),
        postprocessing=_postprocessing(postprocessing),
        folds=_folds(folds),
        checkpoint=checkpoint,
    )
    with _warnings_as_lines(), selected(choice) as selection:
        for line in selection.remarks:
            _tell(line)
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
            backend=_backend(backend),
            serving=serving,
        )
        files = make_archives(request, _tell)
    for file in files:
        typer.echo(f"{file}  {file.stat().st_size / _MIB:.1f} MiB")


def _tell(line: str) -> None:
    typer.echo(line, err=True)


@app.command()
@_reports_errors
def fetch(
    url: Annotated[
        str | None,
        typer.Argument(
            help="https address of the archive; default: NNUNET_TORCHSERVE_FETCH_URL, where it is a secret."
        ),
    ] = None,
    sha256: Annotated[str, typer.Option(help="Of the file, as sha256sum prints it.")] = "",
    max_bytes: Annotated[int, typer.Option(min=1, help="Largest file that is taken; default: 8 GiB.")] = 8 * 1024**3,
    into: Annotated[Path, typer.Option(help="The model store.")] = Path("model_store"),
    name: Annotated[str | None, typer.Option(help="Name of the file there; default: the address's last part.")] = None,
    verify: Annotated[
        Path | None, typer.Option(help="Authorities (PEM) that may sign the server's certificate.")
    ] = None,
) -> None:
    """Load an archive into a model store, if it is the one with this sha256."""
    from . import fetch as fetching

    wanted = fetching.Wanted(
        url=fetching.wanted_url(url),
        sha256=sha256,
        max_bytes=max_bytes,
        into=into,
        name=name,
        authorities=verify,
        token=fetching.given_token(),
    )
    typer.echo(fetching.fetch(wanted, tell=_warn))


def _postprocessing(text: str | None) -> Any:
    """The option of that name: a file, ``"auto"``, ``"none"`` or nothing."""
    return text if text in {None, "auto", "none"} else Path(str(text))


def _backend(text: str) -> Backend:
    from nnunet_torchserve.backend import parse_backend

    try:
        return parse_backend(text)
    except ValueError as error:
        msg = f"--backend: {error}"
        raise UsageError(msg) from error


def _port(default: int, largest: int = 65535) -> Any:
    return typer.Option(min=1, max=largest, help=f"Default: that of --config, else {default}.")


def _http_port(default: int) -> Any:
    return _port(default, _LARGEST_HTTP_PORT)


@app.command()
@_reports_errors
def serve(
    model_store: Annotated[Path, typer.Option(help="Folder with the archives.")] = Path("model_store"),
    models: Annotated[list[str] | None, typer.Option(help="NAME=FILE.mar or FILE.mar, repeatable, or all.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers per device; default: the archive's, else 4 (8 a GPU).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:PRECISION]",
            help="What runs the networks of all models: eager, or openvino:float32 where the archive holds that and "
            "the machine has it. Default: what each archive was made with.",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address of this machine for the inference port; default: that of --config, else 127.0.0.1."),
    ] = None,
    management_host: Annotated[
        str | None, typer.Option(help="The same for the management port; any but loopback needs --tokens.")
    ] = None,
    metrics_host: Annotated[str | None, typer.Option(help="The same for the metrics port.")] = None,
    inference_port: Annotated[int | None, _http_port(8080)] = None,
    management_port: Annotated[int | None, _http_port(8081)] = None,
    metrics_port: Annotated[int | None, _http_port(8082)] = None,
    grpc_inference_port: Annotated[int | None, _port(7070)] = None,
    grpc_management_port: Annotated[int | None, _port(7071)] = None,
    queue: Annotated[int | None, typer.Option(min=1, help="Waiting requests; default: twice the workers.")] = None,
    body_limit: Annotated[int | None, typer.Option(min=1, help="MiB of a request; default: from the memory.")] = None,
    heap: Annotated[int | None, typer.Option(min=256, help="MiB of the JVM; default: a quarter of the memory.")] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="TorchServe asks for its own tokens, for predictions too.")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="Another config.properties to start from.")] = None,
    state_dir: Annotated[Path, typer.Option(help="State and logs of this server.")] = Path(".nnunet-torchserve"),
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay until SIGTERM or stop.")] = False,
    health_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Of /live and /ready, with --foreground; default: 8083.")
    ] = None,
    health_host: Annotated[
        str | None, typer.Option(help="Address of this machine for them; default: 127.0.0.1.")
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds for what is in hand at SIGTERM; default: the response timeout."),
    ] = None,
    ready_timeout: Annotated[float, typer.Option(min=1, help="Seconds for every worker to be ready.")] = 600,
    testing: Annotated[bool, typer.Option("--testing", hidden=True)] = False,
) -> None:
    """Start TorchServe and wait until every worker can answer."""
    from . import launcher

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
        backend=None if backend is None else _backend(backend),
        body_limit=None if body_limit is None else body_limit * _MIB,
        heap=None if heap is None else heap * _MIB,
        config=config,
        ready_timeout_s=ready_timeout,
        testing=testing,
    )

    def started(server: launcher.Server) -> None:
        for name in server.several:
            _warn(f"{name} has several versions in the model store; one of them is its default")
        typer.echo(f"ready {server.inference_url} {' '.join(server.models)}")

    if not foreground:
        started(launcher.start(request, _warn, tell=lambda _: None))
        return
    from .foreground import Watchfulness, serve_in_foreground

    default = Watchfulness(grace_s=grace)
    care = Watchfulness(health_host or default.health_host, health_port or default.health_port, grace)
    _say_what_was_lost(serve_in_foreground(request, care, started, _warn, _say))


@app.command()
@_reports_errors
def stop(
    grace: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds for what is in hand; default: the response timeout; 0 ends it now."),
    ] = None,
    state_dir: Annotated[Path, typer.Option(help="The server's state directory.")] = Path(".nnunet-torchserve"),
) -> None:
    """Stop the server that was started here: new requests are refused, what is in hand is finished."""
    from .stopping import stop_gracefully

    outcome = stop_gracefully(state_dir, grace, tell=_say)
    if not outcome.was_running:
        typer.echo(f"no server of {state_dir.resolve()} is running", err=True)
        return
    _say_what_was_lost(outcome)
    typer.echo("stopped")


def _say_what_was_lost(outcome: Outcome) -> None:
    """Raise :class:`Lost` if anything was in hand when the server was ended."""
    if outcome.lost:
        msg = f"the server was ended although there was {outcome.lost}; --grace allows more time"
        raise Lost(msg)


@app.command()
@_reports_errors
def health(
    live: Annotated[
        bool, typer.Option("--live/--ready", help="Whether it need not be restarted, or whether it takes requests.")
    ] = False,
    url: Annotated[str | None, typer.Option(help="Of the health port, instead of the state directory.")] = None,
    state_dir: Annotated[Path, typer.Option(help="Of a server of this machine.")] = Path(".nnunet-torchserve"),
    as_json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """Say whether a server is well; exit code 0 if it is."""
    from .asking_health import ask

    verdict = ask(url, state_dir, live=live)
    typer.echo(json.dumps(verdict.document()) if as_json else verdict.detail)
    if not verdict.ok:
        raise typer.Exit(ToolError.exit_code)


_STATE_DIR = typer.Option(help="The server's state directory.")
_MANAGEMENT_URL = typer.Option(help="Of a server of this machine, instead of its state directory.")
_MODEL = typer.Option(help="NAME or NAME/VERSION; default: every model.")


@app.command()
@_reports_errors
def drain(
    model: Annotated[str | None, _MODEL] = None,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait.")] = 1260,
    retry_after: Annotated[int, typer.Option(min=1, help="Seconds after which refused clients shall come again.")] = 10,
    state_dir: Annotated[Path, _STATE_DIR] = Path(".nnunet-torchserve"),
    management_url: Annotated[str | None, _MANAGEMENT_URL] = None,
) -> None:
    """Refuse new requests (503, Retry-After) and wait until none is in flight; then scale down, unregister or stop."""
    from . import drain as draining

    target = draining.find_target(state_dir, management_url, model)
    draining.drain(target, timeout, retry_after)
    typer.echo(f"drained {target.name}: it takes no requests until 'nnunet-torchserve resume'")


@app.command()
@_reports_errors
def resume(
    model: Annotated[str | None, _MODEL] = None,
    state_dir: Annotated[Path, _STATE_DIR] = Path(".nnunet-torchserve"),
    management_url: Annotated[str | None, _MANAGEMENT_URL] = None,
) -> None:
    """Take requests again: of one version, of a model with all its versions, or of every model."""
    from . import drain as draining

    target = draining.find_target(state_dir, management_url, model, served=False)
    lifted = draining.resume(target)
    typer.echo(f"resumed {target.name}" if lifted else f"{target.name} was not drained under that name")
    if others := draining.others_standing(target):
        names = " and ".join("every model" if name == EVERY_MODEL else name for name in others)
        msg = f"{target.name} takes no requests still: {names} was drained; resume that"
        raise ToolError(msg)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@_reports_errors
def predict(context: typer.Context) -> None:
    """Predict a folder on a server, with the arguments of nnUNetv2_predict (predict -h lists them)."""
    from . import predict as predicting

    predicting.run(context.args)


@app.command("list")
@_reports_errors
def list_(
    server: Annotated[
        list[str] | None, typer.Option(help="URL of the inference port; default: NNUNET_TORCHSERVE_URL.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Any model of the server: it knows the others.")] = None,
    management_url: Annotated[str | None, typer.Option(help="Of the server's management port.")] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Of a server of this machine, which says all addresses.")
    ] = None,
    verify: Annotated[str | None, typer.Option(help="Authorities (PEM) that may sign the certificate.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """List a server's models: what they are made of, their labels, their workers and the work in hand."""
    from .list_models import Sources, addresses, list_models, of_state_dir

    sources = Sources(addresses(server), model, management_url, None, verify)
    listing = list_models(sources if state_dir is None else of_state_dir(state_dir, sources))
    if as_json:
        typer.echo(json.dumps(listing.as_json(), indent=2))
    else:
        for line in listing.lines():
            typer.echo(line)


@app.command(name="describe")
@_reports_errors
def describe_(
    archive_file: Annotated[Path, typer.Argument(metavar="FILE.mar", help="The archive.")],
    shape: Annotated[str | None, typer.Option(help="Voxels of an image along x, y, z, as 512,512,300.")] = None,
    spacing: Annotated[str | None, typer.Option(help="Its mm along x, y, z, as 0.7,0.7,1.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """Describe an archive: what it is made of, what its images must be, what a case of a given shape costs."""
    from .model_card import lines, model_card, read_shape

    card = model_card(archive_file, read_shape(shape, spacing))
    if as_json:
        typer.echo(json.dumps(card, indent=2))
    else:
        for line in lines(card):
            typer.echo(line)


@app.command(name="orientation")
@_reports_errors
def orientation_(
    images: Annotated[list[Path], typer.Argument(help="Training images, or the folder imagesTr.")],
    as_json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """Tell how training images are stored, and whether all agree: what archive --input-orientation wants to know."""
    from .orientation import survey

    found = survey(images)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        for line in found.lines():
            typer.echo(line)
    if found.agreed is None:
        msg = "the images do not agree, or not all say how they lie: no single orientation is right for this model"
        raise ToolError(msg)


@app.command()
@_reports_errors
def trainers(
    path: Annotated[bool, typer.Option("--path", help="Print the folder and nothing else.")] = False,
) -> None:
    """List the trainers that this project adds to nnU-Net, and the folder that nnUNet_extTrainer must name."""
    from .added_trainers import added_trainers, external_folder

    folder = external_folder()
    if path:
        typer.echo(folder)
        return
    for name, what in added_trainers(folder).items():
        typer.echo(f"{name}  {what}")
    typer.echo(f"export nnUNet_extTrainer={shlex.quote(str(folder))}")


@app.command("shrink-plans")
@_reports_errors
def shrink_plans(
    plans: Annotated[Path, typer.Argument(metavar="PLANS.json", help="Of the dataset below nnUNet_preprocessed.")],
    name: Annotated[str, typer.Option(help="Of the new plans, which are written beside them.")],
    features: Annotated[float, typer.Option(help="Share of the features of each stage that is left.")] = 0.5,
) -> None:
    """Write plans for a lighter network, to be trained with nnUNetv2_train -p NAME on what is preprocessed already."""
    from .smaller_plans import write_smaller_plans

    written, changes = write_smaller_plans(plans, features, name)
    for change in changes:
        typer.echo(change.line())
    typer.echo(written)


@app.command(name="segments")
@_reports_errors
def segments_(
    model: Annotated[Path, typer.Argument(metavar="MODEL_FOLDER", help="A trained model's folder, or dataset.json.")],
) -> None:
    """Propose codes for a model's structures, as JSON for archive --segments; read it over before you use it."""
    from .segments import propose

    found = propose(model)
    typer.echo(found.as_json())
    for line in found.lines():
        _say(line)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def _folds(text: str | None) -> tuple[FoldName, ...] | None:
    if text is None:
        return None
    try:
        return tuple("all" if fold.strip() == "all" else int(fold) for fold in text.split(","))
    except ValueError as error:
        msg = f"--folds {text}: numbers separated by commas, or all, were expected"
        raise UsageError(msg) from error


def _device_ids(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        msg = f"--device-ids {text}: numbers separated by commas were expected"
        raise UsageError(msg) from error


if __name__ == "__main__":
    app()
