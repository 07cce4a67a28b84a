"""The page over HTTP, for this machine alone unless another host is asked for.

It serves one HTML file, what the page shows of the checkpoint, and drawings. Only this module
imports starlette and uvicorn (the `play` extra).

An answer is a stream of messages: a line of JSON with `kind` and `bytes`, then as many bytes of
PNG.
"""

import asyncio
import base64
import hashlib
import ipaddress
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

from sana_cli.errors import SanaError, first_line
from sana_cli.play.studio import Message, PictureRequest
from sana_cli.play.worker import BusyError, Job, Worker

PAGE = Path(__file__).parents[1] / "assets" / "play.html"
MOST_BYTES = 16_384  # of a request
MOST_SECONDS = 10.0  # until all of a request is there
MOST_QUEUED = 16  # messages of an answer; a slow reader misses previews beyond
MOST_CONNECTIONS = 100
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Guard:
    """Refuse requests with a foreign Host or Origin, and add headers to all answers.

    A foreign page can point its own name at this machine (DNS rebinding), and then `Host` has that
    name. It cannot change an address in digits, so these are allowed on a server that listens on
    all of them.
    """

    def __init__(self, app: ASGIApp, names: tuple[str, ...], policy: str) -> None:
        """Guard an application.

        Args:
            app: the application.
            names: what the server listens on, as names or addresses.
            policy: the page's Content-Security-Policy.
        """
        self.app, self.policy = app, policy
        self.names = LOOPBACK | {name.lower() for name in names}
        self.any_address = any(map(is_any, names))
        if self.any_address:
            self.names |= {socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        app = self.app
        if not self._is_ours(host):
            app = PlainTextResponse(
                "this page has another address: Host is not one of its names\n"
                "open it by its address in digits, or start it with --host NAME",
                403,
            )
        elif origin is not None and origin != f"http://{host}":
            app = PlainTextResponse(
                "another page may not use this one: Origin is not its own\n"
                "open it by its own address, which begins with http://",
                403,
            )

        async def answer(event: Event) -> None:
            if event["type"] == "http.response.start":
                MutableHeaders(scope=event).update(
                    {
                        "content-security-policy": self.policy,
                        "cross-origin-resource-policy": "same-origin",
                        "x-content-type-options": "nosniff",
                        "referrer-policy": "no-referrer",
                        "cache-control": "no-store",
                    }
                )
            await send(event)

        await app(scope, receive, answer)

    def _is_ours(self, host: str) -> bool:
        found = re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^:/@\[\]]+)(:\d+)?", host)
        if found is None:
            return False
        name = found[1].strip("[]").lower()
        return name in self.names or (self.any_address and _is_address(name))


def is_any(host: str) -> bool:
    """Whether a host means all addresses of the machine."""
    return _is_address(host) and ipaddress.ip_address(host).is_unspecified


def is_local(address: str) -> bool:
    """Whether only this machine reaches an address."""
    return _is_address(address) and ipaddress.ip_address(address).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def make_app(about: Mapping[str, Any], worker: Worker, *names: str) -> ASGIApp:
    """The application: `/`, `/about` and `/draw`.

    Args:
        about: what the page shows of the checkpoint.
        worker: draws.
        names: what the server listens on, as names or addresses.
    """
    page = PAGE.read_text(encoding="utf-8")

    async def index(_request: Request) -> Response:
        return HTMLResponse(page)

    async def tell(_request: Request) -> Response:
        return JSONResponse(about)

    async def draw(request: Request) -> Response:
        body = b""
        try:
            async with asyncio.timeout(MOST_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > MOST_BYTES:
                        return PlainTextResponse(f"the request is longer than {MOST_BYTES} bytes", 413)
        except TimeoutError:
            return PlainTextResponse(f"the request took longer than {MOST_SECONDS:g} s", 408)
        loop, messages = asyncio.get_running_loop(), asyncio.Queue[Message]()

        def put(message: Message) -> None:
            if message.kind != "step" or messages.qsize() < MOST_QUEUED:
                messages.put_nowait(message)

        def send(message: Message) -> None:
            with suppress(RuntimeError):  # the loop is closed, and nobody reads
                loop.call_soon_threadsafe(put, message)

        try:
            job = Job(PictureRequest.parse(body), send)
            worker.put(job)
        except SanaError as problem:
            return PlainTextResponse(str(problem), 400)
        except BusyError:
            return PlainTextResponse("busy: too many other tabs are waiting for a picture", 503)
        return StreamingResponse(_stream(worker, job, messages), media_type="application/octet-stream")

    routes = [Route("/", index), Route("/about", tell), Route("/draw", draw, methods=["POST"])]
    return Guard(Starlette(routes=routes), names, _policy(page))


async def _stream(worker: Worker, job: Job, messages: "asyncio.Queue[Message]") -> AsyncIterator[bytes]:
    """The messages of a job as bytes. A client that leaves drops it."""
    try:
        kind = ""
        while kind not in ("done", "replaced", "error"):
            message = await messages.get()
            kind = message.kind
            facts = {"kind": kind, "bytes": len(message.png), **message.facts}
            yield json.dumps(facts).encode() + b"\n" + message.png
    finally:
        worker.drop(job)


def _policy(page: str) -> str:
    """A Content-Security-Policy: the page runs its own script and reaches this server alone."""

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Serving(threading.Thread):
    """The thread that serves."""

    def __init__(self, server: uvicorn.Server, listening: socket.socket) -> None:
        super().__init__(name="serving", daemon=True)
        self.server, self._listening = server, listening
        self._failure = "it stopped by itself"

    def run(self) -> None:
        """Serve until `server.should_exit`."""
        try:
            self.server.run(sockets=[self._listening])
        except (Exception, SystemExit) as error:
            self._failure = f"{type(error).__name__}: {first_line(error)}"

    def check(self) -> None:
        """Refuse to go on without it.

        Raises:
            SanaError: the thread has ended.
        """
        if not self.is_alive():
            raise SanaError(f"the page is no longer served: {self._failure}", "start sana play again")


@contextmanager
def serving(app: ASGIApp, listening: socket.socket) -> Iterator[Serving]:
    """Serve an application on a socket in a thread of its own, which is yielded.

    Connections that are still open at the end have three seconds.

    Raises:
        SanaError: it cannot be served.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="critical",
        access_log=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=3,
    )
    thread = Serving(uvicorn.Server(config), listening)
    thread.start()
    try:
        while not thread.server.started:
            thread.check()
            time.sleep(0.01)
        yield thread
    finally:
        thread.server.should_exit = True
        thread.join()
