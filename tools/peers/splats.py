"""3D Gaussian splats of a PLY file as a picture: Kerbl et al. 2023, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from mclnf_edge.types import Camera
from tools.peers.project import RGB, PeerError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

BLUR_PX2 = 0.3
"""Added to every splat's variance on the picture: none is thinner than a pixel."""
NEAR = 1e-3
FAINTEST = 1 / 255
CLOSED = 1e-4
"""A ray ends where less than this share of light comes through."""


class Splats(NamedTuple):
    """n Gaussians in world units: centres, axes' standard deviations, (w, x, y, z), opacity, and
    spherical harmonics (n, 1 + rest, 3) of the colour."""

    at: F64
    scale: F64
    rotation: F64
    opacity: F64
    colour: F64


def read(path: Path) -> Splats:
    """The splats of a PLY file with the usual property names; PeerError for another file."""
    head, mark, body = path.read_bytes().partition(b"end_header\n")
    words = [line.split() for line in head.decode("ascii", "replace").splitlines()]
    names = [w[2] for w in words if w[:2] == ["property", "float"]]
    counts = [int(w[2]) for w in words if w[:2] == ["element", "vertex"]]
    if not mark or len(counts) != 1 or "f_dc_0" not in names or "rot_3" not in names:
        raise PeerError(f"{path.name}: expected splats in a binary PLY file")
    table = np.frombuffer(body, "<f4", counts[0] * len(names)).reshape(counts[0], len(names))
    rest = sum(name.startswith("f_rest_") for name in names) // 3

    def columns(*wanted: str) -> F64:
        return table[:, [names.index(name) for name in wanted]].astype(np.float64)

    base = columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None]
    others = columns(*(f"f_rest_{i}" for i in range(3 * rest))).reshape(-1, 3, rest)
    turn = columns("rot_0", "rot_1", "rot_2", "rot_3")
    return Splats(
        columns("x", "y", "z"),
        np.exp(columns("scale_0", "scale_1", "scale_2")),
        turn / np.linalg.norm(turn, axis=1, keepdims=True),
        1 / (1 + np.exp(-columns("opacity")[:, 0])),
        np.concatenate([base, others.transpose(0, 2, 1)], 1),
    )


def render(
    splats: Splats,
    camera: Camera,
    pose: F64,
    background: tuple[float, ...],
    key: F32 | None = None,
) -> RGB:
    """The picture (H, W, 3) of a pinhole camera; `pose` camera-to-world, OpenGL axes.

    `background` is the colour (0..1) behind everything. Splats are blended in the order of their
    `key` (n,), of their depth where there is none.
    """
    turn = facing(pose)
    x, y, z = turn @ (splats.at - pose[:3, 3]).T
    front = np.flatnonzero(z > NEAR)
    order = front[np.argsort((z if key is None else key)[front], kind="stable")]
    x, y, z = x[order], y[order], z[order]
    spread = (turn @ turns(splats.rotation[order])) * splats.scale[order, None]
    covariance = spread @ spread.transpose(0, 2, 1)
    slope = np.zeros((len(order), 2, 3))
    across, down = 0.65 * camera.width / camera.fx, 0.65 * camera.height / camera.fy
    slope[:, 0, 0], slope[:, 1, 1] = camera.fx / z, camera.fy / z
    slope[:, 0, 2] = -camera.fx * np.clip(x / z, -across, across) / z
    slope[:, 1, 2] = -camera.fy * np.clip(y / z, -down, down) / z
    flat = slope @ covariance @ slope.transpose(0, 2, 1)
    flat[:, 0, 0] += BLUR_PX2
    flat[:, 1, 1] += BLUR_PX2
    centre = np.stack([camera.fx * x / z + camera.cx, camera.fy * y / z + camera.cy], 1) - 0.5
    looking = splats.at[order] - pose[:3, 3]
    looking /= np.linalg.norm(looking, axis=1, keepdims=True)
    colour = np.einsum("nk,nkc->nc", harmonics(looking, splats.colour), splats.colour[order])
    rgb = np.zeros((camera.height, camera.width, 3))
    through = np.ones((camera.height, camera.width))
    paint(  # type: ignore[call-arg, type-var]
        centre, flat, np.maximum(colour + 0.5, 0), splats.opacity[order], rgb, through
    )
    rgb += through[..., None] * np.asarray(background)
    shown: RGB = np.round(np.clip(rgb, 0, 1) * 255).astype(np.uint8)
    return shown


def facing(pose: F64) -> F64:
    """World to camera rotation, x right, y down, z ahead, of a camera-to-world OpenGL pose."""
    turned: F64 = (pose[:3, :3] * [1, -1, -1]).T
    return turned


def turns(quaternions: F64) -> F64:
    """Rotation matrices (n, 3, 3) of unit quaternions (n, 4), w first."""
    w, x, y, z = quaternions.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def harmonics(looking: F64, colour: F64) -> F64:
    """Real spherical harmonics (n, k) of unit directions, k as many as `colour` has."""
    x, y, z = looking.T
    basis = [
        0.28209479177387814 * np.ones_like(x),
        *(0.4886025119029199 * v for v in (-y, z, -x)),
        *(1.0925484305920792 * v for v in (x * y, -y * z)),
        0.31539156525252005 * (3 * z * z - 1),
        -1.0925484305920792 * x * z,
        0.5462742152960396 * (x * x - y * y),
        -0.5900435899266435 * y * (3 * x * x - y * y),
        2.890611442640554 * x * y * z,
        -0.4570457994644658 * y * (5 * z * z - 1),
        0.3731763325901154 * z * (5 * z * z - 3),
        -0.4570457994644658 * x * (5 * z * z - 1),
        1.445305721320277 * z * (x * x - y * y),
        -0.5900435899266435 * x * (x * x - 3 * y * y),
    ]
    return np.stack(basis[: colour.shape[1]], 1)


@numba.njit
def paint(
    centre: F64, covariance: F64, colour: F64, opacity: F64, rgb: F64, through: F64
) -> None:  # pragma: no cover - compiled
    """Blend splats, nearest first, into `rgb`; `through` is the light that is left, in place."""
    height, width = through.shape
    for k in range(len(centre)):
        xx, xy, yy = covariance[k, 0, 0], covariance[k, 0, 1], covariance[k, 1, 1]
        area = max(xx * yy - xy * xy, 1e-6)
        wide, tall = 3 * np.sqrt(xx) + 2, 3 * np.sqrt(yy) + 2
        left, right = max(int(centre[k, 0] - wide), 0), min(int(centre[k, 0] + wide) + 1, width)
        top, bottom = max(int(centre[k, 1] - tall), 0), min(int(centre[k, 1] + tall) + 1, height)
        for row in range(top, bottom):
            for column in range(left, right):
                if through[row, column] < CLOSED:
                    continue
                dx, dy = centre[k, 0] - column, centre[k, 1] - row
                power = 0.5 * (yy * dx * dx + xx * dy * dy) / area - xy * dx * dy / area
                alpha = min(0.999, opacity[k] * np.exp(-power))
                if power < 0 or alpha < FAINTEST:
                    continue
                share = alpha * through[row, column]
                for channel in range(3):
                    rgb[row, column, channel] += share * colour[k, channel]
                through[row, column] -= share
