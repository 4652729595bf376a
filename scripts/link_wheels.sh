#!/usr/bin/env bash
# Show uv the torch wheels that pip is already told about, by linking them into tests/wheels.
#
# uv reads neither pip's configuration nor PIP_FIND_LINKS, so on a machine whose pip knows a CPU build of torch it
# would still fetch the CUDA one. Where pip knows no such folder nothing is linked, and uv takes torch from its index.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

shopt -s nullglob
python="$(env_python)"
[[ -x $python ]] || python=python3
for folder in $("$python" -m pip config get global.find-links 2>/dev/null) ${PIP_FIND_LINKS:-}; do
    for wheel in "${folder#file://}"/torch-*.whl; do
        ln -sf "$wheel" "$root/tests/wheels/"
    done
done
