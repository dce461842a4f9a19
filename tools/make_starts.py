"""Train the starts of the paper's tables that come with the package: `python tools/make_starts.py`.

Each data set's five learned starts (MOL, MAML+CL, OML, mod, MIM) at the `cpu` budget, as
`python -m meta_trainer reproduce` would train them, are put into `meta_trainer/starts/cpu/`, where
every later `reproduce` finds them. Stopped and started again it goes on; `--methods` shares the
work among processes; `--tasks` and `--widen` are for tables 5 and 4. What each training took goes
into `meta_trainer/starts/trainings.json`, which `report` shows.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from meta_trainer.config import TrainConfig  # noqa: E402
from meta_trainer.data import DATASETS  # noqa: E402
from meta_trainer.methods import METHODS, STARTS  # noqa: E402
from meta_trainer.reproduce import STAND_INS  # noqa: E402
from meta_trainer.runs import (  # noqa: E402
    SHIPPED,
    Job,
    Setting,
    budget_for,
    fitting,
    make_method,
    shipped_path,
    shipped_start,
    start_config,
)
from meta_trainer.trainer import train  # noqa: E402
from tools.measure import open_results, save  # noqa: E402


def main() -> int:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=list(STAND_INS))
    parser.add_argument("--methods", nargs="+", default=list(STARTS.values()), choices=METHODS)
    parser.add_argument("--cut", default="strips", choices=("strips", "interleaved"))
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--widen", type=int, default=1, help="times the usual width")
    parser.add_argument("--root", type=Path, default=None, help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("results"), help="checkpoints and logs")
    asked = parser.parse_args()
    for dataset in asked.datasets:
        setting = Setting(dataset, cut=asked.cut, tasks=asked.tasks, widen=asked.widen)
        job = Job(budget_for("cpu", dataset), asked.root, asked.out)
        for name in asked.methods:
            learned_on = DATASETS[dataset].starts or dataset
            method = make_method(name, setting)
            config = start_config(job, fitting(setting, method), method, learned_on)
            if shipped_start(config) is None:
                print(dataset, name, flush=True)
                path = shipped_path(config)
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(train(config, asked.root), path)
                keep(took(config, path))
    return 0


def took(config: TrainConfig, path: Path) -> dict[str, Any]:
    """Name, size and cost of a training that just ended, from its log; seconds are wall time."""
    with (Path(config.out) / "log.csv").open(newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    return {
        "name": path.stem, "dataset": config.dataset, "steps": int(last["step"]),
        "episodes": config.episodes * int(last["step"]), "seconds": float(last["seconds"]),
        "query_psnr": float(last["psnr"]), "bytes": path.stat().st_size,
        "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def keep(row: dict[str, Any]) -> None:
    """Put a row into the results, in the place of an older one of its name."""
    path = SHIPPED / "trainings.json"
    results = open_results(path, {"budget": "cpu"})
    results["rows"] = [r for r in results["rows"] if r["name"] != row["name"]] + [row]
    save(path, results)


if __name__ == "__main__":
    sys.exit(main())
