#!/usr/bin/env bash
# Make the development environment, or bring it up to date. Safe to run any number of times.
#
# Uses the active virtual or conda environment, else makes .venv at the root. PYTHON names the interpreter to make it
# with. Nothing is installed when the requirements have not changed since the last time, or when KVCACHE_PYTHON names
# the Python of an environment that somebody else looks after.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed; tried ${PYTHON:-python3, python3.13, python3.12, python3.11}." \
        "Install one, or name one: PYTHON=/path/to/python3.11 scripts/setup.sh"
}

make_environment() {
    local python
    python="$(find_python)"
    say "Making $root/.venv with $("$python" --version)"
    "$python" -m venv "$root/.venv" || {
        rm -rf "$root/.venv"
        fail "$python cannot make a virtual environment; on Debian and Ubuntu install python3-venv"
    }
}

# What the installed environment depends on: the metadata, which stands above the settings of the tools, and the
# checkout that an editable install points at.
fingerprint() { (printf '%s\n' "$root" && sed '/^\[tool:pytest\]/q' setup.cfg && cat pyproject.toml) | cksum; }

is_current() {
    [[ -f $stamp && "$(<"$stamp")" == "$(fingerprint)" ]] &&
        "$python" -c 'import importlib.metadata as m; m.version("kvcache")' 2>/dev/null
}

install() {
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null ||
        fail "$python has no pip, and ensurepip cannot give it one"
    # A torch that is already there, or that pip's own settings point at (a CPU wheel), is kept: an unbounded
    # requirement would fetch the newest build, gigabytes of CUDA libraries included.
    if ! "$python" -c 'import torch' 2>/dev/null; then
        say "Installing torch"
        "$python" -m pip install --no-input 'torch>=2.6,<2.14' || fail "pip could not install torch; see its message above"
    fi
    say "Installing kvcache and its development tools"
    "$python" -m pip install --no-input -e "${root}[gateway,otel,test,dev]" || fail "pip could not install kvcache; see its message above"
    # Where there is no GPU, models run several times faster on OpenVINO; without it they still run, on torch.
    if "$python" -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then
        say "Installing OpenVINO"
        "$python" -m pip install --no-input -e "${root}[openvino]" ||
            say "pip could not install OpenVINO, see its message above; models will run on torch"
    fi
}

# The dashboard's tests want a browser; without one they are skipped, so nothing here may fail the setup. Installed
# only by root, as in continuous integration, and only where apt has the small one.
install_browser() {
    local name apt=(apt-get -q -o Acquire::http::Timeout=20 -o Acquire::Retries=1 -o DPkg::Lock::Timeout=60)
    [[ -z ${KVCACHE_BROWSER:-} ]] || return 0
    for name in chromium-headless-shell chromium chromium-browser google-chrome chrome; do
        ! command -v "$name" >/dev/null || return 0
    done
    if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
        say "No Chromium is here; the dashboard's browser tests will be skipped"
        return 0
    fi
    say "Installing a browser for the dashboard's tests"
    export DEBIAN_FRONTEND=noninteractive
    if ! { timeout 60 "${apt[@]}" update &&
        timeout 150 "${apt[@]}" install -y --no-install-recommends chromium-headless-shell; } >&2; then
        say "apt could not install chromium-headless-shell, see its message above; the browser tests will be skipped"
    fi
}

(($# == 0)) || fail "setup.sh takes no arguments, only variables: PYTHON, and KVCACHE_PYTHON where nothing is to be installed"
[[ -z ${KVCACHE_PYTHON:-} ]] || exit 0
[[ -n ${VIRTUAL_ENV:-${CONDA_PREFIX:-}} || -x $root/.venv/bin/python ]] || make_environment
python="$(env_python)"
stamp="$(env_prefix)/.kvcache-installed"
[[ -x $python ]] || fail "$(env_prefix) is active but has no bin/python; deactivate it, or activate a working one"
is_new_enough "$python" || fail "$("$python" --version) in $(env_prefix) is too old; Python 3.11 or newer is needed"
scripts/link_wheels.sh
if ! is_current; then
    install
    install_browser
    fingerprint >"$stamp"
    say "The environment $(env_prefix) is ready"
fi
