"""The daemon as a process: map a small flight, restart, kill, send it nonsense."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mclnf_edge.errors import MclnfError, RemoteError
from mclnf_edge.images import encode_image
from mclnf_edge.maths.metrics import psnr
from mclnf_edge.store import MapStore, map_check
from mclnf_edge.types import Frame, View, WorldFrame
from mclnf_edge.world_frames import conversion
from tests.daemon.conftest import CONFIG, Daemon
from tests.mapping.flights import Flight


def send(daemon: Daemon, frames: list[Frame], session: str = "flight") -> dict[str, int]:
    with daemon.client(session) as client:
        return dict(client.publish(frames))


def drained(daemon: Daemon) -> Any:
    with daemon.client() as client:
        return list(client.drain())[-1]


def held_out_psnr(daemon: Daemon, flight: Flight) -> float:
    with daemon.client() as client:
        shown = [client.render(view).rgb for view in flight.views]
    return float(np.mean([psnr(a, b) for a, b in zip(shown, flight.truth, strict=True)]))


def until(holds: Callable[[], bool], within_s: float = 10.0) -> None:
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def command(*words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mclnf_edge.cli", *words], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout


def test_a_flight_is_mapped_closed_and_served_again(daemon: Daemon, flight: Flight) -> None:
    counts = send(daemon, flight.frames)
    assert counts["accepted"] == len(flight.frames)
    last = drained(daemon)
    assert last.done and last.modules_open == 0 and last.modules_closed >= 2
    score = held_out_psnr(daemon, flight)
    assert score > flight.mean_psnr() + 6
    with daemon.client() as client:
        status = client.status()
    assert {"modules", "streams", "device", "engine", "memory_mb", "uptime_s"} <= status.keys()
    for module in status["modules"]:
        keys = {"id", "version", "state", "steps", "frames", "bounds", "digest", "psnr"}
        assert keys <= module.keys() and module["state"] == "closed" and module["digest"]
    stream = status["streams"][0]
    assert (stream["accepted"], stream["last_seq"]) == (len(flight.frames), 7)
    assert daemon.stop() == 0

    pictures = [f.image[20:120] for f in flight.frames]
    for file in daemon.map.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert not any(p in data for p in pictures), f"{file} holds a picture of a closed task"
    code, out = command("map", "check", str(daemon.map), "--json")
    assert code == 0, out
    code, out = command("map", "info", str(daemon.map), "--json")
    told = {m["id"]: m["digest"] for m in json.loads(out)["modules"]}
    assert told == {m["id"]: m["digest"] for m in status["modules"]}

    daemon.start()
    assert held_out_psnr(daemon, flight) == pytest.approx(score, abs=0.01)


def test_resends_are_duplicates_and_a_new_session_is_not(daemon: Daemon, flight: Flight) -> None:
    first = flight.frames[:3]
    assert send(daemon, first, "one")["accepted"] == 3
    assert send(daemon, first, "one")["duplicate"] == 3
    assert send(daemon, first[::-1], "two")["accepted"] == 3, "another session, out of order"
    hover = [replace(first[0], seq=20 + i) for i in range(3)]
    counts = send(daemon, hover, "three")
    assert counts["accepted"] == 1 and counts["redundant"] == 2


def test_bad_frames_are_refused_by_name_and_the_rest_goes_on(
    daemon: Daemon, flight: Flight
) -> None:
    good = flight.frames[0]
    nan, sheared = good.T_world_camera.copy(), good.T_world_camera.copy()
    nan[0, 3], sheared[0, 0] = np.nan, 3.0
    tiny, small = np.zeros((10, 10), np.uint8), good.camera.scaled(10, 10)
    whole = np.zeros((good.camera.height, good.camera.width), np.uint8)
    bad = {
        "pose": replace(good, seq=1, T_world_camera=nan),
        "rotation": replace(good, seq=2, T_world_camera=sheared),
        "fx": replace(good, seq=3, camera=replace(good.camera, fx=1e-2)),
        "decode": replace(good, seq=4, image=b"not a picture at all"),
        "size": replace(good, seq=5, camera=replace(good.camera, width=64)),
        "cut": replace(good, seq=6, image=good.image[: len(good.image) // 2]),
        "mask: expected": replace(good, seq=7, mask=b"\x89PNG\r\n\x1a\n!"),
        "mask: the camera says": replace(good, seq=8, mask=encode_image(tiny, "png")),
        "depth: expected": replace(good, seq=9, depth=encode_image(whole, "png")),
        "at least 32 pixels": replace(good, seq=10, camera=small, image=encode_image(tiny, "png")),
    }
    reasons: list[str] = []
    with daemon.client("bad") as client:
        for frame in bad.values():
            try:
                counts = client.publish([frame], on_ack=lambda a: reasons.append(a.reason))
                assert counts["accepted"] == 0
            except MclnfError as error:  # what is no frame at all is an error of its own
                reasons.append(str(error))
        assert len(reasons) == len(bad) and all(reasons)
        assert all(word in reason for word, reason in list(zip(bad, reasons, strict=True))[6:])
        held_out = replace(flight.frames[2], seq=20, split="test")
        assert client.publish([held_out])["redundant"] == 1, "it is not learned from"
        assert client.publish([replace(flight.frames[1], seq=30)])["accepted"] == 1
        assert client.status()["streams"][0]["last_seq"] == 30


def test_a_map_of_another_kind_is_refused(daemon: Daemon, flight: Flight, tmp_path: Path) -> None:
    send(daemon, flight.frames[:2])
    assert daemon.stop() == 0
    other = tmp_path / "other.yaml"
    other.write_text(CONFIG.replace("cell_size_m: 20.0", "cell_size_m: 31.0"))
    done = subprocess.run(
        [sys.executable, "-m", "mclnf_edge.cli", "serve", "--map", str(daemon.map)]
        + ["--bind", "tcp://127.0.0.1:0", "--config", str(other)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0 and "cell_size_m" in done.stderr
    assert map_check(daemon.map) == []


def files_of(folder: Path) -> dict[str, bytes]:
    """Every committed module file with its bytes."""
    return {p.name: p.read_bytes() for p in (folder / "modules").glob("*.safetensors")}


def test_twenty_kills_lose_no_acknowledged_frame(daemon: Daemon, flight: Flight) -> None:
    """SIGKILL at random moments while publishing, adapting and closing."""
    choose = random.Random(4)
    closed: dict[str, bytes] = {}
    for turn in range(20):
        frame = flight.frames[turn % len(flight.frames)]
        moved = frame.T_world_camera.copy()
        moved[0, 3] += 0.3 * turn
        with daemon.client("drone") as client:
            assert client.publish([replace(frame, seq=turn, T_world_camera=moved)])["accepted"] == 1
        if turn % 5 == 4:
            assert drained(daemon).done
        time.sleep(choose.uniform(0, 0.4))
        daemon.kill()
        with MapStore.open(daemon.map, create=False, read_only=True) as store:
            stream, held = store.streams()[0], {f.seq for f in store.held_frames()}
            counts = store.counts()
        assert stream["accepted"] == turn + 1 and stream["duplicate"] == 0
        assert held <= set(range(turn + 1)) and (turn in held or turn % 5 == 4)
        assert counts["rays"] > 0 or len(held) == turn + 1, "a frame is held or was trained"
        now = files_of(daemon.map)
        assert closed.items() <= now.items(), "a closed version changed"
        closed = now
        daemon.start()
    assert len(closed) >= 2, "nothing was closed while it was killed"
    assert drained(daemon).done
    assert map_check(daemon.map) == []
    with daemon.client("drone") as client:
        assert client.publish([replace(flight.frames[0], seq=3)])["duplicate"] == 1


def test_a_close_request_outlives_a_kill(daemon: Daemon, flight: Flight) -> None:
    """It is in the ledger before it is answered; no checkpoint comes in between."""
    daemon.kill()
    daemon.config.write_text(CONFIG.replace("checkpoint_s: 1.0", "checkpoint_s: 600"))
    daemon.start()
    with daemon.client("drone") as client:
        assert client.publish(flight.frames)["accepted"] == len(flight.frames)
        client.close_task()
    daemon.kill()
    with MapStore.open(daemon.map, create=False, read_only=True) as store:
        assert [state for state, _ in store.tasks().values()] == ["closing"]
    daemon.start()
    end = time.monotonic() + 120
    with daemon.client() as client:
        while any(m["state"] != "closed" for m in (client.status()["modules"] or [{"state": ""}])):
            assert time.monotonic() < end, "nothing else asks these modules to close"
            time.sleep(0.2)
    assert daemon.stop() == 0
    with MapStore.open(daemon.map, create=False, read_only=True) as store:
        assert [state for state, _ in store.tasks().values()] == ["ended"]


def test_a_damaged_module_is_quarantined_and_the_rest_is_served(
    daemon: Daemon, flight: Flight
) -> None:
    """One byte of one file changes while the daemon is down; a view that needs it finds out."""
    send(daemon, flight.frames)
    assert drained(daemon).done and daemon.stop() == 0
    file = sorted((daemon.map / "modules").iterdir())[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    daemon.start()
    with daemon.client() as client:
        shown = [client.render(View(f.camera, f.T_world_camera)) for f in flight.frames]
        assert any(render.known.any() for render in shown)
        until(lambda: [m["state"] for m in client.status()["modules"]].count("quarantined") == 1)
        states = [module["state"] for module in client.status()["modules"]]
        assert states.count("closed") == len(states) - 1 > 0


def test_a_late_render_is_told_that_it_is_stale(daemon: Daemon, flight: Flight) -> None:
    send(daemon, flight.frames)
    with daemon.client() as client:
        with pytest.raises(RemoteError) as told:
            for _ in range(200):  # one of them comes while a module is seeded
                client.render(flight.views[0], deadline_ms=1)
        assert told.value.code == "stale"
        assert client.render(flight.views[0]).rgb.shape == flight.truth[0].shape


def test_streams_in_two_coordinate_systems_make_one_map(daemon: Daemon, flight: Flight) -> None:
    """Half of a flight in local ENU, half in UTM; views in either show the same."""
    local, utm = WorldFrame("local-enu", (52.2, 15.9, 100.0)), WorldFrame("EPSG:32633")
    to_utm = conversion(local, utm)
    halves = {local: flight.frames[::2], utm: flight.frames[1::2]}
    for world, frames in halves.items():
        told = [f if world is local else _told(f, to_utm(f.T_world_camera)) for f in frames]
        with daemon.client() as client:
            client.hello(stream=world.crs, world=world)
            assert client.publish(told)["accepted"] == len(frames)
    assert drained(daemon).done
    shown = []
    with daemon.client() as client:
        for view in flight.views:
            there = replace(view, T_world_camera=to_utm(view.T_world_camera), world=utm)
            shown.append(client.render(there).rgb)
            here = client.render(replace(view, world=local)).rgb
            assert psnr(shown[-1], here) > 45
        with pytest.raises(RemoteError, match="cannot convert"):
            client.hello(stream="nowhere", world=WorldFrame())
        away = replace(flight.views[0], world=WorldFrame("EPSG:4979"))
        with pytest.raises(RemoteError, match="nothing is mapped within 100 km"):
            client.render(away)
    pairs = zip(shown, flight.truth, strict=True)
    assert np.mean([psnr(a, b) for a, b in pairs]) > flight.mean_psnr() + 6


def _told(frame: Frame, pose: Any) -> Frame:
    return replace(frame, T_world_camera=pose)


def test_two_streams_at_once(daemon: Daemon, flight: Flight) -> None:
    with daemon.client("a") as one, daemon.client("b") as two:
        for a, b in zip(flight.frames[::2], flight.frames[1::2], strict=True):
            assert one.publish([a])["accepted"] and two.publish([b])["accepted"]
    assert drained(daemon).done
    with daemon.client() as client:
        assert sorted(s["accepted"] for s in client.status()["streams"]) == [4, 4]


def test_a_first_start_takes_frames_and_ends_while_kernels_are_compiled(
    tmp_path: Path, flight: Flight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cold"))
    daemon = Daemon(tmp_path).start()
    send(daemon, flight.frames[:2])
    assert daemon.stop() == 0
    assert "while kernels are compiled" in daemon.log.read_text()
    with MapStore.open(daemon.map, read_only=True) as store:
        assert store.counts()["held"] == 2
