"""The parts of `tools/peers` that need no peer: projects, clocks, splats, resuming, the table."""

from __future__ import annotations

import json
import shutil
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("numba")

from mclnf_edge.captures import open_capture  # noqa: E402
from mclnf_edge.errors import CaptureError  # noqa: E402
from mclnf_edge.types import Camera, Frame  # noqa: E402
from tools.peers import __main__ as peers  # noqa: E402
from tools.peers import opensplat, project, splats  # noqa: E402
from tools.peers.project import PeerError  # noqa: E402

CAMERA = Camera(64, 48, 50.0, 50.0, 32.5, 24.5)
"""A point on its axis is at the centre of pixel (24, 32)."""
PICTURE = np.full((48, 64, 3), 90, np.uint8)
POSE = np.eye(4)
BLACK = (0.0, 0.0, 0.0)


def capture(folder: Path, splits: tuple[str, ...] = ("train", "train", "test")) -> Path:
    """A capture of three grey pictures, the last held out."""
    (folder / "images").mkdir(parents=True)
    frames = []
    for i, split in enumerate(splits):
        cv2.imwrite(str(folder / "images" / f"{i}.png"), PICTURE + 10 * i)
        frames.append(
            {"file_path": f"images/{i}.png", "split": split, "transform_matrix": POSE.tolist()}
        )
    head = {"fl_x": 50.0, "fl_y": 50.0, "cx": 32.5, "cy": 24.5, "w": 64, "h": 48}
    (folder / "transforms.json").write_text(json.dumps(head | {"frames": frames}))
    return folder


def ply(path: Path, at: list[list[float]], colour: list[float], rest: int = 9) -> Path:
    """Splats of 0.1 units, almost opaque, of one colour (0..1), the harmonics above it 0."""
    names = ["x", "y", "z", *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(rest))]
    names += ["opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    base = [(c - 0.5) / 0.28209479177387814 for c in colour]
    rows = [[*p, *base, *[0.0] * rest, 8.0, *[np.log(0.1)] * 3, 2.0, 0, 0, 0] for p in at]
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(at)}\n"
    head += "".join(f"property float {name}\n" for name in names) + "end_header\n"
    path.write_bytes(head.encode() + np.array(rows, "<f4").tobytes())
    return path


def test_a_project_has_the_train_frames_alone_and_views_have_no_picture(tmp_path: Path) -> None:
    source, out = capture(tmp_path / "flight"), tmp_path / "project"
    views = project.write(open_capture(source), source, out)
    written = json.loads((out / "transforms.json").read_text())
    assert [f["file_path"] for f in written["frames"]] == ["images/0000.png", "images/0001.png"]
    assert len(list((out / "images").iterdir())) == 2 and not (out / "masks").exists()
    assert [view.name for view in views] == ["0002"]
    assert set(views[0].job()) == {
        *("name", "transform_matrix", "w", "h", "fl_x", "fl_y", "cx", "cy")
    }
    found = views[0].compare(PICTURE)
    assert found["psnr"] == pytest.approx(20 * np.log10(255 / 20)) and found["psnr_aligned"] > 60
    with pytest.raises(PeerError, match=r"expected points3d\.ply"):
        project.needs_points(out)


def test_a_split_that_is_empty_is_refused(tmp_path: Path) -> None:
    source = capture(tmp_path / "flight", ("train", "train", "train"))
    with pytest.raises(CaptureError, match="one split is empty"):
        project.write(open_capture(source), source, tmp_path / "project")


def test_pixels_without_an_original_do_not_count() -> None:
    bent = replace(CAMERA, model="OPENCV", distortion=(0.4, 0.0, 0.0, 0.0))
    picture = cv2.imencode(".png", PICTURE)[1].tobytes()
    view = project.held_out(Frame(7, 0.0, picture, "png", bent, POSE))
    assert view.name == "0007" and view.camera.model == "PINHOLE"
    assert 0.5 < view.valid.mean() < 1
    wrong = np.where(view.valid[..., None], view.truth, 0).astype(np.uint8)
    assert view.compare(wrong)["psnr"] == np.inf


def test_the_clock_leaves_out_loading_and_saving() -> None:
    clock = opensplat.Clock(every=2)
    assert clock.line("Loading a.png", 1.0) is None
    assert clock.line("Loading b.png", 3.0) is None
    assert clock.line("a line of no meaning", 3.5) is None
    taken = [clock.line(f"Step {i}: 0.3 (0%)", cpu) for i, cpu in enumerate([4, 5, 16, 17], 1)]
    assert taken == [1, 2, 3, 4]
    assert clock.at == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}  # the 10 s before step 3 wrote splats
    assert clock.newest(3, 2.5) == 2 and clock.newest(5, 4.5) == 4
    assert clock.newest(2, 2.5) is None and clock.newest(5, 1.0) is None


def fake(path: Path, steps: int) -> Path:
    """A program that talks and saves as OpenSplat does, 20 ms of CPU time a step."""
    state = ply(path.parent / "state.ply", [[0, 0, -4]], [1, 0, 0])
    path.write_text(f"""#!/usr/bin/env python3
import pathlib, shutil, sys, time
if sys.argv[1:] == ["--version"]:
    sys.exit(print("1.1.5 (a test)"))
out = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
print("Loading a.png", flush=True)
for step in range(1, {steps} + 1):
    until = time.process_time() + 0.02
    while time.process_time() < until:
        pass
    print(f"Step {{step}}: 0.3 (0%)", flush=True)
    if step % {opensplat.EVERY} == 0:
        shutil.copy({str(state)!r}, out.with_name(f"{{out.stem}}_{{step}}.ply"))
""")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_binary_is_run_to_the_last_mark_measured_and_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = capture(tmp_path / "flight")
    ply(source / "points3d.ply", [[0, 0, -4]], [1, 0, 0])
    out, binary = tmp_path / "peers.json", fake(tmp_path / "fake", 1000)
    words = ["opensplat", "--binary", str(binary), "--capture", str(source), "--out", str(out)]
    words += ["--marks", "0.2,0.6", "--own", str(tmp_path / "none.json")]
    peers.main([*words, "--pictures", str(tmp_path / "pictures")])
    (run,) = json.loads(out.read_text())["runs"]
    assert (run["peer"], run["capture"], run["train"]) == ("opensplat", "flight", 2)
    assert run["held_out"] == ["0002"] and run["versions"]["opensplat"] == "1.1.5 (a test)"
    first, last = run["rows"]
    assert first["spent_s"] <= 0.2 and 0.2 < last["spent_s"] <= 0.6
    assert last["steps"] > first["steps"] and last["steps"] % opensplat.EVERY == 0
    assert (
        last["splats"] == 1
        and last["sorted_by_depth"]
        and 5 < last["psnr"] < 15
        and len(last["views"]) == 1
    )
    shown = cv2.imread(str(tmp_path / "pictures" / "opensplat-flight" / "0.6" / "0002.png"))
    assert shown.shape == (48, 64, 3) and shown[24, 32, 2] > 250 > shown[0, 0, 2]
    assert out.with_suffix(".png").exists()
    began = time.monotonic()
    peers.main(words)
    assert time.monotonic() - began < 5 and len(json.loads(out.read_text())["runs"]) == 1
    said = capsys.readouterr().out
    assert "opensplat, flight, seed 0: already there" in said and "| flight | opensplat |" in said


def test_a_binary_that_ends_early_is_told_with_its_last_words(tmp_path: Path) -> None:
    source = capture(tmp_path / "flight")
    ply(source / "points3d.ply", [[0, 0, -4]], [1, 0, 0])
    views = project.write(open_capture(source), source, tmp_path / "project")
    binary = fake(tmp_path / "fake", 12)
    with pytest.raises(PeerError, match="OpenSplat ended before 100 s: Step 12"):
        list(opensplat.run(binary, tmp_path / "project", tmp_path / "out", [100.0], views))
    with pytest.raises(PeerError, match="took more than 0.01 s"):
        list(opensplat.run(binary, tmp_path / "project", tmp_path / "out", [0.01], views))
    with pytest.raises(PeerError, match="--binary nothing: No such file"):
        opensplat.version(tmp_path / "nothing")


def test_splats_are_painted_where_they_are_nearest_first(tmp_path: Path) -> None:
    red = splats.read(ply(tmp_path / "red.ply", [[0.8, 0.4, -4]], [1, 0, 0]))
    shown = splats.render(red, CAMERA, POSE, BLACK)
    row, column = np.unravel_index(shown[..., 0].argmax(), shown.shape[:2])
    assert (row, column) == (24 - 50 * 0.1, 32 + 50 * 0.2)
    assert shown[row, column, 0] > 245 and shown[..., 1:].max() == 0
    behind = splats.read(ply(tmp_path / "green.ply", [[1.0, 0.5, -5]], [0, 1, 0]))
    both = splats.Splats(*(np.concatenate(p) for p in zip(behind, red, strict=True)))
    shown = splats.render(both, CAMERA, POSE, BLACK)
    assert shown[row, column, 0] > 245 > 20 > shown[row, column, 1]
    backwards = POSE * [-1, 1, -1, 1]
    assert (splats.render(red, CAMERA, backwards, (0.2, 0.4, 0.6)) == [51, 102, 153]).all()


def test_the_order_of_blending_is_told_by_a_train_frame(tmp_path: Path) -> None:
    at = [[0.0, 0.0, -5.0], [0.1, -0.1, -4.0], [-0.1, 0.1, -6.0], [0.1, 0.1, -4.5]]
    shown = splats.read(ply(tmp_path / "a.ply", at, [1, 0, 0]))
    colour = np.array([[[3.0, 0, 0]], [[0, 3, 0]], [[0, 0, 3]], [[3, 3, 0]]]) - 1.7
    shown = shown._replace(colour=colour, scale=shown.scale * 10, opacity=np.full(4, 0.7))
    key = opensplat.flat_key(shown, CAMERA, POSE, 10.0)
    x, y = 2 * 50 / 64 * 0.1 / 4, 2 * 50 / 48 * 0.1 / 4  # of the second, between two depths
    depths = [(1000.001 - 10 / z) / 999.999 for z in (5, 4)]
    np.testing.assert_allclose(key, [depths[0], x, y, depths[1]], rtol=1e-6)
    for order in (None, key):
        folder = tmp_path / ("flat" if order is not None else "depth")
        folder.mkdir()
        picture = splats.render(shown, CAMERA, POSE, BLACK, order)
        cv2.imwrite(str(folder / "a.png"), picture[..., ::-1])
        frame = {"file_path": "a.png", **project.words(CAMERA, POSE)}
        assert opensplat.sorts_flat(shown, folder, frame, 10.0) == (order is not None)


def test_harmonics_are_orthonormal_and_colour_follows_the_direction() -> None:
    random = np.random.default_rng(0)
    looking = random.normal(size=(200_000, 3))
    looking /= np.linalg.norm(looking, axis=1, keepdims=True)
    basis = splats.harmonics(looking, np.zeros((1, 16, 3)))
    gram = basis.T @ basis / len(looking) * 4 * np.pi
    np.testing.assert_allclose(gram, np.eye(16), atol=0.05)


def test_a_file_without_splats_is_refused(tmp_path: Path) -> None:
    (tmp_path / "points.ply").write_bytes(b"ply\nelement vertex 0\nproperty float x\nend_header\n")
    with pytest.raises(PeerError, match=r"points\.ply: expected splats"):
        splats.read(tmp_path / "points.ply")


def test_what_cannot_run_here_is_said_before_anything_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "CUDA_DEVICES", (tmp_path / "nvidia0",))
    for peer in ("instant-ngp", "splatfacto"):
        with pytest.raises(PeerError, match=f"{peer} needs a CUDA device"):
            peers.main([peer, "--environments", str(tmp_path / "envs")])
    with pytest.raises(PeerError, match="expected --binary PATH"):
        peers.main(["opensplat"])
    assert not (tmp_path / "envs").exists()
    (tmp_path / "nvidia0").touch()
    peers.check(["splatfacto"], None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["colmap"], "received 'colmap'"),
        (["--marks", "15,soon"], "received '15,soon'"),
        (["--marks", "0,15"], "expected seconds above 0"),
    ],
)
def test_a_wrong_command_line_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        peers.arguments(words)
    assert raised.value.code == 2 and said in capsys.readouterr().err


def copy_of(python: Path, home: Path) -> None:
    """An environment with the packages of another one."""
    shutil.copytree(python.parents[1], home, symlinks=True)


def test_an_environment_is_made_once_for_its_list_of_packages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = tmp_path / "some.txt"
    pins.write_text("# nothing\n")
    python = peers.environment(tmp_path / "envs", pins)
    assert python.exists() and "making an environment for some" in capsys.readouterr().out
    assert peers.environment(tmp_path / "envs", pins) == python
    assert capsys.readouterr().out == ""
    pins.write_text("./no-such-package\n")
    monkeypatch.setattr(peers.venv, "create", lambda home, **_: copy_of(python, home))
    with pytest.raises(PeerError, match=r"pip could not install some\.txt"):
        peers.environment(tmp_path / "envs", pins)


def test_the_shipped_list_pins_every_package() -> None:
    lines = peers.PINS.read_text().split()
    assert all("==" in line for line in lines)
    assert {"nerfstudio==1.1.5", "gsplat==1.4.0", "nerfacc==0.5.2"} <= set(lines)


def run(peer: str, name: str, levels: dict[int, float], **more: Any) -> dict[str, Any]:
    rows = [
        {"mark_s": float(m), "psnr": p, "ssim": p / 40, "render_s": 0.5, "render_cpu_s": 0.1}
        for m, p in levels.items()
    ]
    return {"peer": peer, "capture": name, "clock": "cpu", "rows": rows} | more


def test_the_table_and_the_plot_have_ours_beside_the_peers(tmp_path: Path) -> None:
    own = [run("", "a", {15: 20.0, 30: 21.0}, fold=f) for f in (None, 3)]
    own.append(run("", "b", {15: 30.0}, fold=None))
    both = peers.together(own, [run("nerfacto", "a", {15: 12.0}), run("opensplat", "a", {30: 18})])
    assert [r["peer"] for r in both] == ["this daemon", "nerfacto", "opensplat"]
    lines = peers.table(both)
    assert lines[0] == "| capture | trainer | 15 s | 30 s | SSIM | render, CPU s a view |"
    assert lines[2] == "| a | this daemon | 20.00 | 21.00 | 0.53 | 0.10 |"
    assert lines[3] == "| a | nerfacto | 12.00 | – | 0.30 | 0.50 |"
    pytest.importorskip("matplotlib")
    peers.plot(both, tmp_path / "plot.png")
    assert cv2.imread(str(tmp_path / "plot.png")).shape[2] == 3
