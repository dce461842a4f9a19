"""Sampling, gate, rendering, gradients and ray scores of the kernels against the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mclnf_edge.engine import learn, volume
from mclnf_edge.engine.field import HIDDEN, MLP_SIZE
from mclnf_edge.mapping.modules import ModulePool
from mclnf_edge.maths import radiance
from mclnf_edge.maths.radiance import Placed
from tests.engine import scene as small
from tests.engine.scene import CELL_M, INNER, OUTER, SAMPLES, STEPS

RAYS = 96


def test_constants_agree() -> None:
    assert (radiance.MARGIN, radiance.UNSEEN) == (volume.MARGIN, volume.UNSEEN)


@pytest.fixture(scope="module")
def pool() -> ModulePool:
    """Four inner modules and an outer one; the last inner one is frozen."""
    pool = small.make_pool()
    pool.owner[pool.slot_of[INNER[3]]] = -1
    return pool


@pytest.fixture(scope="module")
def traced(pool: ModulePool) -> dict[str, Any]:
    """The forward pass of random rays, and the same rays by definition at the same distances."""
    ro, rd, bands = small.rays(RAYS)
    scene, tape = small.forward(pool, ro, rd, bands)
    t = torch.tensor(tape.t.reshape(RAYS, SAMPLES)).double()
    rays = torch.tensor(ro).double(), torch.tensor(rd).double(), t
    assert (tape.used > 0).all()
    return {"scene": scene, "tape": tape, "rays": rays, "width": widths(t, ro, rd, bands)}


def widths(t: torch.Tensor, ro: Any, rd: Any, bands: Any) -> torch.Tensor:
    """Half way to both neighbours; at the ends half a coarse step, not before the band."""
    a, b = (bands[:, 0] - ro[:, 2]) / rd[:, 2], (bands[:, 1] - ro[:, 2]) / rd[:, 2]
    t0 = torch.tensor(np.maximum(np.minimum(a, b), 0.5)).double().unsqueeze(1)
    t1 = torch.tensor(np.minimum(np.maximum(a, b), small.REACH)).double().unsqueeze(1)
    half = 0.5 * (t1 - t0) / STEPS
    middle = 0.5 * (t[:, 1:] + t[:, :-1])
    low = torch.cat([torch.maximum(t0, t[:, :1] - half), middle], dim=1)
    high = torch.cat([middle, t[:, -1:] + half], dim=1)
    return (high - low).clamp(min=1e-3)


def modules_with(pool: ModulePool, row: int, params: dict[str, torch.Tensor]) -> list[Placed]:
    """The definition's modules, those of learning row `row` with other parameters."""
    placed = small.definition(pool)
    return [
        m._replace(params=params) if pool.owner[pool.slot_of[cell]] == row else m
        for cell, m in placed.items()
    ]


# -- gate -------------------------------------------------------------------------------------


def kernel_gates(pool: ModulePool, xy: Any) -> Any:
    """G (M, N) of the kernel, in the order of the pool's cells."""
    slots, share = np.empty(4, np.int32), np.empty(4, np.float32)
    rows = {s: i for i, s in enumerate(pool.slot_of.values())}
    out = np.zeros((len(rows), len(xy)))
    for i, (x, y) in enumerate(np.asarray(xy, np.float32)):
        for j in range(volume.gate(pool.scene(), x, y, slots, share)):
            out[rows[slots[j]], i] += share[j]
    return out


def test_gate_is_its_definition_and_sums_to_one(pool: ModulePool) -> None:
    xy = np.random.default_rng(0).uniform(-2, 3 * CELL_M, (2000, 2))
    border = np.random.default_rng(1).uniform(-1, 1, (1000, 2)) + CELL_M  # around the corner
    xy = np.concatenate([xy, border]).astype(np.float32)
    modules = list(small.definition(pool).values())
    truth = radiance.gates(modules, torch.tensor(xy).double()).numpy()
    found = kernel_gates(pool, xy)
    assert np.allclose(found, truth, atol=1e-4)
    assert found.min() >= 0
    known = ((xy > 0) & (xy < volume.FAR * CELL_M)).all(1)
    assert np.allclose(found[:, known].sum(0), 1, atol=1e-6)
    assert (found > 0).sum(0).max() == 4, "four modules meet at the corner"
    shared = (found[4] > 0) & (found[:4].sum(0) > 0)
    assert not shared.any(), "outer modules answer only where no inner one does"


@pytest.fixture(scope="module")
def known_pool() -> ModulePool:
    """Modules that have seen everything."""
    pool = small.make_pool()
    pool.seen[:] = 3
    return pool


def test_gate_is_continuous_over_the_seams(known_pool: ModulePool) -> None:
    along = np.linspace(2, 2 * CELL_M - 2, 4001)
    for line in (np.column_stack([along, 0 * along + 7]), np.column_stack([along, along])):
        g = kernel_gates(known_pool, line)
        slope = 1 / (volume.MARGIN * CELL_M)
        assert np.abs(np.diff(g)).max() < 2.5 * slope * np.diff(along).max() * np.sqrt(2)


def test_modules_answer_in_their_cells_before_those_of_a_higher_rank(
    known_pool: ModulePool,
) -> None:
    pool = known_pool
    xy = np.random.default_rng(2).uniform(0, 2 * CELL_M, (2000, 2)).astype(np.float32)
    cell_of = [tuple(map(int, c)) for c in xy // CELL_M]
    cells = [c[1:] for c in pool.slot_of]
    shares = kernel_gates(pool, xy)
    first = min(small.INNER, key=pool.rank_of.__getitem__)
    for i, at in enumerate(cell_of):
        here = cells.index(at)
        before = [
            j for j, c in enumerate(small.INNER) if pool.rank_of[c] < pool.rank_of[INNER[here]]
        ]
        later = [j for j in range(len(small.INNER)) if j not in before and j != here]
        assert not shares[later, i].any()
        assert at != first[1:] or shares[here, i] == 1


def test_a_place_in_a_margin_that_a_module_has_not_seen_is_its_neighbours() -> None:
    pool = small.make_pool()
    first = min(INNER, key=pool.rank_of.__getitem__)
    pool.seen[:] = 1
    pool.seen[pool.slot_of[first]] = 0
    xy = np.random.default_rng(2).uniform(0, 2 * CELL_M, (2000, 2)).astype(np.float32)
    shares = kernel_gates(pool, xy)
    mine = list(pool.slot_of).index(first)
    there = (xy // CELL_M == first[1:]).all(1)
    to_others = np.abs(xy - CELL_M).min(1) / (volume.MARGIN * CELL_M)
    assert shares[mine][there & (to_others < 0.5)].max() < 3 * volume.UNSEEN
    assert (shares[mine][there & (to_others > 1)] == 1).all()


def test_what_is_learned_next_to_a_closed_cell_changes_nothing_inside() -> None:
    """Rays straight down, a margin's width and less from the border, before and after."""
    pool = small.make_pool()
    pool.seen[:] = 3
    first = min(INNER, key=pool.rank_of.__getitem__)
    inside = np.random.default_rng(3).uniform(0.001, 0.999, (256, 2))
    inside[:128, 0] *= volume.MARGIN
    eyes = np.column_stack([(inside + first[1:]) * CELL_M, np.full(256, 12)]).astype(np.float32)
    down = np.tile(np.float32([0, 0, -1]), (256, 1))
    bands = np.tile(np.float32([[-3, 4]]), (256, 1))
    before = small.forward(pool, eyes, down, bands)[1].rgb.copy()
    for cell, slot in pool.slot_of.items():
        if cell != first:
            pool.features[slot] = 1.0
    np.testing.assert_array_equal(small.forward(pool, eyes, down, bands)[1].rgb, before)
    pool.features[pool.slot_of[first]] = 1.0
    assert np.abs(small.forward(pool, eyes, down, bands)[1].rgb - before).max() > 0.01


# -- samples ----------------------------------------------------------------------------------


def test_samples_follow_the_density_grid(pool: ModulePool) -> None:
    """Inverse transform of the grid's quadrature weights, computed again in float64."""
    ro, rd, bands = small.rays(32, seed=4)
    _, tape = small.forward(pool, ro, rd, bands, uniform=0.0, jitter=False)
    for r in range(len(ro)):
        t0, t1 = sorted((bands[r] - ro[r, 2]) / rd[r, 2])
        edges = np.linspace(t0, t1, STEPS + 1)
        middle = 0.5 * (edges[1:] + edges[:-1])
        thick = np.array([density_at(pool, ro[r] + t * rd[r]) for t in middle]) * (t1 - t0) / STEPS
        through = np.exp(-np.concatenate([[0], np.cumsum(thick)]))
        light = np.concatenate([[0], np.cumsum(through[:-1] - through[1:])])
        q = (np.arange(SAMPLES) + 0.5) / SAMPLES * light[-1]
        kept = np.interp(q, light, edges)
        found = tape.t[r * SAMPLES : (r + 1) * SAMPLES]
        assert np.all(np.diff(found) >= 0)
        assert np.allclose(found, kept, atol=0.02 * (t1 - t0))
        bins = np.clip(((found - t0) / (t1 - t0) * STEPS).astype(int), 0, STEPS - 1)
        assert np.all(thick[bins] > 0), "a sample lies where the proposal has nothing"


def density_at(pool: ModulePool, p: Any) -> float:
    """The density grid of the cell a point lies in, 0 outside every cell and band."""
    for cell in (tuple(np.floor(p[:2] / CELL_M).astype(int)), None):
        key = OUTER if cell is None else (0, int(cell[0]), int(cell[1]))
        if key not in pool.slot_of:
            continue
        s = pool.slot_of[key]
        x, y, edge = pool.bounds(key)
        n = small.LAYOUT.voxels[0]
        at = np.array([(p[0] - x) / edge, (p[1] - y) / edge,
                       (p[2] - pool.band[s, 0]) * pool.band[s, 1]])  # fmt: skip
        if at.min() < 0 or at.max() >= 1:
            return 0.0
        a, b, c = (at * n).astype(int)
        return float(pool.density[s, (b * n + a) * n + c])
    return 0.0


def test_an_even_share_reaches_empty_space(pool: ModulePool) -> None:
    empty = small.make_pool()
    empty.density[:] = 0
    ro, rd, bands = small.rays(16)
    _, tape = small.forward(empty, ro, rd, bands, uniform=0.0)
    assert not tape.used.any(), "nothing to sample, nothing to render"
    _, tape = small.forward(empty, ro, rd, bands, uniform=0.5)
    assert (tape.used > 0).all()
    spread = tape.t.reshape(16, SAMPLES)
    assert (spread[:, -1] - spread[:, 0]).min() > 1.0


def test_rays_beside_every_module_are_dark(pool: ModulePool) -> None:
    ro = np.array([[-500, -500, 10]], np.float32)
    rd = np.array([[0, 0, -1]], np.float32)
    _, tape = small.forward(pool, ro, rd, np.array([[-3, 4]], np.float32))
    assert tape.used[0] == 0 and tape.left[0] == 1 and not tape.rgb[0].any()


# -- rendering --------------------------------------------------------------------------------


def test_rendered_values(pool: ModulePool, traced: dict[str, Any]) -> None:
    tape = traced["tape"]
    picture = radiance.render(list(small.definition(pool).values()), *traced["rays"],
                              traced["width"])  # fmt: skip
    full = tape.used == SAMPLES
    assert np.allclose(tape.width.reshape(RAYS, -1)[full], traced["width"][full], atol=1e-4)
    assert np.allclose(tape.rgb, picture.rgb, atol=3e-4)
    assert np.allclose(tape.left, picture.left, atol=3e-4)
    assert np.allclose(tape.depth, picture.depth, atol=1e-2)
    assert np.allclose(tape.known, picture.known, atol=3e-4)
    assert tape.rgb.std() > 0.02 and 0.02 < tape.known.mean() < 0.98


def test_threads_render_the_same(pool: ModulePool, traced: dict[str, Any]) -> None:
    ro, rd, bands = small.rays(RAYS)
    scene, tape = traced["scene"], volume.make_tape(RAYS, SAMPLES)
    for a, b in ((0, 40), (40, RAYS)):
        volume.forward(scene, tape, ro, rd, bands, a, b, SAMPLES, STEPS, np.float32(0.05), 7, True,
                       small.REACH, a * SAMPLES * 4)  # fmt: skip
    assert np.array_equal(tape.rgb, traced["tape"].rgb)


# -- gradients --------------------------------------------------------------------------------


def test_gradients_of_every_parameter(pool: ModulePool, traced: dict[str, Any]) -> None:
    d_rgb = np.random.default_rng(2).normal(0, 1, (RAYS, 3)).astype(np.float32)
    scene, tape = traced["scene"], traced["tape"]
    queued = small.backward(pool, scene, tape, d_rgb, 0, RAYS)
    gradient, d_weights = pool.gradient[0].copy(), pool.weight_gradient[0].copy()
    pool.gradient[0][:] = 0
    pool.weight_gradient[0][:] = 0
    pool.touched[0][:] = 0
    assert queued > 0
    learning = [s for s in pool.slot_of.values() if pool.owner[s] >= 0]
    assert len(learning) == 4
    for s in learning:
        row = int(pool.owner[s])

        def loss(params: dict[str, torch.Tensor], row: int = row) -> torch.Tensor:
            modules = modules_with(pool, row, params)
            picture = radiance.render(modules, *traced["rays"], traced["width"])
            return (picture.rgb * torch.tensor(d_rgb).double()).sum()

        truth = torch.func.grad(loss)(small.split(pool.features[s], pool.weights[s]))
        features, weights = small.join(truth)
        for found, true in ((gradient[row], features), (d_weights[row], weights)):
            assert np.linalg.norm(true) > 0
            assert np.linalg.norm(found - true) < 2e-3 * np.linalg.norm(true)
            assert np.abs(found - true).max() < 2e-3 * np.abs(true).max()
    rows = {int(pool.owner[s]) for s in learning}
    others = [r for r in range(pool.rows) if r not in rows]
    assert not gradient[others].any() and not d_weights[others].any(), "a frozen module was trained"


def test_gradients_from_some_samples_are_right_on_average(
    pool: ModulePool, traced: dict[str, Any]
) -> None:
    """Which samples count is drawn; the mean over many draws is the gradient from all of them."""
    d_rgb = np.random.default_rng(3).normal(0, 1, (RAYS, 3)).astype(np.float32)

    def gradient(most: float, seed: int, *parts: tuple[int, int]) -> tuple[int, Any]:
        pool.gradient[0][:], pool.weight_gradient[0][:], pool.touched[0][:] = 0, 0, 0
        queued = [
            small.backward(pool, traced["scene"], traced["tape"], d_rgb, a, b, 0, most, seed)
            for a, b in parts
        ]
        found = np.concatenate([pool.gradient[0].ravel(), pool.weight_gradient[0].ravel()])
        pool.gradient[0][:], pool.weight_gradient[0][:], pool.touched[0][:] = 0, 0, 0
        return sum(queued), found.astype(np.float64)

    whole = (0, RAYS)
    every, true = gradient(volume.ALL, 0, whole)
    few, one = gradient(3.0, 1, whole)
    assert few < 0.8 * every
    error = np.linalg.norm(one - true) / np.linalg.norm(true)
    mean = np.mean([gradient(3.0, seed, whole)[1] for seed in range(400)], axis=0)
    # independent draws: the error of a mean of 400 is a twentieth of one's
    assert 0.05 < error < 2 and np.linalg.norm(mean - true) < error / 12 * np.linalg.norm(true)
    assert np.allclose(gradient(3.0, 1, (0, 40), (40, RAYS))[1], one, atol=1e-5)


def test_exact_scores_are_every_rays_whole_gradient(
    pool: ModulePool, traced: dict[str, Any]
) -> None:
    """q = sum g^2 / F over every parameter of every module a ray meets, texels included."""
    random = np.random.default_rng(8)
    d_rgb = random.normal(0, 1, (RAYS, 3)).astype(np.float32)
    count, size = small.LAYOUT.features, small.LAYOUT.features + MLP_SIZE
    inverse = random.uniform(0.5, 2, (pool.rows, size)).astype(np.float32)
    scene, tape = traced["scene"], traced["tape"]
    sums, q = np.zeros((pool.rows, size), np.float32), np.zeros(RAYS, np.float32)
    rays = np.zeros(pool.rows, np.float32)
    for a, b in ((0, 40), (40, RAYS)):
        volume.exact_scores(
            scene, tape, pool.transposed.reshape(-1), d_rgb, a, b, SAMPLES, inverse, sums, rays,
            np.zeros(pool.rows, np.int64), pool.gradient[0].reshape(-1),
            pool.weight_gradient[0].reshape(-1), pool.touched[0], pool.queue[0], q,
        )  # fmt: skip
    assert not pool.gradient[0].any() and not pool.weight_gradient[0].any()
    assert not pool.touched[0].any(), "the next step finds them clean"
    expected, inputs = np.zeros(RAYS), (*traced["rays"], traced["width"])
    for s in (s for s in pool.slot_of.values() if pool.owner[s] >= 0):
        row = int(pool.owner[s])

        def loss(params: Any, o: Any, d: Any, t: Any, w: Any, g: Any, row: int = row) -> Any:
            modules = modules_with(pool, row, params)
            picture = radiance.render(modules, o[None], d[None], t[None], w[None])
            return (picture.rgb[0] * g).sum()

        grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0, 0, 0), chunk_size=32)(
            small.split(pool.features[s], pool.weights[s]), *inputs, torch.tensor(d_rgb).double()
        )
        square = torch.cat([g.flatten(1) for g in grads.values()], dim=1).square().numpy()
        expected += square @ inverse[row].astype(np.float64)
        assert np.linalg.norm(sums[row] - square.sum(0)) < 5e-3 * np.linalg.norm(square.sum(0))
        assert square[:, :count].sum() > 0 and rays[row] >= (square.sum(1) > 0).sum() > 5
    assert np.allclose(q, expected, rtol=5e-3, atol=1e-6 * expected.max())
    assert not sums[[r for r in range(pool.rows) if r not in pool.owner]].any()


def test_scores_are_squared_ray_gradients(pool: ModulePool, traced: dict[str, Any]) -> None:
    """q = sum g^2 / F over the output layer of the module each ray mostly meets, per ray."""
    random = np.random.default_rng(6)
    d_rgb = random.normal(0, 1, (RAYS, 3)).astype(np.float32)
    fisher = random.uniform(0.5, 2, (pool.rows, learn.FISHER_SIZE)).astype(np.float32)
    sums = np.zeros((pool.rows, learn.FISHER_SIZE + 1), np.float32)
    q = np.zeros(RAYS, np.float32)
    scene, tape = traced["scene"], traced["tape"]
    volume.scores(scene, tape, d_rgb, 0, RAYS, SAMPLES, fisher, sums, q)
    rows, scored = met(scene, tape), 0
    total = np.zeros_like(sums)
    for s in pool.slot_of.values():
        row = int(pool.owner[s])
        mine = np.flatnonzero(rows == row)
        if row < 0 or len(mine) == 0:
            continue
        scored += len(mine)
        g = output_gradients(pool, s, row, traced, d_rgb, mine)
        assert np.allclose(q[mine], (g**2 / fisher[row]).sum(1), rtol=5e-3, atol=1e-6)
        total[row, :-1], total[row, -1] = (g**2).sum(0), len(mine)
    assert scored > RAYS // 2 and not q[rows < 0].any()
    assert np.allclose(sums, total, rtol=5e-3, atol=1e-4 * total[:, :-1].max())


def met(scene: volume.Scene, tape: volume.Tape) -> Any:
    """(R,) learning row of the module at each ray's heaviest sample, -1 where it is frozen."""
    weight = tape.weight.reshape(RAYS, SAMPLES).copy()
    weight[np.arange(SAMPLES) >= tape.used[:, None]] = 0
    heaviest = weight.argmax(1) + np.arange(RAYS) * SAMPLES
    return scene.owner[tape.slot[tape.first[heaviest]]]


def output_gradients(
    pool: ModulePool, s: int, row: int, traced: dict[str, Any], d_rgb: Any, mine: Any
) -> Any:
    """(rays, FISHER_SIZE) gradients of each ray's loss for the output layer, by vmap(grad)."""
    params = small.split(pool.features[s], pool.weights[s])
    last = {k: params.pop(k) for k in ("2.w", "2.b")}

    def loss(layer: dict[str, torch.Tensor], o: Any, d: Any, t: Any, w: Any, g: Any) -> Any:
        modules = modules_with(pool, row, params | layer)
        picture = radiance.render(modules, o[None], d[None], t[None], w[None])
        return (picture.rgb[0] * g).sum()

    picked = torch.tensor(mine)
    inputs = [x[picked] for x in (*traced["rays"], traced["width"])]
    targets = torch.tensor(d_rgb).double()[picked]
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0, 0, 0))(
        last, *inputs, targets
    )
    wide = torch.cat([grads["2.w"], grads["2.b"].unsqueeze(1)], dim=1)
    assert wide.shape[1] == HIDDEN + 1
    return wide[:, :, :4].flatten(1).numpy()
