"""Geometry that benchmarks measure against: sparse points, exact depth, who has seen what.

Used for measuring only; a daemon never gets any of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mclnf_edge.errors import CaptureError
from mclnf_edge.types import Frame
from tools.bench_unknown import F64, project, views_of

Depth = npt.NDArray[np.float32]
"""(H, W) z-depth in metres, NaN unknown."""

_PLY = {"float": "<f4", "double": "<f8", "uchar": "u1", "int": "<i4", "uint": "<u4"}


def read_ply(path: Path) -> F64:
    """(n, 3) positions of a binary little-endian PLY file's vertices; CaptureError for others."""
    head, mark, body = path.read_bytes().partition(b"end_header\n")
    words = [line.split() for line in head.decode("ascii", "replace").splitlines()]
    if not mark or ["format", "binary_little_endian", "1.0"] not in words:
        raise CaptureError(f"{path}: expected a binary little-endian PLY file")
    count = next(int(w[2]) for w in words if w[:2] == ["element", "vertex"])
    columns = np.dtype([(w[2], _PLY[w[1]]) for w in words if w[0] == "property"])
    table = np.frombuffer(body, columns, count)
    return np.stack([table[axis].astype(np.float64) for axis in "xyz"], axis=1)


def sparse_errors(frame: Frame, depth: Depth, at: F64) -> npt.NDArray[np.float64]:
    """|map - point| in metres of z-depth at the world points (n, 3) inside a frame's picture.

    Only where the map knows a depth. A point that something hides counts too, as no list says who
    saw it: read the median.
    """
    h, w = depth.shape
    u, v, z = project(frame, at, (w, h))
    inside = (z > 0) & (u >= 0) & (v >= 0) & (u < w) & (v < h)
    shown = depth[v[inside].astype(int), u[inside].astype(int)]
    errors = np.abs(shown - z[inside])
    kept: npt.NDArray[np.float64] = errors[np.isfinite(errors)]
    return kept


def seen_by(at: F64, frame: Frame, depth: Depth) -> npt.NDArray[np.bool_]:
    """Whether a frame whose own surface is `depth` sees each world point (n, 3)."""
    seen: npt.NDArray[np.bool_] = views_of(at, [frame], [depth]) > 0
    return seen


def surface_model(at: F64, corner: F64, cell_m: float, size: tuple[int, int]) -> F64:
    """(rows, columns) highest z of the points (n, 3) in each cell of a raster, NaN for none."""
    out = np.full(size, -np.inf)
    with np.errstate(invalid="ignore"):
        index = np.floor((at[:, :2] - corner) / cell_m)
        good = np.isfinite(at).all(1) & (index >= 0).all(1) & (index < size[::-1]).all(1)
    column, row = index[good].astype(int).T
    np.maximum.at(out, (row, column), at[good, 2])
    return np.where(np.isfinite(out), out, np.nan)


def surface_error(exact: F64, shown: F64, cell_m: float) -> dict[str, Any]:
    """How a map's surface model differs from the exact one, both as points (n, 3) of equal views.

    `rmse_m` and `median_m` over the raster cells of `cell_m` that both have, and their share of
    the exact one's.
    """
    sure = exact[np.isfinite(exact).all(1)]
    corner = np.floor(sure[:, :2].min(0))
    across, down = np.ceil((sure[:, :2].max(0) - corner) / cell_m).astype(int) + 1
    truth = surface_model(sure, corner, cell_m, (int(down), int(across)))
    model = surface_model(shown, corner, cell_m, (int(down), int(across)))
    gap = (model - truth)[np.isfinite(truth) & np.isfinite(model)]
    return {
        "cell_m": cell_m,
        "rmse_m": float(np.sqrt(np.mean(gap**2))) if len(gap) else None,
        "median_m": float(np.median(np.abs(gap))) if len(gap) else None,
        "covered": float(len(gap) / np.isfinite(truth).sum()),
    }
