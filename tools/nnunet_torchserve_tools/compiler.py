"""Whether ``torch.compile`` finds a compiler on this machine: asked before a server starts, without loading PyTorch.

Without one each engine finds out for itself when it loads, long after somebody could have done something about it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

_VARIABLE, _DEFAULT = "CXX", "g++"
"""As PyTorch has them: ``torch._inductor.config.cpp.cxx``."""


def why_not_compiled() -> str | None:
    """What ``torch.compile`` lacks here, and what to do; ``None`` if it has a C++ compiler."""
    named = os.environ.get(_VARIABLE, _DEFAULT)
    try:
        program = (shlex.split(named) or [""])[0]
    except ValueError:  # a quotation without end
        program = named
    search = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]  # as workers have it
    if shutil.which(program, path=os.pathsep.join(search)):
        return None
    return (
        f"there is no C++ compiler {program!r} on this machine, which torch.compile runs; install one (on Debian "
        f"'apt-get install g++'), or name yours in {_VARIABLE}"
    )
