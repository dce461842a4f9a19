"""Rays of held frames: one random pixel in each chosen tile, with its true colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mclnf_edge.mapping.frames import TILE, HeldFrame

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
Targets = dict[int, tuple[I32, ...]]
"""Site -> (frame index, tile, learning row) of every tile that rays may be drawn from."""


class Rays(NamedTuple):
    """R rays in the local frame of one site: origins, unit directions and true colours (R, 3).

    `truth` is in [0, 1]; `use` (R,) is 0 where a pixel is masked.
    """

    origins: F32
    directions: F32
    truth: F32
    use: F32


def draw(frames: Sequence[HeldFrame], which: I32, tile: I32, random: np.random.Generator) -> Rays:
    """A random pixel in each tile `tile` (R,) of frame `which` (R,)."""
    sizes = np.array([f.size for f in frames])[which]
    across = sizes[:, 0] // TILE
    tw, th = sizes[:, 0] / across, sizes[:, 1] / (sizes[:, 1] // TILE)
    jitter = random.random((len(which), 2))
    column = np.minimum(((tile % across) + jitter[:, 0]) * tw, sizes[:, 0] - 1).astype(np.int64)
    line = np.minimum(((tile // across) + jitter[:, 1]) * th, sizes[:, 1] - 1).astype(np.int64)
    k = np.array([f.K for f in frames])[which]
    across_axis = (column + 0.5 - k[:, 2]) / k[:, 0]
    up_axis = -(line + 0.5 - k[:, 3]) / k[:, 1]
    v = np.stack([across_axis, up_axis, -np.ones(len(which))], axis=-1)
    v = np.einsum("rij,rj->ri", np.stack([f.rotation for f in frames])[which], v)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    truth, use = np.empty((len(which), 3), np.float32), np.empty(len(which), np.float32)
    for i in np.unique(which):
        here = which == i
        truth[here] = frames[i].image[line[here], column[here]]
        use[here] = frames[i].mask[line[here], column[here]] > 0
    ro = np.stack([f.eye for f in frames])[which]
    truth /= 255
    return Rays(
        np.ascontiguousarray(ro, np.float32), np.ascontiguousarray(v, np.float32), truth, use
    )


def choose_site(targets: Targets, random: np.random.Generator) -> int:
    """One site, as often as its share of the tiles."""
    sites = list(targets)
    if len(sites) == 1:
        return sites[0]
    share = np.array([len(targets[s][0]) for s in sites], np.float64)
    return int(random.choice(sites, p=share / share.sum()))
