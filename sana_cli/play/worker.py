"""One thread draws, and each tab has one request waiting at most: its newest.

A tab's first picture comes before what others get beside theirs.

It knows no model and no network: a function draws, and a job's messages go to a function.
"""

import threading
from collections.abc import Callable, Generator

from sana_cli.errors import SanaError, first_line
from sana_cli.play.studio import Message, PictureRequest

MOST_WAITING = 8  # tabs

Draw = Callable[[PictureRequest], Generator[Message, None, None]]


class BusyError(Exception):
    """Too many other tabs are waiting."""


class Job:
    """A request, and where its messages go: the last is "done", "replaced" or "error"."""

    def __init__(self, request: PictureRequest, send: Callable[[Message], object]) -> None:
        self.request, self.send = request, send
        self.dropped = False  # cancelled
        self.shown = False  # its picture is sent; variations and trajectory follow
        self.drawing: Generator[Message, None, None] | None = None  # once it has begun


class Worker:
    """The thread that draws, first come, first served."""

    def __init__(self, draw: Draw, most: int = MOST_WAITING) -> None:
        """Start the thread.

        Args:
            draw: yields the answer to a request; it is closed early if nobody wants the rest.
            most: how many tabs may wait for a picture.
        """
        self._draw, self._most = draw, most
        self._changed = threading.Condition()
        self._waiting: dict[str, Job] = {}  # by tab, in order of arrival
        self._current: Job | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Add a job. It replaces an older one of its tab, and stops one that is being drawn.

        Raises:
            BusyError: too many other tabs are waiting.
        """
        tab = job.request.tab
        with self._changed:
            older = self._waiting.get(tab)
            others = [job for job in self._waiting.values() if job is not older and not job.shown]
            if self._closed or len(others) >= self._most:
                raise BusyError
            if self._current is not None and self._current.request.tab == tab:
                self._current.dropped = True
            self._waiting[tab] = job
            self._changed.notify()
        if older is not None:
            older.send(Message("replaced"))

    def drop(self, job: Job) -> None:
        """Forget a job whose tab has gone."""
        with self._changed:
            job.dropped = True
            if self._waiting.get(job.request.tab) is job:
                del self._waiting[job.request.tab]

    def close(self) -> None:
        """Drop all jobs, and wait for the thread's end, which takes a solver step at most."""
        with self._changed:
            self._closed = True
            jobs = [*self._waiting.values(), *([self._current] if self._current else [])]
            self._changed.notify()
        for job in jobs:
            self.drop(job)
            job.send(Message("replaced"))
        self._thread.join()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            end = self._answer(job)
            if end is not None:
                if job.drawing is not None:
                    job.drawing.close()
                job.send(end)

    def _next(self) -> Job | None:
        """Wait for the next job: one that has no picture comes first. None: the worker is closed."""
        with self._changed:
            self._current = None
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._current = self._waiting.pop(min(self._waiting, key=lambda tab: self._waiting[tab].shown))
            return self._current

    def _interrupt(self, job: Job) -> bool:
        """Let a job that has its picture wait while another tab has none; whether it waits."""
        with self._changed:
            others = any(not other.shown for other in self._waiting.values())
            more = job.request.variations or job.request.trajectory
            waits = bool(job.shown and more and others and not job.dropped)
            if waits:
                self._waiting[job.request.tab] = job
                self._current = None
            return waits

    def _answer(self, job: Job) -> Message | None:
        """Draw a job and send its messages. Returns the last one, or None while the job waits."""
        try:
            job.drawing = job.drawing or self._draw(job.request)
            for message in job.drawing:
                if job.dropped:
                    return Message("replaced")
                job.send(message)
                job.shown = job.shown or message.kind == "picture"
                if self._interrupt(job):
                    return None
        except SanaError as problem:
            return Message("error", {"message": str(problem)})
        except Exception as error:  # the page must go on for other requests
            return Message(
                "error", {"message": f"drawing failed: {type(error).__name__}: {first_line(error)}"}
            )
        return Message("done")
