"""`python -m tests.daemon.broken crash|hang|paint|full MAP`: a compute thread with a fault.

Everything else is the daemon's own: the loop, the store, the socket, the supervision.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import cast

from mclnf_edge.config import ServeConfig, WatchConfig
from mclnf_edge.daemon.service import Service, prepare
from mclnf_edge.daemon.sockets import Endpoint
from mclnf_edge.daemon.worker import Worker
from mclnf_edge.mapping.initialization import load_init
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.store import MapStore


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


def main() -> int:
    """Serve until broken; the exit code."""
    kinds = {"crash": Crashing, "hang": Hanging, "paint": Painting, "full": Full}
    config = ServeConfig(watch=WatchConfig(hang_s=2.0))
    prepare(config)
    with MapStore.open(Path(sys.argv[2])) as store:
        endpoint = Endpoint("tcp://127.0.0.1:0")
        service = Service(config, store, endpoint, kinds[sys.argv[1]], load_init(None))
        try:
            return service.run(lambda address: print(f"ready {address}", flush=True))
        finally:
            endpoint.close()


if __name__ == "__main__":
    sys.exit(main())
