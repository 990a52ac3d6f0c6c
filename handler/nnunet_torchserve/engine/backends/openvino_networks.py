"""OpenVINO on the CPU: each fold is a graph that was made when the archive was, compiled here for this machine.

The graph's weights are float32, or whole numbers of 8 bits where it was made for int8. In which precision it is
computed is asked for when it is compiled, and read back from what was compiled: OpenVINO takes another one where it
thinks that better, or where the processor lacks the asked one. For bfloat16 the reading proves too little. Every
processor with AVX-512 is granted it, and one without instructions for it imitates it: slowly, and rounded otherwise. So
the processor is asked as well. It is for int8 too: without VNNI, products of 8 bits are summed in 16, which overflow.

Of a graph for int8 not all is: NNCF leaves layers in float32 whose ranges it cannot know, and OpenVINO may leave more.
Most of the layers that take the time must be int8, and the others float32; how many are, networks say.

A graph is compiled for one size of a batch, and a smaller batch is filled up: like that an answer does not depend on
who else is served. Its threads are OpenVINO's own, as many as PyTorch's. They are not pinned to processors: two engines
would pin theirs to the same ones.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

from ...backend import Backend
from ...errors import BundleError
from ...layer_precisions import INT8_NAMES, whole_layers
from ...machine import processor_flags
from ...member import Member
from ...options import FoldName
from .interface import Weights
from .openvino_library import openvino

_HINTS = {Backend.OPENVINO_FLOAT32: "f32", Backend.OPENVINO_BFLOAT16: "bf16", Backend.OPENVINO_INT8: "f32"}
"""Backend -> OpenVINO's name of the precision that is asked for, and has to be found in all layers; for int8, in those
that are not int8."""

_CAPABILITIES = {Backend.OPENVINO_BFLOAT16: "BF16", Backend.OPENVINO_INT8: "INT8"}
"""Backend -> what OpenVINO must count among the processor's own abilities (``OPTIMIZATION_CAPABILITIES``)."""

_X86 = frozenset({"x86_64", "AMD64"})
_FLAGS = {Backend.OPENVINO_INT8: frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})}
"""Backend -> instructions of which a processor must have one, beside that; OpenVINO has no name for them. It has run on
x86 only, and others are refused."""

_WANTS = {
    Backend.OPENVINO_BFLOAT16: "; it takes AVX512-BF16, AMX or AVX2-VNNI-2",
    Backend.OPENVINO_INT8: "; it takes AVX512-VNNI, AVX-VNNI or AMX",
}
"""What a processor needs for it."""

_COMPUTING = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
"""Kinds of layers that take the time; the precision of the others follows from theirs."""

_PLACES = ("Exception from", "Check '", "FrontEnd API failed", "Model wasn't fully converted")
_LONGEST_REASON = 500

_NO_MEMORY = ("bad_alloc", "bad allocation", "allocate memory")


@dataclass(frozen=True, slots=True)
class Graph:
    """A fold's graph: OpenVINO's intermediate representation."""

    xml: bytes
    weights: bytes


class OpenVinoNetworks:
    """The graphs of every fold of a member; a :class:`~.interface.FoldNetworks`."""

    def __init__(self, member: Member, backend: Backend, batch: int) -> None:
        """Compile all folds.

        Args:
            member: whose folder has the graphs; their checksums have been compared.
            backend: which precision.
            batch: patches in one forward pass.

        Raises:
            BundleError: OpenVINO is not there, does not take a graph, or computes in another precision; or the
                processor would only imitate the precision.
        """
        self.device = torch.device("cpu")
        self.backend = backend
        self.patch_size = member.patch_size
        self.classes = member.classes
        self.input_channels = int(determine_num_input_channels(member.plans, member.configuration, member.dataset))
        self._batch = batch
        self._files: dict[FoldName, tuple[str, str]] = {}
        self._inside = member.description.folder
        for fold in member.description.folds:
            self._files[fold.fold] = graph_files(fold.fold)
        self._core = openvino().Core()
        _check_processor(self._core, backend)
        self._requests: dict[FoldName, Any] = {}
        self._layers: dict[FoldName, Counter[str]] = {}
        for name, files in self._files.items():
            self._requests[name] = self._compiled(name, _read_graph(member, files))

    @property
    def folds(self) -> tuple[FoldName, ...]:
        """The folds that it has."""
        return tuple(self._files)

    @property
    def precisions(self) -> Mapping[str, int]:
        """OpenVINO's name of a precision -> how many of all folds' convolutions and matrix products run in it."""
        return sum(self._layers.values(), Counter())

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the archive that :meth:`load` reads."""
        return tuple(f"{self._inside}/{name}" for names in self._files.values() for name in names)

    @property
    def modules(self) -> Collection[torch.nn.Module]:
        """None: they are not PyTorch's."""
        return ()

    @property
    def loaded(self) -> bool:
        """Whether the graphs are compiled; without that no pass may be made."""
        return len(self._requests) == len(self._files)

    def unload(self) -> None:
        """Give the memory up."""
        self._requests = {}

    def load(self, weights: Weights) -> None:
        """Compile the graphs again; if that fails, none is there."""
        requests = {}
        for fold, names in self._files.items():
            xml, content = (weights.content(f"{self._inside}/{name}") for name in names)
            requests[fold] = self._compiled(fold, Graph(xml, content))
        self._requests = requests

    def forward(self, fold: FoldName, patches: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of patches, float32; see :meth:`~.interface.FoldNetworks.forward`."""
        asked = patches.numpy()
        parts = [self._infer(fold, asked[first : first + self._batch]) for first in range(0, len(asked), self._batch)]
        return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def _infer(self, fold: FoldName, patches: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The logits of at most as many patches as the graph takes."""
        missing = self._batch - len(patches)
        if missing:
            patches = np.concatenate([patches, np.repeat(patches[-1:], missing, axis=0)])
        try:
            found = self._requests[fold].infer({0: np.ascontiguousarray(patches)}, share_inputs=True)
        except RuntimeError as error:
            raise _explained(error) from error
        logits: npt.NDArray[np.float32] = found[0]
        return logits[: self._batch - missing]

    def _compiled(self, fold: FoldName, graph: Graph) -> Any:
        """What a graph is run by.

        Raises:
            BundleError: OpenVINO does not take it, or computes in another precision.
            MemoryError: there is no memory for it.
        """
        try:
            model = self._core.read_model(model=graph.xml, weights=graph.weights)
            model.reshape([self._batch, self.input_channels, *self.patch_size])
            compiled = self._core.compile_model(model, "CPU", settings_of(self.backend, torch.get_num_threads()))
            layers = self._layers[fold] = layer_precisions(compiled)
            request = compiled.create_infer_request()
        except RuntimeError as error:
            explained = _explained(error)
            if explained is not error:
                raise explained from error
            msg = f"OpenVINO cannot compile the graph of fold {fold}: {reason_of(error)}"
            raise BundleError(msg) from error
        runs_in, asked = set(layers), {_HINTS[self.backend]}
        if runs_in != asked and not (self.backend is Backend.OPENVINO_INT8 and runs_in <= asked | INT8_NAMES):
            msg = f"OpenVINO computes fold {fold} in {', '.join(sorted(runs_in))} and not as {self.backend} on this CPU"
            raise BundleError(msg + _WANTS.get(self.backend, ""))
        if self.backend is Backend.OPENVINO_INT8:
            _check_most_are_whole(fold, layers)
        return request


def settings_of(backend: Backend, threads: int) -> dict[str, Any]:
    """How OpenVINO compiles a graph for a backend."""
    return {
        "INFERENCE_PRECISION_HINT": _HINTS[backend],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }


def _check_most_are_whole(fold: FoldName, precisions: Mapping[str, int]) -> None:
    whole, layers = whole_layers(precisions)
    if 2 * whole <= layers:
        msg = f"OpenVINO computes only {whole} of the {layers} convolutions and matrix products of fold {fold} in int8"
        raise BundleError(msg)


def _check_processor(core: Any, backend: Backend) -> None:
    """Raise :class:`BundleError` where the processor lacks the instructions of a backend's precision."""
    wanted = _CAPABILITIES.get(backend)
    if wanted is not None and wanted not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        msg = f"this CPU has no instructions for {backend}, which OpenVINO would imitate or run in another precision"
        raise BundleError(msg + _WANTS.get(backend, ""))
    flags = _FLAGS.get(backend)
    if flags is not None and not (platform.machine() in _X86 and flags & processor_flags()):
        msg = f"this CPU has no instructions for {backend}: sums of its products would overflow"
        raise BundleError(msg + _WANTS.get(backend, ""))


def _read_graph(member: Member, files: tuple[str, str]) -> Graph:
    try:
        xml, weights = ((member.folder / name).read_bytes() for name in files)
    except OSError as error:
        msg = f"the graph {files[0]} of {member.name} cannot be read"
        raise BundleError(msg) from error
    return Graph(xml, weights)


def graph_files(fold: FoldName) -> tuple[str, str]:
    """Where a member's folder has the graph of a fold, and its weights."""
    return f"fold_{fold}.openvino.xml", f"fold_{fold}.openvino.bin"


def graph_paths(folder: Path, fold: FoldName) -> tuple[Path, Path]:
    """The same as paths."""
    xml, weights = graph_files(fold)
    return folder / xml, folder / weights


def layer_precisions(compiled: Any) -> Counter[str]:
    """OpenVINO's name of a precision -> how many of a compiled model's convolutions and matrix products run in it."""
    found: Counter[str] = Counter()
    for layer in compiled.get_runtime_model().get_ops():
        information = layer.get_rt_info()
        if information["layerType"].value in _COMPUTING:
            found[str(information["runtimePrecision"].value)] += 1
    return found


def _explained(error: RuntimeError) -> Exception:
    """OpenVINO's error as Python's own, where it means the memory."""
    if any(sign in str(error) for sign in _NO_MEMORY):
        return MemoryError(reason_of(error))
    return error


def reason_of(error: BaseException) -> str:
    """The line that says why; OpenVINO's messages begin with where in its source they were raised, or with advice."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(_PLACES)]
    return (told or lines or [type(error).__name__])[0][:_LONGEST_REASON]
