"""The commands end to end at a tiny budget, the JSON contract, resuming, the report."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile
import torch

from mclnf_edge.errors import CaptureError, ConfigError
from meta_trainer import evaluate, report, reproduce, runs
from meta_trainer.agreement import Explanation, agreement, endings, explanations, falls
from meta_trainer.config import parse_config
from meta_trainer.data import DATASETS
from meta_trainer.methods import METHODS, STARTS, VARIANTS
from meta_trainer.report import as_text, row_label, write_report
from meta_trainer.reproduce import TARGETS
from meta_trainer.runs import BUDGETS, Job, Setting
from meta_trainer.trainer import load_init

CONTRACT = {
    "method",
    "dataset",
    "metric",
    "step1",
    "best",
    "best_step",
    "last",
    "seeds",
    "n",
    "paper",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny stand-ins: four pictures and four sounds, per split."""
    base = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        for k in range(4):
            picture = base / "faces" / split / f"{k}.png"
            sound = base / "speech" / split / f"{k}.wav"
            for path in (picture, sound):
                path.parent.mkdir(parents=True, exist_ok=True)
            small = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            cv2.imwrite(str(picture), cv2.resize(small, (178, 178)))
            soundfile.write(sound, 0.2 * np.sin(np.arange(48_000) * 0.02 * (k + 1)), 16_000)
    return base


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


def test_table_1_keeps_the_contract_and_repeats_itself(root: Path, out: Path) -> None:
    first = reproduce.reproduce("table1", dataset="faces", root=root, out=out)
    assert [r["method"] for r in first["rows"]] == list(reproduce.METHODS)
    for row in first["rows"]:
        assert set(row) >= CONTRACT
        assert row["best"] == max(row["curve"].values()) >= row["last"]
        assert row["curve"]["1"] == row["step1"] and row["n"] == row["seeds"] == 1
        assert set(row["paper"]) == {"step1", "best", "best_step", "last"}
    lines = (out / "runs.jsonl").read_text()
    again = reproduce.reproduce("table1", dataset="faces", root=root, out=out)
    assert again["rows"] == first["rows"] and (out / "runs.jsonl").read_text() == lines
    assert json.loads((out / "table1-smoke-faces.json").read_text())["rows"] == first["rows"]


def test_a_fresh_folder_gives_identical_rows(root: Path, out: Path, tmp_path: Path) -> None:
    kept = reproduce.reproduce("fig4", dataset="faces", root=root, out=out)
    fresh = reproduce.reproduce("fig4", dataset="faces", root=root, out=tmp_path)
    assert fresh["rows"] == kept["rows"]


def test_a_crash_in_the_middle_of_a_line_costs_that_line_only(
    root: Path, out: Path, tmp_path: Path
) -> None:
    whole = reproduce.reproduce("table1", dataset="faces", root=root, out=out)
    lines = (out / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])
    again = reproduce.reproduce("table1", dataset="faces", root=root, out=tmp_path)
    assert again["rows"] == whole["rows"]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(lines)


def test_other_targets(root: Path, out: Path) -> None:
    for target, metrics in (("table2", {"ssim"}), ("table3", {"psnr", "ssim"})):
        rows = reproduce.reproduce(target, dataset="faces", root=root, out=out)["rows"]
        assert {r["metric"] for r in rows} == metrics and all(r["paper"] for r in rows)
        assert len(rows) == 10 * len(metrics)
    wide = reproduce.reproduce("table4", dataset="faces", root=root, out=out)["rows"]
    assert [r["width"] for r in wide] == [8, 8, 16, 16]
    many = reproduce.reproduce("table5", dataset="faces", root=root, out=out)["rows"]
    assert [r["tasks"] for r in many] == [5, 5, 10, 10]
    sums = reproduce.reproduce("table7", root=root, out=out)["rows"]
    assert [r["parameters"] for r in sums] == [2_628_099, 2_637_836, 198_915, 201_228]
    assert all(r["paper"]["parameters"] == r["parameters"] for r in sums[:2])
    assert set(reproduce.KEYS) == CONTRACT
    for rows in (wide, many, sums):
        assert all(set(r) >= CONTRACT for r in rows)
    for target in ("table3", "fig4"):
        with pytest.raises(ConfigError, match=f"{target} is for image, video.* only"):
            reproduce.reproduce(target, dataset="speech", root=root, out=out)


def test_modules_in_another_number_than_tasks(root: Path, tmp_path: Path) -> None:
    def rows(modules: int) -> list[dict[str, object]]:
        made = reproduce.reproduce(
            "fig4", dataset="faces", root=root, out=tmp_path, modules=modules
        )
        return made["rows"]  # type: ignore[no-any-return]

    usual, double = rows(0), rows(8)
    lines = (tmp_path / "runs.jsonl").read_text()
    assert [r["curve"] for r in rows(4)] == [r["curve"] for r in usual]
    assert (tmp_path / "runs.jsonl").read_text() == lines, "four modules are one per task"
    keys = {
        runs.run_key(BUDGETS["smoke"], Setting("faces", modules=n), "OL", "digest", 0, 0.1)
        for n in (0, 4, 8)
    }
    assert len(keys) == 1, "one network is the same whatever the number of modules"
    assert all(a["curve"] != b["curve"] for a, b in zip(usual, double, strict=True))
    assert (tmp_path / "fig4-smoke-faces-8-modules.json").is_file()


def test_controls_sweep_lambda_and_start_alike(root: Path, out: Path) -> None:
    rows = reproduce.reproduce("controls", dataset="faces", root=root, out=out)["rows"]
    sweep = {r["method"]: r["best"] for r in rows if r["metric"] == "psnr-validation"}
    tests = {r["method"]: r for r in rows if r["metric"] == "psnr"}
    own = tests.pop("Ours (MIM)")
    assert set(sweep) == {f"lambda {lam:g}" for lam in (0, *reproduce.LAMBDAS)}
    assert set(tests) == {"none", *reproduce.CONTROLS}
    lam = tests["diagonal"]["lam"]
    del sweep["lambda 0"]  # no weights at all: never the one that the controls take
    assert sweep[f"lambda {lam:g}"] == max(sweep.values()) and own["lam"] == lam
    assert len({r["last"] for r in tests.values()}) == 7
    assert len({r["rate"] for r in tests.values()}) == 1
    mod = reproduce.reproduce("fig4", dataset="faces", root=root, out=out)["rows"][0]
    assert tests["none"]["curve"] == mod["curve"]


def variants_of(kind: str, table: str) -> list[str]:
    return [n for n, v in VARIANTS.items() if kind in v.kinds and table in v.tables]


def test_causes_of_table_3_are_tried_on_its_tasks(root: Path, out: Path) -> None:
    rows = reproduce.reproduce("causes3", dataset="faces", root=root, out=out)["rows"]
    table = reproduce.reproduce("table3", dataset="faces", root=root, out=out)["rows"]
    for metric in ("psnr", "ssim"):
        plain = {r["method"]: r for r in table if r["metric"] == metric}
        own = [r for r in rows if r["metric"] == metric]
        longer = [r for r in own if r["further"]]
        assert [r["of"] for r in longer] == ["MOL", *reproduce.OURS, "OL"]
        assert all(r["curve"]["4"] == plain[r["of"]]["curve"]["4"] for r in longer)
        assert [r["method"] for r in own if not r["further"]] == variants_of("image", "table3")
        assert all(r["paper"] == plain[r["of"]]["paper"] for r in own)
    write_report(out)
    assert "order (`causes3`)" in (out / "report.md").read_text()
    with pytest.raises(ConfigError, match="causes3 is for image, video only"):
        reproduce.reproduce("causes3", dataset="speech", root=root, out=out)


def test_modules_of_a_sound_have_coordinates_of_their_own(root: Path, out: Path) -> None:
    setting = Setting("speech")
    cuts = {n: runs.fitting(setting, m).cut for n, m in reproduce.METHODS.items()}
    assert {n for n, cut in cuts.items() if cut == "own"} == set(reproduce.OURS)
    pictures = (runs.fitting(Setting("faces"), m) for m in reproduce.METHODS.values())
    assert all(s.cut == "strips" for s in pictures)
    for modules, cut in ((1, "strips"), (2, "strips"), (4, "own"), (8, "own")):
        several = replace(setting, modules=modules)
        assert runs.fitting(several, runs.make_method("Ours (mod)", several)).cut == cut
    rows = reproduce.reproduce("causes", dataset="speech", root=root, out=out)["rows"]
    table = reproduce.reproduce("table1", dataset="speech", root=root, out=out)["rows"]
    whole = {r["of"]: r for r in rows if "whole" in r["method"] and r["metric"] == "psnr"}
    assert list(whole) == list(reproduce.OURS)
    plain = {r["method"]: r["curve"] for r in table}
    assert all(r["curve"] != plain[name] for name, r in whole.items())
    held = map(json.loads, (out / "runs.jsonl").read_text().splitlines())
    cut = {r["method"]: r["cut"] for r in held if r["dataset"] == "speech"}
    assert cut["Ours (mod)"] == "own" and cut["Ours (mod) (whole coordinates)"] == "strips"


def test_causes_run_further_and_read_methods_otherwise(
    root: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = (1e-4, *runs.BUDGETS["smoke"].search)
    monkeypatch.setitem(runs.BUDGETS, "smoke", replace(runs.BUDGETS["smoke"], search=search))
    told = reproduce.reproduce("causes", dataset="faces", root=root, out=out)
    both = told["rows"]
    rows = [r for r in both if r["metric"] == "psnr"]
    assert [r["method"] for r in both if r["metric"] == "ssim"] == [r["method"] for r in rows]
    keys = {r["panel"] for r in rows}
    lines = map(json.loads, (out / "runs.jsonl").read_text().splitlines())
    spent = sum(r["seconds"] for r in lines if r["key"] in keys)  # one signal, one seed: a run each
    assert told["compute_s"] == pytest.approx(spent, abs=0.1), "runs of two metrics count once"
    longer = [r for r in rows if r["further"]]
    assert [r["method"] for r in longer] == [
        "MOL (to 32 steps)", "Ours (mod) (to 32 steps)", "Ours (MIM) (to 32 steps)",
        "MAML+CL (to 16 steps)", "OML (to 16 steps)",
    ]  # fmt: skip
    table = reproduce.reproduce("table1", dataset="faces", root=root, out=out)["rows"]
    plain = {r["method"]: r for r in table}
    assert [list(r["curve"])[-1] for r in longer] == ["32"] * 3 + ["16"] * 2
    assert all(r["curve"]["4"] == plain[r["of"]]["curve"]["4"] for r in longer)
    smaller = [r for r in rows if "step size" in r["method"]]
    assert [r["of"] for r in smaller] == list(reproduce.OURS)
    assert all(r["rate"] < plain[r["of"]]["rate"] for r in smaller)
    others = [r for r in rows if r not in longer and r not in smaller]
    assert [r["method"] for r in others] == variants_of("image", "table1")
    for row in others:
        own = plain[row["of"]]
        assert row["paper"] == own["paper"] and row["curve"] != own["curve"]


def test_audio_is_measured_with_pesq(root: Path, out: Path) -> None:
    pytest.importorskip("pesq", reason="the optional package pesq is not installed")
    rows = reproduce.reproduce("table2", dataset="speech1", root=root, out=out)["rows"]
    assert {r["metric"] for r in rows} == {"pesq"}
    assert rows[0]["paper"]["best"] == 1.82


def test_pesq_of_a_good_and_a_bad_copy(sample_data: Path) -> None:
    pytest.importorskip("pesq", reason="the optional package pesq is not installed")
    sound, _ = soundfile.read(next((sample_data / "speech" / "val").glob("*.wav")), dtype="float32")
    noise = np.random.default_rng(0).normal(0, 0.02, sound.shape).astype(np.float32)
    assert evaluate.pesq(sound, sound) > 4.5 > 2.5 > evaluate.pesq(sound + noise, sound)
    assert math.isnan(evaluate.pesq(0 * sound, sound))
    assert math.isnan(evaluate.pesq(math.nan * sound, sound))


def test_missing_pesq_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pesq", None)
    with pytest.raises(ConfigError, match="pip install pesq"):
        evaluate.pesq(np.ones(16_000), np.ones(16_000))


def test_a_plain_folder_is_evaluated(root: Path, out: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "mine.png"), np.full((200, 220, 3), 90, np.uint8))
    rows = reproduce.reproduce("fig4", dataset="faces", folder=tmp_path, root=root, out=out)["rows"]
    assert [r["n"] for r in rows] == [1, 1]
    with pytest.raises(ConfigError, match="--data needs --dataset"):
        reproduce.reproduce("fig4", folder=tmp_path, root=root, out=out)


def test_a_folders_results_follow_its_files(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As many as asked for are measured, changed ones anew; results of two folders stay apart."""
    caplog.set_level("INFO")

    def rows(folder: Path, signals: int | None = 3) -> list[dict[str, object]]:
        made = reproduce.reproduce(
            "fig4", dataset="faces", folder=folder, root=root, out=tmp_path / "out", signals=signals
        )
        assert made["folder"] == str(folder)
        return made["rows"]  # type: ignore[no-any-return]

    for place, files in (("one", 3), ("two", 1)):
        (tmp_path / place / "mine").mkdir(parents=True)
        for k in range(files):
            level = np.full((200, 220, 3), 40 * k + 30, np.uint8)
            cv2.imwrite(str(tmp_path / place / "mine" / f"{k}.png"), level)
    one, two = (tmp_path / place / "mine" for place in ("one", "two"))
    before = rows(one)
    assert [r["n"] for r in before] == [3, 3]
    assert [r["n"] for r in rows(one, signals=None)] == [1, 1]
    assert "1 of 3 signals are measured" in caplog.text
    assert [r["n"] for r in rows(two)] == [1, 1]
    shutil.move(one, tmp_path / "moved")
    moved = rows(tmp_path / "moved")
    assert [r["curve"] for r in moved] == [r["curve"] for r in before]
    assert sum(1 for _ in (tmp_path / "out" / "runs.jsonl").open()) == 2 * 3
    names = sorted(p.name for p in (tmp_path / "out").glob("fig4*.json"))
    assert len(names) == 3 and {"fig4-smoke-faces-mine.json", "fig4-smoke-faces-moved.json"} < {
        *names
    }
    cv2.imwrite(str(tmp_path / "moved" / "0.png"), np.full((200, 220, 3), 200, np.uint8))
    assert rows(tmp_path / "moved")[0]["curve"] != before[0]["curve"]


def test_wrong_requests_are_named(root: Path, out: Path) -> None:
    for args, message in (
        ({"target": "table9"}, "unknown target 'table9'"),
        ({"target": "table1", "budget": "huge"}, "unknown budget 'huge'"),
        ({"target": "table1", "dataset": "celeb"}, "unknown data set 'celeb'"),
    ):
        with pytest.raises(ConfigError, match=message):
            reproduce.reproduce(root=root, out=out, **args)  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="mmlab"):
        reproduce.reproduce("table1", dataset="celeba", root=root, out=out)


def test_cost_is_measured_in_a_process_of_its_own(root: Path, out: Path) -> None:
    from meta_trainer.cost import measure_cost

    job = Job(BUDGETS["smoke"], root, out)
    cost = measure_cost(job, Setting("faces"), "Ours (mod)")
    per_module = 2 * 8 + 8 + 3 * (64 + 8) + 8 * 3 + 3
    assert cost["parameters"] == 4 * per_module and cost["steps"] == 4
    assert 50 < cost["memory_mb"] < 5000 and cost["episodes_per_s"] > 0


def test_a_step_size_is_worth_its_psnr_and_nothing_where_it_diverges() -> None:
    from mclnf_edge.maths.fields import Siren
    from meta_trainer.episodes import image_episode
    from meta_trainer.methods import Learning

    field = Siren(2, 3, 16)
    episode = image_episode("a", np.random.default_rng(0).random((8, 8, 3)))
    start = field.init(torch.Generator().manual_seed(0))
    slow, good, wild = (
        evaluate.try_rate(METHODS["OL"], start, [episode], Learning(field, rate), 8, 0)
        for rate in (1e-6, 1e-2, 1e9)
    )
    assert good > slow > 0 and wild == -math.inf


def test_a_wider_grid_tries_what_is_new_and_keeps_runs_of_the_same_step_size(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, budget = Setting("faces"), replace(runs.BUDGETS["smoke"], search=(1e-2,))
    tried, keys = [], []
    real = runs.try_rate

    def spy(method, start, episodes, how, steps, seed):  # type: ignore[no-untyped-def]
        tried.append(how.rates)
        return real(method, start, episodes, how, steps, seed)

    monkeypatch.setattr(runs, "try_rate", spy)
    for search in ((1e-2,), (1e-9, 1e-2), (1e-9, 1e-2), (1e-9,)):
        job = Job(replace(budget, search=search), root, tmp_path)
        rate, shown = runs.chosen_rate(job, setting, "OL", runs.make_method("OL", setting))
        assert rate == max(search) and set(shown) == {f"{r:g}" for r in search}
        keys.append([r["key"] for r in runs.run_method(job, setting, "OL")])
    assert tried == [1e-2, 1e-9]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    wide = json.loads((tmp_path / "rates.jsonl").read_text().splitlines()[-1])
    assert wide["tried"]["0.01"] > wide["tried"]["1e-09"] and wide["rate"] == 1e-2


def test_a_step_size_that_diverges_is_kept_as_such(root: Path, tmp_path: Path) -> None:
    budget = replace(runs.BUDGETS["smoke"], search=(1e-2, 1e9))
    job, setting = Job(budget, root, tmp_path), Setting("faces")
    for _ in range(2):
        rate, tried = runs.chosen_rate(job, setting, "OL", runs.make_method("OL", setting))
        assert rate == 1e-2 and tried["1e+09"] == -math.inf
    lines = (tmp_path / "rates.jsonl").read_text()
    assert lines.count("\n") == 2 and lines.count('"1e+09": null') == 1, "tried once"
    assert "| faces | OL | " in (told := "\n".join(report.step_sizes(tmp_path / "rates.jsonl")))
    assert "| diverged |" in told


def test_a_diverged_run_has_no_mean() -> None:
    good = {"1": {"psnr": 10.0, "pesq": 1.0}, "2": {"psnr": 20.0, "pesq": 2.0}}
    bad = {"1": {"psnr": 12.0, "pesq": 1.0}, "2": {"psnr": math.nan, "pesq": math.nan}}
    told = evaluate.summary([good, bad], "psnr")
    assert (told["best"], told["best_step"]) == (11.0, 1) and math.isnan(told["last"])
    assert evaluate.summary([good, bad], "pesq")["last"] == 2.0, "a sound without a PESQ"


def test_explanations_name_the_changes_that_put_a_pair_in_order() -> None:
    def row(method: str, best: float, paper: float) -> dict[str, object]:
        return {"dataset": "d", "method": method, "metric": "psnr", "best": best,
                "paper": {"best": paper}, "curve": {"1": 0, "8": best}}  # fmt: skip

    def changed(of: str, what: str, best: float) -> dict[str, object]:
        return {"method": f"{of} ({what})", "of": of, "further": False, "best": best,
                "metric": "psnr"}  # fmt: skip

    def longer(of: str, curve: list[float | None]) -> dict[str, object]:
        steps = {str(2**k): value for k, value in enumerate(curve)}
        return {"method": f"{of} (to more steps)", "of": of, "further": True, "curve": steps,
                "metric": "psnr"}  # fmt: skip

    def told(found: Iterable[Explanation]) -> list[str]:
        return [pair.told for pair in found]

    rows = [row("MOL", 30, 20), row("Ours (mod)", 25, 22), row("ER", 10, 21), row("CL", 1, 1)]
    tried = [changed("MOL", "one task's batch", 24), changed("ER", "buffer 1/20", 9),
             longer("MOL", [1, 2, None, 50]), longer("Ours (mod)", [3, 2, 1])]  # fmt: skip
    assert told(explanations(rows, tried, "d")) == [
        "MOL / Ours (mod): in order with MOL (one task's batch) or both to 4 steps",
        "MOL / ER: not with any of 3 changes",
    ]
    short = [r | {"curve": {"1": r["best"]}} for r in rows]
    assert told(explanations(short, tried, "d"))[1] == (
        "MOL / ER: in order with MOL (to 4 steps, as many of a network as ER)"
    )
    wide = [r | {"width": 9} for r in rows]
    assert told(explanations(wide, tried, "d"))[0].endswith("not with any of 0 changes")
    wider = [r | {"width": 9} for r in tried]
    assert told(explanations(wide, wider, "d"))[0].startswith(
        "MOL 9 width / Ours (mod) 9 width: in order with MOL (one task's batch) 9 width or"
    )
    both = [*tried, changed("ER", "at once", 26)]
    assert told(explanations(rows, both, "d"))[1] == (
        "MOL / ER: in order with MOL (one task's batch) and ER (at once)"
    )
    near = [changed("ER", "at once", 26) | {"per_signal": {"x": 20, "y": 32}}]
    rows[0]["per_signal"] = {"x": 29, "y": 31}
    found = told(explanations(rows, near, "d"))
    assert found[1] == "MOL / ER: level (undecided) with ER (at once)"
    assert [pair.settled for pair in explanations(rows, near, "d")] == [False, True]
    rows[2]["per_signal"] = {"x": 28, "y": 32}
    assert told(explanations(rows, near, "d"))[1] == "MOL / ER: undecided over the signals as it is"


def test_endings_stand_beside_the_papers() -> None:
    def row(method: str, ours: float, paper: float) -> dict[str, object]:
        printed = {"best": 30.0, "last": 30.0 - paper}
        return {"dataset": "d", "method": method, "metric": "psnr", "best": 20.0,
                "last": 20.0 - ours, "paper": printed}  # fmt: skip

    (told,) = endings([row("A", 0.0, 0.1), row("B", 1.0, 0.0), row("C", 0.1, 5.0)])
    assert told.endswith("dB: B by 1.0 (paper 0.0), C by 0.1 (paper 5.0).")


def test_known_step_sizes_are_not_tried_again(tmp_path: Path) -> None:
    """On a machine without any data set: those of the package's starts come with it."""
    docs = Path(__file__).resolve().parents[2] / "docs" / "results" / "rates.jsonl"
    assert docs.read_text() == (runs.SHIPPED / "rates.jsonl").read_text()
    for dataset in ("faces", "photos", "speech", "video", "drone"):
        job = Job(runs.budget_for("cpu", dataset), tmp_path / "nowhere", tmp_path)
        for name in METHODS:
            setting = Setting(dataset)
            rate, tried = runs.chosen_rate(job, setting, name, runs.make_method(name, setting))
            assert set(tried) == {f"{r:g}" for r in job.budget.search}
            assert tried[f"{rate:g}"] == max(tried.values())
            edges = job.budget.search[0], job.budget.search[-1]
            assert rate not in edges, f"{dataset}, {name}: the grid ends too early"
    assert len((tmp_path / "rates.jsonl").read_text().splitlines()) == 50


def test_bootstrap_interval_covers_the_mean() -> None:
    values = np.random.default_rng(0).normal(30, 2, 50).tolist()
    low, high = evaluate.bootstrap(values)
    assert low < np.mean(values) < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 50**0.5, rel=0.1)
    assert math.isnan(evaluate.bootstrap([1.0])[0])


def test_agreement_and_falls_by_hand() -> None:
    def row(method: str, best: float, paper: float, curve: list[float]) -> dict[str, object]:
        marks = {str(2**k): v for k, v in enumerate(curve)}
        return {"dataset": "d", "method": method, "best": best, "curve": marks,
                "paper": {"best": paper}}  # fmt: skip

    rows = [row("A", 30, 40, [20, 30]), row("B", 25, 35, [25, 22]), row("C", 28, 30, [28, 28])]
    assert agreement(rows) == {"d": (2, 3, ["B / C"])}
    apart = [{"x": 10, "y": 50}, {"x": 5, "y": 45}, {"x": 8, "y": 48}]
    far = [{**r, "per_signal": v} for r, v in zip(rows, apart, strict=True)]
    assert agreement(far) == agreement(rows), "signals differ, the methods on them do not cross"
    close = [{**far[0]}, {**far[1]}, {**far[2], "per_signal": {"x": 12, "y": 44}}]
    assert agreement(close) == {"d": (2, 3, ["B ~ C"])}
    assert agreement([{**r, "per_signal": {"x": None, "y": 1}} for r in rows]) == agreement(rows)
    found = falls([{**rows[0], "run_falls": [0.1, 0.3, 2.0]}, *rows[1:]])
    assert found[("d", "A")] == (0, 2, 3, 2.0) and found[("d", "B")].mean == 3


def test_a_runs_worst_fall_skips_marks_without_a_value() -> None:
    assert evaluate.worst_fall([3.0, 5.0, math.nan, None, 4.0]) == 1.0
    assert evaluate.worst_fall([]) == evaluate.worst_fall([1.0, 2.0]) == 0.0


def test_report_has_tables_curves_and_panels(root: Path, out: Path) -> None:
    for target in ("table1", "fig4", "table7"):
        reproduce.reproduce(target, dataset="faces", root=root, out=out)
    narrow = {"key": "k", "method": "OL", **asdict(Setting("faces", cut="interleaved"))}
    narrow |= {"rate": 0.1, "tried": {"0.1": 10.0}}
    wide = {**narrow, "rate": 0.01, "tried": {"0.01": 20.0, "0.1": None}}
    (out / "rates.jsonl").write_text(json.dumps(narrow) + "\n" + json.dumps(wide) + "\n")
    page, markdown = write_report(out)
    text = markdown.read_text()
    assert "| faces | OL, cut interleaved | 20.00 * | diverged |" in text and "10.00" not in text
    assert "| faces-mol-strips-4-256 | faces | 1500 |" in text
    assert "| faces | Ours (MIM) |" in text and "best (paper)" in text and "Discrepancies" in text
    assert text.index("## table1 ") < text.index("## fig4 "), "tables first"
    assert "- [table1 (smoke, faces)](#table1-smoke-faces)" in text
    assert re.search(r"\| table1 \| faces \| PSNR \(dB\) \| \d+ of 44 \| \d+ of \d+ \| ", text)
    text = page.read_text()
    assert '<h2 id="table1-smoke-faces">' in text and 'href="#table1-smoke-faces"' in text
    assert text.count("data:image/png;base64,") >= 2 and text.count("data:image/jpeg;base64,") >= 1
    shutil.rmtree(out / "panels")
    assert write_report(out)[0].read_text().count("data:image/jpeg;base64,") >= 1, "made before"
    (out / "table1-smoke.json").write_text('{"target": "table1", "rows": []}')
    with pytest.raises(ConfigError, match="another version"):
        write_report(out)
    (out / "table1-smoke.json").unlink()
    with pytest.raises(ConfigError, match="no results"):
        write_report(out / "figures")


def test_figures_make_pictures_again_where_they_are_gone(root: Path, out: Path) -> None:
    made = reproduce.reproduce("fig4", dataset="faces", root=root, out=out)
    lines = (out / "runs.jsonl").read_text()
    panels = out / "panels" / made["rows"][0]["panel"]
    pictures = {p.name: p.read_bytes() for p in panels.iterdir()}
    shutil.rmtree(panels)
    table = reproduce.reproduce("table1", dataset="faces", root=root, out=out)["rows"]
    assert not panels.exists(), "a table needs no pictures"
    again = reproduce.reproduce("fig4", dataset="faces", root=root, out=out)
    assert again["rows"] == made["rows"]
    assert [r["curve"] for r in table[-2:]] == [r["curve"] for r in made["rows"]]
    assert {p.name: p.read_bytes() for p in panels.iterdir()} == pictures
    assert (out / "runs.jsonl").read_text() == lines


def test_a_plot_is_labelled_by_what_it_shows() -> None:
    sweep = {"dataset": "d", "metric": "psnr-validation", "best": 20.0}
    curve = {"dataset": "d", "metric": "psnr", "curve": {"1": 20.0}}
    assert row_label([sweep, curve], "d") == "PSNR (dB)"
    assert row_label([{**curve, "metric": "ssim"}], "d") == "SSIM"


def test_decibels_and_ssim_are_not_compared(root: Path, tmp_path: Path) -> None:
    reproduce.reproduce("table3", dataset="faces", root=root, out=tmp_path)
    text = write_report(tmp_path)[1].read_text()
    assert "- faces, PSNR (dB): " in text and "- faces, SSIM: " in text
    assert text.count(" of 44 pairs") == 2


def test_text_of_a_result() -> None:
    row = {
        "method": "OL",
        "dataset": "d",
        "metric": "psnr",
        "best": 12.345,
        "paper": {"best": 20.0},
    }
    text = as_text({"target": "t", "budgets": {"faces": {"name": "smoke"}}, "rows": [row]})
    assert text.splitlines()[-1] == "| d | OL | psnr | 12.35 | 20 |"


@pytest.mark.parametrize("path", sorted(runs.SHIPPED.glob("*/*.pt")), ids=lambda p: p.stem)
def test_a_shipped_start_is_the_one_that_reproduce_looks_for(path: Path, tmp_path: Path) -> None:
    config = parse_config(load_init(path)["config"])
    kind = DATASETS[config.dataset].kind
    budget = runs.budget_for(path.parent.name, config.dataset)
    setting = Setting(config.dataset, cut=config.cut, tasks=config.tasks)
    job, method = Job(budget, None, tmp_path), runs.make_method(STARTS[config.start], setting)
    setting = replace(setting, widen=config.width // job.field(setting, method).width)
    asked = runs.start_config(job, setting, method, config.dataset)
    assert runs.shipped_start(asked) == path and kind in ("image", "audio", "video", "views")
    assert not Path(load_init(path)["config"]["out"]).is_absolute(), "no folder of a machine"
    got = runs.start_params(job, setting, method, 0)
    assert not list(tmp_path.iterdir()), "nothing was trained"
    fresh = job.field(setting, method).init(torch.Generator().manual_seed(0))
    assert {n: p.shape for n, p in got.items()} == {n: p.shape for n, p in fresh.items()}
    other = replace(asked, seed=asked.seed + 1)
    assert runs.shipped_start(other) is None, "another training is not taken for it"


@pytest.mark.parametrize(("name", "shared"), [("photos", "free-pictures"), ("drone", "flights")])
def test_a_start_from_files_that_may_be_given_away_serves_others_of_that_shape(
    name: str, shared: str, tmp_path: Path
) -> None:
    assert DATASETS[name].starts == shared and DATASETS[name].shape == DATASETS[shared].shape
    job, method = Job(runs.budget_for("cpu", name), None, tmp_path), reproduce.METHODS["MOL"]
    shipped = runs.shipped_path(runs.start_config(job, Setting(name), method, shared))
    held, got = load_init(shipped)["params"], runs.start_params(job, Setting(name), method, 0)
    assert not list(tmp_path.iterdir()), "nothing was trained"
    assert all(torch.equal(got[n], held[n]) for n in held)


def test_budgets_and_targets_are_the_issues() -> None:
    assert list(BUDGETS) == ["smoke", "cpu", "paper"]
    assert BUDGETS["paper"].marks[-1] == 4096 and BUDGETS["cpu"].marks[-1] == 512
    assert set(TARGETS) == {
        *(f"table{k}" for k in range(1, 8)),
        "fig2",
        "fig3",
        "fig4",
        "controls",
        "causes",
        *(f"causes{k}" for k in (3, 4, 5)),
    }
    job = Job(BUDGETS["paper"], None, Path("x"))
    mim = job.learning(Setting("faces"), reproduce.METHODS["Ours (MIM)"])
    mod = job.learning(Setting("faces"), reproduce.METHODS["Ours (mod)"])
    assert mim.rule.weighting == "diagonal" and mim.field == mod.field
    assert replace(mim, rule=mod.rule) == mod


def test_commands_report_errors_with_exit_code_2(tmp_path: Path) -> None:
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "meta_trainer", "train", "--config", str(tmp_path / "no.yaml")],
        cwd=repository, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "ConfigError" in done.stderr and "Traceback" not in done.stderr
