"""A daemon with many more modules than its memory may hold."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from mclnf_edge.store import MapStore, map_check
from mclnf_edge.types import ModuleSnapshot, Render, View
from tests import blocks
from tests.daemon.conftest import CONFIG, Daemon
from tests.mapping import flights
from tools.many_modules import learned_module, spread

MODULES = 400
BUDGET_MB = 16
READY_S, MORE_S = 3.0, 0.7
"""CPU seconds a restart may take; on a slower machine, how many more than with an empty map."""
SLACK_MB = 12.0
"""What renders take besides modules."""
STATUS_S = 1.0
"""The daemon writes down what `status` shows every quarter of a second."""


@pytest.fixture(scope="module")
def module() -> ModuleSnapshot:
    made = flights.mapper(flights.flight().frames)
    for _ in range(30):
        made.step()
    return learned_module(made)


def over(module: ModuleSnapshot, cell: tuple[int, int, int]) -> View:
    """A view of a copy of the module from 30 m above its middle."""
    at = (np.array(cell[1:]) + 0.5) * flights.CELL_M + module.meta["origin"][:2]
    return View(blocks.camera(64, 48), blocks.pose(float(at[0]), float(at[1]), 30.0, 0.05, 0.1))


def resident_mb(daemon: Daemon) -> float:
    assert daemon.process is not None
    return float(psutil.Process(daemon.process.pid).memory_info().rss) / 1e6


def cpu_s(daemon: Daemon) -> float:
    """CPU seconds of the process so far: what its start takes on a machine that does no more."""
    assert daemon.process is not None
    times = psutil.Process(daemon.process.pid).cpu_times()
    return float(times.user + times.system)


def tour(daemon: Daemon, views: list[View]) -> tuple[list[Render], float, dict[str, object]]:
    """Every view once; what they were, by how much memory grew from the first on, and status."""
    with daemon.client() as client:
        client.render(views[0])
        before = resident_mb(daemon)
        shown = [client.render(view) for view in views]
        grown = resident_mb(daemon) - before
        time.sleep(STATUS_S)
        return shown, grown, client.status()


def test_memory_is_the_budgets_whatever_the_map_holds(
    tmp_path: Path, module: ModuleSnapshot
) -> None:
    daemon = Daemon(tmp_path).start()  # makes the empty map
    empty = cpu_s(daemon)
    assert daemon.stop() == 0
    with MapStore.open(daemon.map) as store:
        cells = spread(module, store, 0, MODULES)
    views = [over(module, cell) for cell in cells[::4]]
    tours = []
    try:
        for budget in (BUDGET_MB, 512):
            daemon.config.write_text(CONFIG + f"render: {{resident_mb: {budget}}}\n")
            ready = cpu_s(daemon.start())
            assert ready < max(READY_S, empty + MORE_S)
            with daemon.client() as client:
                assert len(client.status()["modules"]) == MODULES
            daemon.warm()
            tours.append(tour(daemon, views))
            daemon.kill()
    finally:
        if daemon.process is not None:
            daemon.kill()
    (few, grown, status), (many, all_of_it, unbounded) = tours
    assert all(np.array_equal(a.rgb, b.rgb) for a, b in zip(few, many, strict=True))
    assert all(
        a.modules == b.modules and len(a.modules) > 1 for a, b in zip(few, many, strict=True)
    )
    assert np.mean([render.known.mean() for render in few if render.known is not None]) > 0.3
    assert status["resident_mb"] <= BUDGET_MB and status["resident_budget_mb"] == BUDGET_MB
    assert unbounded["resident"] == MODULES > 3 * status["resident"]
    assert grown < BUDGET_MB + SLACK_MB < all_of_it
    assert map_check(daemon.map) == []
