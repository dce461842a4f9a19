"""A process's peak memory is its own."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mclnf_edge import resident

CHILD = "from mclnf_edge import resident; print(resident.now_mb(), resident.peak_mb())"
PARENT = f"""
import subprocess, sys
fat = b"x" * 300_000_000
print(subprocess.run([sys.executable, "-c", {CHILD!r}], capture_output=True, text=True).stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_a_fat_parents_peak_is_not_its_childs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT], capture_output=True, text=True, check=True
    )
    resident, peak = map(float, done.stdout.split())
    assert 5 < resident < 1.05 * peak and peak < 150


def test_without_proc_the_peak_is_the_kernels_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "_STATUS", tmp_path / "none")
    unit = 1 if sys.platform == "darwin" else 1024
    known = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    assert resident.peak_mb() == pytest.approx(known, rel=0.05)
