"""Runs ONNX graphs on PyTorch's tensors where they lie: on the CPU, with CUDA or with TensorRT."""

from __future__ import annotations

from typing import Any

import onnxruntime
import torch
from torch import Tensor

from mclnf_edge.errors import DeviceError

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class Session:
    """One graph on one provider; `values(...)` binds its inputs and its output in place."""

    def __init__(self, model: bytes, provider: str, threads: int) -> None:
        """`provider` is a key of PROVIDERS, `threads` the CPU's.

        Raises DeviceError when the provider is missing here or cannot run the graph.
        """
        require(provider)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        chain = list(PROVIDERS)[list(PROVIDERS).index(provider) :: -1]  # what it lacks goes down
        try:
            self._session = onnxruntime.InferenceSession(
                model, options, providers=[PROVIDERS[name] for name in chain]
            )
        except Exception as error:  # ONNX Runtime's errors have no base class of their own
            raise DeviceError(f"ONNX Runtime on {provider}: {error}") from error
        used = self._session.get_providers()
        if PROVIDERS[provider] not in used:  # its libraries did not load, which is only logged
            raise DeviceError(
                f"ONNX Runtime: expected {PROVIDERS[provider]}, received {', '.join(used)}"
            )
        self.inputs = [given.name for given in self._session.get_inputs()]

    def values(self, **tensors: Tensor) -> Tensor:
        """(E, 4) of contiguous float32 `tensors`, of which it takes what the graph names.

        Raises DeviceError.
        """
        out = torch.empty((len(tensors["u"]), 4), device=tensors["u"].device)
        binding = self._session.io_binding()
        for name in self.inputs:
            binding.bind_input(name, *_place(tensors[name]))
        binding.bind_output("values", *_place(out))
        if out.is_cuda:  # ONNX Runtime has a stream of its own
            torch.cuda.synchronize()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise DeviceError(f"ONNX Runtime: {error}") from error
        binding.synchronize_outputs()
        return out


def require(provider: str) -> None:
    """Raise DeviceError unless this build of ONNX Runtime has the provider."""
    found = onnxruntime.get_available_providers()
    if PROVIDERS[provider] not in found:
        raise DeviceError(
            f"ONNX Runtime: expected {PROVIDERS[provider]}, this build has {', '.join(found)}"
        )


def _place(x: Tensor) -> tuple[Any, ...]:
    """(device, its number, type, shape, address) as a binding takes them."""
    assert x.is_contiguous() and x.dtype == torch.float32
    return x.device.type, x.device.index or 0, "float32", tuple(x.shape), x.data_ptr()
