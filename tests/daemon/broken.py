"""`python -m tests.daemon.broken FAULT MAP`: a daemon with one fault (see `main`).

The compute thread's, or the disk's. Everything else is the daemon's own: the loop, the desk, the
store, the socket, the supervision.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

from mclnf_edge.config import MapConfig, ServeConfig, WatchConfig
from mclnf_edge.daemon.service import Service, prepare
from mclnf_edge.daemon.sockets import Endpoint
from mclnf_edge.daemon.worker import Worker
from mclnf_edge.mapping.initialization import load_init
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.store import MapStore
from mclnf_edge.store.database import Cursor, connect
from mclnf_edge.store.files import FileSystem
from tests.mapping import flights

SLOW_S = 2.0
"""What a slow disk takes for every fsync."""


class Crashing(Worker):
    """Dies of the first frame."""

    def _ingest(self) -> bool:
        if self.store.counts()["held"]:
            raise ZeroDivisionError("a fault in the compute thread")
        return super()._ingest()


class Hanging(Worker):
    """Never comes back from the first frame."""

    def _ingest(self) -> bool:
        while self.store.counts()["held"]:
            time.sleep(1)
        return super()._ingest()


class Full(Worker):
    """Its device has no room for a single ray."""

    def _ingest(self) -> bool:
        cast("Mapper", self.mapper).optimizer._most_rays = 0
        return super()._ingest()


class Painting(Worker):
    """Says without end that a view is being made."""

    @property
    def rendering(self) -> bool:
        return True


class Disk:
    """Takes `seconds` for every sync, and fails as the file `fault` says while there is one."""

    errors: ClassVar = {
        "full": (errno.ENOSPC, "database or disk is full"),
        "readonly": (errno.EROFS, "attempt to write a readonly database"),
        "broken": (errno.EIO, "disk I/O error"),
    }

    def __init__(self, fault: Path, seconds: float) -> None:
        self._fault, self._seconds = fault, seconds

    def fault(self) -> tuple[int, str] | None:
        return self.errors[self._fault.read_text()] if self._fault.exists() else None

    def sync(self) -> None:
        time.sleep(self._seconds)


class Files(FileSystem):
    """The real file system on that disk."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def create(self, path: Path) -> int:
        if fault := self._disk.fault():
            raise OSError(fault[0], os.strerror(fault[0]))
        return super().create(path)

    def fsync(self, fd: int) -> None:
        self._disk.sync()
        super().fsync(fd)


class Ledger:
    """A connection to a ledger on that disk."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self._connection, self._disk = connect(path), disk
        self.executescript, self.close = self._connection.executescript, self._connection.close

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Cursor:
        if sql == "COMMIT":
            self._disk.sync()
            if fault := self._disk.fault():
                raise sqlite3.OperationalError(fault[1])
        return self._connection.execute(sql, parameters)


def main() -> int:
    """Serve until broken; the exit code."""
    fault, folder = sys.argv[1], Path(sys.argv[2])
    kinds = {"crash": Crashing, "hang": Hanging, "paint": Painting, "full": Full}
    seconds = {"slow": SLOW_S, "stuck": 600.0}.get(fault, 0.0)
    failing = fault in ("slow", "disk")
    watch = WatchConfig(hang_s=60.0 if failing else 2.0, checkpoint_s=3.0 if failing else 600.0)
    config = ServeConfig(
        map=MapConfig(cell_size_m=flights.CELL_M), field=flights.FIELD, adapt=flights.ADAPT,
        watch=watch,
    )  # fmt: skip
    prepare(config)
    with MapStore.open(folder):
        pass  # made on a sound disk
    disk = Disk(folder.with_suffix(".fault"), seconds)
    with MapStore.open(folder, connect=partial(Ledger, disk=disk), files=Files(disk)) as store:
        endpoint = Endpoint("tcp://127.0.0.1:0")
        service = Service(config, store, endpoint, kinds.get(fault, Worker), load_init(None))
        try:
            return service.run(lambda address: print(f"ready {address}", flush=True))
        finally:
            endpoint.close()


if __name__ == "__main__":
    sys.exit(main())
