"""The file format of a model archive: a zip with TorchServe's manifest, the same bytes for the same content."""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from pathlib import Path

from model_archiver.manifest_components.manifest import RuntimeType
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging_utils import ModelExportUtils

from .serving_settings import MODEL_CONFIG_FILE

MANIFEST_FILE = "MAR-INF/MANIFEST.json"

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""What TorchServe takes in a list of models and in a URL without escapes."""

VERSION = re.compile(r"[0-9]+(\.[0-9]+){0,3}")
"""What TorchServe can put in an order."""

_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_COPY_BYTES = 1024**2


def manifest(name: str, version: str, handler: str) -> str:
    """The manifest's text, without the time.

    Args:
        name: of the model.
        version: of the model.
        handler: the entry file's name.
    """
    config = ModelArchiverConfig(
        model_name=name,
        handler=handler,
        version=version,
        runtime=RuntimeType.PYTHON.value,
        config_file=MODEL_CONFIG_FILE,
    )
    content = json.loads(ModelExportUtils.generate_manifest_json(config))
    del content["createdOn"]
    return json.dumps(content, indent=2, sort_keys=True)


def write_zip(stage: Path, target: Path) -> None:
    """Write a folder as an archive: stored, sorted, with fixed times and modes; put in place in one step.

    Args:
        stage: what becomes the archive's root.
        target: the .mar file, new or to be replaced.
    """
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as unfinished:
        try:
            with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for file in sorted(f for f in stage.rglob("*") if f.is_file()):
                    entry = zipfile.ZipInfo(file.relative_to(stage).as_posix(), date_time=_ZIP_TIME)
                    entry.create_system, entry.external_attr = 3, 0o644 << 16
                    entry.file_size = file.stat().st_size
                    with file.open("rb") as source, archive.open(entry, "w") as sink:
                        while chunk := source.read(_COPY_BYTES):
                            sink.write(chunk)
            unfinished.close()
            Path(unfinished.name).chmod(0o644)
            Path(unfinished.name).replace(target)
        except BaseException:
            Path(unfinished.name).unlink(missing_ok=True)
            raise
