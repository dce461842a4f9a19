"""Frozen records that travel between the parts. Arrays are numpy here; tensors begin in `maths`.

Axes, once for the whole package:

* World: metres, right-handed, z up. By default a local ENU frame (x east, y north, z up).
* Camera: OpenGL axes (x right, y up, the camera looks along -z).
* `T_world_camera` maps homogeneous camera points to world points, float64, last row 0 0 0 1.
* Pixel centres lie at +0.5: pixel (column i, row j) looks through (i + 0.5, j + 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

CameraModel = Literal["PINHOLE", "OPENCV", "OPENCV_FISHEYE"]
Encoding = Literal["jpeg", "png", "webp", "raw"]
SignalEncoding = Literal["jpeg", "png", "webp", "raw", "s16le", "f32le"]
Modality = Literal["posed", "image", "video", "audio"]
Split = Literal["train", "val", "test"]
ModuleState = Literal["open", "adapting", "closed", "quarantined"]

Matrix4 = npt.NDArray[np.float64]
"""A (4, 4) float64 rigid transform."""


@dataclass(frozen=True, slots=True)
class Camera:
    """Intrinsics in pixels of a picture `width` x `height`.

    `distortion` follows OpenCV: (k1, k2, p1, p2[, k3...]) for OPENCV, (k1, k2, k3, k4) for
    OPENCV_FISHEYE, empty for PINHOLE.
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    model: CameraModel = "PINHOLE"
    distortion: tuple[float, ...] = ()

    def scaled(self, width: int, height: int) -> Camera:
        """The same camera for the picture resized to `width` x `height` pixels."""
        sx, sy = width / self.width, height / self.height
        return Camera(
            width,
            height,
            self.fx * sx,
            self.fy * sy,
            self.cx * sx,
            self.cy * sy,
            self.model,
            self.distortion,
        )


@dataclass(frozen=True, slots=True)
class WorldFrame:
    """The frame a stream's poses are given in.

    `crs` is "local-enu" or "EPSG:<code>". Positions are relative to `origin`: for "local-enu" it is
    (latitude_deg, longitude_deg, altitude_m) or None for an anonymous frame; for a projected code
    (easting_m, northing_m, height_m). A geographic code's positions are latitude, longitude
    (degrees) and height (m) themselves; its origin, the same three, is where a map begins that has
    nothing yet. The table is in `mclnf_edge/world_frames.py`.
    """

    crs: str = "local-enu"
    origin: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Frame:
    """One posed picture as it is published, journalled and mapped.

    `image` holds the encoded bytes (for "raw": height*width*3 RGB bytes). `exposure` is the
    relative brightness this picture was taken with (shutter * ISO / aperture^2, any common scale)
    when known. `depth` is a 16-bit PNG of z-depth in units of `depth_scale_m`, 0 unknown. `mask` is
    an 8-bit PNG, 0 = ignore. `task` overrides the spatial or temporal task. `height_m` is the
    camera's height above ground. `meta` is whatever else the source knows; it does not travel.
    """

    seq: int
    timestamp: float
    image: bytes
    encoding: Encoding
    camera: Camera
    T_world_camera: Matrix4
    name: str = ""
    split: Split = "train"
    task: str | None = None
    exposure: float | None = None
    height_m: float | None = None
    depth: bytes | None = None
    depth_scale_m: float = 1e-3
    mask: bytes | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Signal:
    """One piece of a signal without pose: an image, a video frame or an audio chunk.

    `timestamp` is the position of the piece's start in seconds. `shape` is (height, width,
    channels) of a picture, (samples, channels) of audio. `rate_hz` is frames or samples a second.
    Audio is `s16le` or `f32le`, channels interleaved; a `raw` picture is its uint8 bytes.
    """

    seq: int
    timestamp: float
    data: bytes
    encoding: SignalEncoding
    shape: tuple[int, ...]
    rate_hz: float = 0.0
    name: str = ""
    split: Split = "train"
    task: str | None = None


@dataclass(frozen=True)
class ModuleSnapshot:
    """One module as it is committed: named arrays and a JSON-able description.

    `meta` carries at least `kind` (field family), `bounds` ([[x0, y0, z0], [x1, y1, z1]] metres in
    the map frame), `steps`, `frames` and `psnr`; `origin` (float64 x, y, z) is what was subtracted
    before the arrays' float32 coordinates begin.
    """

    id: str
    version: int
    arrays: dict[str, npt.NDArray[Any]]
    meta: dict[str, Any]


@dataclass(frozen=True)
class View:
    """A camera to render: where it stands, how large the picture, and when (for its exposure).

    `world` is the frame the pose is given in, None for that of the map's first stream.
    """

    camera: Camera
    T_world_camera: Matrix4
    timestamp: float | None = None
    stream: str = ""
    exposure: float | None = None
    world: WorldFrame | None = None


@dataclass(frozen=True)
class Render:
    """A rendered view.

    `rgb` (H, W, 3) uint8, unknown pixels mid-grey; `depth` (H, W) float32 z-depth in metres, NaN
    where unknown; `known` (H, W) float32 in [0, 1], the share of the ray's weight that lies in
    matter some module has seen.
    """

    rgb: npt.NDArray[np.uint8]
    depth: npt.NDArray[np.float32]
    known: npt.NDArray[np.float32]
    map_version: int = 0
    modules: tuple[str, ...] = ()
