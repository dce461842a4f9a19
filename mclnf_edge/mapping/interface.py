"""What the compute thread needs of a mapper, whatever a map holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy.typing as npt

from mclnf_edge.mapping.mapper import Closing, StepReport


class TaskMapper(Protocol):
    """Takes pieces, opens modules, lets them learn, closes them; reads and writes no files.

    `steps` and `psnr` are of all modules; `draining` lets everything close that has learned;
    `hover_m` is, by stream, how far a camera must move to be worth a frame (posed maps).
    """

    psnr: float | None
    draining: bool

    @property
    def steps(self) -> int:
        """Optimization steps so far."""
        ...

    @property
    def frames(self) -> Mapping[int, Any]:
        """Held pieces by their ledger id."""
        ...

    @property
    def held_bytes(self) -> int:
        """Bytes of the held pieces."""
        ...

    @property
    def hover_m(self) -> Mapping[str, float]:
        """See the class."""
        ...

    def streams_of(self, module: Any) -> set[str]:
        """The streams that a module learns from."""
        ...

    def add(
        self, frame_id: int, stream: str, frame: Any, *, site: int = 0, kept: list[Any] | None
    ) -> None:
        """Decode and hold a frame or a piece of a signal; raises FrameRejected."""
        ...

    def end_task(self, stream: str, task: str | None) -> None:
        """Let a stream's task close once it has learned."""
        ...

    def shed(self, budget_bytes: int) -> dict[int, int]:
        """Pieces that may go to keep to a budget of bytes: id -> draws."""
        ...

    def settle(self, pause: Callable[[], None], *, last: bool = False) -> bool:
        """Bring modules up to date with the pieces; whether anything was done.

        `last`: no more pieces are waited for.
        """
        ...

    def step(self) -> StepReport | None:
        """One optimization step, None when there is nothing to learn."""
        ...

    def progress(self) -> float:
        """Share of all open modules' budgets that is spent."""
        ...

    def learning(self) -> list[Any]:
        """Modules that are not closed."""
        ...

    def finished(self) -> list[Any]:
        """Modules that may close now."""
        ...

    def close(self, module: Any) -> Closing:
        """Freeze a module; what to commit and let go."""
        ...

    def forget(self, frame_ids: dict[int, int]) -> None:
        """These pieces were let go."""
        ...

    def unused(self) -> dict[int, int]:
        """Pieces that no open or coming module needs: id -> draws."""
        ...

    def describe(self, module: Any) -> dict[str, Any]:
        """A module's JSON-able description."""
        ...

    def facts(self) -> dict[str, Any]:
        """What `status` says of the map besides its modules."""
        ...

    def adopt(
        self, arrays: dict[str, npt.NDArray[Any]], meta: dict[str, Any], version: int, digest: str
    ) -> None:
        """Take a committed module in."""
        ...

    def checkpoint(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Everything the open work needs to go on."""
        ...

    def restore(self, arrays: dict[str, npt.NDArray[Any]], meta: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        ...
