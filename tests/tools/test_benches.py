"""What the benchmarks compute: depth errors, seen ground, useful renders, pairs, digests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from mclnf_edge.captures import Capture, open_capture  # noqa: E402
from mclnf_edge.errors import CaptureError, MclnfError  # noqa: E402
from mclnf_edge.types import Camera, Frame, WorldFrame  # noqa: E402
from tools import (  # noqa: E402
    bench_init,
    bench_live,
    bench_long,
    bench_stream,
    bench_unknown,
    daemons,
    ground,
    measure,
    table_stream,
)
from tools.bench_unknown import points  # noqa: E402

CAMERA = Camera(40, 20, 20.0, 20.0, 20.0, 10.0)


def looking_down(x: float, z: float = 10.0) -> Frame:
    """From z metres above (x, 5): at 10 m, 40 pixels see 20 m of flat ground, 20 pixels 10 m."""
    pose = np.array([[1.0, 0, 0, x], [0, 1, 0, 5], [0, 0, 1, z], [0, 0, 0, 1]])
    return Frame(0, 0.0, b"", "raw", CAMERA, pose)


def flat(z: float = 10.0) -> ground.Depth:
    return np.full((20, 40), z, np.float32)


def test_a_ply_file_is_read_as_written(tmp_path: Path) -> None:
    columns = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1")])
    table = np.zeros(3, columns)
    table["x"], table["z"] = [1, 2, 3], [-4, 5.5, 6]
    head = (
        "ply\nformat binary_little_endian 1.0\nelement vertex 3\nproperty float x\n"
        "property float y\nproperty float z\nproperty uchar red\nend_header\n"
    )
    (tmp_path / "a.ply").write_bytes(head.encode() + table.tobytes())
    np.testing.assert_array_equal(
        ground.read_ply(tmp_path / "a.ply"), [[1, 0, -4], [2, 0, 5.5], [3, 0, 6]]
    )
    (tmp_path / "b.ply").write_bytes(b"ply\nformat ascii 1.0\nend_header\n1 2 3\n")
    with pytest.raises(CaptureError, match=r"b\.ply: expected a binary"):
        ground.read_ply(tmp_path / "b.ply")


def test_the_captures_sparse_points_lie_on_what_their_frames_see(sample_data: Path) -> None:
    path = sample_data / "drone" / "brighton"
    at, frame = ground.read_ply(path / "points3d.ply"), open_capture(path).frame(0)
    assert len(at) == 4905 and abs(np.median(at[:, 2]) + 46.3) < 1
    height = frame.T_world_camera[2, 3] - np.median(at[:, 2])
    shape = frame.camera.height, frame.camera.width
    errors = ground.sparse_errors(frame, np.full(shape, height, np.float32), at)
    assert 500 < len(errors) <= 4905 and np.median(errors) < 1.5  # a flat lakeside park


def test_sparse_errors_are_metres_at_the_points_inside_the_picture() -> None:
    at = np.array([[10.0, 5, 0], [4, 5, 2], [200, 5, 0], [10, 5, 20], [15, 5, 0]])
    depth = flat()
    depth[:, 30] = np.nan  # the last point falls on this column
    np.testing.assert_allclose(ground.sparse_errors(looking_down(10), depth, at), [0, 2])


def test_a_frame_sees_what_lies_in_its_picture_and_is_not_hidden() -> None:
    at = np.array([[10.0, 5, 0], [18, 5, 0], [40, 5, 0]])
    depth = flat()
    depth[:, :25] = 4.0  # something 6 m high hides the first point
    seen = ground.seen_by(at, looking_down(10), depth)
    assert seen.tolist() == [False, True, False]


def test_surface_models_differ_by_the_height_that_is_missing() -> None:
    frame = looking_down(10)
    exact, shown = points(frame, flat()), points(frame, flat(9.0))
    shown[:, :2] = exact[:, :2]
    found = ground.surface_error(exact, shown, 1.0)
    assert found["rmse_m"] == pytest.approx(1.0) and found["median_m"] == pytest.approx(1.0)
    assert found["covered"] == 1.0
    shown[exact[:, 0] > 10] = np.nan
    assert ground.surface_error(exact, shown, 1.0)["covered"] == pytest.approx(0.5, abs=0.05)


def test_the_highest_point_of_a_cell_counts() -> None:
    at = np.array([[0.2, 0.2, 1.0], [0.8, 0.4, 3.0], [1.5, 0.5, -2.0], [9, 9, 9], [np.nan] * 3])
    model = ground.surface_model(at, np.zeros(2), 1.0, (1, 2))
    np.testing.assert_array_equal(model, [[3.0, -2.0]])


def test_a_render_is_useful_three_decibels_above_the_mean_colour() -> None:
    random = np.random.default_rng(0)
    true = random.integers(0, 255, (20, 40, 3)).astype(np.uint8)
    near = np.clip(true + random.normal(0, 10, true.shape), 0, 255).astype(np.uint8)
    grey, everything = np.full_like(true, 128), np.ones((20, 40), bool)
    assert bench_live.above_mean(near, true, everything) > 10
    assert abs(bench_live.above_mean(grey, true, everything)) < 0.1
    seen = np.zeros((3, 20, 40), bool)
    seen[1, :, :20] = True
    assert bench_live.first_frame(seen, everything) == 1
    assert bench_live.first_frame(seen[:1], everything) is None
    flight = bench_live.Flight(sent_at=[(0.0, 0.0), (2.0, 1.0), (4.0, 2.0)])
    flight.small = [
        bench_live.Shots(1, 1.0, 0.5, [near]),  # before the first frame that sees it
        bench_live.Shots(2, 3.0, 1.5, [grey]),
        bench_live.Shots(3, 5.0, 2.5, [near]),
    ]
    found = bench_live.first_useful(flight, true, seen, everything, 1, 0)
    assert (found["wall_s"], found["cpu_s"]) == (3.0, 1.5)


def test_quarters_count_only_ground_that_two_sent_frames_saw() -> None:
    true = np.full((20, 40, 3), 100, np.uint8)
    half = true.copy()
    half[:, 20:] = 0  # wrong where nothing was seen
    seen = np.zeros((2, 20, 40), bool)
    seen[:, :, :20] = True
    close = (true + 1).astype(np.uint8)
    shots = [
        bench_live.Shots(1, 1.0, 1.0, [half]),
        bench_live.Shots(2, 2.0, 2.0, [half + np.uint8(10)]),
        bench_live.Shots(2, 9.0, 9.0, [close]),
    ]
    one, two = bench_live.quarters(shots, [true], [seen])
    assert one["psnr_seen"] is None and one["share_seen"] == 0
    assert two["share_seen"] == 0.5 and two["psnr_seen"] == pytest.approx(28.13, abs=0.01)
    assert two["psnr_same_pixels_at_end"] == pytest.approx(48.13, abs=0.01)


def test_a_held_out_view_is_split_by_the_bounds_of_inner_modules() -> None:
    def module(name: str, x: float, edge: float) -> dict[str, object]:
        return {"id": name, "bounds": [[x, 0, -1], [x + edge, edge, 5]]}

    status = {
        "cell_size_m": 10.0,
        "modules": [module("a", 0, 10), module("b", 10, 10), module("outer", -20, 60)],
    }
    found = bench_live.split(looking_down(10), flat(), status)
    assert found.keys() == {"a", "b"}
    assert found["a"][:, :20].all() and not found["a"][:, 20:].any()


def test_the_default_budget_is_paired_with_the_larger_one_view_by_view() -> None:
    def row(budget: float, shift: float) -> dict[str, object]:
        views = [{"frame": f"{i}", "psnr": 20 + i + shift} for i in range(5)]
        told = {"capture": "a", "seed": 0, "rate_hz": 0.5, "first_frames": None}
        return {**told, "budget": budget, "views": views}

    found = bench_live.against_more([row(1, 0.0), row(4, 0.2)])
    assert found["a, budget 1 against 4"]["difference_db"] == -0.2
    assert found["a, budget 1 against 4"]["met"]
    assert not bench_live.against_more([row(1, 0), row(4, 1)])["a, budget 1 against 4"]["met"]


def test_marks_are_paired_over_captures_and_folds() -> None:
    def run(capture: str, fold: int | None, gains: list[float]) -> dict[str, object]:
        rows = [
            {"mark_s": mark, "views": [{"frame": f"{i}", "psnr": base + i} for i in range(4)]}
            for mark, base in zip((30.0, 60.0), gains, strict=True)
        ]
        return {"capture": capture, "fold": fold, "seed": 0, "rows": rows}

    runs = [run("a", None, [20.0, 21.0]), run("a", 1, [20.0, 22.0]), run("b", None, [18.0, 17.0])]
    found = bench_stream.summarise(runs)
    assert found["a"]["60"]["gain_since_mark_before"]["difference_db"] == 1.5
    assert found["a"]["60"]["views"] == 8 and found["all"]["60"]["views"] == 12
    assert "gain_since_mark_before" not in found["a"]["30"]
    other = bench_stream.against(runs, [run("b", None, [18.0, 16.5])])
    assert other["b, 60 s"]["difference_db"] == 0.5 and other["all, 60 s"]["views"] == 4
    assert other["a, 60 s"]["difference_db"] is None


def test_a_stream_of_another_protocol_or_other_marks_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[float]] = []

    def run(path: Path, marks: list[float], fold: int | None, seed: int) -> dict[str, object]:
        ran.append(marks)
        row = {"psnr": 20.0, "ssim": 0.5, "steps_per_cpu_s": 9.0, "render_cpu_s": 0.1}
        rows = [row | {"mark_s": m, "views": [{"frame": "f", "psnr": 20.0}]} for m in marks]
        cost = {"peak_memory_mb": 100.0, "accepted_per_s": 9.0, "shape": {}}
        return {**bench_stream.key_of(path, fold, seed), "marks": marks, "rows": rows, **cost}

    def measured(marks: str) -> int:
        before = len(ran)
        monkeypatch.setattr("sys.argv", f"x --capture a --marks {marks} --out {out}".split())
        bench_stream.main()
        assert "| a | 20.00 |" in capsys.readouterr().out
        return len(ran) - before

    monkeypatch.setattr(bench_stream, "run", run)
    out = tmp_path / "stream.json"
    out.write_text(json.dumps({"runs": [{"capture": "a", "fold": None, "seed": 0}]}))
    assert [measured("30"), measured("30"), measured("60"), measured("60")] == [1, 0, 1, 0]
    kept = json.loads(out.read_text())
    assert [r["marks"] for r in kept["runs"]] == [[60.0]]
    assert kept["protocol"]["real_captures_seen_by_init"] == [] and kept["protocol"]["init"]
    monkeypatch.setattr(bench_stream, "HORIZON_S", 480.0)
    assert measured("60") == 1


def test_shares_of_the_unknown_are_measured_once_and_say_what_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flown: list[str] = []
    ran: list[tuple[int, int]] = []

    def fly(path: Path, steps: int) -> bench_unknown.Flight:
        flown.append(path.name)
        return bench_unknown.Flight(path.name, Capture("", "", WorldFrame(), []), [], [], [[], []])

    def figures(
        flight: bench_unknown.Flight, block: int, steps: int, known_views: int
    ) -> dict[str, object]:
        ran.append((block, known_views))
        return {"capture": flight.name, "block": block, "of_blocks": len(flight.blocks),
                "known_views": known_views, "steps": steps}  # fmt: skip

    out = tmp_path / "unknown.json"
    out.write_text(json.dumps([figures(fly(Path("a"), 150), 0, 150, 1)]))
    ran.clear()
    flown.clear()
    monkeypatch.setattr(bench_unknown, "fly", fly)
    monkeypatch.setattr(bench_unknown, "measure", figures)
    monkeypatch.setattr("sys.argv", f"x --capture a --out {out}".split())
    bench_unknown.main()
    bench_unknown.main()
    kept = json.loads(out.read_text())
    assert ran == [(0, 1), (0, 2), (1, 1), (1, 2)] and len(kept["rows"]) == 4
    assert flown == ["a"], "a map of all frames, only where something is left to measure"
    assert kept["protocol"].keys() >= {"init", "real_captures_seen_by_init", "seed"}
    assert kept["machine"]["torch"]


def test_the_best_peer_at_a_mark_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = {"a": {"15": 14.0, "60": 19.0}, "b": {"15": 15.0}}
    assert table_stream.best_peer(peers, 15.0) == ("b", 15.0)
    assert table_stream.best_peer(peers, 60.0) == ("a", 19.0)
    assert table_stream.best_peer(peers, 30.0) is None
    assert table_stream.best_peer(bench_stream.PEERS["boruszyn"], 60.0) == ("plane sketch", 19.47)
    measured = {"peer": "x", "capture": "boruszyn", "rows": [{"mark_s": 60.0, "psnr": 30.004}]}
    monkeypatch.setattr(bench_stream, "MEASURED", tmp_path / "peers.json")
    assert bench_stream.peers() == bench_stream.PEERS
    (tmp_path / "peers.json").write_text(json.dumps({"runs": [measured]}))
    here = bench_stream.peers()["boruszyn"]
    assert table_stream.best_peer(here, 60.0) == ("x (tools.peers)", 30.0)
    assert here.keys() - {"x (tools.peers)"} == bench_stream.PEERS["boruszyn"].keys()


def test_blocks_that_never_became_useful_count_as_infinitely_slow() -> None:
    def blocks(*seconds: float | None) -> list[dict[str, object]]:
        return [{"wall_s": s, "cpu_s": s} for s in seconds]

    found = bench_live.summarise(blocks(1.0, 2.0, 3.0, None))
    assert (found["useful"], found["blocks_in_views"], found["never"]) == (3, 4, 1)
    assert found["wall_s"] == {"median": 2.5, "slowest": None}
    assert bench_live.summarise(blocks(1.0, 2.0))["cpu_s"] == {"median": 1.5, "slowest": 2.0}
    assert bench_live.summarise(blocks(1.0, None))["wall_s"]["median"] is None
    assert bench_live.summarise([])["wall_s"] == {"median": None, "slowest": None}
    row = {"capture": "a", "rate_hz": 0.5, "first_frames": None, "end": {"psnr": 21.0}}
    assert table_stream.live([row | {"summary": found}, row])[2:] == [
        "| a | 0.5 | 21.00 dB | 3 of 4 | 2.5 s | never |"
    ]


def test_starts_are_paired_by_view_and_seeds_are_no_views() -> None:
    def entry(*runs: list[float]) -> dict[str, object]:
        marks = [str(mark) for mark in bench_init.MARKS]
        return {"runs": {str(i): dict.fromkeys(marks, run) for i, run in enumerate(runs)}}

    a = {"meta": entry([21.0, 22.0], [21.0, 24.0]), "random": entry([20.0, 20.0], [20.0, 22.0])}
    b = {"meta": entry([20.0]), "random": entry([20.0])}
    empty = {"meta": {"runs": {}}, "random": {"runs": {}}}
    found = bench_init.compare({"a": a, "b": b, "c": empty})
    assert list(found) == ["a", "b", "all"] and found["all"]["64"]["views"] == 3
    assert found["a"]["64"]["difference_db"] == 1.5 and found["a"]["64"]["interval"] == [1.0, 2.0]
    assert found["a"]["64"]["verdict"] == "too few views"


def test_the_readme_table_has_the_difference_to_the_best_peer() -> None:
    row = {"mark_s": 60.0, "psnr": 21.25, "ssim": 0.6, "steps_per_cpu_s": 20.4, "render_cpu_s": 1.5}
    run = {"capture": "a", "rows": [row], "peak_memory_mb": 700.4, "accepted_per_s": 60.2}
    run["shape"] = {"sparse_points": {"median_m": 0.456}}
    peers = {"a": {"one": {"60": 19.0}, "two": {"60": 20.0, "120": 21.0}}}
    head, rule, line, *others = table_stream.quality([run], peers)
    assert others == ["| a, one | 19.00 |  |  |", "| a, two | **20.00** |  |  |"]
    assert head == "| capture | 60 s | SSIM | peak memory |" and rule == "|---|---|---|---|"
    assert line == "| a | 21.25 (+1.25) | 0.60 | 700 MB |"
    assert table_stream.quality([run], {})[2] == "| a | 21.25 | 0.60 | 700 MB |"
    assert table_stream.costs([run])[2] == "| a | 60 | 20.4 | 1.50 | 0.46 m |"


def test_a_changed_digest_and_a_lost_view_are_found() -> None:
    a = {"cell_0_0.1": "aa", "cell_1_0.1": "bb"}
    assert bench_long.changed([a, a | {"cell_2_0.1": "cc"}]) == []
    assert bench_long.changed([a, a | {"cell_1_0.1": "b0"}]) == ["cell_1_0.1"]
    views = {f"{i}": 20.0 + i for i in range(4)}
    stages = [
        {"capture": "a", "views": {"a": views}},
        {"capture": "b", "views": {"a": views | {"0": 19.0}, "b": views}},
    ]
    found = bench_long.lost(stages)
    assert list(found) == ["a"] and found["a"]["difference_db"] == -0.25
    assert found["a"]["worst_view_db"] == -1.0 and not found["a"]["met"]


def test_the_status_gives_clock_lag_and_digests() -> None:
    status = {
        "cpu_s": 9.0, "render_cpu_s": 2.5, "frames_waiting": 3, "frames_short": 4,
        "modules": [
            {"id": "m", "version": 2, "state": "closed", "digest": "d"},
            {"id": "n", "version": 1, "state": "open", "digest": ""},
            {"id": "o", "version": 1, "state": "quarantined", "digest": "x"},
        ],
    }  # fmt: skip
    assert daemons.busy_s(status) == 6.5 and daemons.lag(status) == 7
    assert daemons.digests(status) == {"m.2": "d"} and daemons.open_modules(status) == 1


def test_a_daemon_that_does_not_start_says_why() -> None:
    unknown = {"adapt": {"pases": 1}}
    with pytest.raises(MclnfError, match="did not start.*pases"), daemons.daemon(unknown):
        pytest.fail("a daemon with an unknown setting must not start")


def test_a_command_names_no_folder_of_this_machine() -> None:
    assert measure.command(["tools/x.py", "/a/b/flight", "--rate", "2"]) == (
        "python tools/x.py flight --rate 2"
    )


def test_the_results_at_hand_can_be_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["table_stream.py"])
    table_stream.main()
    assert "| boruszyn, OpenSplat | 13.96 |" in capsys.readouterr().out
    kept = json.loads((measure.ROOT / "tools/results/bench_init.json").read_text(encoding="utf-8"))
    assert bench_init.lines(kept)[-1].startswith("| all | meta - random |")
