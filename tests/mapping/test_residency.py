"""Modules in memory within a budget: the rest comes from a real map on disk when it is needed."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mclnf_edge.inference.renderer import Renderer
from mclnf_edge.mapping.extents import Extents, Window, crossed, reachable
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.mapping.modules import Cell, Module, ModulePool
from mclnf_edge.mapping.residency import Residency
from mclnf_edge.store import MapStore
from mclnf_edge.types import Render
from tests.mapping import flights

GAIN = np.zeros(3, np.float32)
STEPS = 6


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapper, MapStore]:
    """A learned map with every module committed, all of it in memory."""
    made = flights.mapper(flights.flight().frames)
    for _ in range(20):
        made.step()
    store = MapStore.open(tmp_path_factory.mktemp("map") / "map")
    for module in made.learning():
        closing = made.close(module)
        assert closing.snapshot is not None
        module.digest = store.commit_module(closing.snapshot).digest
    assert len(made.modules) >= 4
    return made, store


def opened(store: MapStore, most: int) -> Mapper:
    """The map opened anew with room for `most` modules, none of them read yet."""
    again = flights.mapper_of_nothing()
    again.recall = store.load_module

    def load(module: Module) -> None:
        arrays = store.load_module(module.id, module.version).arrays
        module.slot = pool_of(again).load(module.cell, arrays)

    again.residency = Residency(again.modules, 10**9, load)
    for record in store.modules():
        again.adopt(None, record.meta, record.version, record.digest)
    again.residency.budget_bytes = most * pool_of(again).slot_bytes
    assert again.residency.most == most
    return again


def pool_of(mapper: Mapper) -> ModulePool:
    assert mapper.pool is not None
    return mapper.pool


def test_modules_answer_in_the_order_in_which_they_were_closed(
    closed: tuple[Mapper, MapStore],
) -> None:
    """In a map that is opened anew, too; one that is made then comes after all of them."""
    made, store = closed
    ranks = [pool_of(made).rank_of[m.cell] for m in made.modules.values()]
    assert sorted(ranks) == list(range(1, len(ranks) + 1))
    again = opened(store, len(ranks) + 1)
    pool = pool_of(again)
    assert pool.rank_of == pool_of(made).rank_of
    assert again.residency is not None
    again.residency.ensure(again.modules)
    for cell, slot in pool.slot_of.items():
        assert pool.rank[slot] == pool.rank_of[cell]
    new = pool.spawn((0, 99, 99), -1.0, 1.0)
    assert pool.rank[new.slot] > max(ranks)
    old = flights.mapper_of_nothing()
    for record in store.modules():
        meta = {key: value for key, value in record.meta.items() if key != "rank"}
        old.adopt(None, meta, record.version, record.digest)
    assert sorted(pool_of(old).rank_of.values()) == sorted(ranks), "an older map gets an order"


def residency_of(mapper: Mapper) -> Residency:
    assert mapper.residency is not None
    return mapper.residency


def shown(mapper: Mapper, view: int = 0) -> Render:
    at = flights.flight().views[view]
    return Renderer(residency=mapper.residency).render(mapper.pool, mapper.origins[0], at, GAIN)


def same(a: Render, b: Render) -> bool:
    depth = np.array_equal(a.depth, b.depth, equal_nan=True)
    return np.array_equal(a.rgb, b.rgb) and depth and np.array_equal(a.known, b.known)


def test_what_is_read_when_needed_renders_as_what_was_committed(
    closed: tuple[Mapper, MapStore],
) -> None:
    made, store = closed
    again = opened(store, len(made.modules))
    assert not pool_of(again).slot_of
    for view in range(2):
        assert same(shown(again, view), shown(made, view))


def test_a_module_dropped_and_read_again_renders_the_same(closed: tuple[Mapper, MapStore]) -> None:
    made, store = closed
    again = opened(store, len(made.modules))
    first, pool = shown(again), pool_of(again)
    for cell in list(pool.slot_of):
        pool.unload(cell)
    alone = Renderer().render(pool, again.origins[0], flights.flight().views[0], GAIN)
    assert not alone.known.any(), "what is not in memory is not made up"
    assert same(shown(again), first)


def test_a_view_of_more_than_the_budget_is_whole_and_the_budget_holds_again_after_it(
    closed: tuple[Mapper, MapStore], caplog: pytest.LogCaptureFixture
) -> None:
    made, store = closed
    again = opened(store, 2)
    with caplog.at_level(logging.WARNING):
        assert same(shown(again), shown(made))
        assert same(shown(again), shown(made))
    told = [r for r in caplog.records if "render.resident_mb" in r.getMessage()]
    assert len(told) == 1, "said once for as long as it lasts"
    assert len(pool_of(again).slot_of) > 2
    residency_of(again).ensure([next(iter(again.modules))])
    assert len(pool_of(again).slot_of) == 2


def test_the_least_recently_used_goes_and_pinned_ones_stay(
    closed: tuple[Mapper, MapStore],
) -> None:
    _, store = closed
    again = opened(store, 2)
    residency, pool = residency_of(again), pool_of(again)
    a, b, c, d = list(again.modules)[:4]
    residency.ensure([a])
    residency.pinned = {a}
    for cell in (b, c, d):
        residency.ensure([cell])
        assert set(pool.slot_of) == {a, cell}
    residency.pinned = set()
    residency.ensure([b])
    assert set(pool.slot_of) == {b, d}


def test_uncommitted_and_learning_modules_are_never_dropped(
    closed: tuple[Mapper, MapStore],
) -> None:
    _, store = closed
    again = opened(store, 1)
    residency, pool = residency_of(again), pool_of(again)
    a, b, c = list(again.modules)[:3]
    residency.ensure([a])
    digest, again.modules[a].digest = again.modules[a].digest, ""
    residency.ensure([b])
    assert set(pool.slot_of) == {a, b}
    again.modules[a].digest = digest
    pool.thaw(again.modules[a])
    residency.ensure([c])
    assert set(pool.slot_of) == {a, c}
    assert again.facts()["resident"] == 2
    assert again.facts()["resident_mb"] > 2 * pool.slot_bytes / 1e6, "what it learns with counts"
    pool.freeze(again.modules[a])
    residency.ensure([c])
    assert set(pool.slot_of) == {c}


def test_training_beside_modules_on_disk_changes_no_bit(closed: tuple[Mapper, MapStore]) -> None:
    """A flight over the border of a closed map: same modules, whatever was in memory."""
    made, store = closed
    over = flights.flight().shifted((12.0, 0.0, 0.0)).frames
    results = []
    for most in (1, len(made.modules) + 50):
        m = opened(store, most)
        if most > 1:
            residency_of(m).ensure(list(m.modules))
        for i, frame in enumerate(over):
            m.add(1000 + i, "session/again", replace(frame, timestamp=frame.timestamp + 60))
        m.draining = True
        assert m.settle()
        pool, residency = pool_of(m), residency_of(m)
        learning = {x.cell for x in m.learning()}
        for i in range(STEPS):
            assert m.step() is not None
            crossing = residency.pinned - learning
            assert crossing and residency.pinned <= pool.slot_of.keys()
            shown(m, i % 2)  # renders in between want other modules
            assert residency.pinned <= pool.slot_of.keys(), "rays of held frames cross them"
        results.append({x.cell: pool.arrays(x) | {"F": pool.fisher[x.row]} for x in m.learning()})
    few, all_of_them = results
    assert few.keys() == all_of_them.keys() and few
    for cell, arrays in few.items():
        for name, array in arrays.items():
            assert np.array_equal(array, all_of_them[cell][name]), (cell, name)


def test_without_its_closed_neighbours_a_module_learns_something_else(
    closed: tuple[Mapper, MapStore],
) -> None:
    """What the test before guards against does happen when nothing is pinned."""
    made, store = closed
    over = flights.flight().shifted((12.0, 0.0, 0.0)).frames
    features = []
    for pins in (True, False):
        m = opened(store, len(made.modules) + 50)
        for i, frame in enumerate(over):
            m.add(1000 + i, "session/again", replace(frame, timestamp=frame.timestamp + 60))
        m.draining = True
        m.settle()
        m.ray_targets()
        for module in [x for x in m.modules.values() if not pins and x.row < 0]:
            if module.cell in pool_of(m).slot_of:
                pool_of(m).unload(module.cell)
        for _ in range(STEPS):
            m.step()
        features.append({x.cell: pool_of(m).features[x.slot].copy() for x in m.learning()})
    assert any(not np.array_equal(a, features[1][cell]) for cell, a in features[0].items())


def grid(edge_m: float = 20.0, n: int = 40) -> Extents:
    """n x n inner cells and the outer ones above them, on rolling ground."""
    made = Extents()
    for ix in range(-n // 2, n // 2):
        for iy in range(-n // 2, n // 2):
            box = ((ix - 0.06) * edge_m, (iy - 0.06) * edge_m, 1.12 * edge_m)
            made.put((0, ix, iy), box, (float(np.sin(ix)), 1 / 8.0))
    return made


def marched(extents: Extents, ro: np.ndarray, rd: np.ndarray, reach: float) -> set[Cell]:
    """Cells whose box a ray is in at one of many places on its way through the band."""
    t = np.linspace(0, reach, 4000)
    rows, found = extents.of_site(0), set()
    low, high = extents.corners(rows)
    for o, d in zip(ro, rd, strict=True):
        at = o + t[:, None] * d
        at = at[(at[:, 2] >= -2) & (at[:, 2] <= 9)]
        for row, a, b in zip(rows, low + 0.03, high - 0.03, strict=True):
            if len(at) and ((at[:, :2] > a) & (at[:, :2] < b)).all(1).any():
                found.add(extents.cells([row])[0])
    return found


@pytest.mark.parametrize("tilt", [0.0, 0.7, 1.3, 1.7])
def test_no_cell_that_a_ray_crosses_is_left_out(tilt: float) -> None:
    extents, random = grid(n=16), np.random.default_rng(int(10 * tilt))
    c, s = np.cos(tilt), np.sin(tilt)
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]], np.float32)
    eye = np.array([3.0, -60.0, 30.0], np.float32)
    pixels = random.uniform((0, 0), (120, 90), (12, 2))
    rays = np.column_stack([(pixels[:, 0] - 60) / 100, (45 - pixels[:, 1]) / 100, -np.ones(12)])
    rays = rays @ turn.T
    rd = (rays / np.linalg.norm(rays, axis=1, keepdims=True)).astype(np.float32)
    ro, band, reach = np.repeat(eye[None], 12, axis=0), (-2.0, 9.0), 400.0
    exact = marched(extents, ro, rd, reach)
    window = Window(eye, turn, (100.0, 100.0, 60.0, 45.0), (0, 0, 120, 90), band, reach)
    pyramid = set(reachable(extents, window, 0))
    lines = set(crossed(extents, 0, ro, rd, band, reach))
    assert exact <= lines <= pyramid
    if tilt < 1:
        assert len(pyramid) < 0.25 * len(extents), "far fewer than all of them"


def test_finding_a_views_cells_among_thousands_takes_milliseconds() -> None:
    extents = grid(n=60)  # 3,600 of them
    eye = np.array([3.0, 0.0, 30.0], np.float32)
    window = Window(
        eye, np.eye(3, dtype=np.float32), (300.0, 300.0, 240.0, 180.0), (0, 0, 480, 360),
        (-2.0, 9.0), 1800.0,
    )  # fmt: skip
    best = 1.0
    for _ in range(10):
        began = time.perf_counter()
        extents.heights(extents.in_sight(eye, 0))
        cells = reachable(extents, window, 0)
        best = min(best, time.perf_counter() - began)
    assert best < 0.005 and 4 <= len(cells) <= 16


def test_extents_follow_what_comes_and_goes() -> None:
    extents = grid(n=6)
    version = extents.version
    extents.put((0, 0, 0), (-1.2, -1.2, 22.4), (0.0, 1 / 8.0))
    assert extents.version == version, "nothing has changed"
    extents.put((0, 1, 1), (18.8, 18.8, 22.4), (-50.0, 1 / 100.0))
    assert extents.version > version
    assert extents.heights(extents.rows([(0, 1, 1)])) == pytest.approx((-50.0, 50.0))
    for cell in extents.cells(extents.of_site(0))[::2]:
        extents.remove(cell)
        assert cell not in extents and not len(extents.rows([cell]))
    assert len(extents) == 18
    left = extents.cells(extents.of_site(0))
    assert extents.cells(extents.rows(left)) == left
    low, _ = extents.corners(extents.rows(left))
    assert np.allclose(low, (np.array(left)[:, 1:] - 0.06) * 20, atol=0.03)


def test_a_damaged_module_is_quarantined_when_it_is_read(
    tmp_path: Path, closed: tuple[Mapper, MapStore]
) -> None:
    made, store = closed
    with MapStore.open(tmp_path / "map") as copy:
        for record in store.modules():
            copy.commit_module(store.load_module(record.id, record.version))
        worker = flights.worker(copy)
        for record in copy.modules():
            worker._adopt(record)
        assert isinstance(worker.mapper, Mapper)
        path = tmp_path / "map" / "modules" / copy.modules()[0].file
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        residency_of(worker.mapper).ensure(list(worker.mapper.modules))
        assert [r.state for r in copy.modules()].count("quarantined") == 1
        assert len(pool_of(worker.mapper).slot_of) == len(made.modules) - 1
        assert len(pool_of(worker.mapper).extents) == len(made.modules) - 1
        worker._publish_state()
        told = [m["state"] for m in worker.state["modules"]]
        assert told.count("quarantined") == 1 and told.count("closed") == len(made.modules) - 1


def test_a_damaged_version_gives_way_to_the_one_before(
    tmp_path: Path, closed: tuple[Mapper, MapStore]
) -> None:
    _, store = closed
    with MapStore.open(tmp_path / "map") as copy:
        first = store.load_module(store.modules()[0].id)
        copy.commit_module(first)
        second = replace(first, version=2, arrays={**first.arrays})
        second.arrays["weights"] = first.arrays["weights"] + np.float32(1)
        path = tmp_path / "map" / "modules" / copy.commit_module(second).file
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        worker = flights.worker(copy)
        for record in copy.modules():
            worker._adopt(record)
        assert isinstance(worker.mapper, Mapper)
        (cell,) = worker.mapper.modules
        assert worker.mapper.modules[cell].version == 2
        residency_of(worker.mapper).ensure([cell])
        module, pool = worker.mapper.modules[cell], pool_of(worker.mapper)
        assert module.version == 1
        assert np.array_equal(pool.weights[module.slot], first.arrays["weights"])
        assert [r.state for r in copy.modules()] == ["closed", "quarantined"]
