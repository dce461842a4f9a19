"""One optimization step on a batch of rays: Algorithm 1, lines 9-17.

`Engine` is what a mapper and a renderer need of whatever computes the field; `Optimizer` does it
with the compiled kernels, `mapping.torch_engine` with PyTorch.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from mclnf_edge.config import AdaptConfig
from mclnf_edge.engine import learn, picture, volume
from mclnf_edge.engine.picture import TILE, Painted, Shot
from mclnf_edge.mapping.modules import ModulePool, Workspace, trace
from mclnf_edge.mapping.rays import Rays

F32 = npt.NDArray[np.float32]
log = logging.getLogger(__name__)

COARSE_STEPS = 96
SAMPLES = 16
UNIFORM = 0.05
TRAINED_SAMPLES = 10.0
"""About so many samples of a ray at most are learned from: `volume.backward`'s `most`."""
_FEWEST_RAYS = 256


class Fit(NamedTuple):
    """How well a batch was shown before the step: (R, 3) residuals and colours, (R,) weights.

    `capped` is the residual after the robust cap, `shown` the colour with the frame's exposure.
    """

    residual: F32
    capped: F32
    shown: F32
    weights: F32
    mse: float


T = TypeVar("T")
"""What an engine remembers of a rendered batch of rays until the step is over."""


class Engine(ABC, Generic[T]):
    """Renders a pool's modules and moves those that learn; the frozen ones are not touched.

    `steps` counts from the beginning of the map; `plane_scale` (planes,) is the running mean of
    squared texel gradients that damps the texels' Fisher information. `rays` are the rays a step
    takes: fewer than the settings say, or none, on a device whose memory is too small for them.
    `alive` is called between the parts of what may take long.
    """

    name: ClassVar[str]
    device: str

    def __init__(self, adapt: AdaptConfig) -> None:
        self.alive: Callable[[], None] = lambda: None
        self.restart(adapt)

    def restart(self, adapt: AdaptConfig) -> None:
        """Begin anew with these settings; what modules have learned is theirs, not touched."""
        self.adapt = adapt
        self.steps = 0
        self.plane_scale: F32 | None = None
        self._most_rays = 1 << 62
        self._lost_rays = False

    @property
    def rays(self) -> int:
        """See the class."""
        return min(self.adapt.rays_per_step, self._most_rays)

    def step(
        self,
        pool: ModulePool,
        rays: Rays,
        gains: F32,
        bands: F32,
        *,
        site: int,
        reach: float,
        decay: float,
    ) -> Fit | None:
        """Render R rays through the gate, score, weigh, and update every learning module.

        `gains` (R, 3) are the exposures' factors, `bands` (R, 2) the heights that hold matter,
        `reach` metres how far rays are followed, `decay` in [0, 1] how far the MLP's rate has
        fallen (tenfold at 1). None when the device had no room for it: `rays` are fewer then. Rays
        without a finite colour become unused ones, in `rays`, `gains` and `bands` too.
        """
        n = len(rays.use)
        self.steps += 1
        traced, rgb = self._trace(pool, rays, bands, reach, site)
        lost = np.asarray(~np.isfinite(rgb).all(1))
        if lost.any():
            self._stand_in(rays, gains, bands, lost)
            traced, rgb = self._trace(pool, rays, bands, reach, site)
            if not np.isfinite(rgb).all():
                blank = np.zeros_like(gains)
                return Fit(blank, blank, blank, np.ones(n, np.float32), np.nan)
        shown = rgb * gains
        residual = (shown - rays.truth) * rays.use[:, None]
        mse = float((residual**2).mean() / max(rays.use.mean(), 1e-6))
        cap = self.adapt.robust_cap * max(float(np.sqrt(mse)), 0.02)
        capped = np.clip(residual, -cap, cap)
        d_rgb = np.ascontiguousarray(2 * capped * gains / n, np.float32)
        weights = self.weigh(pool, traced, d_rgb)
        self._update(pool, traced, d_rgb, weights, decay)
        return Fit(residual, capped, shown, weights, mse)

    def _stand_in(self, rays: Rays, gains: F32, bands: F32, lost: npt.NDArray[np.bool_]) -> None:
        """Put another ray, unused, in the place of each that is `lost` (R,): it has no finite
        colour, and through the batch's mean it would spoil every module that learns.
        """
        if not self._lost_rays:  # a damaged module has some in every step
            log.error(
                "%d of %d rays have no finite colour: not learned from", lost.sum(), len(lost)
            )
        self._lost_rays = True
        rays.use[lost] = 0
        if not lost.all():
            kept = int(np.flatnonzero(~lost)[0])
            for part in (rays.origins, rays.directions, gains, bands):
                part[lost] = part[kept]

    def weigh(self, pool: ModulePool, traced: T, d_rgb: F32) -> F32:
        """Weights (R,) of the rays (Eq. 3); `adapt.weighting` says what stands for information."""
        adapt, n = self.adapt, len(d_rgb)
        if adapt.weighting == "none" or adapt.fisher_lambda == 0:
            return np.ones(n, np.float32)
        q = self.scored(pool, traced, d_rgb)
        weights = learn.ray_weights(q, adapt.fisher_lambda, adapt.weight_clamp)
        if adapt.weighting == "shuffled":
            self._numbers().shuffle(weights)
        return learn.drawn(weights, self._numbers()) if adapt.weighting == "drawn" else weights

    def _numbers(self) -> np.random.Generator:
        """Random numbers, the same for a seed and a step."""
        return np.random.default_rng((self.adapt.seed, self.steps))

    def scored(self, pool: ModulePool, traced: T, d_rgb: F32) -> F32:
        """What the rays' weights grow with, (R,): information, or a control's stand-in for it."""
        if self.adapt.weighting == "residual":
            return learn.residual_score(d_rgb)
        if self.adapt.weighting == "gradncp":
            return self._gradncp(traced, d_rgb)
        return self.information(pool, traced, d_rgb)

    @property
    def _seed(self) -> int:
        return self.steps + self.adapt.seed * 1_000_003

    def _shrink(self, reason: str) -> None:
        """Take half the rays from now on, none when that would be too few to learn from."""
        half = self.rays // 2
        self._most_rays = half if half >= _FEWEST_RAYS else 0
        told = f"{half} rays a step from now on" if self._most_rays else "learning stops"
        log.error("%s is out of memory: %s (%s)", self.device, told, reason)

    @abstractmethod
    def _trace(
        self, pool: ModulePool, rays: Rays, bands: F32, reach: float, site: int
    ) -> tuple[T, F32]:
        """Render a batch; colours (R, 3)."""

    @abstractmethod
    def information(self, pool: ModulePool, traced: T, d_rgb: F32) -> F32:
        """q = g' F^-1 g (R,) of each ray, from the running diagonal F of the output layer.

        Of every parameter where `adapt.weighting` is "diagonal".
        """

    @abstractmethod
    def _gradncp(self, traced: T, d_rgb: F32) -> F32:
        """See `learn.gradncp_score`."""

    @abstractmethod
    def _update(self, pool: ModulePool, traced: T, d_rgb: F32, weights: F32, decay: float) -> None:
        """Move what learns along the gradient of dL/drgb `d_rgb` (R, 3) times `weights` (R,)."""

    @abstractmethod
    def show(self, pool: ModulePool, site: int, ro: F32, rd: F32) -> F32:
        """(n, 3) colours in [0, 1] of rays into a site at exposure 0, through all its modules."""

    @abstractmethod
    def paint(self, pool: ModulePool, shot: Shot, site: int) -> Painted:
        """A picture of a site."""


class Optimizer(Engine[volume.Scene]):
    """The compiled kernels, on `threads` of the pool's."""

    name = "numba"
    device = "cpu"

    def __init__(self, adapt: AdaptConfig, threads: int) -> None:
        self.threads = threads
        self.work = Workspace(adapt.rays_per_step, SAMPLES)
        super().__init__(adapt)

    def _trace(
        self, pool: ModulePool, rays: Rays, bands: F32, reach: float, site: int
    ) -> tuple[volume.Scene, F32]:
        scene = trace(
            pool, self.work, rays.origins, rays.directions, bands, steps=COARSE_STEPS,
            uniform=UNIFORM, seed=self._seed, jitter=True, reach=reach, site=site,
        )  # fmt: skip
        return scene, self.work.tape.rgb[: len(rays.use)]

    def _gradncp(self, traced: volume.Scene, d_rgb: F32) -> F32:
        return learn.gradncp_score(self.work.tape, d_rgb, SAMPLES)

    def information(self, pool: ModulePool, traced: volume.Scene, d_rgb: F32) -> F32:
        """See `Engine`."""
        if self.adapt.weighting == "diagonal":
            return self._exact(pool, traced, d_rgb)
        pool.score(pool.layout.output_size)
        n, running = len(d_rgb), pool.ray_fisher
        damped = running + self.adapt.fisher_damping * running.mean(1, keepdims=True) + 1e-20
        q = np.zeros(n, np.float32)
        sums = [
            np.zeros((pool.rows, learn.FISHER_SIZE + 1), np.float32) for _ in range(self.threads)
        ]

        def part(i: int) -> None:
            a, b = n * i // self.threads, n * (i + 1) // self.threads
            volume.scores(traced, self.work.tape, d_rgb, a, b, SAMPLES, damped, sums[i], q)

        list(pool.executor.map(part, range(self.threads)))
        total = np.sum(sums, axis=0)
        _run_on(running, total[:, :-1], total[:, -1])
        return q

    def _exact(self, pool: ModulePool, traced: volume.Scene, d_rgb: F32) -> F32:
        """The same over every parameter of the modules that a ray meets, texels included."""
        pool.score(pool.layout.size)
        n, running, threads = len(d_rgb), pool.ray_fisher, self.threads
        inverse = 1 / (running + self.adapt.fisher_damping * running.mean(1, keepdims=True) + 1e-20)
        q = np.zeros(n, np.float32)
        sums = [np.zeros_like(running) for _ in range(threads)]
        rays = [np.zeros(pool.rows, np.float32) for _ in range(threads)]

        def part(i: int) -> None:
            a, b = n * i // threads, n * (i + 1) // threads
            volume.exact_scores(
                traced, self.work.tape, pool.transposed.reshape(-1), d_rgb, a, b, SAMPLES, inverse,
                sums[i], rays[i], np.zeros(pool.rows, np.int64), pool.gradient[i].reshape(-1),
                pool.weight_gradient[i].reshape(-1), pool.touched[i], pool.queue[i], q,
            )  # fmt: skip

        list(pool.executor.map(part, range(threads)))
        _run_on(running, np.sum(sums, axis=0), np.sum(rays, axis=0))
        return q

    def _update(
        self, pool: ModulePool, traced: volume.Scene, d_rgb: F32, weights: F32, decay: float
    ) -> None:
        tape, threads, n = self.work.tape, self.threads, len(d_rgb)
        d_rgb = d_rgb * weights[:, None]

        def part(i: int) -> int:
            a, b = n * i // threads, n * (i + 1) // threads
            return int(
                volume.backward(
                    traced, tape, pool.transposed.reshape(-1), d_rgb, a, b, SAMPLES,
                    np.float32(TRAINED_SAMPLES), self._seed, pool.gradient[i].reshape(-1),
                    pool.weight_gradient[i].reshape(-1), pool.touched[i], pool.queue[i],
                )
            )  # fmt: skip

        counts = list(pool.executor.map(part, range(threads)))
        length = counts[0]
        for i in range(1, threads):
            length = learn.merge(
                pool.queue[0], length, pool.touched[0], pool.gradient[0].reshape(-1),
                pool.queue[i], counts[i], pool.touched[i], pool.gradient[i].reshape(-1),
            )  # fmt: skip
        self.step_texels(pool, length)
        self._step_mlps(pool, decay)

    def step_texels(self, pool: ModulePool, length: int) -> None:
        """Move the `length` queued texels; see `learn.step_texels`."""
        planes = pool.layout.planes
        if self.plane_scale is None:
            self.plane_scale = _plane_means(pool, length)
        sums = np.zeros((len(planes), 2), np.float32)
        learn.step_texels(
            pool.queue[0], length, pool.touched[0], pool.gradient[0].reshape(-1), pool.slot_of_row,
            pool.features.reshape(-1), pool.fisher.reshape(-1), pool.layout.features, planes,
            np.float32(self.adapt.lr), np.maximum(self.plane_scale, 1e-20), sums,
        )  # fmt: skip
        fresh = sums[:, 0] / np.maximum(sums[:, 1], 1)
        self.plane_scale += np.float32(0.02) * (fresh - self.plane_scale)

    def _step_mlps(self, pool: ModulePool, decay: float) -> None:
        rows = pool.owner[list(pool.slot_of.values())]
        rows = rows[rows >= 0]
        gradient = np.sum([g[rows] for g in pool.weight_gradient], axis=0)
        for g in pool.weight_gradient:
            g[rows] = 0
        gradient[pool.guarded[rows]] = 0
        moment, square, steps = pool.moment[rows], pool.square[rows], pool.adam_steps[rows]
        slots = pool.slot_of_row[rows]
        rate = self.adapt.lr_mlp * 0.1**decay
        pool.weights[slots] = learn.adam(pool.weights[slots], gradient, moment, square, steps, rate)
        pool.moment[rows], pool.square[rows], pool.adam_steps[rows] = moment, square, steps
        pool.refresh_transposed(rows)

    def show(self, pool: ModulePool, site: int, ro: F32, rd: F32) -> F32:
        """See `Engine`."""
        bands, reach = whole_site(pool, site, ro)
        bands = np.tile(bands, (self.work.rays, 1))
        out = np.empty((len(ro), 3), np.float32)
        for a in range(0, len(ro), self.work.rays):
            part = slice(a, a + self.work.rays)
            trace(
                pool, self.work, ro[part], rd[part], bands, steps=COARSE_STEPS, uniform=UNIFORM,
                seed=0, jitter=False, reach=reach, site=site,
            )  # fmt: skip
            out[part] = self.work.tape.rgb[: len(ro[part])].clip(0, 1)
        return out

    def paint(self, pool: ModulePool, shot: Shot, site: int) -> Painted:
        """See `Engine`."""
        return paint(pool, shot, site)


def _run_on(running: F32, sums: F32, rays: F32) -> None:
    """Move F (rows, P) on by a batch's squared scores; a row without rays stays as it is."""
    rows = rays > 0
    fresh = sums[rows] / rays[rows, None]
    first = ~running[rows].any(1, keepdims=True)
    running[rows] = np.where(first, fresh, 0.95 * running[rows] + 0.05 * fresh)


def whole_site(pool: ModulePool, site: int, ro: F32) -> tuple[F32, float]:
    """Height band (1, 2) of a site's modules, and how far to follow rays from origins (n, 3)."""
    low, high = pool.extents.heights(pool.extents.of_site(site))
    reach = 60.0 * max(float(ro[:, 2].max()) - low, pool.cell_m)
    return np.array([[low, high]], np.float32), reach


def paint(pool: ModulePool, shot: Shot, site: int) -> Painted:
    """A picture of a site by the compiled kernels, on every thread of the pool."""
    (h, w), scene = shot.size, pool.scene(site)
    rgb = np.empty((h, w, 3), np.uint8)
    depth, known = np.empty((h, w), np.float32), np.empty((h, w), np.float32)

    def part(row: int) -> int:
        return int(picture.paint(scene, shot, row, row + 1, rgb, depth, known))

    points = sum(pool.executor.map(part, range(-(-h // TILE))))
    return Painted(rgb, depth, known, points)


def _plane_means(pool: ModulePool, length: int) -> F32:
    """Mean squared gradient per plane over the first batch's texels: the first damping."""
    queued = pool.queue[0][:length]
    at = queued * 4 % pool.layout.features
    squares = (pool.gradient[0].reshape(-1, 4)[queued] ** 2).mean(1)
    plane = np.searchsorted(pool.layout.planes[:, 4], at, side="right") - 1
    count = len(pool.layout.planes)
    total = np.bincount(plane, squares, count) / np.maximum(np.bincount(plane, minlength=count), 1)
    out: F32 = total.astype(np.float32)
    return out
