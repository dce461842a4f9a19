"""`python -m meta_trainer.city OUT`: write a generated city; see docs/city.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mclnf_edge.errors import ConfigError
from meta_trainer.city.write import PRESETS, Request, frame_count, generate

_DEFAULT = Request()


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of "480x270"; ConfigError otherwise."""
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise ConfigError(f"--size: expected WIDTHxHEIGHT such as 480x270, received {text!r}")
    return int(width), int(height)


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write; a stopped run in it goes on.")],
    blocks: Annotated[int, typer.Option(help="Blocks of the city.")] = _DEFAULT.blocks,
    seed: Annotated[int, typer.Option(help="Everything follows from it.")] = _DEFAULT.seed,
    mode: Annotated[str, typer.Option(help="aerial or street.")] = _DEFAULT.mode,
    frames_per_block: Annotated[int, typer.Option()] = _DEFAULT.frames_per_block,
    size: Annotated[str, typer.Option(help="Width x height in pixels.")] = "480x270",
    flight: Annotated[int, typer.Option(help="Write one flight of N frames, not blocks.")] = 0,
    style: Annotated[
        str, typer.Option(help="estate, suburb, centre, works, village or mixed.")
    ] = _DEFAULT.style,
    pattern: Annotated[
        str, typer.Option(help="nadir, oblique, mixed or long (altitude steps, revisits).")
    ] = "",
    altitude: Annotated[float, typer.Option(help="Metres above ground; 0 draws one.")] = 0.0,
    exposure_drift: Annotated[float, typer.Option(help="Brightness wander in stops.")] = 0.0,
    depth: Annotated[bool, typer.Option(help="Write depth beside the pictures.")] = True,
    preset: Annotated[
        str, typer.Option(help="demo (the city of `make demo`) or train (ten flights).")
    ] = "",
) -> None:
    """Write a generated city with exact poses and depth."""
    try:
        if preset and preset not in PRESETS:
            raise ConfigError(f"--preset: expected {' or '.join(PRESETS)}, received {preset!r}")
        width, height = parse_size(size)
        request = Request(
            blocks=blocks,
            seed=seed,
            mode=mode,  # type: ignore[arg-type]
            frames_per_block=frames_per_block,
            width=width,
            height=height,
            flight=flight,
            style=style,
            pattern=pattern or ("long" if flight else "mixed"),  # type: ignore[arg-type]
            altitude_m=altitude,
            exposure_drift=exposure_drift,
            depth=depth,
        )
        wanted = PRESETS[preset] if preset else {"": request}
        total = sum(frame_count(r) for r in wanted.values())
        with typer.progressbar(length=total, file=sys.stderr) as bar:
            for folder, each in wanted.items():
                generate(out / folder, each, lambda done, of, name: bar.update(1))
    except (ConfigError, OSError) as error:
        typer.echo(f"make_city: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{total} frames in {out}")


if __name__ == "__main__":
    typer.run(main)
