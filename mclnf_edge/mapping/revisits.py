"""Closed modules and what comes later: exposures follow them, new versions must match them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mclnf_edge.mapping.frames import HeldFrame
from mclnf_edge.mapping.modules import Cell, Module, ModulePool, unpack_information
from mclnf_edge.mapping.rays import draw
from mclnf_edge.mapping.structure import Pause, Structure
from mclnf_edge.types import ModuleSnapshot

F32 = npt.NDArray[np.float32]
Show = Callable[[int, F32, F32], F32]
"""(site, origins, directions) -> colours (n, 3) at exposure 0."""

PROBES = 1024
"""Single pixels with their rays that a committed module is judged by later."""
LOSS_DB = 0.05
"""A later version may show its parent's probes this much worse, and no more."""

_SHARES = (1.0, 0.5, 0.25, 0.0)
"""Of what a new version changed of its parent's texels, tried one after the other."""
_VIEWS = 4
_SHARE = 0.25
_GUARD = 64.0
_ANCHOR_RAYS = 512
_ANCHOR_TILES = 8


def fresh_frames(module: Module, frames: Sequence[HeldFrame]) -> list[HeldFrame]:
    """The frames that a closed module is learned again with; empty while they are too few.

    Enough are four views that bring a quarter of the tiles the module was made of.
    """
    fresh = [f for f in frames if module.cell in f.tiles and f.id not in module.frames]
    tiles = sum(len(f.tiles[module.cell]) for f in fresh)
    enough = len(fresh) >= _VIEWS and tiles >= _SHARE * max(module.tiles, 1)
    return fresh if enough and module.state == "closed" else []


def reopen(
    pool: ModulePool,
    structure: Structure,
    module: Module,
    fresh: list[HeldFrame],
    parent: ModuleSnapshot,
) -> None:
    """Open version k + 1 of a closed module.

    It starts from version k and k's Fisher information: a texel's step divides by the root of all
    the information gathered, _GUARD times over for k's, so what k was sure of hardly moves and the
    rest is free. The MLP, which every texel shares, stays as it is; where there are no texels it
    learns again, and the parent's probes alone say whether the new version stands.
    """
    module.version, module.state = module.version + 1, "open"
    module.steps, module.rays, module.seconds, module.asked = 0, 0, 0.0, False
    module.gone, module.levelled, module.gained = 0, False, None
    module.tasks.clear()
    pool.thaw(module)
    information = unpack_information(parent.arrays["information"])
    structure.extend(pool, module, fresh, information)
    pool.fisher[module.row] = _GUARD * information
    pool.guarded[module.row] = pool.layout.features > 0


def anchor(
    frames: Sequence[HeldFrame], closed: set[Cell], show: Show, seed: int, pause: Pause
) -> None:
    """Set the exposure of frames that were never trained by what closed modules show.

    The map cannot drift: what is closed says how bright the world is. Median log ratio over random
    rays into closed cells; frames that see too little of them are left alone.
    """
    for frame in frames:
        pause()
        parts = [tiles for cell, tiles in frame.tiles.items() if cell in closed]
        if frame.rays or frame.anchored or sum(map(len, parts)) < _ANCHOR_TILES:
            continue
        tiles = np.concatenate(parts)
        random = np.random.default_rng((seed, frame.id))
        tile = tiles[random.integers(0, len(tiles), _ANCHOR_RAYS)]
        ro, rd, truth, use = draw([frame], np.zeros_like(tile), tile, random)
        shown = show(frame.site, ro, rd)
        good = (use > 0) & (truth.min(1) > 0.04) & (truth.max(1) < 0.98) & (shown.min(1) > 0.04)
        if good.sum() >= _ANCHOR_RAYS // 8:
            ratio = np.median(np.log(truth[good] / shown[good]), axis=0)
            frame.gain, frame.anchored = ratio.clip(-1.5, 1.5).astype(np.float32), True


def probe_rays(frames: Sequence[HeldFrame], module: Module, seed: int) -> F32:
    """(n, 9) origin, direction and true colour at exposure 0 of random rays of a module."""
    parts = [
        np.stack([np.full_like(tiles, i), tiles])
        for i, f in enumerate(frames)
        if (tiles := f.tiles.get(module.cell)) is not None
    ]
    if not parts:
        return np.zeros((0, 9), np.float32)
    which, tile = np.concatenate(parts, axis=1)
    random = np.random.default_rng((seed, module.version, *np.abs(module.cell)))
    pick = random.integers(0, len(tile), PROBES)
    ro, rd, truth, use = draw(frames, which[pick], tile[pick], random)
    level = truth / np.exp(np.stack([f.gain for f in frames]))[which[pick]]
    out: F32 = np.concatenate([ro, rd, level], axis=1)[use > 0].astype(np.float32)
    return out


def probe_psnr(show: Show, site: int, probes: F32) -> float:
    """PSNR in dB of rendered probe rays (n, 9), at exposure 0; 0 for none."""
    if len(probes) == 0:
        return 0.0
    ro, rd, level = (np.ascontiguousarray(part) for part in np.split(probes, 3, axis=1))
    return -10 * float(np.log10(max(float(((show(site, ro, rd) - level) ** 2).mean()), 1e-9)))


@dataclass(frozen=True)
class Verdict:
    """PSNR in dB of a parent's probes, learned anew and before; the share of the change that stays.

    `share` None: the parent stays.
    """

    new: float
    old: float
    share: float | None


def judge(pool: ModulePool, module: Module, parent: ModuleSnapshot, show: Show) -> Verdict:
    """Leave the new version in its slot as far as it shows its parent's probes as well as that did.

    Where it does not, what it changed of the texels that its parent knew is taken back step by
    step, at last all of it: what it learned of new ground then stays, if there is any, and what was
    known is as it was. If that is not enough, ground that it added stands before what its parent
    knew. All are rendered now, through the same neighbours.
    """
    site, probes = module.cell[0] // 2, parent.arrays["probes"]
    kept = {name: a.copy() for name, a in pool.arrays(module).items()}
    pool.load(module.cell, parent.arrays)
    old = probe_psnr(show, site, probes)
    before = pool.arrays(module)["features"].copy()
    known, new = unpack_information(parent.arrays["information"]) > 0, []
    adds = bool(((kept["seen"] > 0) & (parent.arrays["seen"] == 0)).any())
    for share in _SHARES[: None if adds else -1] if known.any() else _SHARES[:1]:
        mixed = np.where(known, before + share * (kept["features"] - before), kept["features"])
        pool.load(module.cell, {**kept, "features": mixed})
        new.append(probe_psnr(show, site, probes))
        if new[-1] >= old - LOSS_DB:
            return Verdict(new[0], old, share)
    return Verdict(new[0], old, None)


def give_up(pool: ModulePool, module: Module, parent: ModuleSnapshot) -> None:
    """Put the parent back in the place of a version that is not as good."""
    pool.load(module.cell, parent.arrays)
    module.version -= 1
    module.steps, module.rays = int(parent.meta["steps"]), int(parent.meta["rays"])
    module.psnr = parent.meta["psnr"]


def mixed(older: F32, newer: F32) -> F32:
    """Half of the probes from before, half from now, so that no version forgets the first."""
    half = PROBES // 2
    return np.concatenate([older[: max(half, PROBES - len(newer))], newer[:half]])
