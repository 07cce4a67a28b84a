"""metadata.jsonl and metadata.csv: a row for each image, with `file_name` and captions. What cannot be read is refused by name.

File names in it are relative to the folder that it lies in, as in Hugging Face's imagefolder.
"""

import csv
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_cli.errors import SanaError
from sana_cli.runtime import textfile
from sana_cli.runtime.files import is_lfs_pointer
from sana_cli.sources.images import SUFFIXES
from sana_cli.sources.walk import Tree, basename, fold, parent, suffix

NAMES = ("metadata.jsonl", "metadata.csv")  # in any letter case; of two in a folder, the first here
MOST_WHOLE = 2**27  # bytes of a file that is tried as one piece of JSON, to say what it is
PARTED_BY = (";", "\t", "|")  # what CSV is parted by where it is not by commas

Row = tuple[str, dict[str, Any] | str]  # where it is, and the row, or why there is none


def example(field: str) -> str:
    """A line of metadata.jsonl, for messages."""
    return f"a line of metadata.jsonl is for example: {json.dumps({'file_name': '0001.png', field: 'a red cube'})}"


@dataclass(frozen=True)
class Metadata:
    """One metadata file."""

    path: Path
    name: str  # as listings have it: its name relative to the source
    above: bool = False  # it lies above the source, whose folder its file names begin with

    @property
    def folder(self) -> str:
        """The folder of the source that its file names are relative to."""
        return "" if self.above else parent(self.name)

    def rows(self) -> Iterator[Row]:
        """Where each row is, and the row with its `file_name`, or why it cannot be used."""
        for place, row in self._all():
            if isinstance(row, dict) and (not isinstance(row.get("file_name"), str) or not row["file_name"]):
                yield place, "no file_name"
            else:
                yield place, row

    def _all(self) -> Iterator[Row]:
        return _csv_rows(self.path, self.name) if suffix(self.name) == ".csv" else _json_rows(self.path, self.name)

    def check(self, field: str) -> None:
        """Refuse a file of which no row could be read.

        Raises:
            SanaError: it says what the file is, and what to do.
        """
        try:
            with self.path.open("rb") as file:
                if is_lfs_pointer(file.read(64)):
                    raise SanaError(f"{self.path} is a Git LFS pointer, not the file itself", "fetch it with: git lfs pull")
            check = _check_csv if suffix(self.name) == ".csv" else _check_json
            check(self.path, field)
        except OSError as error:
            raise SanaError(f"{self.path} cannot be read: {error.strerror}") from error
        except textfile.NotTextError as error:
            raise SanaError(f"{self.path} cannot be read: {error}", exit_code=2) from error


def find(tree: Tree, field: str, above: Path | None) -> list[Metadata]:
    """The metadata of a source, checked: that `above` it, if there is any, then from the top folder down.

    Raises:
        SanaError: one cannot be read.
    """
    for name, reason in tree.left_out.items():
        if is_metadata(name):
            raise SanaError(f"data.path: {tree.root / name}: {reason}", exit_code=2)
    found = []
    if above is not None:
        there = (path for path in above.iterdir() if is_metadata(path.name))
        names = [path.name for path in there if path.is_file() or (path.is_symlink() and not path.is_dir())]
        for name in _first_of_each_folder(names):
            if not (above / name).resolve().is_relative_to(above.resolve()):
                raise SanaError(f"data.path: {above / name} is a link that leads out of {above}", exit_code=2)
            found.append(Metadata(above / name, f"../{name}", above=True))
    for name in _first_of_each_folder(filter(is_metadata, tree.files)):
        found.append(Metadata(tree.root / name, name))
    for metadata in found:
        metadata.check(field)
    return found


def is_metadata(name: str) -> bool:
    """Whether a file is called as metadata that is read."""
    return basename(name).lower() in NAMES


def _first_of_each_folder(names: Iterable[str]) -> list[str]:
    """One of each folder, folders in order."""
    ranked = sorted(
        names, key=lambda name: (parent(name), NAMES.index(basename(name).lower()), not basename(name).islower(), name)
    )
    return [next(group) for _, group in itertools.groupby(ranked, key=parent)]


# --- JSON lines -------------------------------------------------------------------------------------------------------


def _json_rows(path: Path, name: str) -> Iterator[Row]:
    for number, line in enumerate(textfile.read_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        if not textfile.is_whole(line):
            yield place, _not_utf8(line)
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            yield place, "not JSON"
        else:
            yield place, row if isinstance(row, dict) else "not a JSON object"


def _not_utf8(line: str) -> str:
    try:
        line.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} at byte {error.start} of the line"
    return "not UTF-8"


def _check_json(path: Path, field: str) -> None:
    _, first = next(_json_rows(path, path.name), (None, None))
    if first is None:
        raise SanaError(f"{path} is empty", example(field), exit_code=2)
    if isinstance(first, str) or any(suffix(key) in SUFFIXES for key in first):
        _check_whole(path, field)
    if isinstance(first, str):
        return
    for key, todo in (("file_name", example(field)), (field, "choose a field with --set data.caption_field=NAME")):
        if not any(key in row for _, row in _json_rows(path, path.name) if isinstance(row, dict)):
            raise SanaError(f"{path}: no line has {key}; the first has {_some(first)}", todo, exit_code=2)


def _check_whole(path: Path, field: str) -> None:
    """Refuse a file that is JSON, but not in lines."""
    if path.stat().st_size > MOST_WHOLE:
        return
    try:
        whole = json.loads(textfile.read(path))
    except (ValueError, RecursionError):
        return
    kind = "array" if isinstance(whole, list) else "object" if isinstance(whole, dict) else "value"
    raise SanaError(f"{path} is one JSON {kind}, where metadata.jsonl has an object a line", example(field), exit_code=2)


def _some(names: Iterable[str]) -> str:
    shown = ", ".join(map(str, names))
    return shown if len(shown) <= 100 else shown[:100] + "..."


# --- CSV --------------------------------------------------------------------------------------------------------------


class _Lines:
    """The lines of a CSV file, ends included, as Python's reader wants them, from that of the columns on.

    `sep` is the mark that Excel's own first line names, "" without one; `taken` has the lines of the row being read, and
    `number` is that of the last.
    """

    def __init__(self, path: Path) -> None:
        self.sep, self.number = "", 0
        self.taken: list[str] = []
        self._lines = textfile.read_lines(path)
        self.head = self._next_full()
        if found := re.fullmatch(r'"?sep=(,|;|\t|\|)"?', self.head, re.IGNORECASE):
            self.sep, self.head = found[1], self._next_full()

    def _next_full(self) -> str:
        for line in self._lines:
            self.number += 1
            if line.strip():
                return line
        return ""

    def __iter__(self) -> Iterator[str]:
        self.taken.append(self.head)
        yield self.head + "\n"
        for line in self._lines:
            self.number += 1
            self.taken.append(line)
            yield line + "\n"


def _csv_rows(path: Path, name: str) -> Iterator[Row]:
    """Rows by the names in the first; a line that is not UTF-8 spoils its own row only."""
    lines = _Lines(path)
    reader = csv.reader(iter(lines))
    try:
        head = [field.strip() for field in next(reader, [])]
        lines.taken.clear()
        for fields in reader:
            place, text = f"{name}:{lines.number}", "\n".join(lines.taken)
            unclosed = len(lines.taken) > 1 and text.count('"') % 2 == 1
            lines.taken.clear()
            if not any(fields):
                continue
            if unclosed:  # and took the rows after it for its own
                yield place, 'a quote (") that does not close'
            elif len(fields) != len(head):
                yield place, f"{len(fields)} fields, where the first line has {len(head)}"
            elif not textfile.is_whole(text):
                yield place, "not UTF-8"
            else:
                row: dict[str, Any] = dict(zip(head, fields, strict=True))
                if "caption_weights" in row:  # numbers, as text
                    try:
                        row["caption_weights"] = json.loads(f"[{row['caption_weights'].strip('[]')}]") or None
                    except (ValueError, RecursionError):
                        yield place, "its caption weights are not numbers"
                        continue
                yield place, row
    except csv.Error as error:
        yield f"{name}:{lines.number}", f"not CSV: {error}; what follows it is left out"


def _check_csv(path: Path, field: str) -> None:
    lines = _Lines(path)
    head_line, example_line = lines.head, f"the first line of metadata.csv is for example: file_name,{field}"
    if not head_line:
        raise SanaError(f"{path} is empty", example_line, exit_code=2)
    try:
        head = [name.strip() for name in next(csv.reader(iter(lines)), [])]
    except csv.Error as error:
        raise SanaError(f"{path} is not CSV: {error}", example_line, exit_code=2) from error
    if "file_name" not in head:
        parted = [mark for mark in PARTED_BY if mark == lines.sep or _fields(head_line, mark) > max(1, len(head))]
        if parted:
            mark = {"\t": "tabs", "|": "'|'", ";": "';'"}[parted[0]]
            raise SanaError(f"{path}: its fields are parted by {mark}, not by commas", "save it as CSV with commas", exit_code=2)
        if any(suffix(name) in SUFFIXES for name in head):
            raise SanaError(f"{path}: its first line names no columns, but is a row already", example_line, exit_code=2)
        raise SanaError(f"{path} has no column file_name; it has {_some(head)}", example_line, exit_code=2)
    if field not in head:
        raise SanaError(
            f"{path} has no column {field}; it has {_some(head)}", "choose one with --set data.caption_field=NAME", exit_code=2
        )
    for name in ("file_name", field, "caption_weights"):
        if head.count(name) > 1:
            raise SanaError(f"{path} has {head.count(name)} columns {name}: which one is meant?", exit_code=2)


def _fields(line: str, mark: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=mark)))
    except csv.Error:
        return 0


def of_split(name: str, split: str, beside: Collection[str]) -> str | None:
    """What follows the split's folder in a name that metadata above it has; None if it is of another split.

    `beside` has the names of all that lies where the metadata does. Names that lead out, or are none, stay as they are, for
    `Tree.find` to refuse.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or name.startswith(("/", "\\")) or ".." in parts:
        return name
    if "\\" in parts[0] and parts[0] not in beside:
        return of_split(name.replace("\\", "/"), split, beside)
    if parts[0] == split or (fold(parts[0]) == fold(split) and parts[0] not in beside):
        return "/".join(parts[1:])
    return None
