"""What a source yields: an entry that is still encoded, or the reason why there is none."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sana_cli.errors import SanaError
from sana_cli.files import sha256_file

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


def inside(root: Path, name: str) -> Path:
    """The file of that name under `root`.

    Raises:
        BadImage: the name is absolute, climbs out, or leads out of `root` through a link; or there is no such file.
    """
    if not name or "\x00" in name:
        raise BadImage("not a file name")
    path = Path(name)
    if not path.parts:
        raise BadImage("not a file name")
    if path.is_absolute() or ".." in path.parts or name.startswith(("/", "\\")):
        raise BadImage("its name leads out of the source")
    full = root / path
    try:
        if not full.resolve().is_relative_to(root.resolve()):
            raise BadImage("a link that leads out of the source")
        if not full.is_file():
            raise BadImage("no such file" if not full.exists() else "not a regular file")
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from error
    except (ValueError, RuntimeError) as error:  # names that no file system takes; links in a circle
        raise BadImage("not a file name" if isinstance(error, ValueError) else "a link in a circle") from error
    return full


def split_folder(root: Path, split: str) -> Path:
    """The sub-folder of a split's name, or the folder itself where `train` has none.

    Raises:
        SanaError: there is no such split, or it is a link that leads out.
    """
    inner = root / split
    if not inner.is_dir():
        if split != "train":
            raise SanaError(f"data.split: {root} has no folder {split}", "leave it out for a folder without splits", exit_code=2)
        return root
    if not inner.resolve().is_relative_to(root.resolve()):
        raise SanaError(f"data.split: {inner} is a link that leads out of {root}", exit_code=2)
    return inner


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
