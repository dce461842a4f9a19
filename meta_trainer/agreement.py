"""Our order of methods beside the paper's: agreeing pairs, what explains the others, what falls."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from meta_trainer.evaluate import bootstrap, worst_fall
from meta_trainer.methods import AT_ONCE
from meta_trainer.runs import Setting

Row = Mapping[str, Any]

_TOLD = ("width", "tasks")
"""What tells a table's rows of one method apart."""

TASKS = Setting("").tasks
"""Of a row that does not say how many."""


class Pair(NamedTuple):
    """Two rows of a data set: the paper's difference of their best values, and ours."""

    a: Row
    b: Row
    printed: float
    ours: float

    @property
    def agrees(self) -> bool:
        """Whether the two stand in the paper's order."""
        return self.printed * self.ours > 0


def pairs(rows: Sequence[Row], dataset: str) -> list[Pair]:
    """All pairs of methods that the paper does not print as equal ("Ours" for both variants)."""
    known = [
        r for r in rows
        if r.get("dataset") == dataset and r.get("paper") and r.get("best") is not None
    ]  # fmt: skip
    found = [
        Pair(a, b, a["paper"]["best"] - b["paper"]["best"], a["best"] - b["best"])
        for a, b in itertools.combinations(known, 2)
    ]
    return [pair for pair in found if pair.printed]


def agreement(rows: Sequence[Row]) -> dict[str, tuple[int, int, list[str]]]:
    """Per data set: agreeing pairs, pairs, and the pairs whose order (by best) is not the paper's.

    A tilde marks a pair whose difference over signals is not decided (`undecided`).
    """
    found: dict[str, tuple[int, int, list[str]]] = {}
    for dataset in dict.fromkeys(r["dataset"] for r in rows if r.get("dataset")):
        compared = pairs(rows, dataset)
        wrong = [
            f"{named(a)} {'~' if undecided(a, b) else '/'} {named(b)}"
            for a, b, *_ in (pair for pair in compared if not pair.agrees)
        ]
        if compared:
            found[dataset] = (len(compared) - len(wrong), len(compared), wrong)
    return found


def named(row: Row) -> str:
    """A row's method with its width or number of tasks where its table has several."""
    return " ".join([row["method"], *(f"{row[k]} {k}" for k in _TOLD if k in row)])


class Try(NamedTuple):
    """Changes of one or both of a pair's methods, the difference then, if it is undecided."""

    told: tuple[str, ...]
    difference: float
    level: bool


class Explanation(NamedTuple):
    """What is known of a pair out of the paper's order, and whether that settles it: in order or
    level with a change, or undecided."""

    told: str
    settled: bool


def explanations(rows: Sequence[Row], tried: Sequence[Row], dataset: str) -> Iterator[Explanation]:
    """For each pair out of the paper's order, which of the changes of `causes` put it in order.

    A change of one method counts before changes of both; where no change does, a pair that the
    signals leave undecided as it is, or with a change, is told so.

    Args:
        rows: one metric's rows of a table.
        tried: rows of `causes`, of any metric.
        dataset: whose rows.
    """
    tried = [r for r in tried if r["metric"] == rows[0]["metric"]]
    for pair in pairs(rows, dataset):
        if pair.agrees:
            continue
        changes = _tries(pair, tried)
        good = [t.told for t in changes if pair.printed * t.difference > 0]
        fewest, settled = min(map(len, good), default=0), True
        if good:
            told = "in order with " + _or(t for t in good if len(t) == fewest)
        elif undecided(pair.a, pair.b):
            told = "undecided over the signals as it is"
        elif any(t.level for t in changes):
            told = "level (undecided) with " + _or(t.told for t in changes if t.level)
        else:
            told, settled = f"not with any of {len(changes)} changes", False
        yield Explanation(f"{named(pair.a)} / {named(pair.b)}: {told}", settled)


def _tries(pair: Pair, tried: Sequence[Row]) -> list[Try]:
    """Every change of either method, of both, and more steps of both.

    Those are compared by the best that each has within the steps that both took.
    """
    ways = [_ways(pair.a, pair.b, tried), _ways(pair.b, pair.a, tried)]
    found = []
    for a, b in itertools.product(*ways):
        told = tuple(named(r) for r in (a, b) if "of" in r)
        found.append(Try(told, a["best"] - b["best"], undecided(a, b)))
    longer = [_longer(own, tried) for own in (pair.a, pair.b)]
    if longer[0] is not None and longer[1] is not None:
        steps = min(int(list(row["curve"])[-1]) for row in longer if row)
        difference = _best_to(longer[0], steps) - _best_to(longer[1], steps)
        found.append(Try((f"both to {steps} steps",), difference, False))
    return found[1:]  # the first is the pair as it is


def _ways(own: Row, other: Row, tried: Sequence[Row]) -> list[Row]:
    """A row, its changes, and itself after as many steps of a network as the other takes in all.

    The last where that one's network goes through the tasks in turn and this one's does not.
    """
    found = [own, *(r for r in tried if _is_of(r, own) and not r["further"])]
    if (longer := _longer(own, tried)) and own["method"] in AT_ONCE:
        steps = own.get("tasks", TASKS) * int(list(own["curve"])[-1])
        if other["method"] not in AT_ONCE and str(steps) in longer["curve"]:
            told = f"{own['method']} (to {steps} steps, as many of a network as {other['method']})"
            best = _best_to(longer, steps)
            found.append({"method": told, "of": own["method"], "best": best})
    return found


def _longer(own: Row, tried: Sequence[Row]) -> Row | None:
    """The row of a method's more steps, if it was tried."""
    return next((r for r in tried if _is_of(r, own) and r["further"]), None)


def _is_of(tried: Row, own: Row) -> bool:
    """Whether a row of `causes` is a change of this row of a table."""
    return tried["of"] == own["method"] and all(tried.get(k) == own.get(k) for k in _TOLD)


def _or(changes: Iterable[tuple[str, ...]]) -> str:
    return " or ".join(" and ".join(change) for change in changes)


def _best_to(row: Row, steps: int) -> float:
    """The best value of a row's curve within so many steps."""
    values = [v for k, v in row["curve"].items() if v is not None and int(k) <= steps]
    return float(max(values))


def undecided(a: Row, b: Row) -> bool:
    """Whether the 95 % bootstrap interval of two rows' difference, signal by signal, includes 0.

    Methods are compared on the same signals, which differ by more than the methods do.
    """
    ours, theirs = a.get("per_signal") or {}, b.get("per_signal") or {}
    low, high = bootstrap([
        ours[s] - theirs[s]
        for s in ours.keys() & theirs.keys()
        if ours[s] is not None and theirs[s] is not None
    ])  # fmt: skip
    return low <= 0 <= high


class Fall(NamedTuple):
    """How far the mean over runs ever is below its running best, how many runs are by more than
    `FALLEN`, of how many, and the largest of these."""

    mean: float
    runs: int
    of: int
    worst: float


FALLEN = 0.2


def falls(rows: Sequence[Row]) -> dict[tuple[str, str], Fall]:
    """(data set, method) -> what falls below its running best, in dB."""
    found: dict[tuple[str, str], Fall] = {}
    for row in rows:
        drop = worst_fall(row.get("curve", {}).values())
        runs = row.get("run_falls") or [0.0]
        count = sum(fall > FALLEN for fall in runs)
        found[row["dataset"], row["method"]] = Fall(drop, count, len(runs), max(runs))
    return found


def endings(rows: Sequence[Row]) -> Iterator[str]:
    """Per data set, which methods end more than 0.2 dB below their best, beside the paper's."""
    known = [r for r in rows if r["metric"] == "psnr" and r.get("paper") and r.get("last")]
    for dataset in dict.fromkeys(r["dataset"] for r in known):
        here = [r for r in known if r["dataset"] == dataset]
        ours = {r["method"]: r["best"] - r["last"] for r in here}
        printed = {r["method"]: r["paper"]["best"] - r["paper"]["last"] for r in here}
        told = [
            f"{name} by {ours[name]:.1f} (paper {printed[name]:.1f})"
            for name in ours
            if max(ours[name], printed[name]) > FALLEN
        ]
        yield f"{dataset}: at the last step below their best, dB: {', '.join(told) or 'none'}."
