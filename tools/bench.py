"""Speed beside the machine's own limits, part by part, as ratios taken in one run.

    python tools/bench.py [--parts fisher,ingest] [--data DIR] [--out FILE]

fisher: a step on point samples with exact and factored Fisher weights against the plain step.
views: the same for rays of the paper's radiance MLP, with the cross terms of a ray's samples.
rays: the same for the compiled engine's step on rays.
roofline: whole steps of the paper's networks against measured matrix product rate and bandwidth.
compilers: a SIREN's training step by eager autograd, torch.compile and this project's own passes.
ingest: frames acknowledged a second from four publishers, adaptation paused and running.
start: seconds from `serve` to its ready line, first status and first acknowledgement.
meta: meta-training episodes/s against a plain autograd loop with the same result.
processes: meta-training episodes/s in two processes (torchrun) against one.

Without `--parts` every part that the JSON does not hold yet is run; a named part is run again. Each
part notes the machine's load. CPU seconds count where the machine is shared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read once, when torch is first loaded
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mclnf_edge.report import write_json  # noqa: E402
from tools import speed_daemon, speed_steps, speed_torch  # noqa: E402
from tools.measure import ROOT, machine  # noqa: E402

Row = dict[str, Any]
PARTS: dict[str, Callable[[Path], Row]] = {
    "fisher": speed_torch.fisher,
    "views": speed_torch.views,
    "rays": speed_steps.rays,
    "roofline": speed_steps.roofline,
    "compilers": speed_torch.compilers,
    "ingest": speed_daemon.ingest,
    "start": speed_daemon.start,
    "meta": speed_steps.meta,
    "processes": speed_steps.processes,
}
NEEDS_CAPTURE = ("fisher", "views", "rays", "ingest", "start")


def leaves(row: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every figure of a part with its dotted name."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def wanted(named: str | None, kept: dict[str, Row]) -> list[str]:
    """The parts to run: those named, else those not measured yet."""
    if named is None:
        return [name for name in PARTS if name not in kept]
    parts = named.split(",")
    for name in parts:
        if name not in PARTS:
            raise SystemExit(f"--parts: expected {', '.join(PARTS)}; received {name!r}")
    return parts


def main() -> None:
    """Run the parts, write the JSON after each, print all that it holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("MCLNF_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--parts", help=f"comma-separated: {','.join(PARTS)}")
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "results" / "bench.json")
    args = parser.parse_args()
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    for name in wanted(args.parts, results):
        if name in NEEDS_CAPTURE and not (args.data / "drone" / "brighton").is_dir():
            print(f"{name}: skipped, no drone/brighton in {args.data.name}")
            continue
        print(f"{name} ...", flush=True)
        results[name] = PARTS[name](args.data)
        results[name]["machine"] = machine()
        write_json(args.out, results)
    for part, row in results.items():
        for name, value in leaves({k: v for k, v in row.items() if k != "machine"}):
            print(f"{part:10}{name:45}{value}")


if __name__ == "__main__":
    main()
