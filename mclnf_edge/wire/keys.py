"""CURVE key files: made, written and read with safe modes.

A key pair is two files of one line each: NAME.secret (mode 0600) and NAME.public (0644), both
Z85 text of 40 characters. A secret whose file or folder others could read or change is refused.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from mclnf_edge.errors import ConfigError


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair as Z85 text; the secret never shows in a log."""

    public: str
    secret: str = field(repr=False)


def keygen(folder: Path, name: str) -> KeyPair:
    """Make a key pair and write NAME.secret and NAME.public into `folder` (made with 0700).

    Raises ConfigError when a key of that name is there already: keys are never overwritten.
    """
    if not name or Path(name).name != name:
        raise ConfigError(f"key name: expected a plain file name, received {name!r}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_open_folder(folder)
    public, secret = (key.decode() for key in zmq.curve_keypair())
    _write_new(folder / f"{name}.secret", secret, 0o600)
    _write_new(folder / f"{name}.public", public, 0o644)
    return KeyPair(public, secret)


def load_secret(path: Path) -> KeyPair:
    """The key pair of a .secret file; raises ConfigError when its modes are unsafe."""
    secret = _read(path)
    refuse_open_file(path)
    _refuse_open_folder(path.absolute().parent)
    return KeyPair(zmq.curve_public(check_key(secret, str(path)).encode()).decode(), secret)


def load_public(path: Path) -> str:
    """The public key of a .public file."""
    return check_key(_read(path), str(path))


def check_key(text: str, where: str) -> str:
    """`text` when it is 32 bytes in Z85; raises ConfigError without repeating it."""
    try:
        sound = len(text) == 40 and len(z85.decode(text)) == 32
    except Exception:  # z85 raises whatever its arithmetic meets
        sound = False
    if not sound:
        raise ConfigError(f"{where}: expected a key of 40 Z85 characters, got {len(text)} others")
    return text


def refuse_open_file(path: Path) -> None:
    """Raise ConfigError unless `path` is ours and closed to group and others."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()) or stat.S_IMODE(status.st_mode) & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"{path}: expected mode 0600 and our own file, found {mode:04o}")


def _refuse_open_folder(folder: Path) -> None:
    status = folder.stat()
    if status.st_uid not in (0, os.geteuid()) or stat.S_IMODE(status.st_mode) & 0o022:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"{folder}: expected a folder only we may write, found {mode:04o}")


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"key file {path}: {error}") from error


def _write_new(path: Path, text: str, mode: int) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise ConfigError(f"{path}: a key of that name is there already") from error
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(handle)
