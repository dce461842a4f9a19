"""Fixtures that several areas share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of real sample data: MCLNF_DATA, or `../shared/data` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MCLNF_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no sample data at {folder} (set MCLNF_DATA)")
    return folder
