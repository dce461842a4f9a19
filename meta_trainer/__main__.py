"""`python -m meta_trainer train|city|evaluate|reproduce|report`: thin commands."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from mclnf_edge.errors import ConfigError, MclnfError

app = typer.Typer(no_args_is_help=True, add_completion=False)

Root = Annotated[
    Path | None,
    typer.Option(help="Folder of the data sets (default: MCLNF_DATA or ../shared/data)."),
]

Device = Annotated[str, typer.Option(help="auto, cpu or cuda; auto takes a CUDA device it finds.")]


@app.callback()
def _commands() -> None:
    """Meta-training and the paper's experiments."""


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML file, see configs/meta.")],
    root: Root = None,
    device: Device = "auto",
) -> None:
    """Meta-train an initialization; started again it goes on where it stopped."""
    from meta_trainer.config import load_config
    from meta_trainer.trainer import train as run

    typer.echo(run(load_config(config), root, found_device(device)))


@app.command()
def city(
    config: Annotated[Path, typer.Option(help="YAML file, see configs/meta/city.yaml.")],
    flights: Annotated[Path, typer.Option(help="Folder of generated flights, see docs/city.md.")],
    out: Annotated[Path, typer.Option(help="Initialization to write, for `serve --init`.")],
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine.")] = 1,
) -> None:
    """Learn the daemon's initialization; started again it goes on where it stopped."""
    from meta_trainer.city_init import load_city_config
    from meta_trainer.city_init import train as run

    settings = load_city_config(config)

    def tell(done: int, psnr: float) -> None:
        typer.echo(f"episode {done}/{settings.episodes}: training PSNR {psnr:.2f} dB", err=True)

    run(settings, flights, out, tell, threads)
    typer.echo(out)


@app.command()
def reproduce(
    target: Annotated[
        str,
        typer.Argument(
            help="table1 to table7, fig2 to fig4, controls, causes, causes3 to causes5, or all."
        ),
    ],
    budget: Annotated[str, typer.Option(help="smoke, cpu or paper.")] = "smoke",
    dataset: Annotated[
        str | None, typer.Option(help="One data set (default: all there are).")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A plain folder to evaluate on.")] = None,
    root: Root = None,
    out: Annotated[Path, typer.Option(help="Output folder; results in it are used.")] = Path(
        "results"
    ),
    signals: Annotated[
        int | None,
        typer.Option(min=1, help="How many signals are measured (default: the budget's number)."),
    ] = None,
    modules: Annotated[
        int, typer.Option(min=0, help="Modules of the modular methods; 0: one per task.")
    ] = 0,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compute a table or figure of the paper; stopped and started again it goes on."""
    from meta_trainer.data import DATASETS
    from meta_trainer.report import as_text
    from meta_trainer.reproduce import TARGETS, is_for
    from meta_trainer.reproduce import reproduce as run

    every = [name for name in TARGETS if dataset not in DATASETS or is_for(name, dataset)]
    for name in every if target == "all" else [target]:
        result = run(name, budget, dataset, data, root, out, signals, modules, found_device(device))
        typer.echo(json.dumps(result) if as_json else as_text(result))


@app.command()
def evaluate(
    init: Annotated[Path, typer.Option(help="An init.pt of this package.")],
    data: Annotated[Path | None, typer.Option(help="Plain folder of signals.")] = None,
    signals: Annotated[int, typer.Option(min=1, help="How many signals.")] = 4,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps per task, measured at powers of two.")
    ] = 64,
    batch: Annotated[int, typer.Option(min=0, help="Coordinates per task and step, 0: all.")] = 0,
    root: Root = None,
    device: Device = "auto",
) -> None:
    """Adapt an initialization to held-out signals; prints PSNR per number of steps as JSON."""
    from meta_trainer.trainer import evaluate_init

    found = evaluate_init(init, data, signals, steps, batch, root, found_device(device))
    typer.echo(json.dumps(found, indent=1))


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder that `reproduce` wrote.")] = Path("results"),
) -> None:
    """Write report.html and report.md from the results in a folder."""
    from meta_trainer.report import write_report

    for path in write_report(out):
        typer.echo(path)


def found_device(asked: str) -> str:
    """What `--device` comes to; ConfigError for another name, DeviceError where there is none."""
    from mclnf_edge.mapping.engines import choose

    if asked not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device: expected auto, cpu or cuda, received {asked!r}")
    return choose("torch", asked, "planes").device


def main() -> None:
    """Run the command line; a named error goes to stderr with exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        app()
    except MclnfError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
