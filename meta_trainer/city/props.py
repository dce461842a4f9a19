"""Trees, hedges, cars and containers."""

from __future__ import annotations

import numpy as np

from meta_trainer.city.buildings import Rng, new_seed, pick
from meta_trainer.city.mesh import Builder, Colour, FloatArray, Frame, box
from meta_trainer.city.surfaces import GLASS, LEAF, METAL_ROOF, PAINT, PLAIN

GREENS: tuple[Colour, ...] = (
    (0.050, 0.088, 0.018),
    (0.072, 0.110, 0.020),
    (0.034, 0.066, 0.018),
    (0.092, 0.120, 0.028),
    (0.052, 0.072, 0.022),
)
BARK: Colour = (0.10, 0.075, 0.05)
CARS: tuple[Colour, ...] = (
    (0.55, 0.55, 0.55),
    (0.68, 0.68, 0.67),
    (0.025, 0.025, 0.028),
    (0.10, 0.10, 0.11),
    (0.26, 0.27, 0.28),
    (0.05, 0.075, 0.15),
    (0.17, 0.04, 0.035),
    (0.40, 0.40, 0.41),
    (0.15, 0.15, 0.16),
    (0.30, 0.27, 0.20),
    (0.05, 0.085, 0.07),
)


def tree(mesh: Builder, x: float, y: float, z: float, radius: float, rng: Rng) -> None:
    """A broad-leaved or coniferous tree: a trunk and a crown of a few hundred leaf clumps."""
    conifer = rng.random() < 0.15
    tall = radius * (rng.uniform(2.6, 3.6) if conifer else rng.uniform(1.6, 2.3))
    trunk = (0.1 if conifer else 0.15) * tall
    place = Frame(x, y, z, rng.uniform(0, 3))
    box(mesh, place, (0.06 * radius,) * 2, (-1.0, 0.6 * tall), PLAIN, PLAIN, 1, BARK)
    centre = np.array([x, y, z])
    clumps = int(np.clip(60 + 42 * radius * radius, 70, 900))
    if conifer:
        points, outward = _cone(clumps, radius, trunk, tall, rng)
    else:
        points, outward = _lobes(clumps, radius, trunk, tall, rng)
    size = radius * 1.5 / np.sqrt(clumps) * rng.uniform(0.8, 1.5, clumps) + 0.12
    _leaves(mesh, centre + points, outward, size, pick(rng, GREENS, 0.25), rng)


def _lobes(
    n: int, radius: float, low: float, high: float, rng: Rng
) -> tuple[FloatArray, FloatArray]:
    """Points on several overlapping lobes of a round crown, with outward directions."""
    lobes = int(rng.integers(5, 10))
    tall = 0.5 * (high - low)
    middle = np.array([0.0, 0.0, low + tall])
    away = _unit(rng.normal(size=(lobes, 3)) * np.array([1, 1, 0.7]) + np.array([0, 0, 0.25]))
    centres = away * np.array([0.52 * radius, 0.52 * radius, 0.5 * tall])
    sizes = rng.uniform(0.42, 0.62, lobes)
    which = rng.integers(0, lobes, n)
    way = _unit(rng.normal(size=(n, 3)) + 0.9 * away[which])
    depth = rng.uniform(0.72, 1.02, (n, 1))
    reach = np.array([radius, radius, tall]) * sizes[which][:, None]
    return middle + centres[which] + way * reach * depth, way


def _cone(
    n: int, radius: float, low: float, high: float, rng: Rng
) -> tuple[FloatArray, FloatArray]:
    """Points on a conifer's tiers, with outward directions."""
    t = 1.0 - np.sqrt(rng.uniform(0.0, 1.0, n))
    angle = rng.uniform(0, 2 * np.pi, n)
    tier = 1.0 - 0.25 * ((t * 7.0) % 1.0)
    r = radius * (1 - t) * tier * rng.uniform(0.7, 1.0, n)
    points = np.stack([r * np.cos(angle), r * np.sin(angle), low + t * (high - low)], 1)
    return points, _unit(np.stack([np.cos(angle), np.sin(angle), np.full(n, 0.6)], 1))


def _leaves(
    mesh: Builder,
    points: FloatArray,
    outward: FloatArray,
    size: FloatArray,
    colour: Colour,
    rng: Rng,
) -> None:
    """One irregular quad per clump, facing roughly outward."""
    n = len(points)
    face = _unit(outward + 0.55 * rng.normal(size=(n, 3)))
    side = _unit(np.cross(face, rng.normal(size=(n, 3))))
    other = np.cross(face, side)
    corners = []
    for a, b in ((-1, -0.6), (0.7, -1), (1, 0.8), (-0.6, 1)):
        jitter = rng.uniform(0.7, 1.3, (n, 2)) * size[:, None]
        corners.append(points + side * a * jitter[:, :1] + other * b * jitter[:, 1:])
    vertices = np.stack(corners, axis=1).reshape(-1, 3)
    base = 4 * np.arange(n)[:, None]
    pairs = [base + np.array([0, 1, 2]), base + np.array([0, 2, 3])]
    faces = np.stack(pairs, axis=1).reshape(-1, 3).astype(np.int64)
    normals = np.repeat(_unit(0.75 * outward + 0.45 * face), 2, axis=0)
    mesh.soup(vertices, faces, normals, LEAF, new_seed(rng), colour)


def _unit(v: FloatArray) -> FloatArray:
    scaled: FloatArray = v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-9)
    return scaled


def hedge(mesh: Builder, frame: Frame, length: float, height: float, rng: Rng) -> None:
    """A clipped hedge along u: a dark core under leaf clumps."""
    half = (0.5 * length, 0.4)
    box(mesh, frame, half, (-0.5, height - 0.15), PLAIN, PLAIN, 1, (0.03, 0.045, 0.015))
    n = int(14 * length)
    face = rng.integers(0, 3, n)
    u = rng.uniform(-half[0], half[0], n)
    v = np.where(face == 0, rng.uniform(-0.5, 0.5, n), np.where(face == 1, -0.5, 0.5))
    z = np.where(face == 0, height, rng.uniform(0.1, height, n))
    points = frame.at(list(zip(u, v, z, strict=True)))
    way = frame.at([(0, 0, 1), (0, -1, 0.3), (0, 1, 0.3)]) - frame.at([(0, 0, 0)])
    size = rng.uniform(0.18, 0.34, n)
    _leaves(mesh, points, _unit(way)[face], size, pick(rng, GREENS, 0.2), rng)


def car(mesh: Builder, frame: Frame, rng: Rng) -> None:
    """A car or van along u: dark wheels' band, body, glazed cabin, roof."""
    paint = pick(rng, CARS, 0.15)
    van = rng.random() < 0.12
    length = float(rng.uniform(2.4, 2.8) if van else rng.uniform(1.9, 2.35))
    width = float(rng.uniform(0.84, 0.95))
    waist, top = (1.25, 2.05) if van else (0.85, 1.45)
    back, front = (-0.99, 0.75) if van else (-0.85, 0.45)
    rear = 0.05 if van else 0.35
    dark = (0.02, 0.02, 0.02)
    box(mesh, frame, (length * 0.97, width * 0.97), (0.0, 0.32), PLAIN, PLAIN, 1, dark)
    box(mesh, frame, (length, width), (0.3, waist), PAINT, PAINT, 1, paint)
    back, front, narrow = back * length, front * length, 0.85 * width
    low = [(back, -width), (front, -width), (front, width), (back, width)]
    high = [(back + rear, -narrow), (front - 0.7, -narrow), (front - 0.7, narrow)]
    high.append((back + rear, narrow))
    for k in range(4):
        n = (k + 1) % 4
        side = [(*low[k], waist), (*low[n], waist), (*high[n], top), (*high[k], top)]
        mesh.polygon(frame.at(side), GLASS, 1, (0.02, 0.022, 0.025))
    mesh.polygon(frame.at([(*p, top) for p in high]), PAINT, 1, paint)


def container(mesh: Builder, frame: Frame, rng: Rng) -> None:
    """A shipping container or a stack of two."""
    palette = ((0.20, 0.07, 0.05), (0.07, 0.12, 0.19), (0.12, 0.18, 0.12), (0.5, 0.5, 0.48))
    top = 2.6 if rng.random() < 0.7 else 5.2
    kind = METAL_ROOF
    box(mesh, frame, (3.0, 1.2), (0.0, top), kind, kind, new_seed(rng), pick(rng, palette))
