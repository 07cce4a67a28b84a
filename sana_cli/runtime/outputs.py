"""Paths for results: the file that a path means, and the format that its suffix says.

It writes nothing; `files.whole_file` does. It knows no pictures and no settings. Callers pass
the name that a message begins with, such as "`out`".
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from sana_cli.errors import SanaError
from sana_cli.runtime import files

PICTURES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
}  # by suffix; the first is the default
FILMS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}
DOCUMENTS = {".json": "JSON"}
PLOTS = {".png": "png", ".svg": "svg", ".pdf": "pdf"}


def is_folder(given: str | Path) -> bool:
    """Whether a path means a folder: it ends in a slash, or is one."""
    text = os.fspath(given)
    slashes = tuple(filter(None, (os.sep, os.altsep)))
    return text.endswith(slashes) or os.path.isdir(text)  # noqa: PTH112 (it takes any name)


def is_stdout(given: str | None) -> bool:
    """Whether a path means this process's stdout, such as /dev/stdout."""
    return given is not None and files.descriptor_of(Path(given)) == 1


def output(name: str, given: str | Path, default_name: str, formats: Mapping[str, str]) -> Path:
    """The file that `given` means. In a folder it is `default_name`, or with -2, ... if taken.

    Raises:
        SanaError: the path is empty or a dash, or its suffix is not one of `formats`. The
            message
            begins with `name`.
    """
    if not os.fspath(given):
        raise SanaError(f"{name}: the path is empty", exit_code=2)
    if os.fspath(given) == "-":
        raise SanaError(
            f"{name}: - is not a file", "stdout is /dev/stdout; a file with that name is ./-", exit_code=2
        )
    path = free_name(Path(given) / default_name) if is_folder(given) else Path(given)
    format_of(name, path, formats)
    return path


def free_name(path: Path) -> Path:
    """`path`, or that with -2, -3, ... if it is taken: a default name replaces no file."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def format_of(name: str, path: Path, formats: Mapping[str, str]) -> str:
    """The format that a path's suffix says, or the first of `formats` without one.

    Raises:
        SanaError: the suffix is not one of `formats`.
    """
    suffix = path.suffix.lower()
    if suffix and suffix not in formats:
        raise SanaError(f"{name}: {path}: {suffix} is not one of {', '.join(formats)}", exit_code=2)
    return formats.get(suffix) or next(iter(formats.values()))


def check_distinct(
    outputs: Iterable[tuple[str, Path | None]], inputs: Iterable[tuple[str, Path | None]] = ()
) -> None:
    """Refuse outputs that are the same file, even through links, or that are an input.

    Raises:
        SanaError: names both.
    """
    taken: dict[str, str] = {}
    writes = [(name, path) for name, path in outputs if path is not None]
    for name, path in [
        *((name, path) for name, path in inputs if path is not None and str(path) != "-"),
        *writes,
    ]:
        place = os.path.realpath(path)
        other = taken.setdefault(place, name)
        if other != name and any(name == output for output, _ in writes):
            raise SanaError(
                f"{other} and {name} are the same file: {path}", "give each a path of its own", exit_code=2
            )
