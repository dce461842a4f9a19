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

import numpy as np
import numpy.typing as npt

from mclnf_edge.config import AdaptConfig, FieldConfig, MapConfig
from mclnf_edge.errors import Corrupt, StoreError
from mclnf_edge.mapping import exposures, revisits
from mclnf_edge.mapping.checkpoint import Arrays, cell_of, pack, unpack
from mclnf_edge.mapping.engines import KERNELS, Compute, layout_of, make_engine, start_of
from mclnf_edge.mapping.extents import crossed
from mclnf_edge.mapping.frames import TILE, HeldFrame, depth_points, hold
from mclnf_edge.mapping.modules import Cell, Gained, Module, ModulePool, pack_information
from mclnf_edge.mapping.optimizer import Engine, whole_site
from mclnf_edge.mapping.rays import Rays, Targets, choose_site, draw
from mclnf_edge.mapping.residency import Residency
from mclnf_edge.mapping.structure import Pause, Structure, Tiles, auto_cell
from mclnf_edge.maths.information import information, last_share
from mclnf_edge.types import Frame, ModuleSnapshot

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
log = logging.getLogger(__name__)

_LEFT_S = 4.0
"""Seconds without a frame that sees a module after which the flight has moved on."""
_MORE = 1.1
"""How many times the frames that its surface is from a module must have then, to begin anew."""
_GAIN_GROWTH = 1.25
"""How many times its rays a module takes until its information gain is looked at again."""
_OF = "\x1f"
"""Between a stream's name and its task's: no name contains it."""
_FRESH = 0.25
"""Share of new frames from which on a module looks for ground that it had not seen."""


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
    module; without it, what is closed is never learned again. While `draining`, modules close as
    soon as they are learned. `targets` is what `ray_targets` found, None when it must look again;
    `dirty` and `alone` say whether frames wait to be settled and cells wait for a second view.
    """

    def __init__(
        self,
        map_config: MapConfig,
        field: FieldConfig,
        adapt: AdaptConfig,
        mlp: F32 | None = None,
        threads: int = 2,
        recall: Callable[[str, int], ModuleSnapshot] | None = None,
        compute: Compute = KERNELS,
    ) -> None:
        """`mlp`: the meta-learned initial parameters, None for a random start.

        Raises InitError when they are not those of the field's kind.
        """
        self.config, self.field = map_config, field
        self.mlp = start_of(field, mlp, adapt.seed)
        self.threads = threads
        self.recall = recall
        self.origins: dict[int, npt.NDArray[np.float64]] = {}
        self.structures: dict[int, Structure] = {}
        self.pool: ModulePool | None = None
        self.modules: dict[Cell, Module] = {}
        self.frames: dict[int, HeldFrame] = {}
        self.exposures = exposures.Exposures()
        self.optimizer: Engine[Any] = make_engine(compute, field, adapt, threads)
        self.random = np.random.default_rng(adapt.seed)
        self.psnr: float | None = None
        self.draining = False
        self.dirty = False
        self.alone = False
        self.tiles: Counter[Cell] = Counter()
        self.views: Counter[Cell] = Counter()
        self.tiles_per_frame = 1.0
        self.task_of: dict[str, str] = {}
        self.ended: set[str] = set()
        self.returning: dict[int, Tiles] = {}
        self.targets: Targets | None = None
        self.residency: Residency | None = None
        self.untrained = 0

    @property
    def adapt(self) -> AdaptConfig:
        """How modules are adapted; the optimizer's own settings."""
        return self.optimizer.adapt

    @property
    def steps(self) -> int:
        """Optimization steps of the map so far."""
        return self.optimizer.steps

    def learning(self) -> list[Module]:
        """The modules that are not frozen."""
        return [m for m in self.modules.values() if m.row >= 0]

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
        origin = self.origins.get(site, frame.T_world_camera[:3, 3].copy())
        held = hold(frame_id, stream, frame, site, origin, self._task(stream, frame))
        self.origins[site] = origin
        structure = self.structure_of(site)
        if kept is None:
            recent = [f for f in self.frames.values() if f.site == site][-12:]
            structure.add_frame(held, recent, frame.height_m, depth_points(frame, held))
            held.gain = self.exposures.guess(stream, held.timestamp)
        else:
            held.rays, held.anchored = int(kept[0]), bool(kept[1])
            held.gain = np.array(kept[2:], np.float32)
            held.tiles = self.returning.pop(frame_id, {})
        self.frames[frame_id] = held
        self._begin_task(stream, held.task)
        if held.tiles and self.pool is not None:
            held.band = self.pool.height_band(held.tiles)
            self.views.update(held.tiles.keys())
            self.exposures.remember([held])
            self.targets = None
        else:
            self.dirty = True

    def structure_of(self, site: int) -> Structure:
        """A site's structure, made when it is first asked for."""
        if site not in self.structures:
            asked = self.config.cell_size_m
            cell = 1.0 if asked == "auto" else float(asked)
            self.structures[site] = Structure(cell if self.pool is None else self.pool.cell_m, site)
        return self.structures[site]

    def _task(self, stream: str, frame: Frame) -> str:
        """The task a frame belongs to besides its cells: the publisher's or a time window's."""
        if self.config.tasks == "time":
            return f"{stream}{_OF}{int(frame.timestamp // self.config.time_window_s)}"
        return f"{stream}{_OF}{frame.task or ''}"

    def _begin_task(self, stream: str, task: str) -> None:
        """A stream is in one task at a time: its last one ends where the next begins.

        A grid's tasks are its cells, whatever frames are called.
        """
        if self.config.tasks == "grid":
            return
        before = self.task_of.get(stream)
        if before is not None and before != task:
            self.ended.add(before)
        self.ended.discard(task)
        self.task_of[stream] = task

    def end_task(self, stream: str, task: str | None) -> None:
        """Let a stream's task (None: its present one) close once learned.

        On a grid, the cells that frames of the task (None: of the stream) are in; call
        `settle(last=True)` before, so that all of them have modules.
        """
        name = None if task is None else f"{stream}{_OF}{task}"
        if self.config.tasks != "grid":
            self.ended.add(name or self.task_of.get(stream, ""))
            return
        for module in self.learning():
            if stream in self.streams_of(module) if name is None else name in module.tasks:
                module.asked = True

    def streams_of(self, module: Module) -> set[str]:
        """The streams whose frames a module learns from."""
        return {task.split(_OF)[0] for task in module.tasks}

    @property
    def hover_m(self) -> dict[str, float]:
        """By stream, how far a camera must move before its picture adds parallax.

        0.4 % of the flying height of its last frame; a stream that is not in it, or a site of
        which little is known, has 1 mm.
        """
        newest = {f.stream: f for f in self.frames.values()}
        return {stream: self._hover_m(frame) for stream, frame in newest.items()}

    def _hover_m(self, last: HeldFrame) -> float:
        structure = self.structures[last.site]
        if len(structure.points) < 30:
            return 1e-3
        return 0.004 * max(float(last.eye[2]) - structure.ground(last), 1.0)

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

    # -- structure ------------------------------------------------------------------------------

    def settle(self, pause: Pause = lambda: None, *, last: bool = False) -> bool:
        """Bring cells, modules and seeds up to date with the frames; whether anything was done.

        `pause` is called between modules, so that renders need not wait for all of them; if it
        raises, the next call does the work again. `last`: no more frames are waited for, so that
        a cell that one frame sees alone gets a module too; draining implies it, and so does
        `inactivity_s` for the cells of an older frame.

        A module begins anew, from a surface measured again, each time its views have doubled and
        once more when the flight has moved on: what is learned on a surface from few views is
        worth less than the surface from more. Not once it has let frames go. In between, and
        where it does not begin anew, ground that it sees for the first time is added to it.
        """
        last = last or self.draining
        left = any(self._left(m) or self._sees_more(m) for m in self.learning())
        if not self.dirty and not left and not (self.alone and (last or self._waited())):
            return False
        frames = list(self.frames.values())
        few = len(frames) < 2 and all(len(s.points) < 8 for s in self.structures.values())
        if few and not last and not any(self._quiet(f.arrived) for f in frames):
            return False
        self.dirty = True
        for site, structure in self.structures.items():
            here = [f for f in frames if f.site == site]
            if here:
                self._settle_site(structure, here, pause, last)
        self._count_tiles()
        self._drop_unseen()
        self.exposures.remember(frames)
        self.targets = None
        self.dirty = False
        self.alone = any(c not in self.modules for f in frames for c in f.tiles)
        return True

    def _settle_site(
        self,
        structure: Structure,
        frames: list[HeldFrame],
        pause: Pause,
        last: bool,
    ) -> None:
        pool = self._ensure_pool(structure, frames)
        closed = {c for c, m in self.modules.items() if m.row < 0}
        worth = structure.assign(frames, closed, pause)
        revisits.anchor(frames, closed, self._show, self.adapt.seed, pause)
        seen = worth & {c for f in frames for c in f.tiles}
        for cell in sorted(seen & closed & self.modules.keys()):
            self._revisit(structure, self.modules[cell], frames)
        seeds = [c for c in sorted(seen) if self._needs_seed(c, frames, last)]
        self._seed(pool, structure, seeds, frames, pause)
        for frame in frames:
            for cell in frame.tiles:
                module = self.modules.get(cell)
                if module is None or frame.id in module.frames or module.row < 0:
                    continue
                if self._takes(module, frame):
                    module.frames.add(frame.id)
                    module.fresh += cell not in seeds
                    module.tasks.add(frame.task)
                    module.last_frame_at = max(module.last_frame_at, frame.arrived)
        self._add_ground(pool, structure, frames, pause, last)

    def _add_ground(
        self,
        pool: ModulePool,
        structure: Structure,
        frames: list[HeldFrame],
        pause: Pause,
        last: bool,
    ) -> None:
        """Give learning modules the ground that their fresh frames are the first to see."""
        for module in self.learning():
            enough = 0 if last else _FRESH * (len(module.frames) - module.fresh)
            wanted = module.fresh > enough or self._sees_more(module)
            seeing = [f for f in frames if module.cell in f.tiles and self._takes(module, f)]
            if wanted and seeing:
                structure.extend(pool, module, seeing, pool.fisher[module.row])
                module.fresh = 0
                pause()

    def _revisit(self, structure: Structure, module: Module, frames: list[HeldFrame]) -> None:
        fresh = revisits.fresh_frames(module, frames)
        if self.recall is None or self.pool is None or not fresh:
            return
        try:
            parent = self.recall(module.id, module.version)
            module.slot = self.pool.load(module.cell, parent.arrays)
        except StoreError as error:
            log.error("task %s is not learned again: %s", module.id, error, extra=module.about)
            return
        revisits.reopen(self.pool, structure, module, fresh, parent)
        log.info(
            "task %s version %d opened: seen again", *module.about.values(), extra=module.about
        )

    def _count_tiles(self) -> None:
        """How many tiles of the held frames each cell owns, what a module's budget follows; of
        how many frames they are.
        """
        assert self.pool is not None
        self.tiles, self.views = Counter(), Counter()
        for frame in self.frames.values():
            for cell, tiles in frame.tiles.items():
                module = self.modules.get(cell)
                if module is None or self._takes(module, frame):
                    self.views[cell] += 1
                    self.tiles[cell] += len(tiles)
            frame.band = self.pool.height_band(frame.tiles)
        self.tiles_per_frame = sum(self.tiles.values()) / max(len(self.frames), 1)

    def _drop_unseen(self) -> None:
        """Give up first versions that no tile reaches any more, as the ground is known better now.

        One that frames taught which have been let go since is kept: it closes with what it has.
        """
        for cell, module in list(self.modules.items()):
            taught = module.rays > 0 and not module.frames <= self.frames.keys()
            if module.row < 0 or module.version > 1 or self.tiles[cell] or taught:
                continue
            assert self.pool is not None
            self.pool.freeze(module)
            self.pool.drop(cell)
            self.structures[cell[0] // 2].rasters.pop(cell, None)
            del self.modules[cell]
            log.info(
                "task %s given up: no frame reaches it any more", module.id, extra=module.about
            )

    def _ensure_pool(self, structure: Structure, frames: list[HeldFrame]) -> ModulePool:
        if self.pool is not None:
            return self.pool
        if self.config.cell_size_m == "auto":
            structure.cell_m = auto_cell(structure, frames)
            log.info("cell size %.1f m from the first footprints", structure.cell_m)
        return self.pool_of(structure.cell_m)

    def pool_of(self, cell_m: float) -> ModulePool:
        """The pool, made with cells of `cell_m` metres when there is none yet."""
        if self.pool is None:
            self.pool = ModulePool(
                layout_of(self.field), cell_m, self.mlp, self.threads,
                known_views=self.config.known_views, kernels=self.optimizer.name == "numba",
            )  # fmt: skip
            if self.adapt.weighting == "diagonal":
                self.pool.score(self.pool.layout.size)
            if self.residency is not None:
                self.residency.attach(self.pool)
            for structure in self.structures.values():
                structure.cell_m = cell_m
        return self.pool

    def _needs_seed(self, cell: Cell, frames: list[HeldFrame], last: bool) -> bool:
        module = self.modules.get(cell)
        seeing = [f for f in frames if cell in f.tiles and self._takes(module, f)]
        if module is None:
            return len(seeing) >= 2 or any(last or self._quiet(f.arrived) for f in seeing)
        many = len(seeing) >= 2 * module.seeded_with
        return self._left(module) or (many and self._may_begin_anew(module))

    def _quiet(self, since: float) -> bool:
        return time.monotonic() - since > self.config.inactivity_s

    def _waited(self) -> bool:
        """Whether a frame has waited in vain for another one that sees a cell of its own."""
        old = [f for f in self.frames.values() if self._quiet(f.arrived)]
        return any(c not in self.modules for f in old for c in f.tiles)

    def _may_begin_anew(self, module: Module) -> bool:
        """Whether it is a first version, and every frame that taught it is still held."""
        return module.row >= 0 and module.version == 1 and module.frames <= self.frames.keys()

    def _passed(self, module: Module) -> bool:
        """Whether the flight has moved on from a module, or its tasks have ended."""
        over = module.asked or self._ended_all(module)
        return over or time.monotonic() - module.last_frame_at >= _LEFT_S

    def _sees_more(self, module: Module) -> bool:
        """Whether held frames may see ground that a module lacks, and no more come."""
        return module.fresh > 0 and self.views[module.cell] > 0 and self._passed(module)

    def _left(self, module: Module) -> bool:
        """Whether a module's surface is from clearly fewer frames than see it, and no more come."""
        if not self._passed(module) or not self._may_begin_anew(module):
            return False
        return self.views[module.cell] > _MORE * module.seeded_with

    def _seed(
        self,
        pool: ModulePool,
        structure: Structure,
        cells: list[Cell],
        frames: list[HeldFrame],
        pause: Pause,
    ) -> None:
        seeing = {
            c: [f for f in frames if c in f.tiles and self._takes(self.modules.get(c), f)]
            for c in cells
        }
        bands = {}
        for cell, views in seeing.items():
            flying = max(float(f.eye[2]) - structure.ground(f) for f in views)
            bands[cell] = structure.band(cell, flying)
            if cell not in self.modules:
                module = self.modules[cell] = pool.spawn(cell, *bands[cell])
                about = {**module.about, "frame": views[-1].id}
                log.info("task %s opened by frame %d", module.id, views[-1].id, extra=about)
        groups = [cells[i : i + self.threads] for i in range(0, len(cells), self.threads)]
        for group in groups:
            swept = pool.executor.map(lambda c: structure.sweep(c, seeing[c], *bands[c]), group)
            for cell, found in zip(group, swept, strict=True):
                pool.place(cell, self.modules[cell].slot, *found)
            pause()
        if not cells:
            return
        involved = [f for f in frames if any(c in f.tiles for c in cells)]
        structure.fit_exposures(cells, involved, pause)
        for group in groups:
            list(
                pool.executor.map(lambda c: structure.seed(pool, self.modules[c], seeing[c]), group)
            )
            for cell in group:
                module = self.modules[cell]
                pool.weights[module.slot] = pool.mlp
                pool.reset_learning(module.row)
                module.seeded_with, module.fresh = len(seeing[cell]), 0
                module.rays, module.seconds, module.levelled = 0, 0.0, False
                for frame in seeing[cell]:
                    frame.rays = 0  # what they taught is gone
            pause()

    # -- adaptation -----------------------------------------------------------------------------

    def _owned(self, module: Module) -> int:
        """Tiles a module learns from: those of held frames, and of frames it has let go."""
        return self.tiles.get(module.cell, 0) + module.gone

    def _budget(self, module: Module) -> float:
        """Rays a module is adapted with: `passes` over the pixels it owns."""
        return max(self.adapt.passes * self._owned(module) * TILE * TILE, 1.0)

    def _progress(self, module: Module) -> float:
        """Share of a module's budget that is spent: of its rays or its seconds, what ends first."""
        if module.levelled or not self._owned(module):
            return 1.0
        frames = self._owned(module) / max(self.tiles_per_frame, 1.0)
        seconds = max(self.adapt.budget_s_per_frame * frames, 1e-3)
        return min(max(module.rays / self._budget(module), module.seconds / seconds), 1.0)

    def _draws(self, module: Module, frame: HeldFrame) -> bool:
        """Whether a module still trains on a frame: budget is left, or the frame had too little."""
        short = frame.rays < self.adapt.min_rays_per_frame
        wanted = module.row >= 0 and (short or self._progress(module) < 1)
        return wanted and self._takes(module, frame)

    def _takes(self, module: Module | None, frame: HeldFrame) -> bool:
        """Whether a module, or a coming one, may learn from a frame.

        Once its tasks have ended it takes none of a later task: those wait for its next version.
        """
        return module is None or not self._ended_all(module) or frame.task in module.tasks

    def progress(self) -> float:
        """Share of all open modules' budgets that is spent, in [0, 1]."""
        learning = self.learning()
        weights = [self.tiles.get(m.cell, 0) + 1e-9 for m in learning]
        if not learning:
            return 1.0
        done = sum(w * self._progress(m) for w, m in zip(weights, learning, strict=True))
        return min(done / sum(weights), 1.0)

    def ray_targets(self) -> Targets:
        """Site -> (frame index, tile, row) of the tiles that its unfinished modules draw from."""
        if self.targets is None:
            parts: dict[int, list[I32]] = {}
            for i, frame in enumerate(self.frames.values()):
                for cell, tiles in frame.tiles.items():
                    module = self.modules.get(cell)
                    if module is not None and self._draws(module, frame):
                        parts.setdefault(frame.site, []).append(
                            np.stack(
                                [np.full_like(tiles, i), tiles, np.full_like(tiles, module.row)]
                            )
                        )
            targets = {site: tuple(np.concatenate(found, axis=1)) for site, found in parts.items()}
            self.targets = targets
            if self.residency is not None and self.pool is not None:
                reach = {site: self._reach(site) for site in targets}
                self.residency.hold(list(self.frames.values()), targets, reach)
            return targets
        return self.targets

    def _reach(self, site: int) -> float:
        """How far rays of a site's held frames are followed, metres."""
        return 60.0 * float(
            max(f.eye[2] - f.band[0] for f in self.frames.values() if f.site == site)
        )

    def step(self) -> StepReport | None:
        """One optimization step over every open module.

        None when there is nothing to learn, or when the device has no room for a step.
        """
        targets = self.ray_targets()
        if not targets or self.pool is None or not self.optimizer.rays:
            return None
        site = choose_site(targets, self.random)
        frame_of, tile, row = targets[site]
        began = time.perf_counter()
        held = list(self.frames.values())
        pick = self.random.integers(0, len(tile), self.optimizer.rays)
        pick = pick[np.argsort(row[pick], kind="stable")]  # a module's parameters stay in cache
        drawn, place = np.unique(frame_of[pick], return_inverse=True)
        frames, which = [held[i] for i in drawn], place.astype(np.int32)
        rays, gains, bands = self.batch(frames, which, tile[pick], self.random)
        fit = self.optimizer.step(
            self.pool, rays, gains, bands, site=site, reach=self._reach(site), decay=self.progress()
        )
        if fit is None:
            return self.step()  # with fewer rays
        exposures.update(frames, which, fit.capped, fit.shown)
        seconds = time.perf_counter() - began
        used = rays.use > 0
        self._count(frames, which, row[pick], fit.residual, used, seconds)
        if used.any():
            self.psnr = _running(self.psnr, fit.mse)
        return StepReport(self.psnr, len(pick), fit.weights)

    def batch(
        self, frames: list[HeldFrame], which: I32, tile: I32, random: np.random.Generator
    ) -> tuple[Rays, F32, F32]:
        """Rays of a random pixel in each tile, exposure factors (R, 3), height bands (R, 2)."""
        gains = np.exp(np.stack([f.gain for f in frames]))[which]
        bands = np.array([f.band for f in frames], np.float32)[which]
        return draw(frames, which, tile, random), gains, bands

    def _count(
        self,
        frames: list[HeldFrame],
        which: I32,
        row: I32,
        residual: F32,
        used: npt.NDArray[np.bool_],
        seconds: float,
    ) -> None:
        for i, n in zip(*np.unique(which, return_counts=True), strict=True):
            before = frames[i].rays
            frames[i].rays += int(n)
            if before < self.adapt.min_rays_per_frame <= frames[i].rays:
                self.targets = None
        error = (residual**2).mean(1)
        for module in self.learning():
            here = row == module.row
            n = int(here.sum())
            if n:
                spent = self._progress(module)
                module.steps += 1
                module.rays += n
                module.seconds += seconds * n / len(row)
                if (here & used).any():
                    module.psnr = _running(module.psnr, float(error[here & used].mean()))
                self._see_gain(module)
                if spent < 1 <= self._progress(module):
                    self.targets = None

    def _see_gain(self, module: Module) -> None:
        """Whether what a module's rays teach it has levelled off (`adapt.gain_level`)."""
        if not self.adapt.gain_level or self.pool is None or not self.pool.layout.features:
            return
        seen = module.gained
        if seen is not None and seen.rays <= module.rays < _GAIN_GROWTH * seen.rays:
            return
        sums = self.pool.fisher[module.row]
        if seen is None or module.rays < seen.rays:  # it begins, or began anew
            prior = sums + np.float32(self.adapt.fisher_damping * sums.mean())
            module.gained = Gained(module.rays, 0.0, sums.copy(), prior)
            return
        nats = information(sums - seen.first, seen.prior)
        share = last_share(seen.nats, nats, module.rays / seen.rays)
        module.levelled = share < self.adapt.gain_level
        module.gained = seen._replace(rays=module.rays, nats=nats)

    # -- closing --------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What `status` says of the map besides its modules."""
        return {
            "device": self.optimizer.device,
            "rays_per_step": self.optimizer.rays,
            "out_of_memory": not self.optimizer.rays,
            "cell_size_m": None if self.pool is None else self.pool.cell_m,
            "arrays_mb": 0.0 if self.pool is None else self.pool.memory_bytes() / 1e6,
            **({} if self.residency is None else self.residency.facts()),
            "frames_untrained": self.untrained,
            "frames_short": sum(
                f.rays < self.adapt.min_rays_per_frame for f in self.frames.values()
            ),
        }

    def finished(self) -> list[Module]:
        """Open modules that may close: every frame served, and drained or quiet for long enough.

        A module is served when its budget is spent and every frame that sees it had its minimum.
        """
        now, quiet = time.monotonic(), self.config.inactivity_s
        return [
            m
            for m in self.learning()
            if self._progress(m) >= 1
            and (self.draining or m.asked or self._ended_all(m) or now - m.last_frame_at > quiet)
            and not any(m.cell in f.tiles and self._draws(m, f) for f in self.frames.values())
        ]

    def _ended_all(self, module: Module) -> bool:
        """Whether tasks are not the grid's cells, and all those of a module have ended."""
        return self.config.tasks != "grid" and bool(module.tasks) and module.tasks <= self.ended

    def close(self, module: Module) -> Closing:
        """Freeze a module for good; what to commit and which frames nothing needs any more.

        A later version that shows its parent's probe rays worse than the parent did is given up:
        the parent stands, and there is nothing to commit.
        """
        assert self.pool is not None
        probes = revisits.probe_rays(list(self.frames.values()), module, self.adapt.seed)
        information = pack_information(self.pool.fisher[module.row])
        self.pool.freeze(module)
        self.pool.rank_closed(module.cell)
        module.state, module.gained = "closed", None
        digest, module.digest = module.digest, ""  # not on disk yet
        self.targets = None
        let_go = {}
        for frame_id in sorted(module.frames):
            frame = self.frames.get(frame_id)
            if frame is not None:
                frame.anchored = True
            if frame is not None and not self._needed(frame):
                let_go[frame_id] = frame.rays
        waiting = (f for f in self.frames.values() if f.id not in module.frames)
        self.dirty |= any(module.cell in f.tiles for f in waiting)  # they may make a new version
        told = "task %s closed: %d steps, %d frames let go", module.id, module.steps, len(let_go)
        log.info(*told, extra=module.about)
        parent: dict[str, int] = {}
        if module.version > 1:
            assert self.recall is not None
            before = self.recall(module.id, module.version - 1)
            if not self._holds(module, before):
                module.digest = digest
                return Closing(None, let_go)
            probes = revisits.mixed(before.arrays["probes"], probes)
            parent = {"parent": before.version}
        module.tiles = self._owned(module)
        seen = [f for f in self.frames.values() if f.id in module.frames]
        meta = {**self.describe(module), "gains": exposures.rows_of(seen), **parent}
        meta |= {"frame_ids": sorted(module.frames), "tiles": module.tiles}
        snapshot = self.pool.snapshot(module, meta)
        snapshot.arrays.update(probes=probes, information=information)
        return Closing(snapshot, let_go)

    def _holds(self, module: Module, parent: ModuleSnapshot) -> bool:
        """Whether a new version shows its parent's probes as well; if not, the parent is back."""
        assert self.pool is not None
        verdict = revisits.judge(self.pool, module, parent, self._show)
        share = verdict.share
        told = (
            "given up" if share is None
            else "holds" if share == 1
            else f"holds with {share:.0%} of its change of what was known"
        )  # fmt: skip
        log.log(
            logging.WARNING if share is None else logging.INFO,
            "task %s version %d %s: probes at %.2f dB, before %.2f dB",
            module.id, module.version, told, verdict.new, verdict.old,
            extra=module.about,
        )  # fmt: skip
        if share is None:
            revisits.give_up(self.pool, module, parent)
        return share is not None

    def _show(self, site: int, ro: F32, rd: F32) -> F32:
        assert self.pool is not None
        if self.residency is not None:
            bands, reach = whole_site(self.pool, site, ro)
            band = float(bands[0, 0]), float(bands[0, 1])
            self.residency.ensure(crossed(self.pool.extents, site, ro, rd, band, reach))
        return self.optimizer.show(self.pool, site, ro, rd)

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

    def forget(self, frame_ids: dict[int, int]) -> None:
        """Let frames go after their module was committed."""
        untrained = sum(rays == 0 for rays in frame_ids.values())
        if untrained:
            self.untrained += untrained
            log.info("%d frames let go untrained: they show closed ground, or none", untrained)
        for frame_id in frame_ids:
            frame = self.frames.pop(frame_id, None)
            self.views.subtract(frame.tiles.keys() if frame else ())
            for cell, tiles in frame.tiles.items() if frame else ():
                module = self.modules.get(cell)
                if module is not None and module.row >= 0:
                    self.tiles[cell] -= len(tiles)
                    module.gone += len(tiles)
        self.targets = None

    def unused(self) -> dict[int, int]:
        """Frames that no open or future module needs: nothing of theirs is worth a module."""
        return {
            f.id: f.rays for f in self.frames.values() if not self.dirty and not self._needed(f)
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
            "rank": self.pool.rank_of[module.cell],
            "origin": origin.tolist(),
            "bounds": [lowest, highest],
            "steps": module.steps,
            "rays": module.rays,
            "frames": len(module.frames),
            "psnr": module.psnr,
        }

    # -- persistence ----------------------------------------------------------------------------

    def adopt(
        self,
        arrays: dict[str, npt.NDArray[Any]] | None,
        meta: dict[str, Any],
        version: int,
        digest: str,
    ) -> None:
        """Know a committed module; the first one brings its site's origin and the cell size.

        Without `arrays` it is loaded when it is needed, by `residency`. Raises Corrupt.
        """
        try:
            cell, origin = cell_of(meta["cell"]), np.array(meta["origin"], np.float64)
            low, high = (float(corner[2] - origin[2]) for corner in meta["bounds"])
            cell_m, gains = float(meta["cell_size_m"]), meta.get("gains", {})
            module = Module(
                cell, -1, version, "closed", -1, int(meta["steps"]), int(meta["rays"]),
                psnr=meta["psnr"], digest=digest, frames=set(meta["frame_ids"]),
                tiles=meta["tiles"],
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise Corrupt(f"a module's description: {type(error).__name__}: {error}") from error
        pool = self.pool_of(cell_m)
        self.origins.setdefault(cell[0] // 2, origin)
        self.structure_of(cell[0] // 2)
        if arrays is None:
            pool.know(cell, low, high)
        else:
            module.slot = pool.load(cell, arrays)
        if "rank" in meta:
            pool.set_rank(cell, int(meta["rank"]))
        else:  # a map from before modules had an order
            pool.rank_closed(cell)
        self.modules[cell] = module
        self.exposures.load(gains)

    def lose(self, cell: Cell) -> None:
        """A committed module cannot be read: its place is unknown, and may be learned anew."""
        if self.pool is not None:
            self.pool.drop(cell)
        self.modules.pop(cell, None)
        self.targets, self.dirty = None, self.dirty or bool(self.frames)

    def checkpoint(self) -> tuple[Arrays, dict[str, Any]]:
        """Everything the open work needs to go on: named arrays and a JSON-able description."""
        return pack(self)

    def restore(self, arrays: Arrays, meta: dict[str, Any]) -> None:
        """Go on from a checkpoint; then held frames are added again, from the ledger."""
        unpack(self, arrays, meta)


def _running(old: float | None, mse: float) -> float | None:
    """Running mean of the PSNR in dB that belongs to `mse`, which is passed over if not finite."""
    if not np.isfinite(mse):
        return old
    new = -10 * float(np.log10(max(mse, 1e-9)))
    return new if old is None else 0.95 * old + 0.05 * new
