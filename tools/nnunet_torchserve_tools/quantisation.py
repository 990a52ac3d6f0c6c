"""A graph of float32 becomes one of int8: NNCF measures the ranges of all activations on patches, without training.

The only module that needs NNCF: a server does not. What NNCF would report to an analytics service goes nowhere, because
OpenVINO's telemetry is kept from being imported. It draws bars on the standard output, which is not its to draw on, and
makes its own kind of logger everybody's: both are kept from it.
"""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_torchserve.bundle import check_requirements
from nnunet_torchserve.engine.backends.openvino_library import openvino, silence
from nnunet_torchserve.engine.backends.openvino_networks import reason_of
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.extras import how_to_install

from .errors import ToolError

REQUIRES = {"nncf": ">=3.4,<4"}

_NEW = "quantised"


def check_installed() -> None:
    """Raise :class:`ToolError` where there is no NNCF, or another version."""
    try:
        check_requirements(REQUIRES, "making int8")
    except BundleError as error:
        msg = f"{error}; {how_to_install('quantize')}"
        raise ToolError(msg) from error


def quantise(files: tuple[Path, Path], patches: npt.NDArray[np.float32]) -> None:
    """Put a graph of int8 in the place of one of float32.

    Weights are symmetric around 0, activations need not be (NNCF's mixed preset). NNCF leaves layers in float32 that
    it cannot quantise.

    Args:
        files: the graph and its weights.
        patches: (N, 1, C, *patch): what the ranges of activations are measured on, one after another.

    Raises:
        ToolError: NNCF fails.
    """
    library, nncf = openvino(), _nncf()
    graph = library.Core().read_model(*files)
    graph.reshape([-1, *patches.shape[2:]])
    try:
        with _quiet():
            quantised = nncf.quantize(
                graph,
                nncf.Dataset(list(patches)),
                preset=nncf.QuantizationPreset.MIXED,
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(patches),
            )
    except Exception as error:  # whatever it does not like of somebody's network
        msg = f"NNCF can make no int8 of {files[0].name}: {reason_of(error)}"
        raise ToolError(msg) from error
    _name_anew(quantised)
    new = files[0].with_name(f"{_NEW}.xml"), files[1].with_name(f"{_NEW}.bin")
    library.save_model(quantised, new[0], compress_to_fp16=False)
    del graph, quantised  # they may hold the old files' memory
    for written, file in zip(new, files, strict=True):
        written.replace(file)


def _name_anew(graph: Any) -> None:
    """Names that libraries give by themselves have numbers that count whatever this process has made before."""
    graph.set_friendly_name("network")
    for number, operation in enumerate(graph.get_ordered_ops()):
        operation.set_friendly_name(f"{operation.get_type_name()}_{number}")


def _nncf() -> ModuleType:
    silence()
    loggers = logging.getLoggerClass()
    try:
        with _quiet():
            library = importlib.import_module("nncf")
    finally:
        logging.setLoggerClass(loggers)
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return library


@contextmanager
def _quiet() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # PyTorch's compilers, which NNCF imports, miss a GPU
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
