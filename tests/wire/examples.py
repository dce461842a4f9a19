"""One example of every message, and small frames; the golden files are made from these."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mclnf_edge.types import Camera, Frame, Signal, View, WorldFrame
from mclnf_edge.wire.messages import (
    Ack,
    Acks,
    Closed,
    CloseTask,
    Committed,
    Drain,
    ErrorReply,
    FetchModule,
    Follow,
    Hello,
    Message,
    ModuleChunk,
    Progress,
    PutFrame,
    PutSignal,
    RenderReply,
    RenderRequest,
    StatusReply,
    StatusRequest,
    Welcome,
)

POSE = np.array(
    [[0.0, -1.0, 0.0, 691234.25], [1.0, 0.0, 0.0, 5334567.5], [0.0, 0.0, 1.0, 612.0], [0, 0, 0, 1]]
)
CAMERA = Camera(480, 270, 420.5, 420.25, 240.0, 135.0, "OPENCV", (0.1, -0.05, 1e-4, -2e-4))


def frame(seq: int = 0, image: bytes = b"\xff\xd8 picture", **changes: Any) -> Frame:
    """A small frame with every optional field set."""
    full = Frame(
        seq=seq,
        timestamp=1700000000.125 + seq,
        image=image,
        encoding="jpeg",
        camera=CAMERA,
        T_world_camera=POSE,
        name=f"DJI_{seq:04d}.JPG",
        task="block-7",
        exposure=0.0025,
        height_m=118.5,
        depth=b"\x89PNG depth",
        depth_scale_m=0.01,
        mask=b"\x89PNG mask",
    )
    return dataclasses.replace(full, **changes)


EXAMPLES: dict[str, Message] = {
    "hello": Hello(
        id=1,
        session="flight-1",
        stream="front",
        world=WorldFrame("EPSG:25832", (691000.0, 5334000.0, 500.0)),
        axes="opencv",
        client="mclnf-edge 0.1.0",
    ),
    "welcome": Welcome(
        id=1,
        protocol=(1, 0),
        server="mclnf-edge 0.1.0",
        credit_bytes=4_194_304,
        last_seq=41,
        limits={"message_bytes": 67_108_864},
        durability="wal-full",
    ),
    "put-frame": PutFrame(id=2, session="flight-1", stream="front", frame=frame(42)),
    "put-frame-least": PutFrame(
        id=3,
        session="flight-1",
        stream="front",
        frame=Frame(0, 0.0, b"x", "raw", Camera(1, 1, 1.0, 1.0, 0.5, 0.5), np.eye(4)),
    ),
    "put-signal": PutSignal(
        id=4,
        session="talk",
        stream="microphone",
        signal=Signal(7, 3.5, b"\0\1\2\3", "s16le", (2, 1), 16_000.0, task="word"),
    ),
    "acks": Acks(
        acks=(
            Ack(session="flight-1", stream="front", seq=42, status="accepted"),
            Ack(session="flight-1", stream="front", seq=43, status="busy", retry_ms=250),
            Ack(
                session="flight-1",
                stream="front",
                seq=44,
                status="rejected",
                code="rejected",
                reason="T_world_camera: expected a rotation, determinant is 0.5",
            ),
        ),
        credit_bytes=2_097_152,
        durability="wal-full",
    ),
    "render": RenderRequest(
        id=5,
        view=View(CAMERA, POSE, 1700000003.5, "front", 0.0025, WorldFrame("EPSG:2180")),
        width=240,
        height=135,
        quality="progressive",
        want=("depth", "known"),
        deadline_ms=500,
    ),
    "render-span": RenderRequest(
        id=6, span_s=(0.5, 1.5), session="talk", stream="microphone", rate_hz=8e3, encoding="wav"
    ),
    "render-reply": RenderReply(
        id=5,
        data=b"\x89PNG",
        width=2,
        height=1,
        depth=bytes.fromhex("7801636068b067605070000004c30120"),
        known=bytes.fromhex("780163b061b0000000f00075"),
        map_version=9,
        modules=("g0_0", "g0_1"),
        engine="torch",
        ms=12.5,
    ),
    "status": StatusRequest(id=7),
    "status-reply": StatusReply.of({"modules": [], "uptime_s": 3.5}, id=7),
    "close-task": CloseTask(id=8, session="flight-1", stream="front", task="block-7"),
    "closed": Closed(id=8, tasks=("block-7",)),
    "drain": Drain(id=9),
    "progress": Progress(id=9, frames_waiting=3, modules_open=1, steps=64, seconds_left=12.0),
    "follow": Follow(id=10, after=3),
    "committed": Committed(
        id=10,
        body=bytes.fromhex("789cab56ca4d2c50b252a8aed55150cacd4f29cd492d0672a3636b0170040868"),
        last="5e" * 32,
        total=4,
        frame_bytes=1_589_588,
    ),
    "fetch-module": FetchModule(id=11, module="cell_0_-1", version=2, offset=65_536, length=4_096),
    "module-chunk": ModuleChunk(id=11, data=b"\x80\1\0\0", offset=65_536, sha256="c0" * 32),
    "error": ErrorReply(id=5, code="stale", message="deadline of 500 ms passed\n"),
}


def plain(value: Any) -> Any:
    """`value` as nested plain values, so that messages with arrays can be compared."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"": type(value).__name__, **fields}
    return value
