"""metadata.jsonl and metadata.csv: one row per image, with `file_name` and captions.

File names are relative to the metadata's own folder, as in Hugging Face's imagefolder. A file
that cannot be read is refused.
"""

import csv
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_cli.config.keys import DataConfig
from sana_cli.errors import SanaError
from sana_cli.runtime import textfile
from sana_cli.runtime.files import is_lfs_pointer
from sana_cli.sources.attributes import BadAttributes, attributes_of, named_in_captions, refusal
from sana_cli.sources.captions import attribute_fields
from sana_cli.sources.images import SUFFIXES
from sana_cli.sources.walk import Tree, basename, fold, parent, suffix

NAMES = ("metadata.jsonl", "metadata.csv")  # in any letter case, by priority within a folder
MAX_WHOLE = 2**27  # bytes of a file that is parsed as a single JSON value, to explain what it is
MAX_ROWS_CHECKED = 1000  # for attributes of another form, before any work
SEPARATORS = (";", "\t", "|")  # instead of the comma

Row = tuple[str, dict[str, Any] | str]  # file and line, and the row or why it is unusable


def example(field: str) -> str:
    """Show a line of metadata.jsonl, for messages."""
    row = json.dumps({"file_name": "0001.png", field: "a red cube"})
    return f"a line of metadata.jsonl is for example: {row}"


@dataclass(frozen=True)
class Metadata:
    """One metadata file."""

    path: Path
    name: str  # relative to the source
    above: bool = False  # it lies above the source, so its file names begin with the source's folder

    @property
    def folder(self) -> str:
        """The folder that file names are relative to, itself relative to the source."""
        return "" if self.above else parent(self.name)

    def rows(self) -> Iterator[Row]:
        """Yield each row that has a `file_name`, or why a row is unusable."""
        read = _csv_rows if suffix(self.name) == ".csv" else _json_rows
        for position, row in read(self.path, self.name):
            if isinstance(row, dict) and (not isinstance(row.get("file_name"), str) or not row["file_name"]):
                yield position, "no file_name"
            else:
                yield position, row

    def check(self, data: DataConfig) -> None:
        """Refuse a file without a readable row, or with attributes of another form.

        Raises:
            SanaError: says what the file is, and what to do.
        """
        try:
            with self.path.open("rb") as file:
                if is_lfs_pointer(file.read(64)):
                    what = f"{self.path} is a Git LFS pointer, not the file itself"
                    raise SanaError(what, "fetch it with: git lfs pull")
            check = _check_csv if suffix(self.name) == ".csv" else _check_json
            check(self.path, data)
            self._check_attributes(data)
        except OSError as error:
            raise SanaError(f"{self.path} cannot be read: {error.strerror}") from error
        except textfile.NotTextError as error:
            raise SanaError(f"{self.path} cannot be read: {error}", exit_code=2) from error

    def _check_attributes(self, data: DataConfig) -> None:
        """Refuse attributes of another form in the first row that has any."""
        for position, row in itertools.islice(self.rows(), MAX_ROWS_CHECKED):
            attributes, says = attribute_fields(row, data) if isinstance(row, dict) else (None, None)
            if attributes in (None, "") and says in (None, ""):
                continue
            assert isinstance(row, dict), "it has a field"
            captions = row.get(data.caption_field)
            try:
                shown = attributes_of(attributes)
                named_in_captions(says, len(captions) if isinstance(captions, list) else 1, shown)
            except BadAttributes as error:
                raise refusal(f"{self.path}:{position.rpartition(':')[2]}", error) from error
            return


def find(tree: Tree, data: DataConfig, above: Path | None) -> list[Metadata]:
    """Find and check the metadata of a source: in the folder `above`, then from the top down.

    Raises:
        SanaError: one cannot be read.
    """
    for name, reason in tree.left_out.items():
        if is_metadata(name):
            raise SanaError(f"data.path: {tree.root / name}: {reason}", exit_code=2)
    found = []
    if above is not None:
        paths = (path for path in above.iterdir() if is_metadata(path.name))
        names = [path.name for path in paths if path.is_file() or (path.is_symlink() and not path.is_dir())]
        for name in _first_of_each_folder(names):
            if not (above / name).resolve().is_relative_to(above.resolve()):
                raise SanaError(f"data.path: {above / name} is a link that leads out of {above}", exit_code=2)
            found.append(Metadata(above / name, f"../{name}", above=True))
    for name in _first_of_each_folder(filter(is_metadata, tree.files)):
        found.append(Metadata(tree.root / name, name))
    for metadata in found:
        metadata.check(data)
    return found


def is_metadata(name: str) -> bool:
    """Whether a file has one of the `NAMES`."""
    return basename(name).lower() in NAMES


def _first_of_each_folder(names: Iterable[str]) -> list[str]:
    """Keep one name per folder, with the folders sorted."""

    def rank(name: str) -> tuple[str, int, bool, str]:
        base = basename(name)
        return parent(name), NAMES.index(base.lower()), not base.islower(), name

    return [next(group) for _, group in itertools.groupby(sorted(names, key=rank), key=parent)]


# --- JSON lines -------------------------------------------------------------------------------


def _json_rows(path: Path, name: str) -> Iterator[Row]:
    for number, line in enumerate(textfile.read_lines(path), start=1):
        if not line.strip():
            continue
        position = f"{name}:{number}"
        if not textfile.is_utf8(line):
            yield position, _not_utf8(line)
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            yield position, "not JSON"
        else:
            yield position, row if isinstance(row, dict) else "not a JSON object"


def _not_utf8(line: str) -> str:
    try:
        line.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} at byte {error.start} of the line"
    return "not UTF-8"


def _check_json(path: Path, data: DataConfig) -> None:
    field = data.caption_field
    _, first = next(_json_rows(path, path.name), (None, None))
    if first is None:
        raise SanaError(f"{path} is empty", example(field), exit_code=2)
    if isinstance(first, str) or any(suffix(key) in SUFFIXES for key in first):
        _check_whole(path, field)
    if isinstance(first, str):
        return
    for key, todo in (
        ("file_name", example(field)),
        (field, "choose a field with --set data.caption_field=NAME"),
    ):
        if not any(key in row for _, row in _json_rows(path, path.name) if isinstance(row, dict)):
            raise SanaError(
                f"{path}: no line has {key}; the first has {_shortened(first)}", todo, exit_code=2
            )


def _check_whole(path: Path, field: str) -> None:
    """Refuse a file that is a single JSON value."""
    if path.stat().st_size > MAX_WHOLE:
        return
    try:
        whole = json.loads(textfile.read(path))
    except (ValueError, RecursionError):
        return
    kind = "array" if isinstance(whole, list) else "object" if isinstance(whole, dict) else "value"
    raise SanaError(
        f"{path} is one JSON {kind}, where metadata.jsonl has one object per line",
        example(field),
        exit_code=2,
    )


def _shortened(names: Iterable[str]) -> str:
    shown = ", ".join(map(str, names))
    return shown if len(shown) <= 100 else shown[:100] + "..."


# --- CSV --------------------------------------------------------------------------------------


class _Lines:
    """The lines of a CSV file for `csv.reader`, with their ends, from the column names on.

    `sep` is the separator that Excel's own first line gives ("" without one). `taken` has the
    lines of the row being read, and `number` is the number of its last line.
    """

    def __init__(self, path: Path) -> None:
        self.sep, self.number = "", 0
        self.taken: list[str] = []
        self._lines = textfile.read_lines(path)
        self.head = self._next_full()
        if found := re.fullmatch(r'"?sep=(,|;|\t|\|)"?', self.head, re.IGNORECASE):
            self.sep, self.head = found[1], self._next_full()

    def _next_full(self) -> str:
        """The next line that is not blank, or ""."""
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
    """Yield rows by column name. A line that is not UTF-8 spoils only its own row."""
    lines = _Lines(path)
    reader = csv.reader(iter(lines))
    try:
        head = [field.strip() for field in next(reader, [])]
        lines.taken.clear()
        for fields in reader:
            text = "\n".join(lines.taken)
            unclosed = len(lines.taken) > 1 and text.count('"') % 2 == 1
            lines.taken.clear()
            if not any(fields):
                continue
            row: dict[str, Any] | str
            if unclosed:  # the rows after it became part of it
                row = 'a quote (") that does not close'
            elif len(fields) != len(head):
                row = f"{len(fields)} fields, where the first line has {len(head)}"
            elif not textfile.is_utf8(text):
                row = "not UTF-8"
            else:
                row = _with_weights(dict(zip(head, fields, strict=True)))
            yield f"{name}:{lines.number}", row
    except csv.Error as error:
        yield f"{name}:{lines.number}", f"not CSV: {error}; what follows it is left out"


def _with_weights(row: dict[str, Any]) -> dict[str, Any] | str:
    """Parse the numbers of `caption_weights` in a CSV row; if they are none, say so."""
    if "caption_weights" in row:
        try:
            row["caption_weights"] = json.loads(f"[{row['caption_weights'].strip('[]')}]") or None
        except (ValueError, RecursionError):
            return "its caption weights are not numbers"
    return row


def _check_csv(path: Path, data: DataConfig) -> None:
    lines, field = _Lines(path), data.caption_field
    example_line = f"the first line of metadata.csv is for example: file_name,{field}"
    if not lines.head:
        raise SanaError(f"{path} is empty", example_line, exit_code=2)
    try:
        head = [name.strip() for name in next(csv.reader(iter(lines)), [])]
    except csv.Error as error:
        raise SanaError(f"{path} is not CSV: {error}", example_line, exit_code=2) from error
    if "file_name" not in head:
        raise _no_file_name(path, head, lines, example_line)
    if field not in head:
        raise SanaError(
            f"{path} has no column {field}; it has {_shortened(head)}",
            "choose one with --set data.caption_field=NAME",
            exit_code=2,
        )
    for name in ("file_name", field, "caption_weights", "caption_attributes", data.attribute_field):
        if name is not None and head.count(name) > 1:
            raise SanaError(f"{path} has {head.count(name)} columns {name}: which one is meant?", exit_code=2)


def _no_file_name(path: Path, head: list[str], lines: _Lines, example_line: str) -> SanaError:
    """Return the error for a CSV file without a column file_name."""
    for mark in SEPARATORS:
        if mark == lines.sep or _count_fields(lines.head, mark) > max(1, len(head)):
            word = "tabs" if mark == "\t" else f"'{mark}'"
            what = f"{path}: its fields are separated by {word}, not by commas"
            return SanaError(what, "save it as CSV with commas", exit_code=2)
    if any(suffix(name) in SUFFIXES for name in head):
        what = f"{path}: its first line is a row already, not the column names"
        return SanaError(what, example_line, exit_code=2)
    what = f"{path} has no column file_name; it has {_shortened(head)}"
    return SanaError(what, example_line, exit_code=2)


def _count_fields(line: str, mark: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=mark)))
    except csv.Error:
        return 0


def within_split(name: str, split: str, beside: Collection[str]) -> str | None:
    """Drop the split's folder from a name in metadata above it; None if it is in another split.

    `beside` has the names of everything in the folder of the metadata. A name that leads out or
    is empty is returned as it is, for `Tree.find` to refuse.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or name.startswith(("/", "\\")) or ".." in parts:
        return name
    if "\\" in parts[0] and parts[0] not in beside:
        return within_split(name.replace("\\", "/"), split, beside)
    if parts[0] == split or (fold(parts[0]) == fold(split) and parts[0] not in beside):
        return "/".join(parts[1:])
    return None
