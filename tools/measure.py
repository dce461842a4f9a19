"""What `tools/table_*.py` share: captures, results on disk, paired differences."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

import mclnf_edge
from mclnf_edge.engine import surface
from mclnf_edge.mapping.initialization import Initialization, SignalInitialization
from mclnf_edge.mapping.optimizer import COARSE_STEPS, SAMPLES, TRAINED_SAMPLES
from mclnf_edge.report import write_json
from meta_trainer.evaluate import bootstrap

ROOT = Path(__file__).resolve().parents[1]
CAPTURES = ("brighton", "boruszyn", "ochota_a")
RUNS: tuple[tuple[int, int | None], ...] = ((0, None), (1, 1), (2, 4))
"""(seed, fold) of the runs of a table: the capture's own split, then every 8th frame from 1, 4."""
EXPOSURE = "told from the frames around, the map's brightness and their metadata"
"""Where the exposure of a held-out picture comes from in every table."""
FEWEST = 6
"""Pairs for a verdict: of fewer, a bootstrap's interval is no more than their range."""

Views = Mapping[str, float]
"""A held-out view's name -> dB. Names are unique over captures and runs."""


def arguments(description: str | None, out: str) -> argparse.Namespace:
    """The command line that every table has: captures, data folder, number of runs, output."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    beside = ROOT.parent / "shared" / "data"
    data = Path(os.environ.get("MCLNF_DATA", beside)) / "drone"
    parser.add_argument("captures", nargs="*", default=list(CAPTURES))
    parser.add_argument("--data", type=Path, default=data, help="folder of the captures")
    parser.add_argument("--runs", type=int, default=len(RUNS), choices=range(1, len(RUNS) + 1))
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "results" / out)
    return parser.parse_args()


def open_results(path: Path, protocol: dict[str, Any], rows: str = "rows") -> dict[str, Any]:
    """The `rows` measured so far with this protocol; none when it is another or was not noted."""
    wanted = json.loads(json.dumps(protocol))
    if path.exists():
        kept: Any = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(kept, dict) and kept.get("protocol") == wanted:
            return kept
    return {"protocol": wanted, rows: []}


def init_facts(init: Initialization | SignalInitialization) -> dict[str, Any]:
    """What modules began from: the file's digest, and which real captures it was learned on."""
    return {"init": init.digest, "real_captures_seen_by_init": init.meta.get("real_captures")}


def module_facts(init: Initialization) -> dict[str, Any]:
    """The same of a map's modules, and how their rays are followed and surfaces found."""
    return init_facts(init) | {
        "samples_a_ray": SAMPLES, "coarse_steps": COARSE_STEPS, "trained_samples": TRAINED_SAMPLES,
        "smoothing": [surface.WAYS, surface._SMALL, surface._LARGE],
    }  # fmt: skip


def find(results: dict[str, Any], **key: Any) -> dict[str, Any] | None:
    """The row with these values, None when it was not measured yet."""
    for row in results["rows"]:
        if all(row[name] == value for name, value in key.items()):
            found: dict[str, Any] = row
            return found
    return None


def save(path: Path, results: dict[str, Any]) -> None:
    """Write the results with what they were measured on."""
    results["machine"] = machine()
    write_json(path, results)


def machine() -> dict[str, Any]:
    """What a figure is measured on and with: processor, load, versions, commit, command."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        named = [line.split(":")[1].strip() for line in file if "model name" in line]
    return {
        "cpu": named[0] if named else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(v, 2) for v in os.getloadavg()],
        "mclnf_edge": mclnf_edge.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "torch": torch.__version__,
        "command": command(sys.argv),
    }


def command(words: list[str]) -> str:
    """The command line with every path of this machine shortened to its last name."""
    return " ".join(["python", *(Path(w).name if w.startswith("/") else w for w in words)])


def commit() -> str | None:
    """The checkout's commit, with a + when something differs from it; None outside a checkout."""
    asked = ["git", "describe", "--always", "--dirty=+", "--abbrev=10"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def pair(a: Views, b: Views) -> dict[str, Any]:
    """Mean over common views of a - b in dB, its bootstrap 95 % interval, and what that says."""
    gaps = [a[view] - b[view] for view in sorted(set(a) & set(b))]
    low, high = bootstrap(gaps)
    return {
        "difference_db": round(float(np.mean(gaps)), 3) if gaps else None,
        "interval": None if math.isnan(low) else [round(low, 3), round(high, 3)],
        "views": len(gaps),
        "verdict": verdict(gaps, low, high),
    }


def verdict(gaps: list[float], low: float, high: float) -> str:
    """The difference in words; an interval that includes 0 is no measurable difference.

    Fewer than FEWEST views say nothing, whatever their interval.
    """
    if math.isnan(low):
        return f"{len(gaps)} view{'s' * (len(gaps) != 1)}: no interval"
    if len(gaps) < FEWEST:
        return "too few views"
    if low <= 0 <= high:
        return "no measurable difference"
    return f"{np.mean(gaps):+.2f} dB"


def words(found: dict[str, Any] | None) -> str:
    """What `pair` found, for a table's cell: the difference and its interval."""
    if found is None or found["difference_db"] is None:
        return ""
    shown = f"{found['difference_db']:+.2f}"
    if found["interval"] is None:
        return f"{shown} ({found['verdict']})"
    low, high = found["interval"]
    told = found["verdict"] if found["views"] < FEWEST or low <= 0 <= high else ""
    return f"{shown} [{low:+.2f}, {high:+.2f}]" + (f": {told}" if told else "")
