"""The compute thread's turns, taken one by one."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from mclnf_edge.config import MapConfig, ServeConfig
from mclnf_edge.daemon.worker import Worker, pack_frame
from mclnf_edge.mapping.initialization import load_init
from mclnf_edge.store import FrameRow, MapStore
from mclnf_edge.types import Frame
from mclnf_edge.wire.codec import encode
from mclnf_edge.wire.messages import PutFrame
from tests.mapping import flights


def row(frame: Frame) -> FrameRow:
    put = PutFrame(id=frame.seq, session="s", stream="front", frame=frame)
    return FrameRow("s", "front", frame.seq, frame.timestamp, pack_frame(0, encode(put)))


def test_steps_get_their_share_of_the_time_while_frames_keep_coming(tmp_path: Path) -> None:
    config = ServeConfig(
        map=MapConfig(cell_size_m=flights.CELL_M),
        field=flights.FIELD,
        adapt=replace(flights.ADAPT, passes=100.0),
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
