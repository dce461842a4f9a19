"""The daemon's shipped initialization, learned over generated flights with the daemon's own engine.

Each flight is held, swept and seeded once by the same `Mapper` that `serve` runs. An episode starts
every module of one flight from the shared parameters and takes the daemon's steps (same update
rule, batch and Fisher weights): `inner_steps` on rays of the context frames, then `query_steps` on
rays of the frames between them. The shared parameters follow

* `query_steps` 0, every frame context: where the modules arrived. Reptile (Nichol et al. 2018).
* else: what the modules moved by in the query steps alone. First-order MAML (Finn et al. 2017),
  the gradient at the adapted parameters taken in the daemon's preconditioned steps.

Both are first-order members of the paper's outer loop (Algorithm 1, lines 2-8). The compiled
kernels have no second derivative; `meta_trainer.trainer` has second order, for fields in torch.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import yaml

from mclnf_edge.captures import open_capture
from mclnf_edge.config import Section, ServeConfig, setting
from mclnf_edge.engine.field import random_mlp
from mclnf_edge.errors import CaptureError, ConfigError, InitError
from mclnf_edge.images import decode_image
from mclnf_edge.inference.renderer import Renderer
from mclnf_edge.mapping.initialization import save_init
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.types import Frame, View

F32 = npt.NDArray[np.float32]
log = logging.getLogger(__name__)

_SEEDED = ("features", "density", "surface")
_STREAM = "flight"
_ENDLESS_S = 1e9
"""Budgets count rays only, so that a slow machine anneals no earlier than a fast one."""
SCORED_STEPS = (1, 16, 64)


@dataclass(frozen=True)
class CityConfig(Section):
    """One run; every field stands in the YAML file under the same name.

    The last `held_out` flights by name are only for scoring. `frames` of each flight's train split
    are held. The outer rate falls linearly from `outer_rate` to a tenth of it over `episodes`.
    """

    episodes: int = setting(240, 1, 1_000_000)
    inner_steps: int = setting(16, 1, 10_000)
    query_steps: int = setting(0, 0, 10_000)
    outer_rate: float = setting(0.3, above=0, high=1)
    frames: int = setting(16, 2, 1000)
    held_out: int = setting(2, 0, 1000)
    seed: int = setting(0, 0, 2**20)


def load_city_config(path: Path) -> CityConfig:
    """Read a YAML file; unknown keys, wrong types and values out of range raise ConfigError."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values, received {type(raw).__name__}")
    names = [f.name for f in fields(CityConfig)]
    for key in raw:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1) or names
            raise ConfigError(f"{path}: unknown key {key!r}; expected {' or '.join(near)}")
    try:
        return CityConfig(**raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def find_flights(folder: Path) -> dict[str, dict[str, Any]]:
    """The generated flights below `folder`: name -> what its `city.json` says it was made from.

    Raises CaptureError when there is none, or one that the generator did not write: figures on real
    captures need an initialization that saw none of them.
    """
    found: dict[str, dict[str, Any]] = {}
    for poses in sorted(folder.glob("*/transforms.json")):
        try:
            facts = json.loads((poses.parent / "city.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CaptureError(f"{poses.parent}: not a generated flight: {error}") from error
        if not isinstance(facts, dict) or facts.get("generator") != "mclnf-edge city":
            raise CaptureError(f"{poses.parent}/city.json: expected generator 'mclnf-edge city'")
        found[poses.parent.name] = facts["request"]
    if not found:
        raise CaptureError(f"{folder}: expected folders with transforms.json, found none")
    return found


class Episode:
    """One capture, swept and seeded, that can be adapted again and again from new parameters."""

    make_mapper: type[Mapper] = Mapper

    def __init__(
        self,
        path: Path,
        frames: int | None,
        threads: int = 1,
        fold: int | None = None,
        cell_m: float | Literal["auto"] = "auto",
    ) -> None:
        """Hold the first `frames` (None: all) of the train split of the capture at `path`.

        `fold` is as in `Capture.fold`, `cell_m` the edge of a cell.
        """
        capture = open_capture(path).fold(fold)
        self.train: Sequence[Frame] = capture.split("train").frames[:frames]
        self.test: Sequence[Frame] = capture.split("test").frames
        self.mapper = self.empty_map(cell_m, threads=threads)
        self._adapt = self.mapper.adapt
        self.hold(range(len(self.train)))
        pool = self.mapper.pool
        assert pool is not None
        self._slots = np.array([m.slot for m in self.mapper.modules.values()])
        self._start = {name: getattr(pool, name)[self._slots].copy() for name in _SEEDED}
        self._gains = [f.gain.copy() for f in self.mapper.frames.values()]
        self._renderer = Renderer()

    def empty_map(
        self, cell_m: float | Literal["auto"], mlp: F32 | None = None, threads: int = 1
    ) -> Mapper:
        """A mapper with the daemon's defaults whose budgets count rays, no frame held yet.

        `mlp` (MLP_SIZE,) is what its modules start from, None: random.
        """
        config = ServeConfig()
        adapt = replace(config.adapt, budget_s_per_frame=_ENDLESS_S)
        return self.make_mapper(
            replace(config.map, cell_size_m=cell_m), config.field, adapt, mlp, threads=threads
        )

    def hold(self, numbers: Iterable[int]) -> None:
        """Give the mapper these train frames; sweep and seed what they see, lone views too."""
        for i in numbers:
            self.mapper.add(i, _STREAM, self.train[i])
        self.mapper.draining = True
        self.mapper.settle()

    def restart(self, mlp: F32, seed: int, factor: float = 1.0) -> None:
        """Put every module back to its seeded start with `mlp` (MLP_SIZE,) and both rates * factor.

        What follows depends on `mlp`, `seed`, `factor` and the number of threads alone.
        """
        mapper, pool, rates = self.mapper, self.mapper.pool, self._adapt
        assert pool is not None
        adapt = replace(rates, seed=seed, lr=rates.lr * factor, lr_mlp=rates.lr_mlp * factor)
        mapper.optimizer.restart(adapt)
        mapper.random, mapper.psnr, mapper.targets = np.random.default_rng(seed), None, None
        for name, value in self._start.items():
            getattr(pool, name)[self._slots] = value
        pool.weights[self._slots] = mlp
        for module in mapper.modules.values():
            pool.reset_learning(module.row)
            module.rays = module.steps = 0
            module.seconds, module.psnr = 0.0, None
        for frame, gain in zip(mapper.frames.values(), self._gains, strict=True):
            frame.gain[:] = gain

    def steps(self, n: int) -> None:
        """Take n of the daemon's steps."""
        for _ in range(n):
            self.mapper.step()

    def only(self, remainder: int | None) -> None:
        """Draw rays only from every second frame (`remainder` 0 or 1), None: from all."""
        self.mapper.targets = None
        if remainder is not None:
            targets = self.mapper.ray_targets()[0]
            keep = targets[0] % 2 == remainder
            self.mapper.targets = {0: tuple(part[keep] for part in targets)}

    def mean_weights(self) -> npt.NDArray[np.float64]:
        """(MLP_SIZE,) mean of the modules' parameters, weighted by the rays each was given."""
        pool = self.mapper.pool
        assert pool is not None
        rays = np.array([m.rays for m in self.mapper.modules.values()], np.float64)
        mean: npt.NDArray[np.float64] = (rays / rays.sum()) @ pool.weights[self._slots]
        return mean

    def score(self, shrink: int) -> list[float]:
        """PSNR in dB of every test frame, rendered at 1/shrink of its size, unknown pixels grey.

        Exposure is told by the train frames around it and the map, never by the test picture.
        """
        return [self._psnr(frame, shrink) for frame in self.test]

    def gain(self, frame: Frame) -> F32:
        """(3,) log exposure of a test frame, from the frames around it and the map."""
        meter = self.mapper.exposures.meter(_STREAM, frame.timestamp, frame.exposure)
        view = View(frame.camera, frame.T_world_camera, frame.timestamp, _STREAM)
        return self._renderer.gain(self.mapper.pool, self.mapper.origins[0], view, meter)

    def truth(self, frame: Frame, shrink: int) -> npt.NDArray[np.uint8]:
        """(H, W, 3) a test frame as it was taken, at 1/shrink its size."""
        size = (frame.camera.width // shrink, frame.camera.height // shrink)
        full = decode_image(frame.image, frame.encoding, frame.camera)
        return cv2.resize(full, size, interpolation=cv2.INTER_AREA).astype(np.uint8)

    def picture(
        self, frame: Frame, shrink: int, gain: F32 | None = None
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """A test frame as the map shows it and as it was taken, (H, W, 3), at 1/shrink its size.

        `gain` (3,) is the log exposure, None: as the frames around it and the map tell it.
        """
        truth = self.truth(frame, shrink)
        camera = frame.camera.scaled(truth.shape[1], truth.shape[0])
        view = View(camera, frame.T_world_camera, frame.timestamp, _STREAM)
        gain = self.gain(frame) if gain is None else gain
        shown = self._renderer.render(self.mapper.pool, self.mapper.origins[0], view, gain)
        return shown.rgb, truth

    def _psnr(self, frame: Frame, shrink: int) -> float:
        shown, truth = self.picture(frame, shrink)
        error = (shown.astype(np.float64) - truth) / 255
        return float(-10 * np.log10(max((error**2).mean(), 1e-9)))


def outer_move(episode: Episode, config: CityConfig, mlp: F32, seed: int) -> F32:
    """(MLP_SIZE,) what one episode would have the shared parameters move by."""
    episode.restart(mlp, seed)
    if not config.query_steps:
        episode.steps(config.inner_steps)
        return (episode.mean_weights() - mlp).astype(np.float32)
    episode.only(0)
    episode.steps(config.inner_steps)
    before = episode.mean_weights()
    episode.only(1)
    episode.steps(config.query_steps)
    return (episode.mean_weights() - before).astype(np.float32)


def train(
    config: CityConfig,
    flights: Path,
    out: Path,
    progress: Callable[[int, float], None] = lambda episode, psnr: None,
    threads: int = 1,
) -> F32:
    """Learn from the flights below a folder and write `out`; returns the parameters (MLP_SIZE,).

    `progress(episodes done, training PSNR at the episode's end)` after every episode. Beside `out`
    a checkpoint (.npz) is replaced after each round over the flights; the same call goes on from it
    to the same parameters. Raises InitError when it is of other settings, CaptureError for flights.
    """
    found = find_flights(flights)
    names = list(found)[: len(found) - config.held_out]
    if not names:
        raise ConfigError(
            f"held_out: expected fewer than the {len(found)} flights, received {config.held_out}"
        )
    facts = {"config": asdict(config), "flights": {name: found[name] for name in names}}
    checkpoint = out.with_suffix(".checkpoint.npz")
    mlp, begin = _resume(facts, checkpoint)
    open_flights: dict[str, Episode] = {}
    for number in range(begin, config.episodes):
        name = names[_order(config.seed, number, len(names))]
        if name not in open_flights:
            open_flights[name] = Episode(flights / name, config.frames, threads)
        move = outer_move(open_flights[name], config, mlp, config.seed + number)
        mlp = mlp + np.float32(config.outer_rate * (1 - 0.9 * number / config.episodes)) * move
        progress(number + 1, open_flights[name].mapper.psnr or 0.0)
        if (number + 1) % len(names) == 0 or number + 1 == config.episodes:
            _save(facts, checkpoint, mlp, number + 1)
    open_flights.clear()
    held = {name: found[name] for name in found if name not in names}
    save_init(out, mlp, facts | _provenance() | {"held_out": held_out_scores(flights, held, mlp)})
    return mlp


def held_out_scores(
    flights: Path, names: Sequence[str] | dict[str, Any], mlp: F32
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean test PSNR (dB) of each flight at SCORED_STEPS from `mlp` and from a random start."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        episode = Episode(flights / name, None)
        out[name] = {
            start: score_curve(episode, parameters)
            for start, parameters in (("meta", mlp), ("random", random_mlp(0)))
        }
    return out


def score_curve(episode: Episode, mlp: F32) -> dict[str, float]:
    """Steps -> mean test PSNR in dB, pictures a quarter as wide."""
    episode.restart(mlp, 0)
    curve, done = {}, 0
    for mark in SCORED_STEPS:
        episode.steps(mark - done)
        done = mark
        curve[str(mark)] = round(float(np.mean(episode.score(4))), 3)
    return curve


def _provenance() -> dict[str, Any]:
    import numba

    import mclnf_edge

    return {
        "what": "first-order meta-learning over generated flights with the daemon's engine",
        "real_captures": [],
        "statement": "No real capture was used: every training flight was made by the generator.",
        "versions": {
            "mclnf_edge": mclnf_edge.__version__,
            "numpy": np.__version__,
            "numba": numba.__version__,
        },
    }


def _order(seed: int, number: int, flights: int) -> int:
    """Which flight episode `number` uses: a new permutation each round."""
    turn, place = divmod(number, flights)
    return int(np.random.default_rng((seed, turn)).permutation(flights)[place])


def _save(facts: dict[str, Any], path: Path, mlp: F32, done: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez(part, mlp=mlp, done=done, facts=json.dumps(facts))
    part.replace(path)


def _resume(facts: dict[str, Any], path: Path) -> tuple[F32, int]:
    if not path.exists():
        return random_mlp(facts["config"]["seed"]), 0
    with np.load(path, allow_pickle=False) as kept:
        held, wanted = json.loads(str(kept["facts"])), json.loads(json.dumps(facts))
        if held != wanted:
            raise InitError(
                f"{path}: expected a checkpoint of {json.dumps(wanted)}, received one of "
                f"{json.dumps(held)}; remove it to begin anew"
            )
        return kept["mlp"].astype(np.float32), int(kept["done"])
