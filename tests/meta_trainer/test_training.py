"""Meta-gradients by finite differences, resuming, several processes, files."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from mclnf_edge.errors import ConfigError, InitError
from mclnf_edge.mapping.initialization import load_signal_init
from mclnf_edge.maths.adaptation import Rule
from mclnf_edge.maths.fields import Params, Siren
from meta_trainer.config import TrainConfig, load_config, parse_config
from meta_trainer.data import DATASETS
from meta_trainer.episodes import Episode, image_episode
from meta_trainer.meta_gradient import initial_rates, meta_gradient
from meta_trainer.methods import METHODS, Learning
from meta_trainer.trainer import evaluate_init, load_init, train

FIELD = Siren(2, 3, width=5, layers=4, omega=4.0)
HOW = Learning(FIELD, rates=0.05)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start() -> Params:
    return FIELD.init(gen(), torch.float64)


def episode() -> Episode:
    e = image_episode("a", np.random.default_rng(0).random((5, 8, 3)))
    return replace(e, coords=e.coords.double(), values=e.values.double())


def query_loss(name: str, params: Params, how: Learning, steps: int) -> float:
    e = episode()
    (out,) = METHODS[name].learn(params, e, [steps], how, gen(3))
    x, s = e.coords, e.values
    if not METHODS[name].modules:
        x, s = x.flatten(0, 1), s.flatten(0, 1)
    return (FIELD(out, x) - s).square().sum(-1).mean().item()


@pytest.mark.parametrize("name", ["MOL", "MAML+CL", "OML", "Ours (mod)"])
def test_meta_gradient_by_finite_differences_through_the_whole_sequence(name: str) -> None:
    got = meta_gradient(METHODS[name], start(), 0.05, episode(), HOW, 2, 0, "second", gen(3))
    assert got.loss.item() == pytest.approx(query_loss(name, start(), HOW, 2))
    for parameter, g in got.start.items():
        for place in (0, -1):
            ends = []
            for eps in (1e-6, -1e-6):
                moved = start()
                moved[parameter].view(-1)[place] += eps
                ends.append(query_loss(name, moved, HOW, 2))
            slope = (ends[0] - ends[1]) / 2e-6
            assert slope == pytest.approx(g.view(-1)[place].item(), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("name", ["MAML+CL", "MOL", "Ours (mod)"])
def test_meta_gradient_is_torch_funcs(name: str) -> None:
    """MAML's meta-gradient as torch.func.grad gives it, through an inner loop written with it."""
    e, rate = episode(), 0.05

    def loss(params: Params, x: Tensor, s: Tensor) -> Tensor:
        return (FIELD(params, x) - s).square().sum(-1).mean()

    def adapt(params: Params, x: Tensor, s: Tensor) -> Params:
        for _ in range(2):
            slope = torch.func.grad(loss)(params, x, s)
            params = {n: p - rate * slope[n] for n, p in params.items()}
        return params

    def after(params: Params) -> Tensor:
        pairs = list(zip(e.coords, e.values, strict=True))
        if METHODS[name].modules:
            return torch.stack([loss(adapt(params, x, s), x, s) for x, s in pairs]).mean()
        everything = e.coords.flatten(0, 1), e.values.flatten(0, 1)
        for x, s in pairs if name == "MAML+CL" else [everything]:
            params = adapt(params, x, s)
        return loss(params, *everything)

    expected = torch.func.grad(after)(start())
    got = meta_gradient(METHODS[name], start(), rate, e, HOW, 2, 0, "second", gen(3))
    for n, slope in expected.items():
        torch.testing.assert_close(got.start[n], slope)


def test_mim_meta_gradient_weights_the_query_too() -> None:
    none, strong = (replace(HOW, rule=Rule("diagonal", lam=lam)) for lam in (0.0, 2.0))
    mim, mod = METHODS["Ours (MIM)"], METHODS["Ours (mod)"]
    at_zero = meta_gradient(mim, start(), 0.05, episode(), none, 2, 0, "second", gen(3))
    plain = meta_gradient(mod, start(), 0.05, episode(), HOW, 2, 0, "second", gen(3))
    weighted = meta_gradient(mim, start(), 0.05, episode(), strong, 0, 0, "second", gen(3))
    unweighted = meta_gradient(mod, start(), 0.05, episode(), HOW, 0, 0, "second", gen(3))
    for n in plain.start:
        torch.testing.assert_close(at_zero.start[n], plain.start[n])
    assert weighted.loss > unweighted.loss  # large errors weigh more


def test_first_order_is_the_gradient_where_the_inner_loop_ended() -> None:
    e, mod = episode(), METHODS["Ours (mod)"]
    got = meta_gradient(mod, start(), 0.05, e, HOW, 2, 0, "first", gen(3))
    (out,) = mod.learn(start(), e, [2], HOW, gen(3))
    leaves = {n: p.requires_grad_() for n, p in out.items()}
    (FIELD(leaves, e.coords) - e.values).square().sum(-1).mean().backward()
    for n, g in got.start.items():
        torch.testing.assert_close(g, leaves[n].grad.sum(0))
    second = meta_gradient(mod, start(), 0.05, e, HOW, 2, 0, "second", gen(3))
    assert any((second.start[n] - got.start[n]).abs().max() > 1e-4 for n in got.start)


def test_without_inner_steps_first_and_second_order_agree() -> None:
    for name in ("MOL", "Ours (mod)"):
        a, b = (
            meta_gradient(METHODS[name], start(), 0.05, episode(), HOW, 0, 0, order, gen(3))
            for order in ("first", "second")
        )
        for n in a.start:
            torch.testing.assert_close(a.start[n], b.start[n])


def test_reptile_is_start_minus_mean_of_the_ends() -> None:
    e = episode()
    for name in ("MOL", "Ours (mod)"):
        got = meta_gradient(METHODS[name], start(), 0.05, e, HOW, 3, 0, "reptile", gen(3))
        (out,) = METHODS[name].learn(start(), e, [3], HOW, gen(3))
        for n, p in start().items():
            end = out[n].mean(0) if METHODS[name].modules else out[n]
            torch.testing.assert_close(got.start[n], p - end)


@pytest.mark.parametrize("learned", ["meta-sgd", "per-step"])
def test_learned_rates_get_their_gradient(learned: str) -> None:
    rates = initial_rates(learned, start(), 0.05, 2)  # type: ignore[arg-type]
    assert isinstance(rates, dict)
    rates = {n: r.double() for n, r in rates.items()}
    got = meta_gradient(METHODS["MOL"], start(), rates, episode(), HOW, 2, 0, "second", gen(3))
    for n, r in rates.items():
        assert r.shape == ((1, *start()[n].shape) if learned == "meta-sgd" else
                           (2, *[1] * start()[n].ndim))  # fmt: skip
        ends = []
        for eps in (1e-6, -1e-6):
            moved = {k: v.clone() for k, v in rates.items()}
            moved[n].view(-1)[0] += eps
            ends.append(query_loss("MOL", start(), replace(HOW, rates=moved), 2))
        slope = (ends[0] - ends[1]) / 2e-6
        assert slope == pytest.approx(got.rates[n].view(-1)[0].item(), rel=1e-4, abs=1e-8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tiny `faces` layout."""
    rng = np.random.default_rng(1)
    for k in range(9):
        path = tmp_path / "data" / "faces" / "train" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cv2.resize(small, (178, 178)))
    return tmp_path / "data"


def config(out: Path, **changes: object) -> TrainConfig:
    values = dict(
        dataset="faces", start="mim", out=str(out), width=8, layers=3, outer_steps=6, episodes=2,
        batch=64, query=64, weighting="diagonal", checkpoint_every=2, outer_rate=1e-3,
    )  # fmt: skip
    return parse_config({**values, **changes})


def arrays(path: Path) -> dict[str, torch.Tensor]:
    held = load_init(path)["params"]
    assert isinstance(held, dict)
    return held


def test_interrupted_run_ends_with_the_same_parameters_and_log(root: Path, tmp_path: Path) -> None:
    whole = train(config(tmp_path / "whole"), root)
    train(config(tmp_path / "parts", outer_steps=3), root)
    log = tmp_path / "parts" / "log.csv"
    log.write_text(log.read_text() + "99,1,1,1\n")  # work that was lost
    parts = train(config(tmp_path / "parts"), root)
    for name, p in arrays(whole).items():
        assert torch.equal(p, arrays(parts)[name])
    steps = [line.split(",")[0] for line in log.read_text().splitlines()]
    assert steps == ["step", "1", "2", "3", "4", "5", "6"]


def test_a_killed_run_ends_with_the_same_parameters(root: Path, tmp_path: Path) -> None:
    """SIGKILL between two checkpoints, then the same command to its end."""
    whole = train(config(tmp_path / "whole", outer_steps=150, checkpoint_every=5), root)
    yaml, out = tmp_path / "killed.yaml", tmp_path / "killed"
    held = dataclasses.asdict(config(out, outer_steps=150, checkpoint_every=5))
    yaml.write_text(json.dumps(held))  # JSON is YAML
    command = [sys.executable, "-m", "meta_trainer", "train", "--config", str(yaml),
               "--root", str(root)]  # fmt: skip
    how: dict[str, Any] = {"cwd": Path(__file__).resolve().parents[2],
                           "env": {**os.environ, "OMP_NUM_THREADS": "1"}}  # fmt: skip
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, **how)
    end = time.monotonic() + 120
    while not (out / "checkpoint.pt").is_file() and time.monotonic() < end:
        time.sleep(0.01)
    first.kill()
    first.wait()
    assert (out / "checkpoint.pt").is_file() and not (out / "init.pt").is_file(), "killed too late"
    subprocess.run(command, check=True, capture_output=True, timeout=120, **how)
    for name, p in arrays(whole).items():
        assert torch.equal(p, arrays(out / "init.pt")[name])
    steps = [line.split(",")[0] for line in (out / "log.csv").read_text().splitlines()]
    assert steps == ["step", *map(str, range(1, 151))]


def test_training_changes_the_start_and_lowers_the_query_loss(root: Path, tmp_path: Path) -> None:
    path = train(config(tmp_path / "o", outer_steps=30, checkpoint_every=30), root)
    rows = [line.split(",") for line in (tmp_path / "o" / "log.csv").read_text().splitlines()[1:]]
    losses = [float(r[1]) for r in rows]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    init = load_signal_init(path)
    assert init.modality == "image" and init.meta["step"] == 30
    assert init.meta["config"]["seed"] == 0 and init.meta["data"]["signals"] > 0
    assert init.window is not None and (init.window.tasks, init.window.side) == (4, 180)


@pytest.mark.parametrize("changes", [{"learned_rates": "per-step"}, {"order": "reptile"}])
def test_other_meta_learners_run_and_resume(
    root: Path, tmp_path: Path, changes: dict[str, str]
) -> None:
    whole = train(config(tmp_path / "whole", outer_steps=4, **changes), root)
    train(config(tmp_path / "parts", outer_steps=2, **changes), root)
    parts = train(config(tmp_path / "parts", outer_steps=4, **changes), root)
    for name, p in arrays(whole).items():
        assert torch.equal(p, arrays(parts)[name])


def test_two_processes_take_the_same_steps_as_one(root: Path, tmp_path: Path) -> None:
    alone = train(config(tmp_path / "one", outer_steps=2, episodes=3), root)
    yaml = tmp_path / "two.yaml"
    yaml.write_text(
        f"dataset: faces\nstart: mim\nout: {tmp_path / 'two'}\nwidth: 8\nlayers: 3\n"
        "outer_steps: 2\nepisodes: 3\nbatch: 64\nquery: 64\nweighting: diagonal\n"
        "checkpoint_every: 2\nouter_rate: 0.001\n"
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
        "-m", "meta_trainer", "train", "--config", str(yaml), "--root", str(root),
    ]  # fmt: skip
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command, cwd=repository, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for name, p in arrays(alone).items():
        torch.testing.assert_close(p, arrays(tmp_path / "two" / "init.pt")[name])


def test_checkpoint_of_another_configuration_is_refused(root: Path, tmp_path: Path) -> None:
    train(config(tmp_path / "o", outer_steps=2), root)
    with pytest.raises(ConfigError, match="inner_rate"):
        train(config(tmp_path / "o", inner_rate=0.5), root)


def test_the_full_matrix_trains_tiny_networks_only(root: Path, tmp_path: Path) -> None:
    train(config(tmp_path / "o", outer_steps=1, start="mim", weighting="full"), root)
    wide = config(tmp_path / "w", outer_steps=1, start="mim", weighting="full", width=64)
    with pytest.raises(ConfigError, match="at most 4096 parameters, received 4547"):
        train(wide, root)


def test_foreign_initializations_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"nonsense")
    with pytest.raises(InitError, match=r"x\.pt"):
        load_init(path)
    torch.save({"format": "other"}, path)
    with pytest.raises(InitError, match="mclnf-init-1"):
        load_init(path)
    torch.save(Path("pickled object"), path)
    with pytest.raises(InitError):
        load_init(path)


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean inner_rate"):
        parse_config({"dataset": "faces", "start": "mod", "out": "o", "inner_rat": 1})
    with pytest.raises(ConfigError, match="missing out"):
        parse_config({"dataset": "faces", "start": "mod"})
    with pytest.raises(ConfigError, match="one of second, first, reptile"):
        config(tmp_path, order="third")
    with pytest.raises(ConfigError, match="width: expected int, received 'x'"):
        config(tmp_path, width="x")
    with pytest.raises(ConfigError, match="inner_rate: expected a positive number, received -1"):
        config(tmp_path, inner_rate=-1)
    with pytest.raises(ConfigError, match="needs order: second"):
        config(tmp_path, order="first", learned_rates="meta-sgd")
    with pytest.raises(ConfigError, match="cut: own needs start: mod or mim, received oml"):
        config(tmp_path, start="oml", cut="own")
    with pytest.raises(ConfigError, match="adam needs order: first or reptile"):
        config(tmp_path, stepping="adam")
    assert config(tmp_path, stepping="adam", order="reptile").rule.stepping == "adam"
    bad = tmp_path / "bad.yaml"
    bad.write_text("- a\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml: expected keys"):
        load_config(bad)


def test_shipped_settings_are_valid_and_say_their_own_name() -> None:
    folder = Path(__file__).resolve().parents[2] / "configs" / "meta"
    files = sorted(path for path in folder.glob("*.yaml") if path.stem != "city")
    assert len(files) >= 10
    for path in files:
        settings = load_config(path)
        shipped = f"{DATASETS[settings.dataset].kind}-init"  # what the daemon starts from
        assert path.stem in (f"{settings.dataset}-{settings.start}", shipped)
        assert (settings.weighting == "diagonal") == (settings.start == "mim")
        modular = settings.start in ("mod", "mim")
        if DATASETS[settings.dataset].kind == "views":  # Table 7's module; small for two cores
            assert modular and settings.width == (32 if settings.dataset == "flights" else 256)
        else:
            assert settings.width == (128 if modular else 256)
        assert path.name in path.read_text()


def test_evaluate_adapts_the_written_start(root: Path, tmp_path: Path) -> None:
    path = train(config(tmp_path / "o", outer_steps=2), root)
    found = evaluate_init(path, root / "faces" / "train", 2, 4, 64, root)
    assert found["method"] == "Ours (MIM)" and found["n"] == 2
    assert list(found["curve"]) == ["1", "2", "4"] and len(found["signals"]) == 2
    assert found["last"] == found["curve"]["4"] > found["step1"]
