"""The page over HTTP: who may ask, what is refused, and many tabs at once."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from helpers.pages import asked, drawing, fetched, parsed, request, served

from sana_cli.play import server
from sana_cli.play.server import MOST_BYTES, PAGE
from sana_cli.play.studio import Message, PictureRequest
from sana_cli.play.worker import Job, Worker


def quick(request: PictureRequest) -> Generator[Message, None, None]:
    yield Message("step", {"done": 1, "total": 1})
    yield Message("picture", {"seed": request.seed}, b"a\npicture\n")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served(quick, {"name": "mine"}) as port:
        yield port


def test_the_page_is_one_file_that_may_reach_nothing_else(port: int) -> None:
    status, headers, body = fetched(port)
    assert (status, body) == (200, PAGE.read_bytes())
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert b"http://www.w3.org" in body  # a name space
    assert body.count(b"http") == 1  # and no other address
    assert fetched(port, "/about")[2] == b'{"name":"mine"}'
    assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path", ["/play.html", "/../pyproject.toml", "/assets/play.html", "/draw/x", "//etc/passwd"]
)
def test_no_other_file_is_served(port: int, path: str) -> None:
    assert fetched(port, path)[0] == 404


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_drawings_are_asked_for_by_post_alone(port: int, method: str) -> None:
    assert fetched(port, "/draw", method)[0] == 405


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST", "localhost:80"])
def test_names_of_this_machine_are_its_own(port: int, host: str) -> None:
    assert fetched(port, Host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7262", "192.168.0.7", "", "[", "a b"],
)
def test_other_names_are_refused(port: int, host: str) -> None:
    """A page whose name was pointed at this machine (DNS rebinding)."""
    for path, method in (("/", "GET"), ("/about", "GET"), ("/draw", "POST")):
        status, _, body = fetched(port, path, method, json.dumps(asked()), Host=host)
        assert status in (400, 403), body
        assert status == 400 or body.endswith(
            b"\nopen it by its address in digits, or start it with --host NAME"
        )
        assert b"mine" not in body


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://localhost", "http://localhost:1", ""]
)
def test_other_pages_are_refused(port: int, origin: str) -> None:
    status, headers, body = fetched(port, "/draw", "POST", json.dumps(asked()), Origin=origin)
    assert status == 403
    assert body.decode().splitlines() == [
        "another page may not use this one: Origin is not its own",
        "open it by its own address, which begins with http://",
    ]
    assert "access-control-allow-origin" not in headers
    own = f"http://127.0.0.1:{port}"
    assert fetched(port, "/draw", "POST", json.dumps(asked()), Origin=own)[0] == 200


def test_there_is_no_websocket(port: int) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec_WebSocket_Version": "13",
        "Sec_WebSocket_Key": "eA==",
    }
    assert fetched(port, "/draw", **upgrade)[0] == 405


def test_a_server_on_all_addresses_is_reached_by_them_and_by_no_foreign_name() -> None:
    with served(quick, host="0.0.0.0") as port:
        assert fetched(port, Host=f"192.168.0.7:{port}")[0] == 200
        assert fetched(port, Host="[fe80::1]")[0] == 200
        assert fetched(port, Host="evil.example")[0] == 403
    with closing(Worker(quick)) as worker, closing(socket.create_server(("127.0.0.1", 0))) as listening:
        app = server.make_app({}, worker, "0", "0.0.0.0")  # as `--host 0` listens
        with server.serving(app, listening):
            assert fetched(listening.getsockname()[1], Host="192.168.0.7")[0] == 200
    with served(quick, host="my-machine") as port:
        assert fetched(port, Host="my-machine")[0] == 200
        assert fetched(port, Host="192.168.0.7")[0] == 403


def test_an_answer_is_a_stream_of_messages(port: int) -> None:
    kinds = [(message.kind, message.facts, message.png) for message in drawing(port, seed=9)]
    assert kinds == [
        ("step", {"done": 1, "total": 1}, b""),
        ("picture", {"seed": 9}, b"a\npicture\n"),
        ("done", {}, b""),
    ]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("{", 400, b"invalid JSON"),
        (json.dumps(asked(steps=101)), 400, b"`steps`: input should be less than or equal to 100"),
        (json.dumps(asked(prompt="x" * 1001)), 400, b"`prompt`: string should have at most 1000 characters"),
        (" " * (MOST_BYTES + 1), 413, b"the request is longer than 16384 bytes"),
    ],
)
def test_what_is_wrong_with_a_request_is_one_message(
    port: int, body: str, status: int, message: bytes
) -> None:
    answer = fetched(port, "/draw", "POST", body)
    assert (answer[0], answer[2].startswith(message), b"\n" in answer[2]) == (status, True, False)


class Slow:
    """Draws pictures of five steps, a few milliseconds each; counts what it draws."""

    def __init__(self) -> None:
        self.running, self.most_running, self.steps = 0, 0, 0
        self.whole: list[tuple[str, int]] = []

    def __call__(self, request: PictureRequest) -> Generator[Message, None, None]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for _ in range(5):
                time.sleep(0.004)
                self.steps += 1
                yield Message("step", {"done": 1, "total": 5})
            self.whole.append((request.tab, request.seed))
            yield Message("picture", {"seed": request.seed})
        finally:
            self.running -= 1


def test_many_tabs_do_not_queue_up() -> None:
    """Six tabs ask forty times each, faster than pictures are drawn."""
    draw = Slow()
    with served(draw) as port, ThreadPoolExecutor(60) as pool:

        def ask(tab: str, seed: int) -> Any:
            status, _, body = fetched(port, "/draw", "POST", json.dumps(asked(tab=tab, seed=seed)))
            return status, body

        def type_away(tab: str) -> list[Any]:
            waiting = []
            for seed in range(40):
                waiting.append(pool.submit(ask, tab, seed))
                time.sleep(0.002)
            return [one.result(60) for one in waiting]

        started = time.monotonic()
        answers = list(ThreadPoolExecutor(6).map(type_away, "abcdef"))
        took = time.monotonic() - started
    assert draw.most_running == 1
    assert draw.steps < 6 * 40 * 5 / 2, "stale drawings went on"
    assert took < 30
    for of_tab in answers:
        assert {status for status, _ in of_tab} == {200}
        ends = [b'"kind": "done"' in body for _, body in of_tab]
        assert any(ends)
        assert all(ends[number] or b'"kind": "replaced"' in body for number, (_, body) in enumerate(of_tab))


def test_too_many_tabs_are_told_to_come_back() -> None:
    begun, gate = threading.Event(), threading.Event()

    def draw(request: PictureRequest) -> Generator[Message, None, None]:
        begun.set()
        assert gate.wait(60)
        yield from quick(request)

    with served(draw, most=2) as port, ThreadPoolExecutor(9) as pool:

        def ask(tab: str) -> Any:
            return pool.submit(fetched, port, "/draw", "POST", json.dumps(asked(tab=tab)))

        waiting = [ask("a")]
        assert begun.wait(60)
        waiting += map(ask, "bcdefgh")
        while sum(one.done() for one in waiting) < 5:  # one is drawn and two wait
            time.sleep(0.001)
        gate.set()
        answers = [one.result(60) for one in waiting]
    assert sorted(status for status, _, _ in answers) == [200] * 3 + [503] * 5
    (busy,) = {body for status, _, body in answers if status == 503}
    assert busy == b"busy: too many other tabs are waiting for a picture"


def test_a_client_that_leaves_is_not_drawn_for() -> None:
    steps = threading.Semaphore(0)
    ended = threading.Event()

    def draw(_request: PictureRequest) -> Generator[Message, None, None]:
        try:
            for number in range(1000):
                yield Message("step", {"done": number, "total": 1000})
                assert steps.acquire(timeout=60)
        finally:
            ended.set()

    with served(draw) as port:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("POST", "/draw", json.dumps(asked()))
            assert connection.getresponse().readline().startswith(b'{"kind": "step"')
        deadline = time.monotonic() + 60
        while not ended.is_set():
            steps.release()
            time.sleep(0.01)
            assert time.monotonic() < deadline


def test_a_request_that_does_not_arrive_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_SECONDS", 0.2)
    with served(quick) as port, closing(socket.create_connection(("127.0.0.1", port), 60)) as tab:
        tab.sendall(b"POST /draw HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\n{")
        answer = b""
        while part := tab.recv(1000):
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert answer.endswith(b"the request took longer than 0.2 s")


def test_a_slow_reader_misses_previews_alone() -> None:
    drawn, count, preview = threading.Event(), 400, bytes(200_000)

    def draw(request: PictureRequest) -> Generator[Message, None, None]:
        for _ in range(count):
            yield Message("step", {"done": 1, "total": 2}, preview)
        yield Message("picture", {"seed": request.seed})
        drawn.set()

    with served(draw) as port, closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as slow:
        slow.request("POST", "/draw", json.dumps(asked()))
        assert drawn.wait(60)
        *previews, picture, end = parsed(slow.getresponse().read())
    assert 0 < len(previews) < count
    assert (picture.kind, end.kind) == ("picture", "done")


def test_drawing_outlives_the_server() -> None:
    """Its loop is closed while a picture is drawn."""
    begun, gate, ended = threading.Event(), threading.Event(), threading.Event()

    def draw(request: PictureRequest) -> Generator[Message, None, None]:
        begun.set()
        assert gate.wait(60)
        yield from quick(request)

    with (
        closing(Worker(draw)) as worker,
        closing(socket.create_server(("127.0.0.1", 0))) as listening,
        ThreadPoolExecutor(1) as pool,
    ):
        with server.serving(server.make_app({}, worker), listening):
            pool.submit(drawing, listening.getsockname()[1])
            assert begun.wait(60)
        gate.set()
        worker.put(Job(request(tab="b"), lambda message: ended.set() if message.kind == "done" else None))
        assert ended.wait(60)
