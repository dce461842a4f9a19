"""Initialization files: what every new module starts from."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mclnf_edge.engine.field import MLP_SIZE
from mclnf_edge.errors import InitError

if TYPE_CHECKING:  # PyTorch comes with them, and maps on the kernels start without it
    from mclnf_edge.maths.adaptation import Rates
    from mclnf_edge.maths.fields import Params, Siren

FORMAT = "mclnf-edge-init"
VERSION = 1
SIGNAL_FORMAT = "mclnf-init-1"
MAX_BYTES = 8 * 1024 * 1024
SHIPPED = {name: f"{name}_init.pt" for name in ("city", "image", "video", "audio")}

SignalModality = Literal["image", "video", "audio"]
SHAPES: dict[SignalModality, tuple[int, int]] = {"image": (2, 3), "video": (3, 3), "audio": (1, 1)}
"""(coordinates, values) of each modality's field: (y, x), (t, y, x) or (t); RGB or loudness."""


@dataclass(frozen=True)
class Initialization:
    """Shared parameters (n,), the digest a map remembers, and how they were made.

    n is MLP_SIZE for the kind planes.
    """

    mlp: npt.NDArray[np.float32]
    digest: str
    meta: dict[str, Any]
    kind: str = "planes"


@dataclass(frozen=True)
class Window:
    """The stretch of a signal that meta-training took as [-1, 1], cut into `tasks` along one axis.

    `side` pixels of a picture, `frames` of a video, `samples` of a sound.
    """

    tasks: int
    side: int
    frames: int
    samples: int


@dataclass(frozen=True)
class SignalInitialization:
    """Shared parameters of the modules of a signal, and the rule they were made for.

    `rates`: the inner loop's step sizes. `window` None: written without, for experiments only.
    """

    modality: SignalModality
    field: Siren
    params: Params
    rates: Rates
    window: Window | None
    digest: str
    meta: dict[str, Any]

    def as_meta(self) -> dict[str, Any]:
        """JSON-able: what a map needs to be read without the file; `of_meta` reads it."""
        window = None if self.window is None else asdict(self.window)
        return {"modality": self.modality, "field": asdict(self.field), "window": window}

    @classmethod
    def of_meta(cls, meta: dict[str, Any]) -> SignalInitialization:
        """An initialization to read a map with: the right shapes, random values."""
        import torch

        from mclnf_edge.maths.fields import Siren

        field = Siren(**meta["field"])
        params = field.init(torch.Generator().manual_seed(0))
        return cls(meta["modality"], field, params, 0.0, Window(**meta["window"]), "", {})


def load_init(path: Path | None) -> Initialization:
    """Read an initialization of posed modules, the shipped one when `path` is None.

    Raises InitError for a missing, unsafe or foreign file, another modality, or wrong shapes.
    Loaded with `weights_only=True`: nothing in it is executed.
    """
    init = open_init(path)
    if not isinstance(init, Initialization):
        raise InitError(
            f"init {path}: expected modality posed, kind planes; received modality "
            f"{init.modality!r}, kind 'siren'"
        )
    return init


def load_signal_init(path: Path) -> SignalInitialization:
    """Read an initialization of image, video or audio modules; InitError as for `load_init`."""
    init = open_init(path)
    if not isinstance(init, SignalInitialization):
        raise InitError(
            f"init {path}: expected an initialization in format {SIGNAL_FORMAT} (modality image, "
            "video or audio), received modality posed"
        )
    return init


def init_file(path: Path | None) -> Path:
    """Where an initialization lies: None is the shipped one of posed modules.

    The names city, image, video and audio are the shipped ones where no file is called so.
    """
    path = Path("city") if path is None else path
    if str(path) in SHIPPED and not path.exists():
        path = Path(str(resources.files("mclnf_edge") / "inits" / SHIPPED[str(path)]))
    return path


def open_init(path: Path | None) -> Initialization | SignalInitialization:
    """Read an initialization of any modality; `path` as for `init_file`.

    Raises InitError as `load_init` does.
    """
    path = init_file(path)
    data, content = _read(path)
    digest = hashlib.sha256(data).hexdigest()
    read = _signal if content.get("format") == SIGNAL_FORMAT else _posed
    try:
        return read(path, content, digest)
    except InitError:
        raise
    except Exception as error:  # a tensor of a kind that cannot be looked into
        raise InitError(f"init {path}: a part is of a wrong type: {error}") from error


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    import torch

    if not path.is_file():
        raise InitError(f"init {path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise InitError(f"init {path}: expected at most {MAX_BYTES} bytes")
    data = path.read_bytes()
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a flipped byte of a pickle can raise anything
        raise InitError(
            f"init {path}: not a safe initialization: damaged, or more in it than tensors and "
            "plain values, which is never loaded"
        ) from error
    if not isinstance(content, dict) or content.get("format") not in (FORMAT, SIGNAL_FORMAT):
        raise InitError(f"init {path}: expected a {FORMAT} file or one in format {SIGNAL_FORMAT}")
    return data, content


def _posed(path: Path, content: dict[str, Any], digest: str) -> Initialization:
    import torch

    version = content.get("version")
    if not (isinstance(version, int) and version == VERSION):
        raise InitError(f"init {path}: expected version {VERSION}, received {version!r:.80}")
    kind, mlp = content.get("kind"), content.get("mlp")
    if content.get("modality") != "posed" or kind not in ("planes", "mlp"):
        raise InitError(
            f"init {path}: expected modality posed, kind planes or mlp; received modality "
            f"{content.get('modality')!r}, kind {kind!r}"
        )
    size = MLP_SIZE if kind == "planes" else "a vector of"
    one = isinstance(mlp, torch.Tensor) and mlp.dim() == 1 and bool(mlp.isfinite().all())
    if mlp is None or not one or (kind == "planes" and len(mlp) != MLP_SIZE):
        raise InitError(f"init {path}: expected {size} finite parameters")
    start = mlp.numpy().astype(np.float32)
    return Initialization(start, digest, _described(path, content), kind)


def _described(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    try:
        meta = json.loads(content["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise InitError(f"init {path}: config: expected a JSON object: {error}") from error
    if not isinstance(meta, dict):
        raise InitError(f"init {path}: config: expected a JSON object")
    return meta


def _signal(path: Path, content: dict[str, Any], digest: str) -> SignalInitialization:
    import torch

    from mclnf_edge.maths.fields import Siren

    modality = content.get("modality")
    if not (isinstance(modality, str) and modality in SHAPES):
        raise InitError(
            f"init {path}: expected modality image, video or audio, received {modality!r:.80}"
        )
    try:
        field = Siren(**content["field"])
        expected = {n: p.shape for n, p in field.init(torch.Generator()).items()}
        params, rates = content["params"], content["rates"]
        found = {n: p.shape for n, p in params.items()}
        window = Window(**content["window"]) if "window" in content else None
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InitError(f"init {path}: a part is missing or of a wrong type: {error}") from error
    if (field.d_in, field.d_out) != SHAPES[modality] or found != expected:
        raise InitError(f"init {path}: parameters do not fit the {modality} field {field}")
    if not all(p.dtype == torch.float32 and p.isfinite().all() for p in params.values()):
        raise InitError(f"init {path}: expected finite float32 parameters")
    steps = rates.values() if isinstance(rates, dict) else [torch.tensor(float(rates))]
    if not all(r.isfinite().all() for r in steps):
        raise InitError(f"init {path}: expected finite step sizes")
    if window is not None and not all(_whole(getattr(window, f.name)) for f in fields(window)):
        raise InitError(f"init {path}: expected a window of whole numbers above 0: {window}")
    described = {k: content.get(k) for k in ("config", "step", "data")}
    return SignalInitialization(modality, field, params, rates, window, digest, described)


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0


def save_init(
    path: Path, mlp: npt.NDArray[np.float32], meta: dict[str, Any], kind: str = "planes"
) -> None:
    """Write an initialization with how it was made."""
    import torch

    content = {
        "format": FORMAT,
        "version": VERSION,
        "modality": "posed",
        "kind": kind,
        "mlp": torch.from_numpy(np.ascontiguousarray(mlp, np.float32)),
        "config": json.dumps(meta),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def signal_content(
    modality: SignalModality,
    field: Siren,
    params: Params,
    rates: float | Params,
    window: Window,
    meta: dict[str, Any],
) -> dict[str, Any]:
    """What `torch.save` writes for `load_signal_init`; `meta` has `config`, `step` and `data`."""
    return {
        "format": SIGNAL_FORMAT,
        "modality": modality,
        "field": asdict(field),
        "params": params,
        "rates": rates,
        "window": asdict(window),
        **meta,
    }
