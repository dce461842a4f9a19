#!/usr/bin/env bash
# Prove that every dependency resolves for 64-bit ARM Linux (glibc 2.34, as JetPack 6 has and newer)
# from wheels alone, without such a board:
# the client, the daemon and the CPU daemon, for Python 3.10 (JetPack 6) and newer.
# Needs `uv` on the path. Nothing is installed; prints what would be.
set -euo pipefail
cd "$(dirname "$0")/.."
platform=aarch64-manylinux_2_34
for python in ${PYTHONS:-3.10 3.12}; do
    for extra in "" --extra=daemon --extra=cpu --extra=meta; do
        pins=$(uv pip compile -q pyproject.toml ${extra:+"$extra"} --python-version "$python" \
            --python-platform "$platform" --only-binary=:all: --no-header --no-annotate \
            --constraint configs/constraints.txt)
        if grep -q '^onnxruntime-gpu' <<< "$pins"; then
            echo "onnxruntime-gpu has no wheel for aarch64, but was chosen" >&2
            exit 1
        fi
        echo "$platform python $python ${extra:-client}: $(wc -l <<< "$pins") packages from wheels"
        grep -E '^(torch|onnxruntime|numba|opencv-python-headless|pyzmq)==' <<< "$pins"
    done
done
