"""Files that people look at: pictures, depth, films, contact sheets, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from mclnf_edge.errors import ConfigError
from mclnf_edge.report import (
    Pair,
    contact_sheet,
    to_json,
    write_depth,
    write_json,
    write_picture,
    write_video,
)

RED = np.zeros((20, 30, 3), np.uint8)
RED[..., 0] = 255


def test_picture_colours_survive(tmp_path: Path) -> None:
    for name, tolerance in (("a.png", 0), ("b.JPG", 3)):
        write_picture(tmp_path / "new" / name, RED)
        stored = cv2.imread(str(tmp_path / "new" / name))
        assert stored is not None
        assert np.abs(stored[..., ::-1].astype(int) - RED).max() <= tolerance
    with pytest.raises(ConfigError, match=r"a\.gif"):
        write_picture(tmp_path / "a.gif", RED)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(("largest_m", "unit_m"), [(65.5, 1e-3), (65.6, 1e-2), (700.0, 1e-1)])
def test_depth_takes_the_finest_unit_that_fits(
    tmp_path: Path, largest_m: float, unit_m: float
) -> None:
    depth = np.array([[np.nan, largest_m], [1e-6, 3.25]], np.float32)
    assert write_depth(tmp_path / "d.png", depth) == pytest.approx(unit_m)
    units = cv2.imread(str(tmp_path / "d.png"), cv2.IMREAD_UNCHANGED)
    assert units is not None and units.dtype == np.uint16
    assert units[0, 0] == 0 and units[1, 0] == 1, "0 means unknown, nothing else"
    assert units[0, 1] * unit_m == pytest.approx(largest_m, abs=unit_m / 2 + 1e-4)


def test_depth_as_numpy_is_exact(tmp_path: Path) -> None:
    depth = np.array([[np.nan, 1.5]], np.float32)
    assert write_depth(tmp_path / "d.npy", depth) == 1.0
    np.testing.assert_array_equal(np.load(tmp_path / "d.npy", allow_pickle=False), depth)
    with pytest.raises(ConfigError, match=r"d\.exr"):
        write_depth(tmp_path / "d.exr", depth)


def test_a_film_has_every_picture_in_order(tmp_path: Path) -> None:
    pictures = [np.full((49, 65, 3), 25 * i, np.uint8) for i in range(8)]
    assert write_video(tmp_path / "f.mp4", pictures, fps=10.0) == 8
    film = cv2.VideoCapture(str(tmp_path / "f.mp4"))
    means = []
    while (got := film.read())[0]:
        assert got[1].shape == (48, 64, 3)
        means.append(got[1].mean())
    assert np.abs(np.array(means) - 25.0 * np.arange(8)).max() < 4


def test_a_film_of_nothing_or_of_two_sizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no picture"):
        write_video(tmp_path / "f.mp4", [])
    with pytest.raises(ConfigError, match="30x20"):
        write_video(tmp_path / "f.mp4", [np.zeros((40, 60, 3), np.uint8), RED])
    assert not list(tmp_path.iterdir()), "no film that is cut short"


def test_contact_sheet_shows_each_truth_left_of_its_render() -> None:
    green = RED[..., [1, 0, 2]]
    sheet = contact_sheet([Pair(RED, green, f"view {i}: 20.1 dB") for i in range(3)], 2, 60)
    rows, columns = 2, 2
    assert sheet.shape == (rows * (40 + 22 + 6) + 6, columns * (122 + 6) + 6, 3)
    assert (sheet == [255, 0, 0]).all(-1).sum() == 3 * 40 * 60
    assert (sheet == [0, 255, 0]).all(-1).sum() == 3 * 40 * 60
    assert tuple(sheet[6 + 22 + 20, 6 + 10]) == (255, 0, 0)
    assert (sheet[6:28, 6:128] < 128).any(), "a caption in dark ink"


def test_contact_sheet_refuses_nothing_and_unlike_sizes() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        contact_sheet([])
    with pytest.raises(ConfigError, match="view 7"):
        contact_sheet([Pair(RED, RED[:-1], "view 7")])


def test_json_takes_numpy_and_has_no_nan(tmp_path: Path) -> None:
    value = {"a": np.float32(1.5), "b": [np.nan, float("inf")], "c": np.arange(2), 4: Path("x/y")}
    assert json.loads(to_json(value)) == {"a": 1.5, "b": [None, None], "c": [0, 1], "4": "x/y"}
    write_json(tmp_path / "r.json", value)
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(to_json(value))
