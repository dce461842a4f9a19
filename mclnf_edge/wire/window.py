"""The publisher's window: which frames wait for an answer, and which are to be sent now.

Pure: time comes in as an argument and nothing here touches a socket.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mclnf_edge.wire.messages import Identity


@dataclass(slots=True)
class Entry:
    """One frame from when it is taken until it is answered.

    `hello` is the encoded `Hello` of its stream, `ticket` its record when it came from a spool.
    """

    identity: Identity
    number: int
    hello: bytes
    parts: list[bytes]
    ticket: object = None
    due: float = 0.0
    held: bool = False

    @property
    def size(self) -> int:
        """Bytes that count against the credit."""
        return sum(map(len, self.parts))

    @property
    def record(self) -> list[bytes]:
        """What a spool keeps of it: enough for another process to send it."""
        return [self.hello, *self.parts]


class SendWindow:
    """Frames that wait for their answer, in the order they were taken."""

    def __init__(self) -> None:
        self.credit_bytes = 0
        self._entries: dict[Identity, Entry] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, identity: object) -> bool:
        return identity in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def room(self, size: int) -> bool:
        """Whether `size` bytes more may wait: the credit allows it, or nothing else waits.

        A frame larger than the whole credit goes alone; without credit nothing goes.
        """
        fits = self._bytes + size <= self.credit_bytes or not self._entries
        held = any(entry.held for entry in self._entries.values())
        return self.credit_bytes > 0 and fits and not held

    def add(self, entry: Entry) -> None:
        """Take an entry, due at once; the same identity a second time is the caller's error."""
        if entry.identity in self._entries:
            raise ValueError(f"frame {entry.identity} already waits for its answer")
        self._entries[entry.identity] = entry
        self._bytes += entry.size

    def answered(self, identity: Identity) -> Entry | None:
        """Let go of an answered frame; None when it was answered before."""
        entry = self._entries.pop(identity, None)
        if entry is not None:
            self._bytes -= entry.size
        return entry

    def hold(self, identity: Identity, until: float) -> None:
        """The daemon is busy: this frame goes again at `until`, and nothing new before it."""
        if identity in self._entries:
            self._entries[identity].due = until
            self._entries[identity].held = True

    def due(self, now: float, resend_s: float) -> list[Entry]:
        """The frames to send now, oldest first; each is due again after `resend_s`."""
        entries = [entry for entry in self if entry.due <= now]
        for entry in entries:
            entry.due, entry.held = now + resend_s, False
        return entries

    def all_due(self) -> None:
        """The connection is new: everything goes again."""
        for entry in self:
            entry.due, entry.held = 0.0, False

    def clear(self) -> list[Entry]:
        """Let go of everything, oldest first."""
        entries = list(self)
        self._entries.clear()
        self._bytes = 0
        return entries
