"""`render.engine: auto`: what paints fastest is measured once, apart, and remembered."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mclnf_edge.config import ComputeConfig, FieldConfig, RenderConfig, ServeConfig
from mclnf_edge.daemon import painters
from tests.daemon.conftest import CONFIG, Daemon
from tests.mapping.flights import Flight

SMALL = ServeConfig(field=FieldConfig(plane_texels=32, plane_vertical=8, voxels=8))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mclnf-edge"


def finish(trial: painters.Trial) -> painters.Times:
    while (times := trial.result()) is None:
        time.sleep(0.05)
    return times


def test_the_fastest_paints_and_what_learns_where_nothing_is_known() -> None:
    assert painters.fastest({"learning": 20.0, "onnx": 9.0, "tensorrt": 12.0}) == "onnx"
    assert painters.fastest({"learning": 8.0, "onnx": 9.0}) == "learning"
    assert painters.fastest(None) == painters.fastest({}) == "learning"


def test_every_engine_that_paints_here_is_measured_and_remembered(cache: Path) -> None:
    assert painters.remembered(SMALL) is None
    times = finish(painters.Trial(SMALL))
    assert {"learning", "onnx"} <= times.keys() and all(0 < ms < 60_000 for ms in times.values())
    assert painters.remembered(SMALL) == times
    half = replace(SMALL, render=RenderConfig(precision="half"))
    torch = replace(SMALL, compute=ComputeConfig(engine="torch"))
    assert painters.remembered(half) is painters.remembered(torch) is None


@pytest.mark.parametrize("damage", ["", "{", '["onnx"]', '{"onnx": 3}', '{"learning": "fast"}'])
def test_a_damaged_memory_is_no_memory(cache: Path, damage: str) -> None:
    painters.remember(SMALL, {"learning": 1.0})
    (entry,) = cache.iterdir()
    entry.write_text(damage)
    assert painters.remembered(SMALL) is None


def test_a_trial_that_fails_changes_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painters, "_asked", lambda _: {"field": {"kind": "none"}})
    assert finish(painters.Trial(SMALL)) == {} and painters.remembered(SMALL) is None


def test_a_daemon_measures_on_its_first_start_and_says_what_it_found(
    tmp_path: Path, flight: Flight, cache: Path
) -> None:
    daemon = Daemon(tmp_path)
    daemon.start()
    try:
        with daemon.client("flight") as client:
            client.publish(flight.frames)
            end = time.monotonic() + 90
            while not (ms := client.status()["render_ms"]):
                assert time.monotonic() < end
                time.sleep(0.2)
            fastest = min(ms, key=ms.__getitem__)
            painted = "numba" if fastest == "learning" else fastest
            assert client.status()["render_engine"] == painted
        assert daemon.stop() == 0
        daemon.start()  # what was remembered is there from the first answer on
        with daemon.client() as client:
            assert client.status()["render_ms"] == ms
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.kill()


def test_what_cannot_paint_here_is_said_and_the_learning_engine_paints(
    tmp_path: Path, flight: Flight
) -> None:
    daemon = Daemon(tmp_path)
    daemon.config.write_text(CONFIG + "render: {engine: tensorrt}\n")
    daemon.start()
    try:
        with daemon.client() as client:
            assert client.status()["render_engine"] == "numba"
            assert np.isfinite(client.render(flight.views[0]).rgb).all()
        assert "render.engine tensorrt: expected cuda, received cpu" in daemon.log.read_text()
    finally:
        daemon.kill()
