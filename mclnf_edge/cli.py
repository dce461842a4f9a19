"""The command line: thin commands that parse, call one function and say what came of it.

Everything heavy is imported inside the commands. Exit codes: 0 done, 1 failed, 2 wrong use,
configuration or capture. An error is one line on stderr; with --json also an object on stdout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from mclnf_edge.errors import CaptureError, ConfigError, MclnfError

if TYPE_CHECKING:
    from mclnf_edge.client import Client
    from mclnf_edge.wire.messages import Progress

DEFAULT_ADDRESS = "tcp://127.0.0.1:7710"

app = typer.Typer(
    help="Map a flight into neural fields while it happens, and render it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
map_app = typer.Typer(help="Look at a map on disk.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(map_app, name="map")


Device = Literal["auto", "cpu", "cuda"]
SplitName = Literal["train", "val", "test", "all"]
QualityName = Literal["preview", "full"]

Connect = Annotated[str, typer.Option(metavar="ADDR", help="The daemon's address.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ServerKey = Annotated[Path | None, typer.Option(metavar="FILE", help="The daemon's .public key.")]
World = Annotated[
    str | None,
    typer.Option(metavar="FRAME", help="Of poses: EPSG:CODE, EPSG:CODE@E,N,H, ENU@LAT,LON,ALT."),
]
ClientKey = Annotated[Path | None, typer.Option(metavar="FILE", help="Your own .secret key.")]
MapDir = Annotated[Path, typer.Argument(metavar="DIR", help="A map's folder.")]


@contextmanager
def _reporting(as_json: bool = False) -> Iterator[None]:
    """Turn a named error into one line on stderr and an exit code."""
    try:
        yield
    except MclnfError as error:
        _fail(str(error), error.code, as_json, isinstance(error, (ConfigError, CaptureError)))
    except OSError as error:
        _fail(str(error), "io", as_json)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "mclnf_edge":
            raise
        _fail(f"{error}: install mclnf-edge[daemon] for this command", "missing", as_json)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _fail(text: str, code: str, as_json: bool, wrong_use: bool = False) -> NoReturn:
    message = " ".join(text.split())
    if as_json:
        _print_json({"error": {"code": code, "message": message}})
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2 if wrong_use else 1)


def _print_json(value: Any) -> None:
    from mclnf_edge.report import to_json

    typer.echo(to_json(value))


def _client(address: str, server_key: Path | None, client_key: Path | None, **more: Any) -> Client:
    from mclnf_edge.client import Client

    return Client(address, server_key=server_key, client_key=client_key, **more)


@app.command()
def serve(
    init: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Initialization, or a shipped one: image, video."),
    ] = None,
    map_dir: Annotated[Path, typer.Option("--map", metavar="DIR", help="The map.")] = Path("map"),
    bind: Annotated[str | None, typer.Option(metavar="ADDR", help="Port 0: a free one.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="YAML", help="Settings.")] = None,
    device: Annotated[
        Device | None, typer.Option(help="Where to compute; else as the settings say.")
    ] = None,
    follow: Annotated[
        str | None, typer.Option(metavar="ADDR", help="Learn nothing: mirror this daemon.")
    ] = None,
    server_key: ServerKey = None,
    client_key: ClientKey = None,
) -> None:
    """Map what is published until SIGTERM or Ctrl-C; goes on where the map stopped."""
    with _reporting():
        from mclnf_edge.config import load_config
        from mclnf_edge.daemon.mirror import serve_mirror
        from mclnf_edge.daemon.service import serve as run

        settings = load_config(config)
        address = bind or settings.wire.bind
        keys = (server_key, client_key)
        if follow is not None:
            if init is not None:
                raise ConfigError("--follow: a mirror takes no --init, it learns nothing")
            code = serve_mirror(settings, follow, keys, map_dir, address, device, _say_ready)
        else:
            if any(keys):
                raise ConfigError("--server-key and --client-key: expected with --follow only")
            code = run(settings, init, map_dir, address, device, _say_ready)
        raise typer.Exit(code)


def _say_ready(address: str) -> None:
    print(f"ready {address}", flush=True)


@app.command()
def publish(
    source: Annotated[
        str,
        typer.Argument(
            help="Capture folder, video, camera index or address with --poses; or without: a "
            "picture, clip, folder of pictures, WAV or FLAC file."
        ),
    ],
    connect: Connect = DEFAULT_ADDRESS,
    rate: Annotated[float | None, typer.Option(metavar="HZ", help="Frames a second.")] = None,
    split: Annotated[SplitName, typer.Option(help="Frames of a capture to map.")] = "train",
    stream: Annotated[str | None, typer.Option(metavar="NAME", help="The stream's name.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until all is adapted.")] = False,
    poses: Annotated[Path | None, typer.Option(metavar="FILE", help="Poses of a video.")] = None,
    camera: Annotated[Path | None, typer.Option(metavar="JSON", help="A video's camera.")] = None,
    camera_axes: Annotated[str, typer.Option(help="Of the poses: opencv or opengl.")] = "opencv",
    world_axes: Annotated[str | None, typer.Option(help="Of the poses: ENU, NED, DRB.")] = None,
    world: World = None,
    max_gap: Annotated[float, typer.Option(metavar="S", help="Longest gap of poses.")] = 1.5,
    offset: Annotated[float, typer.Option(metavar="S", help="Video start in pose time.")] = 0.0,
    spool: Annotated[Path | None, typer.Option(metavar="DIR", help="Keeps unsent frames.")] = None,
    server_key: ServerKey = None,
    client_key: ClientKey = None,
    as_json: Json = False,
) -> None:
    """Send posed frames, or a picture, video or sound, to a daemon; each piece is answered."""
    with _reporting(as_json):
        from mclnf_edge.commands import open_source, parse_world_flag, wait_adapted
        from mclnf_edge.commands import publish as run

        opened = open_source(
            source,
            split,
            poses,
            camera,
            rate,
            parse_world_flag(world),
            camera_axes=camera_axes,
            world_axes=world_axes,
            max_gap_s=max_gap,
            offset_s=offset,
        )
        with _client(connect, server_key, client_key, spool=spool) as client:
            report = run(client, opened, stream, rate)
            if wait:
                silent = as_json or not sys.stderr.isatty()
                report["adapted_s"] = wait_adapted(client, _ignore if silent else _say_progress)
        _say_published(report, as_json)


def _ignore(progress: Progress) -> None:
    """Say nothing."""


def _say_progress(progress: Progress) -> None:
    left = "" if progress.seconds_left is None else f", {progress.seconds_left:.0f} s left"
    quality = "" if progress.psnr is None else f", {progress.psnr:.2f} dB"
    line = (
        f"{progress.modules_closed} modules closed, {progress.modules_open} open, "
        f"{progress.frames_waiting} frames waiting, step {progress.steps}{quality}{left}"
    )
    typer.echo(line, err=True)


def _say_published(report: dict[str, Any], as_json: bool) -> None:
    """Print the report; exit 1 when frames were sent and none was kept."""
    kept = sum(report[name] for name in ("accepted", "duplicate", "redundant", "spooled"))
    if as_json:
        _print_json(report)
    else:
        for note in report["notes"]:
            typer.echo(f"note: {note}", err=True)
        for refusal in report["rejections"][:5]:
            typer.echo(f"rejected {refusal['seq']}: {refusal['reason']}", err=True)
        names = ("accepted", "duplicate", "redundant", "rejected", "spooled")
        told = ", ".join(f"{report[n]} {n}" for n in names if report[n] or n == "accepted")
        typer.echo(f"{report['stream']}: {told} in {report['seconds']:.1f} s")
        if report.get("skipped"):
            typer.echo(f"pictures without a pose: {report['skipped']}", err=True)
        if "largest_gap_s" in report:
            typer.echo(f"largest gap between poses: {report['largest_gap_s']:.3f} s", err=True)
    if report["rejected"] and not kept:
        raise typer.Exit(1)


@app.command()
def render(
    pose: Annotated[
        str | None, typer.Option(help="JSON file, 12 or 16 numbers, or CAPTURE#FRAME.")
    ] = None,
    time_s: Annotated[
        float | None, typer.Option("--time", metavar="T", help="Moment of a video or image, s.")
    ] = None,
    span: Annotated[
        str | None, typer.Option(metavar="A:B", help="Seconds of a sound (.wav) or video (.mp4).")
    ] = None,
    connect: Connect = DEFAULT_ADDRESS,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Picture, mp4 or folder.")
    ] = None,
    depth: Annotated[Path | None, typer.Option(metavar="FILE", help=".png or .npy.")] = None,
    camera: Annotated[Path | None, typer.Option(metavar="JSON", help="For bare numbers.")] = None,
    world: World = None,
    quality: Annotated[QualityName, typer.Option(help="preview is quick.")] = "full",
    stream: Annotated[str, typer.Option(metavar="NAME", help="Of a signal.")] = "",
    rate: Annotated[
        float, typer.Option(metavar="HZ", min=0, help="Samples or frames a second of a span.")
    ] = 0.0,
    server_key: ServerKey = None,
    client_key: ClientKey = None,
    as_json: Json = False,
) -> None:
    """Render views of the map as it is now, a frame of a video or a piece of a sound."""
    with _reporting(as_json):
        if sum(given is not None for given in (pose, time_s, span)) != 1:
            raise ConfigError("render: expected one of --pose, --time and --span")
        from mclnf_edge import commands

        pixels = commands.parse_size(size)
        seconds = commands.parse_span(span)
        frame = commands.parse_world_flag(world)
        views = None if pose is None else commands.views_of(pose, camera, pixels, frame)
        with _client(connect, server_key, client_key) as client:
            if views is None:
                report = commands.render_signal(client, time_s, seconds, stream, pixels, out, rate)
            else:
                report = commands.render_views(client, views, pixels, quality, out, depth)
        if as_json:
            _print_json(report)
        else:
            typer.echo(" ".join(str(path) for path in report["files"]))


@app.command()
def status(
    connect: Connect = DEFAULT_ADDRESS,
    watch: Annotated[bool, typer.Option("--watch", help="Once a second until Ctrl-C.")] = False,
    server_key: ServerKey = None,
    client_key: ClientKey = None,
    as_json: Json = False,
) -> None:
    """What the daemon is doing: modules, streams, memory."""
    with _reporting(as_json), _client(connect, server_key, client_key, give_up_s=5.0) as client:
        while True:
            state = client.status()
            if as_json:
                _print_json(state)
            else:
                _say_status(state)
            sys.stdout.flush()
            if not watch:
                return
            time.sleep(1.0)


def _say_status(state: dict[str, Any]) -> None:
    facts = ("device", "engine", "memory_mb", "uptime_s")
    typer.echo("  ".join(f"{name} {state[name]}" for name in facts if name in state))
    if state.get("out_of_memory"):
        typer.echo(f"{state['device']} is out of memory: frames are kept, nothing is learned")
    if copy := state.get("follow"):
        typer.echo(
            f"follows {copy['leader']}: {copy['modules']} of {copy['modules_there']} modules, "
            f"{copy['received_bytes']} bytes over the link beside {copy['frame_bytes']} of frames"
        )
    for stream in state.get("streams", ()):
        counts = ("accepted", "duplicate", "redundant", "rejected", "last_seq")
        told = ", ".join(f"{name} {stream[name]}" for name in counts if name in stream)
        typer.echo(f"stream {stream.get('stream', '')}: {told}")
    _say_modules(state)


def _say_modules(state: dict[str, Any]) -> None:
    for module in state.get("modules", ()):
        psnr = module.get("psnr")
        quality = "" if psnr is None else f", {psnr:.2f} dB"
        typer.echo(
            f"module {module['id']} v{module['version']} {module['state']}: "
            f"{module['frames']} frames, {module['steps']} steps{quality}"
        )


@app.command("eval")
def evaluate(
    capture: Annotated[
        Path, typer.Argument(help="Capture folder; picture, clip, folder of pictures or sound.")
    ],
    connect: Connect = DEFAULT_ADDRESS,
    map_dir: Annotated[
        Path | None, typer.Option("--map", metavar="DIR", help="Without a daemon.")
    ] = None,
    split: Annotated[SplitName, typer.Option(help="Frames to compare with.")] = "test",
    device: Annotated[Device, typer.Option(help="Where to compute (with --map).")] = "auto",
    config: Annotated[
        Path | None, typer.Option(metavar="YAML", help="What --map was served with.")
    ] = None,
    stream: Annotated[str | None, typer.Option(metavar="NAME", help="Of a signal.")] = None,
    rate: Annotated[float | None, typer.Option(metavar="HZ", help="Of a folder of frames.")] = None,
    world: World = None,
    server_key: ServerKey = None,
    client_key: ClientKey = None,
    as_json: Json = False,
) -> None:
    """Compare renders with a capture's held-out frames, or with the signal that was published."""
    with _reporting(as_json):
        from mclnf_edge.captures import open_capture, open_signal
        from mclnf_edge.commands import as_map_holds, parse_world_flag
        from mclnf_edge.evaluate import evaluate as run
        from mclnf_edge.evaluate import local_renderer
        from mclnf_edge.evaluate_signals import evaluate_signal

        signal = open_signal(str(capture), rate)
        if signal is not None:
            if map_dir is not None:
                raise ConfigError("--map: pictures, videos and sounds are compared with a daemon")
            with _client(connect, server_key, client_key) as client:
                signal = as_map_holds(client, signal, rate)
                report = evaluate_signal(signal, client.render_signal, stream, _say_view)
                report["modules"] = client.status()["modules"]
            _say_evaluated(report, as_json)
            return
        frame, frames = parse_world_flag(world), open_capture(capture)
        frames = frames if frame is None else frames.in_world(frame)
        if map_dir is not None:
            from mclnf_edge.config import load_config
            from mclnf_edge.store import map_info

            local = local_renderer(map_dir, device, load_config(config))
            report = run(frames, local, split, _say_view)
            report["modules"] = map_info(map_dir)["modules"]
        else:
            with _client(connect, server_key, client_key) as client:
                report = run(frames, client.render, split, _say_view)
                report["modules"] = client.status()["modules"]
        _say_evaluated(report, as_json)


def _say_evaluated(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(report)
        return
    names = ("psnr", "psnr_known", "psnr_aligned", "ssim", "snr", "pesq")
    told = ", ".join(f"{n} {report[n]:.3f}" for n in names if report.get(n) is not None)
    typer.echo(f"{len(report['views'])} views: {told}")


def _say_view(done: int, total: int) -> None:
    if sys.stderr.isatty():
        typer.echo(f"\rview {done} of {total}", nl=done == total, err=True)


@map_app.command()
def info(folder: MapDir, as_json: Json = False) -> None:
    """The modules of a map."""
    with _reporting(as_json):
        from mclnf_edge.store import map_info

        report = map_info(folder)
        if as_json:
            _print_json(report)
        else:
            _say_modules(report)


@map_app.command()
def check(folder: MapDir, as_json: Json = False) -> None:
    """Verify every checksum; exit 0 when all is sound, else 1."""
    with _reporting(as_json):
        from mclnf_edge.store import map_check

        problems = map_check(folder)
        if as_json:
            rows = [{"file": problem.file, "message": problem.message} for problem in problems]
            _print_json({"sound": not problems, "problems": rows})
        else:
            told = [f"{problem.file}: {problem.message}" for problem in problems]
            typer.echo("\n".join(told) or "sound")
        if problems:
            raise typer.Exit(1)


@map_app.command()
def export(
    folder: MapDir,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for the files.")],
    as_json: Json = False,
) -> None:
    """Write every closed module as an ONNX file that stands alone."""
    with _reporting(as_json):
        from mclnf_edge.inference.export import export_map

        written = []
        for path in export_map(folder, out):
            written.append(str(path))
            if not as_json:
                typer.echo(str(path))
        if as_json:
            _print_json({"map": folder, "files": written})


@map_app.command()
def snapshot(
    folder: MapDir,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    as_json: Json = False,
) -> None:
    """Copy a map consistently, also while a daemon serves it."""
    with _reporting(as_json):
        from mclnf_edge.store import snapshot as run

        run(folder, out)
        if as_json:
            _print_json({"map": folder, "snapshot": out})
        else:
            typer.echo(str(out))


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(metavar="CAPTURE", help="Else a made city.")] = None,
    seconds: Annotated[float, typer.Option(metavar="N", help="Time to adapt.")] = 120.0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="For the files.")] = Path("demo-out"),
    as_json: Json = False,
) -> None:
    """Serve, stream a capture, render held-out views, write pictures and a report."""
    with _reporting(as_json):
        if not seconds > 0:
            raise ConfigError(f"--seconds: expected more than 0, received {seconds}")
        from mclnf_edge.demo import run_demo

        report = run_demo(data, seconds, out, lambda line: typer.echo(line, err=as_json))
        if as_json:
            _print_json(report)


@app.command()
def keygen(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The daemon's folder of keys.")],
    name: Annotated[str, typer.Argument(help="server, or a client's name.")],
    role: Annotated[
        str | None, typer.Option(metavar="ROLE[,ROLE]", help="publish, render, follow, admin.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a key pair: `keygen DIR server` once, then one with --role for each client."""
    with _reporting(as_json):
        from mclnf_edge.config import SecurityConfig
        from mclnf_edge.daemon.security import ROLES, authorise
        from mclnf_edge.wire.keys import keygen as make

        asked = role.split(",") if role else []
        if unknown := set(asked) - set(ROLES):
            raise ConfigError(f"--role: expected {', '.join(ROLES)}, received {unknown}")
        if (name == "server") != (not asked):
            raise ConfigError("keygen: a client needs --role, the name server takes none")
        pair = make(folder, name)
        roles = tuple(known for known in ROLES if known in asked)
        if roles:
            authorise(SecurityConfig(str(folder)).authorised_file, name, roles, pair.public)
        files = [folder / f"{name}.secret", folder / f"{name}.public"]
        if as_json:
            _print_json({"name": name, "roles": roles, "public": pair.public, "files": files})
        else:
            typer.echo(" ".join(str(path) for path in files))


if __name__ == "__main__":
    app()
