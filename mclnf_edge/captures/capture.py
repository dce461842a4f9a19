"""A capture: posed pictures on disk, known at once, read one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, overload

from mclnf_edge.captures.exif import exposure_from_jpeg
from mclnf_edge.errors import CaptureError, FrameRejected
from mclnf_edge.geometry import check_camera, check_pose
from mclnf_edge.images import check_image, image_info
from mclnf_edge.types import Camera, Frame, Matrix4, Split, WorldFrame
from mclnf_edge.world_frames import beginning_at

SplitFilter = Literal["train", "val", "test", "all"]
SPLITS: Final = ("train", "val", "test", "all")
_MAX_NAME: Final = 128
"""Characters of a stream's name on the wire, which a capture's becomes."""
TEST_EVERY: Final = 8
"""Without a split of its own, a capture's 8th, 16th, ... frame is `test`."""

_HEADER_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Record:
    """What is known about a frame before its picture is read.

    `exposure` None means: look into the picture's EXIF. `depth` and `mask` read PNG bytes when the
    frame is read. `timestamp` None and `split` None are filled in by `make_capture`.
    """

    name: str
    image: Path
    camera: Camera
    T_world_camera: Matrix4
    timestamp: float | None = None
    split: Split | None = None
    exposure: float | None = None
    height_m: float | None = None
    task: str | None = None
    depth: Callable[[], tuple[bytes, float]] | None = None
    mask: Callable[[], bytes] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    seq: int = 0


class Frames(Sequence[Frame]):
    """The frames of `records`; each access reads one picture from disk and keeps nothing."""

    def __init__(self, records: Sequence[Record]) -> None:
        """Keep the records; no file is touched."""
        self.records = tuple(records)

    def __len__(self) -> int:
        """How many frames there are."""
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Frame: ...
    @overload
    def __getitem__(self, index: slice) -> Frames: ...
    def __getitem__(self, index: int | slice) -> Frame | Frames:
        """One frame, read now, or a part of the sequence, still unread."""
        if isinstance(index, slice):
            return Frames(self.records[index])
        return read_frame(self.records[index])


@dataclass(frozen=True)
class Capture:
    """Posed pictures in capture order.

    `seq` of a frame is its place in the whole capture and stays the same in a `split`. `notes` say
    in words what a user should know: what was left out, what was assumed.
    """

    name: str
    format: str
    world: WorldFrame
    frames: Frames
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many frames there are."""
        return len(self.frames)

    def __iter__(self) -> Iterator[Frame]:
        """The frames in order, each read when its turn comes."""
        return iter(self.frames)

    def in_world(self, world: WorldFrame) -> Capture:
        """The same poses said to be in `world`; CaptureError when they already have a frame.

        Geographic poses without an origin for their map get the first one's position.
        """
        if self.world != WorldFrame():
            raise CaptureError(f"world: {self.name} says itself that it is in {self.world.crs}")
        try:
            begun = beginning_at(world, self.frames.records[0].T_world_camera)
        except FrameRejected as error:
            raise CaptureError(f"{self.name}: {error}") from None
        return replace(self, world=begun)

    def split(self, which: SplitFilter) -> Capture:
        """The frames of one split, or all; CaptureError for another word."""
        if which not in SPLITS:
            raise CaptureError(f"split: expected one of {', '.join(SPLITS)}, received {which!r}")
        kept = [r for r in self.frames.records if which in ("all", r.split)]
        return replace(self, frames=Frames(kept))

    def fold(self, offset: int | None) -> Capture:
        """The same frames with every TEST_EVERY-th from `offset` on as `test`, the rest `train`.

        None keeps the capture's own splits; CaptureError for an offset beyond TEST_EVERY.
        """
        if offset is None:
            return self
        if not 0 <= offset < TEST_EVERY:
            raise CaptureError(f"fold: expected 0 to {TEST_EVERY - 1}, received {offset}")
        split: dict[bool, Split] = {True: "test", False: "train"}
        records = [
            replace(r, split=split[i % TEST_EVERY == offset])
            for i, r in enumerate(self.frames.records)
        ]
        return replace(self, frames=Frames(records))

    def frame(self, key: str | int) -> Frame:
        """The frame of this name or place.

        A name may be given in full, or as its last parts, with or without suffix ("0007" for
        "images/0007.jpg"); when no name fits, a whole number counts from 0 in capture order.
        Raises CaptureError when nothing or more than one frame fits.
        """
        records = self.frames.records
        fits = [i for i, r in enumerate(records) if _answers_to(r.name, str(key))]
        exact = [i for i in fits if records[i].name == key]
        if isinstance(key, int) or (not fits and re.fullmatch(r"[0-9]+", key)):
            exact = [int(key)] if 0 <= int(key) < len(records) else []
        elif len(fits) == 1:
            exact = fits
        if len(exact) == 1:
            return self.frames[exact[0]]
        candidates = [records[i].name for i in fits] or [r.name for r in records]
        raise CaptureError(
            f"{self.name}: {key!r} fits {len(fits)} of {len(records)} frames, expected one of "
            f"{', '.join(candidates[:3])}, ..."
        )


def _answers_to(name: str, key: str) -> bool:
    stem = name.rpartition(".")[0] or name
    return any(full == key or full.endswith("/" + key) for full in (name, stem))


def make_capture(
    name: str,
    capture_format: str,
    world: WorldFrame,
    records: Sequence[Record],
    notes: Sequence[str] = (),
) -> Capture:
    """Order the records, fill in timestamps and splits, check every pose, camera and file.

    Order: by timestamp when every record has one, otherwise by name with numbers read as numbers.
    Without timestamps the place in that order counts as seconds. Where no record carries a split,
    every TEST_EVERY-th frame is `test`. Raises CaptureError, naming the frame.
    """
    name = _printable(name)[:_MAX_NAME] or "capture"
    if not records:
        raise CaptureError(f"{name}: the capture holds no frames")
    _require_files(name, records)
    notes = list(notes)
    if all(r.timestamp is not None for r in records):
        ordered = sorted(records, key=lambda r: r.timestamp or 0.0)
    else:
        ordered = sorted(records, key=lambda r: natural_key(r.name))
        notes.append("no timestamps: frames are taken in order of name, one second apart")
        ordered = [replace(r, timestamp=float(i)) for i, r in enumerate(ordered)]
    if all(r.split is None for r in ordered):
        ordered = [replace(r, split=default_split(i)) for i, r in enumerate(ordered)]
        notes.append(f"no split of its own: every {TEST_EVERY}th frame is test")
    checked = [_checked(name, replace(r, seq=i)) for i, r in enumerate(ordered)]
    read = Capture(name, capture_format, WorldFrame(), Frames(checked), tuple(notes))
    return read if world == WorldFrame() else read.in_world(world)


def default_split(index: int) -> Split:
    """`test` for the 8th, 16th, ... frame, else `train`; `index` counts from 0."""
    return "test" if index % TEST_EVERY == TEST_EVERY - 1 else "train"


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key under which "img_9" comes before "img_10"."""
    parts = re.findall(r"\d+|\D+", name)
    return [(int(p), "") if p.isascii() and p.isdigit() else (-1, p) for p in parts]


def is_file(path: Path) -> bool:
    """Whether a file has this name; False, too, for what can be no file's name."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than a name may be, or with a NUL in it
        return False


def exists(path: Path) -> bool:
    """The same for a file or a folder."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _printable(text: str) -> str:
    """A name as it may be sent: folders and pictures are called all sorts of things."""
    return "".join(c if c.isprintable() else " " for c in text)


def _require_files(name: str, records: Sequence[Record]) -> None:
    missing = [r for r in records if not is_file(r.image)]
    if not missing:
        return
    first = missing[0]
    hint = "" if first.image.suffix else " (the file name has no extension)"
    raise CaptureError(
        f"{name}: {len(missing)} of {len(records)} pictures are missing, first {first.name!r} "
        f"at {first.image}{hint}"
    )


def _checked(name: str, record: Record) -> Record:
    where = f"{name}: frame {record.name!r}"
    try:
        check_camera(record.camera, where)
        pose = check_pose(record.T_world_camera, where)
        pose[3] = (0.0, 0.0, 0.0, 1.0)  # also where it was written as 1.0000001
        return replace(record, T_world_camera=pose)
    except FrameRejected as error:
        raise CaptureError(str(error)) from None


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture file from its header; CaptureError when it has none."""
    try:
        with path.open("rb") as file:
            info = image_info(file.read(_HEADER_BYTES))
    except (OSError, FrameRejected) as error:
        raise CaptureError(f"{path}: cannot read the picture's size ({error})") from None
    return info.width, info.height


def read_frame(record: Record) -> Frame:
    """Read a record's picture, depth and mask; the picture's bytes are the file's own.

    A picture resized with its aspect kept (within one pixel) gets the camera scaled to it, with
    `meta["camera_scaled_from"]` saying so. Raises CaptureError when a file cannot be used.
    """
    try:
        data = record.image.read_bytes()
        info = image_info(data)
        camera = _fit_camera(record.camera, info.width, info.height)
        check_image(data, info.encoding, camera)
        depth, depth_scale_m = record.depth() if record.depth else (None, 1e-3)
        mask = record.mask() if record.mask else None
        for png in filter(None, (depth, mask)):
            check_image(png, "png", camera)
    except (OSError, ValueError, FrameRejected) as error:  # ValueError: a path with a NUL
        _refuse(record, error)
    meta = dict(record.meta)
    if camera != record.camera:
        meta["camera_scaled_from"] = (record.camera.width, record.camera.height)
    exposure = record.exposure
    if exposure is None and info.encoding == "jpeg":
        exposure = exposure_from_jpeg(data)
    return Frame(
        seq=record.seq,
        timestamp=record.timestamp or 0.0,
        image=data,
        encoding=info.encoding,
        camera=camera,
        T_world_camera=record.T_world_camera,
        name=_printable(record.name)[-512:],
        split=record.split or "train",
        task=record.task,
        exposure=exposure,
        height_m=record.height_m,
        depth=depth,
        depth_scale_m=depth_scale_m,
        mask=mask,
        meta=meta,
    )


def _refuse(record: Record, error: Exception) -> NoReturn:
    raise CaptureError(f"frame {record.name!r} ({record.image}): {error}") from None


def _fit_camera(camera: Camera, width: int, height: int) -> Camera:
    if (width, height) == (camera.width, camera.height):
        return camera
    if abs(camera.height * width / camera.width - height) > 1.0:
        raise FrameRejected(
            f"the camera is given for {camera.width}x{camera.height}, the picture is "
            f"{width}x{height}: not the same shape"
        )
    return camera.scaled(width, height)
