#!/usr/bin/env bash
# Write configs/constraints.txt anew: today's newest releases with torch at the tested version.
# Needs `uv` on the path. TORCH=2.13.0 tools/pin.sh
set -euo pipefail
cd "$(dirname "$0")/.."
out=configs/constraints.txt
wanted=$(mktemp)
trap 'rm -f "$wanted"' EXIT
echo "torch==${TORCH:-2.13.0}" > "$wanted"
pins=$(uv pip compile -q pyproject.toml --all-extras --universal --python-version 3.10 \
    --no-header --no-annotate --constraint "$wanted")
{ head -n 2 "$out"; echo "$pins"; } > "$out.new"
mv "$out.new" "$out"
