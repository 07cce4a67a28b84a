"""Tar shards in the WebDataset form: members of one key stand together, `key.jpg` with `key.txt` or `key.json`.

Read in stream with the standard library: nothing is unpacked, and members are taken by what they are called, never written.
What is kept of a shard while it is read is a hash of each key, and the names of some keys that lack something.
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
from sana_cli.sources.entry import (
    MAX_CAPTION_BYTES,
    BadImage,
    Entry,
    Skipped,
    caption_lines,
    captions_of,
    captions_of_row,
    hash_files,
    need_folder,
)
from sana_cli.sources.images import MAX_FILE_BYTES, SUFFIXES, unread_reason
from sana_cli.sources.splits import find_folder, no_split, split_of
from sana_cli.sources.walk import Tree, is_hidden, parent, stem, suffix

MAX_JSON_BYTES = 16 * MAX_CAPTION_BYTES
MOST_WITHHELD = 10_000  # keys that lack something, of which it is not said yet what became of the rest
NO_IMAGE, NO_CAPTION = "no image", "no caption"
APART = "its parts do not stand together; sort the shard by name (tar --sort=name)"
COMPRESSED = (  # first bytes, and what unpacks them
    (b"\x1f\x8b", "gunzip"), (b"BZh", "bunzip2"), (b"\xfd7zXZ\0", "unxz"), (b"\x28\xb5\x2f\xfd", "unzstd"),
    (b"\x04\x22\x4d\x18", "unlz4"), (b"PK\x03\x04", "unzip"), (b"7z\xbc\xaf\x27\x1c", "7z"), (b"Rar!", "unrar"),
)  # fmt: skip


class WebDataset:
    """All entries of a tar file, or of the tar files below a folder in the order of their names.

    Of a folder that has none of the split's name, the shards that are named after the split, where any is named so. What lies
    in folders of other splits is theirs.
    """

    def __init__(self, data: DataConfig) -> None:
        path = data.path
        assert path is not None
        self.field = data.caption_field
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
        self.shards = self._once({name: tree.root / name for name in names})
        self._list(tree, data.split if inner is None else None)
        if not self.shards:
            unread = listed([f"{left.name}: {left.reason}" for left in self.left_out])
            raise SanaError(f"data.path: {tree.root} is no .tar file, nor a folder that has any", *unread, exit_code=2)

    def _of_split(self, names: list[str], root: Path, split: str) -> list[str]:
        """The shards that are named after the split; all of them, of a folder that names none after any.

        Raises:
            SanaError: none is of the split; says which splits there are.
        """
        found = {name: split_of(name, split) for name in names}
        plain = [name for name in names if split_of(f"{parent(name)}/", split) is None]  # in no split's folder
        if split.lower() not in found.values():
            if not any(found[name] for name in plain) and split == "train" and (plain or not names):
                return plain
            if not any(found.values()):
                raise no_split(root, split)
            there = sorted({word for word in found.values() if word})
            of_none = sum(word is None for word in found.values())
            raise SanaError(
                f"data.split: {root} has no shard of {split}, but of {', '.join(there)}"
                + (f", and {of_none} that are named after none" if of_none else ""),
                f"choose one, for example --set data.split={there[0]}; or put the shards of each into a folder of its name",
                exit_code=2,
            )
        self.left_out += [
            Skipped(name, f"its name says no split, and others are named after {split}") for name in names if found[name] is None
        ]
        return [name for name in names if found[name] == split.lower()]

    def _once(self, shards: dict[str, Path]) -> dict[str, Path]:
        """The shards without those that are links to others of them."""
        read: dict[Path, str] = {}
        for name in sorted(shards, key=lambda name: (shards[name].is_symlink(), name)):
            if (first := read.setdefault(shards[name].resolve(), name)) != name:
                self.left_out.append(Skipped(name, f"leads to {first}, which is read"))
        return {name: shards[name] for name in sorted(read.values())}

    def _list(self, tree: Tree, split: str | None) -> None:
        """What lies beside the shards and is not read, but for folders of splits other than `split`.

        Companions of a shard, such as 000.parquet of 000.tar, are no loss.
        """
        shards = {stem(name) for name in tree.files if suffix(name) == ".tar"}
        for name in tree.files:
            reason = strays.why_unread(name)
            if suffix(name) == ".tar" or (stem(name) in shards and suffix(name) in (*strays.COLUMNS, *strays.TABLES)):
                continue
            if split is not None and split_of(f"{parent(name)}/", split) not in (None, split.lower()):
                continue
            if suffix(name) in SUFFIXES or metadata.is_metadata(name):
                reason = "not in a tar: data.source=folder reads images in folders"
            if reason is not None:
                self.left_out.append(Skipped(name, reason))
        self.left_out += [Skipped(name, reason) for name, reason in tree.left_out.items()]
        self.left_out.sort(key=lambda left: left.name)

    def count(self) -> int | None:
        """None: only reading all shards would tell."""
        return None

    def __iter__(self) -> Iterator[Entry | Skipped]:
        for name, path in self.shards.items():
            yield from _Shard(name, path, self.field)
        yield from self.left_out

    def fingerprint(self) -> dict[str, Any]:
        """The hash of the shards, whole, and their names, and where in them captions are looked for."""
        digest = hashlib.sha256()
        for name, content in zip(self.shards, hash_files(self.shards.values()), strict=True):
            digest.update(json.dumps([name, content]).encode())
        facts = {"shards": len(self.shards), "caption_field": self.field}
        return {"source": "webdataset", **facts, "sha256": digest.hexdigest()}


@dataclass
class _Sample:
    """Members of one key, one after another."""

    key: str
    parts: dict[str, bytes | str] = field(default_factory=dict)  # by suffix: the bytes, or why they were not read
    image: str | None = None  # the suffix of the first image
    left: list[Skipped] = field(default_factory=list)  # members that are not read
    pictures: list[Skipped] = field(default_factory=list)  # those of other formats, which say why there is no image
    longer: list[Skipped] = field(default_factory=list)  # .seg.png beside .jpg is no loss, but alone it may be the image


class _Shard:
    """The entries of one shard."""

    def __init__(self, name: str, path: Path, caption_field: str) -> None:
        self.name, self.path, self.field = name, path, caption_field
        self.ended: set[int] = set()  # hashes of the keys whose members have all come by, or so it seemed
        self.apart: set[int] = set()  # of those that came again
        self.used: set[int] = set()  # of those that an entry was made of
        self.withheld: deque[tuple[int, Skipped]] = deque()  # lacks something, which may come later

    def __iter__(self) -> Iterator[Entry | Skipped]:
        sample = _Sample("")
        try:
            self._check_kind()
            with tarfile.open(self.path, mode="r|") as tar:
                for member in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # which the library would keep, all of them
                    path = PurePosixPath(member.name.removeprefix("./"))
                    place = f"{self.name}/{member.name.removeprefix('./')}"
                    if member.isdir():
                        continue
                    if path.is_absolute() or ".." in path.parts or "\x00" in member.name:
                        yield Skipped(place, "its name leads out of the source")
                        continue
                    if any(map(is_hidden, path.parts)):  # ._1.jpg, which macOS puts before 1.jpg
                        continue
                    if not member.isreg():
                        yield Skipped(place, "not a regular file")
                        continue
                    start, _, kind = path.name.partition(".")
                    key = (path.parent / start).as_posix()
                    if key != sample.key:
                        yield from self._end(sample)
                        sample = _Sample(key)
                    self._take(tar, member, kind.lower(), Skipped(place, ""), sample)
                yield from self._end(sample)
                sample = _Sample("")
                _check_end(self.path, tar.offset)
            yield from self._release(0)
        except BadImage as error:
            yield Skipped(self.name, str(error))
        except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
            yield from self._release(0)
            if sample.parts:  # whose last member may be the one that is cut short
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

    def _take(self, tar: tarfile.TarFile, member: tarfile.TarInfo, kind: str, left: Skipped, sample: _Sample) -> None:
        """One more member of a key; `left` has its name."""
        is_image = f".{kind}" in SUFFIXES
        if kind in sample.parts:
            sample.left.append(Skipped(left.name, "named twice; the first is kept"))
        elif is_image and sample.image is not None:
            sample.left.append(Skipped(left.name, f"a second image of its key, whose .{sample.image} is read"))
        else:
            sample.parts[kind] = self._read(tar, member, kind)
            if is_image:
                sample.image = kind
            elif reason := unread_reason(left.name):
                sample.pictures.append(Skipped(left.name, reason))
            elif suffix(kind) in SUFFIXES:
                reason = f"no image: a key ends at the first dot of a name, and .{kind} is no suffix of images"
                sample.longer.append(Skipped(left.name, reason))

    def _read(self, tar: tarfile.TarFile, member: tarfile.TarInfo, kind: str) -> bytes | str:
        """A member's bytes, or why they are not read; members that are neither image nor caption are passed over."""
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
        """What the members of a key come to. Of one that lacks something it is said later, for the rest may come yet."""
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
            yield from self._release(MOST_WITHHELD)
        else:
            yield entry
        yield from (*sample.pictures, *sample.left)

    def _release(self, most: int) -> Iterator[Skipped]:
        """Say what keys lack, until `most` are left of which it is withheld."""
        while len(self.withheld) > most:
            number, left = self.withheld.popleft()
            yield Skipped(left.name, f"{left.reason}: {APART}") if number in self.apart else left

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
            captions, weights = self._captions(parts)
            return Entry(name, image, captions, weights=weights)
        except BadImage as error:
            return Skipped(name, str(error))

    def _captions(self, parts: dict[str, bytes | str]) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
        text, record = parts.get("txt"), parts.get("json")
        if isinstance(text, bytes):
            return captions_of(caption_lines(text))
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
        return captions_of_row(row, self.field)


def _check_end(shard: Path, offset: int) -> None:
    """An archive ends with blocks of zeros. The library takes a damaged header for the end, and says nothing.

    Raises:
        EOFError: it does not end there, or goes on after it.
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
