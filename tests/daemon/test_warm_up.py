"""After the warm-up no frame, step, closing or view waits for the compiler."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from numba.core.dispatcher import Dispatcher
from mclnf_edge.config import ServeConfig
from mclnf_edge.daemon.warm_up import warm_up

warm_up(ServeConfig(), 2)
kernels = [
    kernel
    for name, module in list(sys.modules.items())
    if name.startswith("mclnf_edge.engine")
    for kernel in vars(module).values()
    if isinstance(kernel, Dispatcher)
]
before = {kernel: set(kernel.signatures) for kernel in kernels}
assert sum(map(bool, before.values())) >= 8, "kernels are compiled"

from tests.mapping import flights

flight = flights.flight()
mapper = flights.mapper(flight.frames)
flights.learn(mapper, 3)
flights.render(mapper, flight.views[0])
for kernel in kernels:
    assert set(kernel.signatures) == before[kernel], f"{kernel} was compiled again"
"""


def test_a_flight_after_the_warm_up_compiles_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
