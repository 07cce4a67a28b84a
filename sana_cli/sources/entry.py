"""What a source yields: an entry that is still encoded, or the reason why there is none."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sana_cli.errors import SanaError
from sana_cli.runtime import textfile
from sana_cli.runtime.files import is_lfs_pointer, sha256_file

MAX_WEIGHT = 1e6  # of a caption, and less than one over it is none: float32 holds their sums
MAX_CAPTION_BYTES = 100_000  # of one caption; beyond it, it is no caption


class BadImage(Exception):  # noqa: N818 (it is an image)
    """An image that cannot be used, and why, in words for `skipped.jsonl`."""


@dataclass(frozen=True)
class Entry:
    """One image with its captions: any of them may describe it at a training step, by their weights."""

    id: str  # the source's name for it, unique within the source
    image: bytes | Path | np.ndarray  # an encoded file's bytes, the file, or pixels (H, W) or (H, W, 3) uint8
    captions: tuple[str, ...]
    label: int | None = None
    weights: tuple[float, ...] | None = None  # of the captions; None: all alike


@dataclass(frozen=True)
class Skipped:
    """An entry that was left out."""

    name: str
    reason: str


class Source(Protocol):
    """Images and captions in a fixed order."""

    def count(self) -> int | None:
        """How many entries there are, the bad ones included; None where only reading it all would tell."""
        ...

    def __iter__(self) -> Iterator[Entry | Skipped]: ...

    def fingerprint(self) -> dict[str, Any]:
        """What tells this source's content from another's, without paths and times."""
        ...


def captions_of(value: Any, weights: Any = None) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Captions and their weights from what a metadata field holds: a string, or a list of them.

    Raises:
        BadImage: there is none that can be used; says why.
    """
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
        raise BadImage("no caption" if value is None else f"a caption is not text: {value!r:.60}")
    if weights is not None:
        numbers = weights if isinstance(weights, list | tuple) else [weights]
        if len(numbers) != len(found) or not all(type(w) in (int, float) and 0 <= w <= MAX_WEIGHT for w in numbers):
            raise BadImage("its caption weights are not one number from 0 to a million for each caption")
        kept = [
            (text.strip(), float(weight))
            for text, weight in zip(found, numbers, strict=True)
            if text.strip() and weight >= 1 / MAX_WEIGHT
        ]
    else:
        kept = [(text.strip(), 1.0) for text in found if text.strip()]
    if not kept:
        raise BadImage("no caption")
    if any(len(text.encode("utf-8", errors="surrogatepass")) > MAX_CAPTION_BYTES for text, _ in kept):
        raise BadImage(f"a caption of over {MAX_CAPTION_BYTES:,} bytes")
    return tuple(text for text, _ in kept), None if weights is None else tuple(weight for _, weight in kept)


def captions_of_row(row: Mapping[str, Any], field: str) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """The same of a row of metadata, whose captions are in `field` and whose weights are in `caption_weights`.

    Raises:
        BadImage: there is none that can be used; says why.
    """
    if field not in row:
        others = ", ".join(name for name in row if name not in ("file_name", "caption_weights"))
        raise BadImage(f"no caption: it has no {field}" + (f", but {others:.60}" if others else ""))
    return captions_of(row[field], row.get("caption_weights"))


def caption_lines(raw: bytes) -> list[str]:
    """The captions in a text file's bytes, a line each.

    Raises:
        BadImage: it is no text; says why.
    """
    if is_lfs_pointer(raw):
        raise BadImage("its captions are a Git LFS pointer: fetch them with git lfs pull")
    try:
        return textfile.split_lines(textfile.decode(raw))
    except textfile.NotTextError as error:
        raise BadImage(f"its captions are not UTF-8: {error}") from error


def hash_files(paths: Iterable[Path]) -> Iterator[str]:
    """sha256 of the content of each file, in order; of one that cannot be read, nothing."""

    def one(path: Path) -> str:
        try:
            return sha256_file(path)
        except OSError:
            return ""

    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(one, paths)


def need_folder(path: Path | None) -> Path:
    """A folder that is there.

    Raises:
        SanaError: it is not.
    """
    if path is None or not path.is_dir():
        raise SanaError(f"data.path: no folder {path}", "give the folder that the images lie in", exit_code=2)
    return path
