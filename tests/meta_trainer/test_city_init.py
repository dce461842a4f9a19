"""Learning the daemon's initialization: it helps, resumes bit for bit, sees no real capture."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mclnf_edge.engine.field import random_mlp
from mclnf_edge.errors import CaptureError, ConfigError, InitError
from mclnf_edge.mapping.initialization import load_init

pytest.importorskip("numba")
if importlib.util.find_spec("embreex") is None and importlib.util.find_spec("warp") is None:
    pytest.skip("neither embreex nor warp-lang is installed", allow_module_level=True)

from meta_trainer import city_init  # noqa: E402
from meta_trainer.__main__ import app  # noqa: E402
from meta_trainer.city.write import Request, generate  # noqa: E402
from meta_trainer.city_init import (  # noqa: E402
    CityConfig,
    Episode,
    find_flights,
    load_city_config,
    outer_move,
    train,
)

CONFIG = CityConfig(episodes=8, inner_steps=16, outer_rate=1.0, frames=6, held_out=1)
SHORT = CityConfig(episodes=3, inner_steps=2, frames=6, held_out=0)
FLIGHT = Request(
    blocks=1, flight=9, width=128, height=96, pattern="nadir", altitude_m=80.0, depth=False
)


@pytest.fixture(scope="module")
def flights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small generated flights; the second is held out."""
    folder = tmp_path_factory.mktemp("flights")
    generate(folder / "a", replace(FLIGHT, seed=1))
    generate(folder / "b", replace(FLIGHT, seed=2))
    return folder


@pytest.fixture(scope="module")
def learned(flights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialization learned on flight a, scored on flight b after one and four steps."""
    out = tmp_path_factory.mktemp("learned") / "init.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(city_init, "SCORED_STEPS", (1, 4))
        train(CONFIG, flights, out)
    return out


def test_a_short_training_beats_a_random_start_on_a_held_out_flight(learned: Path) -> None:
    scores = load_init(learned).meta["held_out"]
    assert list(scores) == ["b"]
    for steps in ("1", "4"):
        assert scores["b"]["meta"][steps] > scores["b"]["random"][steps] + 0.3


def test_the_file_says_how_it_was_made(learned: Path) -> None:
    meta = load_init(learned).meta
    assert meta["config"] == {
        "episodes": 8, "inner_steps": 16, "query_steps": 0, "outer_rate": 1.0, "frames": 6,
        "held_out": 1, "seed": 0,
    }  # fmt: skip
    assert list(meta["flights"]) == ["a"]
    assert meta["flights"]["a"]["seed"] == 1 and meta["flights"]["a"]["version"] >= 1
    assert meta["real_captures"] == [] and "No real capture" in meta["statement"]


class Cut(Exception):
    """Stops a training from outside."""


def test_a_cut_training_goes_on_to_identical_parameters(flights: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.pt", tmp_path / "cut.pt"
    seen: list[int] = []

    def cut(done: int, psnr: float) -> None:
        if done == 3:
            raise Cut

    train(SHORT, flights, whole)
    with pytest.raises(Cut):
        train(SHORT, flights, out, cut)
    assert not out.exists()
    train(SHORT, flights, out, lambda done, psnr: seen.append(done))
    assert seen == [3]  # the first round over the flights was kept, the cut episode is done again
    np.testing.assert_array_equal(load_init(out).mlp, load_init(whole).mlp)


def test_a_checkpoint_of_other_settings_is_refused(flights: Path, learned: Path) -> None:
    with pytest.raises(InitError, match="received one of"):
        train(replace(CONFIG, inner_steps=17), flights, learned)


def test_an_episode_depends_on_its_start_and_seed_alone(flights: Path) -> None:
    episode, start = Episode(flights / "a", 6), random_mlp(0)
    first = outer_move(episode, SHORT, start, 3)
    other = outer_move(episode, SHORT, start, 4)
    np.testing.assert_array_equal(outer_move(episode, SHORT, start, 3), first)
    assert not np.array_equal(first, other)


def test_query_steps_move_by_the_query_frames_alone(flights: Path) -> None:
    episode, start = Episode(flights / "a", 6), random_mlp(0)
    config = replace(SHORT, query_steps=2)
    move = outer_move(episode, config, start, 0)
    total = (episode.mean_weights() - start).astype(np.float32)
    assert 0 < np.linalg.norm(move) < np.linalg.norm(total)
    rays = [frame.rays for frame in episode.mapper.frames.values()]
    episode.only(1)
    episode.steps(1)
    grown = [frame.rays - r for frame, r in zip(episode.mapper.frames.values(), rays, strict=True)]
    assert sum(grown[1::2]) > 0 and sum(grown[::2]) == 0


def test_only_generated_flights_are_accepted(flights: Path, tmp_path: Path) -> None:
    assert list(find_flights(flights)) == ["a", "b"]
    with pytest.raises(CaptureError, match="found none"):
        find_flights(tmp_path)
    real = tmp_path / "real"
    real.mkdir()
    (real / "transforms.json").write_text("{}")
    with pytest.raises(CaptureError, match="not a generated flight"):
        find_flights(tmp_path)
    (real / "city.json").write_text(json.dumps({"generator": "a camera"}))
    with pytest.raises(CaptureError, match="expected generator"):
        find_flights(tmp_path)


def test_holding_out_every_flight_is_refused(flights: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="held_out: expected fewer than the 2 flights, received 2"
    ):
        train(replace(CONFIG, held_out=2), flights, tmp_path / "init.pt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner_step: 3", "did you mean|expected inner_steps"),
        ("episodes: 0", "episodes: expected at least 1"),
        ("outer_rate: 0", "outer_rate: expected more than 0"),
        ("seed: one", "seed: expected a whole number"),
        ("[1]", "expected keys and values"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "city.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_city_config(path)


def test_the_command_writes_an_init_and_says_how_far_it_is(flights: Path, tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2] / "configs/meta/city.yaml"
    load_city_config(shipped)
    config, out = tmp_path / "city.yaml", tmp_path / "out" / "init.pt"
    config.write_text("episodes: 1\ninner_steps: 1\nframes: 6\nheld_out: 0\n")
    command = ["city", "--config", str(config), "--flights", str(flights), "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "episode 1/1" in result.output
    assert load_init(out).meta["config"]["episodes"] == 1
