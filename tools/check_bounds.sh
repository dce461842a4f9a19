#!/usr/bin/env bash
# Run tests with every array index of the compiled kernels checked, but for those of SIMD loads:
# tools/check_bounds.sh [pytest args]. Kernels are compiled anew, into a cache of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
NUMBA_CACHE_DIR=$(mktemp -d)
trap 'rm -rf "$NUMBA_CACHE_DIR"' EXIT
export NUMBA_CACHE_DIR NUMBA_BOUNDSCHECK=1
[ $# -gt 0 ] || set -- tests/engine tests/mapping tests/inference tests/maths
"${PYTHON:-.venv/bin/python}" -m pytest -q "$@"
