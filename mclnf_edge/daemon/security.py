"""Who may say what: authorised keys by role, the CURVE authenticator, the table of roles.

The authorised-clients file is plain text, mode 0600, one client a line:

    NAME ROLE[,ROLE...] PUBLIC-KEY

It is read again whenever it changes, so a removed key loses its rights with its next message.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import zmq
from zmq.auth.thread import ThreadAuthenticator

from mclnf_edge.errors import ConfigError, ProtocolError
from mclnf_edge.wire.keys import KeyPair, check_key, load_secret, refuse_open_file
from mclnf_edge.wire.messages import (
    CloseTask,
    Drain,
    FetchModule,
    Follow,
    Hello,
    Message,
    PutFrame,
    PutSignal,
    RenderRequest,
    StatusRequest,
)

Role = Literal["publish", "render", "follow", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
ZAP_DOMAIN = "mclnf"

ALLOWED: Mapping[type[Message], frozenset[Role]] = {
    Hello: frozenset({"publish", "admin"}),
    PutFrame: frozenset({"publish", "admin"}),
    PutSignal: frozenset({"publish", "admin"}),
    CloseTask: frozenset({"publish", "admin"}),
    Drain: frozenset({"publish", "admin"}),
    RenderRequest: frozenset({"render", "admin"}),
    Follow: frozenset({"follow", "admin"}),
    FetchModule: frozenset({"follow", "admin"}),
    StatusRequest: frozenset(ROLES),
}
"""Which roles may send which message; what is not listed is not a client's to send."""

log = logging.getLogger(__name__)
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64})\s+([a-z,]+)\s+(\S{40})")


class Forbidden(ProtocolError):
    """The sender's role does not allow this message."""

    code = "forbidden"


@dataclass(frozen=True)
class User:
    """Who sent a message."""

    name: str
    roles: frozenset[Role]


LOCAL_USER = User("local", frozenset(ROLES))
"""Whoever speaks to a loopback socket without CURVE: any process of this machine."""

STRANGER = User("stranger", frozenset())


def check_role(user: User, message: Message) -> None:
    """Raise Forbidden unless one of the user's roles allows the message."""
    needed = ALLOWED.get(type(message), frozenset())
    if not user.roles & needed:
        expected = " or ".join(sorted(needed)) or "none: only a daemon sends it"
        have = ", ".join(sorted(user.roles)) or "no role"
        raise Forbidden(f"{message.tag}: expected role {expected}, {user.name} has {have}")


def parse_authorised(text: str, where: str) -> dict[str, User]:
    """Users by public key; raises ConfigError that names file, line and fault."""
    users: dict[str, User] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ConfigError(f"{where}:{number}: expected NAME ROLE[,ROLE] PUBLIC-KEY")
        name, roles, key = match.groups()
        unknown = set(roles.split(",")) - set(ROLES)
        if unknown:
            raise ConfigError(f"{where}:{number}: expected roles of {ROLES}, received {unknown}")
        if check_key(key, f"{where}:{number}") in users:
            raise ConfigError(f"{where}:{number}: the key of {users[key].name} a second time")
        users[key] = User(name, frozenset(role for role in ROLES if role in roles.split(",")))
    return users


def authorise(path: Path, name: str, roles: tuple[Role, ...], public: str) -> None:
    """Add a client to the authorised file (made with mode 0600); the whole file stays valid."""
    line = f"{name} {','.join(roles)} {public}\n"
    before = path.read_text("ascii") if path.exists() else ""
    parse_authorised(before + line, str(path))
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


@dataclass
class Keyring:
    """The daemon's own key pair and the clients it knows. Safe to use from several threads."""

    server: KeyPair
    path: Path
    _users: dict[str, User] = field(default_factory=dict)
    _stamp: tuple[int, int] = (0, 0)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def load(cls, secret: Path, authorised: Path) -> Keyring:
        """Read both files; raises ConfigError for a wrong line or an unsafe mode."""
        ring = cls(load_secret(secret), authorised)
        ring._reload()
        return ring

    def user(self, public: str) -> User:
        """The user of a Z85 public key, STRANGER (no role) when it is not authorised."""
        with self._lock:
            try:
                if self._stamp != self._stamp_now():
                    self._reload()
            except (ConfigError, OSError) as error:
                # Half-written or gone: nobody gets in on a list that cannot be trusted.
                log.error("authorised clients: %s", error)
                self._users = {}
            return self._users.get(public, STRANGER)

    def _stamp_now(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_mtime_ns, status.st_size

    def _reload(self) -> None:
        try:
            stamp, text = self._stamp_now(), self.path.read_text("ascii")
            refuse_open_file(self.path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"authorised clients {self.path}: {error}") from error
        self._users = parse_authorised(text, str(self.path))
        self._stamp = stamp
        log.info("authorised clients: %d of %s", len(self._users), self.path)


class _Provider:
    """What ZeroMQ's authenticator asks for each new connection."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the client with this Z85 public key may connect."""
        return bool(self._keyring.user(key.decode()).roles)


def start_authenticator(
    context: zmq.Context[zmq.Socket[bytes]], ring: Keyring
) -> ThreadAuthenticator:
    """Answer ZeroMQ's authentication requests from the keyring; start it before any bind."""
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(ZAP_DOMAIN, _Provider(ring))
    return authenticator
