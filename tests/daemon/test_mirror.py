"""`serve --follow`: two daemons as processes, a link that breaks between them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mclnf_edge.client import Client
from mclnf_edge.daemon.security import authorise
from mclnf_edge.errors import ProtocolError, RemoteError, Unreachable
from mclnf_edge.store import MapStore, map_check
from mclnf_edge.types import View
from mclnf_edge.wire.keys import keygen
from mclnf_edge.wire.mirroring import MAX_LIST_BYTES, Listed, pack_list, unpack_list
from tests.daemon.conftest import CONFIG, Daemon
from tests.daemon.test_serve import drained, files_of, send
from tests.mapping.flights import Flight
from tests.wire.tcp_proxy import TcpProxy

THIN = "follow: {poll_s: 0.2, chunk_bytes: 4096, timeout_s: 2}\n"


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory, flight: Flight) -> Path:
    """A map that a daemon has made of the flight, stopped."""
    daemon = Daemon(tmp_path_factory.mktemp("leader")).start()
    send(daemon, flight.frames)
    assert drained(daemon).done and daemon.stop() == 0
    return daemon.map


@pytest.fixture(scope="module")
def leader(tmp_path_factory: pytest.TempPathFactory, mapped: Path) -> Iterator[Daemon]:
    """A daemon on a copy of that map, to which nothing is added."""
    made = on_a_copy(mapped, tmp_path_factory.mktemp("shared"))
    yield made.start()
    made.kill()


def on_a_copy(mapped: Path, folder: Path) -> Daemon:
    """A daemon of its own, not started."""
    made = Daemon(folder)
    shutil.copytree(mapped, made.map)
    return made


@pytest.fixture
def follow(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Start a mirror of an address; it is killed afterwards."""
    made: list[Daemon] = []

    def start(address: str, *words: str) -> Daemon:
        folder = tmp_path / f"mirror-{len(made)}"
        folder.mkdir()
        mirror = Daemon(folder, "--follow", address, *words)
        mirror.config.write_text(CONFIG.replace("plane_texels: 64", "plane_texels: 32") + THIN)
        made.append(mirror)
        return mirror.start()

    yield start
    for mirror in made:
        if mirror.process is not None and mirror.process.poll() is None:
            mirror.kill()


def followed(mirror: Daemon, modules: int, seconds: float = 30.0) -> dict[str, Any]:
    """The `follow` part of its status once it has that many modules."""
    end = time.monotonic() + seconds
    while True:
        with mirror.client() as client:
            state = client.status()
        if state["follow"]["modules"] >= modules and len(state["modules"]) >= modules:
            return dict(state["follow"])
        assert time.monotonic() < end, state["follow"]
        time.sleep(0.05)


def shown(daemon: Daemon, views: list[View]) -> list[bytes]:
    with daemon.client() as client:
        done = [client.render(view) for view in views]
    return [d.rgb.tobytes() + d.depth.tobytes() + d.known.tobytes() for d in done]


def test_a_mirror_shows_what_its_leader_shows_and_takes_no_frames(
    leader: Daemon, follow: Callable[..., Daemon], flight: Flight
) -> None:
    count = len(files_of(leader.map))
    with TcpProxy(leader.address) as link:
        mirror = follow(link.address)
        told = followed(mirror, count)
        assert told["received_bytes"] + told["sent_bytes"] == pytest.approx(
            link.forwarded, rel=0.03
        ), "what it says went over the link did"
    assert told["frame_bytes"] >= sum(len(f.image) for f in flight.frames)
    assert files_of(mirror.map) == files_of(leader.map)
    timed = [replace(v, timestamp=1.0, stream="front") for v in flight.views]
    assert shown(mirror, [*flight.views, *timed]) == shown(leader, [*flight.views, *timed])
    with mirror.client() as client:
        with pytest.raises(RemoteError, match=f"only mirrors {link.address}") as refused:
            client.publish(flight.frames[:1])
        assert refused.value.code == "mirror"
    with mirror.client() as client, pytest.raises(RemoteError, match="only mirrors"):
        list(client.drain())


def test_a_cut_link_is_gone_on_with_and_a_damaged_chunk_is_refused(
    leader: Daemon, follow: Callable[..., Daemon], flight: Flight
) -> None:
    files = files_of(leader.map)
    with TcpProxy(leader.address) as link:
        link.bytes_s = 200_000
        mirror = follow(link.address)
        link.spoil = 2
        for _ in range(3):
            time.sleep(0.4)
            link.cut()
        told = followed(mirror, len(files))
        whole = sum(map(len, files.values()))
        assert told["refused"] >= 1
        assert told["received_bytes"] < 1.5 * whole, "a cut costs a chunk, not the module"
        assert link.connections >= 4
    assert files_of(mirror.map) == files
    assert map_check(mirror.map) == []
    assert shown(mirror, flight.views) == shown(leader, flight.views), "also without the link"


def test_a_killed_mirror_goes_on_and_follows_later_commits(
    tmp_path: Path, mapped: Path, follow: Callable[..., Daemon], flight: Flight
) -> None:
    (tmp_path / "own").mkdir()
    leader = on_a_copy(mapped, tmp_path / "own").start()
    count = len(files_of(leader.map))
    with TcpProxy(leader.address) as link:
        link.bytes_s = 100_000
        mirror = follow(link.address)
        time.sleep(0.5)
        mirror.kill()
        part = files_of(mirror.map)
        assert len(part) < count, "it was killed too late to show anything"
        link.bytes_s = 0
        mirror.start()
        followed(mirror, count)
        assert part.items() <= files_of(mirror.map).items()
        with leader.client("later") as client:
            far = [replace(f, T_world_camera=_moved(f.T_world_camera)) for f in flight.frames]
            assert client.publish(far)["accepted"] == len(far)
            assert list(client.drain())[-1].done
        now = files_of(leader.map)
        assert len(now) > count
        followed(mirror, len(now))
    assert files_of(mirror.map) == now
    assert shown(mirror, flight.views) == shown(leader, flight.views)
    assert mirror.stop() == 0 and leader.stop() == 0


def _moved(pose: Any) -> Any:
    moved = np.array(pose)
    moved[0, 3] += 200.0
    return moved


def test_another_map_is_not_followed(leader: Daemon, tmp_path: Path) -> None:
    words = ["serve", "--bind", "tcp://127.0.0.1:0", "--follow", leader.address, "--map"]
    own, other = tmp_path / "own", tmp_path / "other"
    with MapStore.open(own, meta={"init": "of its own"}):
        pass
    with MapStore.open(leader.map, read_only=True) as there, MapStore.open(other) as store:
        meta = there.meta()
        store.fix_meta({**meta, "map_id": store.meta()["map_id"], "follows": meta["map_id"]})
        store.mirror_module("cell_0_0", 1, b"another map's module", {})
    for folder, fault in ((own, "received a map of its own"), (other, "it follows another map")):
        done = subprocess.run(
            [sys.executable, "-m", "mclnf_edge.cli", *words, str(folder)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1 and fault in done.stderr


def test_keys_with_the_role_follow_and_a_module_damaged_at_the_leader(
    tmp_path: Path, mapped: Path
) -> None:
    keys = tmp_path / "keys"
    keygen(keys, "server")
    for name, role in (("station", "follow"), ("viewer", "render")):
        authorise(keys / "authorised-clients", name, (role,), keygen(keys, name).public)  # type: ignore[arg-type]
    leader = on_a_copy(mapped, tmp_path)
    leader.config.write_text(CONFIG + f"security: {{keys: {keys}}}\n")
    leader.start()
    damaged = sorted((leader.map / "modules").iterdir())[0]
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    secured = ("--server-key", str(keys / "server.public"), "--client-key")
    (tmp_path / "mirror").mkdir()
    try:
        mirror = Daemon(
            tmp_path / "mirror", "--follow", leader.address, *secured, str(keys / "station.secret")
        ).start()
        followed(mirror, len(files_of(leader.map)))
        sound = {name: data for name, data in files_of(leader.map).items() if name != damaged.name}
        assert files_of(mirror.map) == sound
        with mirror.client() as client:
            states = [module["state"] for module in client.status()["modules"]]
        assert states.count("quarantined") == 1
        mirror.kill()
        done = subprocess.run(
            [sys.executable, "-m", "mclnf_edge.cli", "serve", "--map", str(tmp_path / "no")]
            + ["--bind", "tcp://127.0.0.1:0", "--follow", leader.address, *secured]
            + [str(keys / "viewer.secret")],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1 and "expected role admin or follow" in done.stderr
        plain = Client(leader.address, timeout_s=0.3, give_up_s=0.8)
        with plain, pytest.raises(Unreachable):
            plain.status()
    finally:
        leader.kill()


def test_a_list_of_another_shape_is_refused() -> None:
    listed = Listed("cell_0_0", 1, "closed", 4, "00" * 32, {})
    assert unpack_list(pack_list({"field": {}}, [listed])) == ({"field": {}}, [listed])
    for wrong in ({"digest": "x"}, {"bytes": -1}, {"version": True}, {"id": "a\n"}, {"state": ""}):
        with pytest.raises(ProtocolError, match="committed"):
            replace(listed, **wrong)  # type: ignore[arg-type]
    bomb = zlib.compress(b"0" * (MAX_LIST_BYTES + 1))
    for body in (b"no zlib", bomb, pack_list({}, [])[:9], zlib.compress(b"[]")):
        with pytest.raises(ProtocolError, match="committed"):
            unpack_list(body)
