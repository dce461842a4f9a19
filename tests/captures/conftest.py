"""Captures of every layout, written to disk by the tests themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mclnf_edge.geometry import pose_from
from mclnf_edge.images import encode_image

WritePicture = Callable[..., bytes]


@pytest.fixture
def write_picture() -> WritePicture:
    """Write a small picture of one shade; returns the file's bytes."""

    def write(path: Path, shade: int = 100, width: int = 32, height: int = 18) -> bytes:
        suffix = path.suffix.lower().removeprefix(".").replace("jpg", "jpeg")
        data = encode_image(np.full((height, width, 3), shade, np.uint8), suffix)  # type: ignore[arg-type]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return data

    return write


@pytest.fixture
def write_json() -> Callable[[Path, Any], Path]:
    """Write an object as JSON, making folders."""

    def write(path: Path, content: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def look_down() -> Callable[..., np.ndarray]:
    """A camera that looks straight down, north up in the picture, turned by `yaw` degrees."""

    def pose(east: float, north: float, up: float, yaw: float = 0.0) -> np.ndarray:
        c, s = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))
        return pose_from([[c, -s, 0], [s, c, 0], [0, 0, 1]], [east, north, up])

    return pose
