"""Which format a capture folder or file is in."""

from __future__ import annotations

from pathlib import Path

from mclnf_edge.captures.capture import Capture
from mclnf_edge.captures.colmap import find_model, open_colmap
from mclnf_edge.captures.intrinsics import load_json
from mclnf_edge.captures.matrixcity import is_matrixcity, open_matrixcity
from mclnf_edge.captures.meganerf import is_meganerf, open_meganerf
from mclnf_edge.captures.transforms import open_transforms, transforms_files
from mclnf_edge.errors import CaptureError


def is_capture(path: Path) -> bool:
    """Whether a folder holds a posed capture of a supported format."""
    return bool(transforms_files(path)) or is_meganerf(path) or find_model(path) is not None


def open_capture(path: str | Path) -> Capture:
    """Open a capture of any supported format; pictures are read later, one by one.

    `path` is a folder, or a transforms JSON file. Tried in this order: transforms.json or
    transforms_{train,val,test}.json (MatrixCity's two forms or nerfstudio / instant-ngp),
    Mega-NeRF (coordinates.pt), COLMAP (cameras and images, .bin or .txt, also in sparse/0).
    Raises CaptureError when none fits or the one that fits cannot be used.
    """
    path = Path(path)
    if not path.exists():
        raise CaptureError(f"{path}: no such capture")
    files = transforms_files(path)
    if files:
        matrixcity = is_matrixcity(files[0], load_json(files[0]))
        return open_matrixcity(path) if matrixcity else open_transforms(path)
    if is_meganerf(path):
        return open_meganerf(path)
    if find_model(path) is not None:
        return open_colmap(path)
    raise CaptureError(
        f"{path}: expected transforms.json, transforms_train.json, coordinates.pt (Mega-NeRF) or "
        "a COLMAP model (cameras and images, .bin or .txt, here or in sparse/0)"
    )
