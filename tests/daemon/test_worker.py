"""The compute thread's turns, taken one by one."""

from __future__ import annotations

import resource
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mclnf_edge.config import MapConfig, ServeConfig
from mclnf_edge.daemon.service import Service, _of_its_cells, _take_descriptors
from mclnf_edge.daemon.signal_replies import _size
from mclnf_edge.daemon.worker import Worker, pack_frame
from mclnf_edge.errors import MapMismatch, ProtocolError
from mclnf_edge.mapping.initialization import load_init
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.store import FrameRow, MapStore, map_info
from mclnf_edge.types import Frame
from mclnf_edge.wire.codec import decode, encode
from mclnf_edge.wire.messages import (
    MAX_PART_BYTES,
    ErrorReply,
    PutFrame,
    RenderReply,
    RenderRequest,
)
from tests.mapping import flights


def row(frame: Frame) -> FrameRow:
    put = PutFrame(id=frame.seq, session="s", stream="front", frame=frame)
    return FrameRow("s", "front", frame.seq, frame.timestamp, pack_frame(0, encode(put)))


def test_steps_get_their_share_of_the_time_while_frames_keep_coming(tmp_path: Path) -> None:
    config = ServeConfig(
        map=MapConfig(cell_size_m=flights.CELL_M),
        field=flights.FIELD,
        adapt=replace(flights.ADAPT, passes=100.0, rays_per_step=512),
    )
    frames = flights.flight().frames
    with MapStore.open(tmp_path / "map", meta={"init": "0"}) as store:
        store.put_stream("s", "front", {})
        store.put_frames([row(frame) for frame in frames[:3]])
        worker = Worker(config, store, load_init(None), lambda peer, message: None, 1)
        taking, steps = [], []
        take_in = worker._take_in

        def timed() -> bool:
            began = time.monotonic()
            busy = take_in()
            taking.append(time.monotonic() - began)
            return busy

        worker._take_in = timed  # type: ignore[method-assign]
        worker._turn()  # compiles
        taking.clear()
        began = time.monotonic()
        for frame in frames[3:]:
            store.put_frames([row(frame)])
            read = worker._last_id
            while worker._last_id == read:  # every turn brings a frame, as a fast flight does
                worker._turn()
            steps.append(worker.mapper.optimizer.steps)
        spent = time.monotonic() - began
        assert sum(taking) < 0.8 * spent, "cells and seeds leave time for steps"
        assert steps[-1] > 2 * len(steps), "not one step for each frame"
        assert worker.mapper.pool is not None and len(worker.mapper.frames) == len(frames)


def a_worker(store: MapStore, **settings: Any) -> Worker:
    config = ServeConfig(map=MapConfig(**settings), field=flights.FIELD, adapt=flights.ADAPT)
    return Worker(config, store, load_init(None), lambda peer, message: None, 1)


def test_a_found_cell_size_is_the_maps_from_then_on(tmp_path: Path) -> None:
    with MapStore.open(tmp_path / "map", meta={"init": "0"}) as store:
        store.put_stream("s", "front", {})
        store.put_frames([row(frame) for frame in flights.flight().frames])
        worker = a_worker(store)
        while not worker.mapper.learning():
            worker._turn()
        found = store.meta()["cell_size_m"]
        assert isinstance(worker.mapper, Mapper) and worker.mapper.pool is not None
        assert found == worker.mapper.pool.cell_m
    with pytest.raises(MapMismatch, match="cell_size_m"):
        MapStore.open(tmp_path / "map", meta={"cell_size_m": 80.0})
    with MapStore.open(tmp_path / "map", meta={"cell_size_m": found}) as store:
        assert _of_its_cells(ServeConfig(), store.meta()).map.cell_size_m == found


def test_map_info_knows_what_is_open(tmp_path: Path) -> None:
    with MapStore.open(tmp_path / "map", meta={"init": "0"}) as store:
        store.put_stream("s", "front", {})
        store.put_frames([row(frame) for frame in flights.flight().frames])
        worker = a_worker(store, cell_size_m=flights.CELL_M)
        while not worker.mapper.learning():
            worker._turn()
        worker._checkpoint()
        told = map_info(tmp_path / "map")["modules"]
        assert [m["id"] for m in told] == [m.id for m in worker.mapper.learning()]
        assert {m["state"] for m in told} == {"open"} and told[0]["streams"] == ["s/front"]
        assert set(told[0]) >= {"version", "steps", "frames", "bounds", "digest", "psnr"}
        worker.drain(close=True)
        while not worker.progress_of(1).done:
            worker._turn()
        told = map_info(tmp_path / "map")["modules"]
        assert {m["state"] for m in told} == {"closed"}, "the checkpoint is older than they are"


def test_two_frames_are_taken_whatever_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MapStore.open(tmp_path / "map", meta={"init": "0"}) as store:
        store.put_stream("s", "front", {})
        store.put_frames([row(frame) for frame in flights.flight().frames])
        worker = a_worker(store, cell_size_m=flights.CELL_M, inactivity_s=3600.0)
        monkeypatch.setattr(Mapper, "held_bytes", property(lambda _: 1 << 40))
        worker.drain(close=True)
        end = time.monotonic() + 120
        while not worker.progress_of(1).done and time.monotonic() < end:
            worker._turn()
        assert store.counts()["done"] == 8 and store.counts()["held"] == 0


def test_a_frame_that_fails_later_counts_as_rejected(tmp_path: Path) -> None:
    frame = replace(flights.flight().frames[0], image=b"damaged on the way")
    with MapStore.open(tmp_path / "map", meta={"init": "0"}) as store:
        store.put_stream("s", "front", {})
        store.put_frames([row(frame)])
        a_worker(store)._turn()
        assert store.streams()[0]["rejected"] == 1 and store.counts()["held"] == 0


def test_damaged_checkpoints_lose_open_work_not_the_map(tmp_path: Path) -> None:
    with MapStore.open(tmp_path / "map", meta={"init": "0"}) as store:
        store.put_stream("s", "front", {})
        store.put_frames([row(frame) for frame in flights.flight().frames])
        first = a_worker(store, cell_size_m=flights.CELL_M)
        first._turn()
        first._checkpoint()
        files = list((tmp_path / "map" / "checkpoints").glob("*.ckpt"))
        for file in files:
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        again = a_worker(store, cell_size_m=flights.CELL_M)
        again._restore()
        assert not again.mapper.learning() and again._take_in() and again.mapper.learning()
        again._checkpoint()
        assert all(file.with_name(file.name + ".damaged").exists() for file in files)


def test_a_reply_that_is_too_large_ends_nobodys_daemon() -> None:
    sent: list[tuple[bytes, list[bytes]]] = []
    service = SimpleNamespace(endpoint=SimpleNamespace(send=lambda *told: sent.append(told)))
    reply = RenderReply(
        id=7, data=bytes(MAX_PART_BYTES + 1), encoding="raw", width=1, height=1, engine="x"
    )
    Service._send(service, b"peer", reply)  # type: ignore[arg-type]
    ((_, parts),) = sent
    told = decode(parts)
    assert isinstance(told, ErrorReply) and told.id == 7 and "at most" in told.message
    asked = RenderRequest(id=1, time_s=0.0, encoding="raw", width=3345, height=3345)
    with pytest.raises(ProtocolError, match="pixels as raw"):
        _size(asked, 10, 10, 100)
    assert _size(replace(asked, encoding="png"), 10, 10, 100) == (3345, 3345)


def test_as_many_files_may_be_open_as_the_system_allows() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        _take_descriptors()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
