"""What a source yields: an entry whose image is still encoded, or the reason it was skipped."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sana_cli.errors import SanaError
from sana_cli.runtime.files import sha256_file

LABEL = "label"  # the attribute that the class of an image is
UNSEEN = "unseen"  # the attribute of a held-out image that says what of it training lacks
HASHED_AT_ONCE = 4096  # files that are handed out to threads together


class BadImage(Exception):  # noqa: N818 (it is an image)
    """An image that cannot be used. The text is the reason in `skipped.jsonl`."""


class Drawing(Protocol):
    """A picture that is drawn where it is needed, at the size that is needed. It can be pickled."""

    def draw(self, height: int, width: int) -> np.ndarray:
        """Pixels (H, W, 3) uint8, the same on every machine."""
        ...


Encoded = bytes | Path | np.ndarray | Drawing  # encoded bytes, a file, pixels (H, W[, 3]) uint8, or a drawing


@dataclass(frozen=True)
class Entry:
    """One image with its captions. Each training step samples one caption, by weight."""

    id: str  # unique within the source
    image: Encoded
    captions: tuple[str, ...]
    attributes: Mapping[str, str] = field(default_factory=dict)  # what the image shows, by name
    weights: tuple[float, ...] | None = None  # one per caption; None: equal
    says: tuple[frozenset[str], ...] | None = None  # attributes that each caption names; None: all


@dataclass(frozen=True)
class Skipped:
    """An entry or file that was not read, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Source(Protocol):
    """Images and captions in a fixed order."""

    def count(self) -> int | None:
        """Count the entries, skipped ones included. None if that needs a full read."""
        ...

    def __iter__(self) -> Iterator[Entry | Skipped]: ...

    def fingerprint(self) -> dict[str, Any]:
        """Identify the content, without paths and times."""
        ...


def hash_files(paths: Iterable[Path]) -> Iterator[str]:
    """sha256 of each file, in order; "" for a file that cannot be read."""

    def digest(path: Path) -> str:
        try:
            return sha256_file(path)
        except OSError:
            return ""

    remaining = iter(paths)
    with ThreadPoolExecutor(8) as pool:
        while some := list(islice(remaining, HASHED_AT_ONCE)):  # the pool would take all of them at once
            yield from pool.map(digest, some)


def need_folder(path: Path | None) -> Path:
    """Return the path of an existing folder.

    Raises:
        SanaError: it does not exist.
    """
    if path is None or not path.is_dir():
        raise SanaError(f"data.path: no folder {path}", "give the folder that the images lie in", exit_code=2)
    return path
