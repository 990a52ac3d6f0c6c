"""What a worker and an engine do from their start on, step by step; run by ``engine_memory.py``.

Imports nothing at the top that a bare interpreter has not loaded, because the steps' memory and time are measured.

``python fresh_process.py worker MODEL_DIR`` or ``python fresh_process.py engine MODEL_DIR STARTED`` prints a JSON
list of steps; ``STARTED`` is ``time.monotonic()`` when the process was started.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path


class Steps:
    """Steps done, each with its seconds and the process's USS in MiB after it."""

    def __init__(self, began: float) -> None:
        self.done: list[dict[str, object]] = []
        self._began = began

    def note(self, name: str) -> None:
        """A step ends here, and the next one begins."""
        seconds = time.monotonic() - self._began
        self.done.append({"step": name, "uss_mib": round(_uss() / 2**20, 1), "seconds": round(seconds, 4)})
        self._began = time.monotonic()


def _uss() -> int:
    fields = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return 1024 * sum(int(field[1]) for field in fields if field[0] in ("Private_Clean:", "Private_Dirty:"))


def worker(model_dir: Path) -> list[dict[str, object]]:
    """What a TorchServe worker does until it is READY."""
    steps = Steps(time.monotonic())
    steps.note("Python")
    import torch

    steps.note("torch")
    _import("ts.model_service_worker")
    steps.note("the rest of TorchServe's worker")
    _import("numpy", "nibabel", "isal.igzip", "pydantic", "safetensors.torch")
    steps.note("numpy, nibabel, isal, pydantic, safetensors")
    _import("nnunetv2.preprocessing.preprocessors.default_preprocessor")
    steps.note("nnunetv2: preprocessing, with scipy and scikit-image")
    _import("nnunetv2.inference.export_prediction")
    steps.note("nnunetv2: export")
    sys.path.insert(0, str(model_dir))
    _import("nnunet_torchserve.pipeline", "nnunet_torchserve.engine.remote")
    steps.note("the serving core, and what else it imports")

    from nnunet_torchserve.bundle import ModelBundle
    from nnunet_torchserve.engine.remote import RemoteEngine
    from nnunet_torchserve.limits import Limits
    from nnunet_torchserve.pipeline import Pipeline

    bundle, limits = ModelBundle(model_dir), Limits.from_settings({})
    pipeline = Pipeline(bundle, RemoteEngine(bundle, torch.device("cpu"), "auto", limits=limits), limits, 600.0)
    steps.note("the archive's description, and a connection to the engine")
    pipeline.dry_run()
    steps.note("the trial request that every worker makes")
    return steps.done


def engine(model_dir: Path, started: float) -> list[dict[str, object]]:
    """What an engine does until it says hello."""
    steps = Steps(started)
    steps.note("Python")
    import torch

    steps.note("torch")
    _import("nnunet_torchserve.bundle", "nnunet_torchserve.engine.golden")
    steps.note("the networks' modules, with nnunetv2's")
    _import(
        "nnunet_torchserve.engine.process", "nnunet_torchserve.engine.core", "nnunet_torchserve.engine.flight_record"
    )
    steps.note("the engine's other modules")
    from nnunet_torchserve.bundle import ModelBundle
    from nnunet_torchserve.engine.golden import check_golden, read_golden
    from nnunet_torchserve.engine.network import Networks

    bundle = ModelBundle(model_dir)
    steps.note("checksums")
    networks = Networks(bundle, torch.device("cpu"))
    steps.note("building the networks and loading their weights")
    check_golden(networks, read_golden(bundle))
    steps.note("golden patch")
    return steps.done


def _import(*names: str) -> None:
    import importlib

    for name in names:
        importlib.import_module(name)


def main() -> int:
    """See the module."""
    role, model_dir, *started = sys.argv[1:]
    done = engine(Path(model_dir), float(started[0])) if role == "engine" else worker(Path(model_dir))
    import json

    print(json.dumps(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
