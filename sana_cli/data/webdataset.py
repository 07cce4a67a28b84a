"""Tar shards in the WebDataset form: members of one key stand together, `key.jpg` with `key.txt` or `key.json`.

Read in stream with the standard library: nothing is unpacked, and members are taken by what they are called, never written.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from sana_cli.config import DataConfig
from sana_cli.data.entry import MAX_CAPTION_BYTES, BadImage, Entry, Skipped, captions_of, hash_files, need_folder, split_folder
from sana_cli.data.images import MAX_FILE_BYTES, SUFFIXES
from sana_cli.errors import SanaError

MAX_JSON_BYTES = 16 * MAX_CAPTION_BYTES


class WebDataset:
    """All entries of a tar file, or of the tar files of a folder in the order of their names."""

    def __init__(self, data: DataConfig) -> None:
        path = data.path
        assert path is not None
        self.field = data.caption_field
        if path.is_file():
            self.shards = [path]
        else:
            inner = split_folder(need_folder(path), data.split)
            found = sorted(shard for shard in inner.glob("*.tar") if shard.is_file())
            self.shards = [shard for shard in found if shard.resolve().is_relative_to(path.resolve())]
        if not self.shards:
            raise SanaError(f"data.path: {path} is no .tar file, nor a folder that has any", exit_code=2)

    def count(self) -> int | None:
        """None: only reading all shards would tell."""
        return None

    def __iter__(self) -> Iterator[Entry | Skipped]:
        seen: set[str] = set()
        for shard in self.shards:
            for entry in self._shard(shard):
                if isinstance(entry, Skipped) or entry.id not in seen:
                    yield entry
                else:
                    yield Skipped(entry.id, "named twice; the first is kept")
                if isinstance(entry, Entry):
                    seen.add(entry.id)

    def _shard(self, shard: Path) -> Iterator[Entry | Skipped]:
        key, parts = "", dict[str, bytes | str]()
        try:
            with tarfile.open(shard, mode="r|") as tar:
                for member in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # which the library would keep, all of them
                    name = member.name.removeprefix("./")
                    if member.isdir():
                        continue
                    place = f"{shard.name}/{name}"
                    path = PurePosixPath(name)
                    if path.is_absolute() or ".." in path.parts or "\x00" in name:
                        yield Skipped(place, "its name leads out of the source")
                        continue
                    if not member.isreg():
                        yield Skipped(place, "not a regular file")
                        continue
                    stem, _, suffix = path.name.partition(".")
                    this = (path.parent / stem).as_posix()
                    if this != key:
                        if parts:
                            yield self._entry(f"{shard.name}/{key}", parts)
                        key, parts = this, {}
                    parts[suffix.lower()] = self._read(tar, member, suffix.lower())
                if parts:
                    yield self._entry(f"{shard.name}/{key}", parts)
                    parts = {}
                _check_end(shard, tar.offset)
        except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
            if parts:  # whose last member may be the one that is cut short
                yield Skipped(f"{shard.name}/{key}", "cut short")
            yield Skipped(shard.name, f"damaged: {error}; what follows is left out")

    def _read(self, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> bytes | str:
        """A member's bytes, or why they are not read; members that are neither image nor caption are passed over."""
        limit = MAX_FILE_BYTES if f".{suffix}" in SUFFIXES else MAX_JSON_BYTES if suffix in ("txt", "json") else 0
        if limit == 0:
            return ""
        if member.size > limit:
            return f"its .{suffix} has {member.size:,} bytes; the most is {limit:,}"
        file = tar.extractfile(member)
        raw = b"" if file is None else file.read()
        if len(raw) != member.size:
            raise EOFError("unexpected end of data")
        return raw

    def _entry(self, name: str, parts: dict[str, bytes | str]) -> Entry | Skipped:
        images = [part for suffix, part in parts.items() if f".{suffix}" in SUFFIXES]
        try:
            if not images:
                raise BadImage("no image")
            for part in (images[0], parts.get("txt"), parts.get("json")):
                if isinstance(part, str) and part:
                    raise BadImage(part)
            assert isinstance(images[0], bytes)
            captions, weights = self._captions(parts)
            return Entry(name, images[0], captions, weights=weights)
        except BadImage as error:
            return Skipped(name, str(error))

    def _captions(self, parts: dict[str, bytes | str]) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
        text, record = parts.get("txt"), parts.get("json")
        try:
            if isinstance(text, bytes):
                return captions_of(text.decode("utf-8-sig").splitlines())
            if isinstance(record, bytes):
                row = json.loads(record.decode("utf-8-sig"))
                if not isinstance(row, dict):
                    raise BadImage("its .json is not a JSON object")
                return captions_of(row.get(self.field), row.get("caption_weights"))
        except UnicodeDecodeError as error:
            raise BadImage(f"its captions are not UTF-8: {error.reason} at byte {error.start}") from error
        except (ValueError, RecursionError) as error:
            raise BadImage("its .json is not JSON") from error
        raise BadImage("no caption")

    def fingerprint(self) -> dict[str, Any]:
        """The hash of the shards, whole, and their names, and where in them captions are looked for."""
        digest = hashlib.sha256()
        for shard, content in zip(self.shards, hash_files(self.shards), strict=True):
            digest.update(json.dumps([shard.name, content]).encode())
        facts = {"shards": len(self.shards), "caption_field": self.field}
        return {"source": "webdataset", **facts, "sha256": digest.hexdigest()}


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
