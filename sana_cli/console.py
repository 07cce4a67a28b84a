"""What a person sees: progress, tables, errors. On a terminal it is rich, elsewhere plain lines that survive a log.

Human text goes to stderr, results to stdout. It imports no torch and computes nothing.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sana_cli.errors import SanaError
from sana_cli.units import human_bytes

SECONDS_BETWEEN_LINES = 10.0  # of plain progress

err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)
if not out.is_terminal:
    out.width = 200  # nobody's window: leave no table cell out


def shown(text: str) -> str:
    """Text that others wrote, without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def note(text: str) -> None:
    """One line for a person, on stderr."""
    err.print(Text(shown(text)))


def error(problem: SanaError) -> None:
    """The message of a user's mistake: what, where, what next. Lines are never wrapped, so that paths can be clicked."""
    first, *rest = shown(str(problem)).splitlines() or [""]
    err.print(Text.assemble(("error: ", "bold red"), first))
    for line in rest:
        err.print(Text(line))


def result(text: str) -> None:
    """One line of a result, on stdout."""
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
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


@dataclasses.dataclass(frozen=True)
class Line:
    """Progress as a line: of what, how far, what is measured, and anything that just happened."""

    what: str
    done: int
    total: int | None  # None: unknown
    info: str = ""
    event: str = ""


def watch(steps: Iterable[Any], describe: Callable[[Any], Line | None], quiet: bool = False) -> Any:
    """Show progress while a generator works, and return the last thing it yields. `describe` gives None for that one."""
    last = None
    if quiet:
        for step in steps:
            last = step
    elif err.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=err, transient=True) as progress:
            task, what = progress.add_task("", total=None, info=""), ""
            for last in steps:
                line = describe(last)
                if line is None:
                    continue
                if line.what != what:
                    what = line.what
                    progress.reset(task, description=what, total=line.total)
                progress.update(task, completed=line.done, total=line.total, info=line.info)
                if line.event:
                    progress.console.print(Text(line.event))
    else:
        printed, what = 0.0, ""
        for last in steps:
            line = describe(last)
            if line is None:
                continue
            now = time.monotonic()
            due = now - printed >= SECONDS_BETWEEN_LINES or line.done == line.total or line.what != what
            if due and line.total != 0:
                of = "" if line.total is None else f"/{line.total}"
                note(f"{line.what} {line.done}{of}  {line.info}".rstrip())
                printed, what = now, line.what
            if line.event:
                note(line.event)
    return last


def facts(values: Mapping[str, Any]) -> None:
    """A name and a value a line, on stdout."""
    width = max(map(len, values), default=0)
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
    out.print(sheet)
