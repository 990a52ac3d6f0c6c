"""What OpenVINO needs of a model, made when the archive is: a graph of each fold's network, beside its weights.

PyTorch traces the network, OpenVINO's frontend makes its graph of the trace. ``openvino.convert_model`` would do the
same and report it to an analytics service; ``openvino.save_model`` would round the weights to float16 if it were not
told.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from pathlib import Path

import torch

from nnunet_torchserve.backend import Backend, StoredBackend
from nnunet_torchserve.bundle import check_requirements
from nnunet_torchserve.engine.backends.eager import EagerNetworks
from nnunet_torchserve.engine.backends.openvino_library import openvino
from nnunet_torchserve.engine.backends.openvino_networks import graph_paths, reason_of
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.extras import how_to_install
from nnunet_torchserve.member import Member

from .errors import ToolError
from .quantisation import REQUIRES as QUANTISER
from .quantisation import check_installed

REQUIRES = {"openvino": ">=2026.4,<2027"}
COMPILED_REQUIRES = {"torch": ">=2.11"}
"""It makes nothing ahead; a report of it is of one version's answers."""


def stored_backend(backend: Backend) -> StoredBackend:
    """What an archive says of a backend that is made for it.

    Raises:
        ToolError: this machine cannot make it.
    """
    requires, extra = (COMPILED_REQUIRES, "server") if backend is Backend.COMPILED else (REQUIRES, "openvino")
    try:
        check_requirements(requires, f"--backend {backend}")
    except BundleError as error:
        msg = f"{error}; {how_to_install(extra)}"
        raise ToolError(msg) from error
    made_with = list(requires)
    if backend is Backend.OPENVINO_INT8:
        check_installed()
        made_with += QUANTISER
    return StoredBackend(
        backend=backend, requires=requires, made_with={name: importlib.metadata.version(name) for name in made_with}
    )


def write_graphs(member: Member, networks: EagerNetworks) -> None:
    """Write the graph of every fold into the member's folder.

    The batch is left open: it is set where the graph is compiled.

    Args:
        member: of the archive.
        networks: its own, loaded, on the CPU.

    Raises:
        ToolError: OpenVINO is not there, or cannot make a graph of this network.
    """
    try:
        library = openvino()
    except BundleError as error:
        raise ToolError(str(error)) from error
    patch = torch.zeros((1, networks.input_channels, *networks.patch_size))
    for fold, network in zip(networks.folds, networks.modules, strict=True):
        try:
            _write(library, network, patch, graph_paths(member.folder, fold)[0])
        except Exception as error:  # somebody's own network may raise anything when it is traced
            msg = f"OpenVINO can make no graph of the network of {member.name}, fold {fold}: {reason_of(error)}"
            raise ToolError(msg) from error


@torch.inference_mode()
def _write(library: object, network: torch.nn.Module, patch: torch.Tensor, file: Path) -> None:
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated, and what a trace does not see
        traced = TorchScriptPythonDecoder(network, example_input=patch, trace_kwargs={"check_trace": False})
    frontend = FrontEndManager().load_by_framework("pytorch")
    graph = frontend.convert(frontend.load(traced))
    # names that they get by themselves have numbers that count whatever this process has made before
    graph.set_friendly_name("network")
    for number, operation in enumerate(graph.get_ordered_ops()):
        operation.set_friendly_name(f"{operation.get_type_name()}_{number}")
    library.save_model(graph, file, compress_to_fp16=False)  # type: ignore[attr-defined]
