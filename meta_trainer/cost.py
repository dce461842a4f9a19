"""Table 6: what adapting one episode costs, each method in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import torch

from mclnf_edge.maths.fields import count
from mclnf_edge.resident import peak_mb
from meta_trainer.evaluate import measure
from meta_trainer.methods import predict
from meta_trainer.runs import (
    Job,
    Setting,
    chosen_rate,
    fitting,
    load_episode,
    make_method,
    start_params,
    test_items,
)

STEPS = 128


def measure_cost(job: Job, setting: Setting, name: str) -> dict[str, Any]:
    """Parameters, peak memory (MiB), episodes/s at 128 steps per task, PSNR.

    Memory is the whole process's, on a CUDA device what PyTorch held there.

    The smaller of 128 and the budget's last mark is used and reported as `steps`.
    """
    method = make_method(name, setting)
    setting = fitting(setting, method)
    start_params(job, setting, method, 0)  # trained and searched here, not in the measured process
    rate, _ = chosen_rate(job, setting, name, method)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (job, setting, name, rate))


def _measure(job: Job, setting: Setting, name: str, rate: float) -> dict[str, Any]:
    method = make_method(name, setting)
    setting = fitting(setting, method)
    start = start_params(job, setting, method, 0)
    item = test_items(job, setting)[0]
    episode = load_episode(item, setting, job)
    how, steps = job.learning(setting, method, rate), min(STEPS, job.budget.marks[-1])
    begun = time.perf_counter()
    (end,) = method.learn(start, episode, [steps], how, torch.Generator().manual_seed(0))
    if job.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    seen = episode.measured
    got = seen.rebuild(predict(how, method.modules, end, seen))
    truth = seen.rebuild(seen.values)
    return {
        "steps": steps,
        "parameters": count(start) * max(1, method.modules),
        "memory_mb": _peak_mb(job.device),
        "episodes_per_s": 1 / seconds,
        "psnr": measure(got, truth, item.kind, seen.peak, seen.mask)["psnr"],
        "seeds": 1,
        "n": 1,
    }


def _peak_mb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_mb() * 1e6 / 2**20
