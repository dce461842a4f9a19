"""A module's field as an ONNX graph, for either kind, written node by node (opset 17).

    planes: u (E, 3), above (E,)        ->  values (E, 4)
    mlp:    u (E, 3), directions (E, 3) ->  values (E, 4)

`u` is in the module's unit cube, `above` the height above its surface in units, `directions` are
of length 1. `values` are the density per unit of length, then RGB in 0..1, as
`engine.torch_volume.activated` gives them. An open graph reads `weights` (P,), and planes their
`features` (T, CHANNELS), as inputs, so that one graph serves every module, also one that learns; a
closed one holds one module's own. A `half` graph multiplies its matrices in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from mclnf_edge.engine.field import B1, B2, B3, CHANNELS, HIDDEN, INPUTS, OUTPUTS, W2, W3, Layout

if TYPE_CHECKING:
    from mclnf_edge.maths.fields import NerfMlp

Arrays = Mapping[str, npt.NDArray[Any]]
OPSET, IR = 17, 8
"""What ONNX Runtime has read since 1.12."""


class _Graph:
    """Nodes in order. `module` are the parameters of a closed graph, None for an open one."""

    def __init__(self, module: Arrays | None, half: bool) -> None:
        self.module, self.half = module, half
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []

    def input(self, name: str, *shape: int | str) -> str:
        """A float32 input."""
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node; the name of its one output."""
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: npt.ArrayLike, dtype: Any = np.float32) -> str:
        """A constant of the graph."""
        name = f"constant_{len(self.constants)}"
        array = np.ascontiguousarray(np.asarray(value, dtype))
        self.constants.append(numpy_helper.from_array(array.reshape(np.shape(value)), name))
        return name

    def whole(self, *values: int) -> str:
        """A constant list of whole numbers."""
        return self.constant(values, np.int64)

    def columns(self, x: str, begin: int, end: int) -> str:
        """x[:, begin:end]."""
        return self.add("Slice", x, self.whole(begin), self.whole(end), self.whole(1))

    def parameter(self, name: str, *shape: int | str) -> str:
        """All of one of the module's arrays."""
        if self.module is None:
            return self.input(name, *shape)
        array = self.module[name].reshape([-1 if isinstance(n, str) else n for n in shape])
        held = self.constant(array, array.dtype)
        if array.dtype == np.float32:
            return held
        return self.add("Cast", held, to=TensorProto.FLOAT)

    def part(self, weights: str, begin: int, *shape: int) -> str:
        """A matrix or row of the flat parameters."""
        end = begin + int(np.prod(shape))
        if self.module is not None:
            own = self.module["weights"][begin:end].reshape(shape)
            return self.constant(own, np.float16 if self.half else np.float32)
        cut = self.add("Slice", weights, self.whole(begin), self.whole(end))
        return self.narrow(self.add("Reshape", cut, self.whole(*shape)))

    def narrow(self, x: str) -> str:
        """Half precision, in a graph that has it."""
        return self.add("Cast", x, to=TensorProto.FLOAT16) if self.half else x

    def wide(self, x: str) -> str:
        """Single precision again."""
        return self.add("Cast", x, to=TensorProto.FLOAT) if self.half else x

    def model(self, density: str, color: str, about: Mapping[str, str]) -> bytes:
        """The whole graph, checked, with `values` as its output and notes on what it is."""
        inner = self.add("Concat", density, color, axis=1)
        self.nodes.append(helper.make_node("Identity", [inner], ["values"], name="values"))
        values = helper.make_tensor_value_info("values", TensorProto.FLOAT, ("E", 4))
        graph = helper.make_graph(self.nodes, "field", self.inputs, [values], self.constants)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(
            graph, opset_imports=opset, ir_version=IR, producer_name="mclnf-edge"
        )
        helper.set_model_props(model, dict(about))
        onnx.checker.check_model(model, full_check=True)
        data: bytes = model.SerializeToString(deterministic=True)
        return data


def plane_model(
    layout: Layout,
    module: Arrays | None = None,
    *,
    half: bool = False,
    about: Mapping[str, str] | None = None,
) -> bytes:
    """The fast field (`engine.field`); `about` are the file's metadata."""
    g = _Graph(module, half)
    u, above = g.input("u", "E", 3), g.input("above", "E")
    features = g.parameter("features", layout.features // CHANNELS, CHANNELS)
    weights = "" if module is not None else g.input("weights", layout.weights)
    read = _read_planes(g, layout, features, u)
    heights = _heights(g, g.columns(u, 2, 3), g.add("Unsqueeze", above, g.whole(1)))
    rest = INPUTS - len(layout.planes) * CHANNELS - 7
    x = g.add("Concat", read, heights, axis=1)
    x = g.add("Pad", x, g.whole(0, 0, 0, rest)) if rest else x
    h = g.narrow(x)
    for begin, bias, size in ((0, B1, INPUTS), (W2, B2, HIDDEN)):
        w, b = g.part(weights, begin, size, HIDDEN), g.part(weights, bias, HIDDEN)
        h = g.add("Relu", g.add("Gemm", h, w, b))
    w, b = g.part(weights, W3, HIDDEN, OUTPUTS), g.part(weights, B3, OUTPUTS)
    raw = g.wide(g.add("Gemm", h, w, b))
    low, high = g.constant(-10.0), g.constant(6.0)
    density = g.add("Exp", g.add("Clip", g.columns(raw, 0, 1), low, high))
    color = g.add("Sigmoid", g.add("Add", g.columns(raw, 1, 4), g.columns(x, 0, 3)))
    return g.model(density, color, about or {})


def _read_planes(g: _Graph, layout: Layout, features: str, u: str) -> str:
    """(E, planes * CHANNELS) bilinear reads: `engine.torch_field.find_texels`."""
    a, b, nu, nv, offset = layout.planes.T.astype(np.int64)
    along = []
    for axis, size in ((a, nu), (b, nv)):
        at = g.add("Gather", u, g.constant(axis, np.int64), axis=1)
        at = g.add("Clip", at, g.constant(0.0), g.constant(0.99999))
        at = g.add("Mul", at, g.constant(size - 1))
        low = g.add("Floor", at)
        along.append((g.add("Cast", low, to=TensorProto.INT64), g.add("Sub", at, low)))
    (iu, au), (iv, av) = along
    row = g.add("Mul", iv, g.constant(nu, np.int64))
    base = g.add("Add", g.add("Add", iu, row), g.constant(offset // CHANNELS, np.int64))
    one = g.constant(1.0)
    bu, bv = g.add("Sub", one, au), g.add("Sub", one, av)
    total = ""
    for step, x, y in ((0 * nu, bu, bv), (0 * nu + 1, au, bv), (nu, bu, av), (nu + 1, au, av)):
        texel = g.add("Gather", features, g.add("Add", base, g.constant(step, np.int64)), axis=0)
        share = g.add("Unsqueeze", g.add("Mul", x, y), g.whole(2))
        term = g.add("Mul", texel, share)
        total = g.add("Add", total, term) if total else term
    return g.add("Reshape", total, g.whole(-1, len(layout.planes) * CHANNELS))


def _heights(g: _Graph, uz: str, above: str) -> str:
    """(E, 7) as `engine.field.encode_heights`, of two columns (E, 1)."""
    angle = g.add("Mul", uz, g.constant(2 * math.pi))
    s, c = g.add("Sin", angle), g.add("Cos", angle)
    twice = g.add("Mul", g.add("Mul", s, c), g.constant(2.0))
    other = g.add("Sub", g.add("Mul", c, c), g.add("Mul", s, s))
    columns = [uz, s, c, twice, other]
    for scale in (1.5, 6.0):
        at = g.add("Div", above, g.constant(scale))
        columns.append(g.add("Clip", at, g.constant(-3.0), g.constant(3.0)))
    return g.add("Concat", *columns, axis=1)


def mlp_model(
    field: NerfMlp,
    module: Arrays | None = None,
    *,
    half: bool = False,
    about: Mapping[str, str] | None = None,
) -> bytes:
    """The paper's MLP (`maths.fields.NerfMlp`); `about` are the file's metadata."""
    g = _Graph(module, half)
    u, directions = g.input("u", "E", 3), g.input("directions", "E", 3)
    size = sum((a + 1) * b for a, b in field.shapes.values())
    weights = "" if module is not None else g.input("weights", size)
    place = g.add("Sub", g.add("Mul", u, g.constant(2.0)), g.constant(1.0))
    position = g.narrow(_encoded(g, place, field.octaves))
    direction = g.narrow(_encoded(g, directions, field.direction_octaves))
    layers, at = {}, 0
    for layer, (a, b) in field.shapes.items():
        layers[layer] = g.part(weights, at, a, b), g.part(weights, at + a * b, b)
        at += (a + 1) * b
    x = g.add("Relu", g.add("Gemm", position, *layers["0"]))
    for i in range(1, field.hidden):
        x = g.add("Concat", x, position, axis=1) if i == field.skip else x
        x = g.add("Relu", g.add("Gemm", x, *layers[f"{i}"]))
    raw = g.wide(g.add("Gemm", x, *layers["density"]))
    density = g.add("Softplus", g.add("Sub", raw, g.constant(1.0)))
    x = g.add("Concat", x, direction, axis=1)
    x = g.add("Relu", g.add("Gemm", x, *layers[f"{field.hidden}"]))
    color = g.add("Sigmoid", g.wide(g.add("Gemm", x, *layers["rgb"])))
    return g.model(density, color, about or {})


def _encoded(g: _Graph, x: str, octaves: int) -> str:
    """(E, 3 (1 + 2 octaves)): `maths.fields.positional_encoding` of x (E, 3)."""
    scale = math.pi * 2.0 ** np.arange(octaves, dtype=np.float32)
    angles = g.add("Mul", g.add("Unsqueeze", x, g.whole(2)), g.constant(scale))
    angles = g.add("Reshape", angles, g.whole(-1, 3 * octaves))
    return g.add("Concat", x, g.add("Sin", angles), g.add("Cos", angles), axis=1)
