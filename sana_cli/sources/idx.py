"""MNIST, which comes with the package, and other datasets in its IDX files."""

import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sana_cli.config.keys import DataConfig
from sana_cli.errors import SanaError
from sana_cli.runtime import textfile
from sana_cli.sources.entry import Entry, need_folder

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
MAX_MAPPING_BYTES = 2**20
_EMNIST = re.compile(r"emnist-([a-z0-9]+)-.+-(?:images|labels)\b.*")
_LETTERS = 26  # the classes of emnist-letters, whose labels are 1 to 26


def _read_file(folder: Path, stem: str) -> np.ndarray:
    """The IDX file whose name begins so, plain rather than gzip where both are there."""
    found = [path for path in folder.glob(f"{stem}*") if path.is_file()]
    if not found:
        raise SanaError(
            f"data.path: {folder} has no {stem}*", "IDX files are called as MNIST's or EMNIST's, with or without .gz", exit_code=2
        )
    usual = re.compile(re.escape(stem) + r"[-.]idx\d?-ubyte(\.gz)?")  # rather than what else may lie beside it
    path = min(found, key=lambda path: (usual.fullmatch(path.name) is None, path.suffix == ".gz", path.name))
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(MAX_RAW_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise SanaError(f"{path} cannot be read: {error}") from error
    return read_idx(raw, str(path))


def _emnist_set(folder: Path, stem: str) -> str | None:
    """Which of EMNIST's sets lies in a folder: letters, balanced, ...; None if its files are called as MNIST's.

    Raises:
        SanaError: there are several.
    """
    found = {match[1] for path in folder.iterdir() if (match := _EMNIST.fullmatch(path.name))}
    sets = sorted(f"emnist-{name}" for name in found)
    sets += [f"{stem}-images*"] if any(folder.glob(f"{stem}-images*")) else []
    if found and len(sets) > 1:
        raise SanaError(
            f"data.path: {folder} has several datasets: {', '.join(sets)}", "put each into a folder of its own", exit_code=2
        )
    return found.pop() if found else None


def _emnist_names(path: Path) -> dict[int, tuple[str, ...]] | None:
    """What a mapping file calls each label: one character, or an upper-case and a lower-case one. None if there is no file.

    A line is a label and the codes of its characters: "11 75 107" for K and k.

    Raises:
        SanaError: it cannot be read, or is no mapping.
    """
    if not path.is_file():
        return None
    try:
        lines = textfile.split_lines(textfile.read(path, MAX_MAPPING_BYTES))
    except OSError as error:
        raise SanaError(f"{path} cannot be read: {error.strerror}") from error
    except textfile.NotTextError as error:
        raise SanaError(f"{path} is no text: {error}") from error
    names = dict[int, tuple[str, ...]]()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                label, *codes = map(int, line.split())
                characters = tuple(dict.fromkeys(map(chr, codes)))
            except (ValueError, OverflowError):
                characters = ()
            if not characters or not all(one.isprintable() and one.strip() for one in characters):
                raise SanaError(f"{path}: line {number} is not a label and the codes of its characters: {line!r:.60}")
            names[label] = characters
    return names


class IdxFiles:
    """A folder of IDX files like MNIST's (Fashion-MNIST, KMNIST, EMNIST): images (n, H, W) or (n, H, W, 3), and labels.

    The caption of a label, in `data.caption_template`, is its name among `data.class_names`; else its characters in EMNIST's
    mapping file, each a caption of its own; else its number. EMNIST's files hold an image column by column; it comes upright.
    """

    def __init__(self, data: DataConfig) -> None:
        self.data, folder = data, need_folder(data.path)
        stem = {"train": "train", "test": "t10k"}.get(data.split, data.split)
        self.emnist = _emnist_set(folder, stem)
        if self.emnist is not None:
            stem = f"emnist-{self.emnist}-{data.split}"
        self.images, self.labels = _read_file(folder, f"{stem}-images"), _read_file(folder, f"{stem}-labels")
        if self.images.ndim not in (3, 4) or 0 in self.images.shape or (self.images.ndim == 4 and self.images.shape[3] != 3):
            raise SanaError(f"data.path: images of shape {self.images.shape}, not (n, height, width) or (n, height, width, 3)")
        if self.labels.shape != self.images.shape[:1]:
            raise SanaError(f"data.path: {len(self.images)} images, but labels of shape {self.labels.shape}")
        self.names = self._names(folder)

    def _names(self, folder: Path) -> dict[int, tuple[str, ...]] | None:
        """What each label is called; None: by its number."""
        given, labels = self.data.class_names, np.unique(self.labels).tolist()
        if given is not None:
            first = 1 if self.emnist == "letters" and len(given) == _LETTERS else 0
            named: dict[int, tuple[str, ...]] = {label: (name,) for label, name in enumerate(given, start=first)}
            if nameless := [label for label in labels if label not in named]:
                raise SanaError(f"data.class_names: {len(given)} names, where a label is {nameless[-1]}", exit_code=2)
            return named
        path = folder / f"emnist-{self.emnist}-mapping.txt"
        names = _emnist_names(path) if self.emnist is not None else None
        if names is not None and (nameless := [label for label in labels if label not in names]):
            raise SanaError(f"{path} has no name for label {nameless[0]}", "give data.class_names instead")
        return names

    def count(self) -> int | None:
        """Images of the split."""
        return len(self.images)

    def __iter__(self) -> Iterator[Entry]:
        for index, (image, label) in enumerate(zip(self.images, self.labels.tolist(), strict=True)):
            upright = image if self.emnist is None else np.ascontiguousarray(image.swapaxes(0, 1))
            names = (str(label),) if self.names is None else self.names[label]
            captions = dict.fromkeys(self.data.caption_template.replace("{}", name) for name in names)
            yield Entry(f"{self.data.split}-{index:06d}", upright, tuple(captions), label)

    def fingerprint(self) -> dict[str, Any]:
        """The hash of images and labels, and how labels become captions."""
        digest = hashlib.sha256(self.images.data)
        digest.update(self.labels.data)
        naming: list[Any] = [self.data.caption_template, *(self.data.class_names or ())]
        found = {"source": "idx", "split": self.data.split, "sha256": digest.hexdigest(), "captions": naming}
        if self.emnist is None:
            return found
        names = None if self.names is None else [[label, *names] for label, names in sorted(self.names.items())]
        return found | {"emnist": self.emnist, "captions": [self.data.caption_template, names]}
