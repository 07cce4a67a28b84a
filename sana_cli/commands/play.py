"""`sana play`: a local page that draws while one types.

It prints nothing. `play/studio.py` draws, `play/server.py` serves.
"""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from sana_cli.choices import Precision, Solver, Weights
from sana_cli.config.keys import SampleConfig
from sana_cli.errors import SanaError, one_line
from sana_cli.play.studio import Studio
from sana_cli.play.worker import Worker
from sana_cli.sampling.opened import open_checkpoint
from sana_cli.weights import checkpoint

FIRST_PORT = 7262  # SANA, on a telephone's keys
PORTS = 20  # that are tried
LOCAL = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}  # this machine, to itself


@dataclass(frozen=True)
class PlayOptions:
    """What to play with, and where to serve. `None` takes what the checkpoint has on record."""

    checkpoint: Path | None = None  # None: the newest whole one under runs/
    height: int | None = None
    width: int | None = None
    solver: Solver | None = None
    adapter: tuple[str, ...] = ()  # FILE or FILE:SCALE, put on the checkpoint in this order
    weights: Weights = "ema"
    device: str = "auto"
    precision: Precision | None = None
    encoder: str | None = None
    instruction: str | None = None
    autoencoder: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None  # None: the first free one from FIRST_PORT
    stop: Callable[[], int | None] = lambda: None  # asked again and again; a signal's number ends it


@dataclass(frozen=True)
class PlayServing:
    """The page is being served."""

    url: str
    is_local: bool  # only this machine reaches it
    checkpoint: Path
    shipped: bool  # the checkpoint comes with the package
    settings: SampleConfig
    device: str
    notes: tuple[str, ...]


def play(options: PlayOptions) -> Iterator[PlayServing]:
    """Serve the page. Yields once it is there; runs until `stop` says so or it is closed.

    A picture that is being drawn then is dropped after its solver step.

    Raises:
        SanaError: the `play` extra is not installed, the port is taken, the checkpoint cannot be
            sampled from, or the server has died.
    """
    server = _server()
    with closing(_listen(options.host, options.port)) as listening:
        opened = open_checkpoint(
            options.checkpoint,
            adapter=options.adapter,
            weights=options.weights,
            height=options.height,
            width=options.width,
            encoder=options.encoder,
            instruction=options.instruction,
            autoencoder=options.autoencoder,
            device=options.device,
            precision=options.precision,
        )
        studio = Studio(opened, options.solver)
        worker = Worker(studio.draw)
        address, port = listening.getsockname()[:2]
        app = server.make_app(studio.about(), worker, options.host, address)
        with server.serving(app, listening) as thread, closing(worker):
            yield PlayServing(
                url=_url(LOCAL[listening.family] if server.is_any(address) else options.host, port),
                is_local=server.is_local(address),
                checkpoint=opened.place,
                shipped=checkpoint.is_shipped(opened.place),
                settings=studio.settings,
                device=str(opened.device),
                notes=tuple(opened.adapter_notes()),
            )
            while options.stop() is None:
                thread.check()
                thread.join(0.2)


def _server() -> ModuleType:
    """The module that serves.

    Raises:
        SanaError: the `play` extra is not installed.
    """
    try:
        from sana_cli.play import server
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise SanaError(
            "the page needs starlette and uvicorn", "install them with: pip install 'sana-cli[play]'"
        ) from error
    return server


def _listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens on `port`, or on the first free one from FIRST_PORT.

    Raises:
        SanaError: the host is not of this machine, or its port cannot be had.
    """
    wanted = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except (OSError, ValueError) as error:  # ValueError: it cannot be a name
        reason = error.strerror if isinstance(error, OSError) else "no name of a machine"
        raise SanaError(f"`host`: {one_line(host)[:100]}: {reason}", exit_code=2) from error
    for number in wanted:
        try:
            return socket.create_server((address[0], number), family=family)
        except OSError as error:
            problem = error
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                reason = f": {os.strerror(error.errno or 0)}"
                if error.errno == errno.EADDRNOTAVAIL:
                    reason = " is no address of this machine"
                raise SanaError(
                    f"`host`: {host}{reason}",
                    "127.0.0.1 is this machine alone, 0.0.0.0 all its addresses",
                    exit_code=2,
                ) from error
    last = f"{FIRST_PORT} to {FIRST_PORT + PORTS - 1}" if port is None else port
    raise SanaError(
        f"`port`: {last} on {host}: {os.strerror(problem.errno or 0)}",
        "choose another one, or leave `port` out for the first free one" if port is not None
        else "choose another `port`",
        exit_code=2,
    ) from problem  # fmt: skip


def _url(host: str, port: int) -> str:
    """Where a browser finds the page."""
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
