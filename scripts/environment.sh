# shellcheck shell=bash
# Sourced, not run: where this checkout is, which Python it uses, and how scripts speak.
# Sets `root` and defines `say`, `fail`, `env_prefix` and `env_python`. Expects bash with `set -euo pipefail`.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '%s\n' "$*" >&2; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# The environment in use: that of KVCACHE_PYTHON if it is set (then nothing is installed), the active one, or .venv at
# the root.
env_prefix() { printf '%s' "${VIRTUAL_ENV:-${CONDA_PREFIX:-$root/.venv}}"; }

env_python() { printf '%s' "${KVCACHE_PYTHON:-$(env_prefix)/bin/python}"; }
