"""Fields: the paper's parameter counts, module stacking, encodings, what density may depend on."""

from __future__ import annotations

import math

import pytest
import torch

from mclnf_edge.maths.fields import (
    NerfMlp,
    Siren,
    Tap,
    count,
    plain_count,
    positional_encoding,
    replicate,
    stack,
    unstack,
)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_papers_parameter_counts() -> None:
    assert count(Siren(2, 3, 256).init(gen())) == 198_915
    assert 4 * count(Siren(2, 3, 128).init(gen())) == 201_228
    audio = Siren(1, 1, 256).init(gen())
    assert sum(p.numel() for name, p in audio.items() if name.endswith(".w")) == 197_120
    quarter = Siren(1, 1, 128).init(gen())
    assert 4 * sum(p.numel() for n, p in quarter.items() if n.endswith(".w")) == 197_632
    assert plain_count(2, 256, 10, 3) == 659_459
    assert plain_count(2, 512, 10, 3) - 3 * 512 == 2_628_099
    assert count(NerfMlp().init(gen())) == 698_372


@pytest.mark.parametrize("field", [Siren(2, 3, 16), NerfMlp(16, octaves=3, direction_octaves=2)])
def test_stacked_modules_equal_single_ones_and_vmap(field: Siren | NerfMlp) -> None:
    d_in = 2 if isinstance(field, Siren) else 6
    modules = [field.init(gen(i), torch.float64) for i in range(3)]
    coords = torch.rand(3, 7, d_in, generator=gen(9), dtype=torch.float64)
    together = field(stack(modules), coords)
    one_by_one = torch.stack([field(m, c) for m, c in zip(modules, coords, strict=True)])
    mapped = torch.func.vmap(field)(stack(modules), coords)
    torch.testing.assert_close(together, one_by_one)
    torch.testing.assert_close(together, mapped)
    for there, back in zip(modules, unstack(stack(modules)), strict=True):
        assert all(torch.equal(there[name], back[name]) for name in there)


def test_gradient_flows_through_replication() -> None:
    field = Siren(2, 1, 8)
    params = {k: v.requires_grad_() for k, v in field.init(gen()).items()}
    copies = replicate(params, 3)
    assert copies["0.w"].data_ptr() != params["0.w"].data_ptr()
    (grad,) = torch.autograd.grad(copies["0.w"].sum(), params["0.w"])
    torch.testing.assert_close(grad, torch.full_like(grad, 3.0))


def test_siren_by_hand() -> None:
    field = Siren(1, 1, width=1, layers=2, omega=3.0)
    params = {
        "0.w": torch.tensor([[0.5]]),
        "0.b": torch.tensor([0.1]),
        "1.w": torch.tensor([[2.0]]),
        "1.b": torch.tensor([-1.0]),
    }
    value = field(params, torch.tensor([[0.2]]))
    assert value.item() == pytest.approx(2 * math.sin(3 * (0.5 * 0.2 + 0.1)) - 1)


def test_siren_start_keeps_activations_spread() -> None:
    field, taps = Siren(2, 3, 256), list[Tap]()
    field(field.init(gen()), torch.rand(512, 2, generator=gen(1)) * 2 - 1, taps)
    for tap in taps[1:-1]:
        assert 0.6 < (30 * tap.outputs).std().item() < 1.6


def test_positional_encoding_by_hand() -> None:
    encoded = positional_encoding(torch.tensor([[0.25, -0.5]]), 2)
    expected = [0.25, -0.5]
    expected += [math.sin(math.pi * k * x) for x in (0.25, -0.5) for k in (1, 2)]
    expected += [math.cos(math.pi * k * x) for x in (0.25, -0.5) for k in (1, 2)]
    torch.testing.assert_close(encoded[0], torch.tensor(expected))


def test_density_ignores_direction_and_colour_does_not() -> None:
    field = NerfMlp(32)
    params = field.init(gen())
    coords = torch.rand(5, 6, generator=gen(2))
    turned = torch.cat([coords[:, :3], -coords[:, 3:]], dim=1)
    a, b = field(params, coords), field(params, turned)
    torch.testing.assert_close(a[:, 3], b[:, 3])
    assert (a[:, :3] - b[:, :3]).abs().max() > 1e-4
    assert (a[:, 3] >= 0).all() and ((a[:, :3] > 0) & (a[:, :3] < 1)).all()


def test_taps_hold_every_linear_layer() -> None:
    for field, d_in in ((Siren(2, 3, 8), 2), (NerfMlp(8), 6)):
        params, taps = field.init(gen()), list[Tap]()
        field(params, torch.rand(4, d_in), taps)
        assert {t.layer for t in taps} == {name.split(".")[0] for name in params}
        for tap in taps:
            rebuilt = tap.inputs @ params[f"{tap.layer}.w"] + params[f"{tap.layer}.b"]
            torch.testing.assert_close(rebuilt, tap.outputs)
