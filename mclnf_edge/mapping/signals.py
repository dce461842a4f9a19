"""The state machine of a map of images, videos or sounds: a module for each task of each signal.

    piece -> held -> tasks that own its samples -> modules from the shared start -> steps -> closed

The same interface as the mapper of posed frames (`interface.TaskMapper`), on one thread, without
files. A task is a strip of a picture, a run of frames or a segment of sound (`windows`). Modules
never share parameters, so a closed one cannot change.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mclnf_edge.config import ServeConfig
from mclnf_edge.errors import Corrupt, FrameRejected, InitError, ProtocolError
from mclnf_edge.mapping.initialization import SignalInitialization
from mclnf_edge.mapping.mapper import Closing, StepReport
from mclnf_edge.mapping.pieces import PICTURE_OFFSET, Piece, decode_piece, reduced
from mclnf_edge.mapping.signal_modules import SignalModule, SignalRecord, psnr_of
from mclnf_edge.mapping.windows import Grid, Place, block_span, blocks, grid_of, positions
from mclnf_edge.maths.adaptation import Rates, Rule, inner_step
from mclnf_edge.maths.fields import Params
from mclnf_edge.types import ModuleSnapshot, Signal

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
log = logging.getLogger(__name__)

_FIRST_STEPS = 16
"""Every new module takes this many steps before older ones go on: the start learns quickly."""

_CHUNK = 16_384


class SignalMapper:
    """All modules, held pieces and signals of one map of a modality.

    `recall(id, version)` gives back a committed module: closed modules beyond
    `render.resident_mb` are read again when they are rendered.
    """

    hover_m: Mapping[str, float] = MappingProxyType({})

    def __init__(
        self,
        config: ServeConfig,
        init: SignalInitialization,
        recall: Callable[[str, int], ModuleSnapshot],
    ) -> None:
        """Raises InitError when the initialization does not say how signals are cut."""
        if init.window is None:
            raise InitError("init: expected a window (made by `meta_trainer train`), found none")
        # Steps this small gain nothing from a second thread, and beside other load they wait for
        # it: 30 steps instead of 1,298 in 40 s were seen.
        torch.set_num_threads(1)
        self.config, self.init, self.recall = config, init, recall
        self.window = init.window
        self.signals: dict[str, SignalRecord] = {}
        self.modules: dict[tuple[str, Place], SignalModule] = {}
        self.frames: dict[int, Piece] = {}
        self.steps = 0
        self.psnr: float | None = None
        self.draining = False
        self._resident: OrderedDict[tuple[str, Place], Params] = OrderedDict()
        signals, adapt = config.signals, config.adapt
        self.rule = Rule(
            signals.weighting, signals.stepping, adapt.fisher_lambda, adapt.weight_clamp,
            adapt.fisher_damping,
        )  # fmt: skip

    # -- pieces ---------------------------------------------------------------------------------

    def add(
        self,
        frame_id: int,
        stream: str,
        frame: Signal,
        *,
        site: int = 0,
        kept: list[Any] | None = None,
    ) -> None:
        """Decode and hold a piece of a signal, opening the modules of its tasks.

        `kept` is what `checkpoint` wrote of it: its draws so far. Raises FrameRejected.
        """
        values = decode_piece(frame, self.init.modality)
        if values.ndim == 3:
            values = reduced(values, self.config.signals.max_edge_px)
        key = f"{stream}#{frame.seq}" if self.init.modality == "image" else stream
        record = self._record(key, stream, frame, values.shape, frame_id)
        owned = blocks(record.grid, frame.timestamp, values.shape)
        rays = 0 if kept is None else int(kept[0])
        self.frames[frame_id] = Piece(frame_id, key, frame.timestamp, values, tuple(owned), rays)
        for place, block in owned.items():
            module = self._module(key, place)
            if module.learns:
                span = block_span(record.grid, frame.timestamp, block)
                module.take(frame_id, block, span, self.config.signals.steps, frame.task)
        record.latest = max(record.latest, max(place[0] for place in owned))

    def _record(
        self, key: str, stream: str, frame: Signal, shape: tuple[int, ...], frame_id: int
    ) -> SignalRecord:
        height, width = shape[:2] if len(shape) == 3 else (0, 0)
        grid = Grid(self.init.modality, self.window, height, width, frame.rate_hz)
        record = self.signals.get(key)
        if record is None:
            record = SignalRecord(stream, grid, frame.timestamp, frame_id)
            self.signals[key] = record
        elif record.grid != grid:
            raise FrameRejected(
                f"signal: {stream} has {record.grid.width}x{record.grid.height} pixels at "
                f"{record.grid.rate_hz:g} Hz, received {width}x{height} at {frame.rate_hz:g} Hz"
            )
        return record

    def _module(self, key: str, place: Place) -> SignalModule:
        module = self.modules.get((key, place))
        if module is None:
            start = {name: p.clone() for name, p in self.init.params.items()}
            module = self.modules[key, place] = SignalModule(key, place, start)
            log.info("task %s opened", module.id, extra={"task": module.id})
        return module

    @property
    def held_bytes(self) -> int:
        """Bytes of the values in memory."""
        return sum(p.values.nbytes for p in self.frames.values())

    def shed(self, budget_bytes: int) -> dict[int, int]:
        """Nothing: an open task needs its pieces; the oldest close first and let theirs go."""
        return {}

    def end_task(self, stream: str, task: str | None) -> None:
        """Let a stream's open modules (of one publisher's task, or all) close once learned."""
        for module in self.learning():
            same = self.signals[module.signal].stream == stream
            if same and (task is None or task in module.tasks):
                module.asked = True

    def streams_of(self, module: SignalModule) -> set[str]:
        """The one stream that a module learns from."""
        return {self.signals[module.signal].stream}

    def settle(self, pause: Callable[[], None], *, last: bool = False) -> bool:
        """Nothing to do: a task is known as soon as its piece is."""
        return False

    def forget(self, frame_ids: dict[int, int]) -> None:
        """Let pieces go after their modules were committed."""
        for frame_id in frame_ids:
            self.frames.pop(frame_id, None)

    def unused(self) -> dict[int, int]:
        """Pieces whose modules are all closed: they came too late."""
        return {p.id: p.rays for p in self.frames.values() if not self._needed(p)}

    def _needed(self, piece: Piece) -> bool:
        return any(self.modules[piece.signal, place].learns for place in piece.places)

    # -- adaptation -----------------------------------------------------------------------------

    def learning(self) -> list[SignalModule]:
        """Modules that are not closed."""
        return [m for m in self.modules.values() if m.learns]

    def progress(self) -> float:
        """Share of the open modules' steps that is done, 1 without any."""
        learning = self.learning()
        due = sum(m.due for m in learning)
        return sum(min(m.steps, m.due) for m in learning) / due if due else 1.0

    def step(self) -> StepReport | None:
        """One step of one module (Algorithm 1, lines 9-17), None when all have learned.

        A new module takes its first steps at once; then the oldest goes on until it is done, so
        that its pieces can be let go.
        """
        waiting = [m for m in self.learning() if m.steps < m.due and m.blocks]
        if not waiting:
            return None
        began = time.perf_counter()
        module = min(waiting, key=lambda m: m.steps >= _FIRST_STEPS)
        batch = self._draw(module)
        module.params, module.state, stats = inner_step(
            self.init.field, module.params, module.state, batch, self._rates(module), self.rule
        )
        module.steps += 1
        self.steps += 1
        module.seconds += time.perf_counter() - began
        channels = batch[1].shape[-1]
        fresh = psnr_of(float(stats.loss) / channels, self.init.modality)
        module.psnr = _running(module.psnr, fresh)
        self.psnr = _running(self.psnr, fresh)
        return StepReport(self.psnr, len(batch[0]), stats.weights.numpy())

    def _rates(self, module: SignalModule) -> Rates:
        """The initialization's own step sizes, or the setting, which falls tenfold."""
        lr = self.config.signals.lr
        if lr == "init":
            return self.init.rates
        fallen: float = 0.1 ** (module.steps / max(module.due, 1))
        return float(lr) * fallen

    def _draw(self, module: SignalModule) -> tuple[torch.Tensor, torch.Tensor]:
        """Coordinates (N, d) and values (N, c) of samples drawn uniformly from a task."""
        n = self.config.signals.samples_per_step
        seed = (self.config.adapt.seed, zlib.crc32(module.id.encode()), module.steps)
        random = np.random.default_rng(seed)
        grid = self.signals[module.signal].grid
        counts = np.array([block.count for block in module.blocks.values()], np.float64)
        coords, values = [], []
        drawn = random.multinomial(n, counts / counts.sum())
        for (piece_id, block), k in zip(module.blocks.items(), drawn.tolist(), strict=True):
            if not k:
                continue
            piece, index = self.frames[piece_id], block.draw(k, random)
            at = positions(grid, piece.timestamp, piece.values.shape, index)
            coords.append(grid.coordinates(at))
            values.append(piece.targets(index))
            piece.rays += k
        module.rays += n
        return torch.from_numpy(np.concatenate(coords)), torch.from_numpy(np.concatenate(values))

    # -- closing --------------------------------------------------------------------------------

    def finished(self) -> list[SignalModule]:
        """Open modules that may close: budget spent, and their task over or quiet for long."""
        now, quiet = time.monotonic(), self.config.map.inactivity_s
        return [
            m
            for m in self.learning()
            if m.steps >= m.due
            and (self.draining or m.asked or self._over(m) or now - m.last_piece_at > quiet)
        ]

    def _over(self, module: SignalModule) -> bool:
        """Whether all of a task is here: the whole picture, or the stream went past its end."""
        return self.init.modality == "image" or (
            module.place[0] < self.signals[module.signal].latest
        )

    def close(self, module: SignalModule) -> Closing:
        """Freeze a module for good: what to commit, and which pieces nothing needs any more."""
        module.psnr = self._measure(module)
        meta = {**self.describe(module), **self._kept_meta(module)}
        arrays = {name: p.numpy().copy() for name, p in module.params.items()}
        self._keep(module, module.params)
        module.freeze()
        let_go = {
            i: self.frames[i].rays
            for i in sorted(module.frames)
            if i in self.frames and not self._needed(self.frames[i])
        }
        told = "task %s closed: %d steps, %.2f dB", module.id, module.steps, module.psnr
        log.info(*told, extra={"task": module.id})
        return Closing(ModuleSnapshot(module.id, module.version, arrays, meta), let_go)

    def _measure(self, module: SignalModule) -> float:
        """PSNR in dB over every sample of the task."""
        grid, total, count = self.signals[module.signal].grid, 0.0, 0
        for piece_id, block in module.blocks.items():
            piece, index = self.frames[piece_id], block.all()
            at = positions(grid, piece.timestamp, piece.values.shape, index)
            shown = self._run(module.params, grid.coordinates(at))
            total += float(np.square(shown - piece.targets(index)).sum())
            count += shown.size
        return psnr_of(total / max(count, 1), self.init.modality)

    def _kept_meta(self, module: SignalModule) -> dict[str, Any]:
        """What `adopt` needs besides the description."""
        record = self.signals[module.signal]
        return {
            "signal": module.signal,
            "place": list(module.place),
            "covered": list(module.covered),
            **record.as_meta(),
        }

    def describe(self, module: SignalModule) -> dict[str, Any]:
        """A module's JSON-able description; bounds are [[s, y, x], [s, y, x]] in pixels."""
        return {
            "kind": "siren",
            "modality": self.init.modality,
            "bounds": self.signals[module.signal].bounds(module.place),
            "steps": module.steps,
            "rays": module.rays,
            "frames": len(module.frames),
            "psnr": module.psnr,
        }

    def facts(self) -> dict[str, Any]:
        """What `status` says of the map besides its modules."""
        size = sum(p.numel() for p in self.init.params.values()) * 4
        learning = sum(4 * size for _ in self.learning())  # values, F and Adam's two moments
        return {
            "modality": self.init.modality,
            "signals": len(self.signals),
            "arrays_mb": (len(self._resident) * size + learning) / 1e6,
        }

    # -- rendering ------------------------------------------------------------------------------

    def find(self, session: str, stream: str, time_s: float = 0.0) -> str:
        """The signal that is meant: the newest session of the stream, the image shown at a time.

        Raises ProtocolError when there is none, or several streams and none is named.
        """
        named = [
            (key, record) for key, record in self.signals.items() if record.matches(session, stream)
        ]
        streams = {record.stream.rpartition("/")[2] for _, record in named}
        if len(streams) != 1:
            known = sorted({r.stream.rpartition("/")[2] for r in self.signals.values()})
            raise ProtocolError(
                f"render: expected the name of one stream of {known}, received {stream!r}"
            )
        newest = max((record for _, record in named), key=lambda r: r.born).stream
        own = [(key, r) for key, r in named if r.stream == newest]
        shown = [(key, r) for key, r in own if r.timestamp <= time_s]
        return max(shown or own[:1], key=lambda item: item[1].timestamp)[0]

    def evaluate(
        self, signal: str, at: F64, pause: Callable[[], None] = lambda: None
    ) -> tuple[F32, npt.NDArray[np.bool_], list[str]]:
        """Values (N, c) at positions (N, d), which of them are known, and the modules asked.

        G_i is 1 for the module whose task holds the position, else 0 (Algorithm 1, lines 28-30).
        What no module has learned is returned as 0 and not known. Raises Corrupt.
        """
        grid = self.signals[signal].grid
        values = np.zeros((len(at), self.init.field.d_out), np.float32)
        known = np.zeros(len(at), np.bool_)
        places, which = np.unique(grid.places(at), axis=0, return_inverse=True)
        asked, coords, which = [], grid.coordinates(at), which.reshape(-1)
        for i, place in enumerate(places):
            module = self.modules.get((signal, tuple(int(n) for n in place)))
            if module is None or not module.steps:
                continue
            here = np.flatnonzero(which == i)
            if self.init.modality != "image":
                low, high = module.covered
                here = here[(at[here, 0] >= low) & (at[here, 0] <= high)]
            values[here] = self._run(self._params(module), coords[here])
            known[here] = True
            asked.append(module.id)
            pause()
        if self.init.modality != "audio":
            values += PICTURE_OFFSET
        return values, known, asked

    def _run(self, params: Params, coords: F32) -> F32:
        """Field values (N, c), a chunk at a time."""
        out = np.empty((len(coords), self.init.field.d_out), np.float32)
        with torch.no_grad():
            for a in range(0, len(coords), _CHUNK):
                part = torch.from_numpy(coords[a : a + _CHUNK])
                out[a : a + _CHUNK] = self.init.field(params, part).numpy()
        return out

    def _params(self, module: SignalModule) -> Params:
        if module.learns:
            return module.params
        key = module.signal, module.place
        if key not in self._resident:
            self._keep(module, self._checked(self.recall(module.id, module.version)))
        self._resident.move_to_end(key)
        return self._resident[key]

    def _keep(self, module: SignalModule, params: Params) -> None:
        """Hold a closed module's parameters; the longest unused ones beyond the budget go."""
        self._resident[module.signal, module.place] = params
        size = 4 * sum(p.numel() for p in params.values())
        while len(self._resident) * size > self.config.render.resident_mb * 1e6:
            self._resident.popitem(last=False)

    def _checked(self, snapshot: ModuleSnapshot) -> Params:
        """A committed module's parameters; Corrupt when they are not of this map's field."""
        expected = {name: tuple(p.shape) for name, p in self.init.params.items()}
        found = {name: tuple(a.shape) for name, a in snapshot.arrays.items()}
        if found != expected:
            raise Corrupt(f"module {snapshot.id}: expected arrays {expected}, received {found}")
        return {name: torch.from_numpy(a.copy()) for name, a in snapshot.arrays.items()}

    # -- persistence ----------------------------------------------------------------------------

    def adopt(
        self, arrays: dict[str, npt.NDArray[Any]], meta: dict[str, Any], version: int, digest: str
    ) -> None:
        """Take a committed module in."""
        key, place = str(meta["signal"]), tuple(int(n) for n in meta["place"])
        self._adopt_record(key, meta)
        params = self._checked(ModuleSnapshot(key, version, arrays, meta))
        module = SignalModule.closed(key, place, meta, version, digest)
        self.modules[key, place] = module
        self._keep(module, params)

    def _adopt_record(self, key: str, meta: dict[str, Any]) -> SignalRecord:
        if key not in self.signals:
            grid = grid_of(self.init.modality, self.window, meta["grid"])
            self.signals[key] = SignalRecord(
                str(meta["stream"]), grid, float(meta["timestamp"]), int(meta["born"])
            )
        record = self.signals[key]
        record.latest = max(record.latest, meta.get("latest", meta.get("place", [0])[0]))
        return record

    def checkpoint(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Everything the open work needs to go on: named arrays and a JSON-able description."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        modules = []
        for i, module in enumerate(self.learning()):
            arrays |= {f"{i}/{name}": a for name, a in module.arrays().items()}
            modules.append({**module.as_meta(), **self._kept_meta(module)})
        frames = {str(p.id): [p.rays] for p in self.frames.values()}
        return arrays, {"steps": self.steps, "psnr": self.psnr, "modules": modules} | {
            "frames": frames
        }

    def restore(self, arrays: dict[str, npt.NDArray[Any]], meta: dict[str, Any]) -> None:
        """Go on from a checkpoint; the held pieces are added again, from the ledger, after it."""
        self.steps, self.psnr = int(meta.get("steps", 0)), meta.get("psnr")
        for i, item in enumerate(meta.get("modules", [])):
            key, place = str(item["signal"]), tuple(int(n) for n in item["place"])
            if (key, place) in self.modules:
                continue  # committed after this checkpoint was written
            self._adopt_record(key, item)
            own = {name.partition("/")[2]: a for name, a in arrays.items() if _owner(name) == i}
            self.modules[key, place] = SignalModule.restored(key, place, item, own)


def _owner(name: str) -> int:
    return int(name.partition("/")[0])


def _running(old: float | None, new: float) -> float:
    return new if old is None else 0.95 * old + 0.05 * new
