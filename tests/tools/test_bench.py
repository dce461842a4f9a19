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
from tools import bench, speed_steps  # noqa: E402


def test_parts_that_are_kept_run_again_only_when_named() -> None:
    assert bench.wanted(None, {"fisher": {}, "start": {}}) == [
        "views",
        "rays",
        "roofline",
        "ingest",
        "meta",
        "processes",
    ]
    assert bench.wanted("start,fisher", {"start": {}}) == ["start", "fisher"]
    with pytest.raises(SystemExit, match="received 'speed'"):
        bench.wanted("speed", {})


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
