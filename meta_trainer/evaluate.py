"""One method on one signal: quality after each number of steps, and what was forgotten."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from mclnf_edge.errors import ConfigError
from mclnf_edge.maths.fields import Params
from mclnf_edge.maths.metrics import backward_transfer, forgetting, psnr, ssim
from meta_trainer.data import SAMPLE_RATE_HZ, Kind
from meta_trainer.episodes import Episode, Signal
from meta_trainer.methods import Learning, Method, predict

Mask = npt.NDArray[np.bool_]
PERCEPTUAL: dict[Kind, str] = {"image": "ssim", "video": "ssim", "audio": "pesq", "views": "ssim"}


def run_signal(
    method: Method,
    start: Params,
    episode: Episode,
    kind: Kind,
    marks: Sequence[int],
    how: Learning,
    seed: int,
    panels: Path | None = None,
) -> dict[str, Any]:
    """Learn an episode and measure it at every mark.

    Returns `curve` (mark -> {"psnr": dB, "ssim" or "pesq": value}), `quality` (of task j after task
    i, dB, at the last mark), `forgetting` and `transfer` per task, and `seconds`. With
    `panels` the reconstructions are written there as "<mark>.png" beside "truth.png".
    """
    begun = time.monotonic()
    measured = episode.measured
    truth = measured.rebuild(measured.values)
    quality = np.full((episode.tasks, episode.tasks), math.nan)

    def after_task(task: int, params: Params) -> None:
        values = predict(how, method.modules, params, measured)
        for j in range(task + 1):
            got, true = measured.task_values(values, j), measured.task_values(measured.values, j)
            quality[task, j] = psnr(got, true, peak=episode.peak)

    ends = method.learn(
        start, episode, marks, how, torch.Generator().manual_seed(seed), after_task=after_task
    )
    curve: dict[int, dict[str, float]] = {}
    for mark, params in zip(marks, ends, strict=True):
        got = measured.rebuild(predict(how, method.modules, params, measured))
        curve[mark] = measure(got, truth, kind, episode.peak, measured.mask)
        if panels is not None and kind != "audio":
            write_panel(panels / f"{mark}.png", got)
    if panels is not None and kind != "audio":
        write_panel(panels / "truth.png", truth)
    return {
        "curve": {str(k): v for k, v in curve.items()},
        "quality": [_known_or_none(row) for row in quality],
        "forgetting": _known_or_none(forgetting(quality)),
        "transfer": _known_or_none(backward_transfer(quality)),
        "seconds": time.monotonic() - begun,
    }


def _known_or_none(values: npt.NDArray[np.float64]) -> list[float | None]:
    """JSON has no NaN."""
    return [None if math.isnan(v) else float(v) for v in values]


def measure(
    got: Signal, truth: Signal, kind: Kind, peak: float, mask: Mask | None = None
) -> dict[str, float]:
    """PSNR and the modality's perceptual measure (SSIM: mean over frames; PESQ: wide band).

    Of views both are means over the pictures, where `mask` (V, H, W) is set.
    """
    if kind == "views":
        assert mask is not None
        each = list(zip(got, truth, mask, strict=True))
        return {
            "psnr": float(np.mean([psnr(a, b, m, peak) for a, b, m in each])),
            "ssim": float(np.mean([ssim(a, b, m) for a, b, m in each])),
        }
    values = {"psnr": psnr(got, truth, peak=peak)}
    if kind == "audio":
        values["pesq"] = pesq(got, truth) if has_pesq() else math.nan
    elif kind == "video":
        values["ssim"] = float(np.mean([ssim(a, b) for a, b in zip(got, truth, strict=True)]))
    else:
        values["ssim"] = ssim(got, truth)
    return values


def pesq(got: Signal, truth: Signal) -> float:
    """Wide-band PESQ (ITU-T P.862.2) at 16 kHz; NaN where it finds no utterance or has no value.

    Raises:
        ConfigError: the package `pesq` is not installed.
    """
    package = pesq_package()
    if not np.any(got) or not np.isfinite(got).all():
        return math.nan
    try:
        return float(package.pesq(SAMPLE_RATE_HZ, truth, got, "wb"))
    except (package.PesqError, ValueError):  # the latter where its own sums are not a number
        return math.nan


def pesq_package() -> Any:
    """The optional package `pesq` (it builds a C extension); ConfigError without it."""
    try:
        import pesq as package
    except ImportError as error:
        raise ConfigError("PESQ needs the package `pesq`: pip install pesq") from error
    return package


def has_pesq() -> bool:
    """Whether PESQ can be measured here; PSNR of audio does not need it."""
    return importlib.util.find_spec("pesq") is not None


def try_rate(
    method: Method,
    start: Params,
    episodes: Sequence[Episode],
    how: Learning,
    steps: int,
    seed: int,
) -> float:
    """Mean PSNR (dB) over episodes after `steps` steps; -inf where one diverged (not finite)."""
    found = []
    for episode in episodes:
        generator = torch.Generator().manual_seed(seed)
        (end,) = method.learn(start, episode, [steps], how, generator)
        seen = episode.measured
        got, true = (
            seen.rebuild(v) for v in (predict(how, method.modules, end, seen), seen.values)
        )
        found.append(psnr(got, true, seen.mask, seen.peak))
    mean = float(np.mean(found))
    return mean if math.isfinite(mean) else -math.inf


def write_panel(path: Path, picture: Signal) -> None:
    """A PNG of a picture, or of a video's first frame."""
    frame = picture[0] if picture.ndim == 4 else picture
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.round(np.clip(frame, 0, 1) * 255).astype(np.uint8)
    if not cv2.imwrite(str(path), cv2.cvtColor(levels, cv2.COLOR_RGB2BGR)):
        raise OSError(f"{path}: cannot be written")


def summary(curves: Sequence[Mapping[str, Mapping[str, float]]], metric: str) -> dict[str, Any]:
    """Mean over runs at each mark: `step1`, `best`, `best_step`, `last` and the whole `curve`.

    A mark at which a run had diverged has no mean; a PESQ that has no value is left out.
    """
    marks = sorted({int(k) for c in curves for k in c})
    mean = mean_known if metric == "pesq" else np.mean
    means = {k: float(mean([c[str(k)][metric] for c in curves])) for k in marks}
    best = max(marks, key=lambda k: means[k] if math.isfinite(means[k]) else -math.inf)
    return {
        "step1": means[marks[0]],
        "best": means[best],
        "best_step": best,
        "last": means[marks[-1]],
        "curve": {str(k): v for k, v in means.items()},
    }


def worst_fall(values: Iterable[float | None]) -> float:
    """How far a curve, in the order of its steps, is ever below its running best.

    Marks without a value are left out.
    """
    known = [v for v in values if v is not None and math.isfinite(v)]
    best = accumulate(known, max)
    return max((b - v for b, v in zip(best, known, strict=True)), default=0.0)


def bootstrap(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean over signals; the same draws for every call."""
    known = np.array([v for v in values if math.isfinite(v)])
    if len(known) < 2:
        return math.nan, math.nan
    picks = np.random.default_rng(0).integers(len(known), size=(draws, len(known)))
    low, high = np.percentile(known[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def mean_known(values: Sequence[float | None]) -> float:
    """Mean without NaN and None, which is NaN where nothing is known."""
    known = [v for v in values if v is not None and not math.isnan(v)]
    return float(np.mean(known)) if known else math.nan
