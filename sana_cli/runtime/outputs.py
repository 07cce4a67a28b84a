"""Where a person asks results to be put: which file a path means, and which format its suffix says.

It writes nothing; `files.whole_file` does. It knows no picture and no command but by the names it is given.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from sana_cli.errors import SanaError

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # by suffix; the first is the default
FILMS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}
DOCUMENTS = {".json": "JSON"}
PLOTS = {".png": "png", ".svg": "svg", ".pdf": "pdf"}


def is_folder(given: str | Path) -> bool:
    """Whether a path means a folder: it ends in a slash, or is one."""
    text = os.fspath(given)
    return text.endswith(tuple(filter(None, (os.sep, os.altsep)))) or os.path.isdir(text)  # noqa: PTH112 (it takes any name)


def output(name: str, given: str | Path, default_name: str, formats: Mapping[str, str]) -> Path:
    """The file that `given` means; in a folder, it is called `default_name`, or with -2, -3, ... where that is taken.

    Raises:
        SanaError: it is empty, or its suffix says a format that is not one of `formats`. `name` is what the message calls it.
    """
    if not os.fspath(given):
        raise SanaError(f"{name}: the path is empty", exit_code=2)
    if os.fspath(given) == "-":
        raise SanaError(f"{name}: - is no file", "stdout is /dev/stdout; a file of that name is ./-", exit_code=2)
    path = free_name(Path(given) / default_name) if is_folder(given) else Path(given)
    format_of(name, path, formats)
    return path


def free_name(path: Path) -> Path:
    """`path`, or with -2, -3, ... where that is taken: what nobody named replaces nothing."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def format_of(name: str, path: Path, formats: Mapping[str, str]) -> str:
    """The format that a path's suffix says; without one, the first.

    Raises:
        SanaError: it says another.
    """
    suffix = path.suffix.lower()
    if suffix and suffix not in formats:
        raise SanaError(f"{name}: {path}: {suffix} is not one of {', '.join(formats)}", exit_code=2)
    return formats.get(suffix) or next(iter(formats.values()))


def check_distinct(outputs: Iterable[tuple[str, Path | None]], inputs: Iterable[tuple[str, Path | None]] = ()) -> None:
    """Refuse outputs that are one file, by whatever names, or that are an input.

    Raises:
        SanaError: naming both.
    """
    taken: dict[str, str] = {}
    writes = [(name, path) for name, path in outputs if path is not None]
    for name, path in [*((name, path) for name, path in inputs if path is not None and str(path) != "-"), *writes]:
        place = os.path.realpath(path)
        other = taken.setdefault(place, name)
        if other != name and any(name == output for output, _ in writes):
            raise SanaError(f"{other} and {name} are the same file: {path}", "give each a path of its own", exit_code=2)
