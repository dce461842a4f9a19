"""A TCP proxy that cuts, delays and swallows: the bad network between client and daemon."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import deque
from types import TracebackType


class TcpProxy:
    """Forwards 127.0.0.1:`port` to `target`; faults are switched on while it runs.

    `delay_s` holds every byte that long; `black_hole` swallows both directions as a dead link
    does; `cut()` resets every connection; `refuse` accepts and at once resets new ones.
    `spoil` flips a bit of that many of the next pieces of more than 1,000 bytes that come from the
    target. `bytes_s` is the most that goes through in a second, both directions together.
    `forwarded` counts bytes.
    """

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("tcp://").rsplit(":", 1)
        self._target = (host, int(port))
        self.delay_s = 0.0
        self.black_hole = self.refuse = False
        self.spoil, self.bytes_s = 0, 0.0
        self.forwarded = 0
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._held: deque[tuple[float, socket.socket, bytes]] = deque()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._lock = threading.Lock()
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> TcpProxy:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stop = True
        self._thread.join(10)
        self.cut()
        self._listener.close()

    def retarget(self, target: str) -> None:
        """Forward new connections to another daemon."""
        host, port = target.removeprefix("tcp://").rsplit(":", 1)
        self._target = (host, int(port))

    def cut(self) -> None:
        """Reset every connection; bytes on their way are lost."""
        with self._lock:
            for pair in self._pairs:
                self._drop(*pair)
            self._pairs.clear()
            self._held.clear()

    def _drop(self, *pair: socket.socket) -> None:
        for end in pair:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(end)
            with contextlib.suppress(OSError):
                # A reset, not an orderly end: nothing more is delivered.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            end.close()

    def _run(self) -> None:
        while not self._stop:
            ready = self._selector.select(0.002 if self._held else 0.02)
            with self._lock:
                for key, _ in ready:
                    if key.data is None:
                        self._accept()
                    elif key.data[0].fileno() >= 0:
                        self._forward(key.data)
                self._release()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        self.connections += 1
        try:
            if self.refuse:
                raise OSError("refused by the test")
            server = socket.create_connection(self._target, 1)
        except OSError:
            self._drop(client)
            return
        self._pairs.append((client, server))
        self._selector.register(client, selectors.EVENT_READ, (client, server))
        self._selector.register(server, selectors.EVENT_READ, (server, client))

    def _forward(self, ends: tuple[socket.socket, socket.socket]) -> None:
        source, sink = ends
        try:
            data = source.recv(65_536)
        except OSError:
            data = b""
        if not data:
            self._pairs = [pair for pair in self._pairs if source not in pair]
            self._drop(source, sink)
        elif not self.black_hole:
            if self.spoil and len(data) > 1_000 and (sink, source) in self._pairs:
                self.spoil -= 1
                data = data[:500] + bytes([data[500] ^ 1]) + data[501:]
            if self.bytes_s:
                time.sleep(len(data) / self.bytes_s)
            self._held.append((time.monotonic() + self.delay_s, sink, data))

    def _release(self) -> None:
        while self._held and self._held[0][0] <= time.monotonic():
            _, sink, data = self._held.popleft()
            with contextlib.suppress(OSError):
                sink.sendall(data)
                self.forwarded += len(data)
