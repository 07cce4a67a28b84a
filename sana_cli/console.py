"""What a person sees: progress, tables, errors. On a terminal it is rich, elsewhere plain lines that survive a log.

Human text goes to stderr, results to stdout. It imports no torch and computes nothing.
"""

import contextlib
import dataclasses
import errno
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel
from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sana_cli.errors import SanaError, one_line
from sana_cli.runtime.launch import Launch
from sana_cli.units import as_json, human_bytes

SECONDS_BETWEEN_LINES = 10.0  # of plain progress, at first
SHARE_BETWEEN_LINES = 0.02  # of the time so far: a log of days is not one of ten thousands of lines
CURVE_WIDTH = 24

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what writing to a full or broken disk says


def silence(stream: TextIO) -> None:
    """Let a stream that nobody can read lead nowhere, so that what is left in it does no harm at the end."""
    with contextlib.suppress(OSError, ValueError):  # of a test it has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Voice(Console):
    """Stderr. When nobody can read it any more, or its disk is full, it falls silent, and the work goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence(sys.stderr)

    def print(self, *objects: Any, **options: Any) -> None:
        """As Console's, but without a word about a disk that is full."""
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()


err = _Voice(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)
alarm = _Voice(stderr=True, highlight=False, soft_wrap=True)  # what any process may have to say
if not out.is_terminal:
    out.width = 200  # nobody's window: leave no table cell out
_process = Launch()  # which of several processes this is


def speak_as(process: Launch) -> None:
    """From here on this is one of several processes, of which the first alone speaks."""
    global _process
    _process = process
    err.quiet = err.quiet or not process.first
    out.quiet = not process.first


def begin(quiet: bool = False) -> None:
    """Speak as the only process; `quiet`: say nothing on stderr but errors."""
    speak_as(Launch())
    err.quiet = quiet


def not_written(error: OSError) -> SanaError:
    """The one message of a result that nobody can read."""
    return SanaError(f"what was found could not be written to stdout: {error.strerror}", "send it to a place that has room")


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Around what is written to stdout.

    Raises:
        SanaError: it cannot be: a full disk.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        silence(sys.stdout)
        raise not_written(error) from error


def shown(text: str) -> str:
    """Text that others wrote, without what a terminal would obey."""
    return "\n".join(map(one_line, text.split("\n")))


def note(text: str) -> None:
    """One line for a person, on stderr."""
    err.print(Text(shown(text)))


def error(problem: SanaError) -> SanaError:
    """The message of a user's mistake: what, where, what next. Lines are never wrapped, so that paths can be clicked.

    Of several processes, one that alone has a problem says so; what they all have is told by the first, and before they are
    connected by the first of each machine. Returns the problem.
    """
    if problem.told or (problem.process is None and _process.local_rank != 0):
        return problem
    first, *rest = shown(str(problem)).splitlines() or [""]
    who = f"process {problem.process}: " if problem.process else ""
    alarm.print(Text.assemble(("error: ", "bold red"), who, first))
    for line in rest:
        alarm.print(Text(line))
    return problem


def result(text: str) -> None:
    """One line of a result, on stdout."""
    with _writing():
        out.print(Text(shown(text)))


def plain(value: Any) -> Any:
    """Dataclasses, configs and paths as plain JSON values; tensors are left out."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: plain(item) for name, item in fields if not hasattr(item, "numel")}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and value != value:
        return None  # JSON has no NaN
    return str(value) if isinstance(value, Path) else value


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print_text(as_json(plain(value), indent=2) + "\n")


def print_text(text: str) -> None:
    """Text as it is, on stdout."""
    if _process.first:
        with _writing():
            sys.stdout.write(text)


@dataclasses.dataclass(frozen=True)
class Line:
    """Progress as a line: of what, how far, what is measured, and anything that just happened."""

    what: str
    done: int
    total: int | None  # None: unknown
    info: str = ""
    event: str = ""
    figure: float | None = None  # what is drawn as a curve
    left: str = ""  # time, for where there is no bar to tell it


def curve(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """A line of blocks for positive numbers, on a logarithmic scale. The first twelfth may be off it: losses begin high."""
    logs = [math.log(value) for value in values if value > 0]
    if len(logs) < 2:
        return ""
    size = len(logs) / min(width, len(logs))
    parts = [logs[int(i * size) : max(int((i + 1) * size), int(i * size) + 1)] for i in range(min(width, len(logs)))]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means[len(means) // 12 :])
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (mean - low) / ((high - low) or 1)))] for mean in means)


class _Display(Progress):
    """A bar, and below it what is measured, which would not fit beside it in 80 columns."""

    info = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.info:
            yield Text(self.info, style="dim", no_wrap=True, overflow="ellipsis")


def watch(steps: Iterable[Any], describe: Callable[[Any], Line | None], quiet: bool = False) -> Any:
    """Show progress while a generator works, and return the last thing it yields. `describe` gives None for that one."""
    if quiet or not _process.first:
        last = None
        for last in steps:
            describe(last)
        return last
    return _watch_live(steps, describe) if err.is_terminal else _watch_plain(steps, describe)


def _watch_live(steps: Iterable[Any], describe: Callable[[Any], Line | None]) -> Any:
    last, what = None, ""
    figures: list[float] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[curve]}"),
        TimeRemainingColumn(compact=True),
    )
    with _Display(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=None, curve="")
        for last in steps:
            line = describe(last)
            if line is None:
                continue
            if line.what != what:
                what, figures = line.what, []
                progress.reset(task, description=what, total=line.total)
            if line.figure is not None and line.figure == line.figure:
                figures.append(line.figure)
            progress.info = line.info
            progress.update(task, completed=line.done, total=line.total, curve=curve(figures))
            if line.event:
                progress.console.print(Text(shown(line.event)))
    return last


def _watch_plain(steps: Iterable[Any], describe: Callable[[Any], Line | None]) -> Any:
    last, what, ended = None, "", ""  # of which a line was printed, and its last line
    start = printed = time.monotonic()
    for last in steps:
        line = describe(last)
        if line is None:
            continue
        now = time.monotonic()
        pause = max(SECONDS_BETWEEN_LINES, SHARE_BETWEEN_LINES * (now - start))
        end = line.done == line.total and line.what != ended and bool(line.info or line.what == what)
        if end:
            ended = line.what
        if (end or now - printed >= pause) and line.total != 0:
            of = "" if line.total is None else f"/{line.total}"
            note("  ".join(part for part in (f"{line.what} {line.done}{of}", line.info, line.left) if part))
            printed, what = now, line.what
        if line.event:
            note(line.event)
    return last


def facts(values: Mapping[str, Any]) -> None:
    """A name and a value a line, on stdout."""
    width = max(map(len, values), default=0)
    with _writing():
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int):
                told = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            else:
                told = f"{value:,}" + (f" ({human_bytes(value)})" if name == "bytes" else "")
            out.print(Text.assemble((f"{name:<{width}}  ", "bold"), shown(told)))


def table(columns: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> None:
    """A table on stdout: whole numbers with thousands, shares in per cent, both to the right."""
    rows, columns = list(rows), list(columns)
    cells = [[f"{c:.1%}" if isinstance(c, float) else f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows]
    sheet = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        number = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        last = index == len(columns) - 1  # the only one that may be cut short in a narrow window
        least = None if last else max(len(name), *(len(row[index]) for row in cells))
        sheet.add_column(name, justify="right" if number else "left", no_wrap=True, min_width=least)
    for row in cells:
        sheet.add_row(*(Text(shown(cell)) for cell in row))
    with _writing():
        out.print(sheet)
