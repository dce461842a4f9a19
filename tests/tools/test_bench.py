"""The speed benchmark's parts on its command line, and that what it compares is the same thing."""

from __future__ import annotations

import pytest

pytest.importorskip("numba")

import torch  # noqa: E402

from mclnf_edge.maths.adaptation import Rule  # noqa: E402
from mclnf_edge.maths.fields import Siren  # noqa: E402
from meta_trainer.episodes import image_episode  # noqa: E402
from meta_trainer.meta_gradient import meta_gradient  # noqa: E402
from meta_trainer.methods.base import Learning  # noqa: E402
from meta_trainer.methods.modular import Modular  # noqa: E402
from tools import bench, speed_steps, speed_torch  # noqa: E402


def test_parts_that_are_kept_run_again_only_when_named() -> None:
    assert bench.wanted(None, {"fisher": {}, "start": {}}) == [
        "views",
        "rays",
        "roofline",
        "compilers",
        "ingest",
        "meta",
        "processes",
    ]
    assert bench.wanted("start,fisher", {"start": {}}) == ["start", "fisher"]
    with pytest.raises(SystemExit, match="received 'speed'"):
        bench.wanted("speed", {})


def test_every_rule_runs_on_until_both_marks_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a step takes 1, 2 and 0.5 seconds: plain, exact and factored."""
    field = Siren(2, 3, width=8, layers=3, omega=5.0)
    episode = image_episode("noise", torch.rand(16, 16, 3).numpy())
    taken: list[str] = []
    clock = {"now": 0.0}
    pace = {"none": 1.0, "diagonal": 2.0, "factored": 0.5}

    def step(
        _: object, params: object, state: object, *rest: object
    ) -> tuple[object, object, None]:
        rule = rest[2]
        assert isinstance(rule, Rule)
        taken.append(rule.weighting)
        clock["now"] += pace[rule.weighting]
        return params, state, None

    monkeypatch.setattr(speed_torch, "inner_step", step)
    monkeypatch.setattr(speed_torch, "STEPS", 8)
    monkeypatch.setattr(speed_torch.time, "process_time", lambda: clock["now"])
    monkeypatch.setattr(speed_torch, "shown", lambda *_: float(len(taken)))
    start = field.init(torch.Generator().manual_seed(0))
    rows = speed_torch.quality(field, start, episode)
    assert rows["plain"]["equal_steps"] == rows["plain"]["equal_seconds"] == [8, 40, 72]
    assert rows["exact"] == {"equal_steps": [16, 48, 80], "equal_seconds": [12, 44, 76]}
    assert rows["factored"] == {"equal_steps": [24, 56, 88], "equal_seconds": [32, 64, 96]}


def test_autograd_steps_end_where_this_projects_do() -> None:
    field, generator = Siren(2, 3, width=8, layers=3, omega=5.0), torch.Generator().manual_seed(0)
    start = field.init(generator)
    batch = torch.rand(64, 2, generator=generator), torch.rand(64, 3, generator=generator)
    params, step = speed_torch.autograd_step(field, start, batch, lambda function: function)
    step()
    rule = Rule("none", "adam")
    ours, _, _ = speed_torch.inner_step(field, start, speed_torch.State(), batch, 3e-4, rule)
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), ours[name], rtol=1e-3, atol=1e-6)


def test_each_cheap_rule_is_ranked_against_the_exact_weights() -> None:
    field, generator = Siren(2, 3, width=8, layers=3, omega=5.0), torch.Generator().manual_seed(0)
    batch = torch.rand(64, 2, generator=generator), torch.rand(64, 3, generator=generator)
    found = speed_torch.rankings(field, field.init(generator), [batch], speed_torch.RAY_RULES)
    assert list(found) == ["factored", "gradncp", "residual"]
    assert all(0 < low <= middle <= high <= 1 for low, middle, high in found.values())
    assert speed_torch.spearman(torch.tensor([1.0, 2, 3]), torch.tensor([9.0, 4, 1])) == -1


def test_the_plain_meta_gradient_is_the_trainers() -> None:
    field, generator = Siren(2, 3, width=8, layers=3, omega=5.0), torch.Generator().manual_seed(0)
    start = field.init(generator)
    picture = torch.rand(40, 40, 3, generator=generator).numpy()
    episode, rule = image_episode("noise", picture), Rule("diagonal")
    how = Learning(field, speed_steps.RATE, rule, speed_steps.BATCH)
    trainer = meta_gradient(
        Modular("mim", "mim"), start, speed_steps.RATE, episode, how, speed_steps.INNER_STEPS,
        speed_steps.QUERY, "second", torch.Generator().manual_seed(1),
    )  # fmt: skip
    plain = speed_steps.plain_gradient(field, start, episode, rule)
    for name, gradient in plain.items():
        torch.testing.assert_close(trainer.start[name], gradient, rtol=1e-3, atol=1e-6)


def test_the_work_of_a_step_counts_three_products_but_for_the_first_layers_input() -> None:
    params = Siren(2, 3, width=4, layers=3).init(torch.Generator())
    flops, _ = speed_steps._work(params)
    assert flops == speed_steps.POINTS * 2 * (2 * 8 + 3 * 16 + 3 * 12)
