"""Trains a nerfstudio method and renders held-out views at marks; runs in the peer's environment.

    python nerfstudio_peer.py JOB.json

The job names `method` (as `ns-train` does), `project` (folder of a transforms.json of train frames
only), `out`, `device`, `marks` (seconds), `seed` and `views` (name, `transform_matrix`, pinhole
intrinsics in pixels). Written to `out`: a PNG per mark and view, and after each mark `marks.json`.
The clock is the CPU time of this process, on a CUDA device the wall time; setting up, reading the
pictures and rendering are left out.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.configs.method_configs import method_configs
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer
from PIL import Image
from torchmetrics.image import lpip

# Only nerfstudio's own evaluations measure LPIPS, with weights that would be downloaded.
lpip.LearnedPerceptualImagePatchSimilarity = lambda **_: torch.nn.Identity()


def prepare(job: dict[str, Any]) -> Trainer:
    """The method as shipped, but for what the README beside this file names."""
    torch.manual_seed(job["seed"])
    config = method_configs[job["method"]]
    config.machine.device_type = job["device"]
    config.machine.seed = job["seed"]
    config.vis = "tensorboard"
    config.output_dir = Path(job["out"]) / "nerfstudio"
    config.timestamp = config.experiment_name = "run"
    splats = job["method"] == "splatfacto"
    parser = NerfstudioDataParserConfig(
        data=Path(job["project"]), eval_mode="all", load_3D_points=splats
    )
    if splats:
        config.pipeline.datamanager.dataparser = parser
    else:
        rays = config.pipeline.datamanager.train_num_rays_per_batch
        config.pipeline.datamanager = VanillaDataManagerConfig(
            dataparser=parser, train_num_rays_per_batch=rays
        )
    if hasattr(config.pipeline.model, "camera_optimizer"):
        config.pipeline.model.camera_optimizer.mode = "off"
        config.optimizers.pop("camera_opt", None)
    if hasattr(config.pipeline.model, "implementation"):
        config.pipeline.model.implementation = "torch"
    trainer: Trainer = config.setup()
    trainer.setup()
    return trainer


def train_step(trainer: Trainer, step: int) -> None:
    """One step as `Trainer.train` takes it, without its evaluations and checkpoints."""
    trainer.pipeline.train()
    for callback in trainer.callbacks:
        callback.run_callback_at_location(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
    trainer.train_iteration(step)
    for callback in trainer.callbacks:
        callback.run_callback_at_location(step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)


@torch.no_grad()
def render(trainer: Trainer, view: dict[str, Any], path: Path) -> None:
    """A view as the trained model shows it, as PNG."""
    placed = trainer.pipeline.datamanager.train_dataparser_outputs
    pose = placed.dataparser_transform @ torch.tensor(view["transform_matrix"])
    pose[:3, 3] *= placed.dataparser_scale
    camera = Cameras(
        camera_to_worlds=pose[None, :3],
        fx=view["fl_x"],
        fy=view["fl_y"],
        cx=view["cx"],
        cy=view["cy"],
        width=view["w"],
        height=view["h"],
    ).to(trainer.device)
    trainer.pipeline.eval()
    rgb = trainer.pipeline.model.get_outputs_for_camera(camera)["rgb"]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((rgb.clamp(0, 1) * 255).round().byte().cpu().numpy()).save(path)


def main() -> None:
    """Train until the last mark."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out, cuda = Path(job["out"]), job["device"] == "cuda"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if cuda else time.process_time()

    trainer = prepare(job)
    found: list[dict[str, Any]] = []
    step, spent = 0, 0.0
    for mark in job["marks"]:
        while spent < mark:
            began = now()
            train_step(trainer, step)
            spent += now() - began
            step += 1
        began = now()
        for view in job["views"]:
            render(trainer, view, out / f"{mark:g}" / f"{view['name']}.png")
        taken = (now() - began) / len(job["views"])
        found.append({"mark_s": mark, "spent_s": spent, "steps": step, "render_s": taken})
        (out / "marks.json").write_text(json.dumps(found), encoding="utf-8")
        print(f"{job['method']}, {mark:g} s: {step} steps, {taken:.1f} s a view", flush=True)


if __name__ == "__main__":
    main()
