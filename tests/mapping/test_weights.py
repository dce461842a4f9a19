"""The daemon's ray scores, of one layer, beside the exact ones of the whole network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mclnf_edge.engine import volume
from mclnf_edge.engine.field import HIDDEN
from mclnf_edge.errors import ConfigError
from mclnf_edge.mapping import mapper, optimizer
from mclnf_edge.mapping.engines import Compute
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.maths import radiance
from tests.engine import scene as small
from tests.mapping import flights

RAYS = 384


def spearman(a: Any, b: Any) -> float:
    """Rank correlation."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("steps", [10, 50])
def test_scores_rank_rays_as_the_exact_diagonal_does(
    steps: int, record_property: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spearman >= 0.8 with q = sum g^2 / F over features and every layer, F damped alike."""
    m = flights.mapper(flights.flight().frames, rays_per_step=RAYS)
    assert m.pool is not None
    monkeypatch.setattr(small, "LAYOUT", m.pool.layout)
    flights.learn(m, steps)
    scored: list[Any] = []
    monkeypatch.setattr(optimizer.volume, "scores", scores_kept(scored))
    rays: list[Any] = []
    monkeypatch.setattr(mapper, "draw", kept_results(rays, mapper.draw))
    before = small.definition(m.pool)
    assert m.step() is not None
    (scene, tape, d_rgb, q), (ro, rd, _, _) = scored[0], rays[0]
    exact, mine = exact_scores(m, before, scene, tape, d_rgb, ro, rd)
    correlation = spearman(q[mine], exact)
    record_property(f"spearman_after_{steps}_steps", round(correlation, 3))
    print(f"Spearman after {steps} steps, {len(mine)} rays: {correlation:.3f}")
    assert len(mine) > 60 and correlation >= 0.8


def test_the_exact_diagonal_weighs_rays_and_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    m = flights.mapper(flights.flight().frames, rays_per_step=RAYS, weighting="diagonal")
    assert m.pool is not None
    size = m.pool.layout.features + m.pool.layout.weights
    assert m.pool.ray_fisher.shape[1] == size
    before = m.step()
    first = m.pool.ray_fisher.copy()
    assert before is not None and before.weights.std() > 0.01
    assert before.weights.mean() == pytest.approx(1, abs=0.01)
    m.step()
    assert (m.pool.ray_fisher != first).any() and np.isfinite(m.pool.ray_fisher).all()
    again = flights.mapper_of_nothing()
    again.optimizer.adapt = m.adapt
    arrays, meta = m.checkpoint()
    again.restore(arrays, meta)
    assert again.pool is not None and again.pool.ray_fisher[again.learning()[0].row].any()
    plain = flights.mapper_of_nothing()
    plain.restore(arrays, meta)
    assert plain.pool is not None and not plain.pool.ray_fisher.any(), "weighed otherwise: anew"
    with pytest.raises(ConfigError, match="needs the compiled kernels"):
        flights.mapper([], compute=Compute("torch", "cpu"), weighting="diagonal")


@pytest.mark.parametrize("engine", ["numba", "torch"])
def test_drawn_rays_are_trained_and_others_are_not(engine: Any) -> None:
    m = flights.mapper(
        flights.flight().frames, compute=Compute(engine, "cpu"), rays_per_step=RAYS,
        weighting="drawn",
    )  # fmt: skip
    report = m.step()
    assert report is not None
    assert report.weights.mean() == pytest.approx(1) and (report.weights == 0).mean() > 0.4
    before = flights.score(m, flights.flight())
    flights.learn(m, 20)
    assert flights.score(m, flights.flight()) > before


def scores_kept(kept: list[Any]) -> Any:
    """`volume.scores` that remembers what it was given and what it found."""
    run = volume.scores

    def scores(scene: Any, tape: Any, d_rgb: Any, *rest: Any) -> None:
        run(scene, tape, d_rgb, *rest)
        kept.append((scene, tape, d_rgb.copy(), rest[-1]))

    return scores


def kept_results(kept: list[Any], run: Any) -> Any:
    """`run` that remembers what it returned."""

    def wrapped(*args: Any) -> Any:
        kept.append(run(*args))
        return kept[-1]

    return wrapped


def exact_scores(
    m: Mapper, modules: dict[Any, Any], scene: Any, tape: Any, d_rgb: Any, ro: Any, rd: Any
) -> tuple[Any, Any]:
    """(q, ray indices) of the module that most rays meet, by vmap(grad) in float64."""
    shape = (RAYS, optimizer.SAMPLES)
    weight = tape.weight.reshape(shape).copy()
    weight[np.arange(shape[1]) >= tape.used[:, None]] = 0
    heaviest = weight.argmax(1) + np.arange(RAYS) * shape[1]
    slots = np.where(tape.used > 0, tape.slot[tape.first[heaviest]], -1)
    slot = int(np.bincount(slots[slots >= 0]).argmax())
    mine = np.flatnonzero((slots == slot) & (np.abs(d_rgb).sum(1) > 0))
    assert m.pool is not None
    cell = next(c for c, s in m.pool.slot_of.items() if s == slot)

    def loss(params: Any, o: Any, d: Any, t: Any, width: Any, g: Any) -> Any:
        placed = [p._replace(params=params) if c == cell else p for c, p in modules.items()]
        picture = radiance.render(placed, o[None], d[None], t[None], width[None])
        return (picture.rgb[0] * g).sum()

    arrays = (ro, rd, tape.t.reshape(shape), tape.width.reshape(shape), d_rgb)
    inputs = [torch.tensor(a[mine]).double() for a in arrays]
    grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0, 0, 0), chunk_size=64)(
        modules[cell].params, *inputs
    )
    square = torch.cat([g.flatten(1) for g in grads.values()], dim=1).square()
    assert square.shape[1] > HIDDEN * HIDDEN
    fisher = square.mean(0)
    damped = fisher + m.adapt.fisher_damping * fisher.mean()
    return (square / damped).sum(1).numpy(), mine
