"""Which part of the world a pose belongs to.

Modules compute in float32 around a local origin. Streams whose frames are far apart get a site
each, with an origin of its own; what is near is converted into the site's world frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from mclnf_edge.errors import FrameRejected
from mclnf_edge.geometry import target_from_source
from mclnf_edge.types import Matrix4, WorldFrame

REACH_M = 100_000.0
"""Frames whose origins are nearer than this share a site: float32 is good to 8 mm there."""


class Sites:
    """The world frames of a map's sites, in order, from and for the map's meta."""

    def __init__(self, meta: Mapping[str, Any]) -> None:
        self.worlds: list[WorldFrame] = []
        while (kept := meta.get(_key(len(self.worlds)))) is not None:
            origin = kept["origin"]
            self.worlds.append(WorldFrame(kept["crs"], None if origin is None else tuple(origin)))

    def find(self, world: WorldFrame | None) -> tuple[int, Matrix4]:
        """(site, `T_site_world`) of a world frame; None is the first site's.

        Raises FrameRejected when no site is near, or the frames cannot be converted.
        """
        if world is None:
            return 0, np.eye(4)
        for i, site in enumerate(self.worlds):
            transform = target_from_source(world, site)
            if float(np.linalg.norm(transform[:3, 3])) <= REACH_M:
                return i, transform
        raise FrameRejected(
            f"world frame: nothing is mapped within {REACH_M / 1e3:.0f} km of {world.crs} "
            f"{world.origin}"
        )

    def add(self, world: WorldFrame) -> dict[str, Any]:
        """What to add to the map's meta so that `world` has a site; empty when it has one.

        Raises FrameRejected when the frame cannot be converted into the map's.
        """
        for site in self.worlds:
            transform = target_from_source(world, site)
            if float(np.linalg.norm(transform[:3, 3])) <= REACH_M:
                return {}
        self.worlds.append(world)
        return {_key(len(self.worlds) - 1): asdict(world)}


def _key(site: int) -> str:
    return "world" if site == 0 else f"world.{site}"
