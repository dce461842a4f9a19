"""Writes cities to disk: MatrixCity blocks, or a flight as a nerfstudio `transforms.json`.

Every finished picture is kept when the command is run again, so a stopped run goes on. `city.json`
holds the whole request; a folder made with another request is refused.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import cv2
import numpy as np
import numpy.typing as npt

from mclnf_edge.errors import ConfigError
from mclnf_edge.types import Camera, Matrix4
from meta_trainer.city.flights import (
    Pattern,
    Shot,
    block_area,
    default_camera,
    long_flight,
    street_walk,
    survey,
    surveyed_area,
)
from meta_trainer.city.mesh import FloatArray
from meta_trainer.city.plan import STYLES, Plan, make_plan
from meta_trainer.city.render import City, build_city, depth_map, picture

VERSION: Final = 1
DEPTH_UNIT_M: Final = 0.01
"""Flight depth is 16-bit PNG in centimetres; 0 means farther than 655.35 m or no surface."""
_TEST_EVERY: Final = 8
_UNIT_100_M: Final = 0.01

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Request:
    """What is to be made; written to `city.json` as it is.

    `flight` 0 writes MatrixCity blocks, else a flight of so many frames. `altitude_m` 0 draws one
    from the seed. `exposure_drift` is the standard deviation, in stops, that brightness wanders.
    """

    blocks: int = 12
    seed: int = 0
    mode: Literal["aerial", "street"] = "aerial"
    frames_per_block: int = 60
    width: int = 480
    height: int = 270
    flight: int = 0
    style: str = "mixed"
    pattern: Pattern | Literal["long"] = "mixed"
    altitude_m: float = 0.0
    exposure_drift: float = 0.0
    depth: bool = True
    version: int = VERSION


DEMO: Final = Request(
    blocks=4, seed=7, flight=96, style="mixed", pattern="nadir", altitude_m=90.0, depth=False
)
"""The city of `make demo`: 96 frames over four blocks, without depth, as a drone flies."""


def _training(
    number: int, style: str, pattern: Pattern, altitude_m: float, drift: float = 0.0
) -> tuple[str, Request]:
    request = Request(
        blocks=9,
        seed=100 + number,
        flight=40,
        style=style,
        pattern=pattern,
        altitude_m=altitude_m,
        exposure_drift=drift,
    )
    return f"flight_{number:02d}_{style}", request


PRESETS: Final[dict[str, dict[str, Request]]] = {
    "demo": {"": DEMO},
    "train": dict(
        [
            _training(0, "estate", "mixed", 110.0),
            _training(1, "suburb", "nadir", 90.0),
            _training(2, "centre", "mixed", 140.0, 0.15),
            _training(3, "village", "nadir", 130.0),
            _training(4, "mixed", "oblique", 80.0),
            _training(5, "works", "mixed", 120.0, 0.15),
            _training(6, "estate", "oblique", 150.0),
            _training(7, "suburb", "mixed", 60.0),
            _training(8, "village", "mixed", 190.0, 0.15),
            _training(9, "mixed", "mixed", 100.0),
        ]
    ),
}
"""Named sets: a folder below OUT ("" for OUT itself) for each request."""


def generate(out: Path, request: Request, progress: Progress | None = None) -> Path:
    """Make the city of `request` under `out`; returns the folder. Raises ConfigError.

    `progress(done, total, name)` is called after every frame, also for those found finished.
    """
    check(request)
    out.mkdir(parents=True, exist_ok=True)
    plan = make_plan(request.seed, *grid(request.blocks), request.style)
    _claim(out, request, [b.name for b in plan.blocks if b.surveyed])
    tell = progress or (lambda done, total, name: None)
    if request.flight:
        _write_flight(out, request, plan, tell)
    else:
        _write_blocks(out, request, plan, tell)
    return out


def check(request: Request) -> None:
    """Refuse values that make no city; ConfigError says which."""
    bounds = {
        "blocks": (1, 400),
        "frames_per_block": (1, 10_000),
        "width": (16, 4096),
        "height": (16, 4096),
        "flight": (0, 100_000),
        "altitude_m": (0, 1000),
        "exposure_drift": (0, 3),
        "seed": (0, 2**31),
    }
    for name, (low, high) in bounds.items():
        value = getattr(request, name)
        if not low <= value <= high:
            raise ConfigError(f"{name}: expected {low} to {high}, received {value}")
    choices = {
        "style": tuple(STYLES),
        "mode": ("aerial", "street"),
        "pattern": ("nadir", "oblique", "mixed", "long"),
    }
    for name, allowed in choices.items():
        if getattr(request, name) not in allowed:
            raise ConfigError(
                f"{name}: expected one of {', '.join(allowed)}, received {getattr(request, name)!r}"
            )


def frame_count(request: Request) -> int:
    """How many frames `generate` will write."""
    return request.flight or request.blocks * request.frames_per_block


def grid(blocks: int) -> tuple[int, int]:
    """Rows and columns, as square as the number of blocks allows."""
    rows = max(r for r in range(1, math.isqrt(blocks) + 1) if blocks % r == 0)
    return rows, blocks // rows


def meta_split(names: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Blocks for meta-training (70 %, rounded) and meta-test, drawn by the seed."""
    order = np.random.default_rng([seed, 3]).permutation(len(names))
    cut = max(1, round(0.7 * len(names)))
    chosen = sorted(int(k) for k in order[:cut])
    return [names[k] for k in chosen], [n for k, n in enumerate(names) if k not in chosen]


def _claim(out: Path, request: Request, names: list[str]) -> None:
    """Write `city.json`, or see that the one there asks for the same."""
    rows, columns = grid(request.blocks)
    train, test = meta_split(names, request.seed)
    content = {
        "generator": "mclnf-edge city",
        "request": asdict(request),
        "rows": rows,
        "columns": columns,
        "meta_train": train,
        "meta_test": test,
    }
    file = out / "city.json"
    if file.is_file():
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise ConfigError(f"{file}: expected JSON ({error})") from None
        if found != content:
            raise ConfigError(f"{out}: holds another city (see {file}); choose an empty folder")
        return
    if any(out.iterdir()):
        raise ConfigError(f"{out}: expected an empty folder or an unfinished city")
    _write_json(file, content)


def _write_flight(out: Path, request: Request, plan: Plan, tell: Progress) -> None:
    rng = np.random.default_rng([request.seed, 4])
    shots = _flight_shots(request, plan, rng)
    ground_z = round(float(rng.uniform(-60.0, 60.0)), 2)
    gains = exposures(len(shots), request.exposure_drift, rng)
    camera = default_camera(request.width, request.height)
    city = build_city(plan, ground_z)
    frames = []
    for k, (shot, gain) in enumerate(zip(shots, gains, strict=True)):
        pose = city.T_world_city @ shot.T
        image, depth = f"images/{k:04d}.jpg", f"depth/{k:04d}.png"
        _frame(out / image, out / depth if request.depth else None, city, camera, pose, gain)
        entry: dict[str, Any] = {
            "file_path": image,
            "timestamp": shot.time,
            "split": "test" if k % _TEST_EVERY == _TEST_EVERY - 1 else "train",
            "height_m": round(shot.height, 3),
            "block": shot.block,
            "transform_matrix": pose.tolist(),
        }
        if request.depth:
            entry["depth_file_path"] = depth
        if request.exposure_drift > 0:
            entry["exposure"] = gain
        frames.append(entry)
        tell(k + 1, len(shots), image)
    head = {
        "camera_model": "PINHOLE",
        **_intrinsics(camera),
        "depth_unit_scale_factor": DEPTH_UNIT_M,
    }
    _write_json(out / "transforms.json", {**head, "frames": frames})


def _flight_shots(request: Request, plan: Plan, rng: np.random.Generator) -> list[Shot]:
    altitude = request.altitude_m or float(rng.uniform(70.0, 180.0))
    if request.pattern == "long":
        return long_flight(plan, request.flight, altitude, rng)
    area = surveyed_area(plan)
    # No farther apart than two thirds of a footprint, or pictures would not overlap.
    reach = 0.75 * altitude * math.sqrt(request.flight)
    middle, half = area.mean(axis=0), 0.5 * np.minimum(area[1] - area[0], 0.62 * reach)
    fitted = np.array([middle - half, middle + half])
    return survey(plan, fitted, request.flight, altitude, request.pattern, rng)


def exposures(count: int, drift: float, rng: np.random.Generator) -> list[float]:
    """Relative brightness of each picture: a wandering that returns, `drift` stops wide."""
    level, out = 0.0, []
    for step in rng.normal(size=count):
        level = 0.9 * level + math.sqrt(1 - 0.81) * drift * float(step)
        out.append(round(2.0**level, 5))
    return out


def _write_blocks(out: Path, request: Request, plan: Plan, tell: Progress) -> None:
    """MatrixCity's split form: `pose/<block>/transforms_*.json`, `{train,test}/<block>/NNNN.png`.

    Positions are in units of 100 m; depth is EXR, float32 z-depth in centimetres.
    """
    camera = default_camera(request.width, request.height)
    city = build_city(plan)
    own = [b for b in plan.blocks if b.surveyed]
    done = 0
    for block in own:
        rng = np.random.default_rng([request.seed, 5, block.row, block.column])
        if request.mode == "street":
            shots = street_walk(plan, block, request.frames_per_block, rng)
        else:
            altitude = request.altitude_m or float(rng.uniform(60.0, 140.0))
            area, count = block_area(block, 10.0), request.frames_per_block
            pattern: Pattern = "mixed" if request.pattern == "long" else request.pattern
            shots = survey(plan, area, count, altitude, pattern, rng)
        for split in ("train", "test"):
            chosen = [s for k, s in enumerate(shots) if (k % _TEST_EVERY == 7) == (split == "test")]
            frames = []
            for k, shot in enumerate(chosen):
                pose = city.T_world_city @ shot.T
                stem = f"{block.name}{'_test' if split == 'test' else ''}"
                image = out / split / stem / f"{k:04d}.png"
                depth = out / split / f"{stem}_depth" / f"{k:04d}.exr"
                _frame(image, depth if request.depth else None, city, camera, pose, 1.0)
                written = pose.copy()
                written[:3, 3] *= _UNIT_100_M
                path = f"../../{split}/{stem}/{k:04d}.png"
                frames.append({"file_path": path, "transform_matrix": written.tolist()})
                done += 1
                tell(done, len(own) * request.frames_per_block, path)
            angle = 2 * math.atan(0.5 * camera.width / camera.fx)
            content = {"camera_angle_x": angle, **_intrinsics(camera), "frames": frames}
            _write_json(out / "pose" / block.name / f"transforms_{split}.json", content)


def _intrinsics(camera: Camera) -> dict[str, float]:
    return {
        "w": camera.width,
        "h": camera.height,
        "fl_x": camera.fx,
        "fl_y": camera.fy,
        "cx": camera.cx,
        "cy": camera.cy,
    }


def _frame(
    image: Path, depth: Path | None, city: City, camera: Camera, pose: Matrix4, gain: float
) -> None:
    """Render what is missing of one frame."""
    if not image.is_file():
        rgb = picture(city, camera, pose, gain)
        options = [cv2.IMWRITE_JPEG_QUALITY, 95] if image.suffix == ".jpg" else []
        _write_bytes(image, _encoded(image.suffix, np.ascontiguousarray(rgb[:, :, ::-1]), options))
    if depth is not None and not depth.is_file():
        metres = depth_map(city, camera, pose)
        if depth.suffix == ".exr":
            write_exr(depth, metres)
        else:
            units = metres / DEPTH_UNIT_M
            far = np.where(units < 65535.5, units, 0.0)
            _write_bytes(depth, _encoded(".png", np.rint(far).astype(np.uint16), []))


def write_exr(path: Path, metres: FloatArray) -> None:
    """Z-depth as MatrixCity has it: EXR, channel Z, float32 centimetres, 65504 where unknown."""
    try:
        openexr = importlib.import_module("OpenEXR")
    except ImportError:
        raise ConfigError("EXR depth needs `pip install OpenEXR`, or leave depth out") from None
    values = np.where(np.isfinite(metres), metres * 100.0, 65504.0).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.exr")
    header = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage}
    openexr.File(header, {"Z": openexr.Channel(values)}).write(str(part))
    os.replace(part, path)


def _encoded(suffix: str, pixels: npt.NDArray[Any], options: list[int]) -> bytes:
    done, data = cv2.imencode(suffix, pixels, options)
    if not done:
        raise ConfigError(f"cannot encode {pixels.shape} {pixels.dtype} as {suffix}")
    return data.tobytes()


def _write_json(path: Path, content: Any) -> None:
    _write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def _write_bytes(path: Path, data: bytes) -> None:
    """Whole or not at all: a stopped run leaves no half picture behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)
