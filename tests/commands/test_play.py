"""`sana play`: where it is served, how it ends, and what a person can get wrong."""

import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers import close, invoke, start_sana, wait_until
from helpers.pages import drawing, fetched, student

from sana_cli import play as package
from sana_cli.commands import play as command
from sana_cli.commands.play import PlayOptions, PlayServing, play
from sana_cli.errors import SanaError


@pytest.fixture(autouse=True)
def ports_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of tests that run beside these would take a port as soon as it is free."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    monkeypatch.setattr(command, "FIRST_PORT", command.FIRST_PORT + command.PORTS * (1 + worker))


def serving(**options: Any) -> tuple[PlayServing, Any]:
    """A page that is there, and the generator that ends it."""
    options.setdefault("checkpoint", Path("shipped"))
    steps = play(PlayOptions(device="cpu", **options))
    return next(steps), steps


def port_of(page: PlayServing) -> int:
    return int(page.url.rstrip("/").rpartition(":")[2])


def test_two_pages_take_two_ports_and_free_them() -> None:
    one, first = serving()
    two, second = serving(checkpoint=Path("shipped:critters"))
    assert port_of(one) < port_of(two)
    assert (one.is_local, one.shipped, one.notes) == (True, True, ())
    names = [json.loads(fetched(port_of(page), "/about")[2])["name"] for page in (one, two)]
    assert [name.split(", ")[1] for name in names] == ["quickstart", "critters"]
    assert [message.kind for message in drawing(port_of(two))] == ["step", "picture", "done"]
    close(first)
    close(second)
    for page in (one, two):
        with pytest.raises(ConnectionRefusedError):
            fetched(port_of(page))


def test_settings_of_the_command_hold_for_all_pictures(tmp_path: Path) -> None:
    page, steps = serving(height=24, width=16, solver="euler")
    about = json.loads(fetched(port_of(page), "/about")[2])
    assert (about["height"], about["width"], about["solver"]) == (24, 16, "euler")
    (picture,) = [message.png for message in drawing(port_of(page)) if message.kind == "picture"]
    assert int.from_bytes(picture[16:20]) == 16
    assert int.from_bytes(picture[20:24]) == 24
    assert b'"solver": "euler"' in picture
    close(steps)
    page, steps = serving(checkpoint=student(tmp_path / "student"), encoder="tiny")
    assert page.settings.solver == "scm"
    assert [message.kind for message in drawing(port_of(page))] == ["step", "picture", "done"]
    close(steps)


def test_only_this_machine_unless_it_is_asked_for() -> None:
    page, steps = serving(host="0.0.0.0")
    assert page.url == f"http://127.0.0.1:{port_of(page)}/"
    assert not page.is_local
    close(steps)
    page, steps = serving(host="127.0.0.1", port=port_of(page))
    assert page.url == f"http://127.0.0.1:{port_of(page)}/"
    close(steps)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "url", "is_local"),
    [
        ("0", "127.0.0.1", False), ("127.0.0.2", "127.0.0.2", True), ("localhost", "localhost", True),
        ("::", "[::1]", False), ("::1", "[::1]", True),
    ],
)  # fmt: skip
def test_a_host_is_judged_by_its_address(host: str, url: str, is_local: bool) -> None:
    if ":" in host and not has_ipv6():
        pytest.skip("no IPv6 here")
    page, steps = serving(host=host)
    assert (page.url, page.is_local) == (f"http://{url}:{port_of(page)}/", is_local)
    with closing(http.client.HTTPConnection(url.strip("[]"), port_of(page), timeout=60)) as connection:
        connection.request("GET", "/about")
        assert connection.getresponse().status == 200
    close(steps)


def test_a_server_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    page, steps = serving()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "serving"]
    thread.server.should_exit = True  # type: ignore[attr-defined]
    with pytest.raises(SanaError, match=r"^the page is no longer served: it stopped by itself\n"):
        next(steps)
    with pytest.raises(ConnectionRefusedError):
        fetched(port_of(page))

    def fail(*_given: object, **_named: object) -> None:
        raise RuntimeError("no loop")

    monkeypatch.setattr("uvicorn.Server.run", fail)
    printed = invoke("play", "shipped", "--device", "cpu")
    assert (printed.exit_code, printed.stdout) == (1, "")
    assert printed.stderr == (
        "error: the page is no longer served: RuntimeError: no loop\nstart sana play again\n"
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_signal_ends_it(number: int, code: int, tmp_path: Path) -> None:
    """Also while a tab has its connection open and a picture is being drawn."""
    process = start_sana(tmp_path, "play", "shipped", "--device", "cpu")
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    port = int(url.rstrip("/").rpartition(":")[2])
    with closing(socket.create_connection(("127.0.0.1", port))) as tab:
        body = json.dumps(
            {"tab": "a", "prompt": "4", "seed": 0, "guidance_scale": 3, "steps": 100, "variations": 12}
        )
        tab.sendall(
            f"POST /draw HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        assert tab.recv(20).startswith(b"HTTP/1.1 200")
        process.send_signal(number)
        started = time.monotonic()
        wait_until(lambda: process.poll() is not None)
        assert time.monotonic() - started < 20
    printed, said = process.communicate()
    assert (process.returncode, printed) == (code, "")
    assert said.splitlines() == [
        "shipped:quickstart on cpu: dpm++, 8 steps, guidance 5 at 0.5 to 1",
        "Ctrl-C ends it",
        "stopping (Ctrl-C again quits at once)",
        *(["error: terminated"] if code else []),
    ]


MISTAKES = [
    (("nowhere",), 1, "no checkpoint at nowhere: there is no such file or folder"),
    (("shipped", "--width", "12"), 2, "--width: 12 is not a multiple of the patch size 8"),
    (("shipped", "--device", "cuda:77"), 1, "this machine has no device cuda:77"),
    (("shipped", "--solver", "scm"), 2, "--solver: scm is for Sprint models, which this is not"),
    (("--adapter", "lora.safetensors"), 2, "--adapter: lora.safetensors changes a model"),
    (("shipped", "--host", "nowhere.invalid"), 2, "--host: nowhere.invalid: "),
    (("shipped", "--host", "a..b"), 2, "--host: a..b: no name of a machine\n"),
    (("shipped", "--host", "192.0.2.1"), 2, "--host: 192.0.2.1 is no address of this machine\n127.0.0.1 is "),
]


@pytest.mark.parametrize(("options", "code", "message"), MISTAKES)
def test_what_a_person_gets_wrong_is_one_message(
    options: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = invoke("play", *options)
    assert (printed.exit_code, printed.stdout) == (code, "")
    assert printed.stderr.startswith(f"error: {message}")


def test_a_port_that_is_taken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        printed = invoke("play", "shipped", "--port", str(port))
        assert (printed.exit_code, printed.stderr) == (
            2,
            f"error: --port: {port} on 127.0.0.1: Address already in use\n"
            "choose another one, or leave --port out for the first free one\n",
        )
        monkeypatch.setattr(command, "FIRST_PORT", port)
        monkeypatch.setattr(command, "PORTS", 1)
        printed = invoke("play", "shipped")
        assert printed.stderr == (
            f"error: --port: {port} to {port} on 127.0.0.1: Address already in use\nchoose another --port\n"
        )


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "sana_cli.play.server")
    monkeypatch.delattr(package, "server")
    with pytest.raises(SanaError) as caught:
        serving()
    assert str(caught.value) == (
        "the page needs starlette and uvicorn\ninstall them with: pip install 'sana-cli[play]'"
    )
