"""Who may import whom, read from the source; and that the client needs no learning library."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mclnf_edge"

# Each part may import those of earlier lines, and its own files.
LAYERS = (
    ("errors", "resident", "types"),
    ("config", "geometry", "maths"),
    ("images", "engine", "sounds", "world_frames"),
    ("captures", "wire", "mapping", "store", "spool"),
    ("inference",),
    ("outbox",),
    ("client", "daemon"),
    ("report", "evaluate", "evaluate_signals"),
    ("commands", "demo"),
    ("cli",),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
TRAINER_MAY_IMPORT = {part for parts in LAYERS[:5] for part in parts}
HEAVY = ("torch", "numba", "onnx", "onnxruntime", "scipy", "matplotlib", "pyproj")
CLIENT_SIDE = ("client", "captures", "wire", "outbox", "spool", "report", "commands", "cli")


def part_of(path: Path, package: Path = PACKAGE) -> str:
    """The first name below the package: a folder or a file."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def imported(source: str) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def breaches(part: str, source: str) -> list[str]:
    """Imports that `part` may not have."""
    wrong, rank = [], RANK.get(part, 0)
    for name in imported(source):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        above = other != part and RANK.get(other, -1) >= rank
        if top in ("meta_trainer", "tests") or (top == "mclnf_edge" and above):
            wrong.append(name)
    return wrong


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_part_has_a_rank() -> None:
    parts = {part_of(path) for path in FILES} - {"__init__", "__main__"}
    assert parts <= RANK.keys(), "give the new part a line in LAYERS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    assert breaches(part_of(path), path.read_text(encoding="utf-8")) == []


def test_a_breach_would_be_seen() -> None:
    assert breaches("wire", "from mclnf_edge.store import ledger") == ["mclnf_edge.store.ledger"]
    assert breaches("maths", "def f():\n    import meta_trainer.data") == ["meta_trainer.data"]
    assert breaches("wire", "from mclnf_edge.types import Frame") == []


def test_the_trainer_uses_only_the_lower_ranks() -> None:
    wrong = []
    for path in sorted((ROOT / "meta_trainer").rglob("*.py")):
        for name in imported(path.read_text(encoding="utf-8")):
            top, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if top == "mclnf_edge" and other in RANK and other not in TRAINER_MAY_IMPORT:
                wrong.append(f"{path.name}: {name}")
    assert wrong == []


BLOCKED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
{code}
"""


def in_bare_interpreter(code: str, *heavy: str) -> subprocess.CompletedProcess[str]:
    """Run code where importing `heavy` fails as if it were not installed."""
    text = BLOCKED.format(heavy=heavy, code=code)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=ROOT)


def test_the_client_side_imports_without_learning_libraries() -> None:
    modules = [
        ".".join(("mclnf_edge", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in FILES
        if part_of(path) in CLIENT_SIDE
    ]
    done = in_bare_interpreter("import " + ", ".join(modules), *HEAVY)
    assert done.returncode == 0, done.stderr


def test_the_bare_interpreter_does_refuse() -> None:
    done = in_bare_interpreter("import mclnf_edge.maths.fields", "torch")
    assert done.returncode == 1 and "No module named 'torch'" in done.stderr


def test_help_loads_nothing_that_is_not_needed() -> None:
    code = (
        "from typer.testing import CliRunner\n"
        "from mclnf_edge.cli import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        "assert 'publish' in result.stdout"
    )
    done = in_bare_interpreter(code, *HEAVY, "cv2", "zmq", "yaml", "msgpack", "numpy")
    assert done.returncode == 0, done.stderr


def test_a_missing_library_is_named_with_the_install_to_make() -> None:
    code = "import sys; sys.argv = ['x', 'serve']; import mclnf_edge.cli as c; c.app()"
    done = in_bare_interpreter(code, "torch", "numba", "zmq", "yaml")
    assert done.returncode == 1
    assert done.stderr.startswith("error: No module named")
    assert "install mclnf-edge[daemon]" in done.stderr


def test_opencv_needs_no_display() -> None:
    import cv2

    assert "GUI:                           NONE" in cv2.getBuildInformation()
