"""A module's network in PyTorch, for either kind of field, on points of one module at a time.

What a network reads (`inputs`) is made for all points at once by `plane_inputs` or `mlp_inputs`;
its parameters are one flat vector, as they are committed. `Output.raw` is density, then RGB, before
their activations; `features` are what the output layers of density and of colour read, from which
a ray's information is built.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mclnf_edge.engine.field import B1, B2, B3, CHANNELS, HIDDEN, INPUTS, OUTPUTS, W2, W3, Layout
from mclnf_edge.maths.fields import NerfMlp, Params, Tap

_COLOR = slice(1, 4)


class Output(NamedTuple):
    """Of E points: raw values (E, 4), inputs of the density's and of the colour's last layer."""

    raw: Tensor
    features: tuple[Tensor, Tensor]


class Network(Protocol):
    """One kind of field. `rate` multiplies `adapt.lr_mlp`."""

    rate: float

    def __call__(self, weights: Tensor, inputs: Tensor) -> Output:
        """Outputs at `inputs` (E, n) for the flat parameters (P,) of one module."""
        ...

    def density(self, raw: Tensor) -> Tensor:
        """Density per unit of length (E,) of its raw value (E,)."""
        ...


class PlaneNetwork:
    """The fast field's small MLP, after its planes: `engine.field.mlp`."""

    rate = 1.0

    def __call__(self, weights: Tensor, inputs: Tensor) -> Output:
        """See `Network`; `inputs` (E, INPUTS), whose first three are added to the colour."""
        w1, w2 = weights[:B1].view(INPUTS, HIDDEN), weights[W2:B2].view(HIDDEN, HIDDEN)
        w3 = weights[W3:B3].view(HIDDEN, OUTPUTS)[:, :4]
        h = torch.relu(torch.addmm(weights[B1:W2], inputs, w1))
        h = torch.relu(torch.addmm(weights[B2:W3], h, w2))
        raw = torch.addmm(weights[B3 : B3 + 4], h, w3)
        skip = torch.nn.functional.pad(inputs[:, :3], (1, 0))
        return Output(raw + skip, (h, h))

    def density(self, raw: Tensor) -> Tensor:
        """exp, held in e^-10..e^6; the gradient passes, so that a value beyond can come back."""
        return (raw + (raw.clamp(-10, 6) - raw).detach()).exp()


class MlpNetwork:
    """The paper's ReLU MLP on encoded position and direction: `maths.fields.NerfMlp`."""

    rate = 0.25  # Adam at lr_mlp's default, made for 32 neurons, does not hold 256 x 10

    def __init__(self, width: int, hidden: int) -> None:
        self.field = NerfMlp(width=width, hidden=hidden, skip=min(5, hidden))

    def __call__(self, weights: Tensor, inputs: Tensor) -> Output:
        """See `Network`; `inputs` (E, 6) are position in [-1, 1] and unit direction."""
        taps: list[Tap] = []
        self.field(self.split(weights), inputs, taps)
        of = {tap.layer: tap for tap in taps}
        raw = torch.cat([of["density"].outputs, of["rgb"].outputs], dim=-1)
        return Output(raw, (of["density"].inputs, of["rgb"].inputs))

    def density(self, raw: Tensor) -> Tensor:
        """As in `NerfMlp`."""
        return torch.nn.functional.softplus(raw - 1)

    def split(self, weights: Tensor) -> Params:
        """Flat parameters (P,) by name; the layers in their order, each its w and then its b."""
        params: Params = {}
        at = 0
        for layer, (a, b) in self.field.shapes.items():
            params[f"{layer}.w"] = weights[at : at + a * b].view(a, b)
            params[f"{layer}.b"] = weights[at + a * b : at + (a + 1) * b]
            at += (a + 1) * b
        return params

    def layout(self, voxels: int) -> Layout:
        """Sizes of a module's arrays: no planes, a density grid of `voxels` along each edge."""
        size = sum((a + 1) * b for a, b in self.field.shapes.values())
        none = np.zeros((0, 5), np.int32)
        return Layout(none, 0, (voxels, voxels, voxels), size, self.field.width)

    def random(self, seed: int) -> npt.NDArray[np.float32]:
        """(P,) a random start."""
        params = self.field.init(torch.Generator().manual_seed(seed))
        parts = [params[f"{layer}.{p}"].flatten() for layer in self.field.shapes for p in "wb"]
        start: npt.NDArray[np.float32] = torch.cat(parts).numpy()
        return start


class Texels(NamedTuple):
    """Where E points read P planes: texels (E, P, 4) and their bilinear weights (E, P, 4)."""

    at: Tensor
    share: Tensor


def find_texels(planes: Tensor, first: Tensor, u: Tensor) -> Texels:
    """The four texels of every plane (P, 5) around points u (E, 3) in the unit cube.

    `first` (E,) is the first texel of each point's module.
    """
    a, b, nu, nv, offset = planes.unbind(1)
    fu = u[:, a].clamp(0, 0.99999) * (nu - 1)
    fv = u[:, b].clamp(0, 0.99999) * (nv - 1)
    iu, iv = fu.long(), fv.long()
    au, av = fu - iu, fv - iv
    base = first[:, None] + offset // CHANNELS + iv * nu + iu
    index = torch.stack([base, base + 1, base + nu, base + nu + 1], dim=-1)
    w11 = au * av
    return Texels(index, torch.stack([1 - au - av + w11, au - w11, av - w11, w11], dim=-1))


def plane_inputs(features: Tensor, texels: Texels, uz: Tensor, above: Tensor) -> Tensor:
    """(E, INPUTS) what `PlaneNetwork` reads: planes, height in the unit cube and above surface.

    `features` (all texels, CHANNELS); `above` (E,) is in units.
    """
    read = (features[texels.at] * texels.share.unsqueeze(-1)).sum(2).flatten(1)
    angle = 2 * math.pi * uz
    s, c = angle.sin(), angle.cos()
    near, far = (above / 1.5).clamp(-3, 3), (above / 6).clamp(-3, 3)
    heights = torch.stack([uz, s, c, 2 * s * c, c * c - s * s, near, far], dim=1)
    x = torch.cat([read, heights], dim=1)
    return torch.nn.functional.pad(x, (0, INPUTS - x.shape[1]))


def mlp_inputs(u: Tensor, directions: Tensor) -> Tensor:
    """(E, 6) what `MlpNetwork` reads of points in the unit cube and unit directions (E, 3)."""
    return torch.cat([2 * u - 1, directions], dim=1)
