"""A radiance module as a field of rays, so that every method learns views as it learns pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mclnf_edge.maths.fields import Field, NerfMlp, Params, Tap
from mclnf_edge.maths.radiance import UNITS

RAY = 9
"""Values of a ray: origin (3), unit direction (3), near, far, and the shift of its samples."""


@dataclass(frozen=True)
class RayField:
    """Rays (..., N, RAY) -> their colours (..., N, 3) in 0..1, by volume rendering of `mlp`.

    Origin, near and far are in the cube [-1, 1]^3 that holds a scene. Sample k of S lies in the
    k-th of S equal parts of near..far, at the share `shift` of it: one draw per ray, made with the
    ray, stands for the draw per part of stratified sampling, so that the field is a function.
    Density is per 1/UNITS of the cube's edge. The last sample takes all light that is left.

    A ray owns S consecutive rows of every layer (`rows` of `fisher`): its score is the sum of the
    samples' gradients, taken before squaring.
    """

    mlp: NerfMlp
    samples: int

    @property
    def width(self) -> int:
        """Units of a hidden layer."""
        return self.mlp.width

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """The network's own parameters."""
        return self.mlp.init(generator, dtype)

    def __call__(self, params: Params, coords: Tensor, taps: list[Tap] | None = None) -> Tensor:
        """Colours (..., N, 3) of rays (..., N, RAY)."""
        origin, direction = coords[..., :3], coords[..., 3:6]
        near, far, shift = coords[..., 6:7], coords[..., 7:8], coords[..., 8:9]
        part = (far - near) / self.samples
        t = near + part * (torch.arange(self.samples, device=coords.device) + shift)
        points = origin.unsqueeze(-2) + t.unsqueeze(-1) * direction.unsqueeze(-2)
        rows = torch.cat([points, direction.unsqueeze(-2).expand_as(points)], dim=-1)
        values = self.mlp(params, rows.flatten(-3, -2), taps).reshape(*t.shape, 4)
        weights = ray_weights(values[..., 3] * part * (UNITS / 2))
        return torch.sum(weights.unsqueeze(-1) * values[..., :3], dim=-2)


def ray_weights(thickness: Tensor) -> Tensor:
    """Share of a ray's light from each of its samples, (..., S) -> (..., S); they sum to 1.

    `thickness` is density times length: w_k = exp(-sum_(j<k) tau_j) (1 - exp(-tau_k)), the last
    sample being opaque (Mildenhall et al. 2020, Eq. 3, with an endless last interval).
    """
    before = torch.exp(thickness - thickness.cumsum(-1))
    passed = torch.exp(-thickness[..., :-1])
    return torch.cat([before[..., :-1] * (1 - passed), before[..., -1:]], dim=-1)


def rows_of(field: Field) -> int:
    """Rows of the layers per sample that a field is given: a ray's samples, 1 for a point."""
    return field.samples if isinstance(field, RayField) else 1
