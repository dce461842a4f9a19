"""A small scene of modules, in the kernels' arrays and as the float64 definition sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mclnf_edge.engine import volume
from mclnf_edge.engine.field import B1, B2, B3, HIDDEN, INPUTS, OUTPUTS, W2, W3, Layout, random_mlp
from mclnf_edge.mapping.modules import Cell, ModulePool, Workspace
from mclnf_edge.maths.fields import Params
from mclnf_edge.maths.radiance import Placed

CELL_M = 10.0
LAYOUT = Layout.of(fine=32, vertical=8, voxels=12)
INNER: tuple[Cell, ...] = ((0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1))
OUTER: Cell = (1, 0, 0)
SAMPLES, STEPS = 8, 32
REACH = np.float32(200.0)


def make_pool(threads: int = 1, cells: tuple[Cell, ...] = (*INNER, OUTER)) -> ModulePool:
    """Modules with random parameters, each its own height band and hilly surface, in an order that
    is not that of their making.
    """
    random = np.random.default_rng(5)
    pool = ModulePool(LAYOUT, CELL_M, random_mlp(3), threads)
    for cell in cells:
        low = float(random.uniform(-3, -2))
        module = pool.spawn(cell, low, low + float(random.uniform(5, 6)))
        s = module.slot
        pool.features[s] = random.normal(0, 0.7, LAYOUT.features)
        pool.weights[s] = random_mlp(int(random.integers(1000))) * 1.3
        pool.surface[s] += random.normal(0, 0.3, pool.surface[s].shape)
        pool.density[s] = random.uniform(0, 0.4, pool.voxels)
        pool.seen[s] = random.integers(0, 2, pool.seen[s].shape)
    for cell, rank in zip(cells, (30, 2, 11, 7, 5), strict=False):
        pool.set_rank(cell, rank)
    for row in pool.owner[pool.owner >= 0]:
        pool.refresh_transposed(np.array([row]))
    return pool


def rays(n: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Origins above the inner cells, directions down to them and past them, height bands."""
    random = np.random.default_rng(seed)
    ro = random.uniform((3, 3, 12), (17, 17, 15), (n, 3)).astype(np.float32)
    aim = random.uniform((1, 1, -2), (26, 26, -1), (n, 3))
    rd = aim - ro
    rd = (rd / np.linalg.norm(rd, axis=1, keepdims=True)).astype(np.float32)
    return ro, rd, np.tile(np.array([[-3, 4]], np.float32), (n, 1))


def forward(
    pool: ModulePool, ro: Any, rd: Any, bands: Any, *, uniform: float = 0.05, jitter: bool = True
) -> tuple[volume.Scene, volume.Tape]:
    """The forward kernel on all rays, in one thread."""
    work, scene = Workspace(len(ro), SAMPLES), pool.scene()
    volume.forward(
        scene, work.tape, ro, rd, bands, 0, len(ro), SAMPLES, STEPS, np.float32(uniform), 7,
        jitter, REACH, 0,
    )  # fmt: skip
    return scene, work.tape


def backward(
    pool: ModulePool, scene: volume.Scene, tape: volume.Tape, d_rgb: Any, a: int, b: int,
    i: int = 0, most: float = volume.ALL, seed: int = 0,
) -> int:  # fmt: skip
    """The backward kernel on rays a..b into thread i's arrays; the number of texels queued."""
    return int(
        volume.backward(
            scene, tape, pool.transposed.reshape(-1), d_rgb, a, b, SAMPLES, np.float32(most), seed,
            pool.gradient[i].reshape(-1), pool.weight_gradient[i].reshape(-1),
            pool.touched[i], pool.queue[i],
        )
    )  # fmt: skip


def split(features: Any, weights: Any) -> Params:
    """One module's flat arrays as float64 parameters of the definition."""
    f, w = torch.tensor(features).double(), torch.tensor(weights).double()
    params = {}
    for i, (_, _, nu, nv, offset) in enumerate(LAYOUT.planes):
        params[f"plane.{i}"] = f[offset : offset + nu * nv * 4].reshape(nv, nu, 4)
    params["0.w"], params["0.b"] = w[:B1].reshape(INPUTS, HIDDEN), w[B1:W2]
    params["1.w"], params["1.b"] = w[W2:B2].reshape(HIDDEN, HIDDEN), w[B2:W3]
    params["2.w"], params["2.b"] = w[W3:B3].reshape(HIDDEN, OUTPUTS), w[B3:]
    return params


def join(params: Params) -> tuple[Any, Any]:
    """(features, weights) as flat arrays: the inverse of `split`."""
    planes = [params[f"plane.{i}"] for i in range(len(LAYOUT.planes))]
    layers = [params[f"{j}.{part}"] for j in range(3) for part in ("w", "b")]
    return (
        torch.cat([p.flatten() for p in planes]).numpy(),
        torch.cat([p.flatten() for p in layers]).numpy(),
    )


def definition(pool: ModulePool) -> dict[Cell, Placed]:
    """The pool's modules in float64."""
    out = {}
    for cell, s in pool.slot_of.items():
        x, y, edge = pool.bounds(cell)
        low, inverse = (float(v) for v in pool.band[s])
        out[cell] = Placed(
            split(pool.features[s], pool.weights[s]), cell[0] % 2 == 1, x, y, edge, low,
            1 / inverse, torch.tensor(pool.surface[s]).double(), torch.tensor(pool.seen[s]),
            pool.rank_of[cell],
        )  # fmt: skip
    return out
