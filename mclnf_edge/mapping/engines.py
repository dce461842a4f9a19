"""Which engine computes a map's field, and what a new module of that field starts from."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mclnf_edge.config import AdaptConfig, FieldConfig, ServeConfig
from mclnf_edge.engine.field import Layout, random_mlp
from mclnf_edge.errors import ConfigError, DeviceError, InitError
from mclnf_edge.mapping.optimizer import Engine, Optimizer

if TYPE_CHECKING:
    from mclnf_edge.mapping.initialization import Initialization, SignalInitialization

F32 = npt.NDArray[np.float32]


class Compute(NamedTuple):
    """The engine and the device that it computes on."""

    engine: Literal["numba", "torch"]
    device: Literal["cpu", "cuda"]


KERNELS = Compute("numba", "cpu")


def choose(engine: str, device: str, kind: str) -> Compute:
    """What `compute.engine`, `--device` and `field.kind` come to; each may be "auto".

    The compiled kernels (numba) compute feature planes on the CPU; PyTorch computes on CUDA, and
    the paper's MLP. Raises ConfigError for what does not go together, DeviceError without CUDA.
    """
    if engine == "numba" and kind != "planes":
        raise ConfigError(
            f"compute.engine: expected auto or torch for field.kind {kind}, received numba"
        )
    if engine == "numba" and device == "cuda":
        raise ConfigError("--device cuda: expected compute.engine auto or torch, received numba")
    found = device == "cpu" or engine == "numba" or _cuda_found()
    if device == "cuda" and not found:
        raise DeviceError("--device cuda: PyTorch finds no CUDA device here; use cpu or auto")
    on: Literal["cpu", "cuda"] = (
        "cuda" if found and device != "cpu" and engine != "numba" else "cpu"
    )
    if engine == "torch" or on == "cuda" or kind == "mlp":
        return Compute("torch", on)
    return Compute("numba", on)


def _has_driver() -> bool:
    """Whether CUDA's driver is installed; without it there is no need to ask PyTorch."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _cuda_found() -> bool:
    if not _has_driver():
        return False
    import torch

    return torch.cuda.is_available()


def make_engine(
    compute: Compute, field: FieldConfig, adapt: AdaptConfig, threads: int
) -> Engine[Any]:
    """An engine for this kind of field; raises ConfigError where it cannot weigh rays as asked."""
    if compute.engine == "numba":
        return Optimizer(adapt, threads)
    if adapt.weighting == "diagonal":
        raise ConfigError(
            "adapt.weighting: diagonal needs the compiled kernels (compute.engine numba, "
            f"field.kind planes), received engine {compute.engine}, kind {field.kind}"
        )
    from mclnf_edge.engine.torch_field import MlpNetwork, PlaneNetwork
    from mclnf_edge.mapping.torch_engine import TorchEngine

    network = (
        PlaneNetwork() if field.kind == "planes" else MlpNetwork(field.mlp_width, field.mlp_hidden)
    )
    return TorchEngine(adapt, network, compute.device)


def layout_of(field: FieldConfig) -> Layout:
    """Sizes of a module's arrays."""
    if field.kind == "planes":
        return Layout.of(field.plane_texels, field.plane_vertical, field.voxels)
    from mclnf_edge.engine.torch_field import MlpNetwork

    return MlpNetwork(field.mlp_width, field.mlp_hidden).layout(field.voxels)


def start_of(field: FieldConfig, given: F32 | None, seed: int) -> F32:
    """The shared initial parameters: `given`, or else a random start; raises InitError."""
    expected = layout_of(field).weights
    if given is not None:
        if given.shape != (expected,):
            raise InitError(
                f"init: expected {expected} parameters (field.kind {field.kind}), "
                f"received {given.shape}"
            )
        return given
    if field.kind == "planes":
        return random_mlp(seed)
    from mclnf_edge.engine.torch_field import MlpNetwork

    return MlpNetwork(field.mlp_width, field.mlp_hidden).random(seed)


def open_start(config: ServeConfig, path: Path | None) -> Initialization | SignalInitialization:
    """The initialization at `path`; for None the shipped one, or a random one for the paper's MLP.

    Raises InitError, also for one of another kind of field.
    """
    from mclnf_edge.mapping.initialization import Initialization, open_init

    kind, seed = config.field.kind, config.adapt.seed
    if path is None and kind == "mlp":
        return Initialization(start_of(config.field, None, seed), f"random-{seed}", {}, kind)
    init = open_init(path)
    if isinstance(init, Initialization) and init.kind != kind:
        raise InitError(f"init {path}: expected kind {kind} (field.kind), received {init.kind}")
    return init
