"""The plan of a city: streets, blocks and their uses, ground shapes, relief, light."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from meta_trainer.city import ground as g
from meta_trainer.city.mesh import FloatArray, Frame

Rng = np.random.Generator

USES = ("slabs", "houses", "downtown", "works", "park", "school", "forest", "fields")
STYLES: dict[str, tuple[float, ...]] = {
    "estate": (6, 1, 1, 0.5, 1.5, 1, 0, 0),
    "suburb": (0.5, 7, 0, 0.5, 1.5, 1, 0.5, 0),
    "centre": (1.5, 0, 7, 0.5, 1, 0.5, 0, 0),
    "works": (0.5, 0.5, 0.5, 6, 0.7, 0, 0.5, 0.5),
    "village": (0, 4, 0, 1.5, 1, 0.4, 1.5, 2),
    "mixed": (2, 2, 2, 1, 1, 1, 0.3, 0),
}
"""How likely each use is for a block of a city in this style."""

_OUTER: dict[str, tuple[float, ...]] = {
    "estate": (2, 2, 0, 1, 1, 0, 2, 1),
    "suburb": (0, 2, 0, 1, 1, 0, 2, 2),
    "centre": (3, 1, 3, 1, 1, 0, 0, 0),
    "works": (0, 1, 0, 2, 0, 0, 2, 2),
    "village": (0, 1, 0, 0, 0, 0, 3, 4),
    "mixed": (1, 1, 1, 1, 1, 0, 2, 1),
}


@dataclass(frozen=True)
class Block:
    """One block of the grid: its rectangle inside the kerbs, its use, whether it is surveyed."""

    name: str
    row: int
    column: int
    x0: float
    y0: float
    x1: float
    y1: float
    use: str
    surveyed: bool

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the rectangle."""
        return 0.5 * (self.x0 + self.x1), 0.5 * (self.y0 + self.y1)


@dataclass(frozen=True)
class Light:
    """Sun direction (unit, towards the sun), colours (linear), haze (1/m), camera look."""

    sun: FloatArray
    sun_colour: FloatArray
    sky_colour: FloatArray
    haze: float
    warmth: float
    contrast: float
    saturation: float


@dataclass
class Plan:
    """Everything that the ground texture and the placing of things need, in city metres."""

    seed: int
    style: str
    streets_x: FloatArray
    streets_y: FloatArray
    edges_x: FloatArray
    edges_y: FloatArray
    blocks: list[Block]
    relief: FloatArray
    light: Light
    dryness: float
    woods: float
    sidewalk: float
    heading: float
    warp: FloatArray
    base_kind: npt.NDArray[np.int64]
    shapes: dict[tuple[int, int], list[tuple[float, ...]]] = field(default_factory=dict)

    def height(self, x: npt.ArrayLike, y: npt.ArrayLike) -> FloatArray:
        """Ground height in metres: a few long waves."""
        x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        total = np.zeros(np.broadcast(x, y).shape)
        for kx, ky, phase, size in self.relief:
            total = total + size * np.sin(kx * x + ky * y + phase)
        return total

    def frame(self, x: float, y: float, angle: float) -> Frame:
        """A local frame standing on the ground at a place given in straight plan metres."""
        a, k, p, b, q, r = (float(w) for w in self.warp)
        bent_y = y + b * math.sin(q * x + r)
        bent_x = x + a * math.sin(k * bent_y + p)
        # Streets bend both ways; a thing standing there turns by the mean of the two.
        turn = 0.5 * (
            math.atan(b * q * math.cos(q * x + r)) - math.atan(a * k * math.cos(k * bent_y + p))
        )
        if abs(math.cos(angle)) > 0.92:
            turn = math.atan(b * q * math.cos(q * x + r))
        elif abs(math.sin(angle)) > 0.92:
            turn = -math.atan(a * k * math.cos(k * bent_y + p))
        return Frame(bent_x, bent_y, float(self.height(bent_x, bent_y)), angle + turn)

    def add_shape(self, block: Block, frame: Frame, half: tuple[float, float], kind: int) -> None:
        """Put a ground shape (oriented rectangle, or ellipse for ponds) over the earlier ones.

        Its row: x, y, u axis (x, y), half width and height, kind, seed, squared reach.
        """
        shapes = self.shapes.setdefault((block.row, block.column), [])
        seed = float(97 * len(shapes) + 7 * block.row + block.column + self.seed % 1000)
        c, s = math.cos(frame.angle), math.sin(frame.angle)
        reach = (1.3 * half[0] + 1.0) ** 2 + (1.3 * half[1] + 1.0) ** 2
        shapes.append((frame.x, frame.y, c, s, *half, float(kind), seed, reach))

    def ground_arrays(self) -> tuple[npt.NDArray[np.generic], ...]:
        """The arguments of `ground.ground` after the sample's width."""
        rows, columns = self.base_kind.shape
        blocks = np.zeros((rows, columns, 3), dtype=np.int64)
        flat: list[tuple[float, ...]] = []
        for row in range(rows):
            for column in range(columns):
                own = self.shapes.get((row, column), [])
                blocks[row, column] = (self.base_kind[row, column], len(flat), len(flat) + len(own))
                flat += own
        shapes = np.array(flat, dtype=np.float64).reshape(-1, 9)
        style = np.array([self.dryness, self.woods, self.sidewalk, *self.warp])
        streets = (self.streets_x, self.streets_y)
        return (*streets, blocks, self.edges_x, self.edges_y, shapes, style)

    def kind_at(self, x: float, y: float) -> int:
        """Ground kind at a point, as the texture will show it."""
        kind: int = g.ground(x, y, 0.1, *self.ground_arrays())[0]
        return kind


def make_plan(seed: int, rows: int, columns: int, style: str) -> Plan:
    """Lay out `rows` x `columns` surveyed blocks and one ring of unsurveyed ones around them."""
    rng = np.random.default_rng([seed, 1])
    streets_x, edges_x = _streets(rng, columns + 2, style)
    streets_y, edges_y = _streets(rng, rows + 2, style)
    sidewalk = float(rng.uniform(1.6, 3.0))
    blocks = _blocks(rng, style, streets_x, streets_y, rows, columns)
    base = np.full((rows + 2, columns + 2), g.GRASS, dtype=np.int64)
    return Plan(
        seed,
        style,
        streets_x,
        streets_y,
        edges_x,
        edges_y,
        blocks,
        _relief(rng),
        make_light(rng),
        dryness=float(rng.uniform(0.2, 0.75)),
        woods=float(rng.uniform(0.1, 0.35)),
        sidewalk=sidewalk,
        heading=float(rng.uniform(0, 2 * np.pi)),
        warp=_warp(rng),
        base_kind=base,
    )


def _streets(rng: Rng, blocks: int, style: str) -> tuple[FloatArray, FloatArray]:
    """(centre, half width) of `blocks` + 1 streets, and the same centres as block edges."""
    narrow = style in ("suburb", "village")
    chances = (0.6, 0.3, 0.1, 0.0, 0.0) if narrow else (0.2, 0.25, 0.25, 0.2, 0.1)
    halves = rng.choice([2.7, 3.3, 4.2, 5.5, 7.5], blocks + 1, p=chances)
    widths = rng.uniform(62.0, 100.0, blocks)
    centres = np.concatenate([[0.0], np.cumsum(widths)])
    centres -= 0.5 * centres[-1]
    return np.stack([centres, halves], 1), centres


def _blocks(
    rng: Rng, style: str, sx: FloatArray, sy: FloatArray, rows: int, columns: int
) -> list[Block]:
    weights, outer = np.array(STYLES[style]), np.array(_OUTER[style])
    blocks = []
    for row in range(rows + 2):
        for column in range(columns + 2):
            surveyed = 0 < row <= rows and 0 < column <= columns
            chances = weights if surveyed else outer
            use = USES[int(rng.choice(len(USES), p=chances / chances.sum()))]
            number = (row - 1) * columns + column
            name = f"block_{number}" if surveyed else f"outer_{row}_{column}"
            x0, x1 = sx[column].sum(), sx[column + 1, 0] - sx[column + 1, 1]
            y0, y1 = sy[row].sum(), sy[row + 1, 0] - sy[row + 1, 1]
            blocks.append(Block(name, row, column, x0, y0, x1, y1, use, surveyed))
    return blocks


def _warp(rng: Rng) -> FloatArray:
    """How streets bend: amplitude (m), wave number (1/m) and phase, along y and then along x."""
    k = 2 * np.pi / rng.uniform(260.0, 420.0, 2)
    size, phase = rng.uniform(2.0, 11.0, 2), rng.uniform(0, 2 * np.pi, 2)
    return np.array([size[0], k[0], phase[0], size[1], k[1], phase[1]])


def _relief(rng: Rng) -> FloatArray:
    size = rng.uniform(0.0, 1.0) ** 2 * 2.2
    waves = []
    for _ in range(4):
        length, angle = rng.uniform(180.0, 500.0), rng.uniform(0, 2 * np.pi)
        k = 2 * np.pi / length
        waves.append((k * np.cos(angle), k * np.sin(angle), rng.uniform(0, 6), size))
    return np.array(waves)


def make_light(rng: Rng) -> Light:
    """Anything from a clear day to thin cloud, the sun 28 to 65 degrees up."""
    azimuth, up = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(28.0, 65.0))
    sun = np.array([np.cos(up) * np.cos(azimuth), np.cos(up) * np.sin(azimuth), np.sin(up)])
    clear = rng.uniform(0.4, 1.0)
    direct, diffuse = 3.1 * clear, 1.25 - 0.65 * clear
    # The camera's exposure makes up for most of a low sun or thin cloud.
    gain = rng.uniform(1.9, 2.4) / (direct * np.sin(up) + diffuse)
    return Light(
        sun,
        sun_colour=gain * direct * np.array([1.0, 0.95, 0.86]),
        sky_colour=gain * diffuse * np.array([0.86, 0.96, 1.12]),
        haze=float(rng.uniform(1 / 8000.0, 1 / 2200.0)),
        warmth=float(rng.uniform(-1, 1)),
        contrast=float(rng.uniform(1.0, 1.22)),
        saturation=float(rng.uniform(0.78, 1.08)),
    )
