"""Arrays whose rows can be given back to the system one by one."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt


def zeros(shape: tuple[int, ...], dtype: Any = np.float32) -> npt.NDArray[Any]:
    """Zeros that take memory only where they are written."""
    size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made: npt.NDArray[Any] = np.ndarray(shape, dtype, buffer=area)
    return made


def give_back(array: npt.NDArray[Any], row: int) -> None:
    """Free the whole pages of a row of an array that `zeros` made; the row then holds anything."""
    area, size = array.base, array[0].nbytes
    assert isinstance(area, mmap.mmap)
    first = -(-row * size // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (row + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        area.madvise(mmap.MADV_DONTNEED, first, length)
