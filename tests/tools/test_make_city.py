"""The generated city: determinism, exact poses and depth, both layouts, resuming, errors."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from mclnf_edge.captures.matrixcity import open_matrixcity
from mclnf_edge.captures.transforms import open_transforms
from mclnf_edge.errors import ConfigError
from mclnf_edge.types import Camera, Frame

pytest.importorskip("numba")
if importlib.util.find_spec("embreex") is None and importlib.util.find_spec("warp") is None:
    pytest.skip("neither embreex nor warp-lang is installed", allow_module_level=True)

from meta_trainer.city import flights, ground  # noqa: E402
from meta_trainer.city import mesh as city_mesh  # noqa: E402
from meta_trainer.city.caster import EmbreeCaster, WarpCaster, make_caster  # noqa: E402
from meta_trainer.city.noise import fractal  # noqa: E402
from meta_trainer.city.plan import make_plan  # noqa: E402
from meta_trainer.city.render import City, build_city, depth_map, picture  # noqa: E402
from meta_trainer.city.write import (  # noqa: E402
    DEPTH_UNIT_M,
    Request,
    check,
    exposures,
    generate,
    grid,
    meta_split,
)

CAMERA = Camera(96, 54, 78.0, 78.0, 48.0, 27.0)
FLIGHT = Request(
    blocks=1, seed=5, width=64, height=36, flight=8, style="suburb", altitude_m=70, pattern="mixed"
)


@pytest.fixture(scope="module")
def city() -> City:
    return build_city(make_plan(3, 1, 1, "estate"), ground_z=-40.0)


@pytest.fixture(scope="module")
def flight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("city") / "flight", FLIGHT)


@pytest.fixture(scope="module")
def command() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "tools" / "make_city.py"
    spec = importlib.util.spec_from_file_location("make_city", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def far_depth(frame: Frame) -> float:
    """The 90th percentile of a frame's z-depth in metres: the ground, when it looks down."""
    assert frame.depth is not None
    units = cv2.imdecode(np.frombuffer(frame.depth, np.uint8), cv2.IMREAD_UNCHANGED)
    assert units is not None
    return float(np.percentile(units.astype(np.float64), 90)) * frame.depth_scale_m


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_gives_the_same_bytes_and_another_seed_others(
    flight: Path, tmp_path: Path
) -> None:
    again = digests(generate(tmp_path / "again", FLIGHT))
    assert again == digests(flight)
    other = Request(**{**FLIGHT.__dict__, "seed": 6, "flight": 1})
    assert (
        digests(generate(tmp_path / "other", other))["images/0000.jpg"] != again["images/0000.jpg"]
    )


def test_flight_opens_as_a_capture_with_split_times_and_depth(flight: Path) -> None:
    frames = list(open_transforms(flight / "transforms.json").frames)
    written = json.loads((flight / "transforms.json").read_text())["frames"]
    assert [f.split for f in frames] == ["train"] * 7 + ["test"]
    assert all(b.timestamp > a.timestamp for a, b in zip(frames, frames[1:], strict=False))
    assert np.allclose(frames[3].T_world_camera, written[3]["transform_matrix"])
    assert frames[0].depth is not None
    assert frames[0].depth_scale_m == DEPTH_UNIT_M
    assert abs(far_depth(frames[0]) - 70.0) < 12.0


def test_stopped_run_goes_on_and_keeps_what_is_finished(flight: Path) -> None:
    before = digests(flight)
    kept = (flight / "images/0000.jpg").stat().st_mtime_ns
    (flight / "images/0002.jpg").unlink()
    (flight / "transforms.json").unlink()
    seen: list[int] = []
    generate(flight, FLIGHT, lambda done, total, name: seen.append(done))
    assert digests(flight) == before
    assert (flight / "images/0000.jpg").stat().st_mtime_ns == kept
    assert seen == list(range(1, 9))


def test_folder_of_another_city_is_refused(flight: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another city"):
        generate(flight, Request(**{**FLIGHT.__dict__, "seed": 9}))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="empty folder"):
        generate(tmp_path, FLIGHT)


def test_depth_and_poses_agree_between_two_views(city: City) -> None:
    """A pixel's point, seen from elsewhere, lies at the depth rendered there (or is hidden)."""
    poses = []
    for x, pitch in ((0.0, -1.5), (12.0, -1.1)):
        T = flights.look(np.array([x, -15.0, 90.0]), pitch, 1.4)
        poses.append(city.T_world_city @ T)
    first, second = (depth_map(city, CAMERA, T) for T in poses)
    j, i = np.mgrid[0 : CAMERA.height, 0 : CAMERA.width]
    rays = np.stack(
        [(i + 0.5 - CAMERA.cx) / CAMERA.fx, -(j + 0.5 - CAMERA.cy) / CAMERA.fy, -np.ones(i.shape)],
        -1,
    )
    points = (rays * first[..., None]) @ poses[0][:3, :3].T + poses[0][:3, 3]
    local = (points - poses[1][:3, 3]) @ poses[1][:3, :3]
    z = -local[..., 2]
    u = np.floor(CAMERA.fx * local[..., 0] / z + CAMERA.cx).astype(int)
    v = np.floor(-CAMERA.fy * local[..., 1] / z + CAMERA.cy).astype(int)
    inside = (u >= 0) & (u < CAMERA.width) & (v >= 0) & (v < CAMERA.height)
    error = np.abs(second[v[inside], u[inside]] - z[inside])
    assert inside.mean() > 0.3
    assert np.median(error) < 0.35  # half a pixel of sloping view, not a wrong pose
    assert points[..., 2].min() > -40.0 - 12.0


def test_depth_is_z_depth_to_the_ground(city: City) -> None:
    x, y = city.plan.streets_x[1, 0], city.plan.streets_y[1, 0]
    stand = city.plan.frame(float(x), float(y), 0.0)
    T = city.T_world_city @ flights.look(
        np.array([stand.x, stand.y, stand.z + 50.0]), -np.pi / 2, 0.0
    )
    depth = depth_map(city, CAMERA, T)
    assert abs(depth[27, 48] - 50.0) < 0.5
    up = city.T_world_city @ flights.look(np.array([0.0, 0.0, 200.0]), np.pi / 2, 0.0)
    assert np.isinf(depth_map(city, CAMERA, up)).all()


def test_pictures_have_contrast_shadow_and_follow_exposure(city: City) -> None:
    T = city.T_world_city @ flights.look(np.array([0.0, 0.0, 110.0]), -1.4, 0.3)
    plain = picture(city, CAMERA, T)
    assert plain.shape == (54, 96, 3)
    assert plain.std() > 20.0
    assert picture(city, CAMERA, T, gain=0.5).mean() < 0.85 * plain.mean()


def test_matrixcity_blocks_open_in_metres_with_depth(tmp_path: Path) -> None:
    pytest.importorskip("OpenEXR")
    request = Request(
        blocks=1,
        seed=2,
        frames_per_block=8,
        width=48,
        height=27,
        altitude_m=80,
        pattern="nadir",
    )
    out = generate(tmp_path / "city", request)
    content = json.loads((out / "city.json").read_text())
    assert content["meta_train"] == [p.name for p in (out / "pose").iterdir()]
    capture = open_matrixcity(out / "pose" / "block_1")
    frames = list(capture.frames)
    assert sorted(f.split for f in frames) == ["test"] + ["train"] * 7
    plan = make_plan(2, 1, 1, "mixed")
    T_world_city = build_city(plan).T_world_city
    spot = np.linalg.inv(T_world_city) @ frames[0].T_world_camera[:, 3]
    above = spot[2] - float(plan.height(spot[0], spot[1]))
    assert 70.0 < above < 90.0
    assert frames[0].depth is not None
    assert abs(far_depth(frames[0]) - above) < 15.0


def test_street_cameras_stand_on_streets() -> None:
    plan = make_plan(4, 1, 2, "centre")
    block = next(b for b in plan.blocks if b.surveyed)
    shots = flights.street_walk(plan, block, 24, np.random.default_rng(0))
    assert all(plan.kind_at(s.T[0, 3], s.T[1, 3]) == ground.STREET for s in shots)
    assert all(abs(s.T[2, 3] - plan.height(s.T[0, 3], s.T[1, 3]) - 2.6) < 1e-6 for s in shots)


def test_long_flight_visits_every_block_again_and_changes_altitude() -> None:
    plan = make_plan(0, 3, 4, "mixed")
    shots = flights.long_flight(plan, 1000, 100.0, np.random.default_rng(1))
    assert len(shots) == 1000
    assert len({s.block for s in shots[:800]}) == 12
    assert {s.block for s in shots[800:]} <= {s.block for s in shots[:800]}
    heights = [s.height for s in shots[:800]]
    assert max(heights) / min(heights) > 2.0
    assert all(b.time > a.time for a, b in zip(shots, shots[1:], strict=False))


def test_poses_are_rigid_and_look_where_told() -> None:
    T = flights.look(np.array([1.0, 2.0, 3.0]), -np.pi / 4, 0.0, roll=0.2)
    assert np.allclose(T[:3, :3] @ T[:3, :3].T, np.eye(3))
    assert np.isclose(np.linalg.det(T[:3, :3]), 1.0)
    assert np.allclose(-T[:3, 2], [np.sqrt(0.5), 0.0, -np.sqrt(0.5)])


@pytest.mark.parametrize("count", [1, 4, 12])
def test_split_is_seventy_thirty_and_complete(count: int) -> None:
    names = [f"block_{k}" for k in range(count)]
    train, test = meta_split(names, 3)
    assert sorted(train + test) == sorted(names)
    assert len(train) == max(1, round(0.7 * count))
    rows, columns = grid(count)
    assert rows * columns == count


def test_exposure_drift_wanders_and_returns() -> None:
    rng = np.random.default_rng(2)
    stops = np.log2(exposures(2000, 0.5, rng))
    assert abs(stops.mean()) < 0.15
    assert 0.4 < stops.std() < 0.6
    assert exposures(3, 0.0, rng) == [1.0, 1.0, 1.0]


def test_texture_detail_finer_than_a_sample_fades() -> None:
    x = np.linspace(0.0, 40.0, 400)
    fine = np.array([fractal(v, 0.3 * v, 7, 2.0, 5, 0.01) for v in x])
    coarse = np.array([fractal(v, 0.3 * v, 7, 2.0, 5, 4.0) for v in x])
    assert np.abs(fine).max() < 2.0
    assert fine.std() > 0.1
    assert np.abs(coarse).max() == 0.0


def scene() -> tuple[np.ndarray, np.ndarray]:
    mesh = city_mesh.Builder()
    city_mesh.box(
        mesh, city_mesh.Frame(0, 0, 0, 0.3), (2.0, 3.0), (0.0, 5.0), 4, 4, 1, (0.5, 0.5, 0.5)
    )
    built = mesh.build()
    return built.vertices, built.faces


def test_caster_finds_the_lid_and_nothing_beside_it() -> None:
    vertices, faces = scene()
    caster = make_caster(vertices, faces)
    origins = np.array([[0, 0, 20], [9, 0, 20]], dtype=np.float32)
    down = np.array([[0, 0, -1], [0, 0, -1]], dtype=np.float32)
    hits = caster.first(origins, down)
    assert (vertices[faces[hits[0]]][:, 2] == 5.0).all()
    assert hits[1] == -1
    assert caster.blocked(origins, down).tolist() == [True, False]


def test_both_casters_agree() -> None:
    pytest.importorskip("warp")
    pytest.importorskip("embreex")
    vertices, faces = scene()
    rng = np.random.default_rng(0)
    origins = (rng.normal(size=(500, 3)) * 10).astype(np.float32)
    towards = (rng.normal(size=(500, 3)) - 0.1 * origins).astype(np.float32)
    points, corners = vertices.astype(np.float32), faces.astype(np.int32)
    one, two = EmbreeCaster(points, corners), WarpCaster(points, corners)
    assert (one.first(origins, towards) == two.first(origins, towards)).mean() > 0.99
    assert (one.blocked(origins, towards) == two.blocked(origins, towards)).all()


@pytest.mark.parametrize(
    "change",
    [{"blocks": 0}, {"seed": -1}, {"width": 8}, {"style": "baroque"}, {"pattern": "spiral"}],
)
def test_wrong_values_are_named(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        check(Request(**{**FLIGHT.__dict__, **change}))


def test_command_reports_mistakes_and_writes(command: ModuleType, tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(command.main)
    for arguments, words in (
        (["--size", "big"], "WIDTHxHEIGHT"),
        (["--style", "baroque"], "style"),
        (["--preset", "paris"], "--preset"),
    ):
        failed = CliRunner().invoke(app, [str(tmp_path / "x"), *arguments])
        assert failed.exit_code == 2
        assert words in failed.output
    small = ["--blocks", "1", "--flight", "2", "--size", "32x18", "--no-depth"]
    done = CliRunner().invoke(app, [str(tmp_path / "y"), *small])
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "y" / "images").iterdir())) == 2
    assert json.loads((tmp_path / "y" / "city.json").read_text())["request"]["flight"] == 2
