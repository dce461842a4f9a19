"""What the engines are compared by: the same field, and rates from times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mclnf_edge.config import AdaptConfig
from mclnf_edge.engine.torch_field import PlaneNetwork
from mclnf_edge.engine.torch_volume import Course, trace
from mclnf_edge.mapping.device import share
from mclnf_edge.maths import radiance
from tests.engine import scene as small
from tools import bench_engines


def test_the_plain_version_computes_the_same_field() -> None:
    pool = small.make_pool()
    ro, rd, bands = (torch.tensor(x) for x in small.rays(100))
    course = Course(small.SAMPLES, small.STEPS, 0.05, float(small.REACH))
    traced = trace(share(pool).scene(0), PlaneNetwork(), (ro, rd, bands), course)
    ray, t, width = traced.samples
    shown = radiance.render(bench_engines.placed(pool), ro[ray], rd[ray], t, width)
    assert len(ray) > 50
    torch.testing.assert_close(shown.rgb, traced.light.rgb, rtol=1e-3, atol=1e-3)
    shown.rgb.sum().backward()


def test_rates_are_those_of_the_median_round() -> None:
    adapt = AdaptConfig(rays_per_step=100)
    episode = cast(Any, SimpleNamespace(mapper=SimpleNamespace(adapt=adapt)))
    row = bench_engines.rates(episode, [(1.0, 2.0), (4.0, 8.0), (2.0, 3.0)], 10)
    samples = 10 * 100 * bench_engines.SAMPLES
    assert row["samples_per_s"] == samples / 2
    assert row["samples_per_cpu_s"] == pytest.approx(samples / 3, abs=0.5), "whole samples"
    assert row["step_cpu_ms"] == 300.0
