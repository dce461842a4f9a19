"""The log as JSON: one object a line, with what it is about."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from mclnf_edge.daemon.logs import JsonLines
from tests.daemon.conftest import CONFIG, Daemon
from tests.mapping.flights import Flight


def test_a_line_is_json_whatever_is_in_it() -> None:
    record = logging.LogRecord("a.b", logging.ERROR, "f.py", 1, 'task %s "\n%s', ("x", 2), None)
    record.task, record.other = "x", "left out"
    line = JsonLines().format(record)
    told = json.loads(line)
    assert "\n" not in line and told["message"] == 'task x "\n2' and told["level"] == "error"
    assert told["task"] == "x" and told["source"] == "a.b" and "other" not in told


def test_an_exception_is_in_its_line() -> None:
    try:
        raise ValueError("seven")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("a", logging.ERROR, "f.py", 1, "failed", (), info)
    line = JsonLines().format(record)
    assert "ValueError: seven" in json.loads(line)["error"] and "\n" not in line


def test_a_daemon_names_tasks_and_frames_in_its_lines(tmp_path: Path, flight: Flight) -> None:
    daemon = Daemon(tmp_path)
    daemon.config.write_text(CONFIG.replace("watch: {", "watch: {log: json, "))
    daemon.start()
    try:
        with daemon.client("flight") as client:
            client.publish(flight.frames)
            list(client.drain())
            modules = {m["id"] for m in client.status()["modules"]}
        assert daemon.stop() == 0
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.kill()
    lines = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    committed = [told for told in lines if "committed" in told["message"]]
    assert {told["task"] for told in committed} == modules
    assert all(told["version"] == 1 for told in committed)
    opened = [told for told in lines if "opened by frame" in told["message"]]
    assert modules <= {told["task"] for told in opened} and all(told["frame"] for told in opened)
    assert any((told.get("session"), told.get("stream")) == ("flight", "front") for told in lines)
