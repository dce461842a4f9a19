"""World frames: what is near is converted, what is far gets a site, what cannot be is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mclnf_edge.config import MapConfig
from mclnf_edge.errors import FrameRejected
from mclnf_edge.geometry import pose_from
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.mapping.sites import Sites
from mclnf_edge.types import WorldFrame
from tests.mapping import flights
from tests.mapping.flights import ADAPT, CELL_M, FIELD

WARSAW = WorldFrame("local-enu", (52.2, 21.0, 100.0))
NEAR = WorldFrame("local-enu", (52.21, 21.0, 100.0))
FAR = WorldFrame("local-enu", (40.0, -105.0, 1600.0))


def test_near_frames_share_a_site_and_far_ones_do_not() -> None:
    meta: dict[str, Any] = {}
    for world in (WARSAW, NEAR, FAR, FAR):
        meta |= Sites(meta).add(world)
    assert set(meta) == {"world", "world.1"}
    sites = Sites(meta)
    pose = np.eye(4)
    assert sites.find(WARSAW)(pose)[0] == 0 and sites.find(FAR)(pose)[0] == 1
    site, placed = sites.find(NEAR)(pose)
    assert site == 0 and placed[1, 3] == pytest.approx(1112, abs=2)  # 0.01 degrees north
    np.testing.assert_array_equal(sites.find(None)(pose)[1], pose)


def test_what_is_not_mapped_or_cannot_be_converted_is_refused() -> None:
    sites = Sites(Sites({}).add(WARSAW))
    with pytest.raises(FrameRejected, match="nothing is mapped within 100 km"):
        sites.find(FAR)
    with pytest.raises(FrameRejected, match="cannot convert"):
        sites.add(WorldFrame("local-enu"))
    with pytest.raises(FrameRejected, match="no map is in EPSG:4979"):
        Sites({}).add(WorldFrame("EPSG:4979"))


def test_frames_without_a_place_go_where_their_poses_are() -> None:
    """UTM and geographic streams that name no origin find the site that each pose is near."""
    meta: dict[str, Any] = {}
    for world in (WARSAW, FAR):
        meta |= Sites(meta).add(world)
    sites = Sites(meta)
    for world in (WorldFrame("EPSG:4979"), WorldFrame("EPSG:32634"), WorldFrame("EPSG:32613")):
        assert sites.add(world) == {}, "no site of its own"
    geographic = sites.find(WorldFrame("EPSG:4979"))
    for i, site in enumerate((WARSAW, FAR)):
        here, placed = geographic(pose_from(np.eye(3), site.origin))
        assert here == i
        np.testing.assert_allclose(placed, np.eye(4), atol=1e-6)
    with pytest.raises(FrameRejected, match="nothing is mapped within 100 km"):
        geographic(pose_from(np.eye(3), [48.0, 11.0, 500.0]))
    assert sites.find(WorldFrame("EPSG:32613"))(pose_from(np.eye(3), [5e5, 4.43e6, 1600]))[0] == 1


def test_a_map_that_begins_geographically_is_local() -> None:
    meta = Sites({}).add(WorldFrame("EPSG:4326", WARSAW.origin))
    assert Sites(meta).worlds == [WARSAW]


def test_full_and_relative_eastings_of_one_code_share_a_site() -> None:
    meta = Sites({}).add(WorldFrame("EPSG:2180"))
    sites = Sites(meta)
    relative = WorldFrame("EPSG:2180", (637_000.0, 487_000.0, 100.0))
    assert sites.add(relative) == {}
    placed = sites.find(relative)(np.eye(4))[1]
    assert placed[:3, 3].tolist() == [637_000.0, 487_000.0, 100.0]


def test_two_sites_learn_side_by_side_and_do_not_meet() -> None:
    flight = flights.flight()
    m = Mapper(MapConfig(cell_size_m=CELL_M), FIELD, ADAPT, flights.INIT, 1)
    for i, frame in enumerate(flight.frames):
        m.add(i, flights.STREAM, frame)
    far = flight.shifted((6.7e6, -3e6, 900.0))
    for i, frame in enumerate(far.frames):
        m.add(100 + i, "session/far", frame, site=1)
    m.draining = True
    m.settle()
    flights.learn(m, 60)
    names = {module.id for module in m.modules.values()}
    assert {n.removeprefix("site1_") for n in names if n.startswith("site1_")} == {
        n for n in names if not n.startswith("site1_")
    }
    both = [
        flights.score_at(m, flight, 0),
        flights.score_at(m, far, 1),
    ]
    assert min(both) > flight.mean_psnr() + 6
    assert flights.score_at(m, flight, 1) < flight.mean_psnr() + 1, "nothing is there"
