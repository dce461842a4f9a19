"""Fills the blocks of a plan: each use puts buildings, yards, paths, trees and cars in its way."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from meta_trainer.city import ground as g
from meta_trainer.city.buildings import Dress, Rng, flat_building, pitched_building
from meta_trainer.city.mesh import Builder, Frame
from meta_trainer.city.plan import Block, Plan
from meta_trainer.city.props import car, container, hedge, tree

_GREEN = (g.GRASS, g.MEADOW, g.SOIL, g.FOREST_FLOOR)
_TREES = {
    "slabs": 80,
    "houses": 75,
    "downtown": 26,
    "works": 24,
    "park": 120,
    "school": 60,
    "forest": 420,
    "fields": 14,
}


class Site:
    """A city under construction: the plan, the mesh so far, and a 1 m map of built heights."""

    def __init__(self, plan: Plan) -> None:
        """Start with nothing built."""
        self.plan = plan
        self.mesh = Builder()
        margin = 20.0
        self.low = np.array([plan.edges_x[0] - margin, plan.edges_y[0] - margin])
        high = np.array([plan.edges_x[-1] + margin, plan.edges_y[-1] + margin])
        self.heights = np.zeros(tuple(np.ceil(high - self.low).astype(int)[::-1]))
        self._args = plan.ground_arrays()

    def refresh(self) -> None:
        """Take note of the ground shapes added so far."""
        self._args = self.plan.ground_arrays()

    def kind(self, x: float, y: float) -> int:
        """Ground kind at a point."""
        kind: int = g.ground(x, y, 0.1, *self._args)[0]
        return kind

    def cells(
        self, frame: Frame, half: tuple[float, float]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Map cells (rows, columns) that an oriented rectangle covers."""
        step = 0.6
        u = np.arange(-half[0], half[0] + step, step)
        v = np.arange(-half[1], half[1] + step, step)
        uu, vv = (a.ravel() for a in np.meshgrid(u, v))
        c, s = math.cos(frame.angle), math.sin(frame.angle)
        x = frame.x + c * uu - s * vv - self.low[0]
        y = frame.y + s * uu + c * vv - self.low[1]
        rows = np.clip(y.astype(np.int64), 0, self.heights.shape[0] - 1)
        return rows, np.clip(x.astype(np.int64), 0, self.heights.shape[1] - 1)

    def free(self, frame: Frame, half: tuple[float, float]) -> bool:
        """Whether nothing is built on an oriented rectangle."""
        return bool((self.heights[self.cells(frame, half)] == 0.0).all())

    def mark(self, frame: Frame, half: tuple[float, float], height: float) -> None:
        """Record that something this high stands there."""
        cells = self.cells(frame, half)
        self.heights[cells] = np.maximum(self.heights[cells], height)

    def build(
        self,
        frame: Frame,
        half: tuple[float, float],
        height: float,
        rng: Rng,
        dress: Dress,
        flat: bool,
    ) -> None:
        """Put up one building and mark it."""
        make = flat_building if flat else pitched_building
        make(self.mesh, frame, half, height, rng, dress)
        self.mark(frame, half, height)


def fill(plan: Plan) -> Site:
    """Build every block, street cars and street trees; the ground mesh comes last."""
    site = Site(plan)
    rngs = {b: np.random.default_rng([plan.seed, 2, b.row, b.column]) for b in plan.blocks}
    for block in plan.blocks:
        _USES[block.use](site, block, rngs[block])
    site.refresh()
    for block in plan.blocks:
        _plant(site, block, rngs[block])
        _street_side(site, block, rngs[block])
    add_ground(site)
    return site


def _spot(
    site: Site, block: Block, half: tuple[float, float], angle: float, gap: float, rng: Rng
) -> Frame | None:
    """A free place inside the block for an oriented rectangle, or None after some tries."""
    c, s = abs(math.cos(angle)), abs(math.sin(angle))
    mx = c * half[0] + s * half[1] + 4.0
    my = s * half[0] + c * half[1] + 4.0
    if 2 * mx > block.x1 - block.x0 or 2 * my > block.y1 - block.y0:
        return None
    for _ in range(25):
        x, y = rng.uniform(block.x0 + mx, block.x1 - mx), rng.uniform(block.y0 + my, block.y1 - my)
        frame = site.plan.frame(x, y, angle)
        if site.free(frame, (half[0] + gap, half[1] + gap)):
            return frame
    return None


def _base(site: Site, block: Block, kind: int) -> None:
    site.plan.base_kind[block.row, block.column] = kind


def _paths(site: Site, block: Block, rng: Rng, count: int, kinds: tuple[int, ...]) -> None:
    """Footpaths across the block as chains of short pieces that bend."""
    for _ in range(count):
        cx, cy = block.centre
        angle = rng.uniform(0, 2 * np.pi)
        reach = 0.5 * max(block.x1 - block.x0, block.y1 - block.y0) * 1.3
        x = cx + rng.normal(0, 10) - reach * math.cos(angle)
        y = cy + rng.normal(0, 10) - reach * math.sin(angle)
        kind, width, bend = int(rng.choice(kinds)), rng.uniform(0.7, 1.6), rng.normal(0, 0.05)
        for _ in range(int(2 * reach / 5.0)):
            frame = site.plan.frame(x, y, angle)
            site.plan.add_shape(block, frame, (3.1, width), kind)
            x, y = x + 5.0 * math.cos(angle), y + 5.0 * math.sin(angle)
            angle += bend


def _car_park(site: Site, block: Block, rng: Rng, angle: float, half: tuple[float, float]) -> None:
    frame = _spot(site, block, half, angle, 2.0, rng)
    if frame is None:
        return
    site.plan.add_shape(block, frame, half, g.PARKING)
    site.mark(frame, half, 0.01)
    full = rng.uniform(0.25, 0.85)
    for side in (-1.0, 1.0):
        for u in np.arange(-half[0] + 1.25, half[0] - 1.0, 2.5):
            if rng.random() < full:
                turn = math.pi / 2 * (1 if rng.random() < 0.5 else -1) + rng.normal(0, 0.03)
                car(site.mesh, frame.child(u, side * (half[1] - 2.6), 0.0, turn), rng)


def _slabs(site: Site, block: Block, rng: Rng) -> None:
    _paths(site, block, rng, 2, (g.PAVING, g.ASPHALT, g.GRAVEL))
    angle = float(rng.choice([0.0, math.pi / 2])) + float(rng.choice([0.0, 0.0, 0.35, -0.3]))
    dress = Dress(rng)
    for _ in range(int(rng.integers(2, 5))):
        turn = angle + (math.pi / 2 if rng.random() < 0.25 else 0.0)
        half = (float(rng.uniform(11, 27)), float(rng.uniform(5.2, 7.0)))
        frame = _spot(site, block, half, turn, 6.0, rng)
        if frame is None:
            continue
        height = 3.0 * float(rng.integers(4, 12)) + 0.8
        site.build(frame, half, height, rng, dress, True)
        site.plan.add_shape(block, frame.child(0, half[1] + 4.5), (half[0] + 3, 1.3), g.PAVING)
        if rng.random() < 0.4 and half[0] < 20:
            wing = frame.child(half[0] - half[1], half[1] + 8.0, 0.0, math.pi / 2)
            if site.free(wing, (7.5, half[1])) and abs(turn - angle) < 0.1:
                site.build(wing, (8.0, half[1]), height, rng, dress, True)
    _car_park(site, block, rng, angle, (float(rng.uniform(10, 22)), 8.2))
    if rng.random() < 0.6:
        yard = _spot(site, block, (6.0, 5.0), angle, 1.0, rng)
        if yard is not None:
            site.plan.add_shape(block, yard, (6.0, 5.0), int(rng.choice([g.TARTAN, g.GRAVEL])))


def _houses(site: Site, block: Block, rng: Rng) -> None:
    depth = 0.5 * (block.y1 - block.y0)
    lots = max(2, int((block.x1 - block.x0) / rng.uniform(16, 24)))
    width = (block.x1 - block.x0) / lots
    for side in (-1.0, 1.0):
        front = block.y0 if side < 0 else block.y1
        for k in range(lots):
            x = block.x0 + (k + 0.5) * width
            _house(site, block, rng, x, front, -side, width, depth)


def _house(
    site: Site,
    block: Block,
    rng: Rng,
    x: float,
    front: float,
    inward: float,
    width: float,
    depth: float,
) -> None:
    """One lot: house, driveway, perhaps shed, terrace and hedge at its border."""
    plan = site.plan
    half = (float(rng.uniform(4.2, 6.2)), float(rng.uniform(3.6, 5.0)))
    turn = float(rng.choice([0.0, math.pi / 2])) + float(rng.normal(0, 0.03))
    y = front + inward * (max(half) + rng.uniform(5.0, 9.0))
    house = plan.frame(x + float(rng.uniform(-1, 1)), y, turn)
    side = 1.0 if rng.random() < 0.5 else -1.0
    kind = int(rng.choice([g.PAVING, g.CONCRETE, g.GRAVEL, g.ASPHALT]))
    reach = abs(y - front)
    drive = plan.frame(x + side * (0.5 * width - 2.4), front + 0.5 * inward * reach, math.pi / 2)
    plan.add_shape(block, drive, (0.5 * reach + 0.5, 1.6), kind)
    plan.add_shape(
        block,
        house.child(0, 0),
        (half[0] + 1.1, half[1] + 1.1),
        int(rng.choice([g.PAVING, g.GRASS, g.GRAVEL])),
    )
    if rng.random() < 0.92:
        site.build(
            house,
            half,
            float(rng.uniform(3.0, 6.4)),
            rng,
            Dress(rng, pitched=rng.random() < 0.85),
            False,
        )
    if rng.random() < 0.6:
        car(site.mesh, drive.child(float(rng.uniform(-1, 1)), 0.0), rng)
    back = front + inward * (depth - 4.5)
    if rng.random() < 0.55:
        shed = plan.frame(
            x + float(rng.uniform(-0.25, 0.25)) * width, back, float(rng.uniform(-0.1, 0.1))
        )
        dress = Dress(rng, sheet=rng.random() < 0.5)
        if site.free(shed, (2.6, 2.0)):
            site.build(
                shed, (float(rng.uniform(1.5, 2.6)), 1.6), 2.4, rng, dress, dress.wall_kind == 1
            )
    if rng.random() < 0.4:
        bed = plan.frame(x + float(rng.uniform(-3, 3)), back - inward * 6.0, 0.0)
        plan.add_shape(block, bed, (3.0, 1.8), int(rng.choice([g.SOIL, g.CROP])))
    if rng.random() < 0.7:
        middle = plan.frame(x + 0.5 * width, front + 0.5 * inward * depth, math.pi / 2)
        if site.free(middle, (0.42 * depth, 0.4)):
            hedge(site.mesh, middle, 0.84 * depth - 2.0, float(rng.uniform(1.0, 2.0)), rng)


def _downtown(site: Site, block: Block, rng: Rng) -> None:
    """A closed rim of houses of different heights round a courtyard."""
    _base(site, block, int(rng.choice([g.CONCRETE, g.ASPHALT, g.PAVING, g.GRASS])))
    inset = site.plan.sidewalk + 0.3
    deep = float(rng.uniform(5.2, 6.8))
    x0, x1, y0, y1 = block.x0 + inset, block.x1 - inset, block.y0 + inset, block.y1 - inset
    sides = ((x0, x1, y0 + deep), (x0, x1, y1 - deep))
    flanks = ((y0 + 2 * deep, y1 - 2 * deep, x0 + deep), (y0 + 2 * deep, y1 - 2 * deep, x1 - deep))
    for a, b, y in sides:
        _row(site, rng, (a, b), y, 0, deep)
    for a, b, x in flanks:
        _row(site, rng, (a, b), x, 1, deep)
    _car_park(site, block, rng, 0.0, (8.0, 7.5))
    for _ in range(3):
        half = (float(rng.uniform(3, 6)), float(rng.uniform(2, 4)))
        frame = _spot(site, block, half, 0.0, 2.0, rng)
        if frame is not None:
            site.build(frame, half, float(rng.uniform(2.6, 7)), rng, Dress(rng), True)
    lawn = _spot(site, block, (6.0, 5.0), 0.0, 0.5, rng)
    if lawn is not None:
        site.plan.add_shape(block, lawn, (7.0, 6.0), g.GRASS)


def _row(
    site: Site, rng: Rng, span: tuple[float, float], line: float, axis: int, deep: float
) -> None:
    """Adjoining houses over `span` along `axis`, centred on `line`, with the odd gap."""
    t, b = span
    while b - t > 9.0:
        length = min(float(rng.uniform(11, 24)), b - t)
        if b - t - length < 9.0:
            length = b - t
        middle = t + 0.5 * length
        x, y = (line, middle) if axis else (middle, line)
        flat = rng.random() < 0.4
        height = 3.0 * float(rng.integers(3, 7)) + 0.8
        if rng.random() > 0.06:
            frame = site.plan.frame(x, y, 0.5 * math.pi * axis)
            dress = Dress(rng, pitched=not flat)
            site.build(frame, (0.5 * length, deep), height, rng, dress, flat)
        t += length


def _works(site: Site, block: Block, rng: Rng) -> None:
    _base(site, block, int(rng.choice([g.CONCRETE, g.ASPHALT, g.SOIL, g.GRAVEL])))
    angle = float(rng.choice([0.0, math.pi / 2]))
    for _ in range(int(rng.integers(1, 5))):
        half = (float(rng.uniform(9, 25)), float(rng.uniform(6, 15)))
        frame = _spot(site, block, half, angle, 4.0, rng)
        if frame is not None:
            flat = rng.random() < 0.35
            site.build(
                frame, half, float(rng.uniform(4.5, 11)), rng, Dress(rng, sheet=not flat), flat
            )
    _car_park(site, block, rng, angle, (float(rng.uniform(10, 20)), 8.0))
    for _ in range(int(rng.integers(3, 16))):
        frame = _spot(site, block, (3.0, 1.2), angle + float(rng.normal(0, 0.1)), 0.3, rng)
        if frame is not None:
            container(site.mesh, frame, rng)
            site.mark(frame, (3.0, 1.2), 2.6)
    for _ in range(3):
        frame = _spot(site, block, (7.0, 4.0), float(rng.uniform(0, 3)), 0.0, rng)
        if frame is not None:
            size = (float(rng.uniform(3, 8)), float(rng.uniform(2, 5)))
            site.plan.add_shape(block, frame, size, int(rng.choice([g.GRASS, g.SOIL, g.MEADOW])))


def _park(site: Site, block: Block, rng: Rng) -> None:
    if rng.random() < 0.5:
        pond = _spot(site, block, (11.0, 8.0), float(rng.uniform(0, 3)), 1.0, rng)
        if pond is not None:
            half = (float(rng.uniform(7, 13)), float(rng.uniform(5, 9)))
            site.plan.add_shape(block, pond, half, g.WATER)
            site.mark(pond, half, 0.01)
    _paths(site, block, rng, 4, (g.GRAVEL, g.PAVING, g.ASPHALT))
    for _ in range(2):
        patch = _spot(site, block, (8.0, 6.0), float(rng.uniform(0, 3)), 0.0, rng)
        if patch is not None:
            site.plan.add_shape(block, patch, (9.0, 6.0), g.MEADOW)


def _school(site: Site, block: Block, rng: Rng) -> None:
    _paths(site, block, rng, 1, (g.PAVING,))
    dress = Dress(rng)
    frame = _spot(site, block, (17.0, 6.5), 0.0, 3.0, rng)
    if frame is not None:
        height = 3.0 * float(rng.integers(2, 5)) + 0.8
        site.build(frame, (17.0, 6.0), height, rng, dress, True)
        wing = frame.child(-11.0, 14.0, 0.0, math.pi / 2)
        if site.free(wing, (7.5, 5.5)):
            site.build(wing, (8.0, 5.5), height, rng, dress, True)
    for half, kind in (((24.0, 15.0), g.PITCH), ((10.0, 6.0), g.TARTAN)):
        angle = 0.0 if block.x1 - block.x0 > block.y1 - block.y0 else math.pi / 2
        field = _spot(site, block, half, angle, 0.5, rng)
        if field is not None:
            site.plan.add_shape(block, field, half, kind)
            site.mark(field, half, 0.01)
    _car_park(site, block, rng, 0.0, (10.0, 8.0))


def _forest(site: Site, block: Block, rng: Rng) -> None:
    _base(site, block, g.FOREST_FLOOR)
    _paths(site, block, rng, 1, (g.SOIL, g.GRAVEL))


def _fields(site: Site, block: Block, rng: Rng) -> None:
    _base(site, block, int(rng.choice([g.CROP, g.CROP, g.MEADOW])))
    angle = float(rng.uniform(-0.3, 0.3))
    cx, cy = block.centre
    for k in range(int(rng.integers(1, 4))):
        frame = site.plan.frame(cx + float(rng.normal(0, 18)), cy, math.pi / 2 + angle)
        site.plan.add_shape(block, frame, (70.0, float(rng.uniform(8, 20))), g.CROP)
        if k == 0:
            site.plan.add_shape(block, frame, (70.0, 1.4), g.SOIL)


_USES = {
    "slabs": _slabs,
    "houses": _houses,
    "downtown": _downtown,
    "works": _works,
    "park": _park,
    "school": _school,
    "forest": _forest,
    "fields": _fields,
}


def _plant(site: Site, block: Block, rng: Rng) -> None:
    """Trees where the ground is green and nothing stands, in loose groups."""
    area = (block.x1 - block.x0) * (block.y1 - block.y0) / 6000.0
    count = int(_TREES[block.use] * area * rng.uniform(0.6, 1.4))
    groups = rng.uniform((block.x0, block.y0), (block.x1, block.y1), (max(2, count // 7), 2))
    for _ in range(count):
        if block.use == "forest" or rng.random() < 0.35:
            x, y = rng.uniform((block.x0, block.y0), (block.x1, block.y1))
        else:
            x, y = groups[int(rng.integers(len(groups)))] + rng.normal(0, 4.5, 2)
        small = 0.05 if block.use == "forest" else 0.35
        low, high = (0.6, 1.5) if rng.random() < small else (2.0, 5.4)
        _try_tree(site, float(x), float(y), float(rng.uniform(low, high)), rng)


def _try_tree(site: Site, x: float, y: float, radius: float, rng: Rng) -> None:
    frame = site.plan.frame(x, y, 0.0)
    clear = (0.42 if site.kind(frame.x, frame.y) == g.FOREST_FLOOR else 0.45) * radius
    if site.kind(frame.x, frame.y) in _GREEN and site.free(frame, (clear, clear)):
        tree(site.mesh, frame.x, frame.y, frame.z, radius, rng)
        site.mark(frame, (0.45 * radius, 0.45 * radius), 1.5 * radius)


def _street_side(site: Site, block: Block, rng: Rng) -> None:
    """Parked and driving cars on the streets left of and below the block; trees along them."""
    plan = site.plan
    rows = rng.random() < 0.5 and plan.style != "centre"
    for axis, centre, half, a, b in (
        (0, *plan.streets_y[block.row], block.x0, block.x1),
        (1, *plan.streets_x[block.column], block.y0, block.y1),
    ):
        parked = rng.uniform(0.0, 0.55)
        for t in np.arange(a + 10.0, b - 10.0, 5.6):
            for side in (-1.0, 1.0):
                lane = side * (half - 1.05 if rng.random() < 0.93 else 0.45 * half)
                if rng.random() < parked:
                    x, y = (t, centre + lane) if axis == 0 else (centre + lane, t)
                    turn = 0.5 * math.pi * axis + float(rng.normal(0, 0.02))
                    car(site.mesh, plan.frame(float(x), float(y), turn), rng)
        if rows:
            for t in np.arange(a + 4.0, b - 4.0, float(rng.uniform(7, 13))):
                off = half + plan.sidewalk + 1.1
                x, y = (t, centre + off) if axis == 0 else (centre + off, t)
                _try_tree(site, float(x), float(y), float(rng.uniform(1.4, 2.8)), rng)


def add_ground(site: Site) -> None:
    """The relief as a mesh: 8 m cells over the blocks, growing outwards to the horizon."""

    def lines(low: float, high: float) -> list[float]:
        inner = list(np.linspace(low, high, max(2, int((high - low) / 8.0))))
        far = [12.0 * 1.35**k for k in range(22)]
        return [low - f for f in reversed(far)] + inner + [high + f for f in far]

    x = np.array(lines(site.plan.edges_x[0], site.plan.edges_x[-1]))
    y = np.array(lines(site.plan.edges_y[0], site.plan.edges_y[-1]))
    xx, yy = np.meshgrid(x, y)
    zz = site.plan.height(xx, yy)
    vertices = np.stack([xx.ravel(), yy.ravel(), zz.ravel()], 1)
    n = len(x)
    cell = (np.arange(len(y) - 1)[:, None] * n + np.arange(n - 1)).reshape(-1, 1)
    faces = np.concatenate([cell + [0, 1, n + 1], cell + [0, n + 1, n]])
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    site.mesh.soup(vertices, faces.astype(np.int64), normals, 0, 0, (0.3, 0.3, 0.3))
