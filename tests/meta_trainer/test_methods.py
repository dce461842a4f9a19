"""Every method against its definition, on a tiny network in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from mclnf_edge.maths import fisher
from mclnf_edge.maths.adaptation import Rule, Weighting
from mclnf_edge.maths.fields import Params, Siren, unstack
from meta_trainer.episodes import Episode, image_episode
from meta_trainer.methods import METHODS, STARTS, VARIANTS, Learning, predict
from meta_trainer.methods.base import flat, pick
from meta_trainer.methods.modular import Modular, stages
from meta_trainer.methods.replay import Replay, Reservoir, towards
from meta_trainer.methods.sequential import Ewc, Sequential, model_fisher

FIELD = Siren(2, 3, width=6, layers=3, omega=4.0)
HOW = Learning(FIELD, rates=0.05)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(seed: int = 0) -> Params:
    return FIELD.init(gen(seed), torch.float64)


def episode() -> Episode:
    e = image_episode("a", np.random.default_rng(0).random((6, 8, 3)))
    return replace(e, coords=e.coords.double(), values=e.values.double())


def descend(params: Params, x: Tensor, s: Tensor, steps: int, rate: float = 0.05) -> Params:
    """Plain gradient descent by autograd: the twin of every inner loop here."""
    for _ in range(steps):
        leaves = {k: p.detach().requires_grad_() for k, p in params.items()}
        (FIELD(leaves, x) - s).square().sum(-1).mean().backward()
        params = {k: (p - rate * p.grad).detach() for k, p in leaves.items()}
    return params


def assert_same(a: Params, b: Params) -> None:
    for name in b:
        torch.testing.assert_close(a[name], b[name])


def test_table_of_methods() -> None:
    assert list(METHODS) == [
        "OL", "CL", "ER", "EWC", "MER", "MOL", "MAML+CL", "OML", "Ours (mod)", "Ours (MIM)",
    ]  # fmt: skip
    assert set(STARTS) == {"mol", "maml-cl", "oml", "mod", "mim"}
    assert all(name == m.name for name, m in METHODS.items())


def test_offline_descends_on_all_data_and_keeps_its_marks() -> None:
    e = episode()
    one, four = METHODS["OL"].learn(start(), e, [1, 4], HOW, gen())
    assert_same(one, descend(start(), *flat(e), 1))
    assert_same(four, descend(start(), *flat(e), 4))


def test_sequential_is_fine_tuning_task_after_task() -> None:
    e = episode()
    expected = start()
    for x, s in zip(e.coords, e.values, strict=True):
        expected = descend(expected, x, s, 3)
    seen: list[int] = []
    one, three = METHODS["CL"].learn(
        start(), e, [1, 3], HOW, gen(), after_task=lambda i, p: seen.append(i)
    )
    assert_same(three, expected)
    assert seen == [0, 1, 2, 3]
    assert (one["1.w"] - three["1.w"]).abs().max() > 1e-6


def test_oml_moves_only_its_top_layers() -> None:
    e = episode()
    (out,) = Sequential("OML", "oml", top=1).learn(start(), e, [3], HOW, gen())
    for name, p in start().items():
        assert torch.equal(out[name], p) == (not name.startswith("2."))
    assert METHODS["OML"].top == 2  # type: ignore[attr-defined]


def test_modules_learn_alone_from_one_start() -> None:
    e = episode()
    (out,) = METHODS["Ours (mod)"].learn(start(), e, [3], HOW, gen())
    for got, x, s in zip(unstack(out), e.coords, e.values, strict=True):
        assert_same(got, descend(start(), x, s, 3))


def test_a_closed_modules_values_do_not_depend_on_other_tasks() -> None:
    e = episode()
    other = replace(e, values=torch.cat([e.values[:1], -e.values[1:]]))
    a, b = (METHODS["Ours (mod)"].learn(start(), x, [3], HOW, gen())[0] for x in (e, other))
    assert_same(unstack(a)[0], unstack(b)[0])
    c, d = (METHODS["CL"].learn(start(), x, [3], HOW, gen())[0] for x in (e, other))
    assert (c["1.w"] - d["1.w"]).abs().max() > 1e-6


def test_mim_weights_samples_and_equals_mod_at_lambda_zero() -> None:
    e = episode()
    mim, none = METHODS["Ours (MIM)"], replace(HOW, rule=Rule("diagonal", lam=0.0))
    strong = replace(HOW, rule=Rule("diagonal", lam=2.0))
    (plain,) = METHODS["Ours (mod)"].learn(start(), e, [3], HOW, gen())
    assert_same(mim.learn(start(), e, [3], none, gen())[0], plain)
    weighted = mim.learn(start(), e, [3], strong, gen())[0]
    assert (weighted["1.w"] - plain["1.w"]).abs().max() > 1e-5


def test_modules_can_share_the_samples_of_fewer_tasks() -> None:
    def learned(how: Learning, **given: int) -> Params:
        (end,) = Modular("m", "mod", **given).learn(start(), episode(), [3], how, gen())
        return end

    half = learned(replace(HOW, batch=4))
    assert_same(learned(replace(HOW, batch=8), batches=2), half)
    assert not torch.equal(learned(replace(HOW, batch=8))["0.w"], half["0.w"])
    assert_same(learned(replace(HOW, batch=0), batches=2), learned(replace(HOW, batch=0)))


@pytest.mark.parametrize("modules", [1, 2, 8])
def test_modules_and_tasks_in_other_numbers(modules: int) -> None:
    e = episode()
    (out,) = Modular("m", "mod", modules).learn(start(), e, [2], HOW, gen())
    coords, values = stages(e.coords, modules), stages(e.values, modules)
    for m, got in enumerate(unstack(out)):
        expected = start()
        for x, s in zip(coords[:, m], values[:, m], strict=True):
            expected = descend(expected, x, s, 2)
        assert_same(got, expected)
    assert predict(HOW, modules, out, e).shape == e.values.shape
    with pytest.raises(ValueError, match="3 modules"):
        stages(e.coords, 3)


def test_predictions_come_from_the_module_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meta_trainer.methods.base.CHUNK", 5)
    e = episode()
    (out,) = METHODS["Ours (mod)"].learn(start(), e, [2], HOW, gen())
    got = predict(HOW, 4, out, e)
    for task, params in enumerate(unstack(out)):
        torch.testing.assert_close(got[task], FIELD(params, e.coords[task]))
    single = predict(HOW, 0, start(), e)
    torch.testing.assert_close(single[2], FIELD(start(), e.coords[2]))


def test_ewc_penalty_gradient_by_hand_and_by_finite_differences() -> None:
    ewc, theta = Ewc(strength=0.7), start(1)
    anchors = [(start(i), {k: p.square() for k, p in start(9).items()}) for i in (2, 3)]
    value = ewc.penalty(anchors)
    leaves = {k: p.requires_grad_() for k, p in theta.items()}
    grads = torch.autograd.grad(value(leaves), list(leaves.values()))
    for name, g in zip(leaves, grads, strict=True):
        by_hand = sum(0.7 * f[name] * (leaves[name] - a[name]) for a, f in anchors)
        torch.testing.assert_close(g, by_hand)
        ends = []
        for eps in (1e-6, -1e-6):
            moved = {k: p.detach().clone() for k, p in leaves.items()}
            moved[name].view(-1)[0] += eps
            ends.append(value(moved).item())
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(g.view(-1)[0].item(), rel=1e-5)


def test_ewc_fisher_is_the_models_own_and_does_not_need_errors() -> None:
    """Expectation of the drawn-label Fisher: sum over outputs of squared Jacobians, mean over x."""
    x = episode().coords.flatten(0, 1)
    params = start()
    jacobian = torch.func.jacrev(FIELD)(params, x)
    many = [model_fisher(HOW, params, x, gen(k)) for k in range(400)]
    for name in params:
        expected = jacobian[name].square().sum(1).mean(0)
        got = torch.stack([f[name] for f in many]).mean(0)
        torch.testing.assert_close(got, expected, rtol=0.25, atol=0.02 * expected.max().item())


def test_ewc_holds_what_cl_forgets_and_is_cl_without_strength() -> None:
    e = episode()
    free = Ewc(strength=0.0).learn(start(), e, [20], HOW, gen())[0]
    assert_same(free, METHODS["CL"].learn(start(), e, [20], HOW, gen())[0])
    first: list[Params] = []
    held = Ewc(strength=2.0).learn(
        start(), e, [20], HOW, gen(), after_task=lambda i, p: first.append(p)
    )[0]

    def moved(p: Params) -> float:
        return sum((p[n] - first[0][n]).square().sum().item() for n in p)

    assert moved(held) < 0.5 * moved(free)


def test_reservoir_keeps_every_sample_with_equal_chance() -> None:
    counts = np.zeros(40)
    for seed in range(600):
        buffer = Reservoir(10, gen(seed))
        for block in torch.arange(40.0).split(8):
            buffer.add(block[:, None], block[:, None])
        assert len(buffer) == 10 and buffer.seen == 40
        x, s = buffer.sample(200)
        assert torch.equal(x, s)
        counts[np.unique(x.numpy().astype(int))] += 1
    # each is kept in 150 of 600 runs on average, standard deviation 10.6
    assert counts.min() > 150 - 5 * 10.6 and counts.max() < 150 + 5 * 10.6


def test_replay_joins_current_and_stored_samples() -> None:
    e = episode()
    (out,) = METHODS["ER"].learn(start(), e, [2], HOW, gen(4))
    g, expected = gen(4), start()
    buffer = Reservoir(e.values.shape[0] * e.values.shape[1], g)
    for x, s in zip(e.coords, e.values, strict=True):
        for _ in range(2):
            data = (x, s)
            if buffer.seen:
                bx, bs = buffer.sample(len(x))
                data = (torch.cat([x, bx]), torch.cat([s, bs]))
            expected = descend(expected, *data, 1)
        buffer.add(x, s)
    assert_same(out, expected)


def test_mer_of_the_tables_moves_by_its_share_of_a_step() -> None:
    """Within 0.03, across 1: the first task, which has no buffer, is CL at 0.03 of the step."""
    e, seen = episode(), []  # type: ignore[var-annotated]
    METHODS["MER"].learn(start(), e, [3], HOW, gen(), after_task=lambda i, p: seen.append(p))
    assert_same(seen[0], descend(start(), e.coords[0], e.values[0], 3, 0.03 * 0.05))
    plain = replace(METHODS["MER"], reptile=False)  # type: ignore[type-var]
    (joint,) = plain.learn(start(), e, [3], HOW, gen())
    assert any(not torch.allclose(joint[n], seen[-1][n]) for n in joint)


def test_mer_is_reptile_within_and_across_batches() -> None:
    e = episode()
    mer = Replay("MER", reptile=True, within=0.5, across=0.25, group=2)
    (out,) = mer.learn(start(), e, [2], HOW, gen(4))
    g, expected = gen(4), start()
    buffer = Reservoir(e.values.shape[0] * e.values.shape[1], g)
    for x, s in zip(e.coords, e.values, strict=True):
        origin = expected
        for _ in range(2):
            before = expected
            if buffer.seen:
                expected = descend(expected, *buffer.sample(len(x)), 1)
            expected = towards(before, descend(expected, x, s, 1), 0.5)
        expected = towards(origin, expected, 0.25)
        buffer.add(x, s)
    assert_same(out, expected)


@pytest.mark.parametrize("weighting", get_args(Weighting))
@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_learning_stays_on_the_device_of_its_tensors(name: str, weighting: Weighting) -> None:
    """On the device without memory, where meeting a tensor of the CPU is an error."""
    method = METHODS[name] if name in METHODS else VARIANTS[name].method
    field = Siren(2, 3, width=6, layers=7, omega=4.0)
    how = Learning(field, 0.05, Rule(weighting), batch=4)
    first = {n: p.to("meta") for n, p in field.init(gen(), torch.float64).items()}
    (end,) = method.learn(first, episode().on("meta"), [2], how, gen())
    assert {p.device.type for p in end.values()} == {"meta"}


def test_learning_is_differentiable_in_the_start_for_every_learned_start() -> None:
    e = episode()
    for name in STARTS.values():
        method = METHODS[name]
        leaves = {k: p.requires_grad_() for k, p in start().items()}
        (out,) = method.learn(leaves, e, [2], HOW, gen(), create_graph=True)
        total = sum(p.sum() for p in out.values())
        grads = torch.autograd.grad(total, list(leaves.values()))
        assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in grads)


def test_batches_are_without_repetition_and_shared_by_tasks() -> None:
    x = torch.arange(20.0).view(2, 10, 1)
    a, b = pick(x, -x, 4, gen())
    assert a.shape == (2, 4, 1) and torch.equal(a, -b)
    assert len(set(a[0].flatten().tolist())) == 4
    torch.testing.assert_close(a[1] - 10, a[0])
    assert pick(x, x, 0, gen())[0] is x and pick(x, x, 10, gen())[0] is x


def test_fisher_state_starts_anew_with_each_task() -> None:
    """Alg. 1 line 8: with one step per task the weights come from that task's batch alone."""
    e, how = episode(), replace(HOW, rule=Rule("diagonal", lam=1.0))
    seen: list[Params] = []
    METHODS["CL"].learn(start(), e, [1], how, gen(), after_task=lambda i, p: seen.append(p))
    g = fisher.scores(FIELD, seen[0], e.coords[1], e.values[1])
    f = g.square().mean(0)
    w = fisher.sample_weights((g.square() / (f + 0.1 * f.mean())).sum(1), 1.0, 10.0)
    leaves = {k: p.clone().requires_grad_() for k, p in seen[0].items()}
    (w * (FIELD(leaves, e.coords[1]) - e.values[1]).square().sum(-1)).mean().backward()
    for name, p in leaves.items():
        torch.testing.assert_close(seen[1][name], (p - 0.05 * p.grad).detach())
