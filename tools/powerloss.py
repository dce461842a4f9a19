"""Cut the power of a map at 1,000 points and count what is lost: `python tools/powerloss.py`.

The long form of tests/store/test_powerloss.py. Results go to tools/results/powerloss.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

import apsw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.store.flight import cut_and_look, fly  # noqa: E402
from tests.store.test_powerloss import FSYNCS  # noqa: E402


def cuts_of(broken: str, cuts: int, seed: int, fail_sync: bool = False) -> dict[str, object]:
    """The faults found in `cuts` power cuts of one flight, the fsync `broken` left out."""
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk"
        disk.mkdir()
        recording = fly(disk, broken=broken, fail_sync=fail_sync)
        found = list(cut_and_look(recording, Path(folder), cuts, seed))
    return {"steps": len(recording.ops), "cuts": cuts, "faults": len(found), "first": found[:3]}


def main() -> int:
    """Run, write the results, and return 1 when a promise was broken or a fsync is not needed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", type=int, default=1000, help="with all fsyncs")
    parser.add_argument("--cuts-broken", type=int, default=100, help="with each fsync left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "tools/results/powerloss.json")
    options = parser.parse_args()
    start = time.monotonic()
    whole = cuts_of("", options.cuts // 2, options.seed)
    failed = cuts_of("", options.cuts - options.cuts // 2, options.seed + 1, fail_sync=True)
    left_out = {name: cuts_of(name, options.cuts_broken, options.seed) for name in FSYNCS}
    results = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "sqlite_recorded": apsw.sqlite_lib_version(),
        "seed": options.seed,
        "seconds": round(time.monotonic() - start, 1),
        "all fsyncs": whole,
        "all fsyncs, one fails": failed,
        "left out": left_out,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    sound = whole["faults"] == 0 and failed["faults"] == 0
    return 0 if sound and all(each["faults"] for each in left_out.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
