"""Frozen settings of the daemon and the only reader of its YAML files.

The defaults stand here and, with comments, in `configs/default.yaml`; a test keeps the two equal.
A file needs to name only what it changes. Unknown keys, wrong types and values out of range raise
ConfigError with file, line, key, what was expected and what was received.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from mclnf_edge.errors import ConfigError

MIB = 1024 * 1024


def setting(
    default: Any, low: float | None = None, high: float | None = None, above: float | None = None
) -> Any:
    """A dataclass field whose numbers lie in low <= x <= high and x > above."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


def section(kind: type[Any]) -> Any:
    """A dataclass field that holds a section with its defaults."""
    return field(default_factory=kind)


class Section:
    """Base of every settings class: checks the types and ranges of all fields when it is built."""

    def __post_init__(self) -> None:
        """Raise ConfigError naming the field whose value has a wrong type or range."""
        hints = get_type_hints(type(self))
        for spec in dataclasses.fields(self):  # type: ignore[arg-type]
            value = _checked(spec.name, getattr(self, spec.name), hints[spec.name])
            _check_range(spec.name, value, spec.metadata)
            object.__setattr__(self, spec.name, value)


@dataclass(frozen=True)
class WireConfig(Section):
    """The socket: where it is bound and how much publishers may send."""

    bind: str = "tcp://127.0.0.1:7710"
    credit_bytes: int = setting(16 * MIB, 64 * 1024, 1 << 40)


@dataclass(frozen=True)
class MapConfig(Section):
    """How the stream is cut into tasks, and when a task closes."""

    tasks: Literal["grid", "time", "publisher"] = "grid"
    cell_size_m: float | Literal["auto"] = setting("auto", above=0)
    time_window_s: float = setting(10.0, above=0)
    inactivity_s: float = setting(20.0, above=0)
    known_views: int = setting(1, 1, 255)
    frame_budget_bytes: int = setting(256 * MIB, MIB)
    journal_budget_bytes: int = setting(1024 * MIB, 8 * MIB)
    onnx: bool = False


@dataclass(frozen=True)
class FieldConfig(Section):
    """The network of a module: feature planes with a small MLP, or the paper's MLP."""

    kind: Literal["planes", "mlp"] = "planes"
    plane_texels: int = setting(256, 16, 4096)
    plane_vertical: int = setting(32, 4, 1024)
    voxels: int = setting(48, 4, 512)
    mlp_width: int = setting(256, 1, 4096)
    mlp_hidden: int = setting(10, 1, 64)


@dataclass(frozen=True)
class AdaptConfig(Section):
    """Test-time optimization of an open module (Algorithm 1, lines 9-17)."""

    passes: float = setting(1.0, above=0, high=1000)
    rays_per_step: int = setting(2048, 1, 1 << 20)
    lr: float = setting(0.06, above=0, high=10)
    lr_mlp: float = setting(0.002, above=0, high=10)
    weighting: Literal[
        "none", "output-layer", "diagonal", "drawn", "gradncp", "residual", "shuffled"
    ] = "output-layer"
    fisher_lambda: float = setting(0.1, 0)
    fisher_damping: float = setting(0.1, above=0)
    weight_clamp: float = setting(10.0, 1)
    robust_cap: float = setting(4.0, above=0)
    min_rays_per_frame: int = setting(2048, 1)
    budget_s_per_frame: float = setting(4.0, above=0)
    gain_level: float = setting(0.0, 0, 1)
    seed: int = setting(0, 0, 2**31 - 1)


@dataclass(frozen=True)
class SignalsConfig(Section):
    """Modules of images, videos and sounds; lambda, damping, cap and seed are those of `adapt`."""

    steps: int = setting(512, 1, 1 << 20)
    samples_per_step: int = setting(512, 1, 1 << 20)
    stepping: Literal["sgd", "adam", "fim-sgd"] = "adam"
    lr: float | Literal["init"] = setting(0.0003, above=0, high=10)
    weighting: Literal["none", "diagonal", "factored"] = "factored"
    max_edge_px: int = setting(480, 16, 4096)


@dataclass(frozen=True)
class ComputeConfig(Section):
    """What computes the field of posed frames: see `mapping.engines.choose`."""

    engine: Literal["auto", "numba", "torch"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class RenderConfig(Section):
    """What answers render requests; `engine` learning: what computes the field that learns."""

    engine: Literal["auto", "learning", "onnx", "tensorrt"] = "auto"
    precision: Literal["single", "half"] = "single"
    resident_mb: int = setting(512, 16)
    preview_px: int = setting(160, 16, 4096)


@dataclass(frozen=True)
class SecurityConfig(Section):
    """CURVE keys. `keys` is the folder `mclnf-edge keygen` fills; None: loopback only."""

    keys: str | None = None

    @property
    def secret_file(self) -> Path:
        """The daemon's own secret key; raises ConfigError when no folder is set."""
        return self._folder() / "server.secret"

    @property
    def authorised_file(self) -> Path:
        """The clients that may connect, with their roles."""
        return self._folder() / "authorised-clients"

    def _folder(self) -> Path:
        if self.keys is None:
            raise ConfigError("security.keys: expected a folder of keys, received none")
        return Path(self.keys)


@dataclass(frozen=True)
class WatchConfig(Section):
    """Supervision: how long a stall may last and how much work a kill may cost."""

    hang_s: float = setting(60.0, above=0)
    checkpoint_s: float = setting(20.0, above=0)
    drain_s: float = setting(10.0, above=0)
    log: Literal["text", "json"] = "text"


@dataclass(frozen=True)
class FollowConfig(Section):
    """`serve --follow`: how often it asks, in what pieces, and how long a silence may last."""

    poll_s: float = setting(2.0, above=0, high=3600)
    chunk_bytes: int = setting(64 * 1024, 1024, MIB)
    timeout_s: float = setting(10.0, above=0, high=3600)


@dataclass(frozen=True)
class ServeConfig(Section):
    """Everything `mclnf-edge serve` can be told, one section per part."""

    wire: WireConfig = section(WireConfig)
    map: MapConfig = section(MapConfig)
    field: FieldConfig = section(FieldConfig)
    adapt: AdaptConfig = section(AdaptConfig)
    signals: SignalsConfig = section(SignalsConfig)
    compute: ComputeConfig = section(ComputeConfig)
    render: RenderConfig = section(RenderConfig)
    security: SecurityConfig = section(SecurityConfig)
    watch: WatchConfig = section(WatchConfig)
    follow: FollowConfig = section(FollowConfig)


def load_config(path: Path | None) -> ServeConfig:
    """The settings of a YAML file over the defaults; the defaults for None.

    Raises ConfigError: `FILE:LINE: section.key: expected ..., received ...`.
    """
    if path is None:
        return ServeConfig()
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if root is None:
        return ServeConfig()
    config = _build(ServeConfig, root, loader, str(path), "")
    assert isinstance(config, ServeConfig)
    return config


def _build(kind: type[Any], node: yaml.Node, loader: Any, where: str, prefix: str) -> Any:
    """An instance of the settings class `kind` from a YAML mapping."""
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        what = f"{prefix.rstrip('.')}: " if prefix else ""
        raise ConfigError(f"{where}:{line}: {what}expected keys and values, received {_text(node)}")
    hints, values = get_type_hints(kind), {}
    for key_node, value_node in node.value:
        key, at = str(key_node.value), f"{where}:{key_node.start_mark.line + 1}"
        if key not in hints:
            raise ConfigError(f"{at}: unknown key {prefix}{key}{_nearest(key, hints)}")
        if key in values:
            raise ConfigError(f"{at}: {prefix}{key} stands here a second time")
        if isinstance(hints[key], type) and dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], value_node, loader, where, f"{prefix}{key}.")
            continue
        values[key] = _value(loader, value_node, f"{at}: {prefix}{key}")
        try:
            kind(**{key: values[key]})
        except ConfigError as error:
            raise ConfigError(f"{at}: {prefix}{error}") from None
    return kind(**values)


def _value(loader: Any, node: yaml.Node, where: str) -> Any:
    """A plain value; ConfigError for a tag that is not plain YAML or a date that never was."""
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None


def _text(node: yaml.Node) -> str:
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else "a list"


def _nearest(key: str, names: dict[str, Any]) -> str:
    near = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(names)}"


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` allows it (a whole number is a float too); raises ConfigError."""
    for option in _options(hint):
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            if abs(value) > sys.float_info.max or not math.isfinite(value):
                break
            return float(value)
        if isinstance(option, type) and isinstance(value, option):
            if isinstance(value, bool) and option is not bool:
                continue
            return value
    raise ConfigError(f"{name}: expected {_describe(hint)}, received {value!r}")


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _describe(hint: Any) -> str:
    words = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
    parts = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            parts.append(", ".join(repr(choice) for choice in get_args(option)))
        else:
            parts.append("null" if option is type(None) else words.get(option, str(option)))
    return " or ".join(parts)


def _check_range(name: str, value: Any, limits: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    low, high, above = (limits.get(key) for key in ("low", "high", "above"))
    if low is not None and value < low:
        raise ConfigError(f"{name}: expected at least {low}, received {value}")
    if above is not None and value <= above:
        raise ConfigError(f"{name}: expected more than {above}, received {value}")
    if high is not None and value > high:
        raise ConfigError(f"{name}: expected at most {high}, received {value}")
