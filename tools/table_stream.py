"""Print the README's table of `tools/results/bench_stream.json`."""

from __future__ import annotations

import json
from pathlib import Path


def main() -> None:
    """One row per capture, one column per mark: ours, the peer's, the difference."""
    data = json.loads((Path(__file__).parent / "results" / "bench_stream.json").read_text())
    runs = [run for run in data["runs"] if run["fold"] is None]
    marks = [int(row["mark_s"]) for row in runs[0]["rows"]]
    print("| capture | " + " | ".join(f"{mark} s" for mark in marks) + " | SSIM | peak memory |")
    print("|---|" + "---|" * (len(marks) + 2))
    for run in runs:
        peer = data["peers"].get(run["capture"], {})
        cells = []
        for row in run["rows"]:
            other = peer.get(str(int(row["mark_s"])))
            gain = "" if other is None else f" ({row['psnr'] - other:+.2f})"
            cells.append(f"{row['psnr']:.2f}{gain}")
        last = run["rows"][-1]
        tail = f"{last['ssim']:.2f} | {run['peak_memory_mb']:.0f} MB"
        print(f"| {run['capture']} | " + " | ".join(cells) + f" | {tail} |")


if __name__ == "__main__":
    main()
