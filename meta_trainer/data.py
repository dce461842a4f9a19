"""Signals of the paper's data sets, of the small stand-ins, and of plain folders.

Pictures are (H, W, 3) float32 in 0..1, videos (F, H, W, 3), audio (L,) in -1..1 at 16 kHz; views
are captures, which `views` reads. A data set yields `Item`s, which read their file when asked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from scipy.signal import resample_poly

from mclnf_edge.captures.capture import natural_key
from mclnf_edge.captures.detect import is_capture
from mclnf_edge.errors import CaptureError

Split = Literal["train", "val", "test"]
Kind = Literal["image", "audio", "video", "views"]
Signal = npt.NDArray[np.float32]

log = logging.getLogger(__name__)

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SOUNDS = (".wav", ".flac")
CLIPS = (".mp4", ".avi", ".mov", ".mkv")
SAMPLE_RATE_HZ = 16_000


@dataclass(frozen=True)
class Shape:
    """What is cut from a file: picture side in pixels, padding, frames, audio samples.

    Of a capture: `side` pixels across, `rays` per task, `held` views to measure (0: all).
    """

    side: int = 160
    pad: int = 0
    frames: int = 8
    samples: int = 48_000
    rays: int = 0
    held: int = 0


@dataclass(frozen=True)
class Item:
    """One signal: its name, and how to read it."""

    name: str
    path: Path
    kind: Kind
    shape: Shape

    def load(self) -> Signal:
        """Read and cut a picture, video or sound; CaptureError when it is broken or too short."""
        return LOADERS[self.kind](self.path, self.shape)

    @property
    def digest(self) -> str:
        """Of what the file or the folder holds, wherever it lies."""
        return content_digest(self.path)


@dataclass(frozen=True)
class DataSet:
    """A data set's layout. `paths(root, split)` lists its files; `help` says how to get it.

    `paper` names the data set of the paper's tables whose figures stand beside ours. `licence` says
    under which terms the files may be used and whom to name; it travels inside initializations.
    `starts` names the data set of the same shape that the package's learned starts are trained on,
    where that is another one, whose files may be given away.
    """

    name: str
    kind: Kind
    shape: Shape
    paths: Callable[[Path, Split], list[Path]]
    folder: str
    help: str
    paper: str
    licence: str = "unknown"
    starts: str = ""


def default_root() -> Path:
    """MCLNF_DATA, or `../shared/data` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("MCLNF_DATA", beside))


def open_items(name: str, split: Split, root: Path | None = None) -> list[Item]:
    """The signals of one split of a named data set below `root`, sorted by path.

    Sounds that are too short are left out; a warning counts them.

    Raises:
        CaptureError: the data set is unknown, or not there; says where to get it and how to lay it
            out.
    """
    if name not in DATASETS:
        raise CaptureError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    data = DATASETS[name]
    base = (root or default_root()) / data.folder
    paths = data.paths(base, split) if base.is_dir() else []
    if not paths:
        raise CaptureError(f"{name} ({split}): nothing found at {base}. {data.help}")
    return _usable(data, paths, base)


def open_folder(folder: Path, like: str) -> list[Item]:
    """Signals of a plain folder (pictures, sounds, frame folders or clips), cut as data set `like`.

    Files below `folder` are found at any depth; `folder` may be one such file. Sounds that are too
    short are left out; a warning counts them. Raises CaptureError when nothing is left.
    """
    data = DATASETS[like]
    if not folder.exists():
        raise CaptureError(f"{folder}: no such file or folder")
    paths = FINDERS[data.kind](folder)
    if not paths:
        raise CaptureError(f"{folder}: expected {data.kind} files for {like}, found none")
    return _usable(data, paths, folder)


def _usable(data: DataSet, paths: Sequence[Path], base: Path) -> list[Item]:
    """Items of the files that are long enough, sorted by path."""
    items = [Item(p.stem, p, data.kind, data.shape) for p in sorted(paths)]
    if data.kind != "audio":
        return items
    wanted = data.shape.samples / SAMPLE_RATE_HZ
    long = [item for item in items if sound_seconds(item.path) >= wanted]
    if len(long) < len(items):
        _tell_short(base, len(items) - len(long), len(items), wanted)
    if not long:
        raise CaptureError(f"{base}: expected sounds of at least {wanted:g} s, found none")
    return long


@cache
def _tell_short(base: Path, short: int, count: int, wanted: float) -> None:
    """Once: every method of a table lists the same sounds."""
    log.warning(
        "%s: %d of %d sounds are shorter than %g s and left out", base, short, count, wanted
    )


def content_digest(path: Path) -> str:
    """16 hex digits of a file's bytes, or of the names and bytes of all files below a folder."""
    found = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        found.update(file.relative_to(path).as_posix().encode())
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:16]


def load_image(path: Path, shape: Shape) -> Signal:
    """Central square, scaled to `side` and zero-padded by `pad` pixels on every edge."""
    picture = _central(_decode(path))
    side = len(picture)
    if side != shape.side:
        how = cv2.INTER_AREA if side > shape.side else cv2.INTER_CUBIC
        picture = np.asarray(cv2.resize(picture, (shape.side, shape.side), interpolation=how))
    p = shape.pad
    return np.pad(picture, ((p, p), (p, p), (0, 0))).astype(np.float32) / 255.0


def load_audio(path: Path, shape: Shape) -> Signal:
    """The middle `samples` samples, mono; sounds of another rate are resampled to 16 kHz."""
    import soundfile  # only audio experiments need it

    try:
        sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise CaptureError(f"{path}: cannot be read as audio: {error}") from error
    mono = sound.mean(1)
    if rate != SAMPLE_RATE_HZ:
        mono = resample_poly(mono, SAMPLE_RATE_HZ, rate)
    if len(mono) < shape.samples:
        raise CaptureError(f"{path}: expected {shape.samples} samples, received {len(mono)}")
    begin = (len(mono) - shape.samples) // 2
    return np.asarray(mono[begin : begin + shape.samples], dtype=np.float32)


@cache
def sound_seconds(path: Path) -> float:
    """How long a sound is by its header, read once; CaptureError when it is none."""
    import soundfile

    try:
        return float(soundfile.info(path).duration)
    except (OSError, RuntimeError) as error:
        raise CaptureError(f"{path}: cannot be read as audio: {error}") from error


def load_video(path: Path, shape: Shape) -> Signal:
    """The central squares of `frames` frames at constant intervals, of a frame folder or a clip."""
    pictures = _folder_frames(path, shape) if path.is_dir() else _clip_frames(path, shape)
    how = cv2.INTER_AREA
    scaled = [
        cv2.resize(_central(p), (shape.side, shape.side), interpolation=how) for p in pictures
    ]
    return np.stack(scaled).astype(np.float32) / 255.0


def _central(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The largest square in the middle."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[top : top + side, left : left + side]


def spread(count: int, wanted: int, what: Path) -> list[int]:
    """`wanted` of `count` places at constant intervals, from the first."""
    if count < wanted:
        raise CaptureError(f"{what}: expected at least {wanted} frames, received {count}")
    return [i * (count // wanted) for i in range(wanted)]


def _decode(path: Path) -> npt.NDArray[np.uint8]:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise CaptureError(f"{path}: cannot be read as a picture")
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _folder_frames(path: Path, shape: Shape) -> list[npt.NDArray[np.uint8]]:
    files = [p for p in _files(path, PICTURES) if p.parent == path]
    files.sort(key=lambda p: natural_key(p.name))
    return [_decode(files[i]) for i in spread(len(files), shape.frames, path)]


def _clip_frames(path: Path, shape: Shape) -> list[npt.NDArray[np.uint8]]:
    reader = cv2.VideoCapture(str(path))
    frames: list[npt.NDArray[np.uint8]] = []
    while (got := reader.read())[0]:
        frames.append(np.asarray(cv2.cvtColor(got[1], cv2.COLOR_BGR2RGB), dtype=np.uint8))
    reader.release()
    return [frames[i] for i in spread(len(frames), shape.frames, path)]


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files at any depth, or `folder` itself where it is one; not hidden ones."""
    found = [folder] if folder.is_file() else folder.rglob("*")
    return sorted(p for p in found if p.suffix.lower() in suffixes and p.name[0] != ".")


def _clips(folder: Path) -> list[Path]:
    """Clip files, and folders that hold frames."""
    frames = {p.parent for p in _files(folder, PICTURES) if folder.is_dir()}
    return sorted([*_files(folder, CLIPS), *frames])


def _captures(folder: Path) -> list[Path]:
    """`folder` itself where it is a posed capture, else those below it; test parts belong to their
    training parts."""
    if not folder.is_dir() or folder.name.endswith("_test"):
        return []
    if is_capture(folder):
        return [folder]
    below = sorted(folder.iterdir(), key=lambda p: natural_key(p.name))
    return [c for p in below for c in _captures(p)]


FINDERS: dict[Kind, Callable[[Path], list[Path]]] = {
    "image": lambda folder: _files(folder, PICTURES),
    "audio": lambda folder: _files(folder, SOUNDS),
    "video": _clips,
    "views": _captures,
}
LOADERS: dict[Kind, Callable[[Path, Shape], Signal]] = {
    "image": load_image,
    "audio": load_audio,
    "video": load_video,
}


def _stand_in(kind: Kind) -> Callable[[Path, Split], list[Path]]:
    """train/ and val/: the last eighth of train/ chooses settings, val/ is the test set."""

    def paths(base: Path, split: Split) -> list[Path]:
        if split == "test":
            return FINDERS[kind](base / "val")
        known = FINDERS[kind](base / "train")
        cut = len(known) - max(1, len(known) // 8)
        return known[:cut] if split == "train" else known[cut:]

    return paths


def _sample(
    name: str, kind: Kind, shape: Shape, folder: str, paper: str, licence: str, starts: str = ""
) -> DataSet:
    files = _stand_in(kind)
    return DataSet(name, kind, shape, files, folder, _SAMPLE_HELP, paper, licence, starts)


def _free_pictures(base: Path, split: Split) -> list[Path]:
    """Pictures whose licence lets an initialization be shipped: Kodak and two drone captures.

    Every fourth Kodak picture is the test set, two more choose settings, all else is for training.
    """
    kodak = _files(base / "photos" / "kodak", PICTURES)
    held = {"test": kodak[3::4], "val": kodak[::9]}
    if split != "train":
        return held[split]
    known = [p for p in kodak if p not in held["test"] + held["val"]]
    return known + [p for name in ("boruszyn", "brighton") for p in _views(base / "drone" / name)]


def _views(capture: Path) -> list[Path]:
    """A capture's pictures."""
    return [p for p in _files(capture, PICTURES) if p.parent.name.startswith("images")]


def _blocks(base: Path, split: Split) -> list[Path]:
    """Captures: 70 % for meta-training, of which the last eighth chooses settings, 30 % for test.

    In order of name, so that of `big_high_block_1..6` blocks 5 and 6 are the test; `city.json` of a
    generated city names its own meta-test blocks. The same name twice counts once, and
    `block_all`, which is the others together, not at all.
    """
    found = {p.name: p for p in reversed(_captures(base)) if p.name != "block_all"}
    names = sorted(found, key=natural_key)
    big = [n for n in names if n.startswith("big_high_block_")]
    names = big or names
    held = _own_test_blocks(base) or set(names[round(0.7 * len(names)) :])
    known = [n for n in names if n not in held]
    cut = max(1, len(known) - max(1, len(known) // 8))
    chosen = {
        "train": known[:cut],
        "val": known[cut:] or known,
        "test": sorted(held & found.keys()),
    }
    return [found[n] for n in chosen[split]]


def _flown(base: Path, split: Split) -> list[Path]:
    """Captures: the first by name chooses settings and may be trained on, the others are the test.

    No start of theirs has seen a test capture.
    """
    found = _captures(base)
    return found[1:] if split == "test" else found[:1]


def _own_test_blocks(base: Path) -> set[str]:
    file = base / "city.json"
    facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return set(facts.get("meta_test", ()))


def _celeba(base: Path, split: Split) -> list[Path]:
    """img_align_celeba/*.jpg by list_eval_partition.txt (0 train, 1 val, 2 test).

    Also with the authors' folders Img/ and Eval/, one folder deeper, and with a .csv.
    """
    inner = base / "img_align_celeba" / "img_align_celeba"
    folders = [inner, base / "img_align_celeba", base / "Img" / "img_align_celeba"]
    folder = next((p for p in folders if p.is_dir()), base)
    lists = [
        place / f"list_eval_partition{suffix}"
        for place in (base, base / "Eval")
        for suffix in (".txt", ".csv")
    ]
    table = next((p for p in lists if p.is_file()), None)
    if table is None:
        return []
    wanted = {"train": "0", "val": "1", "test": "2"}[split]
    lines = table.read_text().replace(",", " ").splitlines()
    rows = [line.split() for line in lines if line.strip()]
    return [folder / r[0] for r in rows if r[1] == wanted and (folder / r[0]).is_file()]


def _imagenette(base: Path, split: Split) -> list[Path]:
    """train/<class>/*.JPEG and val/<class>/*.JPEG; every tenth of train/ chooses settings."""
    if split == "test":
        return _files(base / "val", PICTURES)
    known = _files(base / "train", PICTURES)
    return [p for i, p in enumerate(known) if (i % 10 == 9) == (split == "val")]


def _ffhq(base: Path, split: Split) -> list[Path]:
    """images*/<thousand>/<number>.png: below 59,000 train, to 60,000 val, the rest test.

    Of several resolutions the largest square one: not images in the wild, thumbnails last.
    """
    names = ("images1024x1024", "images512x512", "images256x256", "thumbnails128x128")
    held = next((base / n for n in names if (base / n).is_dir()), base)
    known = [p for p in _files(held, PICTURES) if p.stem.isdigit()]
    low, high = {"train": (0, 59_000), "val": (59_000, 60_000), "test": (60_000, 70_000)}[split]
    return [p for p in known if low <= int(p.stem) < high]


def _voxceleb(base: Path, split: Split) -> list[Path]:
    """{dev,test}/mp4/<speaker>/<video>/<number>.mp4; every tenth speaker of dev is val."""
    if split == "test":
        return _files(base / "test", CLIPS)
    known = _files(base / "dev", CLIPS)
    speakers = sorted({p.parents[1].name for p in known})
    held = set(speakers[9::10])
    return [p for p in known if (p.parents[1].name in held) == (split == "val")]


def _librispeech(base: Path, split: Split) -> list[Path]:
    """{train-clean-100,dev-clean,test-clean}/<speaker>/<chapter>/*.flac."""
    names = {"train": "train-clean-*", "val": "dev-clean", "test": "test-clean"}
    return [p for folder in sorted(base.glob(names[split])) for p in _files(folder, SOUNDS)]


_FACE, _PHOTO, _TALK = Shape(178, pad=1), Shape(160), Shape(112)
_ONE, _THREE = Shape(samples=16_000), Shape(samples=48_000)
_SPEECH_HELP = (
    "Get LibriSpeech (train-clean-100, dev-clean, test-clean) from openslr.org/12 and unpack it to "
    "LibriSpeech/<part>/<speaker>/<chapter>/*.flac."
)
_LIBRISPEECH = "LibriSpeech, Panayotov, Chen, Povey, Khudanpur 2015, CC BY 4.0"
_GRID = "GRID corpus, Cooke, Barker, Cunningham, Shao 2006, CC BY 4.0"
_SAMPLE_HELP = "Stand-in: a folder with train/ and val/; set MCLNF_DATA or --root."

DATASETS: dict[str, DataSet] = {
    d.name: d
    for d in (
        DataSet(
            "celeba", "image", _FACE, _celeba, "celeba",
            "Get CelebA (aligned and cropped) from mmlab.ie.cuhk.edu.hk/projects/CelebA.html and "
            "lay out celeba/img_align_celeba/*.jpg and celeba/list_eval_partition.txt.", "celeba",
        ),
        DataSet(
            "imagenette", "image", _PHOTO, _imagenette, "imagenette2-160",
            "Get imagenette2-160 from github.com/fastai/imagenette and unpack it to "
            "imagenette2-160/{train,val}/<class>/*.JPEG.", "imagenette",
        ),
        DataSet(
            "ffhq", "image", Shape(512), _ffhq, "ffhq",
            "Get FFHQ from github.com/NVlabs/ffhq-dataset and lay out "
            "ffhq/images1024x1024/<thousand>/<number>.png (any resolution).", "ffhq",
        ),
        DataSet(
            "voxceleb2", "video", _TALK, _voxceleb, "voxceleb2",
            "Get VoxCeleb2 from robots.ox.ac.uk/~vgg/data/voxceleb and lay out "
            "voxceleb2/{dev,test}/mp4/<speaker>/<video>/*.mp4.", "voxceleb2",
        ),
        DataSet(
            "librispeech1", "audio", _ONE, _librispeech, "LibriSpeech", _SPEECH_HELP,
            "librispeech1",
        ),
        DataSet(
            "librispeech3", "audio", _THREE, _librispeech, "LibriSpeech", _SPEECH_HELP,
            "librispeech3",
        ),
        _sample("faces", "image", _FACE, "faces", "celeba", "mostly public domain, unchecked"),
        _sample(
            "photos", "image", _PHOTO, "photos", "imagenette", "ImageNet: research only",
            "free-pictures",
        ),
        _sample("speech1", "audio", _ONE, "speech", "librispeech1", _LIBRISPEECH),
        _sample("speech", "audio", _THREE, "speech", "librispeech3", _LIBRISPEECH),
        _sample("video", "video", _TALK, "video", "voxceleb2", _GRID),
        DataSet(
            "matrixcity", "views", Shape(480), _blocks, "matrixcity",
            "Get MatrixCity from city-super.github.io/matrixcity and "
            "unpack it to matrixcity/big_city/aerial/{train,test}/big_high_block_<n>[_test]/"
            "{transforms.json,NNNN.png}, or matrixcity/pose/<block>/transforms_{train,test}.json "
            "with the pictures these name; or make blocks with tools/make_city.py matrixcity.",
            "matrixcity-b5", "MatrixCity, Li et al. 2023, terms of its authors",
        ),
        DataSet(
            "drone", "views", Shape(480), _flown, "drone",
            "Stand-in: drone/<capture>/ in any layout of docs/captures.md; set MCLNF_DATA or "
            "--root.", "matrixcity-b5", "see each capture's README", starts="flights",
        ),
        DataSet(
            "flights", "views", Shape(480), _blocks, "flights",
            "Make them: python tools/make_city.py flights --preset train.", "matrixcity-b5",
            "generated by this project",
        ),
        DataSet(
            "free-pictures", "image", _PHOTO, _free_pictures, "", _SAMPLE_HELP, "imagenette",
            "Kodak True Color Image Suite (unrestricted); boruszyn (CC BY 3.0); brighton (BSD-2)",
        ),
    )
}  # fmt: skip
