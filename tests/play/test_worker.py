"""Who is drawn for when many ask."""

import threading
import time
from collections.abc import Generator
from contextlib import closing

import pytest
from helpers.pages import request

from sana_cli.errors import SanaError
from sana_cli.play.studio import Message, PictureRequest
from sana_cli.play.worker import BusyError, Job, Worker


class Drawer:
    """Draws in solver steps that the test lets pass, and remembers which."""

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.drawn: list[tuple[str, int]] = []  # prompt and step

    def __call__(self, asked: PictureRequest) -> Generator[Message, None, None]:
        if asked.prompt == "mistake":
            raise SanaError("a mistake", "what next")
        if asked.prompt == "bug":
            raise ValueError("of ours")
        for step in range(asked.steps):
            assert self.steps.acquire(timeout=60)
            self.drawn.append((asked.prompt, step))
            yield Message("step", {"done": step + 1})
            if step == 0 and asked.variations:
                yield Message("picture")


class Asked(Job):
    """A job that keeps its messages."""

    def __init__(self, prompt: str, tab: str = "a", steps: int = 1, variations: int = 0) -> None:
        self.got: list[str] = []
        self.ended = threading.Event()
        super().__init__(request(prompt=prompt, tab=tab, steps=steps, variations=variations), self._take)

    def _take(self, message: Message) -> None:
        self.got.append(message.kind)
        self.message = message
        if message.kind in ("done", "replaced", "error"):
            self.ended.set()

    def end(self) -> str:
        assert self.ended.wait(60)
        return self.got[-1]


def until(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_newer_request_of_a_tab_takes_the_place_of_its_older_one() -> None:
    draw = Drawer()
    with closing(Worker(draw)) as worker:
        first, other = Asked("first", "a", steps=2), Asked("other", "b")
        worker.put(first)
        until(lambda: not worker._waiting)  # it is being drawn
        waiting = [Asked(f"a{number}", "c") for number in range(5)]
        for job in (waiting[0], other, *waiting[1:]):
            worker.put(job)
        draw.steps.release(9)
        assert [job.end() for job in waiting] == [*(4 * ["replaced"]), "done"]
        assert (first.end(), other.end()) == ("done", "done")
    # the newest of tab c keeps the place that the oldest had
    assert draw.drawn == [("first", 0), ("first", 1), ("a4", 0), ("other", 0)]


def test_a_stale_drawing_stops_between_two_steps() -> None:
    draw = Drawer()
    with closing(Worker(draw)) as worker:
        stale, newer = Asked("stale", steps=20), Asked("newer")
        worker.put(stale)
        draw.steps.release()
        until(lambda: stale.got)
        worker.put(newer)
        draw.steps.release(2)  # one more of the old, one of the new
        assert (stale.end(), newer.end()) == ("replaced", "done")
    assert draw.drawn == [("stale", 0), ("stale", 1), ("newer", 0)]
    assert stale.got == ["step", "replaced"]


@pytest.mark.parametrize("asks_again", [False, True])
def test_the_picture_of_another_tab_comes_before_variations(asks_again: bool) -> None:
    """These go on afterwards, unless their tab has asked again."""
    draw = Drawer()
    with closing(Worker(draw, most=1)) as worker:
        first, other, third = Asked("first", "a", 3, variations=2), Asked("other", "b"), Asked("third", "c")
        worker.put(first)
        draw.steps.release()
        until(lambda: "picture" in first.got)
        worker.put(other)
        draw.steps.release()
        until(lambda: "a" in worker._waiting and "b" not in worker._waiting)
        if asks_again:
            worker.put(third := Asked("newer", "a"))
        else:
            worker.put(third)  # a tab that has its picture is not one of the few that may wait
        draw.steps.release(9)
        assert [job.end() for job in (other, third)] == ["done", "done"]
        assert first.end() == ("replaced" if asks_again else "done")
    assert draw.drawn[:3] == [("first", 0), ("first", 1), ("other", 0)]
    assert draw.drawn[3:] == ([("newer", 0)] if asks_again else [("third", 0), ("first", 2)])


def test_few_tabs_may_wait() -> None:
    draw = Drawer()
    with closing(Worker(draw, most=2)) as worker:
        worker.put(Asked("first", "a"))
        until(lambda: not worker._waiting)
        worker.put(Asked("second", "b"))
        worker.put(Asked("third", "c"))
        with pytest.raises(BusyError):
            worker.put(Asked("fourth", "d"))
        last = Asked("newer", "c")
        worker.put(last)  # a tab that waits may change its mind
        draw.steps.release(9)
        assert last.end() == "done"
        worker.put(after := Asked("fourth", "d"))
        assert after.end() == "done"


def test_nothing_is_drawn_for_a_tab_that_has_gone() -> None:
    draw = Drawer()
    with closing(Worker(draw)) as worker:
        first, gone, last = Asked("first", "a", steps=9), Asked("gone", "b"), Asked("last", "c")
        for job in (first, gone, last):
            worker.put(job)
        draw.steps.release()
        until(lambda: first.got)
        worker.drop(gone)
        worker.drop(first)
        draw.steps.release(2)
        assert last.end() == "done"
    assert draw.drawn == [("first", 0), ("first", 1), ("last", 0)]


def test_a_failure_is_one_message_and_the_next_is_drawn() -> None:
    draw = Drawer()
    draw.steps.release(1)
    with closing(Worker(draw)) as worker:
        mistake, bug, good = (Asked(prompt, prompt) for prompt in ("mistake", "bug", "good"))
        for job in (mistake, bug, good):
            worker.put(job)
        assert [job.end() for job in (mistake, bug, good)] == ["error", "error", "done"]
    assert mistake.message.facts == {"message": "a mistake\nwhat next"}
    assert bug.message.facts == {"message": "drawing failed: ValueError: of ours"}


def test_closing_ends_every_job_and_the_thread() -> None:
    draw = Drawer()
    worker = Worker(draw)
    current, waiting = Asked("current", "a", steps=9), Asked("waiting", "b")
    worker.put(current)
    until(lambda: not worker._waiting)
    worker.put(waiting)
    threading.Timer(0.05, draw.steps.release).start()
    worker.close()
    assert (current.end(), waiting.end()) == ("replaced", "replaced")
    assert not worker._thread.is_alive()
    with pytest.raises(BusyError):
        worker.put(Asked("late"))
