"""A stand-in for ``nvidia-smi``, for machines without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

_SCRIPT = """#!/bin/sh
# What the launcher asks, then TorchServe's front end at its start, and when it describes a worker.
gpus="{gpus}"
case "$*" in
    -L)
        for gpu in $gpus; do echo "GPU $gpu: Stand-in (UUID: GPU-stand-in-$gpu)"; done ;;
    "--query-gpu=index --format=csv")
        echo index
        for gpu in $gpus; do echo "$gpu"; done ;;
    "-i "*" --query-gpu=utilization.gpu,utilization.memory,memory.used --format=csv")
        echo "utilization.gpu [%], utilization.memory [%], memory.used [MiB]"
        echo "0 %, 0 %, 1 MiB" ;;
    *)
        echo "not known to the stand-in: $*" >&2
        exit 1 ;;
esac
"""


def search_path(folder: Path, gpus: int) -> str:
    """A value of PATH with a stand-in for so many GPUs in front, which is written to ``folder``."""
    script = folder / "nvidia-smi"
    script.write_text(_SCRIPT.format(gpus=" ".join(map(str, range(gpus)))))
    script.chmod(0o755)
    return os.pathsep.join([str(folder), os.environ["PATH"]])
