"""Frozen settings of meta-training, read from YAML in one place."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
import yaml

from mclnf_edge.errors import ConfigError
from mclnf_edge.maths.adaptation import Rule, Stepping, Weighting
from mclnf_edge.maths.fields import NerfMlp, Siren, count
from mclnf_edge.maths.fisher import FULL_PARAMETERS
from meta_trainer.episodes import Cut
from meta_trainer.ray_field import RayField

Start = Literal["mol", "maml-cl", "oml", "mod", "mim"]
Order = Literal["second", "first", "reptile"]
Learned = Literal["none", "meta-sgd", "per-step"]


@dataclass(frozen=True)
class TrainConfig:
    """One meta-training run. Every field stands in the YAML under the same name.

    `start` says which method the initialization is for, `order` the meta-gradient: "second" (MAML),
    "first" (first-order MAML) or "reptile". `learned_rates`: "none", "meta-sgd" (one step size per
    parameter) or "per-step" (one per tensor and inner step, MAML++). `stepping` is how the inner
    loop moves; Adam's direction has no finite derivative where a gradient is zero, so that it goes
    with the first-order meta-gradients only. `layers` counts a SIREN's linear layers, or the hidden
    ones of the MLP of views; their pictures are `view_width` pixels across, a task holds `rays` of
    them with `ray_samples` each.
    """

    dataset: str
    start: Start
    out: str
    width: int = 128
    layers: int = 5
    omega: float = 30.0
    first_omega: float = 0.0
    tasks: int = 4
    cut: Cut = "strips"
    order: Order = "second"
    learned_rates: Learned = "none"
    stepping: Stepping = "sgd"
    inner_steps: int = 2
    inner_rate: float = 1e-2
    outer_rate: float = 1e-4
    outer_steps: int = 2000
    episodes: int = 3
    batch: int = 1024
    query: int = 2048
    weighting: Weighting = "none"
    lam: float = 0.1
    cap: float = 10.0
    damping: float = 0.1
    frames: int = 8
    seconds: float = 3.0
    view_width: int = 480
    rays: int = 32_768
    ray_samples: int = 32
    seed: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        """Range checks; raises ConfigError naming the value."""
        for name in ("width", "layers", "tasks", "inner_steps", "outer_steps", "episodes"):
            _positive(name, getattr(self, name))
        for name in ("view_width", "rays", "ray_samples"):
            _positive(name, getattr(self, name))
        for name in ("inner_rate", "outer_rate", "damping", "cap", "omega", "seconds"):
            _positive(name, getattr(self, name))
        _positive("checkpoint_every", self.checkpoint_every)
        if self.cut == "own" and self.start not in ("mod", "mim"):
            raise ConfigError(
                f"cut: own needs start: mod or mim, received {self.start}: one network could not "
                "tell its tasks apart"
            )
        if self.learned_rates != "none" and self.order != "second":
            raise ConfigError(
                f"learned_rates: {self.learned_rates} needs order: second, received {self.order}"
            )
        if self.stepping == "adam" and self.order == "second":
            raise ConfigError("stepping: adam needs order: first or reptile, received second")

    @property
    def rule(self) -> Rule:
        """The inner and outer loop's sample weighting, and the inner loop's steps."""
        return Rule(self.weighting, self.stepping, lam=self.lam, cap=self.cap, damping=self.damping)

    def field(self, d_in: int, d_out: int) -> Siren:
        """The network of a picture, video or sound."""
        siren = Siren(d_in, d_out, self.width, self.layers, self.omega, self.first_omega or None)
        self._check_size(siren)
        return siren

    def ray_field(self) -> RayField:
        """The network of views, volume-rendered."""
        mlp = NerfMlp(self.width, self.layers, self.layers // 2)
        self._check_size(mlp)
        return RayField(mlp, self.ray_samples)

    def _check_size(self, network: Siren | NerfMlp) -> None:
        size = count(network.init(torch.Generator()))
        if self.weighting == "full" and size > FULL_PARAMETERS:
            raise ConfigError(
                f"weighting: full is for at most {FULL_PARAMETERS} parameters, received {size}; "
                "use diagonal or factored"
            )


def load_config(path: Path) -> TrainConfig:
    """Read a YAML file; unknown keys, missing keys and wrong types raise ConfigError."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values, received {type(raw).__name__}")
    try:
        return parse_config(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_config(raw: dict[str, Any]) -> TrainConfig:
    """A mapping (from YAML or a checkpoint) -> TrainConfig."""
    hints = get_type_hints(TrainConfig)
    for key in raw:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown key {key!r}{hint}")
    required = {f.name for f in dataclasses.fields(TrainConfig) if f.default is dataclasses.MISSING}
    if missing := sorted(required - raw.keys()):
        raise ConfigError(f"missing {', '.join(missing)}")
    return TrainConfig(**{key: _typed(key, value, hints[key]) for key, value in raw.items()})


def _typed(key: str, value: Any, hint: Any) -> Any:
    choices = get_args(hint)
    if choices:
        if value not in choices:
            raise ConfigError(f"{key}: expected one of {', '.join(choices)}, received {value!r}")
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}: expected {hint.__name__}, received {value!r}")


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name}: expected a positive number, received {value!r}")
