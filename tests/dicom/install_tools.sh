#!/usr/bin/env bash
# OHIF's reader of segmentations, with which long tests of tests/dicom read ours, into .tools/ohif, which git ignores
# (100 MB). npm fetches the versions of package-lock.json and compares their hashes; no package's own script runs. Nothing
# is done where they are there already. Without them those tests are skipped, and say so.
set -euo pipefail
cd "$(dirname "$0")/../.."
list=tests/dicom/ohif/package-lock.json
if cmp -s "$list" .tools/ohif/ready; then
    exit
fi
major=$(node --version 2>/dev/null | sed -n 's/^v\([0-9][0-9]*\)\..*/\1/p') || true
if ! command -v npm >/dev/null || [ "${major:-0}" -lt 20 ]; then
    echo "npm with node 20 or later is not installed (a distribution's own packages may be older)" >&2
    exit 1
fi
rm -rf .tools/ohif
mkdir -p .tools/ohif
cp tests/dicom/ohif/package.json "$list" .tools/ohif
if ! said=$(cd .tools/ohif && npm ci --ignore-scripts --no-audit --no-fund 2>&1); then
    printf '%s\n' "$said" >&2
    exit 1
fi
cp "$list" .tools/ohif/ready
