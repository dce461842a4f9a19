"""A textured square of ground with blocks on it, ray-cast in NumPy: pictures, heights and poses.

Also what 96-pixel tests need: pinhole poses that look down, and frames as a publisher sends them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from mclnf_edge.images import encode_image
from mclnf_edge.types import Camera, Frame, Matrix4

F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]
EXTENT_M = 120.0
"""The texture covers +-60 m; beyond it repeats its border."""

_TEXELS = 1024


@dataclass
class Ground:
    """Ground at height `level` with `blocks` (x0, y0, x1, y1, height above ground) in metres."""

    level: float = 0.0
    blocks: tuple[tuple[float, float, float, float, float], ...] = ()
    seed: int = 0
    texture: npt.NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        total = np.zeros((_TEXELS, _TEXELS, 3), np.float32)
        for size, share in ((8, 0.25), (32, 0.3), (128, 0.3), (400, 0.15)):
            noise = random.uniform(0, 1, (size, size, 3)).astype(np.float32)
            total += share * cv2.resize(noise, (_TEXELS, _TEXELS), interpolation=cv2.INTER_CUBIC)
        self.texture = ((total - total.mean()) * 1.8 + 0.5).clip(0.04, 0.96)

    def height(self, x: F64, y: F64) -> F64:
        """Surface height at points."""
        z = np.full(np.shape(x), self.level)
        for x0, y0, x1, y1, h in self.blocks:
            inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
            z = np.where(inside, np.maximum(z, self.level + h), z)
        return z

    def cast(self, eye: F64, directions: F64) -> tuple[F64, F64]:
        """(colour (n, 3) in 0..1, distance (n,)) along unit directions (n, 3) that look down."""
        t = (self.level - eye[2]) / directions[:, 2]
        for x0, y0, x1, y1, h in self.blocks:
            with np.errstate(divide="ignore"):
                low = (np.array([x0, y0, self.level]) - eye) / directions
                high = (np.array([x1, y1, self.level + h]) - eye) / directions
            near, far = np.minimum(low, high).max(1), np.maximum(low, high).min(1)
            t = np.where((near < far) & (near > 0), np.minimum(t, near), t)
        p = eye + t[:, None] * directions
        # A wall shows the texture of what stands above it, shifted with height.
        rise = p[:, 2] - self.level
        return self._texture_at(p[:, 0] + 0.7 * rise, p[:, 1] + 0.4 * rise), t

    def _texture_at(self, x: F64, y: F64) -> F64:
        u = ((x / EXTENT_M + 0.5) * _TEXELS - 0.5).clip(0, _TEXELS - 1.001)
        v = ((y / EXTENT_M + 0.5) * _TEXELS - 0.5).clip(0, _TEXELS - 1.001)
        i, j = u.astype(int), v.astype(int)
        a, b = (u - i)[:, None], (v - j)[:, None]
        low = (1 - a) * self.texture[j, i] + a * self.texture[j, i + 1]
        high = (1 - a) * self.texture[j + 1, i] + a * self.texture[j + 1, i + 1]
        return np.asarray((1 - b) * low + b * high, np.float64)


def camera(width: int = 96, height: int = 64) -> Camera:
    """A pinhole camera whose footprint is as wide as 1.1 times the height it flies at."""
    focal = width / 1.1
    return Camera(width, height, focal, focal, width / 2, height / 2)


def pose(x: float, y: float, z: float, tilt: float = 0.0, turn: float = 0.0) -> Matrix4:
    """Camera-to-world of a camera that looks straight down, tilted and turned (radians)."""
    ct, st, cr, sr = np.cos(tilt), np.sin(tilt), np.cos(turn), np.sin(turn)
    T = np.eye(4)
    T[:3, :3] = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, ct, -st], [0, st, ct]]
    )
    T[:3, 3] = x, y, z
    return T


def picture(ground: Ground, cam: Camera, T: Matrix4, fine: int = 2) -> U8:
    """(H, W, 3) uint8 picture, `fine` x `fine` rays a pixel."""
    w, h = cam.width * fine, cam.height * fine
    column, row = np.meshgrid((np.arange(w) + 0.5) / fine, (np.arange(h) + 0.5) / fine)
    d = np.stack([(column - cam.cx) / cam.fx, -(row - cam.cy) / cam.fy, -np.ones_like(row)], -1)
    d = d.reshape(-1, 3) @ T[:3, :3].T
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    color = ground.cast(T[:3, 3], d)[0].reshape(h, w, 3)
    small = cv2.resize(color, (cam.width, cam.height), interpolation=cv2.INTER_AREA)
    return (small * 255 + 0.5).astype(np.uint8)


def poses(n: int, height: float = 30.0, across: float = 12.0, step: float = 5.0) -> list[Matrix4]:
    """A flight of two lines, there and back, slightly tilted."""
    half = (n + 1) // 2
    out = []
    for i in range(n):
        line, k = divmod(i, half)
        x = (k - (half - 1) / 2) * step * (1 - 2 * line)
        out.append(pose(x, (line - 0.5) * across, height, 0.12 * (-1) ** i, 0.3 * line))
    return out


def frame(cam: Camera, T: Matrix4, pixels: U8, seq: int, height_m: float | None = None) -> Frame:
    """A frame as a publisher sends it, losslessly encoded."""
    return Frame(seq, 0.5 * seq, encode_image(pixels, "png"), "png", cam, T, height_m=height_m)


def projection(cam: Camera, T: Matrix4) -> F64:
    """(3, 4) matrix from world metres to pixels, centres at +0.5."""
    K = np.array([[cam.fx, 0, cam.cx], [0, cam.fy, cam.cy], [0, 0, 1]])
    down = np.diag([1.0, -1.0, -1.0, 1.0]) @ np.linalg.inv(T)
    return np.asarray(K @ down[:3])
