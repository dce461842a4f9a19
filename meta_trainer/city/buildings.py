"""Buildings: walls with façades, balconies, flat and pitched roofs, and what stands on roofs."""

from __future__ import annotations

import math

import numpy as np

from meta_trainer.city.mesh import Builder, Colour, Frame, box
from meta_trainer.city.noise import hash01
from meta_trainer.city.surfaces import (
    BLANK_WALL,
    FACADE,
    FLAT_ROOF,
    GLASS,
    METAL_ROOF,
    PLAIN,
    TILE_ROOF,
)

Rng = np.random.Generator

WALLS: tuple[Colour, ...] = (
    (0.62, 0.58, 0.50),
    (0.55, 0.54, 0.52),
    (0.66, 0.60, 0.42),
    (0.50, 0.36, 0.26),
    (0.40, 0.38, 0.36),
    (0.70, 0.68, 0.64),
    (0.34, 0.17, 0.11),
    (0.58, 0.45, 0.35),
    (0.45, 0.50, 0.52),
)
TRIMS: tuple[Colour, ...] = ((0.66, 0.65, 0.62), (0.30, 0.29, 0.28), (0.45, 0.40, 0.34))
TILES: tuple[Colour, ...] = (
    (0.29, 0.110, 0.065),
    (0.27, 0.090, 0.055),
    (0.17, 0.085, 0.060),
    (0.105, 0.100, 0.100),
    (0.33, 0.150, 0.085),
    (0.20, 0.185, 0.170),
)
FELTS: tuple[Colour, ...] = (
    (0.17, 0.17, 0.175),
    (0.27, 0.265, 0.255),
    (0.36, 0.355, 0.34),
    (0.115, 0.115, 0.12),
    (0.30, 0.25, 0.22),
    (0.42, 0.42, 0.41),
)
SHEETS: tuple[Colour, ...] = (
    (0.42, 0.43, 0.44),
    (0.30, 0.31, 0.33),
    (0.43, 0.43, 0.42),
    (0.16, 0.22, 0.29),
    (0.30, 0.12, 0.09),
    (0.22, 0.29, 0.22),
)
SINK = 2.5
"""Metres that walls reach below their base, so that sloping ground never shows a gap."""


def pick(rng: Rng, palette: tuple[Colour, ...], spread: float = 0.12) -> Colour:
    """A palette colour, varied a little in brightness and hue."""
    base = np.array(palette[int(rng.integers(len(palette)))])
    r, g, b = np.clip(base * rng.uniform(1 - spread, 1 + spread) * rng.uniform(0.95, 1.05, 3), 0, 1)
    return float(r), float(g), float(b)


def new_seed(rng: Rng) -> int:
    """A fresh seed for one patch's texture."""
    return int(rng.integers(1, 1 << 28))


def flat_building(
    mesh: Builder, frame: Frame, half: tuple[float, float], height: float, rng: Rng, dress: Dress
) -> None:
    """A block with façades all round, parapet, roof clutter and perhaps balconies."""
    hu, hv = half
    seed = new_seed(rng)
    _walls(mesh, frame, half, height, seed, dress)
    roof = [(-hu, -hv, height), (hu, -hv, height), (hu, hv, height), (-hu, hv, height)]
    mesh.polygon(frame.at(roof), FLAT_ROOF, seed, dress.roof)
    _parapet(mesh, frame, half, height, seed, dress)
    _clutter(mesh, frame, half, height, rng)
    if height > 8.0 and rng.random() < dress.balconies:
        _balconies(mesh, frame, half, height, seed, rng)


class Dress:
    """The colours and habits that a building's parts share."""

    def __init__(self, rng: Rng, pitched: bool = False, sheet: bool = False) -> None:
        """Draw them for a flat, a pitched or a sheet-metal roof."""
        self.wall = pick(rng, WALLS)
        self.trim = pick(rng, TRIMS)
        palette = SHEETS if sheet else TILES if pitched else FELTS
        self.roof = pick(rng, palette, 0.2)
        self.roof_kind = METAL_ROOF if sheet else TILE_ROOF if pitched else FLAT_ROOF
        self.balconies = 0.6
        self.wall_kind = BLANK_WALL if sheet else FACADE


def _walls(
    mesh: Builder, frame: Frame, half: tuple[float, float], height: float, seed: int, dress: Dress
) -> None:
    hu, hv = half
    ring = [(-hu, -hv), (hu, -hv), (hu, hv), (-hu, hv)]
    for k in range(4):
        (u0, v0), (u1, v1) = ring[k], ring[(k + 1) % 4]
        wall = [(u0, v0, 0.0), (u1, v1, 0.0), (u1, v1, height), (u0, v0, height)]
        mesh.polygon(frame.at(wall), dress.wall_kind, seed, dress.wall, dress.trim)
        foot = [(u0, v0, -SINK), (u1, v1, -SINK), (u1, v1, 0.0), (u0, v0, 0.0)]
        mesh.polygon(frame.at(foot), PLAIN, seed, dress.trim)


def _parapet(
    mesh: Builder, frame: Frame, half: tuple[float, float], height: float, seed: int, dress: Dress
) -> None:
    hu, hv = half
    top = height + 0.5
    for u, v, su, sv in (
        (0.0, -hv + 0.15, hu, 0.15),
        (0.0, hv - 0.15, hu, 0.15),
        (-hu + 0.15, 0.0, 0.15, hv - 0.3),
        (hu - 0.15, 0.0, 0.15, hv - 0.3),
    ):
        box(mesh, frame.child(u, v), (su, sv), (height, top), PLAIN, PLAIN, seed, dress.trim)


def _clutter(
    mesh: Builder, frame: Frame, half: tuple[float, float], height: float, rng: Rng
) -> None:
    """Stair heads, air conditioners, vents, a few rows of solar panels."""
    hu, hv = half
    if min(half) < 3.0:
        return
    for _ in range(int(rng.poisson(0.035 * hu * hv)) + 1):
        u, v = rng.uniform(-hu + 1.5, hu - 1.5), rng.uniform(-hv + 1.5, hv - 1.5)
        size = rng.uniform(0.3, 1.1, 3) * np.array([1.0, 1.0, 1.3])
        if rng.random() < 0.12 and min(half) > 4.5:
            u, v = 0.75 * u, 0.55 * v
            size = np.array([rng.uniform(1.5, 2.6), rng.uniform(1.3, 2.0), 2.6])
        grey = float(rng.uniform(0.12, 0.6))
        colour = (grey, grey * 0.99, grey * 0.95)
        place = frame.child(u, v, height)
        box(mesh, place, (size[0], size[1]), (0.0, size[2]), PLAIN, PLAIN, new_seed(rng), colour)
    if rng.random() < 0.12 and hu > 6.0:
        _solar(mesh, frame, half, height)


def _solar(mesh: Builder, frame: Frame, half: tuple[float, float], height: float) -> None:
    hu, hv = half
    for k in range(int(hv / 1.6)):
        v = -0.7 * hv + 2.0 * k
        if v + 1.0 > 0.7 * hv:
            break
        quad = [
            (-0.5 * hu, v, 0.3),
            (0.3 * hu, v, 0.3),
            (0.3 * hu, v + 1, 0.9),
            (-0.5 * hu, v + 1, 0.9),
        ]
        mesh.polygon(frame.child(0, 0, height).at(quad), GLASS, k, (0.02, 0.025, 0.05))


def _balconies(
    mesh: Builder, frame: Frame, half: tuple[float, float], height: float, seed: int, rng: Rng
) -> None:
    """Slabs with parapets in whole columns of the two long façades' window bays."""
    hu, hv = half
    # The façade texture divides the wall by the same rule.
    bays = max(1, math.floor(2 * hu / (2.4 + 1.6 * hash01(seed, 1, 202))))
    floors = math.floor((height - 0.6) / 3.0)
    every = int(rng.integers(2, 4))
    colour = pick(rng, WALLS)
    for side in (-1.0, 1.0):
        if rng.random() < 0.25:
            continue
        for bay in range(1, bays - 1, every):
            u = -hu + (bay + 0.5) * 2 * hu / bays
            place = frame.child(u, side * (hv + 0.6))
            for floor in range(1, floors):
                z = 3.0 * floor
                box(mesh, place, (1.3, 0.6), (z - 0.12, z + 0.95), PLAIN, PLAIN, seed, colour)


def pitched_building(
    mesh: Builder, frame: Frame, half: tuple[float, float], height: float, rng: Rng, dress: Dress
) -> None:
    """A block under a gabled or hipped roof with eaves, chimneys and perhaps roof windows."""
    hu, hv = half
    seed = new_seed(rng)
    _walls(mesh, frame, half, height, seed, dress)
    rise = hv * (rng.uniform(0.1, 0.2) if dress.roof_kind == METAL_ROOF else rng.uniform(0.5, 0.95))
    hip = 0.0 if dress.roof_kind == METAL_ROOF or rng.random() < 0.6 else min(0.8 * hv, 0.8 * hu)
    over = 0.45
    drop = height - over * rise / hv
    eu, ev, top = hu + over, hv + over, height + rise
    ru = eu - hip if hip else eu
    for s in (-1.0, 1.0):
        slope = [
            (-s * -eu, -s * ev, drop),
            (s * -eu, -s * ev, drop),
            (s * -ru, 0, top),
            (s * ru, 0, top),
        ]
        mesh.polygon(
            frame.at(slope[::1] if _up(slope) else slope[::-1]), dress.roof_kind, seed, dress.roof
        )
        if hip:
            end = [(s * eu, -s * ev, drop), (s * eu, s * ev, drop), (s * ru, 0.0, top)]
            mesh.polygon(frame.at(end), dress.roof_kind, seed + 1, dress.roof)
        else:
            gable = [(s * hu, -s * hv, height), (s * hu, s * hv, height), (s * hu, 0.0, top)]
            mesh.polygon(frame.at(gable), BLANK_WALL, seed, dress.wall, dress.trim)
    if dress.roof_kind == TILE_ROOF:
        _chimneys(mesh, frame, half, height, rise, rng)


def _up(corners: list[tuple[float, float, float]]) -> bool:
    p = np.array(corners)
    return bool(np.cross(p[1] - p[0], p[2] - p[0])[2] > 0)


def _chimneys(
    mesh: Builder, frame: Frame, half: tuple[float, float], height: float, rise: float, rng: Rng
) -> None:
    hu, hv = half
    for _ in range(int(rng.integers(0, 2 + int(hu / 8)))):
        u, v = rng.uniform(-0.7, 0.7) * hu, rng.uniform(-0.5, 0.5) * hv
        top = height + rise * (1 - abs(v) / hv) + rng.uniform(0.7, 1.4)
        place = frame.child(u, v)
        colour = pick(rng, ((0.28, 0.13, 0.09), (0.45, 0.42, 0.4)))
        box(mesh, place, (0.45, 0.35), (height, top), BLANK_WALL, PLAIN, new_seed(rng), colour)
    for s in (-1.0, 1.0):
        if rng.random() < 0.35:
            for u in np.arange(-0.7 * hu, 0.7 * hu, 3.4):
                a, b = 0.62, 0.40
                za, zb = height + rise * (1 - a) + 0.06, height + rise * (1 - b) + 0.06
                window = [
                    (s * (u - 0.4), -s * a * hv, za),
                    (s * (u + 0.4), -s * a * hv, za),
                    (s * (u + 0.4), -s * b * hv, zb),
                    (s * (u - 0.4), -s * b * hv, zb),
                ]
                mesh.polygon(frame.at(window), GLASS, 1, (0.03, 0.035, 0.045))
