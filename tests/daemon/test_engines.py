"""A daemon that computes with PyTorch, and its map in one that computes with the kernels."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mclnf_edge.maths.metrics import psnr
from mclnf_edge.wire.messages import RenderReply, RenderRequest
from tests.daemon.conftest import CONFIG, Daemon
from tests.mapping.flights import Flight


def held_out(daemon: Daemon, flight: Flight) -> float:
    """Mean PSNR in dB of the views that were kept back."""
    with daemon.client() as client:
        shown = [client.render(view).rgb for view in flight.views]
    return float(np.mean([psnr(a, b) for a, b in zip(shown, flight.truth, strict=True)]))


def test_a_flight_is_mapped_by_pytorch_and_served_by_the_kernels(
    tmp_path: Path, flight: Flight
) -> None:
    daemon = Daemon(tmp_path, "--device", "cpu")
    asked = "compute: {engine: torch}\nrender: {engine: learning}\n"  # auto may find ONNX faster
    daemon.config.write_text(CONFIG + asked)
    daemon.start()
    try:
        with daemon.client("flight") as client:
            client.publish(flight.frames)
            list(client.drain())
            status = client.status()
            assert (status["engine"], status["device"]) == ("torch", "cpu")
            assert not status["out_of_memory"] and status["rays_per_step"] == 1024
            reply = next(client._ask(RenderRequest(view=flight.views[0])))
            assert isinstance(reply, RenderReply) and reply.engine == "torch/cpu"
        first = held_out(daemon, flight)
        assert first > flight.mean_psnr() + 6
        assert daemon.stop() == 0
        daemon.config.write_text(CONFIG)
        daemon.start()
        with daemon.client() as client:
            assert client.status()["engine"] == "numba"
        assert held_out(daemon, flight) == pytest.approx(first, abs=0.3)
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.kill()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_cuda_device_is_said_and_nothing_is_made(tmp_path: Path) -> None:
    words = ["serve", "--map", str(tmp_path / "map"), "--device", "cuda"]
    done = subprocess.run(
        [sys.executable, "-m", "mclnf_edge.cli", *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "PyTorch finds no CUDA device here" in done.stderr
    assert not (tmp_path / "map").exists()


def test_pictures_are_made_by_onnx_runtime_where_it_is_asked_for(
    tmp_path: Path, flight: Flight
) -> None:
    daemon = Daemon(tmp_path)
    daemon.config.write_text(
        CONFIG.replace("map: {", "map: {onnx: true, ") + "render: {engine: onnx}\n"
    )
    daemon.start()
    try:
        with daemon.client("flight") as client:
            client.publish(flight.frames)
            list(client.drain())
            status = client.status()
            assert (status["engine"], status["render_engine"]) == ("numba", "onnx")
            reply = next(client._ask(RenderRequest(view=flight.views[0])))
            assert isinstance(reply, RenderReply) and reply.engine == "onnx/cpu"
            expected = {f"{m['id']}.1.onnx" for m in status["modules"]}
            end = time.monotonic() + 30
            while client.status()["onnx_files"] < len(expected):
                assert time.monotonic() < end
                time.sleep(0.1)
            assert {path.name for path in (daemon.map / "onnx").iterdir()} == expected
            assert client.status()["onnx_refused"] == 0
        first = held_out(daemon, flight)
        assert daemon.stop() == 0
        daemon.config.write_text(CONFIG)
        daemon.start()
        with daemon.client() as client:
            assert client.status()["render_engine"] == "numba"
        assert held_out(daemon, flight) == pytest.approx(first, abs=0.3)
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.kill()
