"""Held-out PSNR and SSIM of other trainers against CPU seconds, beside this daemon's.

    python -m tools.peers nerfacto --capture boruszyn ochota_a brighton
    python -m tools.peers opensplat --binary PATH
    python -m tools.peers instant-ngp splatfacto      # on a machine with a CUDA device
    python -m tools.peers                             # table and plot of what is there

Results are added to the JSON as they come; a run that is in it is not run again. README.md beside
this file says what each peer is and is given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mclnf_edge.captures import open_capture
from mclnf_edge.errors import MclnfError
from mclnf_edge.images import decode_image
from mclnf_edge.report import write_json, write_picture
from tools import measure
from tools.peers import opensplat
from tools.peers import project as projects
from tools.peers.project import ONE_THREAD, RGB, HeldOut, PeerError
from tools.table_stream import row_of

HERE = Path(__file__).parent
PINS = HERE / "nerfstudio.txt"
NERFSTUDIO = ("nerfacto", "instant-ngp", "splatfacto")
NEEDS_CUDA = ("instant-ngp", "splatfacto")
"""Their kernels (nerfacc, gsplat) exist for CUDA alone."""
PEERS = (*NERFSTUDIO, "opensplat")
CUDA_DEVICES = (Path("/dev/nvidia0"), Path("/dev/nvhost-gpu"))
OURS = "this daemon"

Row = dict[str, Any]


def has_cuda() -> bool:
    """Whether the machine shows an NVIDIA device."""
    return any(path.exists() for path in CUDA_DEVICES)


def check(peers: Sequence[str], binary: Path | None) -> None:
    """PeerError for what cannot run here, before anything is installed."""
    for peer in peers:
        if peer in NEEDS_CUDA and not has_cuda():
            raise PeerError(f"{peer} needs a CUDA device, and this machine shows none")
        if peer == "opensplat" and binary is None:
            raise PeerError("opensplat is in no package: expected --binary PATH of a build")


def environment(folder: Path, pins: Path) -> Path:
    """The interpreter of the peer's own environment, made when it is not there yet.

    Its packages are those of `pins` and no others; another list makes another environment.
    PeerError, with the last lines, when pip fails.
    """
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()[:12]
    home = folder / f"{pins.stem}-{digest}"
    python, ready = home / "bin" / "python", home / ".ready"
    if not ready.exists():
        print(f"making an environment for {pins.stem} in {home.name} (some 6 GB)", flush=True)
        venv.create(home, with_pip=True, clear=True)
        words = [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(pins)]
        done = subprocess.run(words, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise PeerError(f"pip could not install {pins.name}: {done.stderr[-1000:]}")
        ready.touch()
    return python


def run_nerfstudio(
    peer: str,
    python: Path,
    folder: Path,
    marks: Sequence[float],
    seed: int,
    views: Sequence[HeldOut],
) -> Iterator[tuple[Row, list[RGB]]]:
    """A nerfstudio method in its environment; per mark its figures and the held-out views."""
    if peer == "splatfacto":
        projects.needs_points(folder / "project")
    out = folder / "out"
    job = {
        "method": peer, "project": str(folder / "project"), "out": str(out), "seed": seed,
        "device": "cuda" if has_cuda() else "cpu", "marks": list(marks),
        "views": [view.job() for view in views],
    }  # fmt: skip
    write_json(folder / "job.json", job)
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        words = [python, HERE / "nerfstudio_peer.py", folder / "job.json"]
        settings = {**os.environ, **ONE_THREAD}
        done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=settings)
    if done.returncode:
        raise PeerError(f"{peer} failed: {log.read_text(encoding='utf-8')[-1500:]}")
    for found in json.loads((out / "marks.json").read_text(encoding="utf-8")):
        at = out / f"{found['mark_s']:g}"
        shown = [(at / f"{v.name}.png").read_bytes() for v in views]
        yield (
            found,
            [decode_image(s, "png", v.camera) for s, v in zip(shown, views, strict=True)],
        )


def rows_of(
    measured: Iterable[tuple[Row, list[RGB]]], views: Sequence[HeldOut], keep: Path | None
) -> list[Row]:
    """A row per mark: the peer's figures and those of its pictures, which are kept in `keep`."""
    rows = []
    for found, pictures in measured:
        compared = [view.compare(p) for view, p in zip(views, pictures, strict=True)]
        means = {k: float(np.mean([c[k] for c in compared])) for k in compared[0] if k != "frame"}
        rows.append({**found, **means, "views": compared})
        for view, picture in zip(views, pictures, strict=True):
            if keep is not None:
                write_picture(keep / f"{found['mark_s']:g}" / f"{view.name}.png", picture)
    return rows


def run(peer: str, path: Path, args: argparse.Namespace) -> Row:
    """One peer on one capture."""
    capture = open_capture(path)
    keep = args.pictures / f"{peer}-{path.name}" if args.pictures else None
    before = measure.machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        views = projects.write(capture, path, folder / "project")
        began = time.monotonic()
        if peer == "opensplat":
            made = {"opensplat": opensplat.version(args.binary)}
            made["settings"] = " ".join(opensplat.SETTINGS)
            steps = opensplat.run(
                args.binary, folder / "project", folder / "out", args.marks, views
            )
        else:
            python = environment(args.environments, PINS)
            made = dict(line.split("==") for line in PINS.read_text().split() if "==" in line)
            made = {k: made[k] for k in ("nerfstudio", "torch", "nerfacc", "gsplat", "numpy")}
            steps = run_nerfstudio(peer, python, folder, args.marks, args.seed, views)
        rows = rows_of(steps, views, keep)
    wall = time.monotonic() - began
    clock = "wall" if peer != "opensplat" and has_cuda() else "cpu"
    for row in rows:
        print(f"{peer}, {path.name}, {row['mark_s']:g} s: {row['psnr']:.2f} dB", flush=True)
    return {
        "peer": peer, "capture": path.name, "seed": args.seed, "clock": clock, "versions": made,
        "train": len(capture.split("train").frames), "held_out": [view.name for view in views],
        "rows": rows, "wall_s": wall,
        "machine": before | {"load_after": [round(v, 2) for v in os.getloadavg()]},
    }  # fmt: skip


def together(own: Sequence[Row], peers: Sequence[Row]) -> list[Row]:
    """Runs of this daemon (own splits of bench_stream.py) and of peers, capture by capture."""
    ours = [run | {"peer": OURS, "clock": "cpu"} for run in own if run["fold"] is None]
    names = list(dict.fromkeys(run["capture"] for run in peers))
    return [r for name in names for r in (*ours, *peers) if r["capture"] == name]


def table(runs: Sequence[Row]) -> list[str]:
    """Markdown: a row per capture and trainer, PSNR at each mark, SSIM and render cost at the
    last."""
    marks = sorted({row["mark_s"] for run in runs for row in run["rows"]})
    heads = [f"{mark:g} s" for mark in marks]
    lines = row_of(["capture", "trainer", *heads, "SSIM", "render, CPU s a view"], head=True)
    for run in runs:
        at = {row["mark_s"]: row for row in run["rows"]}
        last = at[max(at)]
        cells = [f"{at[mark]['psnr']:.2f}" if mark in at else "–" for mark in marks]
        cost = last["render_cpu_s"] if run["peer"] == OURS else last["render_s"]
        tail = [f"{last['ssim']:.2f}", f"{cost:.2f}"]
        lines += row_of([run["capture"], run["peer"], *cells, *tail])
    return lines


def plot(runs: Sequence[Row], path: Path) -> None:
    """PSNR above SSIM, a column per capture, against seconds of training."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(run["capture"] for run in runs))
    trainers = list(dict.fromkeys(run["peer"] for run in runs))
    figure = Figure(figsize=(3.8 * len(names), 5.6), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False, sharex=True, sharey="row")
    for column, name in enumerate(names):
        for run in (run for run in runs if run["capture"] == name):
            seconds = [row["mark_s"] for row in run["rows"]]
            for line, key in enumerate(("psnr", "ssim")):
                panels[line, column].plot(
                    seconds,
                    [row[key] for row in run["rows"]],
                    "o-",
                    color=f"C{trainers.index(run['peer'])}",
                    label=f"{run['peer']}{' (wall)' if run['clock'] == 'wall' else ''}",
                )
        panels[0, column].set(title=name)
        panels[1, column].set(xscale="log", xlabel="CPU seconds of training")
        panels[1, column].set_xticks(seconds, [f"{s:g}" for s in seconds], minor=False)
        panels[1, column].minorticks_off()
    panels[0, 0].set(ylabel="held-out PSNR (dB)")
    panels[1, 0].set(ylabel="held-out SSIM")
    panels[0, 0].legend(fontsize=7)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("MCLNF_DATA", measure.ROOT.parent / "shared" / "data")) / "drone"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mclnf-edge" / "peers"
    results = measure.ROOT / "tools" / "results"
    parser.add_argument("peers", nargs="*", metavar="peer", help=", ".join(PEERS))
    parser.add_argument("--capture", nargs="*", default=["boruszyn", "ochota_a", "brighton"])
    parser.add_argument("--data", type=Path, default=data, help="folder of the captures")
    parser.add_argument("--marks", default="15,30,60,120,240", help="seconds of training")
    parser.add_argument("--seed", type=int, default=0, help="OpenSplat has its own, 42")
    parser.add_argument("--binary", type=Path, help="an OpenSplat build")
    parser.add_argument("--environments", type=Path, default=cache, help="where peers live")
    parser.add_argument("--pictures", type=Path, help="keep the held-out views here")
    parser.add_argument("--own", type=Path, default=results / "bench_stream.json")
    parser.add_argument("--out", type=Path, default=results / "peers.json")
    args = parser.parse_args(words)
    for peer in args.peers:
        if peer not in PEERS:
            parser.error(f"expected peers out of {', '.join(PEERS)}, received {peer!r}")
    try:
        args.marks = sorted(float(mark) for mark in args.marks.split(","))
    except ValueError:
        parser.error(f"--marks: expected seconds with commas between, received {args.marks!r}")
    if args.marks[0] <= 0:
        parser.error("--marks: expected seconds above 0")
    return args


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing, write the JSON, print the table and draw the plot."""
    args = arguments(words)
    check(args.peers, args.binary)
    known = json.loads(args.out.read_text("utf-8"))["runs"] if args.out.exists() else []
    for peer in args.peers:
        for name in args.capture:
            path = Path(name) if Path(name).is_dir() else args.data / name
            key = (peer, path.name, args.seed)
            if any((r["peer"], r["capture"], r["seed"]) == key for r in known):
                print(f"{peer}, {path.name}, seed {args.seed}: already there", flush=True)
                continue
            known.append(run(peer, path, args))
            write_json(args.out, {"runs": known})
    if known:
        own = json.loads(args.own.read_text("utf-8"))["runs"] if args.own.exists() else []
        both = together(own, known)
        plot(both, args.out.with_suffix(".png"))
        print("\n".join(table(both)))


if __name__ == "__main__":
    try:
        main()
    except MclnfError as error:
        sys.exit(f"error: {error}")
