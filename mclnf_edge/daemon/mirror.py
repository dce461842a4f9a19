"""`serve --follow`: a daemon that learns nothing itself and serves what another one has committed.

It answers `render`, `status` and followers of its own as any daemon does, with or without the link.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mclnf_edge.config import FieldConfig, ServeConfig
from mclnf_edge.daemon.follower import Follower
from mclnf_edge.daemon.service import Service, computing, prepare
from mclnf_edge.daemon.sockets import Endpoint
from mclnf_edge.daemon.worker import Worker
from mclnf_edge.errors import ConfigError, MapMismatch, ProtocolError
from mclnf_edge.mapping.engines import open_start
from mclnf_edge.mapping.initialization import Initialization, SignalInitialization
from mclnf_edge.store import MapStore
from mclnf_edge.wire.keys import load_public, load_secret
from mclnf_edge.wire.link import Link
from mclnf_edge.wire.messages import CloseTask, Drain, Hello, Message, PutFrame, PutSignal

_FOR_THE_LEADER = (Hello, PutFrame, PutSignal, CloseTask, Drain)


class OnlyMirrors(ProtocolError):
    """What was sent belongs to the daemon that is followed."""

    code = "mirror"


class MirrorWorker(Worker):
    """The compute thread of a mirror: renders, and takes in what the follower has committed."""

    def __init__(self, follower: Follower, *args: Any) -> None:
        """`args` are `Worker`'s."""
        super().__init__(*args)
        self._follower = follower

    def run(self) -> None:
        """Restore and serve while the follower copies."""
        self._follower.start()
        super().run()
        self._follower.stop()
        self._follower.join()

    def _turn(self) -> bool:
        self._pause()
        if self._follower.error is not None:
            raise self._follower.error
        new = self._stored(lambda: self.store.modules_after(self._restored, 1))
        for record in new:
            self._adopt(record)
        self._publish_state()
        return bool(new)

    def _checkpoint(self) -> bool:
        """A mirror has no open work."""
        return True

    def _publish_state(self) -> None:
        super()._publish_state()
        self.state = {**self.state, "follow": self._follower.report()}


class MirrorService(Service):
    """The loop of a mirror: refuses by name what only its leader can take."""

    leader = ""

    def _check(self, message: Message) -> None:
        if isinstance(message, _FOR_THE_LEADER):
            raise OnlyMirrors(
                f"{message.tag}: this daemon only mirrors {self.leader}; send it there"
            )


def serve_mirror(
    config: ServeConfig,
    leader: str,
    keys: tuple[Path | None, Path | None],
    map_dir: Path,
    bind: str,
    device: str | None,
    on_ready: Callable[[str], None],
) -> int:
    """Mirror the daemon at `leader` into `map_dir` and serve it at `bind`; see `service.serve`.

    A map that is still empty waits for the leader's first word before `on_ready`. `keys` are the
    leader's .public file and the .secret file of a client with the role follow: both or neither.
    Raises MapMismatch when `map_dir` is another map.
    """
    keyring = prepare(config)
    if (keys[0] is None) != (keys[1] is None):
        raise ConfigError("--follow: encryption needs both --server-key and --client-key")
    public = None if keys[0] is None else load_public(keys[0])
    secret = None if keys[1] is None else load_secret(keys[1])
    with MapStore.open(map_dir) as store:
        endpoint = Endpoint(bind, keyring)
        try:
            link = Link(leader, config.follow.timeout_s, public, secret)
            follower = Follower(store, link, config.follow)
            if "follows" not in store.meta():
                _refuse_own_map(store)
                follower.first_word()
            adapted, start = _as_the_map_says(config, device, store.meta())
            made = partial(MirrorWorker, follower)
            service = MirrorService(adapted, store, endpoint, made, start)
            service.leader = leader
            return service.run(on_ready)
        finally:
            endpoint.close()


def _as_the_map_says(
    config: ServeConfig, device: str | None, meta: dict[str, Any]
) -> tuple[ServeConfig, Initialization | SignalInitialization]:
    """The settings and a start of the right shapes to show a map with; it learns nothing."""
    if "signal" in meta:
        return computing(config, device), SignalInitialization.of_meta(meta["signal"])
    adapted = computing(replace(config, field=FieldConfig(**meta["field"])), device)
    return adapted, open_start(adapted, None)


def _refuse_own_map(store: MapStore) -> None:
    if store.meta().keys() != {"map_id"}:
        raise MapMismatch(
            f"{store.path}: expected an empty map or one that follows, received a map of its own"
        )
