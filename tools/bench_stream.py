"""Held-out PSNR against the daemon's CPU seconds on real captures, beside the peers' levels.

    python tools/bench_stream.py [--capture boruszyn ...] [--marks 15,30,60,120,240] [--fold K]

Every capture goes through a daemon of its own over its socket, all train frames at once in capture
order; `test` frames are never sent. The clock is the daemon's CPU time from the first accepted
frame, without the renders that this benchmark asks for. `--fold K` holds out every 8th frame from
K on instead of the capture's own split. Rows are appended to the JSON as they come; a finished
capture is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import mclnf_edge
from mclnf_edge.captures import open_capture
from mclnf_edge.client import Client
from mclnf_edge.evaluate import evaluate
from mclnf_edge.report import write_json
from mclnf_edge.store import map_check

PEERS = {
    "boruszyn": {15: 13.96, 30: 15.86, 60: 17.50, 120: 18.95, 240: 19.50},
    "ochota_a": {15: 14.44, 30: 16.53, 60: 18.63, 120: 20.74, 240: 21.98},
    "brighton": {15: 12.70, 30: 14.99, 60: 16.84, 120: 17.85, 240: 17.64},
}
"""OpenSplat on two CPU cores, dB at CPU seconds: the strongest CPU peer that was measured."""


def run(path: Path, marks: list[float], fold: int | None, seed: int) -> dict[str, Any]:
    """One capture through one daemon; a row per mark."""
    capture = open_capture(path).fold(fold)
    train, test = capture.split("train").frames, capture.split("test").frames
    seconds = 1.5 * marks[-1] / len(train)
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "bench.yaml"
        config.write_text(
            f"adapt: {{budget_s_per_frame: {seconds}, passes: 1000, seed: {seed}}}\n"
            "map: {inactivity_s: 100000}\n"
        )
        words = ["serve", "--map", f"{scratch}/map", "--bind", "tcp://127.0.0.1:0"]
        daemon = subprocess.Popen(
            [sys.executable, "-m", "mclnf_edge.cli", *words, "--config", str(config)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert daemon.stdout is not None
        match = re.match(r"ready (\S+)", daemon.stdout.readline())
        assert match is not None
        rows, status = [], {}
        with Client(match[1], give_up_s=300) as client:
            client.hello(stream=capture.name, world=capture.world)
            start = client.status()["cpu_s"]
            counts = client.publish(train)
            for mark in marks:
                while True:
                    status = client.status()
                    used = status["cpu_s"] - status["render_cpu_s"] - start
                    if used >= mark:
                        break
                    time.sleep(0.2)
                figures = evaluate(capture, client.render, "test")
                after = client.status()
                spent = after["render_cpu_s"] - status["render_cpu_s"]
                row = {"mark_s": mark, "cpu_s": used, "steps": status["steps"]}
                row |= {
                    k: figures[k] for k in ("psnr", "psnr_known", "psnr_aligned", "ssim", "known")
                }
                row["render_cpu_s"] = spent / max(after["renders"] - status["renders"], 1)
                row["views"] = figures["views"]
                rows.append(row)
                peer = PEERS.get(capture.name, {}).get(int(mark)) if fold is None else None
                print(
                    f"{capture.name} {mark:.0f} s: {row['psnr']:.2f} dB, "
                    f"known {row['known']:.3f}, SSIM {row['ssim']:.3f}, peer {peer}",
                    flush=True,
                )
        daemon.terminate()
        daemon.wait(60)
        problems = len(map_check(Path(scratch) / "map"))
    return {
        "capture": capture.name, "fold": fold, "seed": seed, "sent": len(train),
        "held_out": [f.name for f in test], "accepted": counts["accepted"], "rows": rows,
        "modules": len(status["modules"]), "cell_size_m": status["cell_size_m"],
        "peak_memory_mb": status["peak_memory_mb"], "map_problems": problems,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if "model name" in line), "?")
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg(),
            "mclnf_edge": mclnf_edge.__version__, **versions}  # fmt: skip


def main() -> None:
    """Read the arguments, run what is missing, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    data = Path(os.environ.get("MCLNF_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--capture", nargs="*", default=["boruszyn", "ochota_a", "brighton"])
    parser.add_argument("--marks", default="15,30,60,120,240")
    parser.add_argument("--fold", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "bench_stream.json"
    )
    args = parser.parse_args()
    marks = [float(m) for m in args.marks.split(",")]
    known = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    for name in args.capture:
        path = Path(name) if Path(name).is_dir() else data / "drone" / name
        key = (path.name, args.fold, args.seed)
        if any((r["capture"], r["fold"], r["seed"]) == key for r in known):
            continue
        load = machine()
        known.append(run(path, marks, args.fold, args.seed) | {"machine": load})
        write_json(args.out, {"peers": PEERS, "runs": known})


if __name__ == "__main__":
    main()
