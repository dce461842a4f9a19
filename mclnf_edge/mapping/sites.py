"""Which part of the world a pose belongs to.

Modules compute in float32 around a local origin. Streams whose frames are far apart get a site
each, with an origin of its own; what is near is converted into the site's world frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mclnf_edge.errors import FrameRejected
from mclnf_edge.types import Matrix4, WorldFrame
from mclnf_edge.world_frames import Convert, anchor, conversion, founding

REACH_M = 100_000.0
"""What is nearer to a site's origin than this belongs to it: float32 is good to 8 mm there."""


@dataclass(frozen=True)
class _Way:
    """Into a site, which poses within `reach_m` of its origin belong to."""

    site: int
    convert: Convert
    reach_m: float = np.inf

    def take(self, pose: Matrix4) -> Matrix4:
        """`T_site_camera` of a pose; FrameRejected when it is too far away."""
        placed = self.convert(pose)
        distance_m = float(np.linalg.norm(placed[:3, 3]))
        if distance_m > self.reach_m:
            raise FrameRejected(
                f"world frame: nothing is mapped within {self.reach_m / 1e3:.0f} km of the pose at "
                f"{pose[:3, 3].tolist()}: it lies {distance_m / 1e3:.0f} km from the map's origin"
            )
        return placed

    def reaches(self, pose: Matrix4) -> bool:
        """Whether a pose lies near the site; where the site's frame is not defined is far."""
        with suppress(FrameRejected):
            self.take(pose)
            return True
        return False


@dataclass(frozen=True)
class Place:
    """Takes poses of one world frame to their site: the only one, or the first that is near."""

    ways: tuple[_Way, ...]

    def __call__(self, pose: Matrix4) -> tuple[int, Matrix4]:
        """(site, `T_site_camera`) of a camera-to-world pose; FrameRejected when it has none."""
        for way in self.ways[:-1]:
            if way.reaches(pose):
                return way.site, way.take(pose)
        return self.ways[-1].site, self.ways[-1].take(pose)


class Sites:
    """The world frames of a map's sites, in order, from and for the map's meta."""

    def __init__(self, meta: Mapping[str, Any]) -> None:
        self.worlds: list[WorldFrame] = []
        while (kept := meta.get(_key(len(self.worlds)))) is not None:
            origin = kept["origin"]
            self.worlds.append(WorldFrame(kept["crs"], None if origin is None else tuple(origin)))

    def find(self, world: WorldFrame | None) -> Place:
        """Where poses of a world frame belong; None is the first site's.

        Raises FrameRejected when no site is near, or the frames cannot be converted.
        """
        if world is None:
            return Place((_Way(0, _as_it_is),))
        ways = self._ways(world)
        if not ways:
            raise FrameRejected(
                f"world frame: nothing is mapped within {REACH_M / 1e3:.0f} km of {world.crs} "
                f"{world.origin}"
            )
        return Place(ways)

    def add(self, world: WorldFrame) -> dict[str, Any]:
        """What to add to the map's meta so that `world` has a site; empty when it has one.

        Raises FrameRejected when the frame cannot be converted into the map's.
        """
        if self._ways(world):
            return {}
        self.worlds.append(founding(world))
        return {_key(len(self.worlds) - 1): asdict(self.worlds[-1])}

    def _ways(self, world: WorldFrame) -> tuple[_Way, ...]:
        """Into the site near the place that `world` names; into all when it names none."""
        ways = [
            _Way(i, conversion(world, site), np.inf if anchor(site) is None else REACH_M)
            for i, site in enumerate(self.worlds)
        ]
        place = anchor(world)
        if place is None:
            return tuple(ways)
        return tuple(replace(way, reach_m=np.inf) for way in ways if way.reaches(place))[:1]


def _as_it_is(pose: Matrix4) -> Matrix4:
    return pose


def _key(site: int) -> str:
    return "world" if site == 0 else f"world.{site}"
