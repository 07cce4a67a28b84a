"""MNIST, which comes with the package, and other datasets in IDX files."""

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
from sana_cli.sources.entry import LABEL, Entry, need_folder

ASSETS = Path(__file__).parent.parent / "assets"
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# sha256 of the decompressed original files by Yann LeCun, Corinna Cortes and Christopher Burges
# (CC BY-SA 3.0)
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MNIST_RAW_BYTES = 47_040_016  # the largest of the four
MAX_RAW_BYTES = 8 * 2**30
MAX_MAPPING_BYTES = 2**20


def read_idx(raw: bytes, name: str) -> np.ndarray:
    """Parse an IDX file of unsigned bytes.

    The header is two zero bytes, the type (8), the number of dimensions, and each dimension in
    four bytes, big-endian.

    Raises:
        SanaError: it is another format, or its length differs from what the header says.
    """
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or not 1 <= raw[3] <= 4:
        raise SanaError(f"{name} is not an IDX file of unsigned bytes: it begins with {raw[:4].hex(' ')!r}")
    header = 4 + 4 * raw[3]
    if len(raw) < header:
        raise SanaError(f"{name} is truncated: its header needs {header} bytes, found {len(raw)}")
    shape = tuple(int.from_bytes(raw[at : at + 4], "big") for at in range(4, header, 4))
    count = int(np.prod(shape, dtype=object))
    if len(raw) != header + count:
        expected = f"{shape}, {header + count:,} bytes in all"
        raise SanaError(f"{name}: its header says {expected}, but it has {len(raw):,}")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def _mnist_file(folder: Path, stem: str) -> np.ndarray:
    """Read one of MNIST's files and check its hash."""
    path = folder / f"{stem}.gz"
    try:
        with gzip.open(path) as file:
            raw = file.read(MNIST_RAW_BYTES + 1)  # limits a decompression bomb
    except FileNotFoundError as error:
        raise SanaError(
            f"{path} is missing",
            "data.path for mnist is a folder with MNIST's four .gz files; null uses those of the package",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise SanaError(f"{path} is not a whole gzip file: {error}") from error
    if hashlib.sha256(raw).hexdigest() != MNIST_SHA256[stem]:
        raise SanaError(f"{path} is damaged: its content is not MNIST's {stem}")
    return read_idx(raw, str(path))


class MNIST:
    """28x28 grey digits with two captions each, a numeral and an English word: "4", "four"."""

    def __init__(self, split: str, folder: Path | None = None) -> None:
        self.split = split
        self.stem = {"train": "train", "test": "t10k"}[split]
        folder = folder or ASSETS
        self.images = _mnist_file(folder, f"{self.stem}-images-idx3-ubyte")  # (n, 28, 28)
        self.labels = _mnist_file(folder, f"{self.stem}-labels-idx1-ubyte")  # (n,)

    def count(self) -> int | None:
        """Count the images of the split."""
        return len(self.images)

    def __iter__(self) -> Iterator[Entry]:
        for index, (image, label) in enumerate(zip(self.images, self.labels.tolist(), strict=True)):
            captions = (str(label), DIGIT_WORDS[label])
            yield Entry(f"{self.split}-{index:05d}", image, captions, {LABEL: str(label)})

    def fingerprint(self) -> dict[str, Any]:
        """The source, its split and the hash of its images."""
        digest = MNIST_SHA256[f"{self.stem}-images-idx3-ubyte"]
        return {"source": "mnist", "split": self.split, "sha256": digest}


_EMNIST = re.compile(r"emnist-([a-z0-9]+)-.+-(?:images|labels)\b.*")
_LETTERS = 26  # classes of emnist-letters, with labels 1 to 26


def _read_file(folder: Path, stem: str) -> np.ndarray:
    """Read the IDX file whose name begins with `stem`; prefer a plain file to gzip."""
    found = [path for path in folder.glob(f"{stem}*") if path.is_file()]
    if not found:
        raise SanaError(
            f"data.path: {folder} has no {stem}*",
            "IDX files have the names of MNIST's or EMNIST's, with or without .gz",
            exit_code=2,
        )
    usual = re.compile(re.escape(stem) + r"[-.]idx\d?-ubyte(\.gz)?")  # preferred to other matches
    path = min(found, key=lambda path: (usual.fullmatch(path.name) is None, path.suffix == ".gz", path.name))
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(MAX_RAW_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise SanaError(f"{path} cannot be read: {error}") from error
    return read_idx(raw, str(path))


def _emnist_set(folder: Path, stem: str) -> str | None:
    """The EMNIST set in a folder (letters, balanced, ...); None if files are named as MNIST's.

    Raises:
        SanaError: the folder has several sets.
    """
    found = {match[1] for path in folder.iterdir() if (match := _EMNIST.fullmatch(path.name))}
    sets = sorted(f"emnist-{name}" for name in found)
    sets += [f"{stem}-images*"] if any(folder.glob(f"{stem}-images*")) else []
    if found and len(sets) > 1:
        raise SanaError(
            f"data.path: {folder} has several datasets: {', '.join(sets)}",
            "put each into a folder of its own",
            exit_code=2,
        )
    return found.pop() if found else None


def _emnist_names(path: Path) -> dict[int, tuple[str, ...]] | None:
    """Read a mapping file: label -> its characters, one or two (upper and lower case).

    A line is a label and the codes of its characters: "11 75 107" for K and k. None without a
    file.

    Raises:
        SanaError: the file cannot be read, or is not a mapping.
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
                raise SanaError(
                    f"{path}: line {number} is not a label and the codes of its characters: {line!r:.60}"
                )
            names[label] = characters
    return names


class IdxFiles:
    """A folder of IDX files like MNIST's (Fashion-MNIST, KMNIST, EMNIST).

    Images are (n, H, W) or (n, H, W, 3), and labels (n,). A label fills `data.caption_template`
    with its name in `data.class_names`, else with each of its characters in EMNIST's mapping
    file (one caption each), else with its number. EMNIST stores images transposed; they are
    turned upright.
    """

    def __init__(self, data: DataConfig) -> None:
        self.data, folder = data, need_folder(data.path)
        stem = {"train": "train", "test": "t10k"}.get(data.split, data.split)
        self.emnist = _emnist_set(folder, stem)
        if self.emnist is not None:
            stem = f"emnist-{self.emnist}-{data.split}"
        self.images, self.labels = _read_file(folder, f"{stem}-images"), _read_file(folder, f"{stem}-labels")
        shape = self.images.shape
        if 0 in shape or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
            raise SanaError(
                f"data.path: images of shape {shape}, not (n, height, width) or (n, height, width, 3)"
            )
        if self.labels.shape != shape[:1]:
            raise SanaError(f"data.path: {len(self.images)} images, but labels of shape {self.labels.shape}")
        self.names = self._names(folder)

    def _names(self, folder: Path) -> dict[int, tuple[str, ...]] | None:
        """Map labels to names; None: use their numbers."""
        given, labels = self.data.class_names, np.unique(self.labels).tolist()
        if given is not None:
            first = 1 if self.emnist == "letters" and len(given) == _LETTERS else 0
            named: dict[int, tuple[str, ...]] = dict(enumerate(((name,) for name in given), start=first))
            if nameless := [label for label in labels if label not in named]:
                raise SanaError(
                    f"data.class_names: {len(given)} names, but a label is {nameless[-1]}", exit_code=2
                )
            return named
        path = folder / f"emnist-{self.emnist}-mapping.txt"
        names = _emnist_names(path) if self.emnist is not None else None
        if names is not None and (nameless := [label for label in labels if label not in names]):
            raise SanaError(f"{path} has no name for label {nameless[0]}", "give data.class_names instead")
        return names

    def count(self) -> int | None:
        """Count the images of the split."""
        return len(self.images)

    def __iter__(self) -> Iterator[Entry]:
        for index, (image, label) in enumerate(zip(self.images, self.labels.tolist(), strict=True)):
            upright = image if self.emnist is None else np.ascontiguousarray(image.swapaxes(0, 1))
            names = (str(label),) if self.names is None else self.names[label]
            captions = dict.fromkeys(self.data.caption_template.replace("{}", name) for name in names)
            named = {LABEL: " or ".join(names)}
            yield Entry(f"{self.data.split}-{index:06d}", upright, tuple(captions), named)

    def fingerprint(self) -> dict[str, Any]:
        """Hash images and labels, and record how labels become captions."""
        digest = hashlib.sha256(self.images.data)
        digest.update(self.labels.data)
        naming: list[Any] = [self.data.caption_template, *(self.data.class_names or ())]
        found = {"source": "idx", "split": self.data.split, "sha256": digest.hexdigest(), "captions": naming}
        if self.emnist is None:
            return found
        names = self.names and [[label, *names] for label, names in sorted(self.names.items())]
        return found | {"emnist": self.emnist, "captions": [self.data.caption_template, names]}
