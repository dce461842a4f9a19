"""Whole pictures: against the definition, against the training path, and at awkward sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mclnf_edge.engine import picture, volume
from mclnf_edge.engine.picture import DARK, TILE, Shot
from mclnf_edge.inference.renderer import Renderer
from mclnf_edge.mapping.modules import ModulePool, Workspace, trace
from mclnf_edge.maths import radiance
from mclnf_edge.types import Camera, View
from tests.engine import scene as small
from tests.engine.scene import CELL_M, SAMPLES

STEPS = 32
BAND = (-3.0, 4.0)
UNIFORM = np.float32(0.01)


def towards(eye: Any, aim: Any) -> Any:
    """A camera-to-world pose at `eye` that looks at `aim`, its x axis level."""
    back = np.asarray(eye, float) - aim
    back /= np.linalg.norm(back)
    right = np.cross((0, 1, 0) if abs(back[2]) > 0.99 else (0, 0, 1), back)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(back, right), back], axis=1)
    pose[:3, 3] = eye
    return pose


POSE = towards((7.0, 8.0, 14.0), (13.0, 11.0, -1.0))
"""Over the corner where four modules meet, on to the outer one."""


def shot_of(pose: Any, size: tuple[int, int], focal: float = 30.0) -> Shot:
    return Shot(
        eye=pose[:3, 3].astype(np.float32),
        turn=np.ascontiguousarray(pose[:3, :3], np.float32),
        pinhole=np.array([focal, focal, 20.0, 15.0], np.float32),
        size=size,
        band=np.array(BAND, np.float32),
        reach=small.REACH,
        exposure=np.ones(3, np.float32),
        samples=SAMPLES,
        steps=STEPS,
        uniform=UNIFORM,
    )


def paint(pool: ModulePool, shot: Shot) -> tuple[Any, Any, Any]:
    h, w = shot.size
    rgb = np.zeros((h, w, 3), np.uint8)
    depth, known = np.zeros((h, w), np.float32), np.zeros((h, w), np.float32)
    picture.paint(pool.scene(), shot, 0, -(-h // TILE), rgb, depth, known)
    return rgb, depth, known


def plain_pool() -> ModulePool:
    """Random modules over level ground: solid below z = -1, thin air above."""
    pool = small.make_pool()
    for s in pool.slot_of.values():
        low, inverse = pool.band[s]
        n = small.LAYOUT.voxels[2]
        z = low + (np.arange(n) + 0.5) / n / inverse
        pool.density[s] = np.tile(np.where(z < -1, 1.0, 0.02), pool.voxels // n)
        pool.surface[s] = -1
        pool.seen[s] = np.arange(pool.seen.shape[1]) % 24 < 18  # wide stripes
    return pool


@pytest.fixture(scope="module")
def pool() -> ModulePool:
    return small.make_pool()


def by_definition(
    pool: ModulePool, shot: Shot, row: int, column: int
) -> dict[tuple[int, int], Any]:
    """(r, g, b, z-depth, known) in float64 of a tile's pixels, at the kernel's sample distances."""
    tile = picture._make_tile(SAMPLES, STEPS)
    alive = picture._aim(pool.scene(), shot, row, column, tile)
    modules = list(small.definition(pool).values())
    out = {}
    for r in tile.alive[:alive]:
        t = tile.t.reshape(-1, SAMPLES)[tile.source[r]].astype(float)
        start, dt = tile.span[tile.source[r]]
        middle = 0.5 * (t[1:] + t[:-1])
        low = np.concatenate([[max(start, t[0] - 0.5 * dt)], middle])
        width = np.maximum(np.concatenate([middle, [t[-1] + 0.5 * dt]]) - low, 1e-3)
        points = shot.eye + t[:, None] * tile.direction[r].astype(float)
        at = radiance.radiance(modules, torch.tensor(points))
        through = np.exp(-at.density.numpy() * width)
        before = np.concatenate([[1], np.cumprod(through)[:-1]])
        weight = np.where(before >= DARK, before * (1 - through), 0)
        stopped = weight.sum()
        rgb, known = weight @ at.color.numpy() / stopped, float(weight @ at.seen.numpy())
        if 1 - stopped < DARK:
            known /= stopped
        shown = known * rgb + (1 - known) * 0.5
        i, j = (int(v) for v in picture._pixel(r))
        z = weight @ t / stopped * tile.axial[r]
        out[row + i, column + j] = (*shown, z, known)
    return out


def test_a_picture_is_its_definition(pool: ModulePool) -> None:
    """Over seams, four modules and the outer one, seen and unseen ground."""
    shot = shot_of(POSE, (30, 40))
    rgb, depth, known = paint(pool, shot)
    checked = 0
    for row, column in ((0, 0), (8, 16), (16, 16), (16, 32), (24, 8)):
        truth = by_definition(pool, shot, row, column)
        for (i, j), (*color, z, share) in truth.items():
            assert np.abs(rgb[i, j] - 255 * np.array(color)).max() < 1.5
            assert depth[i, j] == pytest.approx(z, rel=1e-3)
            assert known[i, j] == pytest.approx(share, abs=4e-3)
            checked += 1
    assert checked > 250
    assert 0.05 < (known < 0.5).mean() < 0.95, "the scene has both seen and unseen ground"


def test_a_picture_crosses_every_module(pool: ModulePool) -> None:
    """The points that the definition test checks lie in each module and where four are blended."""
    shot = shot_of(POSE, (30, 40))
    tile = picture._make_tile(SAMPLES, STEPS)
    slots, share = np.empty(4, np.int32), np.empty(4, np.float32)
    met, most = set(), 0
    for row, column in ((0, 0), (8, 16), (16, 16), (16, 32), (24, 8)):
        for r in tile.alive[: picture._aim(pool.scene(), shot, row, column, tile)]:
            for t in tile.t.reshape(-1, SAMPLES)[tile.source[r]]:
                x, y, _ = shot.eye + t * tile.direction[r]
                n = volume.gate(pool.scene(), x, y, slots, share)
                met |= set(slots[:n].tolist())
                most = max(most, n)
    assert met == set(pool.slot_of.values())
    assert most == 4


def test_the_room_of_one_module_is_where_the_gate_gives_one(pool: ModulePool) -> None:
    room, slots, share = np.zeros(4, np.float32), np.empty(4, np.int32), np.empty(4, np.float32)
    random, alone = np.random.default_rng(1), 0
    for x, y in random.uniform(-3, 4 * CELL_M, (3000, 2)).astype(np.float32):
        s = volume.alone(pool.scene(), x, y, room)
        n = volume.gate(pool.scene(), x, y, slots, share)
        if s < 0:
            assert room[0] > room[1]
            continue
        assert n == 1 and slots[0] == s and room[0] < x < room[1] and room[2] < y < room[3]
        u, v = random.uniform(room[::2] + 1e-3, room[1::2] - 1e-3).astype(np.float32)
        assert volume.gate(pool.scene(), u, v, slots, share) == 1 and slots[0] == s
        alone += 1
    assert alone > 1000


def test_the_training_path_shows_the_same() -> None:
    """Squares of rays share distances on level ground; the picture stays within 45 dB."""
    pool = plain_pool()
    shot = shot_of(POSE, (30, 40), focal=60.0)
    rgb, depth, known = paint(pool, shot)
    y, x = np.mgrid[:30, :40] + 0.5
    rays = np.stack([(x - 20) / 60, (15 - y) / 60, -np.ones_like(x)], axis=-1).reshape(-1, 3)
    rays = rays @ POSE[:3, :3].T
    length = np.linalg.norm(rays, axis=1)
    rd = (rays / length[:, None]).astype(np.float32)
    ro = np.tile(shot.eye, (len(rd), 1))
    work, bands = Workspace(len(rd), SAMPLES), np.tile(shot.band, (len(rd), 1))
    trace(pool, work, ro, rd, bands, steps=STEPS, uniform=float(UNIFORM), seed=0, jitter=False,
          reach=float(small.REACH))  # fmt: skip
    tape = work.tape
    matter = np.maximum(1 - tape.left, 1e-3)[:, None]
    share = np.where(tape.left < DARK, tape.known / matter[:, 0], tape.known)[:, None]
    plain = 255 * (share * tape.rgb / matter + (1 - share) * 0.5).reshape(30, 40, 3)
    mse = ((plain - rgb) ** 2).mean()
    assert 10 * np.log10(255**2 / mse) > 45
    assert np.abs(depth.ravel() / (tape.depth / matter[:, 0] / length) - 1).mean() < 2e-3
    assert np.abs(known.ravel() - share[:, 0]).mean() < 5e-3


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (9, 17), (16, 24), (2, 23)])
def test_any_size_is_a_part_of_a_larger_picture(pool: ModulePool, size: tuple[int, int]) -> None:
    whole = paint(pool, shot_of(POSE, (24, 24)))
    part = paint(pool, shot_of(POSE, size))
    for large, own in zip(whole, part, strict=True):
        np.testing.assert_allclose(large[: size[0], : size[1]].astype(float), own, atol=1.01)
        assert np.abs(large[: size[0], : size[1]] - own.astype(float)).mean() < 0.02


def test_a_ray_that_is_dark_counts_as_stopped() -> None:
    pool = plain_pool()
    pool.seen[:] = 1
    _, _, known = paint(pool, shot_of(POSE, (16, 16)))
    for s in pool.slot_of.values():
        pool.weights[s].reshape(-1)[volume.B3] += 4  # fifty times denser
    _, _, dense = paint(pool, shot_of(POSE, (16, 16)))
    met = known > 0
    assert met.mean() > 0.5
    assert dense[met].min() > 0.999
    assert known[met].min() < 0.99


def view(pose: Any, width: int = 24, height: int = 18) -> View:
    return View(Camera(width, height, 20.0, 20.0, width / 2, height / 2), pose)


def render(pool: ModulePool, pose: Any, gain: float = 0.0) -> Any:
    gains = np.full(3, gain, np.float32)
    return Renderer().render(pool, np.zeros(3), view(pose), gains)


def test_a_camera_that_looks_away_sees_grey(pool: ModulePool) -> None:
    away = render(pool, towards((8, 8, 14), (30, 8, 60)))
    assert (away.rgb == 128).all()
    assert (away.known == 0).all() and np.isnan(away.depth).all()


def test_unseen_matter_is_grey_and_exposure_is_a_factor() -> None:
    pool = plain_pool()
    pool.seen[:] = 0
    assert (render(pool, POSE).rgb == 128).all()
    pool.seen[:] = 1
    plain, brighter = render(pool, POSE), render(pool, POSE, gain=0.2)
    sure = (plain.known > 0.999) & (brighter.rgb.max(-1) < 255)
    assert sure.mean() > 0.2
    ratio = brighter.rgb[sure].astype(float) - np.exp(0.2) * plain.rgb[sure]
    assert np.abs(ratio).max() < 2


def test_threads_change_nothing() -> None:
    one, two = render(small.make_pool(1), POSE), render(small.make_pool(2), POSE)
    np.testing.assert_array_equal(one.rgb, two.rgb)
    np.testing.assert_array_equal(one.known, two.known)
