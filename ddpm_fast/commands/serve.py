"""ddpm-fast serve: a page on which images are seen being drawn, and an interface for programs."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import TYPE_CHECKING, Any

from . import missing_package, non_negative, positive
from .options import add_method_options, add_weight_options, draw_config, failed, load

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.applications import Starlette

    from ..serving import Limits


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="a page to watch a trained model draw, and images for programs",
        description="Serves a trained model by HTTP: a page on which one picks class, seed, "
        "images, steps and guidance and watches the batch, and JSON and PNG for programs. Requests "
        "that come at any time share a batch. SIGINT or SIGTERM finish what runs, a second one "
        "gives it up.",
        epilog="There is no authentication: on another address than the loopback's, put a proxy "
        "before it that has some.",
    )
    add_weight_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument(
        "--port", type=_port, default=8000, help="0: one that is free (%(default)s)"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        metavar="NAME",
        help="a name by which browsers ask for it, beside the loopback's: behind a proxy, say",
    )
    add_method_options(parser)
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-batch", type=positive, default=16, metavar="N", help="images at once (%(default)s)"
    )
    limits.add_argument(
        "--max-waiting",
        type=non_negative,
        default=256,
        metavar="N",
        help="images that wait beside them (%(default)s)",
    )
    limits.add_argument(
        "--max-images", type=positive, metavar="N", help="of one request (64, or all that may wait)"
    )
    limits.add_argument(
        "--max-steps", type=positive, metavar="N", help="of an image (all that the model has)"
    )
    limits.add_argument(
        "--max-requests",
        type=positive,
        default=128,
        metavar="N",
        help="that draw at once (%(default)s)",
    )
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="for what runs when it is told to stop (%(default)g)",
    )
    parser.add_argument("--quiet", action="store_true", help="errors only")
    parser.set_defaults(run=run, seed=0)


def run(arguments: argparse.Namespace) -> int:
    if missing_package("serve", "serve", ("PIL", "safetensors", "starlette", "uvicorn")):
        return 2
    from ..serving.limits import Limits
    from ..serving.running import KILLED, is_loopback, listen, run, say, url_of

    steps, most = arguments.num_steps, arguments.max_steps
    if steps is not None and most is not None and steps > most:
        told = f"--num-steps must be at most --max-steps, {most}: clients can ask for no more"
        return failed("serve", f"{told}; got {steps}", 2)
    try:
        limits = Limits(
            max_batch=arguments.max_batch,
            max_waiting=arguments.max_waiting,
            max_images=arguments.max_images,
            max_steps=arguments.max_steps,
            max_requests=arguments.max_requests,
        )
        listener = listen(arguments.host, arguments.port)
    except ValueError as error:
        return failed("serve", error, 2)
    except OSError as error:
        where = f"{arguments.host}, port {arguments.port}"
        return failed("serve", f"cannot listen on {where}: {error.strerror or error}", 2)
    with listener:
        local = is_loopback(listener)
        try:
            app, name = _app(arguments, limits, local)
        except (OSError, RuntimeError, ValueError) as error:
            return failed("serve", error, 2)
        except (MemoryError, OverflowError) as error:
            what = f"no memory for a batch of {limits.max_batch} images (--max-batch)"
            return failed("serve", f"{what}: {error}" if str(error) else what, 2)
        except KeyboardInterrupt:  # while the model is read
            return failed("serve", "interrupted", KILLED + signal.SIGINT)
        if not local:
            say(
                f"ddpm-fast serve: whoever reaches {arguments.host} can have images drawn: there "
                "is no authentication",
                sys.stderr,
            )
        if not arguments.quiet:
            say(f"serving {name} at {url_of(listener)}", sys.stdout)
        return run(app, listener, arguments.grace, arguments.quiet)


def _app(arguments: argparse.Namespace, limits: Limits, local: bool) -> tuple[Starlette, str]:
    from ..serving.limits import LOOPBACK
    from ..serving.site import create_app
    from ..training.draw import Artist

    config = draw_config(arguments)
    loaded, device = load(arguments)
    artist = Artist.of(loaded, config, device)
    classes: list[str] | None = None
    if artist.num_classes is not None:
        known = loaded.class_names or []
        classes = [*known, *map(str, range(len(known), artist.num_classes))]
    hosts = None
    if local or arguments.allow_host:
        hosts = [*LOOPBACK, arguments.host, *(arguments.allow_host or [])]
    name = f"{_run_of(loaded.path)}, step {loaded.step}"
    app = create_app(
        artist.sampler,
        artist.image_shape,
        classes=classes,
        guidance=classes is not None and loaded.config.loss.label_dropout > 0,
        name=name,
        limits=limits,
        allowed_hosts=hosts,
    )
    return app, name


def _run_of(checkpoint: Path) -> str:
    """The name of the run whose it is."""
    folder = checkpoint.resolve()
    return folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"must be a number in 0 … 65535; got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more; got {text!r}")
    return value
