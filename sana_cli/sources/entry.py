"""What a source yields: an entry whose image is still encoded, or the reason it was skipped."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sana_cli.errors import SanaError
from sana_cli.runtime.files import sha256_file


class BadImage(Exception):  # noqa: N818 (it is an image)
    """An image that cannot be used. The text is the reason in `skipped.jsonl`."""


@dataclass(frozen=True)
class Entry:
    """One image with its captions. Each training step samples one caption, by weight."""

    id: str  # unique within the source
    image: bytes | Path | np.ndarray  # encoded bytes, a file, or pixels (H, W) or (H, W, 3) uint8
    captions: tuple[str, ...]
    label: int | None = None
    weights: tuple[float, ...] | None = None  # one per caption; None: equal


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

    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(digest, paths)


def need_folder(path: Path | None) -> Path:
    """Return the path of an existing folder.

    Raises:
        SanaError: it does not exist.
    """
    if path is None or not path.is_dir():
        raise SanaError(f"data.path: no folder {path}", "give the folder that the images lie in", exit_code=2)
    return path
