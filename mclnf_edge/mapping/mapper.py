"""The map's state machine: frames come in, modules open, learn, close; nothing else changes a map.

    frame -> held -> cells it sees -> modules spawned and seeded -> steps -> closed -> frame let go

Everything here runs on one thread. The mapper neither reads nor writes files: `Closing` says what
to commit, `checkpoint` and `restore` turn the open work into named arrays and back.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from mclnf_edge.config import AdaptConfig, FieldConfig, MapConfig
from mclnf_edge.engine import learn, volume
from mclnf_edge.engine.field import MLP_SIZE, Layout, random_mlp
from mclnf_edge.errors import FrameRejected, InitError
from mclnf_edge.images import decode_image, decode_mask, undistort, undistort_layer
from mclnf_edge.mapping.frames import TILE, HeldFrame
from mclnf_edge.mapping.modules import (
    Cell,
    Module,
    ModulePool,
    Workspace,
    cell_name,
    pack_information,
    trace,
    unpack_information,
)
from mclnf_edge.mapping.structure import Structure, auto_cell
from mclnf_edge.types import Frame, ModuleSnapshot

F32 = npt.NDArray[np.float32]
Tiles = dict[Cell, npt.NDArray[np.int32]]
log = logging.getLogger(__name__)

_COARSE_STEPS = 48
_SAMPLES = 6
_UNIFORM = 0.05
_GAIN_RATE = 0.01
_PROBES = 1024
_ANCHOR_RAYS = 512
_ANCHOR_TILES = 8
_REVISIT_VIEWS = 4
_REVISIT_SHARE = 0.25
"""A closed module is learned again when new frames bring this share of the tiles it was made of."""
_REVISIT_LOSS_DB = 0.05
_GUARD = 64.0
_MAX_EDGE_PX = 960
"""Larger pictures are reduced to this width or height before they are held."""


@dataclass(frozen=True)
class Closing:
    """A module to commit (None: its parent stands), and the frames that nothing needs then."""

    snapshot: ModuleSnapshot | None
    let_go: dict[int, int]
    """Frame id -> rays it was trained with."""


@dataclass(frozen=True)
class StepReport:
    """One step: running PSNR (None until a ray met no mask), rays drawn and their weights."""

    psnr: float | None
    rays: int
    weights: F32
    """(rays,) weight of each ray in the loss, mean 1."""


class Mapper:
    """All modules, held frames and exposures of one map.

    A map has one or more sites, parts of the world too far apart for one float32 frame. A site's
    `origins` entry, (3,) float64 metres in its world frame, is subtracted from every position; it
    is the camera position of the site's first frame. `recall(id, version)` gives back a committed
    module; without it, what is closed is never learned again.
    """

    def __init__(
        self,
        map_config: MapConfig,
        field: FieldConfig,
        adapt: AdaptConfig,
        mlp: F32 | None = None,
        threads: int = 2,
        recall: Callable[[str, int], ModuleSnapshot] | None = None,
    ) -> None:
        """`mlp`: the meta-learned initial parameters, None for a random start."""
        if mlp is not None and mlp.shape != (MLP_SIZE,):
            raise InitError(f"init: expected {MLP_SIZE} parameters, received {mlp.shape}")
        self.config, self.field, self.adapt = map_config, field, adapt
        self.mlp = random_mlp(adapt.seed) if mlp is None else mlp
        self.threads = threads
        self.recall = recall
        self.origins: dict[int, npt.NDArray[np.float64]] = {}
        self.structures: dict[int, Structure] = {}
        self.pool: ModulePool | None = None
        self.modules: dict[Cell, Module] = {}
        self.frames: dict[int, HeldFrame] = {}
        self.gains: dict[str, dict[float, F32]] = {}
        self.steps = 0
        self.psnr: float | None = None
        self.draining = False
        self._work = Workspace(adapt.rays_per_step, _SAMPLES)
        self._plane_scale: F32 | None = None
        self._random = np.random.default_rng(adapt.seed)
        self._dirty = False
        self._tiles: Counter[Cell] = Counter()
        self._tiles_per_frame = 1.0
        self._targets: dict[int, tuple[npt.NDArray[np.int32], ...]] | None = None
        self._task_of: dict[str, str] = {}
        self._ended: set[str] = set()
        self._returning: dict[int, tuple[Tiles, Tiles]] = {}

    # -- frames ---------------------------------------------------------------------------------

    def add(
        self,
        frame_id: int,
        stream: str,
        frame: Frame,
        *,
        site: int = 0,
        kept: list[Any] | None = None,
    ) -> None:
        """Decode and hold a frame of a site. Raises FrameRejected.

        `kept` is what `checkpoint` wrote of this frame: rays trained so far and its exposure; its
        matched points and tiles are in the checkpoint already, so that nothing is settled anew.
        """
        held = self._hold(frame_id, stream, frame, site)
        structure = self._structure(site)
        if kept is None:
            recent = [f for f in self.frames.values() if f.site == site][-12:]
            structure.add_frame(held, recent, frame.height_m)
            held.gain = self._guess_gain(held)
        else:
            held.rays, held.anchored = int(kept[0]), bool(kept[1])
            held.gain = np.array(kept[2:], np.float32)
            held.tiles, held.border = self._returning.pop(frame_id, ({}, {}))
        self.frames[frame_id] = held
        self._begin_task(stream, held.task)
        if held.tiles and self.pool is not None:
            held.band = self.pool.height_band(held.tiles)
            self._remember_gains([held])
            self._targets = None
        else:
            self._dirty = True

    def _structure(self, site: int) -> Structure:
        if site not in self.structures:
            asked = self.config.cell_size_m
            cell = 1.0 if asked == "auto" else float(asked)
            self.structures[site] = Structure(cell if self.pool is None else self.pool.cell_m, site)
        return self.structures[site]

    def _task(self, stream: str, frame: Frame) -> str:
        """The task a frame belongs to besides its cells: the publisher's or a time window's."""
        if self.config.tasks == "publisher":
            return f"{stream}/{frame.task or ''}"
        if self.config.tasks == "time":
            return f"{stream}@{int(frame.timestamp // self.config.time_window_s)}"
        return ""

    def _begin_task(self, stream: str, task: str) -> None:
        """A stream is in one task at a time: its last one ends where the next begins."""
        before = self._task_of.get(stream)
        if before is not None and before != task:
            self._ended.add(before)
        self._ended.discard(task)
        self._task_of[stream] = task

    def end_task(self, stream: str, task: str | None) -> None:
        """Let a stream's task (None: its present one) close once learned; on a grid, every cell."""
        name = self._task_of.get(stream, "") if task is None else f"{stream}/{task}"
        if self.config.tasks != "grid":
            self._ended.add(name)
            return
        for module in self.modules.values():
            module.asked = module.asked or module.row >= 0

    @property
    def hover_m(self) -> float:
        """How far a camera must move before its picture adds parallax: 0.4 % of flying height."""
        last = next(reversed(self.frames.values()), None)
        if last is None or len(self.structures[last.site].points) < 30:
            return 1e-3
        return 0.004 * max(float(last.eye[2]) - self.structures[last.site].ground(last), 1.0)

    @property
    def held_bytes(self) -> int:
        """Bytes of the pictures in memory."""
        return sum(f.nbytes for f in self.frames.values())

    def shed(self, budget_bytes: int) -> dict[int, int]:
        """The oldest frames beyond a byte budget that had their minimum of rays; id -> rays."""
        over, out = self.held_bytes - budget_bytes, {}
        for frame in self.frames.values():
            if over <= 0:
                break
            if frame.rays >= self.adapt.min_rays_per_frame:
                out[frame.id] = frame.rays
                over -= frame.nbytes
        return out

    def _hold(self, frame_id: int, stream: str, frame: Frame, site: int) -> HeldFrame:
        image = decode_image(frame.image, frame.encoding, frame.camera)
        image, camera, valid = undistort(image, frame.camera)
        mask = np.where(valid, 255, 0).astype(np.uint8)
        if frame.mask is not None:
            published = decode_mask(frame.mask, frame.camera).astype(np.uint8)
            mask = np.where(undistort_layer(published, frame.camera) > 0, mask, 0).astype(np.uint8)
        scale = min(1.0, _MAX_EDGE_PX / max(camera.width, camera.height))
        if scale < 1:
            w, h = max(round(camera.width * scale), 1), max(round(camera.height * scale), 1)
            image = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA).astype(np.uint8)
            mask = cv2.resize(mask, (w, h), interpolation=cv2.INTER_NEAREST).astype(np.uint8)
            camera = camera.scaled(w, h)
        if min(camera.width, camera.height) < 2 * TILE:
            raise FrameRejected(
                f"image: expected at least {2 * TILE} pixels a side, received "
                f"{camera.width}x{camera.height}"
            )
        position = frame.T_world_camera[:3, 3]
        origin = self.origins.setdefault(site, position.copy())
        return HeldFrame(
            frame_id, stream, frame.seq, frame.timestamp, np.ascontiguousarray(image), mask,
            (camera.fx, camera.fy, camera.cx, camera.cy),
            frame.T_world_camera[:3, :3].astype(np.float32),
            (position - origin).astype(np.float32), site, self._task(stream, frame),
        )  # fmt: skip

    def _guess_gain(self, held: HeldFrame) -> F32:
        """A new frame starts from the exposure of its stream's nearest frame in time."""
        known = self.gains.get(held.stream)
        if not known:
            return np.zeros(3, np.float32)
        gain: F32 = known[min(known, key=lambda t: abs(t - held.timestamp))].copy()
        return gain

    def gain(self, stream: str, timestamp: float | None) -> F32:
        """Log exposure (3,) at a time, interpolated between a stream's frames; 0 when unknown.

        `stream` is "session/stream" or a stream's name alone, then in any session; "" is any.
        """
        known = [
            item
            for name, items in self.gains.items()
            if stream in ("", name, name.rpartition("/")[2])
            for item in items.items()
        ]
        if timestamp is None or not known:
            return np.zeros(3, np.float32)
        known.sort(key=lambda item: item[0])
        times = np.array([t for t, _ in known])
        values = np.stack([g for _, g in known])
        return np.array([np.interp(timestamp, times, values[:, c]) for c in range(3)], np.float32)

    # -- structure ------------------------------------------------------------------------------

    def settle(self, pause: Callable[[], None] = lambda: None) -> bool:
        """Bring cells, modules and seeds up to date with the frames; whether anything was done.

        `pause` is called between modules, so that renders need not wait for all of them.

        A module is seeded again while it is young, each time its views have doubled: measured
        surfaces from more views beat what a few hundred steps have learned from fewer.
        """
        if not self._dirty:
            return False
        frames = list(self.frames.values())
        few = len(frames) < 2 and all(len(s.points) < 8 for s in self.structures.values())
        if few and not self.draining:
            return False
        self._dirty = False
        for site, structure in self.structures.items():
            here = [f for f in frames if f.site == site]
            if here:
                self._settle_site(structure, here, pause)
        self._count_tiles()
        self._drop_unseen()
        self._remember_gains(frames)
        self._targets = None
        return True

    def _settle_site(
        self, structure: Structure, frames: list[HeldFrame], pause: Callable[[], None]
    ) -> None:
        pool = self._ensure_pool(structure, frames)
        closed = {c for c, m in self.modules.items() if m.row < 0}
        worth = structure.assign(frames, closed)
        self._anchor(frames, closed)
        for cell in sorted(worth & closed):
            self._revisit(structure, self.modules[cell], frames)
        seeds = [c for c in sorted(worth) if self._needs_seed(c, frames)]
        self._seed(pool, structure, seeds, frames, pause)
        now = time.monotonic()
        for frame in frames:
            for cell in frame.tiles:
                module = self.modules.get(cell)
                if module is not None and frame.id not in module.frames and module.row >= 0:
                    module.frames.add(frame.id)
                    module.tasks.add(frame.task)
                    module.last_frame_at = now

    def _count_tiles(self) -> None:
        """How many tiles of the held frames each cell owns: what a module's budget follows."""
        assert self.pool is not None
        self._tiles = Counter()
        for frame in self.frames.values():
            for cell, tiles in frame.tiles.items():
                self._tiles[cell] += len(tiles)
            frame.band = self.pool.height_band(frame.tiles)
        self._tiles_per_frame = sum(self._tiles.values()) / max(len(self.frames), 1)

    def _drop_unseen(self) -> None:
        """Give up first versions that no tile reaches any more, as the ground is known better now.

        One that frames taught which have been let go since is kept: it closes with what it has.
        """
        for cell, module in list(self.modules.items()):
            taught = module.rays > 0 and not module.frames <= self.frames.keys()
            if module.row < 0 or module.version > 1 or self._tiles[cell] or taught:
                continue
            assert self.pool is not None
            self.pool.freeze(module)
            self.pool.drop(cell)
            self.structures[cell[0] // 2].rasters.pop(cell, None)
            del self.modules[cell]
            log.info("task %s given up: no frame reaches it any more", module.id)

    def _ensure_pool(self, structure: Structure, frames: list[HeldFrame]) -> ModulePool:
        if self.pool is None:
            if self.config.cell_size_m == "auto":
                structure.cell_m = auto_cell(structure, frames)
                log.info("cell size %.1f m from the first footprints", structure.cell_m)
            self._make_pool(structure.cell_m)
        assert self.pool is not None
        return self.pool

    def _make_pool(self, cell_m: float) -> ModulePool:
        layout = Layout.of(self.field.plane_texels, self.field.plane_vertical, self.field.voxels)
        self.pool = ModulePool(layout, cell_m, self.mlp, self.threads)
        for structure in self.structures.values():
            structure.cell_m = cell_m
        return self.pool

    def _needs_seed(self, cell: Cell, frames: list[HeldFrame]) -> bool:
        views = sum(cell in f.tiles for f in frames)
        module = self.modules.get(cell)
        if module is None:
            return views >= 2 or (views == 1 and self.draining)
        if module.version > 1:
            return False
        young = module.row >= 0 and self._progress(module) < 0.5
        return young and views >= 2 * module.seeded_with

    def _seed(
        self,
        pool: ModulePool,
        structure: Structure,
        cells: list[Cell],
        frames: list[HeldFrame],
        pause: Callable[[], None],
    ) -> None:
        for cell in cells:
            seeing = [f for f in frames if cell in f.tiles]
            flying = max(float(f.eye[2]) - structure.ground(f) for f in seeing)
            module = self.modules.get(cell)
            if module is None:
                band = structure.band(cell, flying)
                module = self.modules[cell] = pool.spawn(cell, *band)
                log.info("task %s opened by frame %d", module.id, seeing[-1].id)
            low, high = structure.sweep(cell, seeing, *structure.band(cell, flying))
            pool.place(cell, module.slot, low, high)
            pause()
        if not cells:
            return
        involved = [f for f in frames if any(c in f.tiles for c in cells)]
        structure.fit_exposures(cells, involved)
        for cell in cells:
            module = self.modules[cell]
            structure.seed(pool, module, frames)
            pool.weights[module.slot] = pool.mlp
            pool.reset_learning(module.row)
            module.seeded_with = sum(cell in f.tiles for f in frames)
            pause()

    def _remember_gains(self, frames: list[HeldFrame]) -> None:
        for f in frames:
            self.gains.setdefault(f.stream, {})[f.timestamp] = f.gain

    # -- adaptation -----------------------------------------------------------------------------

    def _owned(self, module: Module) -> int:
        """Tiles a module learns from: those of held frames, and of frames it has let go."""
        return self._tiles.get(module.cell, 0) + module.gone

    def _budget(self, module: Module) -> float:
        """Rays a module is adapted with: `passes` over the pixels it owns."""
        return max(self.adapt.passes * self._owned(module) * TILE * TILE, 1.0)

    def _progress(self, module: Module) -> float:
        """Share of a module's budget that is spent: of its rays or its seconds, what ends first."""
        if not self._owned(module):
            return 1.0
        frames = self._owned(module) / max(self._tiles_per_frame, 1.0)
        seconds = max(self.adapt.budget_s_per_frame * frames, 1e-3)
        return min(max(module.rays / self._budget(module), module.seconds / seconds), 1.0)

    def _draws(self, module: Module, frame: HeldFrame) -> bool:
        """Whether a module still trains on a frame: budget is left, or the frame had too little."""
        short = frame.rays < self.adapt.min_rays_per_frame
        return module.row >= 0 and (short or self._progress(module) < 1)

    def progress(self) -> float:
        """Share of all open modules' budgets that is spent, in [0, 1]."""
        learning = [m for m in self.modules.values() if m.row >= 0]
        weights = [self._tiles.get(m.cell, 0) + 1e-9 for m in learning]
        if not learning:
            return 1.0
        done = sum(w * self._progress(m) for w, m in zip(weights, learning, strict=True))
        return min(done / sum(weights), 1.0)

    def _ray_targets(self) -> dict[int, tuple[npt.NDArray[np.int32], ...]]:
        """Site -> (frame index, tile, row) of the tiles that its unfinished modules draw from.

        Besides its own, a module draws the tiles of closed neighbours in its margin, where both
        answer: without them its half of the seam would drift and spoil what was closed.
        """
        if self._targets is None:
            parts: dict[int, list[npt.NDArray[np.int32]]] = {}
            for i, frame in enumerate(self.frames.values()):
                for cell, tiles in (*frame.tiles.items(), *self._seams(frame)):
                    module = self.modules.get(cell)
                    if module is not None and self._draws(module, frame):
                        parts.setdefault(frame.site, []).append(
                            np.stack(
                                [np.full_like(tiles, i), tiles, np.full_like(tiles, module.row)]
                            )
                        )
            self._targets = {
                site: tuple(np.concatenate(found, axis=1)) for site, found in parts.items()
            }
        return self._targets

    def _seams(self, frame: HeldFrame) -> list[tuple[Cell, npt.NDArray[np.int32]]]:
        """The tiles of closed cells that lie in the margin of each other cell."""
        closed = [t for c, t in frame.tiles.items() if c in self.modules and self._frozen(c)]
        if not closed:
            return []
        tiles = np.concatenate(closed)
        return [(c, np.intersect1d(t, tiles)) for c, t in frame.border.items()]

    def _frozen(self, cell: Cell) -> bool:
        return self.modules[cell].row < 0

    def step(self) -> StepReport | None:
        """One optimization step over every open module, None when there is nothing to learn.

        Algorithm 1, lines 9-17: draw rays, render them through the gate, score each by its Fisher
        information, weigh the loss, update. Frozen modules are rendered and not touched.
        """
        targets = self._ray_targets()
        if not targets or self.pool is None:
            return None
        site = self._pick_site(targets)
        frame_of, tile, row = targets[site]
        began = time.perf_counter()
        pool, tape, n = self.pool, self._work.tape, self.adapt.rays_per_step
        frames = list(self.frames.values())
        pick = self._random.integers(0, len(tile), n)
        ro, rd, truth, use = self._rays(frames, frame_of[pick], tile[pick], self._random)
        self.steps += 1
        reach = 60.0 * float(max(f.eye[2] - f.band[0] for f in frames if f.site == site))
        scene = trace(
            pool, self._work, ro, rd, self._bands(frames)[frame_of[pick]], steps=_COARSE_STEPS,
            uniform=_UNIFORM, seed=self.steps + self.adapt.seed * 1_000_003, jitter=True,
            reach=reach, site=site,
        )  # fmt: skip
        gains = np.exp(np.stack([f.gain for f in frames]))[frame_of[pick]]
        residual = tape.rgb[:n] * gains - truth
        residual *= use[:, None]
        mse = float((residual**2).mean() / max(use.mean(), 1e-6))
        cap = self.adapt.robust_cap * max(float(np.sqrt(mse)), 0.02)
        capped = np.clip(residual, -cap, cap)
        d_rgb = np.ascontiguousarray(2 * capped * gains / n, np.float32)
        weights = self._weigh(scene, d_rgb)
        d_rgb *= weights[:, None]
        self._learn(scene, d_rgb, n)
        self._update_gains(frames, frame_of[pick], capped, tape.rgb[:n] * gains)
        seconds = time.perf_counter() - began
        self._count(frames, frame_of[pick], row[pick], residual, use > 0, seconds)
        if use.any():
            self.psnr = _running(self.psnr, -10 * np.log10(max(mse, 1e-9)))
        return StepReport(self.psnr, n, weights)

    def _pick_site(self, targets: dict[int, tuple[npt.NDArray[np.int32], ...]]) -> int:
        """One site a step, as often as its share of the tiles."""
        sites = list(targets)
        if len(sites) == 1:
            return sites[0]
        share = np.array([len(targets[s][0]) for s in sites], np.float64)
        return int(self._random.choice(sites, p=share / share.sum()))

    def _bands(self, frames: list[HeldFrame]) -> F32:
        """(frames, 2) lowest and highest z of the modules each frame looks at."""
        return np.array([f.band for f in frames], np.float32)

    def _rays(
        self,
        frames: list[HeldFrame],
        which: npt.NDArray[np.int32],
        tile: npt.NDArray[np.int32],
        random: np.random.Generator,
    ) -> tuple[F32, F32, F32, F32]:
        """Origins, directions, true colours and mask (R,) of one random pixel in each tile."""
        sizes = np.array([f.size for f in frames])[which]
        across = sizes[:, 0] // TILE
        tw, th = sizes[:, 0] / across, sizes[:, 1] / (sizes[:, 1] // TILE)
        jitter = random.random((len(which), 2))
        column = np.minimum(((tile % across) + jitter[:, 0]) * tw, sizes[:, 0] - 1).astype(np.int64)
        line = np.minimum(((tile // across) + jitter[:, 1]) * th, sizes[:, 1] - 1).astype(np.int64)
        k = np.array([f.K for f in frames])[which]
        v = np.stack(
            [
                (column + 0.5 - k[:, 2]) / k[:, 0],
                -(line + 0.5 - k[:, 3]) / k[:, 1],
                -np.ones(len(which)),
            ],
            axis=-1,
        )
        v = np.einsum("rij,rj->ri", np.stack([f.rotation for f in frames])[which], v)
        v /= np.linalg.norm(v, axis=1, keepdims=True)
        truth, use = np.empty((len(which), 3), np.float32), np.empty(len(which), np.float32)
        for i in np.unique(which):
            here = which == i
            truth[here] = frames[i].image[line[here], column[here]]
            use[here] = frames[i].mask[line[here], column[here]] > 0
        ro = np.stack([f.eye for f in frames])[which]
        truth /= 255
        return np.ascontiguousarray(ro, np.float32), np.ascontiguousarray(v, np.float32), truth, use

    def _weigh(self, scene: volume.Scene, d_rgb: F32) -> F32:
        """Weights of the rays (Eq. 3); `adapt.weighting` says what stands for the information."""
        adapt, n = self.adapt, len(d_rgb)
        if adapt.weighting == "none" or adapt.fisher_lambda == 0:
            return np.ones(n, np.float32)
        if adapt.weighting == "residual":
            q = learn.residual_score(d_rgb)
        elif adapt.weighting == "gradncp":
            q = learn.gradncp_score(self._work.tape, d_rgb, _SAMPLES)
        else:
            q = self._information(scene, d_rgb)
        weights = learn.ray_weights(q, adapt.fisher_lambda, adapt.weight_clamp)
        if adapt.weighting == "shuffled":
            np.random.default_rng((adapt.seed, self.steps)).shuffle(weights)
        return weights

    def _information(self, scene: volume.Scene, d_rgb: F32) -> F32:
        """q = g' F^-1 g of each ray, from the output layer's running diagonal F."""
        pool, n = self.pool, len(d_rgb)
        assert pool is not None
        running = pool.output_fisher
        damped = running + self.adapt.fisher_damping * running.mean(1, keepdims=True) + 1e-20
        q = np.zeros(n, np.float32)
        sums = [
            np.zeros((pool.rows, learn.FISHER_SIZE + 1), np.float32) for _ in range(self.threads)
        ]

        def part(i: int) -> None:
            a, b = n * i // self.threads, n * (i + 1) // self.threads
            volume.scores(scene, self._work.tape, d_rgb, a, b, _SAMPLES, damped, sums[i], q)

        list(pool.executor.map(part, range(self.threads)))
        total = np.sum(sums, axis=0)
        rows = total[:, -1] > 0
        fresh = total[rows, :-1] / total[rows, -1:]
        first = ~running[rows].any(1, keepdims=True)
        running[rows] = np.where(first, fresh, 0.95 * running[rows] + 0.05 * fresh)
        return q

    def _learn(self, scene: volume.Scene, d_rgb: F32, n: int) -> None:
        pool, tape, threads = self.pool, self._work.tape, self.threads
        assert pool is not None

        def part(i: int) -> int:
            a, b = n * i // threads, n * (i + 1) // threads
            return int(
                volume.backward(
                    scene, tape, pool.transposed.reshape(-1), d_rgb, a, b, _SAMPLES,
                    pool.gradient[i].reshape(-1), pool.weight_gradient[i].reshape(-1),
                    pool.touched[i], pool.queue[i],
                )
            )  # fmt: skip

        counts = list(pool.executor.map(part, range(threads)))
        length = counts[0]
        for i in range(1, threads):
            length = learn.merge(
                pool.queue[0], length, pool.touched[0], pool.gradient[0].reshape(-1),
                pool.queue[i], counts[i], pool.touched[i], pool.gradient[i].reshape(-1),
            )  # fmt: skip
        self._step_texels(pool, length)
        rows = pool.owner[list(pool.slot_of.values())]
        rows = rows[rows >= 0]
        gradient = np.sum([g[rows] for g in pool.weight_gradient], axis=0)
        for g in pool.weight_gradient:
            g[rows] = 0
        moment, square, steps = pool.moment[rows], pool.square[rows], pool.adam_steps[rows]
        gradient[pool.guarded[rows]] = 0
        slots = pool.slot_of_row[rows]
        rate = self.adapt.lr_mlp * 0.1 ** self.progress()
        pool.weights[slots] = learn.adam(pool.weights[slots], gradient, moment, square, steps, rate)
        pool.moment[rows], pool.square[rows], pool.adam_steps[rows] = moment, square, steps
        pool.refresh_transposed(rows)

    def _step_texels(self, pool: ModulePool, length: int) -> None:
        planes = pool.layout.planes
        if self._plane_scale is None:
            self._plane_scale = _plane_means(pool, length)
        sums = np.zeros((len(planes), 2), np.float32)
        learn.step_texels(
            pool.queue[0], length, pool.touched[0], pool.gradient[0].reshape(-1), pool.slot_of_row,
            pool.features.reshape(-1), pool.fisher.reshape(-1), pool.layout.features, planes,
            np.float32(self.adapt.lr), np.maximum(self._plane_scale, 1e-20), sums,
        )  # fmt: skip
        fresh = sums[:, 0] / np.maximum(sums[:, 1], 1)
        self._plane_scale += np.float32(0.02) * (fresh - self._plane_scale)

    def _update_gains(
        self, frames: list[HeldFrame], which: npt.NDArray[np.int32], residual: F32, shown: F32
    ) -> None:
        """A damped Gauss-Newton step on each frame's log gain, pulled weakly towards zero.

        Frames that a closed module learned from keep theirs, so that what is closed stays bright.
        """
        slope = np.zeros((len(frames), 3))
        curve = np.zeros((len(frames), 3))
        np.add.at(slope, which, residual * shown)
        np.add.at(curve, which, shown * shown)
        change = slope / (curve + 50.0)
        for i in np.unique(which):
            if frames[i].anchored:
                continue
            frames[i].gain -= (_GAIN_RATE * 4 * change[i] + 1e-5 * frames[i].gain).astype(
                np.float32
            )

    def _count(
        self,
        frames: list[HeldFrame],
        which: npt.NDArray[np.int32],
        row: npt.NDArray[np.int32],
        residual: F32,
        used: npt.NDArray[np.bool_],
        seconds: float,
    ) -> None:
        for i, n in zip(*np.unique(which, return_counts=True), strict=True):
            before = frames[i].rays
            frames[i].rays += int(n)
            if before < self.adapt.min_rays_per_frame <= frames[i].rays:
                self._targets = None
        error = (residual**2).mean(1)
        for module in self.modules.values():
            if module.row < 0:
                continue
            here = row == module.row
            n = int(here.sum())
            if n:
                spent = self._progress(module)
                module.steps += 1
                module.rays += n
                module.seconds += seconds * n / len(row)
                if (here & used).any():
                    mse = max(float(error[here & used].mean()), 1e-9)
                    module.psnr = _running(module.psnr, -10 * np.log10(mse))
                if spent < 1 <= self._progress(module):
                    self._targets = None

    # -- closing --------------------------------------------------------------------------------

    def finished(self) -> list[Module]:
        """Open modules that may close: every frame served, and drained or quiet for long enough.

        A module is served when its budget is spent and every frame that sees it had its minimum.
        """
        now, quiet = time.monotonic(), self.config.inactivity_s
        return [
            m
            for m in self.modules.values()
            if m.row >= 0
            and self._progress(m) >= 1
            and (self.draining or m.asked or self._ended_all(m) or now - m.last_frame_at > quiet)
            and not any(m.cell in f.tiles and self._draws(m, f) for f in self.frames.values())
        ]

    def _ended_all(self, module: Module) -> bool:
        tasks = module.tasks - {""}
        return bool(tasks) and tasks <= self._ended

    def close(self, module: Module) -> Closing:
        """Freeze a module for good; what to commit and which frames nothing needs any more.

        A later version that shows its parent's probe rays worse than the parent did is given up:
        the parent stands, and there is nothing to commit.
        """
        assert self.pool is not None
        probes = self._probe_rays(module)
        information = pack_information(self.pool.fisher[module.row])
        self.pool.freeze(module)
        module.state = "closed"
        self._targets = None
        let_go = {}
        for frame_id in sorted(module.frames):
            frame = self.frames.get(frame_id)
            if frame is not None:
                frame.anchored = True
            if frame is not None and not self._needed(frame):
                let_go[frame_id] = frame.rays
        log.info("task %s closed: %d steps, %d frames let go", module.id, module.steps, len(let_go))
        parent: dict[str, int] = {}
        if module.version > 1:
            before = self._recalled(module, module.version - 1)
            if not self._holds(module, before):
                return Closing(None, let_go)
            probes = _mixed(before.arrays["probes"], probes)
            parent = {"parent": before.version}
        module.tiles = self._owned(module)
        meta = {**self.describe(module), "gains": self._exposures_of(module), **parent}
        meta |= {"frame_ids": sorted(module.frames), "tiles": module.tiles}
        snapshot = self.pool.snapshot(module, meta)
        snapshot.arrays.update(probes=probes, information=information)
        return Closing(snapshot, let_go)

    def _needed(self, frame: HeldFrame) -> bool:
        """Whether an open or coming module learns from a frame, or a closed one may yet."""
        waits = not self.draining and time.monotonic() - frame.arrived < self.config.inactivity_s
        for cell in frame.tiles:
            module = self.modules.get(cell)
            if module is None or module.row >= 0:
                return True
            if waits and self.recall is not None and frame.id not in module.frames:
                return True
        return False

    # -- revisits -------------------------------------------------------------------------------

    def _revisit(self, structure: Structure, module: Module, frames: list[HeldFrame]) -> None:
        """Open version k + 1 of a closed module once enough of it was seen again.

        It starts from version k and k's Fisher information: a texel's step divides by the root of
        all the information gathered, _GUARD times over for k's, so what k was sure of hardly moves
        and the rest is free. The MLP, which every texel shares, stays as it is.
        """
        fresh = [f for f in frames if module.cell in f.tiles and f.id not in module.frames]
        tiles = sum(len(f.tiles[module.cell]) for f in fresh)
        enough = len(fresh) >= _REVISIT_VIEWS and tiles >= _REVISIT_SHARE * max(module.tiles, 1)
        if self.recall is None or self.pool is None or module.state != "closed" or not enough:
            return
        parent = self._recalled(module, module.version)
        module.version, module.state = module.version + 1, "open"
        module.steps, module.rays, module.seconds, module.asked = 0, 0, 0.0, False
        module.gone = 0
        module.tasks.clear()
        self.pool.thaw(module)
        information = unpack_information(parent.arrays["information"])
        structure.extend(self.pool, module, fresh, information)
        self.pool.fisher[module.row] = _GUARD * information
        self.pool.guarded[module.row] = True
        log.info("task %s version %d opened: seen again", module.id, module.version)

    def _anchor(self, frames: list[HeldFrame], closed: set[Cell]) -> None:
        """Set the exposure of frames that were never trained by what closed modules show.

        The map cannot drift: what is closed says how bright the world is. Median log ratio over
        random rays into closed cells; frames that see too little of them are left alone.
        """
        for frame in frames:
            parts = [tiles for cell, tiles in frame.tiles.items() if cell in closed]
            if frame.rays or frame.anchored or sum(map(len, parts)) < _ANCHOR_TILES:
                continue
            tiles = np.concatenate(parts)
            random = np.random.default_rng((self.adapt.seed, frame.id))
            tile = tiles[random.integers(0, len(tiles), _ANCHOR_RAYS)]
            ro, rd, truth, use = self._rays([frame], np.zeros_like(tile), tile, random)
            shown = self._show(frame.site, ro, rd)
            good = (use > 0) & (truth.min(1) > 0.04) & (truth.max(1) < 0.98) & (shown.min(1) > 0.04)
            if good.sum() >= _ANCHOR_RAYS // 8:
                ratio = np.median(np.log(truth[good] / shown[good]), axis=0)
                frame.gain, frame.anchored = ratio.clip(-1.5, 1.5).astype(np.float32), True

    def _recalled(self, module: Module, version: int) -> ModuleSnapshot:
        assert self.recall is not None
        return self.recall(module.id, version)

    def _probe_rays(self, module: Module) -> F32:
        """(n, 9) origin, direction and true colour at exposure 0 of random rays of a module."""
        frames = list(self.frames.values())
        parts = [
            np.stack([np.full_like(tiles, i), tiles])
            for i, f in enumerate(frames)
            if (tiles := f.tiles.get(module.cell)) is not None
        ]
        if not parts:
            return np.zeros((0, 9), np.float32)
        which, tile = np.concatenate(parts, axis=1)
        random = np.random.default_rng((self.adapt.seed, module.version, *np.abs(module.cell)))
        pick = random.integers(0, len(tile), _PROBES)
        ro, rd, truth, use = self._rays(frames, which[pick], tile[pick], random)
        level = truth / np.exp(np.stack([f.gain for f in frames]))[which[pick]]
        out: F32 = np.concatenate([ro, rd, level], axis=1)[use > 0].astype(np.float32)
        return out

    def _holds(self, module: Module, parent: ModuleSnapshot) -> bool:
        """Whether a new version shows its parent's probes as well; if not, the parent is put back.

        Both are rendered now, through the same neighbours.
        """
        assert self.pool is not None
        new = self._probe_psnr(module, parent.arrays["probes"])
        kept = {name: a.copy() for name, a in self.pool.arrays(module).items()}
        self.pool.load(module.cell, parent.arrays)
        old = self._probe_psnr(module, parent.arrays["probes"])
        if new >= old - _REVISIT_LOSS_DB:
            self.pool.load(module.cell, kept)
            log.info("task %s: probes at %.2f dB, before %.2f dB", module.id, new, old)
            return True
        log.warning(
            "task %s version %d given up: probes at %.2f dB, before %.2f dB",
            module.id, module.version, new, old,
        )  # fmt: skip
        module.version -= 1
        module.steps, module.rays = int(parent.meta["steps"]), int(parent.meta["rays"])
        module.psnr = parent.meta["psnr"]
        return False

    def _probe_psnr(self, module: Module, probes: F32) -> float:
        """PSNR in dB of rendered probe rays, at exposure 0."""
        assert self.pool is not None
        if len(probes) == 0:
            return 0.0
        ro, rd, level = (np.ascontiguousarray(part) for part in np.split(probes, 3, axis=1))
        shown = self._show(module.cell[0] // 2, ro, rd)
        return -10 * float(np.log10(max(float(((shown - level) ** 2).mean()), 1e-9)))

    def _show(self, site: int, ro: F32, rd: F32) -> F32:
        """(n, 3) colours in [0, 1] of rays into a site at exposure 0, through all its modules."""
        assert self.pool is not None
        low, high = self.pool.height_band(c for c in self.pool.slot_of if c[0] // 2 == site)
        reach = 60.0 * max(float(ro[:, 2].max()) - low, self.pool.cell_m)
        bands = np.tile(np.array([[low, high]], np.float32), (self._work.rays, 1))
        out = np.empty((len(ro), 3), np.float32)
        for a in range(0, len(ro), self._work.rays):
            part = slice(a, a + self._work.rays)
            trace(
                self.pool, self._work, ro[part], rd[part], bands, steps=_COARSE_STEPS,
                uniform=_UNIFORM, seed=0, jitter=False, reach=reach, site=site,
            )  # fmt: skip
            out[part] = self._work.tape.rgb[: len(ro[part])].clip(0, 1)
        return out

    def forget(self, frame_ids: dict[int, int]) -> None:
        """Let frames go after their module was committed."""
        for frame_id in frame_ids:
            frame = self.frames.pop(frame_id, None)
            for cell, tiles in frame.tiles.items() if frame else ():
                module = self.modules.get(cell)
                if module is not None and module.row >= 0:
                    self._tiles[cell] -= len(tiles)
                    module.gone += len(tiles)
        self._targets = None

    def unused(self) -> dict[int, int]:
        """Frames that no open or future module needs: nothing of theirs is worth a module."""
        return {
            f.id: f.rays for f in self.frames.values() if not self._dirty and not self._needed(f)
        }

    def describe(self, module: Module) -> dict[str, Any]:
        """A module's JSON-able description; bounds are in world metres."""
        assert self.pool is not None
        origin = self.origins[module.cell[0] // 2]
        x0, y0, edge = self.pool.bounds(module.cell)
        low = float(self.pool.band[module.slot, 0])
        high = low + 1 / float(self.pool.band[module.slot, 1])
        lowest = (origin + (x0, y0, low)).tolist()
        highest = (origin + (x0 + edge, y0 + edge, high)).tolist()
        return {
            "kind": self.field.kind,
            "cell": list(module.cell),
            "cell_size_m": self.pool.cell_m,
            "site": module.cell[0] // 2,
            "origin": origin.tolist(),
            "bounds": [lowest, highest],
            "steps": module.steps,
            "rays": module.rays,
            "frames": len(module.frames),
            "psnr": module.psnr,
        }

    def _exposures_of(self, module: Module) -> dict[str, list[list[float]]]:
        """Log gains of the frames a module saw: stream -> rows of (time, red, green, blue)."""
        seen: dict[str, list[list[float]]] = {
            f.stream: [] for f in self.frames.values() if f.id in module.frames
        }
        for f in self.frames.values():
            if f.id in module.frames:
                seen[f.stream].append([f.timestamp, *(float(v) for v in f.gain)])
        return seen

    # -- persistence ----------------------------------------------------------------------------

    def adopt(
        self,
        snapshot_arrays: dict[str, npt.NDArray[Any]],
        meta: dict[str, Any],
        version: int,
        digest: str,
    ) -> None:
        """Load a committed module; the first one brings its site's origin and the cell size."""
        pool = self.pool or self._make_pool(float(meta["cell_size_m"]))
        cell = _cell(meta["cell"])
        self.origins.setdefault(cell[0] // 2, np.array(meta["origin"], np.float64))
        self._structure(cell[0] // 2)
        slot = pool.load(cell, snapshot_arrays)
        self.modules[cell] = Module(
            cell, slot, version, "closed", -1, int(meta["steps"]), int(meta["rays"]),
            psnr=meta["psnr"], digest=digest, frames=set(meta["frame_ids"]), tiles=meta["tiles"],
        )  # fmt: skip
        for stream, known in meta.get("gains", {}).items():
            kept = self.gains.setdefault(stream, {})
            kept.update({t: np.array(g, np.float32) for t, *g in known})

    def checkpoint(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Everything the open work needs to go on: named arrays and a JSON-able description."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        meta: dict[str, Any] = {"steps": self.steps, "modules": [], "frames": {}, "gains": {}}
        if self.pool is None:
            return arrays, meta
        meta |= {"cell_size_m": self.pool.cell_m, "psnr": self.psnr, "ended": sorted(self._ended)}
        meta |= {"task_of": self._task_of, "random": self._random.bit_generator.state}
        meta |= {"dirty": self._dirty, "tiles_per_frame": self._tiles_per_frame}
        meta["origins"] = {str(site): origin.tolist() for site, origin in self.origins.items()}
        for site, structure in self.structures.items():
            arrays[f"points/{site}"] = structure.points.copy()
            for cell, raster in structure.rasters.items():
                arrays["raster/" + "/".join(map(str, cell))] = raster
        if self._plane_scale is not None:
            arrays["plane_scale"] = self._plane_scale.copy()
        for m in self.modules.values():
            if m.row < 0:
                continue
            meta["modules"].append(
                {"cell": list(m.cell), "version": m.version, "steps": m.steps, "rays": m.rays,
                 "seeded_with": m.seeded_with, "frames": sorted(m.frames), "psnr": m.psnr,
                 "asked": m.asked, "seconds": m.seconds, "tasks": sorted(m.tasks),
                 "tiles": self._tiles[m.cell], "gone": m.gone}
            )  # fmt: skip
            for name in ("features", "weights", "density", "surface", "seen", "band"):
                arrays[f"{m.id}/{name}"] = getattr(self.pool, name)[m.slot].copy()
            for name in ("fisher", "moment", "square", "output_fisher", "adam_steps"):
                arrays[f"{m.id}/{name}"] = np.asarray(getattr(self.pool, name)[m.row]).copy()
        for f in self.frames.values():
            meta["frames"][str(f.id)] = [f.rays, f.anchored, *(float(v) for v in f.gain)]
            if f.tiles:
                arrays[f"tiles/{f.id}"] = _rows_of(f.tiles)
                arrays[f"border/{f.id}"] = _rows_of(f.border)
        meta["gains"] = {
            s: [[t, *(float(v) for v in g)] for t, g in known.items()]
            for s, known in self.gains.items()
        }
        return arrays, meta

    def restore(self, arrays: dict[str, npt.NDArray[Any]], meta: dict[str, Any]) -> None:
        """Go on from a checkpoint; then held frames are added again, from the ledger.

        Once they are, every step is the one that would have come without the interruption.
        """
        if "origins" not in meta:
            return
        pool = self.pool or self._make_pool(float(meta["cell_size_m"]))
        for site, origin in meta["origins"].items():
            self.origins[int(site)] = np.array(origin, np.float64)
            self._structure(int(site)).points = arrays[f"points/{site}"]
        for name, array in arrays.items():
            if name.startswith("raster/"):
                cell = _cell(name[7:].split("/"))
                self.structures[cell[0] // 2].rasters[cell] = array
            elif name.startswith("tiles/"):
                frame_id = int(name[6:])
                self._returning[frame_id] = _by_cell(array), _by_cell(arrays[f"border/{frame_id}"])
        self._task_of, self._ended = dict(meta["task_of"]), set(meta["ended"])
        self._plane_scale = arrays.get("plane_scale")
        self._dirty, self._tiles_per_frame = meta["dirty"], meta["tiles_per_frame"]
        self.steps, self.psnr = meta["steps"], meta["psnr"]
        self._random.bit_generator.state = meta["random"]
        for item in meta["modules"]:
            cell = _cell(item["cell"])
            closed = self.modules.get(cell)
            if closed is not None and closed.version >= item["version"]:
                continue  # committed after this checkpoint was written
            low, inverse = (float(v) for v in arrays[f"{cell_name(cell)}/band"])
            if closed is None:
                m = self.modules[cell] = pool.spawn(cell, low, low + 1 / inverse)
            else:
                m, closed.state = closed, "open"
                pool.place(cell, m.slot, low, low + 1 / inverse)
                pool.thaw(m)
            for name in ("features", "weights", "density", "surface", "seen"):
                getattr(pool, name)[m.slot] = arrays[f"{m.id}/{name}"]
            for name in ("fisher", "moment", "square", "output_fisher", "adam_steps"):
                getattr(pool, name)[m.row] = arrays[f"{m.id}/{name}"]
            pool.guarded[m.row] = item["version"] > 1
            pool.refresh_transposed(np.array([m.row]))
            self._tiles[cell], m.gone, m.tasks = item["tiles"], item["gone"], set(item["tasks"])
            m.version, m.steps, m.rays = item["version"], item["steps"], item["rays"]
            m.seeded_with, m.psnr = item["seeded_with"], item["psnr"]
            m.asked, m.seconds = bool(item["asked"]), float(item["seconds"])
            m.frames, m.last_frame_at = set(item["frames"]), time.monotonic()
        for stream, known in meta["gains"].items():
            self.gains[stream] = {t: np.array(g, np.float32) for t, *g in known}


def _cell(parts: list[Any]) -> Cell:
    level, ix, iy = (int(v) for v in parts)
    return level, ix, iy


def _rows_of(tiles: dict[Cell, npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    """(n, 4) rows (level, ix, iy, tile) of a frame's tiles by cell."""
    parts = [np.column_stack([np.tile(cell, (len(t), 1)), t]) for cell, t in tiles.items()]
    return np.concatenate([np.zeros((0, 4)), *parts]).astype(np.int32)


def _by_cell(rows: npt.NDArray[np.int32]) -> dict[Cell, npt.NDArray[np.int32]]:
    """The inverse of `_rows_of`, in the same order."""
    cells = dict.fromkeys(_cell(row) for row in rows[:, :3].tolist())
    return {c: np.ascontiguousarray(rows[(rows[:, :3] == c).all(1), 3]) for c in cells}


def _running(old: float | None, new: float) -> float:
    return float(new) if old is None else 0.95 * old + 0.05 * float(new)


def _mixed(older: F32, newer: F32) -> F32:
    """Half of the probes from before, half from now, so that no version forgets the first."""
    half = _PROBES // 2
    return np.concatenate([older[: max(half, _PROBES - len(newer))], newer[:half]])


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
