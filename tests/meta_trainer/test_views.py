"""View synthesis: rays against their definition, cells, held-out views, the commands end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from mclnf_edge.captures import open_capture
from mclnf_edge.errors import CaptureError, ConfigError
from mclnf_edge.maths import fisher
from mclnf_edge.maths.adaptation import Rule, State, Weighting, inner_step
from mclnf_edge.maths.fields import NerfMlp, Params, stack
from mclnf_edge.maths.radiance import UNITS
from meta_trainer import reproduce
from meta_trainer.config import TrainConfig, load_config
from meta_trainer.data import DATASETS, open_folder, open_items
from meta_trainer.episodes import Episode
from meta_trainer.evaluate import run_signal
from meta_trainer.meta_gradient import meta_gradient
from meta_trainer.methods import METHODS, Learning, predict
from meta_trainer.ray_field import RayField, ray_weights, rows_of
from meta_trainer.report import write_report
from meta_trainer.trainer import evaluate_init, load_init, train
from meta_trainer.views import View, cast_rays, find_bounds, view_episode

GROUND, HEIGHT, FOCAL, WIDE, HIGH = 12.0, 50.0, 150.0, 192, 108
MLP = NerfMlp(width=6, hidden=3, skip=1, octaves=2, direction_octaves=1)
FIELD = RayField(MLP, samples=3)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start() -> Params:
    return FIELD.init(gen(), torch.float64)


def rays(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    random = torch.rand(count, 9, generator=gen(seed), dtype=torch.float64)
    direction = torch.nn.functional.normalize(random[:, 3:6] - 0.5, dim=-1)
    near, far = 0.2 * random[:, 6:7], 0.3 + random[:, 7:8]
    coords = torch.cat([random[:, :3] - 0.5, direction, near, far, random[:, 8:]], dim=1)
    return coords, torch.rand(count, 3, generator=gen(seed + 1), dtype=torch.float64)


def texture(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colours 0..255 of the ground plane, the same in every test."""
    noise = np.random.default_rng(5).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    at = [np.asarray(v / 1.5 + 64, np.float32) for v in (x, y)]
    return np.asarray(cv2.remap(noise, *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP))


def fly(eyes: list[tuple[float, float]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(pose, picture RGB) of a camera that looks straight down on the textured plane."""
    shots = []
    for ex, ey in eyes:
        v, u = np.mgrid[:HIGH, :WIDE] + 0.5
        x = ex + (u - WIDE / 2) / FOCAL * HEIGHT
        y = ey - (v - HIGH / 2) / FOCAL * HEIGHT
        pose = np.eye(4)
        pose[:3, 3] = ex, ey, GROUND + HEIGHT
        shots.append((pose, texture(x, y)))
    return shots


EYES = [(14.0 * (k % 3), 9.0 * (k // 3)) for k in range(9)]


def write_flight(folder: Path, depth: bool = True) -> Path:
    """A transforms.json capture whose 4th and 8th pictures are held out."""
    (folder / "images").mkdir(parents=True)
    frames = []
    for k, (pose, picture) in enumerate(fly(EYES)):
        name = f"images/{k}.png"
        cv2.imwrite(str(folder / name), picture[..., ::-1])
        frame = {"file_path": name, "transform_matrix": pose.tolist(),
                 "split": "test" if k % 4 == 3 else "train"}  # fmt: skip
        if depth:
            frame["depth_file_path"] = f"{k}.png"
            cv2.imwrite(str(folder / f"{k}.png"), np.full((HIGH, WIDE), HEIGHT * 1000, np.uint16))
        frames.append(frame)
    head = {"fl_x": FOCAL, "fl_y": FOCAL, "cx": WIDE / 2, "cy": HIGH / 2, "w": WIDE, "h": HIGH}
    (folder / "transforms.json").write_text(json.dumps({**head, "frames": frames}))
    return folder


def write_matrixcity(root: Path, blocks: int = 6) -> Path:
    """MatrixCity's raw form below `root`/matrixcity, each block at another place."""
    aerial = root / "matrixcity" / "big_city" / "aerial"
    for block in range(1, blocks + 1):
        moved = [(x + 40 * block, y) for x, y in EYES]
        for part, name, eyes in (("train", "", moved[:8]), ("test", "_test", moved[8:])):
            folder = aerial / part / f"big_high_block_{block}{name}"
            folder.mkdir(parents=True)
            frames = []
            for k, (pose, picture) in enumerate(fly(eyes)):
                cv2.imwrite(str(folder / f"{k:04d}.png"), picture[..., ::-1])
                pose[:3, :3] /= 100
                frames.append({"frame_index": k, "rot_mat": pose.tolist()})
            angle = 2 * np.arctan(WIDE / 2 / FOCAL)
            facts = {"camera_angle_x": angle, "frames": frames}
            (folder / "transforms.json").write_text(json.dumps(facts))
    return root


@pytest.fixture(scope="module")
def flight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flight(tmp_path_factory.mktemp("flight") / "plain")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_matrixcity(tmp_path_factory.mktemp("data"))


def test_a_ray_is_the_quadrature_of_its_samples() -> None:
    coords, _ = rays(4)
    params, got = start(), FIELD(start(), coords)
    for ray, color in zip(coords, got, strict=True):
        near, far, shift = ray[6:].tolist()
        part, light, expected = (far - near) / 3, 1.0, torch.zeros(3, dtype=torch.float64)
        for k in range(3):
            point = ray[:3] + (near + part * (k + shift)) * ray[3:6]
            value = MLP(params, torch.cat([point, ray[3:6]])[None])[0]
            passed = np.exp(-value[3].item() * part * UNITS / 2) if k < 2 else 0.0
            expected += light * (1 - passed) * value[:3]
            light *= passed
        torch.testing.assert_close(color, expected)
    weights = ray_weights(torch.rand(5, 7, generator=gen()) * 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))
    assert rows_of(FIELD) == 3


def test_scores_of_rays_are_summed_over_samples_before_squaring() -> None:
    (coords, targets), params = rays(5), start()
    g = fisher.scores(FIELD, params, coords, targets)
    leaves = {k: p.requires_grad_() for k, p in params.items()}
    taps: list[fisher.Tap] = []
    values = FIELD(leaves, coords, taps)
    loss = fisher.half_squared_error(values, targets).sum()
    d = torch.autograd.grad(loss, [t.outputs for t in taps])
    moment = fisher.diagonal_moment(taps, d, FIELD.samples)
    flat = torch.cat([moment[name].flatten() for name in params])
    torch.testing.assert_close(flat, g.square().mean(0))
    q = fisher.diagonal_information(taps, d, moment, 0.1, FIELD.samples)
    ridge = flat + 0.1 * flat.mean()
    torch.testing.assert_close(q, (g.square() / ridge).sum(1))
    last = torch.cat([g[:, -21:]], dim=1)  # the colour layer's 6 x 3 weights and 3 biases
    score = fisher.gradncp_score_of_rays(taps[-1], d[-1], FIELD.samples)
    torch.testing.assert_close(score, last.norm(dim=1))


@pytest.mark.parametrize("weighting", ["none", "diagonal", "gradncp", "pruned"])
def test_a_step_on_rays_is_that_of_autograd(weighting: str) -> None:
    coords, targets = rays(6)
    modules = [FIELD.init(gen(k), torch.float64) for k in range(2)]
    batch = (coords.reshape(2, 3, 9), targets.reshape(2, 3, 3))
    rule = Rule(weighting, lam=2.0)  # type: ignore[arg-type]
    moved, _, stats = inner_step(FIELD, stack(modules), State(), batch, 0.1, rule, rows=3)
    for m, (params, x, s) in enumerate(zip(modules, *batch, strict=True)):
        leaves = {k: p.requires_grad_() for k, p in params.items()}
        errors = (FIELD(leaves, x) - s).square().sum(-1)
        (stats.weights[m] * errors).mean().backward()
        for name, p in leaves.items():
            torch.testing.assert_close(moved[name][m], (p - 0.1 * p.grad).detach())
    assert weighting == "none" or stats.weights.std() > 1e-4


def test_meta_gradient_through_rays_by_finite_differences() -> None:
    coords, values = rays(8)
    episode = Episode("r", coords.reshape(2, 4, 9), values.reshape(2, 4, 3),
                      torch.arange(8).reshape(2, 4), (2, 4, 3), 0.0, 1.0)  # fmt: skip
    method = replace(METHODS["Ours (mod)"], modules=2)  # type: ignore[type-var]
    how = Learning(FIELD, 0.3, rows=3)

    def loss(params: Params) -> float:
        (end,) = method.learn(params, episode, [2], how, gen(3))
        return (FIELD(end, episode.coords) - episode.values).square().sum(-1).mean().item()

    got = meta_gradient(method, start(), 0.3, episode, how, 2, 0, "second", gen(3))
    assert got.loss.item() == pytest.approx(loss(start()))
    for name in ("0.w", "3.b", "density.w", "rgb.b"):
        ends = []
        for eps in (1e-6, -1e-6):
            moved = start()
            moved[name].view(-1)[0] += eps
            ends.append(loss(moved))
        slope = (ends[0] - ends[1]) / 2e-6
        assert slope == pytest.approx(got.start[name].view(-1)[0].item(), rel=1e-3, abs=1e-7)


def test_bounds_from_depth_and_from_pictures_agree(flight: Path, tmp_path: Path) -> None:
    found = []
    for path in (flight, write_flight(tmp_path / "bare", depth=False)):
        capture = open_capture(path)
        found.append(find_bounds(capture, capture.split("train").frames))
    for bounds in found:
        assert bounds.ground == pytest.approx(GROUND, abs=0.3)
        assert GROUND - 3 < bounds.low < GROUND < bounds.high < GROUND + 3
        assert bounds.reach == pytest.approx(4 * HEIGHT, abs=2)


def test_rays_know_their_place_and_colour(flight: Path) -> None:
    capture = open_capture(flight)
    bounds = find_bounds(capture, capture.split("train").frames)
    camera = capture.frame(0).camera
    whole = np.ones((HIGH, WIDE), np.bool_)
    views = [View(rgb, whole, camera, pose) for pose, rgb in fly(EYES)]
    random = np.random.default_rng(0)
    pixels = np.stack([random.integers(0, n, 4000) for n in (9, HIGH, WIDE)], axis=1)
    known = cast_rays(views, pixels, bounds)
    assert len(known.foot) == 4000 and (known.near < known.far).all()
    expected = texture(*known.foot.T).reshape(-1, 3) / 255
    assert np.abs(expected - known.colors).mean() < 0.01


def test_tasks_are_cells_that_do_not_overlap(flight: Path) -> None:
    episode = view_episode(flight, WIDE, 500, 0, 4)
    count = episode.coords.shape[1]  # borders are quantiles, so that cells differ by a few rays
    assert 485 <= count <= 500 and episode.coords.shape == (4, count, 9)
    assert episode.values.shape == (4, count, 3)
    t = -episode.coords[..., 2:3] / episode.coords[..., 5:6]
    foot = (episode.coords[..., :3] + t * episode.coords[..., 3:6])[..., :2].numpy()
    inside = [(foot[k].min(0), foot[k].max(0)) for k in range(4)]
    for a in range(4):
        for b in range(a):
            assert (inside[a][0] > inside[b][1] - 0.01).any() or (
                inside[b][0] > inside[a][1] - 0.01
            ).any()


def test_held_out_views_are_whole_and_by_cell(flight: Path) -> None:
    episode = view_episode(flight, 48, 300, 0, 10)
    held = episode.measured
    assert held.shape == (2, 27, 48, 3) and held.mask.all() and held.tasks == 10
    first = fly([EYES[3]])[0][1]
    picture = cv2.resize(first, (48, 27), interpolation=cv2.INTER_AREA) / 255
    np.testing.assert_allclose(held.rebuild(held.values)[0], picture, atol=1e-6)
    sizes = [len(held.task_values(held.values, t)) for t in range(10)]
    assert sum(sizes) == 2 * 27 * 48 and len(set(sizes)) > 1
    assert episode.measured is not episode and held.measured is held


def test_every_method_learns_a_scene(flight: Path) -> None:
    episode = view_episode(flight, 48, 512, 1, 4)
    field = RayField(NerfMlp(16, 2, 1, octaves=4, direction_octaves=1), 4)
    for name in METHODS:
        how = Learning(field, 0.1, Rule("diagonal" if "MIM" in name else "none"), 64, 4)
        record = run_signal(METHODS[name], field.init(gen()), episode, "views", [1, 32], how, 0)
        assert record["curve"]["32"]["psnr"] > record["curve"]["1"]["psnr"] + 0.2, name
        assert set(record["curve"]["1"]) == {"psnr", "ssim"}


@pytest.mark.parametrize("weighting", ["none", "diagonal", "factored"])
def test_rays_stay_on_the_device_of_their_tensors(flight: Path, weighting: Weighting) -> None:
    """On the device without memory, where meeting a tensor of the CPU is an error."""
    field = RayField(NerfMlp(8, 7, 2), 3)
    how = Learning(field, 0.01, Rule(weighting, "adam"), 16, field.samples)
    first = {n: p.to("meta") for n, p in field.init(gen()).items()}
    episode = view_episode(flight, 32, 64, 1, 4).on("meta")
    for name in METHODS:
        (end,) = METHODS[name].learn(first, episode, [2], how, gen())
        assert {p.device.type for p in end.values()} == {"meta"}


def test_a_module_answers_in_its_own_cell_only(flight: Path) -> None:
    held = view_episode(flight, 48, 300, 1, 4).measured
    field = RayField(NerfMlp(8, 2, 1), 2)
    modules = stack([field.init(gen(k)) for k in range(4)])
    values = predict(Learning(field, rows=2), 4, modules, held)
    for k in range(4):
        alone = {n: p[k] for n, p in modules.items()}
        torch.testing.assert_close(values[k], field(alone, held.coords[k]))


def test_matrixcity_blocks_are_split_as_the_paper_does(root: Path, tmp_path: Path) -> None:
    names = {s: [i.path.name for i in open_items("matrixcity", s, root)]  # type: ignore[arg-type]
             for s in ("train", "val", "test")}  # fmt: skip
    assert names["test"] == ["big_high_block_5", "big_high_block_6"]
    assert names["val"] == ["big_high_block_4"] and len(names["train"]) == 3
    made = tmp_path / "matrixcity" / "pose"
    for name in ("block_1", "block_2", "block_10"):
        write_flight(made / name)
    facts = {"meta_train": ["block_2", "block_10"], "meta_test": ["block_1"]}
    (made.parent / "city.json").write_text(json.dumps(facts))
    (item,) = open_items("matrixcity", "test", tmp_path)
    assert item.name == "block_1"
    assert [i.name for i in open_items("matrixcity", "val", tmp_path)] == ["block_10"]
    assert [i.name for i in open_folder(made / "block_2", "drone")] == ["block_2"]
    assert len(open_folder(made, "drone")) == 3


def test_missing_or_useless_captures_are_named(flight: Path, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"nothing found .*matrixcity.* city-super\.github\.io"):
        reproduce.reproduce("table5", dataset="matrixcity", root=tmp_path, out=tmp_path / "o")
    with pytest.raises(CaptureError, match="expected views files for drone, found none"):
        reproduce.reproduce("table5", dataset="drone", folder=tmp_path, out=tmp_path / "o")
    bare = write_flight(tmp_path / "grey", depth=False)
    for picture in (bare / "images").glob("*.png"):
        cv2.imwrite(str(picture), np.full((HIGH, WIDE, 3), 90, np.uint8))
    with pytest.raises(CaptureError, match="height of the ground cannot be found: 0 points"):
        view_episode(bare, 32, 64, 1, 4)
    facts = json.loads((flight / "transforms.json").read_text())
    for frame in facts["frames"]:
        frame["split"] = "train"
        frame["file_path"] = str(flight / frame["file_path"])
        frame.pop("depth_file_path")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "transforms.json").write_text(json.dumps(facts))
    with pytest.raises(CaptureError, match="training and test pictures, received 9 and 0"):
        view_episode(tmp_path / "all", 32, 64, 1, 4)


def test_reproduce_on_matrixcity_end_to_end(root: Path, tmp_path: Path) -> None:
    first = reproduce.reproduce("table1", dataset="matrixcity", root=root, out=tmp_path)
    rows = first["rows"]
    assert [r["dataset"] for r in rows] == ["matrixcity-b5"] * 10 + ["matrixcity-b6"] * 10
    assert [r["method"] for r in rows] == [*METHODS] * 2
    by = {(r["dataset"], r["method"]): r for r in rows}
    assert by["matrixcity-b5", "Ours (MIM)"]["paper"]["best"] == 32.804
    assert by["matrixcity-b6", "ER"]["paper"]["best_step"] == 3984
    assert by["matrixcity-b5", "OL"]["paper"] is None
    assert all("held-out views" in r["provenance"] and 3 < r["best"] < 40 for r in rows)
    lines = (tmp_path / "runs.jsonl").read_text()
    again = reproduce.reproduce("table1", dataset="matrixcity", root=root, out=tmp_path)
    assert again["rows"] == rows and (tmp_path / "runs.jsonl").read_text() == lines
    wide = reproduce.reproduce("table4", dataset="matrixcity", root=root, out=tmp_path)["rows"]
    assert [(r["width"], r["paper"]["curve"]["512"]) for r in wide] == [
        (8, 32.088), (8, 32.437), (16, 32.486), (16, 32.63),
    ]  # fmt: skip
    many = reproduce.reproduce("table5", dataset="matrixcity", root=root, out=tmp_path)["rows"]
    assert [(r["tasks"], r["paper"]["last"]) for r in many] == [
        (5, 31.681), (5, 31.822), (10, 31.069), (10, 31.098),
    ]  # fmt: skip
    _, markdown = write_report(tmp_path)
    text = markdown.read_text()
    assert "| matrixcity-b6 | Ours (mod) |" in text and "known before its first task" in text
    assert (tmp_path / "figures" / "table1-smoke-matrixcity.png").is_file()


def test_a_capture_folder_and_the_controls(root: Path, flight: Path, tmp_path: Path) -> None:
    (row, _) = reproduce.reproduce("fig4", dataset="matrixcity", folder=flight, root=root,
                                   out=tmp_path)["rows"]  # fmt: skip
    assert row["dataset"] == "matrixcity" and row["n"] == 1
    assert (tmp_path / "panels" / row["panel"] / "truth.png").is_file()
    rows = reproduce.reproduce("controls", dataset="matrixcity", folder=flight, root=root,
                               out=tmp_path)["rows"]  # fmt: skip
    tried = {r["method"] for r in rows if r["metric"] == "psnr"}
    assert tried == {"none", *reproduce.CONTROLS, "Ours (MIM)"}
    rows = reproduce.reproduce("causes", dataset="matrixcity", root=root, out=tmp_path)["rows"]
    mim = {r["method"]: r["curve"]["4"] for r in rows if r["of"] == "Ours (MIM)"}
    assert set(mim) == {"Ours (MIM) (to 8 steps)", "Ours (MIM) (lambda 0.01)"}
    assert len(set(mim.values())) == 2, "lambda counts"
    rows = reproduce.reproduce("causes4", dataset="matrixcity", root=root, out=tmp_path)["rows"]
    assert [(r["of"], r["width"]) for r in rows] == [("Ours (MIM)", 8), ("Ours (MIM)", 16)]
    assert all(r["paper"] for r in rows)
    rows = reproduce.reproduce("causes5", dataset="matrixcity", root=root, out=tmp_path)["rows"]
    assert [(r["of"], r["tasks"]) for r in rows] == [
        (name, tasks) for tasks in (5, 10) for name in ("Ours (mod)", *["Ours (MIM)"] * 2)
    ]
    sums = reproduce.reproduce("table7", dataset="matrixcity", root=root, out=tmp_path)["rows"]
    assert sums[-1]["parameters"] == 4 * 698_372
    with pytest.raises(ConfigError, match="table3 is for image, video only"):
        reproduce.reproduce("table3", dataset="matrixcity", root=root, out=tmp_path)


def test_meta_training_goes_on_where_it_stopped(root: Path, tmp_path: Path) -> None:
    config = TrainConfig("matrixcity", "mim", str(tmp_path / "a"), width=8, layers=2,
                         outer_steps=2, episodes=2, batch=16, query=16, weighting="diagonal",
                         checkpoint_every=1, view_width=32, rays=64, ray_samples=3)  # fmt: skip
    whole = load_init(train(config, root))
    stopped = replace(config, out=str(tmp_path / "b"), outer_steps=1)
    train(stopped, root)
    again = load_init(train(replace(stopped, outer_steps=2), root))
    for name, p in whole["params"].items():
        assert torch.equal(p, again["params"][name])
    assert whole["field"] == config.ray_field()
    found = evaluate_init(tmp_path / "a" / "init.pt", None, 1, 2, 16, root)
    assert found["dataset"] == "matrixcity" and 3 < found["best"] < 40
    with pytest.raises(ConfigError, match="views are cut into cells"):
        train(replace(config, cut="interleaved", out=str(tmp_path / "c")), root)


@pytest.mark.parametrize("name", ["matrixcity-mod", "matrixcity-mim", "flights-mim"])
def test_shipped_configurations_are_for_views(name: str) -> None:
    folder = Path(__file__).resolve().parents[2] / "configs" / "meta"
    config = load_config(folder / f"{name}.yaml")
    assert DATASETS[config.dataset].kind == "views"
    assert config.ray_field().mlp.hidden == 10


def test_real_captures_have_bounds_and_cells(sample_data: Path) -> None:
    for name, ground in (("brighton", -46.3), ("boruszyn", -154), ("ochota_a", -242)):
        path = sample_data / "drone" / name
        capture = open_capture(path)
        assert find_bounds(capture, capture.split("train").frames).ground == pytest.approx(
            ground, abs=2.5
        )
        episode = view_episode(path, 96, 1000, 1, 5)
        assert episode.coords.shape == (5, 1000, 9) and episode.coords.isfinite().all()
        assert episode.coords[..., :2].abs().max() < 2
