"""The mapper on a small generated flight: learning, closing, restarts, offsets, outliers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mclnf_edge.config import MapConfig
from mclnf_edge.engine import volume
from mclnf_edge.images import encode_image
from mclnf_edge.mapping.mapper import Closing, Mapper
from mclnf_edge.mapping.modules import ModulePool
from mclnf_edge.store.checkpoints import Checkpoints
from mclnf_edge.types import ModuleSnapshot
from tests.mapping import flights
from tests.mapping.flights import ADAPT, CELL_M, FIELD, Flight, learn, mapper, render, score

ARRAYS = ("features", "weights", "density", "surface", "seen", "box", "band")


@pytest.fixture(scope="module")
def flight() -> Flight:
    return flights.flight()


@pytest.fixture(scope="module")
def learned(flight: Flight) -> tuple[Mapper, float]:
    """A mapper that spent its whole budget, and its score as it was seeded."""
    m = mapper(flight.frames)
    seeded = score(m, flight)
    assert learn(m) > 50
    return m, seeded


def slot_bytes(m: Mapper, slot: int) -> bytes:
    """Everything that is rendered of one module."""
    assert m.pool is not None
    return b"".join(np.ascontiguousarray(getattr(m.pool, name)[slot]).tobytes() for name in ARRAYS)


# -- learning ---------------------------------------------------------------------------------


def test_steps_raise_the_held_out_psnr(flight: Flight, learned: tuple[Mapper, float]) -> None:
    m, seeded = learned
    done = score(m, flight)
    assert seeded > flight.mean_psnr() + 6, "the swept and painted start is a picture already"
    assert done > seeded + 1
    assert m.progress() == 1 and len(m.modules) >= 4
    assert all(render(m, view).known.mean() > 0.9 for view in flight.views)


def test_depth_is_right(flight: Flight, learned: tuple[Mapper, float]) -> None:
    depth = render(learned[0], flight.views[0]).depth
    assert np.nanmin(depth) > 20 and np.nanmax(depth) < 36
    corner = depth[:10, :10]
    assert abs(np.nanmedian(corner) - 30) < 1.5  # ground; 4 m above it the middle of a block
    assert abs(np.nanmedian(depth[40:60, 45:60]) - 26) < 1.5


def test_weights_keep_the_mean_and_do_something(flight: Flight) -> None:
    m = mapper(flight.frames[:4])
    seen: list[Any] = []
    weigh = m.optimizer.weigh

    def watched(pool: ModulePool, scene: volume.Scene, d_rgb: Any) -> Any:
        w = weigh(pool, scene, d_rgb)
        seen.append((w, np.abs(d_rgb).sum(1) > 0))
        return w

    m.optimizer.weigh = watched  # type: ignore[method-assign]
    learn(m, 8)
    assert len(seen) == 8
    for w, live in seen:
        assert w[live].mean() == pytest.approx(1, abs=0.01)
        assert w[live].max() > 1.1 > w[live].min() and w.min() > 0


def test_two_threads_learn_as_well_as_one(flight: Flight) -> None:
    one, two = mapper(flight.frames[:4], threads=1), mapper(flight.frames[:4], threads=2)
    learn(one, 10)
    learn(two, 10)
    assert one.pool is not None and two.pool is not None
    assert score(one, flight) == pytest.approx(score(two, flight), abs=0.02)
    assert np.allclose(one.pool.weights, two.pool.weights, atol=2e-3)


# -- outliers ---------------------------------------------------------------------------------


def corrupted(flight: Flight, share: float) -> Flight:
    """The flight with that share of pixels in random colours."""
    random = np.random.default_rng(0)
    frames = []
    for f in flight.frames:
        rgb = cv2.cvtColor(cv2.imdecode(np.frombuffer(f.image, np.uint8), 1), cv2.COLOR_BGR2RGB)
        bad = random.random(rgb.shape[:2]) < share
        rgb[bad] = random.integers(0, 2, (int(bad.sum()), 3)) * 255
        frames.append(replace(f, image=encode_image(rgb, "png")))
    return replace(flight, frames=frames)


def test_one_percent_of_outliers_costs_little(flight: Flight) -> None:
    bad = corrupted(flight, 0.01)
    scores: dict[str, list[float]] = {"clean": [], "capped": [], "open": []}
    for seed in range(3):  # one seed's differences vary by 0.05 dB
        for name, over, cap in (("clean", flight, 4.0), ("capped", bad, 4.0), ("open", bad, 1e6)):
            m = mapper(over.frames, robust_cap=cap, seed=seed)
            learn(m, 40)
            scores[name].append(score(m, flight))
    clean, capped, uncapped = (float(np.mean(found)) for found in scores.values())
    assert capped > clean - 0.4
    assert uncapped < capped - 0.07


# -- minimum of rays --------------------------------------------------------------------------


def test_every_frame_has_its_minimum_before_its_module_closes(flight: Flight) -> None:
    least = 1500
    m = mapper(flight.frames, passes=0.02, budget_s_per_frame=0.001, min_rays_per_frame=least)
    early = {f.id: f.rays for f in m.frames.values()}
    assert max(early.values()) < least
    let_go: dict[int, int] = {}
    for _ in range(300):
        report = m.step()
        for module in m.finished():
            short = [f.id for f in m.frames.values() if module.cell in f.tiles and f.rays < least]
            assert not short
            closing = m.close(module)
            let_go |= closing.let_go
            m.forget(closing.let_go)
        if report is None:
            break
    assert not m.frames and sorted(let_go) == list(range(len(flight.frames)))
    assert min(let_go.values()) >= least
    assert max(let_go.values()) < 3 * least, "the budget itself was long spent"


def test_frames_let_go_early_take_their_budget_along(flight: Flight) -> None:
    """A stream longer than memory: later frames are learned as thoroughly as the first ones."""
    m = mapper(flight.frames[:4])
    learn(m)
    assert m.progress() == 1
    gone = m.shed(m.held_bytes // 2)
    assert gone and min(gone.values()) >= ADAPT.min_rays_per_frame
    m.forget(gone)
    assert m.progress() == pytest.approx(1, abs=1e-6)
    for i, frame in enumerate(flight.frames[4:], 4):
        m.add(i, flights.STREAM, frame)
    m.settle()
    assert m.progress() < 0.9
    learn(m)
    pixels = 128 * 96
    assert min(f.rays for f in m.frames.values() if f.id >= 4) > 0.5 * pixels


# -- closing ----------------------------------------------------------------------------------


def test_what_is_closed_stays_as_it_is(flight: Flight) -> None:
    m = mapper(flight.frames)
    assert m.pool is not None
    learn(m, 10)
    first, second = sorted(m.modules.values(), key=lambda x: -x.rays)[:2]  # neighbours
    closing = m.close(first)
    assert closing.snapshot is not None and first.state == "closed"
    frozen, open_before = slot_bytes(m, first.slot), slot_bytes(m, second.slot)
    row_before = second.rays
    assert learn(m, 15) == 15
    assert second.rays > row_before and slot_bytes(m, second.slot) != open_before
    assert slot_bytes(m, first.slot) == frozen
    for name, array in closing.snapshot.arrays.items():
        if name in ARRAYS:
            assert np.array_equal(getattr(m.pool, name)[first.slot], array), name


def test_adopted_modules_render_the_same(flight: Flight, learned: tuple[Mapper, float]) -> None:
    m = learned[0]
    again = Mapper(MapConfig(cell_size_m="auto"), FIELD, ADAPT, threads=1)
    for module in list(m.modules.values()):
        closing: Closing = m.close(module)
        assert closing.snapshot is not None
        meta = json.loads(json.dumps(closing.snapshot.meta))
        again.adopt(closing.snapshot.arrays, meta, 1, "digest")
    assert again.pool is not None and again.pool.cell_m == CELL_M
    assert all(x.state == "closed" for x in again.modules.values())
    for view in flight.views:
        a, b = render(m, view), render(again, view)
        assert np.array_equal(a.rgb, b.rgb)
        assert np.array_equal(a.depth, b.depth, equal_nan=True)
        assert a.modules == b.modules


# -- restarts ---------------------------------------------------------------------------------


def test_a_restart_changes_no_bit(flight: Flight, tmp_path: Path) -> None:
    m = mapper(flight.frames)
    learn(m, 6)
    assert m.pool is not None
    m.pool.rank_learning(next(iter(m.modules)))  # not in the order of their making any more
    store = Checkpoints(tmp_path)
    store.save("open", *m.checkpoint())
    loaded = store.load("open")
    assert loaded is not None
    again = Mapper(MapConfig(cell_size_m=CELL_M), FIELD, ADAPT, flights.INIT, 1)
    again.restore(*loaded)
    for i, frame in enumerate(flight.frames):
        again.add(i, flights.STREAM, frame, kept=loaded[1]["frames"][str(i)])
    again.draining = True
    assert not again.settle(), "nothing new came in"
    for _ in range(5):
        before, after = m.step(), again.step()
        assert before is not None and after is not None
        assert before.psnr == after.psnr and np.array_equal(before.weights, after.weights)
    assert again.pool is not None and m.pool.rank_of == again.pool.rank_of
    assert list(m.modules) == list(again.modules)
    for cell, module in m.modules.items():
        twin = again.modules[cell]
        assert slot_bytes(m, module.slot) == slot_bytes(again, twin.slot)
        for name in ("fisher", "moment", "square", "ray_fisher", "adam_steps"):
            a, b = getattr(m.pool, name)[module.row], getattr(again.pool, name)[twin.row]
            assert np.array_equal(a, b), name
    for a, b in zip(m.frames.values(), again.frames.values(), strict=True):
        assert np.array_equal(a.gain, b.gain) and a.rays == b.rays and a.band == b.band
    told = [x.exposures.meter("front", 1.2)(0.5) for x in (m, again)]
    assert np.array_equal(*told)


def test_frames_after_a_restart_are_settled(flight: Flight) -> None:
    m = mapper(flight.frames[:6])
    learn(m, 3)
    arrays, meta = m.checkpoint()
    again = Mapper(MapConfig(cell_size_m=CELL_M), FIELD, ADAPT, flights.INIT, 1)
    again.restore(arrays, json.loads(json.dumps(meta)))
    for i, frame in enumerate(flight.frames):
        again.add(i, flights.STREAM, frame, kept=meta["frames"].get(str(i)))
    assert again.settle() and all(f.tiles for f in again.frames.values())


# -- world ------------------------------------------------------------------------------------


def test_a_module_is_seeded_from_all_its_frames_once_the_flight_has_moved_on(
    flight: Flight,
) -> None:
    m = Mapper(MapConfig(cell_size_m=CELL_M), FIELD, ADAPT, flights.INIT, 1)
    for i, frame in enumerate(flight.frames):
        m.add(i, flights.STREAM, frame)
        m.settle()
        m.step()
    before = score(m, flight)
    assert not any(m._left(module) for module in m.modules.values()), "more frames may come"
    for module in m.modules.values():
        module.last_frame_at -= 60.0
    stale = [module for module in m.modules.values() if m._left(module)]
    assert stale and m.settle() and not m.settle(), "once, not at every step"
    views = {c: sum(c in f.tiles for f in m.frames.values()) for c in m.modules}
    assert all(1.1 * m.modules[c].seeded_with >= views[c] for c in m.modules)
    assert score(m, flight) > before


def test_a_module_whose_task_has_ended_waits_for_no_more_frames(flight: Flight) -> None:
    config = MapConfig(cell_size_m=CELL_M, tasks="publisher")
    m = Mapper(config, FIELD, ADAPT, flights.INIT, 1)
    for i, frame in enumerate(flight.frames):
        m.add(i, flights.STREAM, replace(frame, task="east"))
        m.settle()
        m.step()
    assert not any(m._left(module) for module in m.learning()), "more frames may come"
    m.end_task(flights.STREAM, "east")
    assert any(m._left(module) for module in m.learning())
    assert m.settle() and not m.settle()
    assert not any(m._left(module) or module.fresh for module in m.learning())
    learn(m)
    for module in m.modules.values():
        module.last_frame_at -= 60.0
    assert not m.settle(), "what has learned is left alone"


def test_what_a_later_task_sees_waits_for_the_next_version(flight: Flight) -> None:
    kept: dict[tuple[str, int], ModuleSnapshot] = {}
    config = MapConfig(cell_size_m=CELL_M, tasks="publisher", inactivity_s=1e6)
    m = Mapper(config, FIELD, ADAPT, flights.INIT, 1, recall=lambda name, v: kept[name, v])
    for i, frame in enumerate(flight.frames):
        m.add(i, flights.STREAM, replace(frame, task="east"))
    m.settle()
    for i, frame in enumerate(flight.frames):
        m.add(100 + i, flights.STREAM, replace(frame, task="west"))
    m.settle()
    learn(m)
    assert all(max(module.frames) < 100 for module in m.learning())
    assert all((f.rays > 0) == (f.id < 100) for f in m.frames.values())
    finished = m.finished()
    assert len(finished) == len(m.modules) > 2, "the next task ended the one before"
    for module in finished:
        closing = m.close(module)
        assert closing.snapshot is not None and set(closing.let_go) <= set(range(100))
        kept[module.id, 1] = closing.snapshot
        m.forget(closing.let_go)
    assert m.settle() and {module.version for module in m.learning()} == {2}
    assert all(min(module.frames - {*range(100)}) >= 100 for module in m.learning())
    assert m.step() is not None


def test_the_end_of_a_streams_task_closes_what_its_frames_are_in(flight: Flight) -> None:
    m = Mapper(MapConfig(cell_size_m=CELL_M), FIELD, ADAPT, flights.INIT, 1)
    for i, frame in enumerate(flight.frames):
        m.add(i, "session/here", frame)
    for i, frame in enumerate(flight.shifted((1000.0, 0.0, 0.0)).frames):
        m.add(100 + i, "session/there", replace(frame, task="roof"))
    m.settle(last=True)
    for stream, task in (("session/there", "street"), ("session/elsewhere", None)):
        m.end_task(stream, task)
        assert not any(module.asked for module in m.learning())
    m.end_task("session/there", "roof")
    asked = {min(module.frames) >= 100 for module in m.learning() if module.asked}
    assert asked == {True}
    m.end_task("session/here", None)
    assert all(module.asked for module in m.learning())


def test_each_stream_hovers_at_its_own_height(flight: Flight) -> None:
    m = Mapper(MapConfig(cell_size_m=CELL_M), FIELD, ADAPT, flights.INIT, 1)
    for i, frame in enumerate(flight.frames):
        m.add(i, "session/drone", frame)
        low = frame.T_world_camera.copy()
        low[2, 3] -= 26.0  # four metres above the ground
        m.add(100 + i, "session/robot", replace(frame, T_world_camera=low, height_m=4.0))
    assert m.hover_m["session/drone"] == pytest.approx(0.004 * 30, rel=0.2)
    assert m.hover_m["session/robot"] < 0.25 * m.hover_m["session/drone"]


def test_a_lone_frame_is_mapped_when_no_other_came(flight: Flight) -> None:
    m = Mapper(MapConfig(cell_size_m=CELL_M), FIELD, ADAPT, flights.INIT, 1)
    m.add(0, flights.STREAM, replace(flight.frames[0], height_m=None))
    assert not m.settle(), "another one may come"
    m.frames[0].arrived -= 60.0
    assert m.settle() and m.learning() and m.step() is not None


def test_frames_that_taught_nothing_are_counted(flight: Flight) -> None:
    m = mapper(flight.frames)
    learn(m)
    for module in m.finished():
        m.forget(m.close(module).let_go)
    assert m.facts()["frames_untrained"] == 0 and not m.frames
    m.add(50, flights.STREAM, flight.frames[0])
    m.settle()
    assert m.unused() == {50: 0}
    m.forget(m.unused())
    assert m.facts()["frames_untrained"] == 1


def test_a_slow_flight_is_learned_as_well_as_one_that_came_at_once(flight: Flight) -> None:
    """Modules that were through with two frames begin anew on the surface that more have shown."""
    slow, at_once = (Mapper(MapConfig(cell_size_m=CELL_M), FIELD, ADAPT, flights.INIT, 1)
                     for _ in range(2))  # fmt: skip
    begun: list[int] = []
    for i, frame in enumerate(flight.frames):
        slow.add(i, flights.STREAM, frame)
        slow.settle()
        begun += [f.id for f in slow.frames.values() if f.id < i and f.rays == 0]
        learn(slow)
        at_once.add(i, flights.STREAM, frame)
    assert begun, "what frames taught a module that began anew does not count"
    for m in (slow, at_once):
        for module in m.modules.values():
            module.last_frame_at -= 60.0
        m.settle()
        learn(m)
        assert all(f.rays >= ADAPT.min_rays_per_frame for f in m.frames.values())
    assert score(slow, flight) > score(at_once, flight) - 0.5


def test_ground_that_later_frames_see_is_added_to_what_was_learned(flight: Flight) -> None:
    m = mapper(flight.frames[:4])
    m.draining = False
    learn(m)
    assert m.pool is not None
    for module in m.modules.values():
        module.seeded_with = 99  # none begins anew
    before = {c: {n: a.copy() for n, a in m.pool.arrays(x).items()} for c, x in m.modules.items()}
    learned = {c: m.pool.fisher[module.row] > 0 for c, module in m.modules.items()}
    rays, unknown = {c: module.rays for c, module in m.modules.items()}, [unseen(m, flight)]
    for i, frame in enumerate(flight.frames[4:6]):
        m.add(4 + i, flights.STREAM, frame)
    m.settle()
    unknown.append(unseen(m, flight))
    assert unknown[1] < 0.6 * unknown[0], "two frames more than four: while the flight goes on"
    assert any(module.fresh for module in m.modules.values()), "with one more it waits"
    for module in m.modules.values():
        module.last_frame_at -= 60.0
    assert m.settle() and not m.settle(), "once, not at every step"
    assert not any(module.fresh for module in m.modules.values())
    kept = [c for c in before if c in m.modules]
    assert len(kept) >= 4
    for c in kept:
        now, was = m.pool.arrays(m.modules[c]), before[c]["seen"] > 0
        assert m.modules[c].rays == rays[c] > 0, "it goes on from what it has learned"
        assert np.array_equal(before[c]["weights"], now["weights"])
        assert np.array_equal(before[c]["features"][learned[c]], now["features"][learned[c]])
        assert np.array_equal(before[c]["surface"][was], now["surface"][was])
        assert (now["seen"] >= before[c]["seen"]).all()


def unseen(m: Mapper, flight: Flight) -> float:
    """Share of the kept views that the map does not know."""
    return float(np.mean([1 - render(m, view).known.mean() for view in flight.views]))


def test_a_module_that_let_frames_go_does_not_begin_anew(flight: Flight) -> None:
    m = mapper(flight.frames[:2])
    learn(m)
    module = max(m.modules.values(), key=lambda module: len(module.frames))
    assert m._may_begin_anew(module)
    m.forget({min(module.frames): 1})
    before, seeded = module.rays, module.seeded_with
    for i, frame in enumerate(flight.frames[2:]):
        m.add(2 + i, flights.STREAM, frame)
    m.settle()
    assert (module.rays, module.seeded_with) == (before, seeded) and before > 0


def test_a_cell_that_one_frame_saw_is_mapped_when_no_other_came(flight: Flight) -> None:
    m = Mapper(MapConfig(cell_size_m=CELL_M, inactivity_s=20.0), FIELD, ADAPT, flights.INIT, 1)
    for i in (0, 4):
        m.add(i, flights.STREAM, flight.frames[i])
    m.settle()
    alone = {c for f in m.frames.values() for c in f.tiles} - m.modules.keys()
    assert alone and not m.settle(), "another frame may come"
    for frame in m.frames.values():
        frame.arrived -= 60.0
    assert m.settle() and alone <= m.modules.keys()
    assert not m.settle()


def test_utm_sized_offsets_change_nothing(flight: Flight) -> None:
    scores = []
    for offset in ((0.0, 0.0, 0.0), (500_000.3, 5_000_000.7, 312.4)):
        where = flight.shifted(offset)
        m = mapper(where.frames)
        learn(m, 20)
        scores.append(score(m, where))
    assert scores[0] == pytest.approx(scores[1], abs=0.01)


# -- odd streams ------------------------------------------------------------------------------


def test_a_module_that_no_tile_reaches_any_more_is_given_up(flight: Flight) -> None:
    m = mapper(flight.frames)
    structure = m.structures[0]
    opened = set(m.modules)
    structure.points[:, 2] += 20  # the ground turns out to be much nearer: footprints shrink
    structure.rasters.clear()
    m.dirty = True
    m.settle()
    assert m.pool is not None
    gone = opened - set(m.modules)
    assert gone and not gone & m.pool.slot_of.keys() and not gone & structure.rasters.keys()
    assert all(m.tiles[cell] for cell in m.modules)
    learn(m)
    assert {x.cell for x in m.finished()} == set(m.modules)
    assert all(x.steps > 0 for x in m.modules.values())


def test_masked_pictures_teach_nothing(flight: Flight) -> None:
    cam = flight.frames[0].camera
    nothing = encode_image(np.zeros((cam.height, cam.width), np.uint8), "png")
    m = mapper([replace(f, mask=nothing) for f in flight.frames[:3]])
    assert m.pool is not None
    before = m.pool.weights.copy()
    learn(m, 3)
    assert m.optimizer.steps == 3 and m.psnr is None
    assert all(x.psnr is None for x in m.modules.values())
    assert np.array_equal(m.pool.weights, before)


def test_heights_far_below_the_origin_keep_their_centimetres(flight: Flight) -> None:
    """Stored in half precision, which knows -1,000 m to half a metre."""
    deep = flight.shifted((60.0, 0.0, -1000.0)).frames
    m = mapper([flight.frames[0], *deep])
    assert m.pool is not None
    for module in m.learning():
        before = m.pool.surface[module.slot].copy()
        closing = m.close(module)
        assert closing.snapshot is not None and "surface" not in closing.snapshot.arrays
        now = m.pool.surface[module.slot]
        height = 1 / m.pool.band[module.slot, 1]
        assert np.abs(now - before).max() < 1e-3 * height
        m.pool.load(module.cell, closing.snapshot.arrays)
        assert np.array_equal(m.pool.surface[module.slot], now)
    assert any(m.pool.band[module.slot, 0] < -900 for module in m.modules.values())


@pytest.mark.parametrize("wrong", [3, 4, 5])
def test_one_wrong_pose_does_not_sink_the_ground(flight: Flight, wrong: int) -> None:
    m = mapper(flight.frames)
    lowest = m.structures[0].points[:, 2].min()
    m.frames.clear()  # the first flight is closed, another one comes
    for i, frame in enumerate(flight.frames):
        pose = frame.T_world_camera.copy()
        pose[0, 3] += 300.0 * (i == wrong)
        m.add(50 + i, flights.STREAM, replace(frame, T_world_camera=pose))
    assert m.structures[0].points[:, 2].min() > lowest - 12 * 33.0, "else a kilometre and more"


def test_a_module_stops_when_its_rays_bring_little_more(flight: Flight) -> None:
    steps = {}
    for level in (0.0, 0.2, 0.9):
        m = mapper(flight.frames, passes=3.0, gain_level=level)
        steps[level] = learn(m, 5000)
        assert all(module.levelled for module in m.learning()) == (level == 0.9)
        assert len(m.finished()) == len(m.modules)
    assert steps[0.9] < 0.5 * steps[0.0] and steps[0.2] <= steps[0.0]
