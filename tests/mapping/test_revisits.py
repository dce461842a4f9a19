"""Versions of a module: opened by a revisit, guarded by its parent's information and probes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mclnf_edge.config import MapConfig
from mclnf_edge.mapping import revisits
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.mapping.modules import pack_information, unpack_information
from mclnf_edge.types import Frame, ModuleSnapshot
from tests.mapping import flights
from tests.mapping.flights import ADAPT, CELL_M, FIELD

Kept = dict[tuple[str, int], ModuleSnapshot]


def empty(kept: Kept, tasks: str = "grid") -> Mapper:
    config = MapConfig(cell_size_m=CELL_M, tasks=tasks)  # type: ignore[arg-type]
    recall = lambda name, version: kept[name, version]  # noqa: E731
    return Mapper(config, FIELD, ADAPT, flights.INIT, 1, recall)


def take(m: Mapper, kept: Kept, frames: list[Frame], first: int) -> None:
    """Map some frames to the end: every module they open is closed and committed."""
    for i, frame in enumerate(frames):
        m.add(first + i, flights.STREAM, frame)
    m.draining = True
    m.settle()
    while m.step() is not None or m.finished():
        commit(m, kept)
    m.forget(m.unused())
    m.draining = False
    assert not m.frames


def commit(m: Mapper, kept: Kept) -> None:
    for module in m.finished():
        closing = m.close(module)
        if closing.snapshot is not None:
            kept[closing.snapshot.id, closing.snapshot.version] = closing.snapshot
        m.forget(closing.let_go)


def spoiled(frame: Frame) -> Frame:
    """The frame with its picture exchanged for noise."""
    from mclnf_edge.images import encode_image

    size = (frame.camera.height, frame.camera.width, 3)
    noise = np.random.default_rng(frame.seq).integers(0, 256, size).astype(np.uint8)
    return replace(frame, image=encode_image(noise, "png"), encoding="png")


@pytest.fixture(scope="module")
def flight() -> flights.Flight:
    return flights.flight(16)


def test_information_survives_one_byte_a_texel() -> None:
    values = np.repeat(np.float32([0, 1e-20, 3e-5, 7.0]), 4)
    back = unpack_information(pack_information(values))
    assert back[0] == 0
    np.testing.assert_allclose(back[4:], values[4:], rtol=0.2)


def test_a_revisit_makes_a_second_version_that_is_no_worse(flight: flights.Flight) -> None:
    kept: Kept = {}
    m = empty(kept)
    take(m, kept, flight.frames[::2], 0)
    first = {name: s.arrays["features"].tobytes() for (name, _), s in kept.items()}
    before = flights.score(m, flight)
    take(m, kept, flight.frames[1::2], 100)
    again = [module for module in m.modules.values() if module.version == 2]
    assert again, "no cell was seen again"
    assert all(kept[x.id, 2].meta["rank"] == kept[x.id, 1].meta["rank"] for x in again)
    assert all(kept[module.id, 2].meta["parent"] == 1 for module in again)
    assert flights.score(m, flight) > before - 0.05
    assert first == {name: kept[name, 1].arrays["features"].tobytes() for name in first}


def test_a_revisit_that_spoils_the_map_does_not_stay(
    flight: flights.Flight, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up, or what it changed of known ground is taken back until probes hold."""
    verdicts: list[revisits.Verdict] = []
    judge = revisits.judge

    def spy(pool: Any, module: Any, parent: Any, show: revisits.Show) -> revisits.Verdict:
        verdict = judge(pool, module, parent, show)
        if verdict.share is not None:
            stays = revisits.probe_psnr(show, module.cell[0] // 2, parent.arrays["probes"])
            assert stays >= verdict.old - revisits.LOSS_DB
        verdicts.append(verdict)
        return verdict

    monkeypatch.setattr(revisits, "judge", spy)
    kept: Kept = {}
    m = empty(kept)
    take(m, kept, flight.frames[::2], 0)
    first = list(m.modules.values())
    take(m, kept, [spoiled(f) for f in flight.frames[1::2]], 100)
    assert m.pool is not None and verdicts
    assert all(v.share != 1 and v.new < v.old - revisits.LOSS_DB for v in verdicts)
    for module in first:
        if module.version == 1:
            committed = kept[module.id, 1].arrays["features"]
            np.testing.assert_array_equal(m.pool.features[module.slot], committed)


def test_what_a_revisit_changed_of_known_ground_is_taken_back_as_far_as_it_must(
    flight: flights.Flight,
) -> None:
    """By hand: of a version whose texels were moved, the largest share that holds stays."""
    kept: Kept = {}
    m = empty(kept)
    take(m, kept, flight.frames[::2], 0)
    assert m.pool is not None
    module = max(m.modules.values(), key=lambda x: x.tiles)
    parent = kept[module.id, 1]
    known = unpack_information(parent.arrays["information"]) > 0
    assert 0.1 < known.mean() < 1
    own = m.pool.arrays(module)
    before = own["features"].copy()
    old = revisits.probe_psnr(m._show, 0, parent.arrays["probes"])
    noise = np.random.default_rng(0).normal(0, 1, before.shape).astype(np.float32)
    noise[~known] *= 1e-4
    for size, adds, expected in ((0, False, 1.0), (3, True, 0.0), (3, False, None)):
        own["features"][:] = before + size * noise
        own["seen"][:] = parent.arrays["seen"]
        seen = own["seen"].ravel()
        place = np.flatnonzero(seen == 0)[0] if (seen == 0).any() else 0
        hidden = parent.arrays["seen"].ravel()[place]
        parent.arrays["seen"].ravel()[place] = 0
        seen[place] = adds
        verdict = revisits.judge(m.pool, module, parent, m._show)
        parent.arrays["seen"].ravel()[place] = hidden
        assert verdict.share == expected and verdict.old == pytest.approx(old)
        if expected is not None:
            got = revisits.probe_psnr(m._show, 0, parent.arrays["probes"])
            assert got >= old - revisits.LOSS_DB
            kept_as_known = own["features"][known]
            np.testing.assert_allclose(kept_as_known, (before + expected * size * noise)[known])
            np.testing.assert_allclose(own["features"][~known], (before + size * noise)[~known])
        else:
            assert verdict.new < old - revisits.LOSS_DB


def test_new_frames_take_their_exposure_from_closed_modules(flight: flights.Flight) -> None:
    kept: Kept = {}
    m = empty(kept)
    take(m, kept, flight.frames[::2], 0)
    dark = flight.frames[1]
    from mclnf_edge.images import decode_image, encode_image

    half = (decode_image(dark.image, dark.encoding, dark.camera) * 0.6).astype(np.uint8)
    m.add(500, flights.STREAM, replace(dark, image=encode_image(half, "png"), encoding="png"))
    m.draining = True
    m.settle()
    np.testing.assert_allclose(m.frames[500].gain, np.log(0.6), atol=0.08)


def test_a_publishers_task_closes_where_the_next_begins(flight: flights.Flight) -> None:
    m = empty({}, "publisher")
    for i, frame in enumerate(flight.frames[:6]):
        m.add(i, flights.STREAM, replace(frame, task="east"))
    m.settle()
    flights.learn(m)
    assert not m.finished(), "the task is still the stream's"
    m.end_task(flights.STREAM, "west")
    assert not m.finished(), "another task ended"
    m.end_task(flights.STREAM, "east")
    assert len(m.finished()) == len([x for x in m.modules.values() if x.row >= 0]) > 0


def test_a_time_window_closes_when_it_is_over(flight: flights.Flight) -> None:
    m = empty({}, "time")
    for i, frame in enumerate(flight.frames[:6]):
        m.add(i, flights.STREAM, replace(frame, timestamp=100.0 + i))
    m.settle()
    flights.learn(m)
    assert not m.finished()
    away = flight.shifted((400.0, 0.0, 0.0)).frames[0]
    m.add(50, flights.STREAM, replace(away, timestamp=125.0))
    assert m.finished()
