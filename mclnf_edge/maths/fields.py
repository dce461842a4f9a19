"""Neural fields as functions of (params, coords).

`params` maps "<layer>.w" to (..., d_in, d_out) and "<layer>.b" to (..., d_out). Leading axes are
modules: parameters stacked by `stack` and coordinates (M, N, d) are evaluated in one batched
product per layer, and `torch.func.vmap` over single modules gives the same values. A field that is
handed a list `taps` appends each linear layer's input and output to it, from which `fisher` builds
per-sample gradients layer by layer.

The paper's networks say what they are as data (`Network.plan`), which both their evaluation here
and the steps without a graph (`passes`) follow.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Params = dict[str, Tensor]


class Tap(NamedTuple):
    """What one linear layer saw: `inputs` (..., N, d_in), `outputs` (..., N, d_out)."""

    layer: str
    inputs: Tensor
    outputs: Tensor


class Inputs(NamedTuple):
    """A tap without outputs, where no gradient has to be taken at them."""

    layer: str
    inputs: Tensor


Seen = Tap | Inputs


class Field(Protocol):
    """A field family: makes parameters and evaluates them."""

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Random parameters of one module, drawn on the CPU from `generator`."""
        ...

    def __call__(self, params: Params, coords: Tensor, taps: list[Tap] | None = None) -> Tensor:
        """Values (..., N, d_out) at coords (..., N, d_in)."""
        ...


def linear(params: Params, layer: str, x: Tensor, taps: list[Tap] | None) -> Tensor:
    """x (..., N, d_in) -> x w + b (..., N, d_out), remembered in `taps` when given."""
    y = x @ params[f"{layer}.w"] + params[f"{layer}.b"].unsqueeze(-2)
    if taps is not None:
        taps.append(Tap(layer, x, y))
    return y


Activation = Literal["none", "sine", "relu", "sigmoid", "density"]


class Layer(NamedTuple):
    """A linear layer of a network: `activation` of (inputs w + b).

    `inputs` are names of earlier layers or of encoded coordinates, joined in this order. `omega` is
    the factor of "sine"; "density" is softplus(y - 1).
    """

    name: str
    inputs: tuple[str, ...]
    activation: Activation = "none"
    omega: float = 1.0


def activate(layer: Layer, y: Tensor) -> Tensor:
    """What follows the linear part of a layer, elementwise."""
    if layer.activation == "sine":
        return torch.sin(layer.omega * y)
    if layer.activation == "relu":
        return torch.relu(y)
    if layer.activation == "sigmoid":
        return torch.sigmoid(y)
    if layer.activation == "density":
        return torch.nn.functional.softplus(y - 1)
    return y


class Network(ABC):
    """A field of linear layers, told apart only by its plan and its encoding of coordinates."""

    @property
    @abstractmethod
    def plan(self) -> tuple[Layer, ...]:
        """The layers, each after those that it reads."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[str, ...]:
        """Layers whose activated outputs, joined, are the field's values."""

    @abstractmethod
    def encode(self, coords: Tensor) -> dict[str, Tensor]:
        """What layers read of the coordinates (..., N, d_in): name -> (..., N, width)."""

    def __call__(self, params: Params, coords: Tensor, taps: list[Tap] | None = None) -> Tensor:
        """Values (..., N, d_out) at coords (..., N, d_in)."""
        known = self.encode(coords)
        for layer in self.plan:
            x = join(layer.inputs, known)
            known[layer.name] = activate(layer, linear(params, layer.name, x, taps))
        return join(self.outputs, known)


def join(names: Sequence[str], known: Mapping[str, Tensor]) -> Tensor:
    """The named values side by side."""
    parts = [known[name] for name in names]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class Siren(Network):
    """Sine network (Sitzmann et al. 2020): `layers` linear layers, the last without a sine.

    The paper's networks: 5 layers of width 256 from 2 to 3 have 198,915 parameters, of width 128
    50,307 (four modules: 201,228). `omega` multiplies every layer's output before the sine;
    `first_omega` the first layer's instead when it is given, as Sitzmann et al. do for sound: it
    sets the highest frequency the network begins with, without changing how the others learn.
    """

    d_in: int
    d_out: int
    width: int = 256
    layers: int = 5
    omega: float = 30.0
    first_omega: float | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of values before, between and after the layers."""
        return (self.d_in, *[self.width] * (self.layers - 1), self.d_out)

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Weights U(+-1/d_in) in the first layer, U(+-sqrt(6/fan_in)/omega) in the others."""
        params: Params = {}
        for i, (a, b) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            bound = 1 / a if i == 0 else math.sqrt(6 / a) / self.omega
            params[f"{i}.w"] = _uniform((a, b), bound, generator, dtype)
            params[f"{i}.b"] = _uniform((b,), 1 / math.sqrt(a), generator, dtype)
        return params

    @property
    def plan(self) -> tuple[Layer, ...]:
        """`layers` - 1 sine layers and a linear one."""
        names = ["coords", *(f"{i}" for i in range(self.layers))]
        sines = [
            Layer(names[i + 1], (names[i],), "sine", self.omega) for i in range(self.layers - 1)
        ]
        if sines and self.first_omega:
            sines[0] = sines[0]._replace(omega=self.first_omega)
        return (*sines, Layer(names[-1], (names[-2],)))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The last layer."""
        return (f"{self.layers - 1}",)

    def encode(self, coords: Tensor) -> dict[str, Tensor]:
        """Coordinates in [-1, 1] as they are."""
        return {"coords": coords}


def positional_encoding(x: Tensor, octaves: int) -> Tensor:
    """(..., d) -> (..., d (1 + 2 octaves)): x, sin(2^k pi x), cos(2^k pi x) for k < octaves."""
    scale = math.pi * 2.0 ** torch.arange(octaves, dtype=x.dtype, device=x.device)
    angles = (x.unsqueeze(-1) * scale).flatten(-2)
    return torch.cat([x, angles.sin(), angles.cos()], dim=-1)


@dataclass(frozen=True)
class NerfMlp(Network):
    """The paper's radiance module: ReLU network on encoded position and direction.

    Coordinates (..., N, 6) are position in [-1, 1] and unit direction; values (..., N, 4) are RGB
    in 0..1 and density >= 0. As in Table 7's formula an input layer is followed by `hidden` layers:
    the encoded position enters again at layer `skip`, density leaves before the last hidden layer
    and depends on position only, the encoded direction enters at the last.

    With the defaults (10 layers of width 256, 10 and 4 octaves) there are 698,372 parameters.
    Table 7's 659,459 counts an input layer from 2 values, 10 hidden layers and 3 outputs, without
    encodings (`plain_count(2, 256, 10, 3)`).
    """

    width: int = 256
    hidden: int = 10
    skip: int = 5
    octaves: int = 10
    direction_octaves: int = 4

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of every layer, in order."""
        position, direction = 3 * (1 + 2 * self.octaves), 3 * (1 + 2 * self.direction_octaves)
        extra = {self.skip: position, self.hidden: direction}
        shapes = {"0": (position, self.width)}
        for i in range(1, self.hidden + 1):
            shapes[f"{i}"] = (self.width + extra.get(i, 0), self.width)
        return shapes | {"density": (self.width, 1), "rgb": (self.width, 3)}

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """He-uniform weights, zero biases."""
        params: Params = {}
        for layer, (a, b) in self.shapes.items():
            params[f"{layer}.w"] = _uniform((a, b), math.sqrt(6 / a), generator, dtype)
            params[f"{layer}.b"] = torch.zeros(b, dtype=dtype)
        return params

    @property
    def plan(self) -> tuple[Layer, ...]:
        """See the class."""
        layers = [Layer("0", ("position",), "relu")]
        for i in range(1, self.hidden):
            again = ("position",) if i == self.skip else ()
            layers.append(Layer(f"{i}", (f"{i - 1}", *again), "relu"))
        top = f"{self.hidden - 1}"
        layers.append(Layer("density", (top,), "density"))
        layers.append(Layer(f"{self.hidden}", (top, "direction"), "relu"))
        return (*layers, Layer("rgb", (f"{self.hidden}",), "sigmoid"))

    @property
    def outputs(self) -> tuple[str, ...]:
        """RGB and density."""
        return ("rgb", "density")

    def encode(self, coords: Tensor) -> dict[str, Tensor]:
        """Encoded position and direction."""
        return {
            "position": positional_encoding(coords[..., :3], self.octaves),
            "direction": positional_encoding(coords[..., 3:], self.direction_octaves),
        }


def count(params: Mapping[str, Tensor]) -> int:
    """Number of values in all parameters."""
    return sum(p.numel() for p in params.values())


def plain_count(d_in: int, width: int, hidden: int, d_out: int) -> int:
    """Parameters of an input layer, `hidden` width x width layers and an output layer, biased."""
    return (d_in + 1) * width + hidden * (width + 1) * width + (width + 1) * d_out


def stack(modules: Sequence[Params]) -> Params:
    """Parameters of several modules -> one dictionary with a leading module axis."""
    return {name: torch.stack([m[name] for m in modules]) for name in modules[0]}


def replicate(params: Params, modules: int) -> Params:
    """`modules` copies of one start, stacked; gradients flow back to `params` (Alg. 1, line 4)."""
    return {name: p.expand(modules, *p.shape).clone() for name, p in params.items()}


def unstack(params: Params) -> list[Params]:
    """The modules of stacked parameters."""
    modules = len(next(iter(params.values())))
    return [{name: p[i] for name, p in params.items()} for i in range(modules)]


def _uniform(
    shape: tuple[int, ...], bound: float, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    return (torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1) * bound
