"""Runs in .tools/lint: manifests (JSON lines) against Kubernetes' schemas, each schema read once.

kubernetes-validate's own command reads all of a version's definitions again for each manifest.

    python validate.py VERSION … < manifests
"""

from __future__ import annotations

import functools
import json
import sys

import kubernetes_validate
from kubernetes_validate import utils

utils.schema_contents = functools.cache(utils.schema_contents)


def main() -> int:
    """Write ``OK number`` or what is wrong, a line each."""
    manifests = [json.loads(line) for line in sys.stdin]
    for version in sys.argv[1:]:
        wrong = 0
        for manifest in manifests:
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except (utils.ValidationError, utils.SchemaNotFoundError) as error:
                wrong += 1
                name = f"{manifest['kind']} {manifest['metadata']['name']}"
                where = ".".join(str(part) for part in getattr(error, "path", []))
                sys.stdout.write(f"{version} {name} {where}: {error.message[:200]}\n")
        sys.stdout.write(f"OK {version} {len(manifests) - wrong}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
