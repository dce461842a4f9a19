"""The daemon's log: one line per event on stderr, as text or as JSON."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Final, Literal

FIELDS: Final = ("task", "version", "frame", "session", "stream", "seq", "code")
"""What an event may be about, given as its `extra`: keys of a JSON line where they apply."""


class JsonLines(logging.Formatter):
    """`time` (UTC, ISO 8601), `level`, `source`, `message`, the event's FIELDS, `error`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "source": record.name,
            "message": record.getMessage(),
        }
        line |= {key: getattr(record, key) for key in FIELDS if hasattr(record, key)}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(style: Literal["text", "json"]) -> None:
    """Log from here on, unless the program that this runs in does so already."""
    root = logging.getLogger()
    if root.handlers:
        return
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if style == "json" else text)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
