"""Results as text, Markdown and HTML: tables beside the paper's, curves, panels."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from mclnf_edge.errors import ConfigError
from meta_trainer.agreement import (
    FALLEN,
    Row,
    agreement,
    endings,
    explanations,
    falls,
    named,
)
from meta_trainer.causes import CAUSES
from meta_trainer.data import DATASETS
from meta_trainer.rows import OURS
from meta_trainer.runs import SHIPPED, Setting

_STYLE = (
    "body{font:14px sans-serif;margin:2em}img{max-width:100%}p,li{max-width:60em}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}"
    "td,th{padding:2px 8px;border:1px solid #ccc;white-space:nowrap;text-align:left}"
    "th{background:#eee}tr:hover td{background:#f6f6f6}"
)

USUAL = dataclasses.asdict(Setting(""))

DISCREPANCIES = (
    "Table 7 counts 10 hidden 256x256 layers with 2 inputs and 3 outputs (659,459); the text says "
    "5 inputs and 4 outputs. 2,628,099 at width 512 lacks the input layer.",
    "Audio: 197,120 counts the weights of a width-256 network without biases; four modules of "
    "width 128 then have 197,632, not the printed 196,704.",
    "Table 1 gives ER up to 45.7 dB, near MOL; Table 2 gives the same runs an SSIM near 0.5, which "
    "such a PSNR excludes; Table 6 gives 30.8 dB on CelebA after 128 steps.",
    "View synthesis: the text describes 5 inputs (position, two angles); here position and unit "
    "direction are encoded, and a module of width 256 has 698,372 parameters. Table 1 ends at step "
    "1,024 and gives ER and EWC best values at steps 3,488 to 3,984.",
    "Table 6: 68 episodes/s of 4 x 128 steps on 180x180 pixels need some 85 TFLOP/s.",
    "Appendix D's text calls Ours better than MOL everywhere; Table 3 shows MOL ahead of Ours on "
    "ImageNette and VoxCeleb2. Its SSIM of 0.996 on video is 0.984 in Table 3.",
    "Appendix C's text has MIM ahead of mod at all steps; in Table 4 mod is ahead at width 512 "
    "after 32 and 64 steps, in Table 5 after 4 and 32 with five tasks and 512 with ten.",
    "Appendix F's text calls ER the nearest to Ours on CelebA, where MOL is, and Ours ahead on "
    "ImageNette, where Table 1 has ER and MOL ahead of it.",
    "A task of video is four frames in section 5.1, a frame sequence in 5.3.",
    "Theorem 2 as printed uses lambda_min(F) where F^-1 stands; F = 2I, L = mu = 1, eta = 0.1 "
    "breaks its rate (tests/maths/test_theorems.py). Eq. 21's bound on the weights does not hold "
    "without a clamp.",
)


def as_text(result: Mapping[str, Any]) -> str:
    """A result as a Markdown table."""
    datasets = dict.fromkeys(r["dataset"] for r in result["rows"] if "dataset" in r)
    names = dict.fromkeys(budget["name"] for budget in result["budgets"].values())
    about = ", ".join([*names, *filter(None, datasets), *filter(None, [result.get("folder")])])
    return "\n".join([f"## {result['target']} ({about})", "", *_table(result)])


def _table(result: Mapping[str, Any]) -> Iterator[str]:
    rows: Sequence[Row] = result["rows"]
    columns = _columns(rows)
    yield "| " + " | ".join(columns) + " |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        yield "| " + " | ".join(_cell(row, c) for c in columns) + " |"


def _columns(rows: Sequence[Row]) -> list[str]:
    """Columns that some row has, our figure followed by the paper's."""
    order = (
        "dataset", "method", "lam", "width", "tasks", "metric", "step1", "best", "best_step",
        "last", "parameters", "memory_mb", "episodes_per_s", "psnr", "interval", "seed_std",
        "forgetting", "transfer", "rate", "seeds", "n",
    )  # fmt: skip
    found = [c for c in order if any(row.get(c) is not None for row in rows)]
    papered = {k for row in rows for k in (row.get("paper") or {})}
    return [x for c in found for x in ([c, f"{c} (paper)"] if c in papered else [c])]


def _cell(row: Row, column: str) -> str:
    if column.endswith(" (paper)"):
        value = (row.get("paper") or {}).get(column.removesuffix(" (paper)"))
    else:
        value = row.get(column)
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return " … ".join("–" if v is None else f"{v:.2f}" for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(out: Path) -> tuple[Path, Path]:
    """`report.md` and `report.html` from the result files in `out`; figures inside the HTML.

    Raises:
        ConfigError: the folder has no results, or such of another version.
    """
    paths = sorted(p for p in out.glob("*-*.json") if p.is_file())
    if not paths:
        raise ConfigError(f"{out}: no results; run `python -m meta_trainer reproduce` first")
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    results = {path.stem: _read(path) for path in sorted(paths, key=_place)}
    body: list[str] = []
    for stem, result in results.items():
        body += _section(result, out, figures, stem)
        if causes := _causes_of(stem, results):
            body += _explained(result, causes)
    body += [*step_sizes(out / "rates.jsonl"), *_trainings()]
    body += ["## Discrepancies in the paper", "", *(f"- {d}" for d in DISCREPANCIES), ""]
    heads = [line[3:] for line in "\n".join(body).splitlines() if line.startswith("## ")]
    lines = ["# Experiments", "", *_overview(results), "## Contents", ""]
    lines += [*(f"- [{head}](#{_anchor(head)})" for head in heads), "", *body]
    markdown = out / "report.md"
    markdown.write_text("\n".join(lines), encoding="utf-8")
    page = out / "report.html"
    page.write_text(_html("\n".join(lines), out), encoding="utf-8")
    return page, markdown


def _causes_of(stem: str, results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The result of what was tried for a table, if it is there."""
    target = results[stem]["target"]
    return results.get(stem.replace(target, CAUSES[target])) if target in CAUSES else None


def _place(path: Path) -> tuple[int, str]:
    """Where a result stands on the page: tables, figures, controls, causes."""
    kinds = ("table", "fig", "controls", "causes")
    return next((i for i, k in enumerate(kinds) if path.stem.startswith(k)), len(kinds)), path.stem


def _anchor(heading: str) -> str:
    """How Markdown readers call a heading's place."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in " -_").replace(" ", "-")


def _overview(results: Mapping[str, Any]) -> Iterator[str]:
    """How many pairs of each table stand in the paper's order, and the best values of it."""
    yield "Our values beside the paper's. A pair of methods is in order where the better one, by"
    yield "best value over the steps, is the better one in the paper. Others count as settled where"
    yield "a tried change puts them in order or level, or where the signals leave them undecided."
    yield ""
    yield (
        "| table | data | measure | pairs in order | others settled | mod | MIM | best of the "
        "other methods |"
    )
    yield "|" + " --- |" * 8
    for stem, result in results.items():
        if not result["target"].startswith("table"):
            continue
        tried = (_causes_of(stem, results) or {"rows": []})["rows"]
        for part in _by_metric([r for r in result["rows"] if "curve" in r]):
            for dataset, (agree, compared, _) in agreement(part).items():
                settled = sum(pair.settled for pair in explanations(part, tried, dataset))
                known = [r for r in part if r["dataset"] == dataset and r["best"] is not None]
                cells = [result["target"], dataset, row_label(part, dataset)]
                cells += [f"{agree} of {compared}", f"{settled} of {compared - agree}"]
                cells += [_top([r for r in known if r["method"] == name]) for name in OURS]
                cells += [_top([r for r in known if r["method"] not in OURS], named=True)]
                yield "| " + " | ".join(cells) + " |"
    yield ""


def _top(rows: Sequence[Row], *, named: bool = False) -> str:
    """The best value of some rows, and on demand whose it is."""
    best = max(rows, key=lambda r: float(r["best"]), default=None)
    if best is None:
        return "–"
    return f"{best['best']:.4g}" + (f" ({best['method']})" if named else "")


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    keys = {"target", "budgets", "rows", "machine", "compute_s", "wall_s"}
    of = {"of", "further"} if result.get("target") in CAUSES.values() else set()
    own = {"per_signal", "run_falls"}
    if not keys <= result.keys() or not all(
        of | (own if "curve" in row else set()) <= row.keys() for row in result["rows"]
    ):
        raise ConfigError(f"{path}: written by another version; run its `reproduce` again")
    return result


def step_sizes(path: Path) -> Iterator[str]:
    """Every step size that was tried on validation signals, PSNR in dB; * marks the chosen one."""
    if not path.is_file():
        return
    read = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line)
    lines = {line["key"]: line for line in read}.values()  # a key's last line has all it tried
    rates = sorted({float(rate) for line in lines for rate in line["tried"]})
    yield "## Step sizes tried on validation signals (dB, * chosen)"
    yield ""
    yield "| dataset | method | " + " | ".join(f"{rate:g}" for rate in rates) + " |"
    yield "|" + " --- |" * (len(rates) + 2)
    for line in lines:
        tried = {float(rate): psnr for rate, psnr in line["tried"].items()}
        cells = [_tried(tried, rate, rate == line["rate"]) for rate in rates]
        yield "| " + " | ".join([line["dataset"], line["method"] + _how(line), *cells]) + " |"
    yield ""


def _how(line: Row) -> str:
    """What of a search's setting is not the usual one."""
    told = [
        f"{key} {line[key]}"
        for key in ("cut", "tasks", "modules", "widen")
        if line[key] != USUAL[key]
    ]
    if line["weighting"]:
        told.append(f"{line['weighting']}, lambda {line['lam']:g}")
    return "".join(f", {t}" for t in told)


def _tried(tried: Mapping[float, float | None], rate: float, chosen: bool) -> str:
    if rate not in tried:
        return "–"
    psnr = tried[rate]
    told = "diverged" if psnr is None else f"{psnr:.2f}"
    return f"{told} *" if chosen else told


def _trainings() -> Iterator[str]:
    """What the shipped starts' meta-training took, which no table's time contains."""
    path = SHIPPED / "trainings.json"
    if not path.is_file():
        return
    held = json.loads(path.read_text(encoding="utf-8"))
    yield "## Meta-training of the shipped starts"
    yield ""
    yield "| start | learned on | outer steps | episodes | seconds | load | query PSNR |"
    yield "|" + " --- |" * 7
    for row in held["rows"]:
        yield (
            f"| {row['name']} | {row['dataset']} | {row['steps']} | {row['episodes']} "
            f"| {row['seconds']:.0f} | {row['load']} | {row['query_psnr']:.2f} |"
        )
    yield ""
    yield f"One core each; the last was learned on: {held['machine']['cpu']}."
    yield ""


def _section(result: Mapping[str, Any], out: Path, figures: Path, name: str) -> list[str]:
    """A target's table with how it was made, what it says, its curves and its panels."""
    target, rows = result["target"], result["rows"]
    lines = [as_text(result), ""]
    lines += [_cost_caption(rows)] if target == "table6" else _captions(result)
    lines += [_took(result), ""]
    lines += [f"- {told}." for told in dict.fromkeys(r.get("provenance") for r in rows) if told]
    curves = _by_metric([r for r in rows if "curve" in r])
    if target not in CAUSES.values():  # variants of one method, there
        lines += _orders(curves)
    lines += [f"- {told}" for told in endings(rows)]
    lines += [*_fallen(rows), ""]
    if curves:
        path = figures / f"{name}.png"
        _plot(curves, path)
        lines += [f"![{target}]({path.relative_to(out)})", ""]
    if target in ("fig3", "fig4"):
        lines += _panels(rows, out, figures / f"{name}-panels.jpg")
    return lines


def _captions(result: Mapping[str, Any]) -> list[str]:
    """Networks, budget and step sizes of each data set."""
    return [
        f"{dataset}: networks of width {budget['width']}, modules of {budget['width'] // 2}, "
        f"steps to {budget['marks'][-1]} per task, {budget['batch'] or 'all'} "
        f"coordinates per task and step (OL, MOL: of all tasks in one batch; ER, MER: and "
        f"as many of the buffer), lambda {USUAL['lam']} where no other is "
        f"named, {budget['seeds']} seeds, starts learned on "
        f"{DATASETS[dataset].starts or dataset}, "
        f"{budget['meta_steps']} meta-training steps, step sizes tried: "
        f"{', '.join(map(str, budget['search']))} "
        f"({budget['search_steps']} steps on validation signals)."
        for dataset, budget in result["budgets"].items()
    ]


def _took(result: Mapping[str, Any]) -> str:
    """Seconds of the runs and of the command, and the machine."""
    wall = f"{result['wall_s']:.0f} s"
    took = f"This command took {wall}"
    if result["compute_s"]:
        took = (
            f"The runs of its rows took {result['compute_s']:.0f} s, this command, which uses "
            f"those it finds, {wall}"
        )
    return f"{took}; {', '.join(f'{name} {value}' for name, value in result['machine'].items())}."


def _orders(curves: Sequence[Sequence[Row]]) -> Iterator[str]:
    """How many pairs of methods stand in the paper's order, by metric and data set."""
    for part in curves:
        for dataset, (agree, pairs, wrong) in agreement(part).items():
            told = f"; not (~: undecided over the signals): {', '.join(wrong)}" if wrong else ""
            yield (
                f"- {dataset}, {row_label(part, dataset)}: {agree} of {pairs} pairs in the paper's "
                f"order by best value{told}."
            )


def _fallen(rows: Sequence[Row]) -> Iterator[str]:
    """Which methods' PSNR falls as steps grow, and by how much."""
    measured = [r for r in rows if "curve" in r and r["metric"] == "psnr"]
    for (dataset, method), fall in falls(measured).items():
        if fall.mean > FALLEN or fall.runs:
            yield (
                f"- {dataset}, {method}: the mean is at most {fall.mean:.2f} dB below its running "
                f"best, {fall.runs} of {fall.of} runs are by more than {FALLEN}, at most by "
                f"{fall.worst:.2f} dB."
            )


def _cost_caption(rows: Sequence[Row]) -> str:
    """What table 6 measures."""
    return f"{rows[0]['steps']} steps per task on one signal, seed 0, a fresh process for each row."


def _explained(result: Mapping[str, Any], causes: Mapping[str, Any]) -> list[str]:
    """Pairs out of the paper's order, and the tried changes that put them in order."""
    lines = [
        f"- {pair.told}."
        for dataset in result["budgets"]
        for rows in _by_metric(result["rows"])
        for pair in explanations(rows, causes["rows"], dataset)
    ]
    target = CAUSES[result["target"]]
    told = f"What was tried for pairs out of the paper's order (`{target}`):"
    return [told, "", *lines, ""] if lines else []


def _by_metric(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each metric: decibels and SSIM are not compared with each other."""
    metrics = dict.fromkeys(r["metric"] for r in rows)
    return [[r for r in rows if r["metric"] == metric] for metric in metrics]


def _plot(parts: Sequence[Sequence[Row]], path: Path) -> None:
    """Quality against steps (log axis), one axis per data set and metric, the paper's best as
    marks."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shown = [
        (rows, dataset) for rows in parts for dataset in dict.fromkeys(r["dataset"] for r in rows)
    ]
    figure = Figure(figsize=(5 * len(shown), 4), layout="constrained")
    for axis, (rows, dataset) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown,
                                     strict=True):  # fmt: skip
        lines = [r for r in rows if r["dataset"] == dataset and "curve" in r]
        if len(lines) > 10:  # than colours that come by themselves
            axis.set_prop_cycle(color=colormaps["tab20"].colors)  # type: ignore[attr-defined]
        for row in lines:
            x = [int(k) for k in row["curve"]]
            (line,) = axis.plot(x, list(row["curve"].values()), marker=".", label=named(row))
            if row["paper"]:
                axis.plot(
                    row["paper"]["best_step"], row["paper"]["best"], "x", color=line.get_color()
                )
        axis.set_xscale("log", base=2)
        axis.set(title=dataset, xlabel="steps per task", ylabel=row_label(rows, dataset))
        axis.legend(fontsize=6)
    figure.savefig(path, dpi=110)


def row_label(rows: Sequence[Row], dataset: str) -> str:
    """The axis label with its unit."""
    metric = next(r["metric"] for r in rows if r["dataset"] == dataset and "curve" in r)
    return "PSNR (dB)" if metric == "psnr" else str(metric).upper()


def _panels(rows: Sequence[Row], out: Path, path: Path) -> list[str]:
    """Truth and each method's reconstructions at every mark with its PSNR in dB, best in bold.

    One row per method. Where `panels/` is gone, what was made of it before stays.
    """
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    shown = [r for r in rows if r.get("panel") and (out / "panels" / r["panel"]).is_dir()]
    link = [f"![panels]({path.relative_to(out)})", ""]
    if not shown:
        return link if path.is_file() else []
    runs = (json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines())
    own = {run["key"]: run["curve"] for run in runs}
    marks = [*shown[0]["curve"], "truth"]
    figure = Figure(figsize=(1.5 * len(marks), 1.7 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), len(marks), squeeze=False)
    for row, line in zip(shown, axes, strict=True):
        curve = {mark: at["psnr"] for mark, at in own[row["panel"]].items()}
        best = max(curve, key=lambda mark: curve[mark])
        for mark, axis in zip(marks, line, strict=True):
            axis.imshow(imread(out / "panels" / row["panel"] / f"{mark}.png"))
            axis.set(xticks=[], yticks=[])
            told = f"{mark}: {curve[mark]:.1f}" if mark in curve else mark
            bold = "bold" if mark == best else "normal"
            axis.set_title(f"{row['method']}\n{told}", fontsize=6, fontweight=bold)
    figure.savefig(path, dpi=110)
    return link


def _html(markdown: str, out: Path) -> str:
    """The Markdown as one page without other files: pictures are embedded."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = reader.parse(markdown)
    for token, following in itertools.pairwise(tokens):
        if token.type == "heading_open":
            token.attrSet("id", _anchor(following.content))
    for token in itertools.chain.from_iterable(t.children or () for t in tokens):
        if token.type == "image":
            path = str(token.attrs["src"])
            data = base64.b64encode((out / path).read_bytes()).decode()
            token.attrs["src"] = f"data:{mimetypes.guess_type(path)[0]};base64,{data}"
    body = reader.renderer.render(tokens, reader.options, {})
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Experiments</title>"
        f"<style>{_STYLE}</style>{body}</html>"
    )
