"""`python -m meta_trainer train|evaluate|reproduce|report`: thin commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mclnf_edge.errors import MclnfError

app = typer.Typer(no_args_is_help=True, add_completion=False)

Root = Annotated[
    Path | None,
    typer.Option(help="Folder of the data sets (default: MCLNF_DATA or ../shared/data)."),
]


@app.callback()
def _commands() -> None:
    """Meta-training and the paper's experiments."""


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML file, see configs/meta.")], root: Root = None
) -> None:
    """Meta-train an initialization; started again it goes on where it stopped."""
    from meta_trainer.config import load_config
    from meta_trainer.trainer import train as run

    typer.echo(run(load_config(config), root))


def main() -> None:
    """Run the command line; a named error goes to stderr with exit code 2."""
    try:
        app()
    except MclnfError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
