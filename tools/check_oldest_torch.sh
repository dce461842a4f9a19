#!/usr/bin/env bash
# Run the suite on the oldest supported torch (the lower bound in pyproject.toml), in a virtual
# environment of its own. PYTHON=python3.10 VENV=.venv-oldest tools/check_oldest_torch.sh [pytest args]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-oldest}
oldest=$(sed -nE 's/.*"torch>=([0-9.]+)".*/\1/p' pyproject.toml)
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet "torch==$oldest.*" --editable '.[cpu,meta,dev]'
"$venv/bin/python" -c 'import sys, torch; print("torch", torch.__version__, "python", sys.version)'
exec "$venv/bin/python" -m pytest -q "$@"
