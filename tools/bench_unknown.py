"""What was never seen is said to be unknown: `python tools/bench_unknown.py [--capture ...]`.

One block of a capture is withheld: every train frame whose picture's middle half shows any of one
cell. A map is made of the others. `--blocks` takes several, one after the other: the cells for
which such frames are nearest to a quarter of all. The withheld frames' poses are then rendered. A
pixel's surface point comes from the capture's own depth (exact on generated flights) or from a map
of all frames; it counts as seen by a frame when it lies inside that frame's picture and no nearer
surface hides it, 3 % of the distance allowed. Reported: the share flagged unknown of the pixels
that no remaining frame has seen (aim: at least 95 %), and of those seen by three or more (aim: at
most 5 %); with `map.known_views` 1, the default, and 2. What is in the JSON is not measured again,
rows of another protocol are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mclnf_edge.captures import Capture, open_capture, view_of  # noqa: E402
from mclnf_edge.config import ServeConfig  # noqa: E402
from mclnf_edge.evaluate import KNOWN  # noqa: E402
from mclnf_edge.images import decode_depth  # noqa: E402
from mclnf_edge.inference.renderer import Renderer  # noqa: E402
from mclnf_edge.mapping.initialization import load_init  # noqa: E402
from mclnf_edge.mapping.mapper import Mapper  # noqa: E402
from mclnf_edge.types import Frame, Render  # noqa: E402
from tools.measure import find, module_facts, open_results, save  # noqa: E402

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
SHRINK = 2
SLACK = 0.03


def make_map(frames: list[Frame], steps: int, known_views: int = 1) -> Mapper:
    """A map of some frames after `steps` steps."""
    config = ServeConfig()
    counted = replace(config.map, known_views=known_views)
    mapper = Mapper(counted, config.field, config.adapt, load_init(None).mlp)
    for i, frame in enumerate(frames):
        mapper.add(i, "s/bench", frame)
    mapper.draining = True
    mapper.settle()
    for _ in range(steps):
        mapper.step()
    return mapper


def show(mapper: Mapper, capture: Capture, frame: Frame) -> Render:
    """A frame's view at 1 / SHRINK of its size."""
    view = view_of(frame, capture)
    small = view.camera.scaled(view.camera.width // SHRINK, view.camera.height // SHRINK)
    view = replace(view, camera=small)
    return Renderer().render(mapper.pool, mapper.origins[0], view, np.zeros(3, np.float32))


def surface(full: Mapper, capture: Capture, frame: Frame) -> F32:
    """(h, w) z-depth of what a frame sees: the one it brings, else that of a map of all frames."""
    if frame.depth is None:
        return show(full, capture, frame).depth
    exact = decode_depth(frame.depth, frame.depth_scale_m, frame.camera)
    return np.asarray(exact[::SHRINK, ::SHRINK], np.float32)


def points(frame: Frame, depth: F32) -> F64:
    """(h * w, 3) world points of a z-depth picture; NaN where the depth is."""
    c = frame.camera.scaled(depth.shape[1], depth.shape[0])
    u, v = np.meshgrid(np.arange(c.width) + 0.5, np.arange(c.height) + 0.5)
    d = depth.astype(np.float64)
    local = np.stack([(u - c.cx) / c.fx * d, -(v - c.cy) / c.fy * d, -d], axis=-1).reshape(-1, 3)
    T = frame.T_world_camera
    return np.asarray(local @ T[:3, :3].T + T[:3, 3])


def project(frame: Frame, at: F64, size: tuple[int, int]) -> tuple[F64, F64, F64]:
    """(column, row, z-depth) of world points in a frame's picture of `size` (width, height)."""
    c, T = frame.camera.scaled(*size), frame.T_world_camera
    local = (at - T[:3, 3]) @ T[:3, :3]
    z = -local[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return local[:, 0] / z * c.fx + c.cx, -local[:, 1] / z * c.fy + c.cy, z


def views_of(at: F64, frames: list[Frame], depths: list[F32]) -> F64:
    """How many frames see each world point."""
    count = np.zeros(len(at))
    for frame, depth in zip(frames, depths, strict=True):
        h, w = depth.shape
        u, v, z = project(frame, at, (w, h))
        inside = (z > 0) & (u >= 0) & (v >= 0) & (u < w) & (v < h)
        column, row = np.where(inside, u, 0).astype(int), np.where(inside, v, 0).astype(int)
        count += inside & (z <= depth[row, column] * (1 + SLACK))
    return count


def block_frames(frames: list[Frame], depths: list[F32], corner: F64, edge: float) -> list[int]:
    """The frames whose picture's middle half shows any of a block of the ground."""
    found = []
    for i, (frame, depth) in enumerate(zip(frames, depths, strict=True)):
        h, w = depth.shape
        middle = points(frame, depth).reshape(h, w, 3)[h // 4 : -h // 4, w // 4 : -w // 4, :2]
        if ((middle >= corner) & (middle < corner + edge)).all(-1).any():
            found.append(i)
    return found


@dataclass(frozen=True)
class Flight:
    """A capture's train frames, what they see (z-depth each), and the blocks to withhold."""

    name: str
    capture: Capture
    frames: list[Frame]
    depths: list[F32]
    blocks: list[list[int]]


def fly(path: Path, steps: int) -> Flight:
    """Map all train frames of a capture; its blocks, nearest to a quarter of all frames first."""
    capture = open_capture(path)
    frames = list(capture.split("train").frames)
    full = make_map(frames, steps)
    depths = [surface(full, capture, f) for f in frames]
    assert full.pool is not None
    edge, origin = full.pool.cell_m, full.origins[0][:2]
    choices = set()
    for level, ix, iy in full.modules:
        corner = origin + edge * np.array([ix, iy])
        seeing = block_frames(frames, depths, corner, edge) if level == 0 else []
        if 2 <= len(seeing) <= len(frames) - 4:
            choices.add((abs(len(seeing) - len(frames) / 4), tuple(seeing)))
    return Flight(
        path.name, capture, frames, depths, [list(seeing) for _, seeing in sorted(choices)]
    )


def measure(flight: Flight, block: int, steps: int, known_views: int) -> dict[str, Any]:
    """One block's figures, what `known_views` frames saw counting as known."""
    capture, frames, depths = flight.capture, flight.frames, flight.depths
    withheld = flight.blocks[block]
    kept = [i for i in range(len(frames)) if i not in withheld]
    part = make_map([frames[i] for i in kept], steps, known_views)
    never, often = [], []
    for i in withheld:
        unknown = show(part, capture, frames[i]).known.ravel() < KNOWN
        at = points(frames[i], depths[i])
        sure = np.isfinite(at).all(1)
        n = views_of(np.nan_to_num(at), [frames[j] for j in kept], [depths[j] for j in kept])
        never.append(unknown[sure & (n == 0)])
        often.append(unknown[sure & (n >= 3)])
    a, b = np.concatenate(never), np.concatenate(often)
    return {
        "capture": flight.name, "block": block, "of_blocks": len(flight.blocks),
        "known_views": known_views, "frames": len(frames), "withheld": len(withheld),
        "steps": steps,
        "never_seen_pixels": len(a), "never_seen_flagged": float(a.mean()) if len(a) else None,
        "seen_by_three_pixels": len(b), "seen_by_three_flagged": float(b.mean()) if len(b) else None
    }  # fmt: skip


def protocol() -> dict[str, Any]:
    """What the rows have in common; rows of another protocol are measured anew."""
    return module_facts(load_init(None)) | {
        "seed": ServeConfig().adapt.seed, "views": f"1/{SHRINK} of their width", "slack": SLACK
    }  # fmt: skip


def main() -> None:
    """Measure what is missing of the captures named, write after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    data = Path(os.environ.get("MCLNF_DATA", ROOT.parent / "shared" / "data")) / "drone"
    parser.add_argument("--capture", nargs="*", default=["boruszyn", "ochota_a", "brighton"])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--blocks", type=int, default=3, help="at most, of each capture")
    parser.add_argument("--out", type=Path, default=ROOT / "tools/results/bench_unknown.json")
    options = parser.parse_args()
    results = open_results(options.out, protocol())
    flown = lru_cache(1)(fly)  # once for each capture that has something left to measure
    for name in options.capture:
        path = Path(name) if Path(name).is_dir() else data / name
        told = find(results, capture=path.name, steps=options.steps)
        blocks = told["of_blocks"] if told else len(flown(path, options.steps).blocks)
        for block, known_views in product(range(min(blocks, options.blocks)), (1, 2)):
            key = {"capture": path.name, "block": block, "known_views": known_views,
                   "steps": options.steps}  # fmt: skip
            if find(results, **key) is None:
                flight = flown(path, options.steps)
                results["rows"].append(measure(flight, block, options.steps, known_views))
                save(options.out, results)
            print(json.dumps(find(results, **key)), flush=True)


if __name__ == "__main__":
    main()
