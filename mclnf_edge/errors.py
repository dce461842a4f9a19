"""The exception tree.

MclnfError
├── ConfigError        a configuration file or value is wrong                        (exit code 2)
├── CaptureError       a capture, pose file, video or data set cannot be read        (exit code 2)
├── ProtocolError      a message breaks the wire protocol
│   ├── MessageTooLarge
│   ├── VersionMismatch
│   └── FrameRejected  a well-formed frame that the daemon may not use (pose, camera, image)
├── RemoteError        the daemon answered a request with an error
├── Unreachable        no daemon answered within the time-out
├── InitError          an initialization file cannot be used
├── StoreError         the map on disk cannot be read or written
│   ├── MapMismatch    the map was made with another init, cell size or format version
│   ├── Corrupt        a checksum does not match
│   └── DiskFull       no room, read-only or a failed fsync: the daemon answers `busy`
└── DeviceError        the compute device failed or ran out of memory

A message says what was expected, what was received, and where.
"""

from __future__ import annotations


class MclnfError(Exception):
    """Base of every error this package raises on purpose.

    `code` is the short stable name that travels on the wire and stands in `--json` output.
    """

    code = "error"


class ConfigError(MclnfError):
    """A configuration file, flag or value is wrong."""

    code = "config"


class CaptureError(MclnfError):
    """A capture, pose file, video or data set cannot be read."""

    code = "capture"


class ProtocolError(MclnfError):
    """A message breaks the wire protocol."""

    code = "protocol"


class MessageTooLarge(ProtocolError):
    """A message or one of its parts exceeds its stated limit."""

    code = "too-large"


class VersionMismatch(ProtocolError):
    """The peer speaks a protocol version that this side does not."""

    code = "version"


class FrameRejected(ProtocolError):
    """A well-formed frame that cannot be used: bad pose, camera, image or world frame."""

    code = "rejected"


class RemoteError(MclnfError):
    """The daemon answered a request with an error; `code` is the daemon's."""

    code = "remote"

    def __init__(self, message: str, code: str = "remote") -> None:
        super().__init__(message)
        self.code = code


class Unreachable(MclnfError):
    """No daemon answered within the time-out."""

    code = "unreachable"


class InitError(MclnfError):
    """An initialization file cannot be used (unsafe, of another modality, wrong shapes)."""

    code = "init"


class StoreError(MclnfError):
    """The map on disk cannot be read or written."""

    code = "store"


class MapMismatch(StoreError):
    """The map was made with another init, cell size, world frame or format version."""

    code = "map-mismatch"


class Corrupt(StoreError):
    """A checksum does not match what was committed."""

    code = "corrupt"


class DiskFull(StoreError):
    """No room, a read-only file system or a failed fsync."""

    code = "disk-full"


class DeviceError(MclnfError):
    """The compute device failed or ran out of memory."""

    code = "device"
