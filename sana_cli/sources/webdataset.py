"""Tar shards in WebDataset form: adjacent members `key.jpg` and `key.txt` or `key.json`.

Shards are read as a stream with the standard library, and nothing is unpacked to the disk.
Memory holds a hash of each key of a shard, and the names of some incomplete keys.
"""

import hashlib
import json
import tarfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from sana_cli.config.keys import DataConfig
from sana_cli.errors import SanaError, listed
from sana_cli.runtime import textfile
from sana_cli.runtime.files import is_lfs_pointer
from sana_cli.sources import metadata, strays
from sana_cli.sources.attributes import BadAttributes, refusal
from sana_cli.sources.captions import (
    MAX_CAPTION_BYTES,
    Captions,
    attribute_fields,
    captions_of,
    captions_of_row,
    captions_of_text,
)
from sana_cli.sources.entry import BadImage, Entry, Skipped, hash_files, need_folder
from sana_cli.sources.images import MAX_FILE_BYTES, SUFFIXES, unread_reason
from sana_cli.sources.splits import find_folder, no_split, split_of
from sana_cli.sources.walk import Tree, is_hidden, parent, stem, suffix

MAX_JSON_BYTES = 16 * MAX_CAPTION_BYTES
MAX_WITHHELD = 10_000  # incomplete keys that are not reported yet, since their rest may follow
NO_IMAGE, NO_CAPTION = "no image", "no caption"
APART = "its parts are not adjacent; sort the shard by name (tar --sort=name)"
COMPRESSED = (  # first bytes, and the tool that unpacks them
    (b"\x1f\x8b", "gunzip"), (b"BZh", "bunzip2"), (b"\xfd7zXZ\0", "unxz"), (b"\x28\xb5\x2f\xfd", "unzstd"),
    (b"\x04\x22\x4d\x18", "unlz4"), (b"PK\x03\x04", "unzip"), (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!", "unrar"),
)  # fmt: skip


class WebDataset:
    """The entries of a tar file, or of the tar files below a folder, sorted by name.

    If a sub-folder has the split's name, only its shards are read; otherwise the shards named
    after the split. Folders of other splits are ignored.
    """

    def __init__(self, data: DataConfig) -> None:
        path = data.path
        assert path is not None
        self.data = data
        self.left_out: list[Skipped] = []
        if path.is_file():
            self.shards = {path.name: path}
            return
        root = need_folder(path)
        inner = find_folder(root, data.split)
        tree = Tree(inner or root, root)
        names = [name for name in tree.files if suffix(name) == ".tar"]
        if inner is None:
            names = self._of_split(names, root, data.split)
        self.shards = self._without_links({name: tree.root / name for name in names})
        self._list_unread(tree, data.split if inner is None else None)
        if not self.shards:
            unread = listed(list(map(str, self.left_out)))
            raise SanaError(
                f"data.path: {tree.root} is neither a .tar file nor a folder with one", *unread, exit_code=2
            )

    def _of_split(self, names: list[str], root: Path, split: str) -> list[str]:
        """Keep the shards named after the split; for `train`, all if no name has a split.

        Raises:
            SanaError: no shard belongs to the split; says which splits exist.
        """
        found = {name: split_of(name, split) for name in names}
        if split.lower() not in found.values():
            # outside the folders of splits
            outside = [name for name in names if split_of(f"{parent(name)}/", split) is None]
            if split == "train" and not any(found[name] for name in outside) and (outside or not names):
                return outside
            if not any(found.values()):
                raise no_split(root, split)
            splits = sorted({word for word in found.values() if word})
            unnamed = sum(word is None for word in found.values())
            raise SanaError(
                f"data.split: {root} has no shard of {split}, but of {', '.join(splits)}"
                + (f", and {unnamed} without a split in the name" if unnamed else ""),
                f"choose one, for example --set data.split={splits[0]};"
                " or put the shards of each into a folder of its name",
                exit_code=2,
            )
        reason = f"its name has no split, while others are named after {split}"
        self.left_out += [Skipped(name, reason) for name in names if found[name] is None]
        return [name for name in names if found[name] == split.lower()]

    def _without_links(self, shards: dict[str, Path]) -> dict[str, Path]:
        """Drop shards that are links to other shards."""
        read: dict[Path, str] = {}
        for name in sorted(shards, key=lambda name: (shards[name].is_symlink(), name)):
            if (first := read.setdefault(shards[name].resolve(), name)) != name:
                self.left_out.append(Skipped(name, f"leads to {first}, which is read"))
        return {name: shards[name] for name in sorted(read.values())}

    def _list_unread(self, tree: Tree, split: str | None) -> None:
        """Record the files that are not read, except in folders of splits other than `split`.

        Tables beside a shard, such as 000.parquet beside 000.tar, are not reported.
        """
        shards = {stem(name) for name in tree.files if suffix(name) == ".tar"}
        for name in tree.files:
            reason = strays.why_unread(name)
            if suffix(name) == ".tar":
                continue
            if stem(name) in shards and suffix(name) in (*strays.COLUMNS, *strays.TABLES):
                continue
            if split is not None and split_of(f"{parent(name)}/", split) not in (None, split.lower()):
                continue
            if suffix(name) in SUFFIXES or metadata.is_metadata(name):
                reason = "not in a tar: data.source=folder reads images in folders"
            if reason is not None:
                self.left_out.append(Skipped(name, reason))
        self.left_out += [Skipped(name, reason) for name, reason in tree.left_out.items()]
        self.left_out.sort(key=lambda skipped: skipped.name)

    def count(self) -> int | None:
        """None: counting would mean reading all shards."""
        return None

    def __iter__(self) -> Iterator[Entry | Skipped]:
        for name, path in self.shards.items():
            yield from _Shard(name, path, self.data)
        yield from self.left_out

    def fingerprint(self) -> dict[str, Any]:
        """Hash the names and whole contents of the shards, and name the fields that are read."""
        digest = hashlib.sha256()
        for name, content in zip(self.shards, hash_files(self.shards.values()), strict=True):
            digest.update(json.dumps([name, content]).encode())
        fields = {"caption_field": self.data.caption_field, "attribute_field": self.data.attribute_field}
        return {"source": "webdataset", "shards": len(self.shards), **fields, "sha256": digest.hexdigest()}


@dataclass
class _Sample:
    """Adjacent members with one key."""

    key: str
    parts: dict[str, bytes | str] = field(default_factory=dict)  # by suffix: the bytes, or why not read
    image: str | None = None  # the suffix of the first image
    unread: list[Skipped] = field(default_factory=list)  # members that are not read
    pictures: list[Skipped] = field(default_factory=list)  # unread formats: they explain a missing image
    longer: list[Skipped] = field(default_factory=list)  # .seg.png: reported only if there is no other image


class _Shard:
    """The entries of one shard."""

    def __init__(self, name: str, path: Path, data: DataConfig) -> None:
        self.name, self.path, self.data = name, path, data
        self.begun = False  # some sample had attributes that can be used
        self.ended: set[int] = set()  # hashes of the keys whose adjacent members have been read
        self.apart: set[int] = set()  # hashes of ended keys that appeared again
        self.used: set[int] = set()  # hashes of keys that became an entry
        self.withheld: deque[tuple[int, Skipped]] = deque()  # incomplete keys: their rest may follow

    def __iter__(self) -> Iterator[Entry | Skipped]:
        sample = _Sample("")
        try:
            self._check_kind()
            with tarfile.open(self.path, mode="r|") as tar:
                for member in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # the library would keep them all
                    path = PurePosixPath(member.name.removeprefix("./"))
                    name = f"{self.name}/{member.name.removeprefix('./')}"
                    if member.isdir():
                        continue
                    if path.is_absolute() or ".." in path.parts or "\x00" in member.name:
                        yield Skipped(name, "its name leads out of the source")
                        continue
                    if any(map(is_hidden, path.parts)):  # macOS puts ._1.jpg before 1.jpg
                        continue
                    if not member.isreg():
                        yield Skipped(name, "not a regular file")
                        continue
                    start, _, kind = path.name.partition(".")
                    key = (path.parent / start).as_posix()
                    if key != sample.key:
                        yield from self._end(sample)
                        sample = _Sample(key)
                    self._add(tar, member, name, kind.lower(), sample)
                yield from self._end(sample)
                sample = _Sample("")
                _check_end(self.path, tar.offset)
            yield from self._release(0)
        except BadImage as error:
            yield Skipped(self.name, str(error))
        except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
            yield from self._release(0)
            if sample.parts:  # the shard may have ended within its last member
                yield Skipped(f"{self.name}/{sample.key}", "cut short")
            yield Skipped(self.name, f"damaged: {error}; what follows is left out")

    def _check_kind(self) -> None:
        with self.path.open("rb") as file:
            beginning = file.read(tarfile.BLOCKSIZE)
        if is_lfs_pointer(beginning):
            raise BadImage("a Git LFS pointer, not the shard: run git lfs pull")
        for mark, tool in COMPRESSED:
            if beginning.startswith(mark):
                raise BadImage(f"compressed: unpack it with {tool}, since shards are read in stream")

    def _add(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, kind: str, sample: _Sample
    ) -> None:
        """Add a member to its sample; `kind` is the suffix without its first dot."""
        is_image = f".{kind}" in SUFFIXES
        if kind in sample.parts:
            sample.unread.append(Skipped(name, "named twice; the first is kept"))
        elif is_image and sample.image is not None:
            sample.unread.append(Skipped(name, f"a second image of its key, whose .{sample.image} is read"))
        else:
            sample.parts[kind] = self._read(tar, member, kind)
            if is_image:
                sample.image = kind
            elif reason := unread_reason(name):
                sample.pictures.append(Skipped(name, reason))
            elif suffix(kind) in SUFFIXES:
                rule = "a key ends at the first dot of a name"
                sample.longer.append(Skipped(name, f"no image: {rule}, and .{kind} is no suffix of images"))

    def _read(self, tar: tarfile.TarFile, member: tarfile.TarInfo, kind: str) -> bytes | str:
        """Read a member, or say why not; "" for a member that is neither image nor caption."""
        limit = MAX_FILE_BYTES if f".{kind}" in SUFFIXES else MAX_JSON_BYTES if kind in ("txt", "json") else 0
        if limit == 0:
            return ""
        if member.size > limit:
            return f"its .{kind} has {member.size:,} bytes; the most is {limit:,}"
        file = tar.extractfile(member)
        raw = b"" if file is None else file.read()
        if len(raw) != member.size:
            raise EOFError("unexpected end of data")
        return raw

    def _end(self, sample: _Sample) -> Iterator[Entry | Skipped]:
        """Yield a sample as an entry. Report an incomplete one later: its rest may follow."""
        if not sample.parts:
            return
        number = hash(sample.key)
        if number in self.ended:
            self.apart.add(number)
        self.ended.add(number)
        entry = self._entry(sample)
        if isinstance(entry, Entry) and number in self.used:
            entry = Skipped(entry.id, "named twice; the first is kept")
        if isinstance(entry, Entry):
            self.used.add(number)
            yield entry
        elif entry.reason == NO_IMAGE and (sample.pictures or sample.longer):
            yield from sample.longer
        elif entry.reason in (NO_IMAGE, NO_CAPTION):
            self.withheld.append((number, entry))
            yield from self._release(MAX_WITHHELD)
        else:
            yield entry
        yield from (*sample.pictures, *sample.unread)

    def _release(self, most: int) -> Iterator[Skipped]:
        """Report incomplete keys until at most `most` are withheld."""
        while len(self.withheld) > most:
            number, skipped = self.withheld.popleft()
            is_apart = number in self.apart
            yield Skipped(skipped.name, f"{skipped.reason}: {APART}") if is_apart else skipped

    def _entry(self, sample: _Sample) -> Entry | Skipped:
        name, parts = f"{self.name}/{sample.key}", sample.parts
        try:
            if sample.image is None:
                raise BadImage(NO_IMAGE)
            image = parts[sample.image]
            for part in (image, parts.get("txt"), parts.get("json")):
                if isinstance(part, str) and part:
                    raise BadImage(part)
            assert isinstance(image, bytes)
            found = self._captions(parts)
            self.begun = self.begun or bool(found.attributes)
            return Entry(name, image, **found._asdict())
        except BadAttributes as error:
            if not self.begun:
                raise refusal(f"{self.path}, {sample.key}", error) from error
            return Skipped(name, str(error))
        except BadImage as error:
            return Skipped(name, str(error))

    def _captions(self, parts: dict[str, bytes | str]) -> Captions:
        text, record = parts.get("txt"), parts.get("json")
        if isinstance(text, bytes):
            return captions_of(captions_of_text(text), None, *self._attributes(record))
        if not isinstance(record, bytes):
            raise BadImage(NO_CAPTION)
        try:
            row = json.loads(textfile.decode(record))
        except textfile.NotTextError as error:
            raise BadImage(f"its captions are not UTF-8: {error}") from error
        except (ValueError, RecursionError) as error:
            raise BadImage("its .json is not JSON") from error
        if not isinstance(row, dict):
            raise BadImage("its .json is not a JSON object")
        return captions_of_row(row, self.data)

    def _attributes(self, record: bytes | str | None) -> tuple[Any, Any]:
        """The attribute fields of a .json whose captions are in a .txt beside it, if it is an object."""
        try:
            row = json.loads(textfile.decode(record)) if isinstance(record, bytes) else None
        except (textfile.NotTextError, ValueError, RecursionError):
            return None, None
        return attribute_fields(row, self.data) if isinstance(row, dict) else (None, None)


def _check_end(shard: Path, offset: int) -> None:
    """Check that only zeros follow: `tarfile` silently treats a damaged header as the end.

    Raises:
        EOFError: the shard is cut short, damaged, or goes on.
    """
    with shard.open("rb") as file:
        file.seek(offset)
        first = file.read(tarfile.BLOCKSIZE)
        if len(first) < tarfile.BLOCKSIZE:
            raise EOFError("cut short")
        if any(first):
            raise EOFError(f"no header at byte {offset:,}")
        while rest := file.read(2**20):
            if any(rest):
                raise EOFError("another archive follows the first")
