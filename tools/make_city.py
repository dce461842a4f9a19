"""Write a generated city: `python tools/make_city.py OUT --blocks 12`; see docs/city.md."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from meta_trainer.city.__main__ import main  # noqa: E402

if __name__ == "__main__":
    typer.run(main)
