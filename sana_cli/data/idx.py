"""MNIST, which comes with the package, and other datasets in its IDX files."""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sana_cli.config import DataConfig
from sana_cli.data.entry import Entry, need_folder
from sana_cli.errors import SanaError

ASSETS = Path(__file__).parent.parent / "assets"
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


# sha256 of the raw (decompressed) canonical files by Yann LeCun, Corinna Cortes and Christopher Burges (CC BY-SA 3.0)
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MNIST_RAW_BYTES = 47_040_016  # the largest of the four


def read_idx(raw: bytes, name: str) -> np.ndarray:
    """An array from the bytes of an IDX file of unsigned bytes.

    The header is two zero bytes, the type (8), the number of dimensions, and each dimension as four bytes, big end first.

    Raises:
        SanaError: anything else, or more or fewer bytes than the header says.
    """
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or not 1 <= raw[3] <= 4:
        raise SanaError(f"{name} is not an IDX file of unsigned bytes: it begins with {raw[:4].hex(' ')!r}")
    header = 4 + 4 * raw[3]
    if len(raw) < header:
        raise SanaError(f"{name} is truncated: its header needs {header} bytes, found {len(raw)}")
    shape = tuple(int.from_bytes(raw[at : at + 4], "big") for at in range(4, header, 4))
    count = int(np.prod(shape, dtype=object))
    if len(raw) != header + count:
        raise SanaError(f"{name}: its header says {shape}, {header + count:,} bytes in all, but it has {len(raw):,}")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def _mnist_file(folder: Path, stem: str) -> np.ndarray:
    path = folder / f"{stem}.gz"
    try:
        with gzip.open(path) as file:
            raw = file.read(MNIST_RAW_BYTES + 1)  # bounded, whatever the file claims
    except FileNotFoundError as error:
        raise SanaError(
            f"{path} is missing", "data.path for mnist is a folder with MNIST's four .gz files; null uses those of the package"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise SanaError(f"{path} is not a whole gzip file: {error}") from error
    if hashlib.sha256(raw).hexdigest() != MNIST_SHA256[stem]:
        raise SanaError(f"{path} is damaged: its content is not MNIST's {stem}")
    return read_idx(raw, str(path))


class MNIST:
    """The 28x28 grey digits. Each has two captions, its numeral and its English word: "4" and "four"."""

    def __init__(self, split: str, folder: Path | None = None) -> None:
        self.split = split
        self.stem = {"train": "train", "test": "t10k"}[split]
        folder = folder or ASSETS
        self.images = _mnist_file(folder, f"{self.stem}-images-idx3-ubyte")  # (n, 28, 28)
        self.labels = _mnist_file(folder, f"{self.stem}-labels-idx1-ubyte")  # (n,)

    def count(self) -> int | None:
        """Images of the split."""
        return len(self.images)

    def __iter__(self) -> Iterator[Entry]:
        for index, (image, label) in enumerate(zip(self.images, self.labels.tolist(), strict=True)):
            captions = (str(label), DIGIT_WORDS[label])
            yield Entry(f"{self.split}-{index:05d}", image, captions, label)

    def fingerprint(self) -> dict[str, Any]:
        """The source, its split and the hash of its images."""
        return {"source": "mnist", "split": self.split, "sha256": MNIST_SHA256[f"{self.stem}-images-idx3-ubyte"]}


MAX_RAW_BYTES = 8 * 2**30


def _read_file(folder: Path, pattern: str) -> np.ndarray:
    """The IDX file, plain or gzip, that a pattern finds."""
    found = sorted(path for path in folder.glob(pattern) if path.is_file())
    if not found:
        raise SanaError(
            f"data.path: {folder} has no {pattern}", "IDX files are called as MNIST's, with or without .gz", exit_code=2
        )
    try:
        with gzip.open(found[0]) if found[0].suffix == ".gz" else found[0].open("rb") as file:
            raw = file.read(MAX_RAW_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise SanaError(f"{found[0]} cannot be read: {error}") from error
    return read_idx(raw, str(found[0]))


class IdxFiles:
    """A folder of IDX files like MNIST's (Fashion-MNIST, KMNIST, EMNIST): images (n, H, W) or (n, H, W, 3), and labels.

    The caption of a label is its name among `data.class_names`, or its number, in `data.caption_template`.
    """

    def __init__(self, data: DataConfig) -> None:
        self.data, folder = data, need_folder(data.path)
        stem = {"train": "train", "test": "t10k"}.get(data.split, data.split)
        self.images, self.labels = _read_file(folder, f"{stem}-images*"), _read_file(folder, f"{stem}-labels*")
        if self.images.ndim not in (3, 4) or 0 in self.images.shape or (self.images.ndim == 4 and self.images.shape[3] != 3):
            raise SanaError(f"data.path: images of shape {self.images.shape}, not (n, height, width) or (n, height, width, 3)")
        if self.labels.shape != self.images.shape[:1]:
            raise SanaError(f"data.path: {len(self.images)} images, but labels of shape {self.labels.shape}")
        most = int(self.labels.max(initial=0))
        if data.class_names is not None and most >= len(data.class_names):
            raise SanaError(f"data.class_names: {len(data.class_names)} names, where a label is {most}", exit_code=2)

    def count(self) -> int | None:
        """Images of the split."""
        return len(self.images)

    def __iter__(self) -> Iterator[Entry]:
        names = self.data.class_names
        for index, (image, label) in enumerate(zip(self.images, self.labels.tolist(), strict=True)):
            caption = self.data.caption_template.replace("{}", str(label) if names is None else names[label])
            yield Entry(f"{self.data.split}-{index:06d}", image, (caption,), label)

    def fingerprint(self) -> dict[str, Any]:
        """The hash of images and labels, and how labels become captions."""
        digest = hashlib.sha256(self.images.data)
        digest.update(self.labels.data)
        naming = [self.data.caption_template, *(self.data.class_names or ())]
        return {"source": "idx", "split": self.data.split, "sha256": digest.hexdigest(), "captions": naming}
