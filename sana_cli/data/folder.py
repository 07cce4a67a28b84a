"""Images in a folder, with captions in one of three ways, found out by looking.

    metadata.jsonl or metadata.csv   `file_name`, and captions in the field `data.caption_field` (a string or a list)
    name.png with name.txt           a caption a line
    sub-folders                      named after a class, which goes into `data.caption_template`

The first two are what Hugging Face's imagefolder and most trainers read. With `data.split`, a sub-folder of that name is
the source.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sana_cli.config import DataConfig
from sana_cli.data.entry import (
    MAX_CAPTION_BYTES,
    BadImage,
    Entry,
    Skipped,
    captions_of,
    hash_files,
    inside,
    need_folder,
    split_folder,
)
from sana_cli.data.images import SUFFIXES
from sana_cli.errors import SanaError


class Folder:
    """A folder of captioned images, in the order of its metadata, or of their names."""

    def __init__(self, data: DataConfig) -> None:
        root = need_folder(data.path)
        self.data, self.root = data, split_folder(root, data.split)
        named = [self.root / name for name in ("metadata.jsonl", "metadata.csv") if (self.root / name).is_file()]
        for path in named:
            if not path.resolve().is_relative_to(root.resolve()):
                raise SanaError(f"data.path: {path} is a link that leads out of {root}", exit_code=2)
        self.metadata = named[0] if named else None
        self.names: list[str] = []
        if self.metadata is None:
            self.names = sorted(
                path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.suffix.lower() in SUFFIXES
            )
            if not self.names:
                raise SanaError(
                    f"data.path: {self.root} has neither metadata.jsonl, metadata.csv nor images ({' '.join(SUFFIXES)})",
                    "a line of metadata.jsonl is for example: "
                    + json.dumps({"file_name": "0001.png", data.caption_field: "a red cube"}),
                    exit_code=2,
                )
        self.classes = sorted({Path(name).parts[0] for name in self.names if len(Path(name).parts) > 1})
        self.by_text = any((self.root / name).with_suffix(".txt").is_file() for name in self.names)

    def count(self) -> int | None:
        """Lines of the metadata, or images."""
        return len(self.names) if self.metadata is None else sum(1 for _ in self._rows())

    def __iter__(self) -> Iterator[Entry | Skipped]:
        seen: set[str] = set()
        for name, row in self._rows() if self.metadata is not None else ((name, None) for name in self.names):
            if isinstance(row, str):
                yield Skipped(name, row)
                continue
            try:
                if name in seen:
                    raise BadImage("named twice; the first is kept")
                entry = self._entry(name, inside(self.root, name), row)
            except BadImage as error:
                yield Skipped(name, str(error))
            else:
                seen.add(name)
                yield entry

    def _entry(self, name: str, path: Path, row: dict[str, Any] | None) -> Entry:
        if row is not None:
            captions, weights = captions_of(row.get(self.data.caption_field), row.get("caption_weights"))
            return Entry(name, path, captions, weights=weights)
        if self.by_text:
            return Entry(name, path, captions_of(_lines(path.with_suffix(".txt"), self.root))[0])
        return self._of_class(name, path)

    def _of_class(self, name: str, path: Path) -> Entry:
        if len(Path(name).parts) == 1:
            raise BadImage("no caption: no metadata, no .txt beside it, and no class-named folder around it")
        label = Path(name).parts[0]
        caption = self.data.caption_template.replace("{}", label.replace("_", " "))
        return Entry(name, path, (caption,), self.classes.index(label))

    def _rows(self) -> Iterator[tuple[str, dict[str, Any] | str]]:
        """(file name, row) for each line of the metadata, or (line, why it cannot be used)."""
        assert self.metadata is not None
        read = _csv_rows if self.metadata.suffix == ".csv" else _json_rows
        for place, row in read(self.metadata):
            name = row.get("file_name") if isinstance(row, dict) else None
            if isinstance(row, str):
                yield place, row
            elif not isinstance(name, str) or not name:
                yield place, "no file_name"
            else:
                yield name, row

    def fingerprint(self) -> dict[str, Any]:
        """The hash of all names, captions and image files: what changes if one is added, replaced or recaptioned."""
        digest, images = hashlib.sha256(), list[Path]()
        for entry in self:
            if isinstance(entry, Skipped):
                digest.update(json.dumps([entry.name, entry.reason]).encode())
                continue
            assert isinstance(entry.image, Path)
            images.append(entry.image)
            digest.update(json.dumps([entry.id, entry.captions, entry.weights]).encode())
        for content in hash_files(images):
            digest.update(content.encode())
        return {"source": "folder", "split": self.data.split, "sha256": digest.hexdigest()}


def _lines(path: Path, root: Path) -> list[str]:
    """The captions in a text file."""
    full = inside(root, path.relative_to(root).as_posix()) if path.exists() else None
    if full is None:
        raise BadImage("no caption")
    if full.stat().st_size > MAX_CAPTION_BYTES:
        raise BadImage(f"its captions are over {MAX_CAPTION_BYTES:,} bytes")
    try:
        return full.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise BadImage(f"its captions cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadImage(f"its captions are not UTF-8: {error.reason} at byte {error.start}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            place = f"{path.name}:{number}"
            try:
                row = json.loads(raw.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield place, f"not UTF-8: {error.reason} at byte {error.start} of the line"
            except (ValueError, RecursionError):
                yield place, "not JSON"
            else:
                yield place, row if isinstance(row, dict) else "not a JSON object"


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Rows by the names in the first; a line that is not UTF-8 spoils its own row only."""
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        head = next(reader, [])
        for fields in reader:
            place = f"{path.name}:{reader.line_num}"
            if not fields:
                continue
            if len(fields) != len(head):
                yield place, f"{len(fields)} fields, where the first line has {len(head)}"
            elif any("\udc80" <= c <= "\udcff" for field in fields for c in field):
                yield place, "not UTF-8"
            else:
                row: dict[str, Any] = dict(zip(head, fields, strict=True))
                if "caption_weights" in row:  # numbers, as text
                    try:
                        row["caption_weights"] = json.loads(f"[{row['caption_weights'].strip('[]')}]") or None
                    except ValueError:
                        yield place, "its caption weights are not numbers"
                        continue
                yield place, row
    except csv.Error as error:
        yield f"{path.name}:{reader.line_num}", f"not CSV: {error}; what follows it is left out"
