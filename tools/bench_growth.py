"""What a map of 4 to 1,000 modules costs: `python tools/bench_growth.py [CAPTURE]`.

One module is learned from a capture and copied from cell to cell; at each size are measured
- in this process: a step of the same capture flown over the map's border, and a view at 480 pixels
  of one place (CPU milliseconds; `cold` reads its modules from disk first),
- of a daemon with `--resident-mb`: seconds from start to ready and to the first status (wall and
  CPU; median of `--repeats` starts), memory then and after views all over the map, the same view's
  CPU time,
- bytes on disk of a module and of a square kilometre.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mclnf_edge.captures import open_capture  # noqa: E402
from mclnf_edge.client import Client  # noqa: E402
from mclnf_edge.config import AdaptConfig, FieldConfig, MapConfig  # noqa: E402
from mclnf_edge.inference.renderer import Renderer  # noqa: E402
from mclnf_edge.mapping.initialization import load_init  # noqa: E402
from mclnf_edge.mapping.mapper import Mapper  # noqa: E402
from mclnf_edge.mapping.modules import Cell, Module  # noqa: E402
from mclnf_edge.mapping.residency import Residency  # noqa: E402
from mclnf_edge.store import MapStore  # noqa: E402
from mclnf_edge.types import Frame, ModuleSnapshot, View  # noqa: E402
from tools.daemons import published  # noqa: E402
from tools.many_modules import learned_module, spread  # noqa: E402
from tools.measure import ROOT, save  # noqa: E402
from tools.served import Served  # noqa: E402

SIZES = (4, 16, 64, 256, 1000)
WIDTH, SMALL = 480, 120
_OVER_BORDER = 0.75
"""How far west of the map's first cell the capture is flown for the steps, in cells."""

Row = dict[str, Any]


def holding(frames: Sequence[Frame], cell_m: float | None, threads: int) -> Mapper:
    """A mapper with default settings for these frames."""
    config = MapConfig(cell_size_m="auto" if cell_m is None else cell_m)
    mapper = Mapper(config, FieldConfig(), AdaptConfig(), load_init(None).mlp, threads)
    add(mapper, frames)
    return mapper


def add(mapper: Mapper, frames: Sequence[Frame]) -> None:
    """Hold frames and bring modules up to date with them."""
    for frame in frames:
        mapper.add(frame.seq, "growth/front", frame)
    if frames:
        mapper.draining = True
        mapper.settle()


def moved(pose: Any, cells: Sequence[float], cell_m: float) -> Any:
    """A pose some cells further east and north."""
    out = pose.copy()
    out[:2, 3] += np.array(cells) * cell_m
    return out


def opened(store: MapStore, cell_m: float, budget_mb: int, threads: int) -> Mapper:
    """A map's mapper as the daemon makes it: nothing is read yet."""
    mapper = holding((), cell_m, threads)
    mapper.recall = store.load_module

    def load(module: Module) -> None:
        assert mapper.pool is not None
        arrays = store.load_module(module.id, module.version).arrays
        module.slot = mapper.pool.load(module.cell, arrays)

    mapper.residency = Residency(mapper.modules, budget_mb * 10**6, load)
    for record in store.modules():
        mapper.adopt(None, record.meta, record.version, record.digest)
    return mapper


def milliseconds(values: Sequence[float]) -> Row:
    """Quartiles in milliseconds, of seconds."""
    low, middle, high = (1e3 * float(np.percentile(values, p)) for p in (25, 50, 75))
    return {"p25": round(low, 2), "median": round(middle, 2), "p75": round(high, 2)}


def rendering(mapper: Mapper, view: View, repeats: int) -> Row:
    """CPU time of a view when its modules are on disk, and when they are in memory."""
    renderer, spent = Renderer(residency=mapper.residency), []
    for _ in range(repeats + 1):
        before = time.process_time()
        shown = renderer.render(mapper.pool, mapper.origins[0], view, np.zeros(3, np.float32))
        spent.append(time.process_time() - before)
    return {
        "cold_cpu_ms": round(spent[0] * 1e3, 2),
        "warm_cpu_ms": milliseconds(spent[1:]),
        "modules": len(shown.modules),
    }


def stepping(mapper: Mapper, frames: Sequence[Frame], steps: int) -> Row:
    """CPU time of settling frames over the border of a map, and of a step."""
    before = time.process_time()
    add(mapper, frames)
    settled, spent = time.process_time() - before, []
    for _ in range(steps):
        before = time.process_time()
        mapper.step()
        spent.append(time.process_time() - before)
    assert mapper.residency is not None
    return {
        "cpu_ms": milliseconds(spent),
        "settle_cpu_s": round(settled, 2),
        "learning": len(mapper.learning()),
        "pinned": len(mapper.residency.pinned),
        **mapper.residency.facts(),
    }


def serving(daemon: Served, views: Sequence[View], local: View, repeats: int) -> Row:
    """A daemon's starts, its memory before and after views all over the map, a view's CPU time."""
    starts = []
    for again in reversed(range(repeats)):
        began = time.monotonic()
        daemon.start()
        ready, used = time.monotonic() - began, daemon.cpu_s()
        with Client(daemon.address, give_up_s=600) as client:
            client.status()
        starts.append((ready, used, time.monotonic() - began))
        if again:
            _stop(daemon)
    ready, used, answered = np.median(starts, axis=0)
    with Client(daemon.address, give_up_s=600) as client:
        client.render(local)  # once the kernels are ready
        first = client.status()
        for view in views:
            client.render(view)
        after = client.status()
        for _ in range(repeats):
            client.render(local)
        last = client.status()
    _stop(daemon)
    return {
        "ready_s": round(float(ready), 2),
        "ready_cpu_s": round(float(used), 2),
        "status_s": round(float(answered), 2),
        "memory_mb": round(first["memory_mb"], 1),
        "memory_after_views_mb": round(after["memory_mb"], 1),
        "resident": after["resident"],
        "resident_mb": round(after["resident_mb"], 1),
        "views": len(views),
        "local_cpu_ms": round((last["render_cpu_s"] - after["render_cpu_s"]) / repeats * 1e3, 1),
    }


def _stop(daemon: Served) -> None:
    if daemon.stop() != 0:
        raise SystemExit(f"the daemon did not stop well: {daemon.log.read_text()[-500:]}")


def on_disk(folder: Path, cell_m: float) -> Row:
    """Megabytes of a map's modules, each and by square kilometre, and of its ledger."""
    sizes = [path.stat().st_size for path in (folder / "modules").iterdir()]
    ledger = sum(path.stat().st_size for path in folder.glob("ledger.db*"))
    each = (sum(sizes) + ledger) / len(sizes) / 1e6
    return {
        "mb_per_module": round(each, 3),
        "ledger_kb_per_module": round(ledger / len(sizes) / 1e3, 2),
        "mb_per_km2": round(each * 1e6 / cell_m**2, 2),
    }


def measure(
    daemon: Served, module: ModuleSnapshot, frames: Sequence[Frame], best: Frame, size: int,
    have: int, options: argparse.Namespace,
) -> Row:  # fmt: skip
    """Grow the map from `have` to `size` modules and take every figure."""
    cell_m = float(module.meta["cell_size_m"])
    with MapStore.open(daemon.map) as store:
        cells = spread(module, store, have, size)

        def over(cell: Cell, width: int) -> View:
            height = max(round(width * best.camera.height / best.camera.width), 1)
            away = (cell[1] - cells[0][1], cell[2] - cells[0][2])
            pose = moved(best.T_world_camera, away, cell_m)
            return View(best.camera.scaled(width, height), pose)

        local = over(cells[0], WIDTH)
        mapper = opened(store, cell_m, options.resident_mb, options.threads)
        rendered = rendering(mapper, local, options.repeats)
        flown = [
            replace(f, T_world_camera=moved(f.T_world_camera, (-_OVER_BORDER, 0), cell_m))
            for f in frames
        ]
        stepped = stepping(mapper, flown, options.steps)
    every = max(size // options.views, 1)
    tour = [over(cell, SMALL) for cell in cells[::every]]
    return {
        "modules": size,
        "step": stepped,
        "render": rendered,
        "daemon": serving(daemon, tour, local, options.repeats),
        "disk": on_disk(daemon.map, cell_m),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Learn a module, measure at every size, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("MCLNF_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("capture", nargs="?", type=Path, default=data / "drone" / "boruszyn")
    parser.add_argument("--seconds", type=float, default=30.0, help="CPU seconds of learning")
    parser.add_argument("--frames", type=int, default=24, help="of the capture, at most")
    parser.add_argument("--resident-mb", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--views", type=int, default=250, help="all over the map, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--out", type=Path, default=ROOT / "tools/results/bench_growth.json")
    options = parser.parse_args()
    frames = list(itertools.islice(published(open_capture(options.capture)), options.frames))
    mapper, start = holding(frames, None, options.threads), time.process_time()
    while time.process_time() - start < options.seconds and mapper.step() is not None:
        pass
    tiles = {f.id: f.tiles for f in mapper.frames.values()}
    module = learned_module(mapper)
    cell = tuple(module.meta["cell"])
    best = max(frames, key=lambda f: len(tiles[f.seq].get(cell, ())))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        daemon = Served(Path(scratch), f"render: {{resident_mb: {options.resident_mb}}}\n")
        daemon.start()  # makes the empty map
        daemon.stop()
        for size in sorted(options.sizes):
            have = rows[-1]["modules"] if rows else 0
            rows.append(measure(daemon, module, frames, best, size, have, options))
            print(rows[-1])
    settings = {k: getattr(options, k) for k in ("resident_mb", "steps", "repeats", "threads")}
    results = {
        "capture": options.capture.name, "frames": len(frames), "width": WIDTH,
        "cell_m": module.meta["cell_size_m"], **settings, "rows": rows,
    }  # fmt: skip
    save(options.out, results)


if __name__ == "__main__":
    main()
