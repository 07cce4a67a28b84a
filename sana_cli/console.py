"""What a person sees: progress, tables, errors. Rich on a terminal, plain lines elsewhere.

Messages go to stderr, results to stdout. It imports no torch and computes nothing.
"""

import contextlib
import dataclasses
import errno
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import BaseModel
from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sana_cli.errors import SanaError, one_line
from sana_cli.runtime.launch import Launch
from sana_cli.units import as_json, human_bytes, human_factor

if TYPE_CHECKING:
    from sana_cli.dataset.shapes import ShapeReport

SECONDS_BETWEEN_LINES = 10.0  # of plain progress, at first
SHARE_BETWEEN_LINES = 0.02  # of the time so far, so that the log of a run of days stays short
CURVE_WIDTH = 24

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # a full or broken disk


def silence(stream: TextIO) -> None:
    """Send a broken stream to the null device, so that flushing it at exit raises nothing."""
    with contextlib.suppress(OSError, ValueError):  # a test's stream has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Voice(Console):
    """Stderr. Once it is closed or its disk is full, it prints nothing more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence(sys.stderr)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as Console does, but ignore a full disk."""
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()


err = _Voice(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)
alarm = _Voice(stderr=True, highlight=False, soft_wrap=True)  # any process may print errors
if not out.is_terminal:
    out.width = 200  # not a window: leave no table cell out
_process = Launch()  # which of several processes this is


def speak_as(process: Launch) -> None:
    """Print as one of several processes from here on. Only rank 0 prints, apart from errors."""
    global _process
    _process = process
    err.quiet = err.quiet or not process.first
    out.quiet = not process.first


def begin(quiet: bool = False) -> None:
    """Print as the only process. `quiet`: print only errors to stderr."""
    speak_as(Launch())
    err.quiet = quiet


def not_written(error: OSError) -> SanaError:
    """The message for results that cannot be written."""
    return SanaError(
        f"what was found could not be written to stdout: {error.strerror}", "send it to a place that has room"
    )


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Wrap writes to stdout.

    Raises:
        SanaError: the disk is full.
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
    """Foreign text without characters that control a terminal."""
    return "\n".join(map(one_line, text.split("\n")))


def note(text: str) -> None:
    """Print one line for a person, to stderr."""
    err.print(Text(shown(text)))


def error(problem: SanaError, flags: Mapping[str, str] = MappingProxyType({})) -> SanaError:
    """Print a user's mistake: what, where, what next. Returns the problem.

    Lines are never wrapped, so that paths can be clicked. Of several processes, one prints a
    problem that it alone has. Rank 0 prints one that all have, or local rank 0 of each machine
    until the processes are connected.

    Args:
        problem: where it names a setting in backticks, the setting's flag is printed.
        flags: the flag of each setting that the command has.
    """
    if problem.silent or (problem.process is None and _process.local_rank != 0):
        return problem
    text = re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[0]), str(problem))
    first, *rest = shown(text).splitlines() or [""]
    who = f"process {problem.process}: " if problem.process else ""
    alarm.print(Text.assemble(("error: ", "bold red"), who, first))
    for line in rest:
        alarm.print(Text(line))
    return problem


def result(text: str) -> None:
    """Print one line of a result, to stdout."""
    with _writing():
        out.print(Text(shown(text)))


def plain(value: Any) -> Any:
    """Turn dataclasses, configs and paths into plain JSON values. Tensors are left out."""
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
    """Print a dataclass, or plain values in the shape of a file format, as JSON to stdout."""
    print_text(as_json(plain(value), indent=2) + "\n")


def print_text(text: str) -> None:
    """Print text as it is, to stdout."""
    if _process.first:
        with _writing():
            sys.stdout.write(text)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of progress."""

    what: str
    done: int
    total: int | None  # None: unknown
    info: str = ""  # measurements
    event: str = ""  # what has just happened
    figure: float | None = None  # a point of the curve
    left: str = ""  # time, for plain lines; the bar has its own


def curve(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """Draw positive numbers as a line of blocks, on a logarithmic scale.

    The first twelfth may lie above the scale, since losses begin high.
    """
    logs = [math.log(value) for value in values if value > 0]
    if len(logs) < 2:
        return ""
    size = len(logs) / min(width, len(logs))
    parts = [
        logs[int(i * size) : max(int((i + 1) * size), int(i * size) + 1)]
        for i in range(min(width, len(logs)))
    ]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means[len(means) // 12 :])
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (mean - low) / ((high - low) or 1)))] for mean in means)


class _Display(Progress):
    """A bar, and measurements below it, which would not fit beside it in 80 columns."""

    info = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.info:
            yield Text(self.info, style="dim", no_wrap=True, overflow="ellipsis")


def watch(steps: Iterable[Any], describe: Callable[[Any], Line | None], quiet: bool = False) -> Any:
    """Show progress of a generator and return its last item. `describe` gives None for that."""
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
    last, what, ended = None, "", ""  # the stage last printed, and the stage last finished
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


def facts(values: Mapping[str, Any], to: Console = out) -> None:
    """Print a name and a value on each line, to stdout or to another console such as `err`."""
    width = max(map(len, values), default=0)
    with _writing():
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int):
                text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            else:
                text = f"{value:,}" + (f" ({human_bytes(value)})" if name == "bytes" else "")
            to.print(Text.assemble((f"{name:<{width}}  ", "bold"), shown(text)))


def table(columns: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> None:
    """Print a table to stdout. Floats are printed as per cent; numbers are aligned right."""
    rows, columns = list(rows), list(columns)
    cells = [
        [f"{c:.1%}" if isinstance(c, float) else f"{c:,}" if isinstance(c, int) else str(c) for c in row]
        for row in rows
    ]
    sheet = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        number = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        last = index == len(columns) - 1  # only this one may be cut in a narrow window
        least = None if last else max(len(name), *(len(row[index]) for row in cells))
        sheet.add_column(name, justify="right" if number else "left", no_wrap=True, min_width=least)
    for row in cells:
        sheet.add_row(*(Text(shown(cell)) for cell in row))
    with _writing():
        out.print(sheet)


def shapes(reports: Sequence["ShapeReport"], fit: str) -> None:
    """Print a table of what became of images of many shapes; nothing where there are no reports."""
    share = "cut off" if fit == "crop" else "white"
    rows = [
        (
            f"{one.height} x {one.width}",
            one.images,
            one.mean_share,
            one.worst_share,
            one.enlarged,
            human_factor(one.most_enlarged[0].times) if one.enlarged else "",
        )
        for one in reports
    ]
    if rows:
        table(("height x width", "images", f"{share}, mean", "worst", "enlarged", "by at most"), rows)
