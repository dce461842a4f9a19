"""Keys, roles and the handshake: whoever does not belong gets nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import zmq

from mclnf_edge.client import Client
from mclnf_edge.daemon.security import (
    ALLOWED,
    LOCAL_USER,
    ROLES,
    STRANGER,
    Forbidden,
    Keyring,
    Role,
    User,
    authorise,
    check_role,
    parse_authorised,
)
from mclnf_edge.errors import ConfigError, RemoteError, Unreachable
from mclnf_edge.types import View
from mclnf_edge.wire.codec import encode
from mclnf_edge.wire.keys import KeyPair, keygen, load_public, load_secret
from mclnf_edge.wire.messages import MESSAGES
from tests.wire.echo import EchoDaemon
from tests.wire.examples import CAMERA, EXAMPLES, POSE, frame

VIEW = View(CAMERA, POSE)


@dataclass
class Site:
    """A folder of keys and a daemon that uses them."""

    folder: Path
    daemon: EchoDaemon

    @property
    def authorised(self) -> Path:
        """The daemon's list of clients."""
        return self.folder / "authorised"

    def client(self, name: str, server: str = "daemon", give_up_s: float = 3.0) -> Client:
        """A client with the key of that name."""
        return Client(
            self.daemon.address,
            server_key=self.folder / f"{server}.public",
            client_key=self.folder / f"{name}.secret",
            timeout_s=0.5,
            give_up_s=give_up_s,
        )


@pytest.fixture()
def site(tmp_path: Path) -> Iterator[Site]:
    """A daemon behind CURVE that knows one client for each role."""
    folder = tmp_path / "keys"
    keygen(folder, "daemon")
    keygen(folder, "unknown")
    for role in ROLES:
        authorise(folder / "authorised", role, (role,), keygen(folder, role).public)
    ring = Keyring.load(folder / "daemon.secret", folder / "authorised")
    with EchoDaemon("tcp://127.0.0.1:0", ring) as daemon:
        yield Site(folder, daemon)


def test_each_role_may_do_its_own_and_nothing_else(site: Site) -> None:
    with site.client("publish") as publisher:
        assert publisher.publish([frame(0)])["accepted"] == 1
        with pytest.raises(RemoteError, match="expected role admin or render") as caught:
            publisher.render(VIEW)
        assert caught.value.code == "forbidden"
    with site.client("render") as viewer:
        assert viewer.render(VIEW, 4, 4).rgb.shape == (4, 4, 3)
        assert viewer.status() == {"frames": 1}
        with pytest.raises(RemoteError, match="expected role admin or publish"):
            viewer.publish([frame(1)])
    with site.client("admin") as admin:
        assert admin.publish([frame(2)])["accepted"] == 1
        assert admin.render(VIEW, 4, 4).map_version == 3
    assert len(site.daemon.kept) == 2


def test_unknown_key_gets_nothing(site: Site) -> None:
    refused = pytest.raises(Unreachable, match="does not know our key")
    with site.client("unknown", give_up_s=0.8) as stranger, refused:
        stranger.status()
    assert not site.daemon.asked


def test_wrong_server_key_gets_nothing(site: Site) -> None:
    mistaken = site.client("admin", server="unknown", give_up_s=0.8)
    with mistaken, pytest.raises(Unreachable):
        mistaken.status()
    assert not site.daemon.asked


def test_plain_connection_gets_nothing(site: Site) -> None:
    plain = Client(site.daemon.address, timeout_s=0.3, give_up_s=0.8)
    with plain, pytest.raises(Unreachable):
        plain.status()
    context = zmq.Context[zmq.Socket[bytes]]()
    with context, context.socket(zmq.DEALER) as raw:
        raw.linger = 0
        raw.connect(site.daemon.address)
        for _ in range(50):
            raw.send_multipart(encode(EXAMPLES["status"]))
        assert not raw.poll(500)
    assert not site.daemon.asked
    with site.client("admin") as honest:
        assert honest.status() == {"frames": 0}


def test_a_removed_key_gets_nothing_from_its_next_message_on(site: Site) -> None:
    with site.client("publish", give_up_s=0.8) as publisher:
        assert publisher.publish([frame(0)])["accepted"] == 1
        lines = site.authorised.read_text().splitlines(keepends=True)
        site.authorised.write_text("".join(line for line in lines if "publish" not in line))
        with pytest.raises(Unreachable):
            publisher.publish([frame(1)])
    assert len(site.daemon.kept) == 1
    assert site.daemon.endpoint.dropped["stranger"] >= 1


def test_a_key_added_later_gets_in(site: Site) -> None:
    authorise(site.authorised, "late", ("render",), load_public(site.folder / "unknown.public"))
    with site.client("unknown") as late:
        assert late.status() == {"frames": 0}


def test_a_broken_list_lets_nobody_in(site: Site) -> None:
    site.authorised.write_text("this is not a list\n")
    with site.client("admin", give_up_s=0.8) as admin, pytest.raises(Unreachable):
        admin.status()


def test_every_clients_message_has_roles_and_no_daemons_message_has() -> None:
    daemons = {"welcome", "acks", "render-reply", "status-reply", "closed", "progress", "error"}
    daemons |= {"committed", "module-chunk"}
    assert {kind.tag for kind in ALLOWED} == set(MESSAGES) - daemons
    for name, message in EXAMPLES.items():
        with pytest.raises(Forbidden):
            check_role(STRANGER, message)
        if message.tag in daemons:
            with pytest.raises(Forbidden, match="only a daemon sends it"):
                check_role(LOCAL_USER, message)
        else:
            check_role(User(name, frozenset[Role]({"admin"})), message)


GOOD_KEY = zmq.curve_keypair()[0].decode()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"drone publish {GOOD_KEY} more", "list:1: expected NAME ROLE"),
        (f"# comment\n\ndrone fly {GOOD_KEY}", "list:3: expected roles of"),
        ("drone publish " + "x" * 39, "list:1: expected NAME ROLE"),
        ("drone publish " + "~" * 40, "list:1: expected a key of 40 Z85"),
        (f"a render {GOOD_KEY}\nb admin {GOOD_KEY}", "list:2: the key of a a second time"),
    ],
)
def test_a_bad_line_is_named(text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        parse_authorised(text, "list")


def test_roles_of_a_line() -> None:
    users = parse_authorised(f"# all\nboth publish,render {GOOD_KEY}\n", "list")
    assert users == {GOOD_KEY: User("both", frozenset[Role]({"publish", "render"}))}


def test_authorise_refuses_what_would_spoil_the_list(tmp_path: Path) -> None:
    path = tmp_path / "authorised"
    authorise(path, "a", ("render",), GOOD_KEY)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="a second time"):
        authorise(path, "b", ("admin",), GOOD_KEY)
    with pytest.raises(ConfigError):
        authorise(path, "c\nd admin", ("admin",), GOOD_KEY)
    assert path.read_bytes() == before
    assert path.stat().st_mode & 0o777 == 0o600


# Key files


def test_keygen_writes_safe_modes_and_reads_them_back(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        pair = keygen(tmp_path / "keys", "drone")
    finally:
        os.umask(previous)
    folder = tmp_path / "keys"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}
    assert modes == {"keys": 0o700, "drone.secret": 0o600, "drone.public": 0o644}
    assert load_secret(folder / "drone.secret") == pair
    assert load_public(folder / "drone.public") == pair.public
    assert pair.secret not in repr(pair)


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    pair = keygen(tmp_path / "keys", "drone")
    with pytest.raises(ConfigError, match="there already"):
        keygen(tmp_path / "keys", "drone")
    assert load_secret(tmp_path / "keys" / "drone.secret") == pair


@pytest.mark.parametrize("name", ["", "../drone", "a/b"])
def test_key_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="plain file name"):
        keygen(tmp_path, name)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o700 | 0o001])
def test_open_secret_is_refused(tmp_path: Path, mode: int) -> None:
    pair = keygen(tmp_path / "keys", "drone")
    path = tmp_path / "keys" / "drone.secret"
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"expected mode 0600 .* found {mode:04o}") as caught:
        load_secret(path)
    assert pair.secret not in str(caught.value)


def test_secret_in_a_folder_others_may_write_is_refused(tmp_path: Path) -> None:
    keygen(tmp_path / "keys", "drone")
    (tmp_path / "keys").chmod(0o777)
    with pytest.raises(ConfigError, match="only we may write"):
        load_secret(tmp_path / "keys" / "drone.secret")


def test_open_list_of_clients_is_refused(tmp_path: Path) -> None:
    keygen(tmp_path / "keys", "daemon")
    authorise(tmp_path / "list", "a", ("admin",), GOOD_KEY)
    (tmp_path / "list").chmod(0o664)
    with pytest.raises(ConfigError, match="expected mode 0600"):
        Keyring.load(tmp_path / "keys" / "daemon.secret", tmp_path / "list")


@pytest.mark.parametrize("content", [b"", b"short", b"~" * 40, b"\xff" * 40])
def test_damaged_key_file_is_named_and_not_repeated(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "drone.public"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="drone.public") as caught:
        load_public(path)
    assert "~~~" not in str(caught.value)


def test_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="key file .*nothing.public"):
        load_public(tmp_path / "nothing.public")
    with pytest.raises(ConfigError, match="needs both"):
        Client("tcp://127.0.0.1:9", server_key=tmp_path / "nothing.public")


def test_public_half_is_computed_from_the_secret(tmp_path: Path) -> None:
    pair = keygen(tmp_path / "keys", "drone")
    assert isinstance(pair, KeyPair)
    (tmp_path / "keys" / "drone.public").unlink()
    assert load_secret(tmp_path / "keys" / "drone.secret").public == pair.public
