"""Take each promised mechanism out, one at a time, and see that its test fails without it.

    python -m tools.prove_promises [--rows WORD ...] [--out FILE] [--work DIR]

`tools/mechanisms.py` names, for the rows of the README's table of promises, a line of source that
keeps the promise, what stands there when it is gone, and the tests that must notice. Each is done
to a copy of the tree in a temporary folder; the tests run there without the change, where they
must pass, and with it, where they must fail. Results are kept in the JSON: a run that was cut
short goes on where it stopped, and what was proved is proved again when the mechanism's file or
the test's has changed. Exit code 1 when a test did not notice.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.measure import ROOT, open_results, save
from tools.mechanisms import MECHANISMS, Mechanism

PACKAGE = "mclnf_edge"
LIMIT_S = 400
_HEADING = "## What is promised"


def main() -> int:
    """Prove what is not proved yet; 1 when something was not noticed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", default=[], help="words of promises; all without")
    parser.add_argument("--out", type=Path, default=ROOT / "tools/results/promises.json")
    parser.add_argument("--work", type=Path, help="folder for the copy of the tree")
    given = parser.parse_args()
    results = open_results(given.out, {"limit_s": LIMIT_S})
    named = {mechanism.gone for mechanism in MECHANISMS}
    results["rows"] = [row for row in results["rows"] if row["gone"] in named]
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        tree = copy_tree(Path(folder) / "tree")
        for mechanism in chosen(given.rows):
            row = {**describe(mechanism), "sources": sources(mechanism)}
            kept = {**row, "outcome": "noticed"}
            if any(known.items() >= kept.items() for known in results["rows"]):
                continue
            row |= prove(tree, mechanism)
            results["rows"] = [r for r in results["rows"] if r["gone"] != row["gone"]] + [row]
            save(given.out, results)
            print(f"{row['outcome']:8} {row['seconds']:6.1f} s  {mechanism.gone}", flush=True)
    missed = [row for row in results["rows"] if row["outcome"] != "noticed"]
    return 1 if missed else 0


def chosen(words: list[str]) -> list[Mechanism]:
    """The mechanisms whose promise or description holds one of the words."""
    return [m for m in MECHANISMS if not words or any(w in m.promise + m.gone for w in words)]


def describe(mechanism: Mechanism) -> dict[str, Any]:
    """What was changed, for the results."""
    return {
        "promise": mechanism.promise,
        "gone": mechanism.gone,
        "file": mechanism.file,
        "out": mechanism.out,
        "in": mechanism.put,
        "tests": list(mechanism.tests),
    }


def promises() -> list[str]:
    """The first column of the README's table of promises."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(_HEADING)[2]
    table = re.findall(r"^\| (.*?) \|", text.partition("\n## ")[0], re.M)
    return table[1:]


def sources(mechanism: Mechanism) -> str:
    """Digest of the mechanism's file and of its tests' files."""
    digest = hashlib.sha256()
    for name in sorted({mechanism.file, *(test.partition("::")[0] for test in mechanism.tests)}):
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def copy_tree(target: Path) -> Path:
    """The working tree's files and its compiled kernels, with their times: those are their key."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    names = [Path(name) for name in listed.stdout.decode().split("\0") if name]
    kernels = [p.relative_to(ROOT) for p in (ROOT / PACKAGE).rglob("__pycache__/*.nb?")]
    for name in names + kernels:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def prove(tree: Path, mechanism: Mechanism) -> dict[str, Any]:
    """`outcome`: noticed, MISSED, or broken when the tests fail with the mechanism in place."""
    start = time.monotonic()
    code, told = run_tests(tree, mechanism.tests)
    if code != 0:
        return {"outcome": "broken", "seconds": _since(start), "said": told}
    with taken_out(tree, mechanism):
        code, told = run_tests(tree, mechanism.tests)
    outcome = {0: "MISSED", 1: "noticed"}.get(code, "broken")
    return {"outcome": outcome, "seconds": _since(start), "said": told}


class taken_out:  # noqa: N801 (used as a function)
    """The tree without the mechanism, for a while."""

    def __init__(self, tree: Path, mechanism: Mechanism) -> None:
        self._file, self._mechanism = tree / mechanism.file, mechanism
        self._before = self._file.read_text(encoding="utf-8")

    def __enter__(self) -> None:
        self._file.write_text(changed(self._before, self._mechanism), encoding="utf-8")

    def __exit__(self, *_: object) -> None:
        self._file.write_text(self._before, encoding="utf-8")


def changed(text: str, mechanism: Mechanism) -> str:
    """A file's text without the mechanism; ValueError unless its place is clear."""
    if text.count(mechanism.out) != 1:
        count = text.count(mechanism.out)
        raise ValueError(f"{mechanism.file}: {count} places for {mechanism.out!r}, expected 1")
    return text.replace(mechanism.out, mechanism.put)


def run_tests(tree: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest's exit code, 1 when it did not end, and its last lines."""
    words = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            words, cwd=tree, capture_output=True, text=True, timeout=LIMIT_S,
            env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1, f"did not end within {LIMIT_S} s"
    told = "\n".join(_verdicts(done.stdout)).replace(sys.executable, "python")
    return done.returncode, without_folders(told.replace(str(tree), "."))[:600]


def without_folders(text: str) -> str:
    """A text with this machine's folders left out of its absolute paths."""
    return re.sub(r"(?<![\w.<:/])/(?:[\w.+-]+/)+", "", text)


def _verdicts(output: str) -> Iterator[str]:
    """The lines of pytest's output that say what failed and how many passed."""
    for line in output.splitlines():
        if re.match(r"FAILED|ERROR|E  |\d+ (passed|failed)", line):
            yield re.sub(r" in [0-9.]+s.*", "", line)


def _since(start: float) -> float:
    return round(time.monotonic() - start, 1)


if __name__ == "__main__":
    sys.exit(main())
