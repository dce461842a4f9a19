"""What precision closed modules need on disk: `python tools/table_storage.py [CAPTURE ...]`.

Modules learn as in table_weights (STEPS of the daemon's steps from the shipped initialization);
then the held-out views are rendered with every array as it was learned, as it is committed (planes,
grid and surface in half precision) and with planes of fewer bits, linear between each plane's least
and largest value in each module. Bytes are those of one module's arrays, probes and Fisher
information left out. Writes table_storage.json.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mclnf_edge.engine.field import CHANNELS, Layout  # noqa: E402
from mclnf_edge.mapping.initialization import load_init  # noqa: E402
from mclnf_edge.mapping.modules import ModulePool, levels_of, surface_of  # noqa: E402
from meta_trainer.city_init import Episode  # noqa: E402
from tools import measure  # noqa: E402

F32 = npt.NDArray[np.float32]
STEPS = 192
HALVED = ("features", "density", "surface")
BITS = {"8 bits": 8, "6 bits": 6, "4 bits": 4}
STORAGES = ("single", "half", *BITS)


def main() -> int:
    """Measure what is missing, write after each capture, print the table."""
    options = measure.arguments(__doc__, "table_storage.json")
    init = load_init(None)
    results = measure.open_results(options.out, measure.module_facts(init) | {"steps": STEPS})
    for capture in options.captures:
        if measure.find(results, capture=capture) is None:
            results["rows"] += run(options.data / capture, init.mlp)
            measure.save(options.out, results)
    for row in results["rows"]:
        size = f"{row['bytes'] / 1e6:5.2f} MB a module {row['mb_per_km2']:7.1f} MB/km2"
        told = measure.words(row["against_half"])
        print(f"{row['capture']:9} {row['storage']:7} {row['psnr']:6.2f} dB  {size}  {told}")
    return 0


def run(path: Path, mlp: F32) -> list[dict[str, Any]]:
    """One capture's rows."""
    episode = Episode(path, None, threads=2)
    episode.restart(mlp, seed=0)
    episode.steps(STEPS)
    pool, modules = episode.mapper.pool, episode.mapper.modules
    assert pool is not None
    learned = {name: getattr(pool, name).copy() for name in HALVED}
    views, sizes = {}, {}
    for storage in STORAGES:
        sizes[storage] = store(pool, learned, storage)
        scores = episode.score(shrink=1)
        views[storage] = {f"{path.name} {i}": psnr for i, psnr in enumerate(scores)}
    inner = sum(cell[0] % 2 == 0 for cell in modules)
    a_km2 = len(modules) / (inner * pool.cell_m**2)
    return [
        {
            "capture": path.name, "storage": storage, "views": views[storage],
            "psnr": float(np.mean(list(views[storage].values()))), "bytes": sizes[storage],
            "modules": len(modules), "mb_per_km2": sizes[storage] * a_km2,
            "against_half": measure.pair(views[storage], views["half"]),
        }
        for storage in STORAGES
    ]  # fmt: skip


def store(pool: ModulePool, learned: dict[str, F32], storage: str) -> float:
    """Give the pool what comes back from this storage; bytes of one module in it."""
    size = float(sum(getattr(pool, name)[0].nbytes for name in ("weights", "seen", "band")))
    for name, kept in learned.items():
        bits = 32 if storage == "single" else 16
        if name == "features" and storage in BITS:
            bits = BITS[storage]
            kept = quantized(kept, pool.layout, bits)
        elif bits == 16:
            kept = kept.copy()
            for slot in pool.slot_of.values():  # the surface as it is stored, by its height band
                band = pool.band[slot]
                kept[slot] = (
                    surface_of(levels_of(kept[slot], band).astype(np.float16), band)
                    if name == "surface"
                    else kept[slot].astype(np.float16)
                )
        getattr(pool, name)[...] = kept
        size += kept[0].size * bits / 8
    return size


def quantized(features: F32, layout: Layout, bits: int) -> F32:
    """Features (modules, n) rounded to 2^bits levels between each plane's extremes."""
    out = features.copy()
    for _, _, nu, nv, first in layout.planes.tolist():
        part = slice(first, first + nu * nv * CHANNELS)
        low, high = (f(features[:, part], axis=1, keepdims=True) for f in (np.min, np.max))
        step = np.maximum((high - low) / (2**bits - 1), 1e-12)
        out[:, part] = low + np.round((features[:, part] - low) / step) * step
    return np.asarray(out)


if __name__ == "__main__":
    sys.exit(main())
