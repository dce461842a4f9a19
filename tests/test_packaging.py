"""What gets installed where: dependencies, markers, pins, the unit file, a client on its own."""

from __future__ import annotations

import configparser
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import mclnf_edge

ROOT = Path(__file__).resolve().parents[1]
RUNTIMES = {"onnxruntime", "onnxruntime-gpu"}
MACHINES = {
    "desktop": ("x86_64", "linux"),
    "jetson": ("aarch64", "linux"),
    "mac": ("arm64", "darwin"),
}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    content: dict[str, Any] = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return content["project"]  # type: ignore[no-any-return]


def names(project: dict[str, Any], extra: str, machine: str = "desktop") -> set[str]:
    """Packages that an extra asks for on a machine; "" is the bare install."""
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    arch, system = MACHINES[machine]
    found: set[str] = set()
    for line in lines:
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate(
            {"platform_machine": arch, "sys_platform": system}
        ):
            continue
        if wanted.name == project["name"]:
            for other in wanted.extras:
                found |= names(project, other, machine)
        else:
            found.add(wanted.name.lower())
    return found


def test_the_bare_install_is_the_client(project: dict[str, Any]) -> None:
    assert names(project, "") == {
        "msgpack",
        "numpy",
        "opencv-python-headless",
        "pyyaml",
        "pyzmq",
        "typer",
    }


@pytest.mark.parametrize("extra", ["daemon", "cpu"])
@pytest.mark.parametrize("machine", MACHINES)
def test_each_machine_gets_one_onnx_runtime(
    project: dict[str, Any], machine: str, extra: str
) -> None:
    gpu = extra == "daemon" and machine == "desktop"
    chosen = names(project, extra, machine) & RUNTIMES
    assert chosen == {"onnxruntime-gpu" if gpu else "onnxruntime"}
    assert {"torch", "numba", "onnx"} <= names(project, extra, machine)


def test_every_dependency_is_pinned_within_its_range(project: dict[str, Any]) -> None:
    pins: dict[str, set[str]] = {}
    for line in (ROOT / "configs" / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (only,) = pin.specifier
            assert only.operator == "==", line
            pins.setdefault(pin.name.lower(), set()).add(only.version)
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    for wanted in (Requirement(line) for lines in lists for line in lines):
        if wanted.name != project["name"]:
            versions = pins[wanted.name.lower()]
            assert all(wanted.specifier.contains(version) for version in versions), wanted
    assert pins["torch"] == {"2.13.0"}


def test_the_version_stands_in_one_place(project: dict[str, Any]) -> None:
    assert "version" not in project and "version" in project["dynamic"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {mclnf_edge.__version__}" in changelog
    assert Version(mclnf_edge.__version__) >= Version("0.1.0")


def test_the_unit_is_watched_and_restarted() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(ROOT / "configs" / "mclnf-edge.service")
    service = unit["Service"]
    assert service["Type"] == "notify" and int(service["WatchdogSec"]) > 0
    assert service["Restart"] == "on-failure" and service["KillSignal"] == "SIGTERM"
    assert " serve " in service["ExecStart"] and "--map /var/lib/" in service["ExecStart"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_unit() -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", str(ROOT / "configs" / "mclnf-edge.service")],
        capture_output=True,
        text=True,
    )
    assert "mclnf-edge.service" not in done.stderr, done.stderr


@pytest.mark.parametrize("target", ["setup", "test", "demo", "lint", "types"])
def test_make_targets_exist(target: str) -> None:
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_make_demo_passes_its_settings_on() -> None:
    words = ["make", "-n", "demo", "DATA=my flights/b", "SECONDS=7"]
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    assert 'demo --data "my flights/b" --seconds 7' in done.stdout


def tracked_copy(folder: Path) -> Path:
    """The tracked files as they are now, in a folder of their own."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
    files = [name for name in listed.stdout.decode().split("\0") if name]
    for name in files:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
def test_the_client_works_without_learning_libraries(tmp_path: Path) -> None:
    source = tracked_copy(tmp_path / "source")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pins = source / "configs" / "constraints.txt"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", pins, source], check=True)
    code = (
        "import importlib.util as u; from mclnf_edge.client import Client; import mclnf_edge.cli;"
        "import mclnf_edge.commands, mclnf_edge.config; c = Client('tcp://127.0.0.1:9'); c.close();"
        "print([n for n in ('torch', 'numba', 'onnx', 'onnxruntime') if u.find_spec(n)])"
    )
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    script = tmp_path / "venv" / "bin" / "mclnf-edge"
    assert subprocess.run([script, "--help"], capture_output=True).returncode == 0
    refused = subprocess.run([script, "serve"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1 and "install mclnf-edge[daemon]" in refused.stderr


@pytest.mark.slow
def test_the_source_archive_holds_what_the_wheel_needs(tmp_path: Path) -> None:
    source = tracked_copy(tmp_path / "source")
    subprocess.run(["uv", "build", "-q", "--out-dir", tmp_path, source], check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "mclnf_edge/py.typed", "mclnf_edge/cli.py"} <= inside
    wheel = next(tmp_path.glob("*.whl"))
    assert "py3-none-any" in wheel.name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not on the path")
def test_dependencies_resolve_for_aarch64() -> None:
    done = subprocess.run(
        ["bash", "tools/check_aarch64.sh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONS": "3.10"},
    )
    assert done.returncode == 0, done.stderr
    assert "python 3.10 --extra=daemon" in done.stdout and "onnxruntime==" in done.stdout
