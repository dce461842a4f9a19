"""Renders against held-out frames: the figures of `mclnf-edge eval`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mclnf_edge.captures import Capture, SplitFilter, view_of
from mclnf_edge.errors import CaptureError, ConfigError
from mclnf_edge.images import decode_image, reduced, undistort
from mclnf_edge.maths.metrics import SSIM_WINDOW, aligned, psnr, ssim
from mclnf_edge.types import Camera, Frame, Render, View

if TYPE_CHECKING:
    from mclnf_edge.config import ServeConfig

EDGE_PX = 1920
"""Larger pictures are compared at this width or height: maps learn from 960 pixels."""
KNOWN = 0.5
"""A pixel counts as known when at least this share of its ray ends in seen matter."""


def evaluate(
    capture: Capture,
    render: Callable[[View], Render],
    split: SplitFilter = "test",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Render every frame of `split` and compare it with its picture.

    `psnr` takes every pixel (unknown ones mid-grey), `psnr_known` the known ones, `psnr_aligned`
    every pixel after one affine colour fit per view; `ssim` every pixel. The means are over views.
    A view's exposure is told by the map (`Exposures.meter`), never from its pixels. Raises
    CaptureError when the split is empty.
    """
    frames = capture.split(split).frames
    if not len(frames):
        raise CaptureError(f"{capture.name}: no frame of split {split!r}")
    views: list[dict[str, Any]] = []
    for i, frame in enumerate(frames):
        truth, camera, valid = held_out(frame)
        done = render(replace(view_of(frame, capture), camera=camera))
        views.append({"frame": frame.name or str(frame.seq), **compare(done, truth, valid)})
        progress(i + 1, len(frames))
    means = {
        key: _mean([v[key] for v in views])
        for key in ("psnr", "psnr_known", "psnr_aligned", "ssim", "known")
    }
    return {"capture": capture.name, "split": split, **means, "views": views}


def held_out(
    frame: Frame,
) -> tuple[npt.NDArray[np.uint8], Camera, npt.NDArray[np.bool_]]:
    """What a view is compared with: picture, pinhole camera, mask; at most `EDGE_PX` a side."""
    picture = decode_image(frame.image, frame.encoding, frame.camera)
    return reduced(*undistort(picture, frame.camera), EDGE_PX)


def compare(
    done: Render, truth: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_]
) -> dict[str, float | None]:
    """One view's figures (dB, SSIM, known share); pixels outside `valid` do not count."""
    known = (done.known >= KNOWN) & valid
    return {
        "psnr": psnr(done.rgb, truth, valid),
        "psnr_known": psnr(done.rgb, truth, known) if known.any() else None,
        "psnr_aligned": aligned(done.rgb, truth, valid),
        "ssim": ssim(done.rgb, truth) if min(truth.shape[:2]) >= SSIM_WINDOW else None,
        "known": float(known.sum() / max(valid.sum(), 1)),
    }


def local_renderer(
    map_dir: Path, device: str = "auto", config: ServeConfig | None = None
) -> Callable[[View], Render]:
    """A renderer over the closed modules of a map on disk, without a daemon.

    `config` is what it was served with, where that is not the default.

    Raises StoreError when there is no map, Corrupt when a module's checksum is wrong, DeviceError
    without the device.
    """
    from mclnf_edge.config import FieldConfig, ServeConfig
    from mclnf_edge.inference.renderer import Renderer
    from mclnf_edge.mapping.engines import choose
    from mclnf_edge.mapping.mapper import Mapper
    from mclnf_edge.mapping.sites import Sites
    from mclnf_edge.store import MapStore

    settings = config or ServeConfig()
    with MapStore.open(map_dir, create=False, read_only=True) as store:
        if "field" not in store.meta():
            raise ConfigError(f"--map {map_dir}: expected a map of posed frames")
        field = FieldConfig(**store.meta()["field"])
        sites = Sites(store.meta())
        compute = choose("auto", device, field.kind)
        mapper = Mapper(settings.map, field, settings.adapt, compute=compute)
        for record in store.modules():
            if record.state == "closed":
                snapshot = store.load_module(record.id, record.version)
                mapper.adopt(snapshot.arrays, snapshot.meta, record.version, record.digest)
    renderer = Renderer(mapper.optimizer.paint)

    def render(view: View) -> Render:
        site, pose = sites.find(view.world)(view.T_world_camera)
        placed = replace(view, T_world_camera=pose)
        origin = mapper.origins.get(site)
        meter = mapper.exposures.meter(view.stream, view.timestamp, view.exposure)
        gain = renderer.gain(mapper.pool, origin, placed, meter, site)
        return renderer.render(mapper.pool, origin, placed, gain, site=site)

    return render


def _mean(values: list[float | None]) -> float | None:
    numbers = [v for v in values if v is not None]
    return float(np.mean(numbers)) if numbers else None
