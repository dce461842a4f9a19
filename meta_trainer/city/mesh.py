"""Triangles with the flat patches that textures live on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Colour = tuple[float, float, float]
GREY: Colour = (0.3, 0.3, 0.3)


@dataclass(frozen=True)
class Mesh:
    """A finished scene: `vertices` (n, 3) metres, `faces` (m, 3).

    Per triangle: `patch` (m,) and shading `normals` (m, 3). Per patch: `kind`, `seed` (k,) and
    `table` (k, 17): origin, u axis, v axis, width and height in metres, two colours.
    """

    vertices: FloatArray
    faces: npt.NDArray[np.int64]
    patch: npt.NDArray[np.int64]
    normals: FloatArray
    kind: npt.NDArray[np.int64]
    seed: npt.NDArray[np.int64]
    table: FloatArray


@dataclass
class Builder:
    """Collects polygons and clouds of leaves; `build` joins them."""

    _vertices: list[FloatArray] = field(default_factory=list)
    _faces: list[npt.NDArray[np.int64]] = field(default_factory=list)
    _patch: list[npt.NDArray[np.int64]] = field(default_factory=list)
    _normals: list[FloatArray] = field(default_factory=list)
    _patches: list[tuple[float, ...]] = field(default_factory=list)
    _kinds: list[tuple[int, int]] = field(default_factory=list)
    _count: int = 0

    def polygon(
        self, corners: FloatArray, kind: int, seed: int, a: Colour, b: Colour = GREY
    ) -> None:
        """A flat convex polygon, (k, 3) anticlockwise from outside; u runs from corner 0 to 1."""
        along = corners[1] - corners[0]
        u = along / np.linalg.norm(along)
        normal = np.cross(along, corners[-1] - corners[0])
        normal /= np.linalg.norm(normal)
        v = np.cross(normal, u)
        size = ((corners - corners[0]) @ np.stack([u, v], 1)).max(axis=0)
        k = len(corners)
        faces = np.array([(0, i, i + 1) for i in range(1, k - 1)], dtype=np.int64)
        self.soup(corners, faces, np.tile(normal, (k - 2, 1)), kind, seed, a, b, u, v, size)

    def soup(
        self,
        vertices: FloatArray,
        faces: npt.NDArray[np.int64],
        normals: FloatArray,
        kind: int,
        seed: int,
        a: Colour,
        b: Colour = GREY,
        u: FloatArray | None = None,
        v: FloatArray | None = None,
        size: FloatArray | None = None,
    ) -> None:
        """Any triangles as one patch, with shading normals (m, 3)."""
        u = np.array([1.0, 0.0, 0.0]) if u is None else u
        v = np.array([0.0, 1.0, 0.0]) if v is None else v
        size = np.ones(2) if size is None else size
        self._vertices.append(vertices)
        self._faces.append(faces + self._count)
        self._normals.append(normals)
        self._patch.append(np.full(len(faces), len(self._patches), dtype=np.int64))
        self._patches.append((*vertices[0], *u, *v, *size, *a, *b))
        self._kinds.append((kind, seed))
        self._count += len(vertices)

    def build(self) -> Mesh:
        """Everything collected so far as arrays."""
        kinds = np.array(self._kinds, dtype=np.int64).reshape(-1, 2)
        return Mesh(
            np.concatenate(self._vertices),
            np.concatenate(self._faces),
            np.concatenate(self._patch),
            np.concatenate(self._normals),
            kinds[:, 0].copy(),
            kinds[:, 1].copy(),
            np.array(self._patches, dtype=np.float64),
        )


@dataclass(frozen=True)
class Frame:
    """A level local frame: `u` points along `angle` (radians from x), `v` to its left."""

    x: float
    y: float
    z: float
    angle: float

    def at(self, points: list[tuple[float, float, float]]) -> FloatArray:
        """Local (u, v, height) points in city metres."""
        p = np.array(points, dtype=np.float64)
        c, s = math.cos(self.angle), math.sin(self.angle)
        x = self.x + c * p[:, 0] - s * p[:, 1]
        y = self.y + s * p[:, 0] + c * p[:, 1]
        return np.stack([x, y, self.z + p[:, 2]], axis=1)

    def child(self, u: float, v: float, z: float = 0.0, turn: float = 0.0) -> Frame:
        """A frame standing at local (u, v, z), turned by `turn`."""
        p = self.at([(u, v, z)])[0]
        return Frame(float(p[0]), float(p[1]), float(p[2]), self.angle + turn)


def box(
    mesh: Builder,
    frame: Frame,
    half: tuple[float, float],
    z: tuple[float, float],
    side: int,
    top: int,
    seed: int,
    a: Colour,
    b: Colour = GREY,
    top_colour: Colour | None = None,
) -> None:
    """An upright box: four walls of kind `side`, a lid of kind `top`, no floor."""
    hu, hv = half
    low, high = z
    ring = [(-hu, -hv), (hu, -hv), (hu, hv), (-hu, hv)]
    for k in range(4):
        (u0, v0), (u1, v1) = ring[k], ring[(k + 1) % 4]
        corners = frame.at([(u0, v0, low), (u1, v1, low), (u1, v1, high), (u0, v0, high)])
        mesh.polygon(corners, side, seed + k, a, b)
    lid = frame.at([(u, v, high) for u, v in ring])
    mesh.polygon(lid, top, seed, top_colour or a, b)
