"""Which triangle a ray meets first: Embree where it has wheels, NVIDIA Warp's BVH elsewhere.

Embree (package embreex) has no wheel for Linux on aarch64, Warp (warp-lang) has and is about three
times slower on the CPU. The two disagree only for rays that graze an edge, a few in a million.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mclnf_edge.errors import ConfigError

Rays = npt.NDArray[np.float32]
_FAR = 1.0e6


class Caster(Protocol):
    """Casts rays: `origins` and `directions` (n, 3) float32, metres."""

    def first(self, origins: Rays, directions: Rays) -> npt.NDArray[np.int32]:
        """Index of the first triangle each ray meets, -1 for none."""

    def blocked(self, origins: Rays, directions: Rays) -> npt.NDArray[np.bool_]:
        """Whether each ray meets anything at all."""


def make_caster(vertices: npt.NDArray[np.float64], faces: npt.NDArray[np.int64]) -> Caster:
    """A caster for triangles `faces` (m, 3) of `vertices` (n, 3); ConfigError if there is none."""
    points, corners = vertices.astype(np.float32), faces.astype(np.int32)
    if importlib.util.find_spec("embreex") is not None:
        return EmbreeCaster(points, corners)
    if importlib.util.find_spec("warp") is not None:
        return WarpCaster(points, corners)
    raise ConfigError("city pictures need `pip install embreex` (Linux on aarch64: warp-lang)")


class EmbreeCaster:
    """Embree through embreex."""

    def __init__(self, vertices: Rays, faces: npt.NDArray[np.int32]) -> None:
        """Build the tree over `vertices` (n, 3) and `faces` (m, 3)."""
        scene = importlib.import_module("embreex.rtcore_scene")
        meshes = importlib.import_module("embreex.mesh_construction")
        self._scene: Any = scene.EmbreeScene(robust=True)
        meshes.TriangleMesh(self._scene, vertices, faces)

    def first(self, origins: Rays, directions: Rays) -> npt.NDArray[np.int32]:
        """See Caster."""
        hits: npt.NDArray[np.int32] = self._scene.run(origins, directions)
        return hits

    def blocked(self, origins: Rays, directions: Rays) -> npt.NDArray[np.bool_]:
        """See Caster. Embree answers 0 for an occluded ray, -1 for a free one."""
        answers: npt.NDArray[np.int32] = self._scene.run(origins, directions, query="OCCLUDED")
        return answers >= 0


class WarpCaster:
    """Warp's mesh queries on the CPU."""

    def __init__(self, vertices: Rays, faces: npt.NDArray[np.int32]) -> None:
        """Build the tree over `vertices` (n, 3) and `faces` (m, 3)."""
        warp: Any = importlib.import_module("warp")
        warp.config.quiet = True
        self._warp: Any = warp
        self._kernel = _warp_kernel(warp)
        self._mesh: Any = warp.Mesh(
            warp.array(vertices, dtype=warp.vec3, device="cpu"),
            warp.array(faces.ravel(), dtype=warp.int32, device="cpu"),
        )

    def first(self, origins: Rays, directions: Rays) -> npt.NDArray[np.int32]:
        """See Caster."""
        wp = self._warp
        rays = [wp.array(a, dtype=wp.vec3, device="cpu", copy=False) for a in (origins, directions)]
        out = np.empty(len(origins), dtype=np.int32)
        target = wp.array(out, dtype=wp.int32, device="cpu", copy=False)
        inputs = [self._mesh.id, *rays, _FAR, target]
        wp.launch(self._kernel, dim=len(out), inputs=inputs, device="cpu")
        return out

    def blocked(self, origins: Rays, directions: Rays) -> npt.NDArray[np.bool_]:
        """See Caster."""
        return self.first(origins, directions) >= 0


def _warp_kernel(wp: Any) -> Any:
    """The query as a Warp kernel; its types are given as objects since Warp reads them."""

    def first_hit(mesh, origins, directions, far, out):  # type: ignore[no-untyped-def]
        i = wp.tid()
        query = wp.mesh_query_ray(mesh, origins[i], directions[i], far)
        if query.result:
            out[i] = query.face
        else:
            out[i] = -1

    rays = wp.array(dtype=wp.vec3)
    first_hit.__annotations__ = {
        "mesh": wp.uint64,
        "origins": rays,
        "directions": rays,
        "far": wp.float32,
        "out": wp.array(dtype=wp.int32),
    }
    return wp.kernel(first_hit)
