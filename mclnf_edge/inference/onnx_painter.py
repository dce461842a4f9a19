"""Pictures with ONNX Runtime in place of the field: `render.engine: onnx` or `tensorrt`.

PyTorch marches the rays and composes their light, ONNX Runtime evaluates the modules; the field in
PyTorch is not called for pictures. One session with the parameters as inputs serves every module,
also one that learns: no module is held twice, and none has to be exported to be shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mclnf_edge.config import FieldConfig, RenderConfig
from mclnf_edge.engine import torch_picture, torch_volume
from mclnf_edge.engine.field import CHANNELS
from mclnf_edge.engine.onnx_field import Arrays, mlp_model, plane_model
from mclnf_edge.engine.onnx_session import Session
from mclnf_edge.engine.picture import Painted, Shot
from mclnf_edge.engine.torch_field import MlpNetwork
from mclnf_edge.engine.torch_volume import Points, TensorScene
from mclnf_edge.errors import DeviceError
from mclnf_edge.mapping.engines import layout_of
from mclnf_edge.mapping.modules import ModulePool
from mclnf_edge.mapping.optimizer import Engine
from mclnf_edge.mapping.torch_engine import lender


class OnnxPainter:
    """Paints a pool's pictures as `Engine.paint` does, on the device of the engine that learns.

    `name` is what status and replies call it.
    """

    def __init__(
        self,
        field: FieldConfig,
        engine: Engine[Any],
        threads: int,
        render: RenderConfig = RenderConfig(),  # noqa: B008 (frozen)
        name: str = "onnx",
    ) -> None:
        """`name` is onnx or tensorrt. Raises DeviceError where that does not compute."""
        provider = "tensorrt" if name == "tensorrt" else engine.device
        if provider == "tensorrt" and engine.device != "cuda":
            raise DeviceError(f"render.engine tensorrt: expected cuda, received {engine.device}")
        self._engine, self._lend = engine, lender(engine)
        half = render.precision == "half"
        self.name = f"{name}-half" if half else name
        self._session = Session(field_model(field, half=half), provider, threads)

    def paint(self, pool: ModulePool, shot: Shot, site: int) -> Painted:
        """See `Engine`; raises DeviceError."""
        scene = self._lend(pool).scene(site)
        return torch_picture.paint(scene, self._look, shot, self._engine.alive)

    def _look(self, scene: TensorScene, points: Points) -> Tensor:
        found = [points.u.new_zeros((0, 4))]
        for slot, rows in torch_volume.runs(points.known.slot):
            found.append(
                self._session.values(
                    u=points.u[rows],
                    above=points.above[rows],
                    directions=points.directions[rows],
                    features=scene.features[slot].view(-1, CHANNELS),
                    weights=scene.weights[slot],
                )
            )
        return torch.cat(found)


def field_model(
    field: FieldConfig,
    module: Arrays | None = None,
    about: Mapping[str, str] | None = None,
    *,
    half: bool = False,
) -> bytes:
    """The graph of a map's fields, open, or closed around one module's arrays."""
    if field.kind == "planes":
        return plane_model(layout_of(field), module, half=half, about=about)
    network = MlpNetwork(field.mlp_width, field.mlp_hidden).field
    return mlp_model(network, module, half=half, about=about)
