"""What a view's exposure is told from: time, the map's brightness, metadata; and how it is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mclnf_edge.inference.renderer import Renderer
from mclnf_edge.mapping.exposures import Exposures, Taken, predict, update
from tests.mapping import flights

TIMES = np.arange(40) * 2.0


def told(taken: list[Taken], held: int, brightness: float, exposure: float = np.nan) -> float:
    """Mean gain of frame `held`, from all others."""
    rest = [i for i in range(len(taken)) if i != held]
    at = np.array([TIMES[held], brightness, exposure])
    return float(predict(TIMES[rest], [taken[i] for i in rest], at).mean())


def frame(gain: float, scene: float, exposure: float = np.nan) -> Taken:
    """A frame of a place whose log brightness in the map is `scene`."""
    return Taken(np.full(3, gain, np.float32), gain + scene, exposure)


def test_a_camera_that_exposes_automatically_is_understood() -> None:
    scenes = np.random.default_rng(0).normal(-1.0, 0.2, len(TIMES))
    taken = [frame(-1.0 - s, s) for s in scenes]
    for held in (0, 7, 20, 39):
        true = -1.0 - scenes[held]
        assert abs(told(taken, held, scenes[held]) - true) < 0.03
        assert abs(told(taken, held, scenes[held] + 0.3) - true) > 0.2, "brightness decides"


def test_brightness_does_not_count_where_gains_only_drift() -> None:
    random = np.random.default_rng(1)
    scenes = random.normal(-1.0, 0.3, len(TIMES))
    gains = 0.2 * np.sin(TIMES / 15.0)
    taken = [frame(g, s) for g, s in zip(gains, scenes, strict=True)]
    for held in (5, 18, 33):
        assert abs(told(taken, held, scenes[held]) - gains[held]) < 0.03
        assert abs(told(taken, held, scenes[held] + 0.5) - gains[held]) < 0.06


def test_metadata_counts() -> None:
    stops = np.random.default_rng(2).normal(0.0, 0.5, len(TIMES))
    taken = [frame(0.45 * e, -1.0, e) for e in stops]
    missed = [abs(told(taken, held, -1.0, stops[held]) - 0.45 * stops[held]) for held in range(40)]
    blind = [abs(told(taken, held, -1.0) - 0.45 * stops[held]) for held in range(40)]
    assert max(missed) < 0.05 and max(blind) > 0.2


def test_jitter_is_averaged_over_instead_of_followed() -> None:
    gains = np.random.default_rng(3).normal(0.0, 0.1, len(TIMES))
    taken = [frame(g, -1.0) for g in gains]
    inner = range(1, 39)
    missed = [told(taken, held, -1.0) - gains[held] for held in inner]
    followed = [(gains[held - 1] + gains[held + 1]) / 2 - gains[held] for held in inner]
    assert np.square(missed).mean() < 0.9 * np.square(followed).mean()


@pytest.mark.parametrize("brightness", [0.0, 0.5, 1.0])
def test_few_frames_say_something_sensible(brightness: float) -> None:
    known = Exposures()
    assert np.array_equal(known.meter("a", 1.0)(brightness), np.zeros(3))
    known.load({"s/a": [[0.0, 0.2, 0.1, 0.0]]})  # as maps were stored without brightness
    assert np.array_equal(known.meter("a", None)(brightness), np.zeros(3))
    assert np.allclose(known.meter("a", 9.0)(brightness), [0.2, 0.1, 0.0], atol=0.03)
    known.load({"s/a": [[0.0, 0.3, 0.3, 0.3, -1.0, None]]})
    assert np.allclose(known.meter("a", 0.0)(brightness), 0.3), "its own moment"
    known.load({"s/a": [[0.0, 0.1, 0.1, 0.1, -1.0, 2.0]], "s/b": [[0.0, 0.4, 0.4, 0.4, -1.0, 2.0]]})
    for stream in ("", "unheard"):
        assert np.isfinite(known.meter(stream, 0.5, 7.0)(brightness)).all()


def test_what_is_kept_comes_back() -> None:
    known = Exposures()
    known.load({"s/a": [[t, 0.1 * t, 0.0, 0.0, -1.0 + t, None] for t in (0.0, 1.0, 3.0)]})
    again = Exposures()
    again.load(json.loads(json.dumps(known.rows(), allow_nan=False)))
    assert known.rows() == again.rows()
    assert np.array_equal(known.meter("a", 2.0)(0.4), again.meter("a", 2.0)(0.4))


def test_a_view_is_metered_by_what_the_map_shows_of_it() -> None:
    flight = flights.flight()
    m = flights.mapper(flight.frames)
    flights.learn(m, 3)
    asked: list[float] = []

    def meter(brightness: float) -> np.ndarray:
        asked.append(brightness)
        return np.full(3, 0.5, np.float32)

    renderer, view = Renderer(), flight.views[0]
    assert np.all(renderer.gain(m.pool, m.origins[0], view, meter) == 0.5)
    shown = flights.render(m, view)
    assert abs(asked[0] - shown.rgb[shown.known > 0.5].mean() / 255) < 0.02
    away = replace(view, T_world_camera=view.T_world_camera.copy())
    away.T_world_camera[0, 3] += 1e5
    renderer.gain(m.pool, m.origins[0], away, meter)
    assert abs(asked[1] - 0.5) < 0.01, "nothing is known there"


def test_a_ray_without_a_number_moves_no_exposure() -> None:
    held = SimpleNamespace(gain=np.zeros(3, np.float32), anchored=False)
    which = np.zeros(3, np.int32)
    residual, shown = np.full((3, 3), 0.1, np.float32), np.full((3, 3), 0.5, np.float32)
    residual[1], shown[2] = np.nan, np.inf
    update([held], which, residual, shown)  # type: ignore[list-item]
    assert np.isfinite(held.gain).all() and (held.gain != 0).all()
