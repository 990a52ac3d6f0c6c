#!/usr/bin/env bash
# Writes requirements*.txt here: what the image is made of, each wheel with its sha256, in the versions of
# constraints.txt. Run it when that file or pyproject.toml has changed. Needs uv (`pip install uv`) and asks the package
# index that uv is set up for, of which it loads no wheel.
#
#     deploy/container/lock.sh
#
# Arguments are uv's. With `--torch-backend cpu` PyTorch comes from its own index of wheels without CUDA, some 3 GB
# smaller (not tried); the build then needs `--build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu`.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=deploy/container

# What PyTorch asks for and loads on a GPU only (compiled kernels, its linear algebra there): with VARIANT=cuda.
gpu_only=(cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cusolver nvidia-nvtx triton)
# No wheel is published of it, so the build makes one, from a checked archive.
sources=(acvl-utils)

compile() {
    uv pip compile --quiet --generate-hashes --no-annotate --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --custom-compile-command deploy/container/lock.sh "$@"
}

left_out=()
for package in "${gpu_only[@]}" "${sources[@]}"; do
    left_out+=(--no-emit-package "$package")
done
compile pyproject.toml --extra server --extra dicom --constraint constraints.txt "${left_out[@]}" "$@" \
    --output-file "$folder/requirements.txt"
printf '%s\n' "${gpu_only[@]}" |
    compile - --no-deps --constraint constraints.txt "$@" --output-file "$folder/requirements-cuda.txt"
printf '%s\n' "${sources[@]}" |
    compile - --no-deps --constraint constraints.txt --output-file "$folder/requirements-sources.txt"
printf '%s\n' hatchling==1.32.0 setuptools wheel |
    compile - --constraint constraints.txt --output-file "$folder/requirements-build.txt"
