"""World frames: what is near is converted, what is far gets a site, what cannot be is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mclnf_edge.config import MapConfig
from mclnf_edge.errors import FrameRejected
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
    assert sites.find(WARSAW)[0] == 0 and sites.find(FAR)[0] == 1
    site, transform = sites.find(NEAR)
    assert site == 0 and transform[1, 3] == pytest.approx(1112, abs=2)  # 0.01 degrees north
    np.testing.assert_array_equal(sites.find(None)[1], np.eye(4))


def test_what_is_not_mapped_or_cannot_be_converted_is_refused() -> None:
    sites = Sites(Sites({}).add(WARSAW))
    with pytest.raises(FrameRejected, match="nothing is mapped within 100 km"):
        sites.find(FAR)
    for other in (WorldFrame("local-enu"), WorldFrame("EPSG:2180")):
        with pytest.raises(FrameRejected, match="cannot convert"):
            sites.add(other)


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
