"""Sources of images and captions, and the one way an image is fitted to the size and channels asked for.

A source yields `Sample`s in a fixed order. It knows nothing of encoders, nor of how a dataset is stored.

Shapes: H W height and width in pixels, C channels.
"""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sana_cli.config import DataConfig
from sana_cli.errors import SanaError

ASSETS = Path(__file__).parent / "assets"
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Sample:
    """One image with its captions: any of them may describe it at a training step."""

    id: str
    image: Image.Image
    captions: tuple[str, ...]
    label: int | None = None


class Source(Protocol):
    """Images and captions in a fixed order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sample]: ...

    def fingerprint(self) -> dict[str, Any]:
        """What tells this source's content from another's."""
        ...


# --- MNIST ------------------------------------------------------------------------------------------------------------

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
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or raw[3] == 0:
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

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Sample]:
        for index, (image, label) in enumerate(zip(self.images, self.labels.tolist(), strict=True)):
            captions = (str(label), DIGIT_WORDS[label])
            yield Sample(f"{self.split}-{index:05d}", Image.fromarray(image), captions, label)

    def fingerprint(self) -> dict[str, Any]:
        """The source, its split and the hash of its images."""
        return {"source": "mnist", "split": self.split, "sha256": MNIST_SHA256[f"{self.stem}-images-idx3-ubyte"]}


def open_source(data: DataConfig) -> Source:
    """The source that a config names."""
    return MNIST(data.split, data.path)


# --- images -----------------------------------------------------------------------------------------------------------


def fit_image(image: Image.Image, size: tuple[int, int], channels: int) -> np.ndarray:
    """Resize (bicubic, antialiased) so that the image covers `size`, crop the centre, convert: (C, H, W) uint8."""
    height, width = size
    if channels not in (1, 3):
        raise SanaError(f"model.in_channels: images have 1 or 3 channels, not {channels}", exit_code=2)
    image = image.convert("L" if channels == 1 else "RGB")
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
