"""Posed captures as episodes: rays of the training views by spatial cell, and held-out views.

Letters: T tasks (cells), N rays per task, V held-out views of H x W pixels. World metres until
`_rays`, from there the cube [-1, 1]^3 around the block.

A ray belongs to the cell where it meets the plane of the median ground height. Bounds (ground,
height band, box) are those of the whole block's training pictures, known before the first task:
unlike the daemon, which learns them as pictures arrive, these experiments compare methods only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch

from mclnf_edge.captures import Capture, Frames, open_capture
from mclnf_edge.errors import CaptureError, FrameRejected
from mclnf_edge.geometry import pixel_rays
from mclnf_edge.images import decode_depth, decode_image, decode_mask, undistort, undistort_layer
from mclnf_edge.types import Camera, Frame, Matrix4
from meta_trainer.episodes import Episode

Floats = npt.NDArray[np.float64]

BOUNDS = (
    "bounds of the whole block's training pictures, known before its first task: height band of "
    "the depth maps where there are any, else of points triangulated between neighbouring pictures"
)
"""Said beside every row of views."""

_FRAMES_FOR_BOUNDS = 24
_POINTS_PER_FRAME = 400
_FEWEST_POINTS = 30
_REACH = 4.0  # heights above ground after which a ray that meets none ends


@dataclass(frozen=True)
class View:
    """One picture (H, W, 3) uint8 with its pinhole camera; `mask` (H, W) where it counts."""

    rgb: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    camera: Camera
    pose: Matrix4


class Bounds(NamedTuple):
    """Heights in metres: of the ground (median), of the lowest and highest matter; and how far a
    ray without an end is followed."""

    ground: float
    low: float
    high: float
    reach: float


class Rays(NamedTuple):
    """World rays: origins, unit directions (R, 3), near and far (R,), where they meet the ground's
    plane (R, 2), all in metres; colours (R, 3) in 0..1."""

    origins: Floats
    directions: Floats
    near: Floats
    far: Floats
    foot: Floats
    colors: npt.NDArray[np.float32]


class Cells(NamedTuple):
    """Rectangles with equal shares of the training rays: `outer` borders along `axis`, and in each
    of those strips its own `inner` borders along the other axis."""

    axis: int
    outer: Floats
    inner: tuple[Floats, ...]

    def of(self, foot: Floats) -> npt.NDArray[np.int64]:
        """Number of the cell of points (R, 2)."""
        strip = np.searchsorted(self.outer, foot[:, self.axis])
        cell = strip * (len(self.inner[0]) + 1)
        for s, borders in enumerate(self.inner):
            cell[strip == s] += np.searchsorted(borders, foot[strip == s, 1 - self.axis])
        return cell


@lru_cache(maxsize=4)
def view_episode(path: Path, width: int, rays: int, held: int, tasks: int) -> Episode:
    """A capture as `tasks` spatial cells, with its held-out views to be measured on.

    Args:
        path: the capture, of any format `open_capture` reads.
        width: pictures are reduced to so many pixels across.
        rays: training rays per task, fewer where the pictures hold fewer.
        held: held-out views, spread over the test split; 0 for all.
        tasks: cells, as square a grid as the number allows.

    Raises:
        CaptureError: no training or test picture, or no ground to be found.
    """
    capture = open_capture(path)
    train, test = (capture.split(s).frames for s in ("train", "test"))
    if not len(train) or not len(test):
        raise CaptureError(f"{path}: expected training and test pictures, received {len(train)} "
                           f"and {len(test)}")  # fmt: skip
    bounds = find_bounds(capture, train)
    views = _views(train, width, path)
    random = np.random.default_rng(0)
    known = cast_rays(views, _draw(views, tasks * rays, random), bounds)
    cells = make_cells(known.foot, tasks)
    middle, half = _cube(known.foot, bounds)
    order = _equal_shares(cells.of(known.foot), tasks)
    coords = _rays(known, middle, half, random.random(len(known.near)))
    probe = _held(
        capture.name, _views(_spread(test, held), width, path), bounds, cells, middle, half
    )
    shape = (tasks, order.shape[1], 3)
    return Episode(
        capture.name, coords[order], torch.from_numpy(known.colors)[order],
        torch.arange(order.size).reshape(order.shape), shape, 0.0, 1.0, probe,
    )  # fmt: skip


def find_bounds(capture: Capture, train: Frames) -> Bounds:
    """Heights of the matter that the training pictures see.

    The band is the 0.5 to 99.5 percentile, a tenth wider on either side, of points from depth maps,
    or triangulated between neighbouring pictures where there are none.
    """
    frames = _spread(train, _FRAMES_FOR_BOUNDS)
    if all(r.depth is not None for r in frames.records):
        points = np.concatenate([_depth_points(f) for f in frames])
    else:
        points = _matched_points(train)
    if len(points) < _FEWEST_POINTS:
        raise CaptureError(
            f"{capture.name}: the height of the ground cannot be found: {len(points)} points "
            f"matched between training pictures, expected {_FEWEST_POINTS}; give depth maps"
        )
    low, ground, high = np.percentile(points[:, 2], [0.5, 50, 99.5])
    eyes = np.array([r.T_world_camera[:3, 3] for r in train.records])
    height = max(float(np.median(eyes[:, 2])) - ground, 1e-3)
    margin = max(0.1 * (high - low), 0.01 * height)
    reach = max(_REACH * height, float(np.linalg.norm(np.ptp(eyes[:, :2], axis=0))))
    return Bounds(float(ground), float(low - margin), float(high + margin), reach)


def cast_rays(views: Sequence[View], pixels: npt.NDArray[np.int64], bounds: Bounds) -> Rays:
    """The rays of `pixels` (R, 3): view, row, column. They run from the top of the height band to
    its bottom, or as far as they are followed."""
    parts = []
    for number in np.unique(pixels[:, 0]):
        view, here = views[number], pixels[pixels[:, 0] == number]
        origins, along = pixel_rays(view.camera, view.pose, here[:, :0:-1])
        directions = along.astype(np.float64)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        colors = view.rgb[here[:, 1], here[:, 2]].astype(np.float32) / 255
        near, far, at = _interval(origins[:, 2], directions[:, 2], bounds)
        foot = (origins + at[:, None] * directions)[:, :2]
        parts.append(Rays(origins, directions, near, far, foot, colors))
    return Rays(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _interval(z: Floats, down: Floats, bounds: Bounds) -> tuple[Floats, Floats, Floats]:
    """Distances (R,) where rays from height z enter the band, leave it, and meet the ground."""
    falls = np.minimum(down, -1e-6)

    def at(height: float) -> Floats:
        return np.clip((height - z) / falls, 0, bounds.reach)

    far = np.maximum(at(bounds.low), 1e-3 * bounds.reach)
    return np.minimum(at(bounds.high), 0.9 * far), far, at(bounds.ground)


def make_cells(foot: Floats, tasks: int) -> Cells:
    """Borders of `tasks` cells, more of them along the longer side, by quantiles of points (R, 2).

    Equal shares rather than equal areas: real flights are neither rectangles nor axis-aligned, and
    every task must hold as many rays as the next. On MatrixCity's rectangles both agree.
    """
    fewer = max(r for r in range(1, math.isqrt(tasks) + 1) if tasks % r == 0)
    axis = int(np.argmax(np.ptp(foot, axis=0)))
    outer = _borders(foot[:, axis], tasks // fewer)
    strip = np.searchsorted(outer, foot[:, axis])
    inner = [_borders(foot[strip == s, 1 - axis], fewer) for s in range(tasks // fewer)]
    return Cells(axis, outer, tuple(inner))


def _borders(values: Floats, parts: int) -> Floats:
    return np.asarray(np.quantile(values, np.arange(1, parts) / parts), np.float64)


def _cube(foot: Floats, bounds: Bounds) -> tuple[Floats, float]:
    """Middle (3,) and half edge, metres, of the cube around the ground that the rays meet."""
    low, high = np.percentile(foot, [1, 99], axis=0)
    box = np.array([[*low, bounds.low], [*high, bounds.high]])
    return box.mean(0), float(np.ptp(box, axis=0).max() / 2)


def _equal_shares(cell: npt.NDArray[np.int64], tasks: int) -> npt.NDArray[np.int64]:
    """(T, N) numbers of rays: those of each cell, as many of each as the smallest has."""
    members = [np.flatnonzero(cell == t) for t in range(tasks)]
    return np.stack([m[: min(map(len, members))] for m in members])


def _rays(rays: Rays, middle: Floats, half: float, shift: Floats) -> torch.Tensor:
    """(R, RAY) for `RayField`."""
    lengths = np.stack([rays.near / half, rays.far / half, shift], axis=1)
    columns = [(rays.origins - middle) / half, rays.directions, lengths]
    return torch.from_numpy(np.concatenate(columns, axis=1).astype(np.float32))


def _held(
    name: str, views: Sequence[View], bounds: Bounds, cells: Cells, middle: Floats, half: float
) -> Episode:
    """All pixels of the held-out views by cell; shorter tasks are filled up with rays that go to no
    pixel (`Episode.order`)."""
    mask = np.stack([v.mask for v in views])
    rays = cast_rays(views, np.argwhere(mask), bounds)
    coords = _rays(rays, middle, half, np.full(len(rays.near), 0.5))
    cell, places = cells.of(rays.foot), np.flatnonzero(mask)
    tasks = len(cells.inner) * (len(cells.inner[0]) + 1)
    members = [np.flatnonzero(cell == t) for t in range(tasks)]
    order = np.full((tasks, max(map(len, members))), mask.size)
    which = np.zeros_like(order)
    for task, own in enumerate(members):
        which[task, : len(own)], order[task, : len(own)] = own, places[own]
    values = torch.from_numpy(rays.colors)[which]
    return Episode(name, coords[which], values, torch.from_numpy(order), (*mask.shape, 3), 0.0, 1.0)


def _draw(views: Sequence[View], count: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """(R, 3) view, row, column of at most `count` pixels that count, ordered by view."""
    where = np.flatnonzero(np.stack([v.mask for v in views]))
    if len(where) > count:
        where = random.permutation(random.choice(where, count, replace=False))
    shape = (len(views), *views[0].mask.shape)
    return np.stack(np.unravel_index(where, shape), axis=1)


def _spread(frames: Frames, count: int) -> Frames:
    """`count` frames at even distances, all for 0."""
    if not 0 < count < len(frames):
        return frames
    places = (np.arange(count) + 0.5) * len(frames) / count
    return Frames([frames.records[int(k)] for k in places])


def _views(frames: Frames, width: int, path: Path) -> list[View]:
    """Pictures undistorted and reduced to `width`; CaptureError where their sizes differ."""
    try:
        views = [_view(frame, width) for frame in frames]
    except FrameRejected as error:
        raise CaptureError(f"{path}: {error}") from None
    if len(sizes := {v.mask.shape for v in views}) > 1:
        raise CaptureError(f"{path}: expected pictures of one shape, received {sorted(sizes)}")
    return views


def _view(frame: Frame, width: int) -> View:
    rgb, camera, mask = undistort(
        decode_image(frame.image, frame.encoding, frame.camera), frame.camera
    )
    if frame.mask is not None:
        given = decode_mask(frame.mask, frame.camera).astype(np.uint8)
        mask &= undistort_layer(given, frame.camera) > 0
    if width < camera.width:
        size = (width, max(round(camera.height * width / camera.width), 1))
        camera = camera.scaled(*size)
        rgb = np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
        mask = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    return View(rgb, mask, camera, frame.T_world_camera)


def _depth_points(frame: Frame) -> Floats:
    """(n, 3) world points at a grid of pixels of a frame's depth map."""
    assert frame.depth is not None
    depth = decode_depth(frame.depth, frame.depth_scale_m, frame.camera)
    layer, camera = depth, undistort(np.zeros((*depth.shape, 3), np.uint8), frame.camera)[1]
    if frame.camera != camera:
        layer = undistort_layer(depth, frame.camera)
    step = max(1, math.isqrt(layer.size // _POINTS_PER_FRAME))
    rows, columns = np.nonzero(np.isfinite(layer[::step, ::step]))
    origins, along = pixel_rays(camera, frame.T_world_camera, np.stack([columns, rows], 1) * step)
    return np.asarray(origins + along * layer[rows * step, columns * step, None], np.float64)


def _matched_points(train: Frames) -> Floats:
    """(n, 3) world points matched between neighbours in capture order.

    Heights more than four interquartile ranges outside the middle half are wrong matches.
    """
    from mclnf_edge.mapping.frames import hold, triangulate  # compiles kernels

    origin = train.records[0].T_world_camera[:3, 3]
    starts = _spread(Frames(train.records[:-1]), _FRAMES_FOR_BOUNDS // 2).records
    after = {a.seq: b for a, b in zip(train.records, train.records[1:], strict=False)}
    found = [np.zeros((0, 3))]
    for first in starts:
        pair = [hold(0, "", f, 0, origin, "") for f in Frames([first, after[first.seq]])]
        found.append(triangulate(*pair) + origin)
    points = np.concatenate(found)
    if not len(points):
        return points
    low, high = np.percentile(points[:, 2], [25, 75])
    beyond = np.maximum(low - points[:, 2], points[:, 2] - high)
    return np.asarray(points[beyond <= 4 * (high - low)], np.float64)
