"""Frames of open tasks, held in memory as the optimizer and the surface sweep need them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from mclnf_edge.engine.surface import normalised
from mclnf_edge.errors import FrameRejected
from mclnf_edge.images import (
    check_decodes,
    decode_depth,
    decode_image,
    decode_mask,
    reduced,
    undistort,
    undistort_layer,
)
from mclnf_edge.mapping.modules import Cell
from mclnf_edge.types import Camera, Frame

F32 = npt.NDArray[np.float32]
TILE = 16
"""Edge in pixels of the tiles by which a frame's rays are assigned to cells."""

_DEPTH_GRID = 16
"""Points across and down that are taken from a depth picture: heights, not surfaces, are wanted."""
_MAX_EDGE_PX = 960
"""Larger pictures are reduced to this width or height before they are held."""


@dataclass
class HeldFrame:
    """One undistorted picture in the map's local frame.

    `image` (H, W, 3) uint8 RGB, `mask` (H, W) uint8 (0 = ignore), `K` = (fx, fy, cx, cy) pixels,
    `rotation` (3, 3) camera (OpenGL axes) to world, `eye` (3,) local metres, `gain` (3,) natural
    logarithm of the exposure. `tiles` maps each cell to the tile indices whose rays reach it,
    `band` is the lowest and highest z of those cells' modules. `site` is the part of the world it
    was taken in, `task` what the publisher or the clock call its task, `arrived` monotonic seconds.
    An `anchored` frame's gain came from closed modules. `brightness` and `exposure` are natural
    logarithms of the picture's mean and of what its metadata says, NaN where unknown.
    """

    id: int
    stream: str
    seq: int
    timestamp: float
    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    K: tuple[float, float, float, float]
    rotation: F32
    eye: F32
    site: int = 0
    task: str = ""
    arrived: float = field(default_factory=time.monotonic)
    gain: F32 = field(default_factory=lambda: np.zeros(3, np.float32))
    tiles: dict[Cell, npt.NDArray[np.int32]] = field(default_factory=dict)
    band: tuple[float, float] = (0.0, 0.0)
    rays: int = 0
    anchored: bool = False
    exposure: float = math.nan
    brightness: float = field(init=False)
    half: F32 = field(init=False)
    keypoints: F32 = field(init=False)
    descriptors: npt.NDArray[np.uint8] | None = field(init=False)

    def __post_init__(self) -> None:
        self.half = normalised(self.image)
        mean = float(np.mean(cv2.mean(self.image, self.mask)[:3])) / 255
        self.brightness = math.log(mean) if mean > 0 else math.nan
        gray = cv2.cvtColor(self.image, cv2.COLOR_RGB2GRAY)
        points, descriptors = cv2.ORB.create(nfeatures=600, fastThreshold=8).detectAndCompute(
            gray, self.mask
        )
        self.keypoints = np.array([p.pt for p in points], np.float32).reshape(-1, 2)
        self.descriptors = None if descriptors is None else np.asarray(descriptors, np.uint8)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.image.shape[1], self.image.shape[0]

    @property
    def tile_count(self) -> int:
        """How many tiles the picture has."""
        return max(self.size[0] // TILE, 1) * max(self.size[1] // TILE, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of memory this frame holds."""
        return self.image.nbytes + self.mask.nbytes + self.half.nbytes

    def projection(self, scale: float = 1.0) -> F32:
        """(3, 4) matrix from local metres to pixels of the picture scaled by `scale`.

        Pixel centres lie at +0.5, depth is the third row's value.
        """
        fx, fy, cx, cy = (v * scale for v in self.K)
        k = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        r = (self.rotation.astype(np.float64) @ np.diag([1.0, -1.0, -1.0])).T
        t = -r @ self.eye.astype(np.float64)
        matrix: F32 = (k @ np.concatenate([r, t[:, None]], axis=1)).astype(np.float32)
        return matrix

    def directions(self, columns: F32, rows: F32) -> F32:
        """(n, 3) unit directions through the points (column, row) in pixels (centres at +0.5)."""
        fx, fy, cx, cy = self.K
        v = np.stack([(columns - cx) / fx, -(rows - cy) / fy, -np.ones_like(columns)], axis=-1)
        v = v @ self.rotation.T
        out: F32 = (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)
        return out

    def tile_directions(self) -> tuple[F32, tuple[int, int]]:
        """Directions through every tile's centre, row by row, and (tiles across, tiles down)."""
        w, h = self.size
        across, down = max(w // TILE, 1), max(h // TILE, 1)
        u = (np.arange(across) + 0.5) * (w / across)
        v = (np.arange(down) + 0.5) * (h / down)
        columns, rows = np.meshgrid(u.astype(np.float32), v.astype(np.float32))
        return self.directions(columns.ravel(), rows.ravel()), (across, down)


def check_size(camera: Camera) -> None:
    """Raise FrameRejected for a picture that would be held with less than two tiles a side."""
    scale = min(1.0, _MAX_EDGE_PX / max(camera.width, camera.height))
    if round(min(camera.width, camera.height) * scale) < 2 * TILE:
        held = "" if scale == 1 else f" (held at {_MAX_EDGE_PX} pixels for the longer side)"
        raise FrameRejected(
            f"image: expected at least {2 * TILE} pixels a side{held}, received "
            f"{camera.width}x{camera.height}"
        )


def check_frame(frame: Frame) -> None:
    """Raise FrameRejected for pictures that cannot be held: image, mask or depth."""
    check_size(frame.camera)
    check_decodes(frame.image, frame.encoding, frame.camera)
    layer = "mask"
    try:
        if frame.mask is not None:
            decode_mask(frame.mask, frame.camera)
        layer = "depth"
        if frame.depth is not None:
            decode_depth(frame.depth, frame.depth_scale_m, frame.camera)
    except FrameRejected as error:
        raise FrameRejected(f"{layer}: {str(error).split(': ', 1)[-1]}") from None


def hold(
    frame_id: int,
    stream: str,
    frame: Frame,
    site: int,
    origin: npt.NDArray[np.float64],
    task: str,
) -> HeldFrame:
    """Decode, undistort and, where it is large, reduce a frame of a site with this origin (3,).

    Raises FrameRejected for a frame that `check_frame` refuses.
    """
    check_size(frame.camera)
    image = decode_image(frame.image, frame.encoding, frame.camera)
    image, camera, valid = undistort(image, frame.camera)
    if frame.mask is not None:
        valid = valid & undistort_layer(decode_mask(frame.mask, frame.camera), frame.camera)
    image, camera, valid = reduced(image, camera, valid, _MAX_EDGE_PX)
    mask = np.where(valid, 255, 0).astype(np.uint8)
    return HeldFrame(
        frame_id, stream, frame.seq, frame.timestamp, np.ascontiguousarray(image), mask,
        (camera.fx, camera.fy, camera.cx, camera.cy),
        frame.T_world_camera[:3, :3].astype(np.float32),
        (frame.T_world_camera[:3, 3] - origin).astype(np.float32), site, task,
        exposure=math.log(frame.exposure) if frame.exposure else math.nan,
    )  # fmt: skip


def depth_points(frame: Frame, held: HeldFrame) -> F32:
    """(n, 3) points, local metres, on a grid over a frame's depth picture; none without one."""
    if frame.depth is None:
        return np.zeros((0, 3), np.float32)
    depth = decode_depth(frame.depth, frame.depth_scale_m, frame.camera)
    depth = undistort_layer(depth, frame.camera)
    across, down = held.size
    columns, rows = np.meshgrid(
        (np.arange(_DEPTH_GRID) + 0.5) * (across / _DEPTH_GRID),
        (np.arange(_DEPTH_GRID) + 0.5) * (down / _DEPTH_GRID),
    )
    right, lower = frame.camera.width / across, frame.camera.height / down
    z = depth[(rows * lower).astype(int), (columns * right).astype(int)].ravel()
    rays = held.directions(columns.ravel().astype(np.float32), rows.ravel().astype(np.float32))
    along = z / -(rays @ held.rotation[:, 2])
    good = np.isfinite(z) & (z > 0)
    points: F32 = held.eye + rays[good] * along[good, None]
    return points.astype(np.float32)


def triangulate(a: HeldFrame, b: HeldFrame) -> F32:
    """(n, 3) points, local metres, of features matched between two frames with known poses.

    Kept: mutual best ORB matches, in front of both cameras, reprojected within 1.5 px, seen under
    an angle of at least 1.5 degrees.
    """
    none = np.zeros((0, 3), np.float32)
    if a.descriptors is None or b.descriptors is None:
        return none
    matches = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True).match(a.descriptors, b.descriptors)
    if len(matches) < 4:
        return none
    pa = np.array([a.keypoints[m.queryIdx] for m in matches], np.float64) + 0.5
    pb = np.array([b.keypoints[m.trainIdx] for m in matches], np.float64) + 0.5
    # Eyes are far from the local origin: solve around the midpoint, where float64 is exact enough.
    Pa, Pb = a.projection().astype(np.float64), b.projection().astype(np.float64)
    x = cv2.triangulatePoints(Pa, Pb, pa.T, pb.T)
    with np.errstate(divide="ignore", invalid="ignore"):
        points = (x[:3] / x[3]).T
    good = np.isfinite(points).all(axis=1)
    points = np.where(good[:, None], points, 0)
    for P, pixels in ((Pa, pa), (Pb, pb)):
        q = points @ P[:, :3].T + P[:, 3]
        depth = np.maximum(q[:, 2:], 1e-6)
        good &= (q[:, 2] > 0.5) & (np.linalg.norm(q[:, :2] / depth - pixels, axis=1) < 1.5)
    va, vb = points - a.eye, points - b.eye
    cosine = (va * vb).sum(1) / np.maximum(
        np.linalg.norm(va, axis=1) * np.linalg.norm(vb, axis=1), 1e-9
    )
    good &= cosine < np.cos(np.radians(1.5))
    kept: F32 = points[good].astype(np.float32)
    return kept
