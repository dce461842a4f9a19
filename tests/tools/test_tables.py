"""What the tables compute: intervals, tasks, first hits, replay, one MLP for all planes."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")
torch = pytest.importorskip("torch")

from mclnf_edge.config import ServeConfig  # noqa: E402
from mclnf_edge.engine import surface  # noqa: E402
from mclnf_edge.engine.field import Layout  # noqa: E402
from mclnf_edge.mapping import mapper as mapping  # noqa: E402
from mclnf_edge.mapping.initialization import load_init  # noqa: E402
from mclnf_edge.mapping.modules import Cell, Module, ModulePool  # noqa: E402
from mclnf_edge.mapping.structure import RASTER, Structure  # noqa: E402
from mclnf_edge.types import Camera  # noqa: E402
from tests.mapping import flights  # noqa: E402
from tools import (  # noqa: E402
    measure,
    streams,
    table_continual,
    table_fields,
    table_flown,
    table_seeds,
    table_weights,
)
from tools.field_stream import compose  # noqa: E402
from tools.tasks import cut, first_hit, targets, task_map  # noqa: E402

CAMERA = Camera(40, 20, 20.0, 20.0, 20.0, 10.0)
LOOKING_DOWN = np.array([[1.0, 0, 0, 10], [0, 1, 0, 5], [0, 0, 1, 10], [0, 0, 0, 1]])
"""10 m above (10, 5): 40 pixels see 20 m of flat ground along x, 20 pixels 10 m along y."""


def test_a_difference_is_taken_view_by_view_and_named_only_when_its_interval_excludes_zero() -> (
    None
):
    random = np.random.default_rng(1)
    base = {f"view {i}": 20 + 3 * random.random() for i in range(12)}
    better = {view: value + 0.2 + 0.02 * random.random() for view, value in base.items()}
    found = measure.pair(better | {"another": 90.0}, base)
    assert found["views"] == 12 and found["difference_db"] == pytest.approx(0.21, abs=0.01)
    low, high = found["interval"]
    assert 0.2 < low < found["difference_db"] < high < 0.22
    assert found["verdict"] == "+0.21 dB"
    noisy = {view: value + (-1) ** i for i, (view, value) in enumerate(base.items())}
    assert measure.pair(noisy, base)["verdict"] == "no measurable difference"
    assert measure.pair({"view 0": 21.0}, base)["interval"] is None
    assert measure.words(measure.pair({"view 0": 21.0}, base)).endswith("(1 view: no interval)")


def test_too_few_views_give_an_interval_and_no_verdict() -> None:
    few = measure.pair({f"{i}": 21.0 + i for i in range(5)}, {f"{i}": 20.0 + i for i in range(5)})
    assert few["verdict"] == "too few views" and few["interval"] == [1.0, 1.0]
    assert measure.words(few) == "+1.00 [+1.00, +1.00]: too few views"
    six = measure.pair({f"{i}": 21.0 + i for i in range(6)}, {f"{i}": 20.0 + i for i in range(6)})
    assert six["verdict"] == "+1.00 dB" and measure.words(six) == "+1.00 [+1.00, +1.00]"


def test_results_of_another_protocol_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    results = measure.open_results(path, {"steps": 4})
    results["rows"].append({"capture": "a", "seed": 0})
    measure.save(path, results)
    again = measure.open_results(path, {"steps": 4})
    assert measure.find(again, capture="a", seed=0) is not None
    assert measure.find(again, capture="a", seed=1) is None
    assert json.loads(path.read_text())["machine"]["cores"] >= 1
    assert measure.open_results(path, {"steps": 8})["rows"] == []
    assert "torch" in json.loads(path.read_text())["machine"]
    for without in ({"rows": [{"capture": "a"}]}, [{"capture": "a"}]):
        path.write_text(json.dumps(without))
        assert measure.open_results(path, {"steps": 4}, "runs")["runs"] == []


def test_cells_are_cut_into_runs_of_equal_tiles_in_the_order_of_the_flight() -> None:
    count: dict[Cell, int] = {(0, x, 0): 10 for x in range(8)}
    place = {cell: 8.0 - cell[1] for cell in count}
    runs = cut(count, place, 4)
    assert [[cell[1] for cell in run] for run in runs] == [[7, 6], [5, 4], [3, 2], [1, 0]]
    assert streams.shares(runs, count, 100) == [25, 25, 25, 25]
    count[0, 7, 0] = 1000
    assert len(cut(count, place, 4)) < 4


def test_the_first_hit_is_on_the_near_side_of_a_wall() -> None:
    def wall(xy: np.ndarray) -> np.ndarray:
        """Ground at 0, a block 8 m high from x = 5 to 6, nothing known beyond x = 20."""
        height = np.where((xy[:, 0] > 5) & (xy[:, 0] < 6), 8.0, 0.0)
        return np.where(xy[:, 0] > 20, np.nan, height).astype(np.float32)

    eye = np.array([0, 0, 10], np.float32)
    aims = np.array([[4, 1, 0], [8, 0, 0], [5.5, 0, 8], [30, 0, 0], [0, 0, 20]], np.float32)
    xy, hit = first_hit(wall, eye, aims - eye, 9.0, -1.0)
    assert hit.tolist() == [True, True, True, False, False]
    np.testing.assert_allclose(xy[0], [4, 1], atol=0.01)
    assert 4.9 < xy[1, 0] < 5.2  # the block hides the ground behind it
    np.testing.assert_allclose(xy[2], [5.5, 0], atol=0.3)


def test_the_mask_of_a_task_is_the_pixels_above_its_cells() -> None:
    mapper = flat_map(cells=[(0, 0, 0), (0, 1, 0)])
    mask = task_map(mapper, [[(0, 1, 0)], [(0, 0, 0)]], CAMERA, LOOKING_DOWN)
    assert mask.shape == (20, 40)
    assert (mask[:, :19] == 1).all() and (mask[:, 21:] == 0).all()
    assert (task_map(mapper, [[(0, 1, 0)]], CAMERA, LOOKING_DOWN)[:, :19] == -1).all()
    inner = task_map(mapper, [[(0, 1, 0)], [(0, 0, 0)]], CAMERA, LOOKING_DOWN, 0.12)
    assert (inner[3:17, 23:36] == 0).all() and (inner[:, 18:22] == -1).all()
    together = task_map(mapper, [[(0, 1, 0), (0, 0, 0)]], CAMERA, LOOKING_DOWN, 0.12)
    assert (together[3:17, 3:36] == 0).all()


def flat_map(cells: list[Cell]) -> streams.StreamMapper:
    """Modules 10 m wide over flat ground at 0."""
    config = ServeConfig()
    mapper = streams.StreamMapper(config.map, config.field, config.adapt, threads=2)
    mapper.origins[0] = np.zeros(3)
    mapper.structures[0] = Structure(10.0)
    pool = mapper.pool_of(10.0)
    for cell in cells:
        mapper.modules[cell] = pool.spawn(cell, -1.0, 3.0)
        mapper.structures[0].rasters[cell] = np.zeros((RASTER, RASTER), np.float32)
    return mapper


def test_the_digest_sees_one_changed_number_and_close_keeps_it() -> None:
    mapper = flat_map(cells=[(0, 0, 0)])
    pool, module = mapper.pool, mapper.modules[0, 0, 0]
    assert isinstance(pool, ModulePool) and isinstance(module, Module)
    mapper.close(module)
    before = streams.digest(pool, module.slot)
    assert streams.digest(pool, module.slot) == before
    pool.features[module.slot, 5] += np.float32(1e-3)
    assert streams.digest(pool, module.slot) != before


def episode_of(frames: list[Any], *, tied: bool) -> streams.StreamEpisode:
    """A stream over frames in memory, none of which has come yet."""
    episode = object.__new__(streams.StreamEpisode)
    config = replace(flights.ADAPT, passes=1000.0)
    episode.train = frames
    episode.mapper = streams.StreamMapper(
        replace(ServeConfig().map, cell_size_m=flights.CELL_M), flights.FIELD, config, flights.INIT
    )
    episode.mapper.tied = tied
    return episode


def test_frames_come_with_the_first_task_that_they_see() -> None:
    held = [SimpleNamespace(id=i, tiles=dict.fromkeys(cells)) for i, cells in
            enumerate([["a"], ["a", "b"], ["b"], ["c", "a"], ["d"]])]  # fmt: skip
    mapper: Any = SimpleNamespace(frames={f.id: f for f in held})
    runs: Any = [["a"], ["b", "c"]]
    assert streams.arrivals(mapper, runs) == [[0, 1, 3], [2]]


def test_what_comes_later_leaves_ended_tasks_and_the_one_mlp_as_they_are() -> None:
    episode = episode_of(flights.flight().frames, tied=True)
    mapper = episode.mapper
    episode.hold(range(4))
    pool, first = mapper.pool, sorted(mapper.modules)[0]
    assert isinstance(pool, ModulePool)
    streams.learn(mapper, targets(mapper, [first]), 3)
    mlp = pool.weights[mapper.modules[first].slot].copy()
    assert not np.array_equal(mlp, flights.INIT)
    planes = pool.features[mapper.modules[first].slot].copy()
    others = {c: pool.features[m.slot].copy() for c, m in mapper.modules.items() if c != first}
    before = set(mapper.modules)
    mapper.done.add(first)
    episode.hold(range(4, 8))
    assert set(mapper.modules) > before or any(
        not np.array_equal(pool.features[mapper.modules[c].slot], f) for c, f in others.items()
    ), "the later frames taught nothing"
    open_ = mapper.learning()
    for module in open_:
        np.testing.assert_array_equal(pool.weights[module.slot], mlp)
    assert np.ptp(pool.adam_steps[[m.row for m in open_]]) == 0 < pool.adam_steps[open_[0].row]
    learned = pool.fisher[mapper.modules[first].row] > 0
    assert learned.any()
    now = pool.features[mapper.modules[first].slot]
    np.testing.assert_array_equal(now[learned], planes[learned])


def test_modules_in_turn_are_closed_and_stay_and_their_frames_go() -> None:
    episode = episode_of(flights.flight().frames, tied=False)
    whole = episode_of(flights.flight().frames, tied=False)
    whole.hold(range(8))
    cells = sorted(whole.mapper.modules)
    runs = [cells[: len(cells) // 2], cells[len(cells) // 2 :]]
    frames = streams.arrivals(whole.mapper, runs)
    assert sorted(sum(frames, [])) == list(range(8))
    tasks = streams.in_turn(episode, runs, frames)
    seen: list[int] = []
    closed = streams.modules(episode.mapper, runs, tasks, [3, 3], seen.append)
    assert seen == [0, 1] and closed.changed == [] and len(closed.digests) >= len(cells) - 1
    assert closed.let_go == 8 and not episode.mapper.frames


def test_the_hash_grid_and_the_planes_of_the_table_are_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    layout = Layout.of().planes
    planes = table_fields.Planes(1.0)
    assert planes.shapes == [tuple(row) for row in layout[:, :4].tolist()]
    coords = torch.cat([2 * torch.rand(9, 3, generator=generator) - 1, torch.zeros(9, 3)], 1)
    for field in (planes, table_fields.HashGrid(size=500, finest=40, levels=3)):
        found = field(field.init(generator), coords)
        assert found.shape == (9, 4) and (found >= 0).all() and (found[:, :3] <= 1).all()
    grid = table_fields.HashGrid(size=500, finest=40, levels=3, coarsest=4)
    assert grid.widths[0] == 4 and grid.widths[-1] == 40 and grid.entries == 125 + 500 + 500
    corners = torch.cartesian_prod(*[torch.arange(5)] * 3)
    assert len(set(grid.entry(corners, 4, 125).tolist())) == 125, "all corners fit, none is shared"
    hashed = grid.entry(torch.cartesian_prod(*[torch.arange(41)] * 3), 40, 500)
    assert hashed.min() >= 0 and hashed.max() < 500 and len(set(hashed.tolist())) == 500
    table = torch.rand(125, 4, generator=generator)
    at = torch.tensor([[0.25, 0.5, 0.75], [0.25, 0.5, 0.875]])
    on, between = grid._level(table, at, 4)
    torch.testing.assert_close(on, table[grid.entry(torch.tensor([[1, 2, 3]]), 4, 125)][0])
    above = table[grid.entry(torch.tensor([[1, 2, 4]]), 4, 125)][0]
    torch.testing.assert_close(between, 0.5 * (on + above))


def test_one_network_moves_every_copy_of_its_mlp_by_the_summed_gradient() -> None:
    random = np.random.default_rng(0)
    threads = [random.normal(size=(4, 3)).astype(np.float32) for _ in range(2)]
    rows = np.array([0, 2], np.int32)
    untouched = threads[0][1].copy()
    total = sum(g[rows].sum(0) for g in threads)
    streams.tie(threads, rows)
    for row in rows:
        np.testing.assert_allclose(threads[0][row] + threads[1][row], total, rtol=1e-6)
    np.testing.assert_array_equal(threads[0][1], untouched)


def test_a_replay_buffer_holds_what_fits_evenly_from_all_past_tasks() -> None:
    def part(k: int, n: int) -> streams.Targets:
        full = np.full(n, k, np.int32)
        return full, np.arange(n, dtype=np.int32), full

    past = [part(0, 3000), part(1, 1000)]
    assert streams.kept([], 10**9, 0) is None
    everything = streams.kept(past, 10**9, 0)
    assert everything is not None and len(everything[0]) == 4000
    some = streams.kept(past, 400 * streams.TILE_BYTES, 0)
    assert some is not None and len(some[0]) == 400
    assert 0.65 < (some[0] == 0).mean() < 0.85


def test_quadrature_of_a_constant_medium() -> None:
    values = torch.tensor([0.2, 0.4, 0.6, 0.5]).expand(1, 8, 4)
    shown = compose(values, torch.full((1, 8), 0.25))
    expected = (1 - np.exp(-0.5 * 2.0)) * np.array([0.2, 0.4, 0.6])
    np.testing.assert_allclose(shown[0].numpy(), expected, rtol=1e-5)


def test_forgetting_and_the_gap_are_summed_up_over_views() -> None:
    rows = [
        {"capture": "a", "seed": 0, "method": m, "first_task": f, "own_task": o, "all_tasks": a}
        for m, f, o, a in (
            (
                "one network",
                {"x": [20.0, 18.0], "y": [22.0, 21.0]},
                {"0/x": [20.0, 18.0], "1/x": [19.0]},
                {"x": 19.0, "y": 21.0},
            ),
            ("one network, joint", {"x": [21.0], "y": [23.0]}, {}, {"x": 20.0, "y": 22.5}),
        )
    ]
    found = table_continual.summarise(rows)["a"]["one network"]
    assert found["first_when_closed"] == 21.0 and found["first_at_end"] == 19.5
    assert found["forgetting"]["difference_db"] == -1.5
    assert found["forgetting_every_task"] == measure.pair({"a": 18.0}, {"a": 20.0})
    assert found["gap_to_joint"]["difference_db"] == -1.25
    assert found["gap_to_joint_first_task"]["difference_db"] == -2.5


def test_the_sweep_is_measured_with_other_constants_and_then_has_its_own_again() -> None:
    pictures = np.random.default_rng(0).normal(size=(3, 20, 40)).astype(np.float32)
    P = np.tile(np.float32([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]), (3, 1, 1))
    P[:, :2, 2] = np.float32([[0, 0], [0.5, 0], [0, 0.5]])
    zs = np.linspace(0, 8, 5, dtype=np.float32)

    def swept() -> Any:
        cost = np.empty((8, 8, 5), np.float32)
        surface.sweep(np.float32(4), np.float32(4), np.float32(1), zs, pictures, P, cost)
        return cost

    before, own = swept(), surface.OCCLUDED
    with table_seeds.changed({"OCCLUDED": 0.1, "_SMALL": 0.5}):
        assert surface._SMALL == 0.5 and (swept() <= before).all() and swept().sum() < before.sum()
    assert own == surface.OCCLUDED and np.array_equal(swept(), before)


def test_a_flight_by_steps_leaves_the_clock_as_it_was() -> None:
    made = flights.flight(4)
    capture: Any = SimpleNamespace(
        split=lambda which: SimpleNamespace(
            frames=made.frames[:3] if which == "train" else made.frames[3:]
        )
    )
    rows = [
        {"capture": "small", "seed": 0, "setting": setting}
        | table_flown.fly(capture, setting, 0, load_init(None))
        for setting in ("shipped", "nothing added", "at once", *table_flown.PARTS)
    ]
    assert vars(mapping)["time"] is time
    assert rows[0]["flown"] and not rows[2]["flown"] and rows[0]["steps"] > 0
    found = table_flown.summarise(rows)["all"]
    assert 0 < found["at once"]["end"]["known"] <= 1 and "flown" not in found["at once"]
    assert rows[3]["versions"]["tried"] >= rows[3]["versions"]["held"] >= 0
    lines = table_flown.lines({"summary": {"all": found}})
    assert lines[-1].startswith("| three parts, or not at all, end |")


def test_seconds_are_relative_to_those_without_weights_in_the_same_run() -> None:
    spent = {"off": (4.0, 8.0, 1.0), "drawn": (3.0, 4.0, 0.7)}
    rows = [
        {"capture": "a", "seed": seed, "setting": setting, "cpu_s": cpu}
        for setting, values in spent.items()
        for seed, cpu in enumerate(values)
    ]
    assert table_weights.seconds(rows, "drawn") == pytest.approx(0.7)
    assert table_weights.seconds(rows, "off") == 1


def test_the_spread_of_weights() -> None:
    even = table_weights.distribution(np.ones(100, np.float32))
    assert even["effective_share"] == 1.0 and even["quantiles"]["99"] == 1.0
    one = np.zeros(100, np.float32)
    one[3] = 100
    assert table_weights.distribution(one)["effective_share"] == pytest.approx(0.01)
