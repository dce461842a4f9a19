"""World frames: which are known, and how poses go from one to another. float64 throughout.

| `crs`                     | a pose's position is                      | its rotation is against |
|---------------------------|-------------------------------------------|-------------------------|
| `local-enu`, origin       | east, north, up (m) from the origin       | the origin's ENU axes   |
| `local-enu`, no origin    | metres from somewhere                     | axes that nobody knows  |
| `EPSG:` projected, metres | easting, northing, height (m) - origin    | the grid's axes there   |
| `EPSG:` geographic        | latitude, longitude (degrees), height (m) | ENU at that position    |
| `EPSG:4978`               | ECEF (m)                                  | the ECEF axes           |

Between frames of different kind a pose goes through WGS84 ECEF, each by itself: its position
exactly, its rotation by the orthonormal part of the frames' Jacobians there, which is the grid's
convergence and the turn of the tangent plane. What a grid stretches cannot be in a rigid pose: its
metre is no metre (0.9996 in the middle of a UTM zone). Positions carry the stretch, cameras and
depth maps do not, so poses are never given in a frame that stretches by more than MAX_STRETCH.

Heights of two-dimensional codes are above the ellipsoid. Datums are as exact as PROJ knows them
without grid files; where it has only a guess ("ballpark") the frame is refused. pyproj is needed
where EPSG frames are converted or a map begins in one: by the daemon, never by a client.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import numpy as np

from mclnf_edge.errors import FrameRejected
from mclnf_edge.geometry import (
    MAX_COORDINATE_M,
    FloatArray,
    invert_pose,
    nearest_rotation,
    pose_from,
)
from mclnf_edge.types import Matrix4, WorldFrame

Convert = Callable[[Matrix4], Matrix4]
"""Takes a camera-to-world pose of one frame, returns it in another; raises FrameRejected."""

LOCAL: Final = "local-enu"
GEOGRAPHIC: Final = frozenset({4258, 4269, 4326, 4937, 4979, 6319})
"""Latitude, longitude, height of WGS84, ETRS89 and NAD83: what a client knows without pyproj."""
MAX_STRETCH: Final = 5e-3
"""Largest difference of a target frame's scale from 1; UTM stays below 1e-3 in its zone."""

_WGS84_A: Final = 6_378_137.0
_WGS84_F: Final = 1.0 / 298.257_223_563
_WGS84_E2: Final = _WGS84_F * (2.0 - _WGS84_F)
_STEP_M: Final = 100.0
"""Half the base of difference quotients: iterative projections are exact to 1e-4 m or better."""
_STEP_DEG: Final = 1e-3


def ecef_from_geodetic(latitude_deg: float, longitude_deg: float, altitude_m: float) -> FloatArray:
    """WGS84 ECEF position (3,) in metres of a point above the ellipsoid.

    With the prime vertical radius N = a / sqrt(1 − e² sin²φ):
    x = (N + h) cos φ cos λ, y = (N + h) cos φ sin λ, z = (N (1 − e²) + h) sin φ.
    """
    phi, lam = math.radians(latitude_deg), math.radians(longitude_deg)
    n = _WGS84_A / math.sqrt(1.0 - _WGS84_E2 * math.sin(phi) ** 2)
    across = (n + altitude_m) * math.cos(phi)
    up = (n * (1.0 - _WGS84_E2) + altitude_m) * math.sin(phi)
    return np.array([across * math.cos(lam), across * math.sin(lam), up])


def ecef_from_enu(latitude_deg: float, longitude_deg: float, altitude_m: float) -> Matrix4:
    """`T_ecef_enu` of the ENU frame at a geodetic origin; its columns are east, north and up."""
    phi, lam = math.radians(latitude_deg), math.radians(longitude_deg)
    sin_phi, cos_phi, sin_lam, cos_lam = math.sin(phi), math.cos(phi), math.sin(lam), math.cos(lam)
    rotation = [
        [-sin_lam, -sin_phi * cos_lam, cos_phi * cos_lam],
        [cos_lam, -sin_phi * sin_lam, cos_phi * sin_lam],
        [0.0, cos_phi, sin_phi],
    ]
    return pose_from(rotation, ecef_from_geodetic(latitude_deg, longitude_deg, altitude_m))


def code_of(world: WorldFrame) -> int | None:
    """The number of an EPSG frame, None for a local one."""
    epsg = re.fullmatch(r"EPSG:(\d{4,6})", world.crs)
    return None if epsg is None else int(epsg[1])


def check_world(world: WorldFrame) -> WorldFrame:
    """Return `world` when its name and origin have a meaning; FrameRejected otherwise.

    Whether an EPSG code exists is not asked here: clients know no registry.
    """
    code = code_of(world)
    if world.crs != LOCAL and code is None:
        raise FrameRejected(
            f"world frame: expected 'local-enu' or 'EPSG:<code>', received {world.crs!r}"
        )
    if world.origin is not None:
        _check_origin(world.origin, geodetic=code is None or code in GEOGRAPHIC)
    return world


def _check_origin(origin: tuple[float, float, float], *, geodetic: bool) -> None:
    limits = (90.0, 180.0, 1e6) if geodetic else (MAX_COORDINATE_M,) * 3
    names = "latitude, longitude, altitude" if geodetic else "easting, northing, height"
    if len(origin) != 3 or not all(
        abs(value) <= limit for value, limit in zip(origin, limits, strict=True)
    ):
        raise FrameRejected(f"world frame: expected origin ({names}), received {origin}")


def parse_world(text: str) -> WorldFrame:
    """`EPSG:32633`, `EPSG:32633@E,N,H` or `ENU@LAT,LON,ALT`; raises FrameRejected."""
    name, _, place = text.partition("@")
    try:
        numbers = tuple(float(word) for word in place.split(",")) if place else None
    except ValueError:
        numbers = ()
    if numbers is not None and len(numbers) != 3 or (name == "ENU" and not numbers):
        raise FrameRejected(
            "world frame: expected EPSG:CODE, EPSG:CODE@E,N,H or ENU@LAT,LON,ALT, "
            f"received {text!r}"
        )
    origin = None if numbers is None else (numbers[0], numbers[1], numbers[2])
    return check_world(WorldFrame(LOCAL if name == "ENU" else name, origin))


def beginning_at(world: WorldFrame, pose: Matrix4) -> WorldFrame:
    """`world`, with a pose's position as its origin where it is geographic and names none."""
    if world.origin is not None or code_of(world) not in GEOGRAPHIC:
        return world
    latitude, longitude, height = pose[:3, 3].tolist()
    return check_world(WorldFrame(world.crs, (latitude, longitude, height)))


class _Local:
    """A local ENU frame with an origin on the earth."""

    def __init__(self, origin: tuple[float, float, float]) -> None:
        self.T_ecef_enu: Matrix4 = ecef_from_enu(*origin)

    def ecef(self, position: FloatArray) -> FloatArray:
        """ECEF of a position (3,)."""
        return self.T_ecef_enu[:3, :3] @ position + self.T_ecef_enu[:3, 3]

    def position(self, ecef: FloatArray) -> FloatArray:
        """Position (3,) of an ECEF point."""
        return np.asarray(self.T_ecef_enu[:3, :3].T @ (ecef - self.T_ecef_enu[:3, 3]))

    def jacobian(self, position: FloatArray) -> FloatArray:
        """(3, 3) derivative of `ecef`."""
        return self.T_ecef_enu[:3, :3]


class _Epsg:
    """A frame of the EPSG registry, by PROJ. Raises FrameRejected for one that it cannot use."""

    def __init__(self, code: int, origin: tuple[float, float, float] | None) -> None:
        pyproj, crs = _registered(code)
        self.name = f"EPSG:{code}"
        self._error: type[Exception] = pyproj.exceptions.ProjError
        self._geographic: bool = crs.is_geographic
        self._origin = np.zeros(3) if origin is None or self._geographic else np.array(origin)
        self._step = [_STEP_DEG, _STEP_DEG, _STEP_M] if self._geographic else [_STEP_M] * 3
        try:
            there, back = (
                pyproj.Transformer.from_crs(*ends, always_xy=True, allow_ballpark=False)
                for ends in ((crs.to_3d(), "EPSG:4978"), ("EPSG:4978", crs.to_3d()))
            )
        except self._error:
            raise FrameRejected(
                f"world frame: cannot convert {self.name} ({crs.name}): PROJ has no sure way to "
                "WGS84 without a grid of its datum or geoid"
            ) from None
        self._there, self._back = there, back

    def ecef(self, position: FloatArray) -> FloatArray:
        """ECEF of a position (3,); FrameRejected where the frame is not defined."""
        if self._geographic and not abs(position[0]) <= 90.0:
            raise FrameRejected(
                f"pose: expected latitude, longitude (degrees), height (m) in {self.name}, "
                f"received {position.tolist()}"
            )
        return self._through(self._there, self._x_first(position + self._origin))

    def position(self, ecef: FloatArray) -> FloatArray:
        """Position (3,) of an ECEF point; FrameRejected where the frame is not defined."""
        return self._x_first(self._through(self._back, ecef)) - self._origin

    def jacobian(self, position: FloatArray) -> FloatArray:
        """(3, 3) derivative of `ecef`, east first, by central differences."""
        columns = []
        for step in np.diag(self._step):
            low, high = (self.ecef(position + sign * self._x_first(step)) for sign in (-1, 1))
            columns.append((high - low) / (2.0 * step.max()))
        return np.stack(columns, axis=1)

    def _x_first(self, position: FloatArray) -> FloatArray:
        """Geographic frames say latitude first; PROJ is asked east first. Its own inverse."""
        return position[[1, 0, 2]] if self._geographic else position

    def _through(self, way: Any, point: FloatArray) -> FloatArray:
        try:
            return np.array(way.transform(*point.tolist(), errcheck=True), np.float64)
        except self._error as error:
            raise FrameRejected(
                f"pose: {point.tolist()} lies where {self.name} is not defined ({error})"
            ) from None


@lru_cache(maxsize=64)
def _registered(code: int) -> tuple[Any, Any]:
    """pyproj and the frame with this number: metres, or degrees and metres."""
    try:
        import pyproj
    except ImportError:
        raise FrameRejected(
            f"world frame: EPSG:{code} needs pyproj on the daemon: install mclnf-edge[daemon]"
        ) from None
    try:
        crs = pyproj.CRS.from_epsg(code)
    except pyproj.exceptions.CRSError:
        raise FrameRejected(f"world frame: EPSG has no coordinate system {code}") from None
    units = {axis.unit_name for axis in crs.axis_info}
    metric = (crs.is_projected or crs.is_geocentric) and units == {"metre"}
    if not metric and not (crs.is_geographic and units <= {"degree", "metre"}):
        raise FrameRejected(
            f"world frame: expected a projected, geographic or geocentric code in metres or "
            f"degrees, EPSG:{code} is {crs.name} ({crs.type_name}, {', '.join(sorted(units))})"
        )
    return pyproj, crs


def _on_earth(world: WorldFrame) -> _Local | _Epsg:
    code = code_of(check_world(world))
    if code is not None:
        return _Epsg(code, world.origin)
    assert world.origin is not None
    return _Local(world.origin)


def founding(world: WorldFrame) -> WorldFrame:
    """The frame of a map that begins with a stream in `world`: metres with z up.

    That of the stream, or, for a geographic one, local ENU at its origin. Raises FrameRejected.
    """
    code = code_of(check_world(world))
    if code is None:
        return world
    _, crs = _registered(code)
    if crs.is_projected:
        return world
    if crs.is_geographic and world.origin is not None:
        return check_world(WorldFrame(LOCAL, world.origin))
    raise FrameRejected(
        f"world frame: no map is in {world.crs}, which is not in metres with z up: begin it in "
        "'local-enu' with an origin, a projected code, or latitude, longitude, height with an "
        "origin (the same three) for the map"
    )


def anchor(world: WorldFrame) -> Matrix4 | None:
    """A pose at the place a frame names, in that frame; None when it names none."""
    code = code_of(world)
    if code is None:
        return np.eye(4)
    if world.origin is None:
        return None
    return pose_from(np.eye(3), world.origin if _registered(code)[1].is_geographic else 0.0)


@lru_cache(maxsize=256)
def conversion(source: WorldFrame, target: WorldFrame) -> Convert:
    """What turns poses given in `source` into poses in `target`.

    The same frame leaves every bit; one code with another origin shifts; two local ENU frames
    are a rigid motion through ECEF, which tilts "up" by the earth's curvature; all else is
    converted pose by pose (see the module). Two anonymous local frames are taken to be the same
    one. Raises FrameRejected when the frames are unknown or nothing ties them together.
    """
    if check_world(source) == check_world(target):
        return lambda pose: pose
    if source.crs == target.crs and code_of(source) not in GEOGRAPHIC | {None}:
        shift = np.subtract(source.origin or (0.0, 0.0, 0.0), target.origin or (0.0, 0.0, 0.0))
        return _rigid(pose_from(np.eye(3), shift))
    for world in (source, target):
        if world == WorldFrame():
            raise FrameRejected(
                f"world frame: cannot convert {_said(source)} to {_said(target)}: a local frame "
                "without an origin on the earth lies nowhere"
            )
    a, b = _on_earth(source), _on_earth(target)
    if isinstance(a, _Local) and isinstance(b, _Local):
        return _rigid(invert_pose(b.T_ecef_enu) @ a.T_ecef_enu)
    return lambda pose: _through_ecef(a, b, pose)


def _rigid(transform: Matrix4) -> Convert:
    return lambda pose: transform @ pose


def _through_ecef(source: _Local | _Epsg, target: _Local | _Epsg, pose: Matrix4) -> Matrix4:
    ecef = source.ecef(pose[:3, 3])
    position = target.position(ecef)
    stretched = target.jacobian(position)
    _check_metric(stretched, target)
    axes_source = _rotation(source.jacobian(pose[:3, 3]), source)
    axes_target = _rotation(stretched, target)
    return pose_from(axes_target.T @ axes_source @ pose[:3, :3], position)


def _rotation(jacobian: FloatArray, frame: _Local | _Epsg) -> FloatArray:
    """`R_ecef_frame`: the orthonormal part (polar decomposition) of a (3, 3) Jacobian."""
    if not np.linalg.det(jacobian) > 0.0:
        raise FrameRejected(f"world frame: the axes of {_name(frame)} are not right-handed")
    return nearest_rotation(jacobian)


def _check_metric(jacobian: FloatArray, frame: _Local | _Epsg) -> None:
    """Refuse a target whose metre, at this place, is far from a metre: Mercator, or degrees."""
    scales = np.linalg.svd(jacobian, compute_uv=False)
    if np.abs(scales - 1.0).max() > MAX_STRETCH:
        raise FrameRejected(
            f"world frame: cannot convert into {_name(frame)}: one of its units is "
            f"{scales.min():.4g} to {scales.max():.4g} m here, expected 1 within {MAX_STRETCH:g}"
        )


def _name(frame: _Local | _Epsg) -> str:
    return frame.name if isinstance(frame, _Epsg) else LOCAL


def _said(world: WorldFrame) -> str:
    return f"{world.crs} {'without origin' if world.origin is None else f'at {world.origin}'}"
