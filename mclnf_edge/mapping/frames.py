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
from mclnf_edge.images import decode_image, decode_mask, undistort, undistort_layer
from mclnf_edge.mapping.modules import Cell
from mclnf_edge.types import Frame

F32 = npt.NDArray[np.float32]
TILE = 16
"""Edge in pixels of the tiles by which a frame's rays are assigned to cells."""

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


def hold(
    frame_id: int,
    stream: str,
    frame: Frame,
    site: int,
    origin: npt.NDArray[np.float64],
    task: str,
) -> HeldFrame:
    """Decode, undistort and, where it is large, reduce a frame of a site with this origin (3,).

    Raises FrameRejected for a picture that cannot be decoded or has no two tiles a side.
    """
    image = decode_image(frame.image, frame.encoding, frame.camera)
    image, camera, valid = undistort(image, frame.camera)
    mask = np.where(valid, 255, 0).astype(np.uint8)
    if frame.mask is not None:
        published = decode_mask(frame.mask, frame.camera).astype(np.uint8)
        mask = np.where(undistort_layer(published, frame.camera) > 0, mask, 0).astype(np.uint8)
    scale = min(1.0, _MAX_EDGE_PX / max(camera.width, camera.height))
    if scale < 1:
        w, h = max(round(camera.width * scale), 1), max(round(camera.height * scale), 1)
        image = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA).astype(np.uint8)
        mask = cv2.resize(mask, (w, h), interpolation=cv2.INTER_NEAREST).astype(np.uint8)
        camera = camera.scaled(w, h)
    if min(camera.width, camera.height) < 2 * TILE:
        raise FrameRejected(
            f"image: expected at least {2 * TILE} pixels a side, received "
            f"{camera.width}x{camera.height}"
        )
    return HeldFrame(
        frame_id, stream, frame.seq, frame.timestamp, np.ascontiguousarray(image), mask,
        (camera.fx, camera.fy, camera.cx, camera.cy),
        frame.T_world_camera[:3, :3].astype(np.float32),
        (frame.T_world_camera[:3, 3] - origin).astype(np.float32), site, task,
        exposure=math.log(frame.exposure) if frame.exposure else math.nan,
    )  # fmt: skip


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
