"""What a module's field could be: `python tools/table_fields.py [CAPTURE ...]`.

| field | what |
|---|---|
| MLP | the paper's 10-layer ReLU network of width 256 on encoded position and direction |
| planes | the daemon's planes, as fine over all cells, read by an MLP 24-32-32-4 |
| hash grid | eight levels of four channels, the finest as fine as the planes', an MLP 32-32-32-4 |
| daemon | the daemon's modules: such planes, compiled, seeded from pictures, from a learned start |

The first three are plain eager PyTorch from a random start, each as one network over the inner
cells of a capture: the same rays, sample places (where the swept surfaces say that matter is) and
exposures; planes and hash grid have equally many parameters. Each takes the step size, of three,
with the smallest error on its own rays after SEARCH_S CPU seconds. PSNR is taken on held-out pixels
whose surface lies in those cells, after MARKS_S CPU seconds of steps, evaluation not counted, and
after STEPS steps. One thread each. Writes table_fields.json; started again it goes on.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mclnf_edge.mapping.initialization import load_init  # noqa: E402
from mclnf_edge.maths.fields import Field, NerfMlp, Params, Tap, linear  # noqa: E402
from mclnf_edge.maths.fields import count as count_parameters  # noqa: E402
from mclnf_edge.maths.metrics import psnr  # noqa: E402
from tools import measure, streams  # noqa: E402
from tools.field_stream import FieldStream, box_of  # noqa: E402
from tools.tasks import targets, task_map, tiles_of  # noqa: E402

MARKS_S = (5.0, 15.0, 30.0, 60.0)
STEPS = (64, 256, 1024)
SEARCH_S = 10.0
SHRINK = 3
RAYS = 2048
HEAD = ("0", "1", "2")


@dataclass(frozen=True)
class Planes:
    """Four horizontal planes and two vertical ones over [-1, 1]^3, `cells` modules wide."""

    cells: float

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """(first axis, second axis, texels along each) as in `engine.field.Layout.of`."""
        wide = [max(round(self.cells * (256 >> i)), 2) for i in range(4)]
        return [(0, 1, n, n) for n in wide] + [(axis, 2, wide[2], 32) for axis in (0, 1)]

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Texels in +-0.05."""
        params = {
            f"plane{i}": 0.1 * torch.rand(1, 4, v, u, generator=generator, dtype=dtype) - 0.05
            for i, (_, _, u, v) in enumerate(self.shapes)
        }
        return params | head(4 * len(self.shapes), generator, dtype)

    def __call__(self, params: Params, coords: Tensor, taps: list[Tap] | None = None) -> Tensor:
        """Colour and density (N, 4) at positions and directions (N, 6); directions are not read."""
        found = [
            torch.nn.functional.grid_sample(
                params[f"plane{i}"], coords[None, None, :, [a, b]], align_corners=True,
                padding_mode="border",
            )[0, :, 0].T
            for i, (a, b, _, _) in enumerate(self.shapes)
        ]  # fmt: skip
        return read(params, torch.cat(found, -1), taps)


@dataclass(frozen=True)
class HashGrid:
    """Levels of hashed features at the corners of cubes, over [-1, 1]^3 (Mueller et al. 2022).

    A level of few corners has one entry for each; `size` entries are the most of any.
    """

    size: int
    finest: int
    levels: int = 8
    channels: int = 4
    coarsest: int = 16

    @property
    def widths(self) -> list[int]:
        """Cubes along an edge, in equal ratios."""
        ratio = (self.finest / self.coarsest) ** (1 / (self.levels - 1))
        return [round(self.coarsest * ratio**i) for i in range(self.levels)]

    @property
    def entries(self) -> int:
        """Of all levels together."""
        return sum(min((width + 1) ** 3, self.size) for width in self.widths)

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Features in +-0.05, as the planes have."""
        params = {}
        for i, width in enumerate(self.widths):
            entries = min((width + 1) ** 3, self.size)
            drawn = torch.rand(entries, self.channels, generator=generator, dtype=dtype)
            params[f"level{i}"] = 0.1 * drawn - 0.05
        return params | head(self.levels * self.channels, generator, dtype)

    def __call__(self, params: Params, coords: Tensor, taps: list[Tap] | None = None) -> Tensor:
        """Colour and density (N, 4) at positions and directions (N, 6); directions are not read."""
        at = (0.5 * coords[:, :3] + 0.5).clamp(0, 1)
        found = [self._level(params[f"level{i}"], at, w) for i, w in enumerate(self.widths)]
        return read(params, torch.cat(found, -1), taps)

    def _level(self, table: Tensor, at: Tensor, width: int) -> Tensor:
        place = at * width
        low = place.floor().clamp(max=width - 1)
        share, corner = place - low, low.long()
        out = torch.zeros(len(at), self.channels, dtype=table.dtype)
        for offset in range(8):
            bits = torch.tensor([offset >> axis & 1 for axis in range(3)])
            weight = torch.where(bits.bool(), share, 1 - share).prod(-1, keepdim=True)
            out = out + weight * table[self.entry(corner + bits, width, len(table))]
        return out

    @staticmethod
    def entry(corner: Tensor, width: int, entries: int) -> Tensor:
        """(N,) entries of whole corners (N, 3): in order where all fit, else hashed."""
        x, y, z = corner.unbind(-1)
        if entries == (width + 1) ** 3:
            return (x * (width + 1) + y) * (width + 1) + z
        return (x ^ (y * 2654435761) ^ (z * 805459861)) % entries


def head(inputs: int, generator: torch.Generator, dtype: torch.dtype) -> Params:
    """A small ReLU MLP inputs-32-32-4, He-scaled, its output layer at a tenth."""
    params: Params = {}
    for layer, (a, b) in zip(HEAD, ((inputs, 32), (32, 32), (32, 4)), strict=True):
        scale = math.sqrt(2 / a) * (0.1 if layer == HEAD[-1] else 1)
        params[f"{layer}.w"] = scale * torch.randn(a, b, generator=generator, dtype=dtype)
        params[f"{layer}.b"] = torch.zeros(b, dtype=dtype)
    return params


def read(params: Params, features: Tensor, taps: list[Tap] | None) -> Tensor:
    """Features (N, inputs) -> colour in 0..1 and density >= 0, (N, 4)."""
    x = features
    for layer in HEAD[:-1]:
        x = linear(params, layer, x, taps).relu()
    out = linear(params, HEAD[-1], x, taps)
    density = torch.nn.functional.softplus(out[:, 3:] - 1)
    return torch.cat([out[:, :3].sigmoid(), density], -1)


@dataclass(frozen=True)
class Candidate:
    """A field with the rays of its steps and the step sizes that are tried."""

    field: Field
    rays: int
    rates: tuple[float, ...]


class Stage:
    """One capture, held and swept, and its held-out pixels over the inner cells."""

    def __init__(self, path: Path) -> None:
        """Hold all train frames of the capture's own split."""
        self.init = load_init(None)
        self.episode = streams.StreamEpisode(path, None)
        mapper = self.episode.mapper
        count, _ = tiles_of(list(mapper.frames.values()))
        self.cells = sorted(cell for cell in count if cell in mapper.modules)
        self.drawn = targets(mapper, self.cells)
        self.box = box_of(mapper, self.cells)
        assert mapper.pool is not None
        self.across = 2 * self.box[1] / mapper.pool.cell_m
        self.masks = []
        for frame in self.episode.test:
            camera = frame.camera
            small = camera.scaled(camera.width // SHRINK, camera.height // SHRINK)
            mask = task_map(mapper, [self.cells], small, frame.T_world_camera)
            self.masks.append(mask >= 0)

    def candidates(self) -> dict[str, Candidate]:
        """The fields of the table for this capture; the hash grid's tables are as large as the
        planes' texels.
        """
        planes = Planes(self.across)
        texels = sum(u * v for _, _, u, v in planes.shapes)
        grid = HashGrid(texels, finest=round(256 * self.across))
        entries = range(1 << 12, texels, 1 << 12)
        size = max(n for n in entries if replace(grid, size=n).entries <= texels)
        return {
            "MLP": Candidate(NerfMlp(), 256, (2e-4, 5e-4, 1.5e-3)),
            "planes": Candidate(planes, RAYS, (3e-3, 1e-2, 3e-2)),
            "hash grid": Candidate(replace(grid, size=size), RAYS, (3e-3, 1e-2, 3e-2)),
        }

    def run(self, name: str) -> dict[str, Any]:
        """The row of one field."""
        self.episode.joint(self.init.mlp, 0, tied=False)  # the seeds' exposures
        if name == "daemon":
            mapper = self.episode.mapper
            mapper.drawn = self.drawn
            pool: Any = mapper.pool
            size = len(self.cells) * int(pool.layout.size)
            learned = self._learn(mapper.step, self._picture)
            return {"parameters": size, "rays": RAYS} | learned
        chosen = self.candidates()[name]
        tried = {rate: self._search(chosen, rate) for rate in chosen.rates}
        rate = max(tried, key=lambda r: tried[r])
        stream = self._stream(chosen, rate)
        return {
            "parameters": count_parameters(stream.params),
            "rays": chosen.rays,
            "rate": rate,
            "train_psnr_by_rate": {f"{r:g}": value for r, value in tried.items()},
            **self._learn(
                lambda: stream.step(self.drawn), lambda i: self._field_picture(stream, i)
            ),
        }

    def _stream(self, chosen: Candidate, rate: float) -> FieldStream:
        return FieldStream(
            self.episode.mapper, self.box, 0, chosen.field, rays=chosen.rays, rate=rate
        )

    def _search(self, chosen: Candidate, rate: float) -> float:
        """dB on the rays of the last quarter of SEARCH_S CPU seconds; -inf when it diverges."""
        stream, spent, errors = self._stream(chosen, rate), 0.0, []
        while spent < SEARCH_S:
            began = time.process_time()
            error = stream.step(self.drawn)
            spent += time.process_time() - began
            if spent > 0.75 * SEARCH_S:
                errors.append(error)
        mean = float(np.mean(errors))
        return round(-10 * math.log10(mean), 2) if math.isfinite(mean) else -math.inf

    def _learn(
        self, step: Callable[[], object], picture: Callable[[int], tuple[Any, Any, Any]]
    ) -> dict[str, Any]:
        """PSNR of every held-out view at the marks in seconds and in steps."""
        at_seconds: dict[str, Any] = {}
        at_steps: dict[str, Any] = {}
        spent, done = 0.0, 0
        while len(at_seconds) < len(MARKS_S):
            began = time.process_time()
            step()
            spent += time.process_time() - began
            done += 1
            if done in STEPS:
                at_steps[str(done)] = self._score(picture)
            if spent >= MARKS_S[len(at_seconds)]:
                at_seconds[f"{MARKS_S[len(at_seconds)]:g}"] = self._score(picture)
        return {
            "at_seconds": at_seconds, "at_steps": at_steps, "steps": done,
            "ms_per_step": round(1e3 * spent / done, 1),
        }  # fmt: skip

    def _score(self, picture: Callable[[int], tuple[Any, Any, Any]]) -> dict[str, float]:
        out = {}
        for i, frame in enumerate(self.episode.test):
            if self.masks[i].any():
                out[frame.name or str(i)] = round(psnr(*picture(i)), 3)
        return out

    def _picture(self, view: int) -> tuple[Any, Any, Any]:
        return *self.episode.picture(self.episode.test[view], SHRINK), self.masks[view]

    def _field_picture(self, stream: FieldStream, view: int) -> tuple[Any, Any, Any]:
        """Every fourth of the pixels: the MLP takes long to evaluate."""
        frame, at = self.episode.test[view], self.masks[view].copy()
        at[1::2] = False
        at[:, 1::2] = False
        height, width = at.shape
        pixels = np.argwhere(at)[:, ::-1].astype(np.int64)
        camera = frame.camera.scaled(width, height)
        shown = np.zeros((height, width, 3))
        shown[at] = stream.pixels(camera, frame.T_world_camera, self.episode.gain(frame), pixels)
        return shown, self.episode.truth(frame, SHRINK) / 255.0, at


def main() -> int:
    """Measure what is missing, write after each field, print the table."""
    options = measure.arguments(__doc__, "table_fields.json")
    torch.set_num_threads(1)
    results = measure.open_results(
        options.out,
        measure.module_facts(load_init(None))
        | {"marks_s": MARKS_S, "steps": STEPS, "search_s": SEARCH_S,
           "test_pictures": f"1/{SHRINK} of their width, exposure {measure.EXPOSURE}"},
    )  # fmt: skip
    for capture in options.captures:
        stage = None
        for name in ("MLP", "planes", "hash grid", "daemon"):
            if measure.find(results, capture=capture, field=name) is None:
                stage = stage or Stage(options.data / capture)
                results["rows"].append({"capture": capture, "field": name} | stage.run(name))
                measure.save(options.out, results)
                print(line(results["rows"][-1]), flush=True)
    print()
    for text in lines(results["rows"]):
        print(text)
    return 0


def _mean(values: dict[str, float]) -> float:
    return float(np.mean(list(values.values())))


def line(row: dict[str, Any]) -> str:
    """One row in words, as it comes."""
    curve = ", ".join(f"{s} s {_mean(v):.2f}" for s, v in row["at_seconds"].items())
    return f"{row['capture']} {row['field']}: {curve} dB, {row['ms_per_step']} ms a step"


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table in Markdown."""
    seconds, steps = [f"{s:g}" for s in MARKS_S], [f"{s}" for s in STEPS]
    heads = ["capture", "field", "parameters", *(f"{s} s" for s in seconds)]
    heads += [*(f"{s} steps" for s in steps), "ms a step"]
    out = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["capture"], row["field"], f"{row['parameters']:,}"]
        cells += [f"{_mean(row['at_seconds'][s]):.2f}" for s in seconds]
        cells += [f"{_mean(row['at_steps'][s]):.2f}" if s in row["at_steps"] else "" for s in steps]
        out.append("| " + " | ".join([*cells, str(row["ms_per_step"])]) + " |")
    return out


if __name__ == "__main__":
    sys.exit(main())
