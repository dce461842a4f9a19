"""Ray-traced pictures and exact z-depth of a built city."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from numba import njit

from mclnf_edge.types import Camera, Matrix4
from meta_trainer.city.caster import Caster, make_caster
from meta_trainer.city.fill import Site, fill
from meta_trainer.city.ground import CROP, FOREST_FLOOR, GRASS, MEADOW, WATER, ground
from meta_trainer.city.mesh import FloatArray, Mesh
from meta_trainer.city.noise import RGB, fractal
from meta_trainer.city.plan import Plan
from meta_trainer.city.surfaces import GLASS, LEAF, leaf, surface
from meta_trainer.city.surfaces import GROUND as GROUND_PATCH

Array = np.ndarray

_OFFSETS = ((0.375, 0.125), (0.875, 0.375), (0.125, 0.625), (0.625, 0.875))
"""Rotated grid of four samples in a pixel."""


@dataclass(frozen=True)
class City:
    """A city ready to be looked at."""

    plan: Plan
    mesh: Mesh
    caster: Caster
    ground_args: tuple[npt.NDArray[np.generic], ...]
    occlusion: FloatArray
    occlusion_low: FloatArray
    T_world_city: Matrix4


def build_city(plan: Plan, ground_z: float = 0.0) -> City:
    """Fill the plan and hand its triangles to the ray caster.

    The world is the city turned by its heading; `ground_z` is added to every height, so that
    captures do not all lie at z = 0.
    """
    site = fill(plan)
    mesh = site.mesh.build()
    caster = make_caster(mesh.vertices, mesh.faces)
    c, s = math.cos(plan.heading), math.sin(plan.heading)
    T = np.eye(4)
    T[:2, :2] = [[c, -s], [s, c]]
    T[2, 3] = ground_z
    return City(plan, mesh, caster, plan.ground_arrays(), _blurred(site), site.low, T)


def _blurred(site: Site) -> FloatArray:
    """Mean height above ground around each metre, at three radii: how much sky is hidden."""
    h = site.heights.astype(np.float32)
    return np.stack([cv2.GaussianBlur(h, (0, 0), s) for s in (1.5, 5.0, 14.0)]).astype(np.float64)


def camera_rays(
    camera: Camera, T: FloatArray, offsets: tuple[tuple[float, float], ...]
) -> tuple[FloatArray, FloatArray]:
    """Directions (offsets*h*w, 3) with unit z-depth (so that distance along them is z-depth)."""
    i, j = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
    rays = []
    for du, dv in offsets:
        x = (i + du - camera.cx) / camera.fx
        y = (j + dv - camera.cy) / camera.fy
        rays.append(np.stack([x, -y, -np.ones_like(x)], -1).reshape(-1, 3))
    return T[:3, 3].copy(), np.concatenate(rays) @ T[:3, :3].T


def trace(
    city: City, origin: FloatArray, rays: FloatArray
) -> tuple[npt.NDArray[np.int32], FloatArray]:
    """First triangle (-1 for none) and the exact distance along each ray."""
    origins = np.broadcast_to(origin.astype(np.float32), rays.shape).copy()
    hits = city.caster.first(origins, rays.astype(np.float32))
    distance = _distances(origin, rays, hits, city.mesh.vertices, city.mesh.faces)
    return hits, distance


@njit(cache=True)
def _distances(origin: Array, rays: Array, hits: Array, vertices: Array, faces: Array) -> Array:
    out = np.full(len(rays), np.inf)
    for k in range(len(rays)):
        if hits[k] < 0:
            continue
        i, j, m = faces[hits[k], 0], faces[hits[k], 1], faces[hits[k], 2]
        ax, ay, az = vertices[i, 0], vertices[i, 1], vertices[i, 2]
        ex, ey, ez = vertices[j, 0] - ax, vertices[j, 1] - ay, vertices[j, 2] - az
        fx, fy, fz = vertices[m, 0] - ax, vertices[m, 1] - ay, vertices[m, 2] - az
        nx, ny, nz = ey * fz - ez * fy, ez * fx - ex * fz, ex * fy - ey * fx
        along = rays[k, 0] * nx + rays[k, 1] * ny + rays[k, 2] * nz
        to = (ax - origin[0]) * nx + (ay - origin[1]) * ny + (az - origin[2]) * nz
        out[k] = to / along
    return out


def depth_map(city: City, camera: Camera, T_world_camera: Matrix4) -> FloatArray:
    """Z-depth (h, w) in metres through pixel centres, inf where a ray leaves the world."""
    T = np.linalg.inv(city.T_world_city) @ T_world_camera
    origin, rays = camera_rays(camera, T, ((0.5, 0.5),))
    return trace(city, origin, rays)[1].reshape(camera.height, camera.width)


def picture(
    city: City, camera: Camera, T_world_camera: Matrix4, gain: float = 1.0
) -> npt.NDArray[np.uint8]:
    """An sRGB picture (h, w, 3), four samples per pixel; `gain` is relative exposure."""
    T = np.linalg.inv(city.T_world_city) @ T_world_camera
    origin, rays = camera_rays(camera, T, _OFFSETS)
    hits, distance = trace(city, origin, rays)
    light = city.plan.light
    starts = _shadow_starts(origin, rays, hits, distance, city.mesh.normals, light.sun)
    lit = np.zeros(len(rays), dtype=np.bool_)
    facing = np.flatnonzero(~np.isnan(starts[:, 0]))
    towards = np.broadcast_to(light.sun.astype(np.float32), (len(facing), 3)).copy()
    lit[facing] = ~city.caster.blocked(starts[facing], towards)
    m = city.mesh
    colours = _shade(
        origin,
        rays,
        hits,
        distance,
        lit,
        m.patch,
        m.normals,
        m.kind,
        m.seed,
        m.table,
        city.ground_args,
        city.occlusion,
        city.occlusion_low,
        city.plan.relief,
        light.sun,
        light.sun_colour,
        light.sky_colour,
        light.haze,
        1.0 / camera.fx,
    )
    look = np.array([gain, light.warmth, light.contrast, light.saturation])
    mean = _developed(colours.reshape(len(_OFFSETS), -1, 3), look)
    return np.rint(_srgb(mean) * 255.0).astype(np.uint8).reshape(camera.height, camera.width, 3)


@njit(cache=True)
def _developed(samples: Array, look: Array) -> Array:
    """Exposure, white balance, saturation, contrast and a shoulder, then the mean of the samples.

    In this order, since averaging before the shoulder would let bright edges alias.
    """
    gain, warmth, contrast, saturation = look
    white = (1.0 + 0.04 * warmth, 1.0, 1.0 - 0.06 * warmth)
    knee, count = 0.6, len(samples)
    out = np.zeros((samples.shape[1], 3))
    for k in range(len(out)):
        for s in range(count):
            r, g, b = samples[s, k]
            r, g, b = gain * white[0] * r, gain * white[1] * g, gain * white[2] * b
            grey = (r + g + b) / 3.0
            for c, x in enumerate((r, g, b)):
                x = max(grey + saturation * (x - grey), 0.0)
                x = 0.2 * (5.0 * x) ** contrast
                if x > knee:
                    x = knee + (1.0 - knee) * (1.0 - math.exp(-(x - knee) / (1.0 - knee)))
                out[k, c] += x / count
    return out


def _srgb(linear: FloatArray) -> FloatArray:
    x = np.clip(linear, 0.0, 1.0)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


@njit(cache=True)
def _shadow_starts(
    origin: Array, rays: Array, hits: Array, distance: Array, normals: Array, sun: Array
) -> Array:
    """Where shadow rays begin, a little off the surface; NaN where the sun is behind it."""
    out = np.full((len(rays), 3), np.nan, dtype=np.float32)
    for k in range(len(rays)):
        if hits[k] < 0:
            continue
        n = normals[hits[k]]
        if n[0] * sun[0] + n[1] * sun[1] + n[2] * sun[2] <= -0.3:
            continue
        for c in range(3):
            out[k, c] = origin[c] + distance[k] * rays[k, c] + 0.03 * n[c] + 0.05 * sun[c]
    return out


@njit(cache=True)
def _sky_share(x: float, y: float, above: float, maps: Array, low: Array) -> float:
    """Share of the sky that a point `above` metres over the ground sees, from blurred heights."""
    u, v = x - low[0] - 0.5, y - low[1] - 0.5
    i, j = int(math.floor(u)), int(math.floor(v))
    if i < 0 or j < 0 or i + 1 >= maps.shape[2] or j + 1 >= maps.shape[1]:
        return 1.0
    fu, fv = u - i, v - j
    share = 1.0
    for k in range(3):
        a = maps[k, j, i] * (1 - fu) + maps[k, j, i + 1] * fu
        b = maps[k, j + 1, i] * (1 - fu) + maps[k, j + 1, i + 1] * fu
        wall = max(0.0, a * (1 - fv) + b * fv - above)
        share *= 1.0 - 0.42 * min(1.0, wall / (2.0 + 4.0 * k))
    return share


@njit(cache=True)
def _relief_at(x: float, y: float, relief: Array) -> float:
    """Ground height, as `Plan.height`."""
    total = 0.0
    for w in range(len(relief)):
        total += relief[w, 3] * math.sin(relief[w, 0] * x + relief[w, 1] * y + relief[w, 2])
    return total


@njit(cache=True)
def _sky(dz: float, sky: Array) -> RGB:
    """Radiance of the sky in a direction that climbs by dz."""
    t = min(1.0, max(0.0, dz)) ** 0.5
    return (
        sky[0] * (0.72 - 0.42 * t),
        sky[1] * (0.74 - 0.36 * t),
        sky[2] * (0.76 - 0.22 * t),
    )


@njit(cache=True)
def _shade(
    origin: Array,
    rays: Array,
    hits: Array,
    distance: Array,
    lit: Array,
    patch: Array,
    normals: Array,
    kinds: Array,
    seeds: Array,
    table: Array,
    ground_args: tuple[Array, ...],
    maps: Array,
    low: Array,
    relief: Array,
    sun: Array,
    sun_colour: Array,
    sky: Array,
    haze: float,
    pixel: float,
) -> Array:
    """Linear radiance of every sample."""
    out = np.empty((len(rays), 3))
    for k in range(len(rays)):
        r = rays[k]
        length = math.sqrt(r[0] * r[0] + r[1] * r[1] + r[2] * r[2])
        if hits[k] < 0:
            glow = _sky(r[2] / length, sky)
            out[k, 0], out[k, 1], out[k, 2] = glow
            continue
        t = distance[k]
        x, y, z = origin[0] + t * r[0], origin[1] + t * r[1], origin[2] + t * r[2]
        n = normals[hits[k]]
        slant = abs(r[0] * n[0] + r[1] * n[1] + r[2] * n[2]) / length
        foot = 0.5 * pixel * t / math.sqrt(max(slant, 0.05))
        p = patch[hits[k]]
        row = table[p]
        kind = kinds[p]
        a = (row[11], row[12], row[13])
        mirror = 0.0
        rough = 0.0
        if kind == GROUND_PATCH:
            what, albedo = ground(x, y, foot, *ground_args)
            if what == WATER:
                mirror = 0.5
            if what in (GRASS, MEADOW, CROP, FOREST_FLOOR):
                rough = 0.35
        elif kind == LEAF:
            clump = seeds[p] + 17 * (hits[k] // 2)
            albedo = leaf(x, y, z, clump, foot, a)
        else:
            dx, dy, dz = x - row[0], y - row[1], z - row[2]
            u = dx * row[3] + dy * row[4] + dz * row[5]
            v = dx * row[6] + dy * row[7] + dz * row[8]
            b = (row[14], row[15], row[16])
            albedo, mirror = surface(kind, u, v, row[9], row[10], seeds[p], foot, a, b)
        above = 0.0 if kind == GROUND_PATCH else z - _relief_at(x, y, relief)
        cosine = n[0] * sun[0] + n[1] * sun[1] + n[2] * sun[2]
        if kind == LEAF:
            cosine = (cosine + 0.35) / 1.35
        if rough > 0.0:
            cosine *= 1.0 + rough * fractal(x, y, 77, 0.6, 2, foot)
        direct = max(0.0, cosine) if lit[k] else 0.0
        share = _sky_share(x, y, above, maps, low) * (0.62 + 0.38 * n[2])
        fog = math.exp(-haze * t * length)
        glow = _sky(0.03, sky)
        cosv = -(r[0] * n[0] + r[1] * n[1] + r[2] * n[2]) / length
        fresnel = mirror * (0.15 + 0.85 * (1.0 - max(0.0, cosv)) ** 4)
        up = r[2] / length + 2.0 * max(0.0, cosv) * n[2]
        seen_sky = _sky(up, sky) if up > -0.1 else (0.09, 0.1, 0.09)
        for c in range(3):
            diffuse = albedo[c] * (direct * sun_colour[c] + share * sky[c])
            value = diffuse * (1.0 - fresnel) + fresnel * seen_sky[c]
            if kind == GLASS:
                value = max(value, 0.02)
            out[k, c] = value * fog + glow[c] * (1.0 - fog)
    return out
