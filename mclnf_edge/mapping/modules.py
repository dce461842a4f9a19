"""The modules in memory: their arrays by slot, and the extra arrays of those that still learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mclnf_edge.engine import volume
from mclnf_edge.engine.field import (
    CHANNELS,
    SURFACE,
    TRANSPOSED_SIZE,
    Layout,
    random_features,
    transpose,
)
from mclnf_edge.engine.volume import FAR, MARGIN, Scene, Tape, make_tape
from mclnf_edge.errors import Corrupt
from mclnf_edge.mapping import memory
from mclnf_edge.mapping.extents import Extents
from mclnf_edge.types import ModuleSnapshot, ModuleState

F32 = npt.NDArray[np.float32]
_SLOT = ("features", "weights", "density", "surface", "seen")
_LEARNING = 1 << 30
Cell = tuple[int, int, int]
"""(level, ix, iy): inner cells of site s are of level 2 s, its outer ones of level 2 s + 1."""


def cell_name(cell: Cell) -> str:
    """The module id of a cell, as it stands in `status` and in file names."""
    (site, outer), ix, iy = divmod(cell[0], 2), *cell[1:]
    name = f"{'far' if outer else 'cell'}_{ix}_{iy}"
    return name if site == 0 else f"site{site}_{name}"


def cell_edge(cell: Cell, cell_m: float) -> float:
    """Edge in metres of a cell without margins; `cell_m` is the inner cells'."""
    return cell_m * (FAR if cell[0] % 2 else 1)


class Gained(NamedTuple):
    """Nats that so many rays brought, after the `first` sums of squared gradients (features,)."""

    rays: int
    nats: float
    first: F32
    prior: F32


@dataclass
class Module:
    """What the mapper knows of one module besides its arrays.

    `frames` are the ids it learned from, `fresh` how many of them came since its ground was last
    measured, `tiles` how many of their tiles it was closed with, `gone` how many of them belong to
    frames that were let go while it learned, `tasks` what those frames' tasks are called.
    `levelled` says that its rays teach little more, `gained` what was known when that was last
    looked at.
    """

    cell: Cell
    slot: int
    version: int = 1
    state: ModuleState = "open"
    row: int = -1
    steps: int = 0
    rays: int = 0
    seconds: float = 0.0
    seeded_with: int = 0
    frames: set[int] = field(default_factory=set)
    fresh: int = 0
    last_frame_at: float = 0.0
    psnr: float | None = None
    asked: bool = False
    digest: str = ""
    tasks: set[str] = field(default_factory=set)
    tiles: int = 0
    gone: int = 0
    levelled: bool = False
    gained: Gained | None = None

    @property
    def id(self) -> str:
        """Stable name of the module's place."""
        return cell_name(self.cell)

    @property
    def about(self) -> dict[str, Any]:
        """What a log line about it names."""
        return {"task": self.id, "version": self.version}


class Copies(Protocol):
    """Another device's copies of a pool's arrays: `mapping.device`."""

    def pull(self, pool: ModulePool) -> None:
        """Write what the device has changed to the pool; the pool may be changed from here on."""
        ...


class Shared:
    """An array that another device may have a newer copy of: whoever reads it has the newest."""

    def __set_name__(self, owner: type[ModulePool], name: str) -> None:
        self._name = name

    def __get__(self, pool: ModulePool, owner: type[ModulePool] | None = None) -> Any:
        """The pool's own array, after the device's changes to it."""
        if self._name not in pool.__dict__:
            raise AttributeError(self._name)
        if pool.copies is not None:
            pool.copies.pull(pool)
        return pool.__dict__[self._name]

    def __set__(self, pool: ModulePool, value: Any) -> None:
        pool.__dict__[self._name] = value


class ModulePool:
    """Slots of module arrays, rows of learning arrays, and the table that finds them.

    A frozen module has row -1: no kernel writes to its slot. Everything is float32 in the map's
    local frame; `scene()` is the view of it that kernels take. Only this class writes to the slot
    of a frozen module; it puts the slot into `rewritten`, from which `copies` takes it. `extents`
    knows all modules of the map, `slot_of` those in memory; `make_room` is called before one more
    is. `rank_of` is the order in which modules answer: closed ones from 1 in the order of closing,
    then from _LEARNING on those that never were, in the order of their making.
    """

    features, weights, density = Shared(), Shared(), Shared()
    surface, seen = Shared(), Shared()
    fisher, moment, square = Shared(), Shared(), Shared()
    ray_fisher, adam_steps = Shared(), Shared()

    def __init__(
        self,
        layout: Layout,
        cell_m: float,
        mlp: F32,
        threads: int,
        *,
        known_views: int = 1,
        kernels: bool = True,
    ) -> None:
        """`mlp` (layout.weights,) are the shared initial parameters every new module starts from.

        What `known_views` frames saw counts as known. Without `kernels` there is no room for the
        gradients of the compiled kernels' threads. `ray_fisher` is the diagonal of F that weighs
        rays: that of the output layer, or of what `score` was called with last.
        """
        self._scored = layout.output_size
        self.known_views = known_views
        self.copies: Copies | None = None
        self.rewritten: set[int] = set()
        self._scratch = threads if kernels else 0
        self.layout, self.cell_m, self.mlp = layout, float(cell_m), mlp.astype(np.float32)
        self.threads = threads
        self.executor = ThreadPoolExecutor(threads, thread_name_prefix="engine")
        self.voxels = int(np.prod(layout.voxels))
        self._start_features = random_features(layout)
        self.slots = 0
        self.rows = 0
        self._free_slots: list[int] = []
        self._free_rows: list[int] = []
        self.slot_of: dict[Cell, int] = {}
        self.rank_of: dict[Cell, int] = {}
        self.extents = Extents()
        self.make_room: Callable[[], None] = lambda: None
        self.cells, self._stale = np.zeros((4, 4), np.int32), False
        self._allocate_slots(4)
        self._allocate_rows(4)

    # -- arrays ---------------------------------------------------------------------------------

    def reserve(self, slots: int) -> None:
        """Have room for this many modules; it takes memory only as they come."""
        if slots > self.slots:
            self._allocate_slots(slots)

    def _allocate_slots(self, n: int) -> None:
        self.box = _grown(self, "box", (n, 3))
        self.band = _grown(self, "band", (n, 2))
        self.features = _grown(self, "features", (n, self.layout.features))
        self.weights = _grown(self, "weights", (n, self.layout.weights))
        self.density = _grown(self, "density", (n, self.voxels))
        self.surface = _grown(self, "surface", (n, SURFACE, SURFACE))
        self.seen = _grown(self, "seen", (n, SURFACE, SURFACE), np.uint8)
        self.owner = _grown(self, "owner", (n,), np.int32)
        self.owner[self.slots :] = -1
        self.rank = _grown(self, "rank", (n,), np.int32)
        self._free_slots += list(range(n - 1, self.slots - 1, -1))
        self.slots = n

    def _allocate_rows(self, n: int) -> None:
        texels = self.layout.features // CHANNELS
        self.fisher = _grown(self, "fisher", (n, self.layout.features))
        self.moment = _grown(self, "moment", (n, self.layout.weights))
        self.square = _grown(self, "square", (n, self.layout.weights))
        self.ray_fisher = _grown(self, "ray_fisher", (n, self._scored))
        self.adam_steps = _grown(self, "adam_steps", (n,))
        self.slot_of_row = _grown(self, "slot_of_row", (n,), np.int32)
        self.guarded = _grown(self, "guarded", (n,), np.bool_)
        each = range(self._scratch)
        self.transposed = np.zeros((n if each else 0, TRANSPOSED_SIZE), np.float32)
        self.gradient = [memory.zeros((n, self.layout.features)) for _ in each]
        self.weight_gradient = [np.zeros((n, self.layout.weights), np.float32) for _ in each]
        self.touched = [np.zeros(n * texels, np.uint8) for _ in each]
        self.queue = [np.zeros(n * texels, np.int64) for _ in each]
        self._free_rows += list(range(n - 1, self.rows - 1, -1))
        self.rows = n
        live = self.owner[self.owner >= 0]
        if len(live):
            self.refresh_transposed(live)

    def score(self, size: int) -> None:
        """Weigh rays by `size` parameters of each module from now on: a diagonal begun anew."""
        if size != self._scored:
            self._scored = size
            self.ray_fisher = np.zeros((self.rows, size), np.float32)

    def refresh_transposed(self, rows: npt.NDArray[Any]) -> None:
        """Bring the transposed weights of learning rows, which the kernels read, up to date."""
        if not self._scratch:
            return
        gathered = self.weights[self.slot_of_row[rows]]
        scratch = np.empty((len(rows), TRANSPOSED_SIZE), np.float32)
        transpose(gathered.reshape(-1), scratch.reshape(-1), np.arange(len(rows)))
        self.transposed[rows] = scratch

    # -- modules --------------------------------------------------------------------------------

    def bounds(self, cell: Cell) -> tuple[float, float, float]:
        """(x0, y0, edge) of a cell without margins, local metres."""
        edge = cell_edge(cell, self.cell_m)
        return cell[1] * edge, cell[2] * edge, edge

    def spawn(self, cell: Cell, low: float, high: float) -> Module:
        """A module for `cell` with the shared initial parameters, able to learn.

        `low`, `high` bound its height band in local metres. Algorithm 1, lines 18-20.
        """
        slot = self.take_slot(cell)
        self.place(cell, slot, low, high)
        self.features[slot] = self._start_features
        self.weights[slot] = self.mlp
        self.density[slot] = 0.02
        self.surface[slot] = 0.5 * (low + high)
        self.seen[slot] = 0
        module = Module(cell, slot)
        self.thaw(module)
        return module

    def place(self, cell: Cell, slot: int, low: float, high: float) -> None:
        """Set a slot's box and height band, in local metres."""
        self.box[slot] = self._box(cell)
        self.band[slot] = (low, 1 / (high - low))
        self.extents.put(cell, self._box(cell), (low, 1 / (high - low)))

    def _box(self, cell: Cell) -> tuple[float, float, float]:
        x0, y0, edge = self.bounds(cell)
        return x0 - MARGIN * edge, y0 - MARGIN * edge, edge * (1 + 2 * MARGIN)

    def take_slot(self, cell: Cell) -> int:
        """A slot for a cell that has none; its arrays hold anything."""
        self.make_room()
        if not self._free_slots:
            self._allocate_slots(2 * self.slots)
        slot = self._free_slots.pop()
        self.slot_of[cell] = slot
        if cell not in self.rank_of:
            self.rank_learning(cell)
        self.rank[slot] = self.rank_of[cell]
        self._stale = True
        return slot

    def set_rank(self, cell: Cell, rank: int) -> None:
        """Say where a cell comes in the order in which modules answer."""
        self.rank_of[cell] = rank
        if cell in self.slot_of:
            self.rank[self.slot_of[cell]] = rank

    def rank_closed(self, cell: Cell) -> None:
        """From here on a cell comes before all that still learn; a closed one stays where it is."""
        if self.rank_of.get(cell, _LEARNING) >= _LEARNING:
            closed = (r for r in self.rank_of.values() if r < _LEARNING)
            self.set_rank(cell, max(closed, default=0) + 1)

    def rank_learning(self, cell: Cell) -> None:
        """A cell comes last in the order."""
        self.set_rank(cell, max((_LEARNING - 1, *self.rank_of.values())) + 1)

    def drop(self, cell: Cell) -> None:
        """Forget a frozen module; its place answers as unknown."""
        if cell in self.slot_of:
            self.unload(cell)
        if cell in self.extents:
            self.extents.remove(cell)
        self.rank_of.pop(cell, None)

    def unload(self, cell: Cell) -> None:
        """Take a closed module that is on disk out of memory; where it stands stays known."""
        slot = self.slot_of.pop(cell)
        self.owner[slot] = -1
        for name in _SLOT:
            memory.give_back(getattr(self, name), slot)
        self._free_slots.append(slot)
        self._stale = True

    def know(self, cell: Cell, low: float, high: float) -> None:
        """A closed module that is on disk only, with its height band in local metres."""
        self.drop(cell)
        self.extents.put(cell, self._box(cell), (low, 1 / (high - low)))

    def thaw(self, module: Module) -> None:
        """Give a module the arrays it learns with, all zero."""
        if not self._free_rows:
            self._allocate_rows(2 * self.rows)
        row = self._free_rows.pop()
        module.row = row
        self.owner[module.slot] = row
        self.slot_of_row[row] = module.slot
        self.reset_learning(row)

    def reset_learning(self, row: int) -> None:
        """Forget what a row has gathered: Fisher information and moments."""
        for array in (self.fisher, self.moment, self.square, self.ray_fisher, self.adam_steps):
            array[row] = 0
        self.guarded[row] = False
        self.refresh_transposed(np.array([row]))

    def freeze(self, module: Module) -> None:
        """From here on nothing but this pool writes to the module's slot."""
        self.rewritten.add(module.slot)
        self.owner[module.slot] = -1
        for array in (self.fisher, *self.gradient):
            memory.give_back(array, module.row)
        self._free_rows.append(module.row)
        module.row = -1

    def _rebuild_table(self) -> None:
        size = 8
        while size < 4 * len(self.slot_of):
            size *= 2
        table = np.zeros((size, 4), np.int32)
        for (level, ix, iy), slot in self.slot_of.items():
            at = int(volume.cell_hash(level, ix, iy)) & (size - 1)
            while table[at, 0]:
                at = (at + 1) & (size - 1)
            table[at] = (level + 1, ix, iy, slot)
        self.cells, self._stale = table, False

    def scene(self, site: int = 0) -> Scene:
        """What kernels read of a site; the arrays are the pool's own, not copies."""
        if self._stale:
            self._rebuild_table()
        return Scene(
            cell=self.cell_m,
            cells=self.cells,
            box=self.box,
            band=self.band,
            features=self.features.reshape(-1),
            feature_count=self.layout.features,
            planes=self.layout.planes,
            weights=self.weights.reshape(-1),
            density=self.density,
            voxels=np.array(self.layout.voxels, np.int32),
            surface=self.surface,
            seen=self.seen,
            owner=self.owner,
            rank=self.rank,
            known_views=self.known_views,
            site=site,
        )

    def height_band(self, cells: Iterable[Cell]) -> tuple[float, float]:
        """(lowest, highest) z of the modules of some cells, (0, 0) for none."""
        return self.extents.heights(self.extents.rows(cells))

    def in_sight(self, eye: F32, site: int = 0) -> list[Cell]:
        """Cells of a site that a camera at local `eye` (3,) may look at; see `Extents`."""
        return self.extents.cells(self.extents.in_sight(eye, site))

    # -- snapshots ------------------------------------------------------------------------------

    def snapshot(self, module: Module, meta: dict[str, Any]) -> ModuleSnapshot:
        """A module's arrays as they are committed; features, density and surface in half precision.

        The surface as `levels`, its height as a share of the module's height band: half precision
        knows absolute heights a kilometre below the site's origin to no more than half a metre. The
        slot takes the rounded values too, so that what is served is what was committed.
        """
        arrays = {name: a.copy() for name, a in self.arrays(module).items()}
        arrays["levels"] = levels_of(arrays.pop("surface"), arrays["band"])
        for name in ("features", "density", "levels"):
            arrays[name] = arrays[name].astype(np.float16)
        self._write(module.slot, _with_surface(arrays))
        return ModuleSnapshot(module.id, module.version, arrays, meta)

    def arrays(self, module: Module) -> dict[str, npt.NDArray[Any]]:
        """What makes a module, by name; the pool's own arrays, not copies."""
        names = ("features", "weights", "density", "surface", "seen", "band")
        return {name: getattr(self, name)[module.slot] for name in names}

    def load(self, cell: Cell, arrays: dict[str, npt.NDArray[Any]]) -> int:
        """Put committed arrays into a frozen slot; raises Corrupt when their shapes are wrong."""
        arrays = _with_surface(arrays)
        self._check(arrays)
        slot = self.slot_of.get(cell)
        if slot is None:
            slot = self.take_slot(cell)
        low, inverse = (float(v) for v in arrays["band"])
        self.place(cell, slot, low, low + 1 / inverse)
        self._write(slot, arrays)
        self.owner[slot] = -1
        return slot

    def _check(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Raise Corrupt unless every array of a module is there in its shape."""
        for name in (*_SLOT, "band"):
            expected = getattr(self, name).shape[1:]
            received = arrays[name].shape if name in arrays else None
            if received != expected:
                raise Corrupt(f"module array {name}: expected {expected}, received {received}")

    def _write(self, slot: int, arrays: dict[str, npt.NDArray[Any]]) -> None:
        self.rewritten.add(slot)
        for name in _SLOT:
            getattr(self, name)[slot] = arrays[name]

    @property
    def slot_bytes(self) -> int:
        """Bytes of one module in memory that does not learn."""
        own = vars(self)  # as it is: no device needs to bring it up to date for this
        return sum(int(own[name][0].nbytes) for name in _SLOT)

    @property
    def learning_bytes(self) -> int:
        """Bytes of what learning modules need besides."""
        scratch = (*self.gradient, *self.weight_gradient, *self.queue, *self.touched)
        used = self.rows - len(self._free_rows)
        own = (vars(self)[name] for name in ("fisher", "moment", "square", "ray_fisher"))
        return sum(int(a.nbytes) for a in (*own, *scratch)) * used // self.rows

    def memory_bytes(self) -> int:
        """Bytes of the arrays of the modules in memory."""
        return len(self.slot_of) * self.slot_bytes + self.learning_bytes


class Workspace:
    """Tapes of a fixed number of rays, reused from step to step."""

    def __init__(self, rays: int, samples: int) -> None:
        self.rays, self.samples = rays, samples
        self.tape: Tape = make_tape(rays, samples)


def trace(
    pool: ModulePool,
    work: Workspace,
    ro: F32,
    rd: F32,
    bands: F32,
    *,
    steps: int,
    uniform: float,
    seed: int,
    jitter: bool,
    reach: float,
    site: int = 0,
) -> Scene:
    """Run the forward pass of up to `work.rays` rays on every engine thread; returns the scene.

    See `volume.forward` for the arguments.
    """
    scene, n = pool.scene(site), len(ro)

    def part(i: int) -> None:
        a, b = n * i // pool.threads, n * (i + 1) // pool.threads
        start = a * work.samples * 4
        volume.forward(
            scene, work.tape, ro, rd, bands, a, b, work.samples, steps, np.float32(uniform), seed,
            jitter, np.float32(reach), start,
        )  # fmt: skip

    list(pool.executor.map(part, range(pool.threads)))
    return scene


def _with_surface(arrays: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Committed arrays with absolute heights, which maps of an earlier version have already."""
    band = arrays.get("band")
    if "levels" not in arrays or band is None or band.shape != (2,):
        return arrays
    return {**arrays, "surface": surface_of(arrays["levels"], band)}


def levels_of(surface: F32, band: F32) -> F32:
    """Heights in metres as shares of a module's height band (2,), as they are stored."""
    levels: F32 = (surface - band[0]) * band[1]
    return levels


def surface_of(levels: npt.NDArray[np.floating[Any]], band: F32) -> F32:
    """The inverse of `levels_of`."""
    surface: F32 = band[0] + levels.astype(np.float32) / band[1]
    return surface


def pack_information(fisher: F32) -> npt.NDArray[np.uint8]:
    """One byte a texel of a Fisher diagonal (texels * CHANNELS,): half steps of its log2."""
    mean = fisher.reshape(-1, CHANNELS).mean(1)
    steps = 2 * (np.log2(np.maximum(mean, 2.0**-100)) + 100)
    packed: npt.NDArray[np.uint8] = np.round(steps).clip(0, 255).astype(np.uint8)
    return packed


def unpack_information(packed: npt.NDArray[np.uint8]) -> F32:
    """The diagonal that `pack_information` wrote, equal over a texel's channels."""
    mean = np.where(packed > 0, 2.0 ** (packed / 2 - 100.0), 0)
    return np.repeat(mean, CHANNELS).astype(np.float32)


def _grown(
    pool: ModulePool, name: str, shape: tuple[int, ...], dtype: Any = np.float32
) -> npt.NDArray[Any]:
    grown, old = memory.zeros(shape, dtype), getattr(pool, name, None)
    if old is not None:
        grown[: len(old)] = old
    return grown
