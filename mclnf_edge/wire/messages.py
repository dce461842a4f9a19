"""The messages of the wire protocol as frozen dataclasses; PROTOCOL.md is their document.

A field's type and its `Rule` are the whole schema: the codec is derived from them. A field added
after version 1.0 has a default, and no field is renamed, retyped or reordered in meaning.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from mclnf_edge.errors import ProtocolError
from mclnf_edge.types import Camera, Frame, Modality, Signal, View, WorldFrame

PROTOCOL = (1, 1)
"""(major, minor) of this side. The major changes only when an older peer could misread us."""

OLDEST_MAJOR = 1
"""The oldest major that is still read: the one before ours, once there is one."""

KIB, MIB = 1024, 1024 * 1024
MAX_PARTS = 8
MAX_HEADER_BYTES = 256 * KIB
MAX_PART_BYTES = 32 * MIB
MAX_MESSAGE_BYTES = 64 * MIB
MAX_INT = 2**63 - 1

Axes = Literal["opengl", "opencv"]
AckStatus = Literal["accepted", "duplicate", "redundant", "busy", "rejected"]
Quality = Literal["preview", "full", "progressive"]
ReplyEncoding = Literal["png", "jpeg", "raw", "wav"]
Plane = Literal["depth", "known"]
PlaneType = Literal["float32", "float16"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a field may hold.

    `lo`..`hi` bound a number's value (each number's in a tuple) or a text's or part's length;
    `max_items` bounds a tuple or map. A `part` field travels as its own message part. Text is
    printable, so that it can stand in a log line, unless `free_text`. Without `travels` the field
    stays at home and arrives as its default.
    """

    lo: float | None = None
    hi: float | None = None
    max_items: int = 4096
    part: bool = False
    free_text: bool = False
    travels: bool = True


Id = Annotated[int, Rule(0, MAX_INT)]
Count = Annotated[int, Rule(0, MAX_INT)]
Name = Annotated[str, Rule(1, 128)]
Label = Annotated[str, Rule(0, 512)]
Prose = Annotated[str, Rule(0, 4096, free_text=True)]
Seconds = Annotated[float, Rule(-1e12, 1e12)]
Milliseconds = Annotated[int, Rule(0, 86_400_000)]
Pixels = Annotated[int, Rule(0, 65_535)]

_POSITIVE = Rule(1e-12, 1e12)
FOREIGN_RULES: dict[type, dict[str, Rule]] = {
    Frame: {
        "seq": Rule(0, MAX_INT),
        "timestamp": Rule(-1e12, 1e12),
        "image": Rule(1, MAX_PART_BYTES, part=True),
        "T_world_camera": Rule(-1e9, 1e9),
        "name": Rule(0, 512),
        "task": Rule(1, 128),
        "exposure": _POSITIVE,
        "height_m": Rule(-1e6, 1e6),
        "depth": Rule(1, MAX_PART_BYTES, part=True),
        "depth_scale_m": Rule(1e-9, 1e3),
        "mask": Rule(1, MAX_PART_BYTES, part=True),
        "meta": Rule(travels=False),
    },
    Signal: {
        "seq": Rule(0, MAX_INT),
        "timestamp": Rule(-1e12, 1e12),
        "data": Rule(1, MAX_PART_BYTES, part=True),
        "shape": Rule(1, MAX_PART_BYTES, max_items=3),
        "rate_hz": Rule(0, 1e9),
        "name": Rule(0, 512),
        "task": Rule(1, 128),
    },
    Camera: {
        "width": Rule(1, 65_535),
        "height": Rule(1, 65_535),
        "fx": Rule(1e-3, 1e7),
        "fy": Rule(1e-3, 1e7),
        "cx": Rule(-1e7, 1e7),
        "cy": Rule(-1e7, 1e7),
        "distortion": Rule(-1e6, 1e6, max_items=12),
    },
    WorldFrame: {"crs": Rule(1, 64), "origin": Rule(-1e9, 1e9)},
    View: {
        "T_world_camera": Rule(-1e9, 1e9),
        "timestamp": Rule(-1e12, 1e12),
        "stream": Rule(0, 128),
        "exposure": _POSITIVE,
    },
}
"""The rules of the records of `mclnf_edge.types` that travel inside messages."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """Base of every message. `id` is chosen by the asker; every reply to it carries the same."""

    tag: ClassVar[str] = ""
    id: Id = 0


@dataclass(frozen=True, kw_only=True)
class Hello(Message):
    """Announces one stream of one session on this connection; answered by `Welcome`.

    `axes` names the camera axes of the poses that follow. `client` is the sender's name and
    version, for the log.
    """

    tag: ClassVar[str] = "hello"
    session: Name
    stream: Name = "camera"
    modality: Modality = "posed"
    world: WorldFrame = WorldFrame()
    axes: Axes = "opengl"
    client: Label = ""


@dataclass(frozen=True, kw_only=True)
class Welcome(Message):
    """Answers `Hello`.

    `credit_bytes` may be unanswered at once. `last_seq` is the largest sequence number kept of
    this (session, stream), -1 for none. `limits` names further bounds (`message_bytes`).
    """

    tag: ClassVar[str] = "welcome"
    protocol: tuple[int, int] = PROTOCOL
    server: Label = ""
    modality: Modality = "posed"
    credit_bytes: Count = 0
    last_seq: Annotated[int, Rule(-1, MAX_INT)] = -1
    limits: Annotated[dict[str, int], Rule(max_items=64)] = dataclasses.field(default_factory=dict)
    durability: Label = ""


@dataclass(frozen=True, kw_only=True)
class PutFrame(Message):
    """One posed picture; (session, stream, frame.seq) is its identity. Answered in `Acks`."""

    tag: ClassVar[str] = "put-frame"
    session: Name
    stream: Name
    frame: Frame

    @property
    def identity(self) -> Identity:
        """(session, stream, seq)."""
        return self.session, self.stream, self.frame.seq


@dataclass(frozen=True, kw_only=True)
class PutSignal(Message):
    """One piece of a signal; (session, stream, signal.seq) is its identity. Answered in `Acks`."""

    tag: ClassVar[str] = "put-signal"
    session: Name
    stream: Name
    signal: Signal

    @property
    def identity(self) -> Identity:
        """(session, stream, seq)."""
        return self.session, self.stream, self.signal.seq


Put = PutFrame | PutSignal
Identity = tuple[str, str, int]
"""(session, stream, seq): the same identity is the same frame, however often it is sent."""


@dataclass(frozen=True, kw_only=True)
class Ack:
    """What became of one frame.

    accepted: kept, with the durability named in `Acks`; duplicate: this identity is already kept;
    redundant: seen, adds nothing, not kept; busy: not kept, send it again after `retry_ms`;
    rejected: not kept and never will be, `code` and `reason` say why.
    """

    session: Name
    stream: Name
    seq: Id
    status: AckStatus
    code: Label = ""
    reason: Prose = ""
    retry_ms: Milliseconds = 0

    @property
    def identity(self) -> Identity:
        """(session, stream, seq)."""
        return self.session, self.stream, self.seq


@dataclass(frozen=True, kw_only=True)
class Acks(Message):
    """Answers to frames, those of one group commit together.

    `credit_bytes` is the publisher's whole window from now on, not an increment. `durability`
    names what "accepted" stands for, for example `wal-full`.
    """

    tag: ClassVar[str] = "acks"
    acks: tuple[Ack, ...]
    credit_bytes: Count = 0
    durability: Label = ""


@dataclass(frozen=True, kw_only=True)
class RenderRequest(Message):
    """Asks for a view (posed maps), or for `time_s` or `span_s` of a signal.

    `width` and `height` 0 mean the view's own size (the signal's own). `deadline_ms` counts from
    arrival, 0 for none; a request past it is answered with the error `stale`. `progressive` gets
    a preview first, then the full picture with `final`.
    """

    tag: ClassVar[str] = "render"
    view: View | None = None
    time_s: Seconds | None = None
    span_s: tuple[Seconds, Seconds] | None = None
    session: Annotated[str, Rule(0, 128)] = ""
    stream: Annotated[str, Rule(0, 128)] = ""
    width: Pixels = 0
    height: Pixels = 0
    rate_hz: Annotated[float, Rule(0, 1e9)] = 0.0
    quality: Quality = "full"
    encoding: ReplyEncoding = "png"
    want: Annotated[tuple[Plane, ...], Rule(max_items=4)] = ()
    deadline_ms: Milliseconds = 0


@dataclass(frozen=True, kw_only=True)
class RenderReply(Message):
    """A rendered view or signal; `data` is the picture or sound in `encoding`.

    `depth` and `known` are (height, width) row-major planes of their type, little endian,
    zlib-compressed. `engine` computed it in `ms` milliseconds.
    """

    tag: ClassVar[str] = "render-reply"
    data: Annotated[bytes, Rule(0, MAX_PART_BYTES, part=True)] = b""
    encoding: ReplyEncoding = "png"
    width: Pixels = 0
    height: Pixels = 0
    rate_hz: Annotated[float, Rule(0, 1e9)] = 0.0
    depth: Annotated[bytes | None, Rule(0, MAX_PART_BYTES, part=True)] = None
    depth_type: PlaneType = "float32"
    known: Annotated[bytes | None, Rule(0, MAX_PART_BYTES, part=True)] = None
    known_type: PlaneType = "float16"
    map_version: Count = 0
    modules: tuple[Label, ...] = ()
    engine: Label = ""
    ms: Annotated[float, Rule(0, 1e9)] = 0.0
    final: bool = True


@dataclass(frozen=True, kw_only=True)
class StatusRequest(Message):
    """Asks for the daemon's state; answered by `StatusReply`."""

    tag: ClassVar[str] = "status"


@dataclass(frozen=True, kw_only=True)
class StatusReply(Message):
    """The daemon's state as one JSON object in its own part (a large map has a long list)."""

    tag: ClassVar[str] = "status-reply"
    body: Annotated[bytes, Rule(2, MAX_PART_BYTES, part=True)] = b"{}"

    @classmethod
    def of(cls, status: dict[str, Any], id: int = 0) -> StatusReply:
        """Wrap a JSON-able dict; raises ValueError for NaN, which JSON does not have."""
        return cls(id=id, body=json.dumps(status, allow_nan=False).encode())

    def status(self) -> dict[str, Any]:
        """The dict; raises ProtocolError when the body is not a JSON object."""
        try:
            status = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"status-reply.body: expected JSON: {error}") from error
        if not isinstance(status, dict):
            raise ProtocolError(f"status-reply.body: expected an object, received {type(status)}")
        return status


@dataclass(frozen=True, kw_only=True)
class CloseTask(Message):
    """Closes a stream's open task (`task` None: all its open tasks); answered by `Closed`."""

    tag: ClassVar[str] = "close-task"
    session: Name
    stream: Name
    task: Name | None = None


@dataclass(frozen=True, kw_only=True)
class Closed(Message):
    """What a `CloseTask` closes: the task that was named, else the stream's open modules."""

    tag: ClassVar[str] = "closed"
    tasks: tuple[Label, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Drain(Message):
    """Wait until everything accepted is adapted; `close` also closes every open task.

    Answered by `Progress` at least once a second, the last one with `done`.
    """

    tag: ClassVar[str] = "drain"
    close: bool = True


@dataclass(frozen=True, kw_only=True)
class Progress(Message):
    """How far a `Drain` is. `seconds_left` is None when unknown."""

    tag: ClassVar[str] = "progress"
    done: bool = False
    frames_waiting: Count = 0
    modules_open: Count = 0
    modules_closed: Count = 0
    steps: Count = 0
    steps_total: Count = 0
    psnr: Annotated[float | None, Rule(-1e3, 1e3)] = None
    seconds_left: Annotated[float | None, Rule(0, 1e9)] = None


@dataclass(frozen=True, kw_only=True)
class Follow(Message):
    """Asks for the modules committed after the first `after`; answered by `Committed`."""

    tag: ClassVar[str] = "follow"
    after: Count = 0


@dataclass(frozen=True, kw_only=True)
class Committed(Message):
    """Some of the modules that `Follow` asked for, in order of commit; `total` are there in all.

    `body` is zlib-compressed JSON, see `mclnf_edge.wire.mirroring`. `last` is the digest of the
    module before them, "" for none: the follower's own last one, unless the maps differ.
    `frame_bytes` is what the frames taken so far amount to.
    """

    tag: ClassVar[str] = "committed"
    body: Annotated[bytes, Rule(1, MAX_PART_BYTES, part=True)]
    last: Label = ""
    total: Count = 0
    frame_bytes: Count = 0


@dataclass(frozen=True, kw_only=True)
class FetchModule(Message):
    """Asks for `length` bytes from `offset` of a committed module; answered by `ModuleChunk`."""

    tag: ClassVar[str] = "fetch-module"
    module: Name
    version: Count
    offset: Count = 0
    length: Annotated[int, Rule(1, MIB)] = 64 * KIB


@dataclass(frozen=True, kw_only=True)
class ModuleChunk(Message):
    """Bytes of a module's file from `offset` on; `sha256` is theirs, in hexadecimal digits."""

    tag: ClassVar[str] = "module-chunk"
    data: Annotated[bytes, Rule(0, MIB, part=True)]
    offset: Count = 0
    sha256: Label = ""


@dataclass(frozen=True, kw_only=True)
class ErrorReply(Message):
    """A request that cannot be carried out. `code` is the stable name, `message` is for people."""

    tag: ClassVar[str] = "error"
    code: Label = "error"
    message: Prose = ""


MESSAGES: dict[str, type[Message]] = {
    cls.tag: cls
    for cls in (
        *(Hello, Welcome, PutFrame, PutSignal, Acks, RenderRequest, RenderReply),
        *(StatusRequest, StatusReply, CloseTask, Closed, Drain, Progress),
        *(Follow, Committed, FetchModule, ModuleChunk, ErrorReply),
    )
}
"""Every message by its tag."""


def answer(put: Put, status: AckStatus, code: str = "", reason: str = "", retry_ms: int = 0) -> Ack:
    """The `Ack` of `put`; a reason longer than its field is cut."""
    session, stream, seq = put.identity
    return Ack(
        session=session,
        stream=stream,
        seq=seq,
        status=status,
        code=code,
        reason=reason[:4096],
        retry_ms=retry_ms,
    )


def opengl_frame(frame: Frame, axes: Axes) -> Frame:
    """`frame` with its pose in OpenGL camera axes, whatever axes its stream announced."""
    if axes == "opengl":
        return frame
    pose = frame.T_world_camera @ np.diag([1.0, -1.0, -1.0, 1.0])
    return dataclasses.replace(frame, T_world_camera=pose)
