"""The pre-embedded dataset on disk: write it, verify it, read it.

    index.json                  written last, knows its own hash: counts, fingerprints, the shards with their hashes
    captions-00000.safetensors  states (tokens, D) bf16 end to end without padding, offsets (n + 1,), and the texts
    images-00000.safetensors    images (n, C, H, W) uint8 or latents (n, C, H, W) bf16, caption_ids (n, k), labels, sample ids

Every distinct caption is stored once. A dataset is written into a sibling `<name>.partial/` and renamed when whole. It
knows nothing of encoders or sources: their fingerprints pass through as dictionaries.

Shapes: n rows of a shard, k captions of an image at most, C H W of an image, D width of a caption state.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana_cli import files
from sana_cli.errors import SanaError

FORMAT_VERSION = 1
WINDOW = 16384  # images of a shard
INDEX = "index.json"

# what the lesson stores: one array of 300 x 2304 float32 for each image, padding included
LESSON_BYTES_PER_IMAGE = 300 * 2304 * 4


def partial_dir(directory: Path) -> Path:
    """Where a dataset lies until it is whole."""
    return directory.with_name(directory.name + ".partial")


def is_dataset(directory: Path) -> bool:
    """Whether a finished dataset lies here."""
    return (directory / INDEX).is_file()


def _pack_texts(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """UTF-8 bytes end to end, and (n + 1,) offsets into them."""
    encoded = [text.encode("utf-8", errors="surrogatepass") for text in texts]
    offsets = torch.tensor([0, *accumulate(map(len, encoded))], dtype=torch.int64)
    return torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)[: int(offsets[-1])], offsets


def _unpack_texts(joined: Tensor, offsets: Tensor) -> list[str]:
    raw, ends = joined.numpy().tobytes(), offsets.tolist()
    return [raw[a:b].decode("utf-8", errors="surrogatepass") for a, b in pairwise(ends)]


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass
class DatasetWriter:
    """Writes shards into `folder`; `finish` writes the index. Caption ids run on through the shards, by first appearance."""

    folder: Path
    caption_ids: dict[str, int] = field(default_factory=dict)
    caption_shards: list[dict[str, Any]] = field(default_factory=list)
    image_shards: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0

    def add_captions(self, states: Mapping[str, Tensor]) -> None:
        """A shard of captions that were not there yet, in this order, each with its states (tokens, D)."""
        for caption in states:
            assert caption not in self.caption_ids
            self.caption_ids[caption] = len(self.caption_ids)
        text, text_offsets = _pack_texts(list(states))
        offsets = torch.tensor([0, *accumulate(map(len, states.values()))], dtype=torch.int64)
        self.tokens += int(offsets[-1])
        self._write(
            "captions",
            self.caption_shards,
            len(states),
            {"states": torch.cat(list(states.values())), "offsets": offsets, "text": text, "text_offsets": text_offsets},
        )

    def add_images(
        self, sample_ids: Sequence[str], images: Tensor, captions: Sequence[Sequence[str]], labels: Sequence[int | None]
    ) -> None:
        """A shard of images (n, C, H, W), uint8, or bf16 if they are latents, whose captions are all there."""
        most = max(map(len, captions))
        rows = [[self.caption_ids[caption] for caption in row] + [-1] * (most - len(row)) for row in captions]
        joined, offsets = _pack_texts(sample_ids)
        tensors = {
            "images" if images.dtype == torch.uint8 else "latents": images,
            "caption_ids": torch.tensor(rows, dtype=torch.int32),
            "sample_ids": joined,
            "sample_id_offsets": offsets,
        }
        if all(label is not None for label in labels):
            tensors["labels"] = torch.tensor(labels, dtype=torch.int16)
        self._write("images", self.image_shards, len(images), tensors)

    def _write(self, kind: str, shards: list[dict[str, Any]], count: int, tensors: Mapping[str, Tensor]) -> None:
        path = self.folder / f"{kind}-{len(shards):05d}.safetensors"
        files.write_tensors(path, tensors)
        shards.append({"file": path.name, "count": count, "bytes": path.stat().st_size, "sha256": files.sha256_file(path)})

    def finish(self, image: Mapping[str, Any], encoder: Mapping[str, Any], source: Mapping[str, Any], dim: int) -> None:
        """Write the index: after it, and not before, this is a dataset."""
        words = all(len(caption.split()) == 1 for caption in self.caption_ids if caption)
        index = {
            "format_version": FORMAT_VERSION,
            "counts": {
                "images": sum(shard["count"] for shard in self.image_shards),
                "captions": len(self.caption_ids),
                "tokens": self.tokens,
            },
            "image": dict(image),
            "caption_dim": dim,
            "one_word_captions": words,
            "null_caption": self.caption_ids[""],
            "encoder": dict(encoder),
            "source": dict(source),
            "captions": self.caption_shards,
            "images": self.image_shards,
        }
        files.write_sealed_json(self.folder / INDEX, index)


# --- reading ----------------------------------------------------------------------------------------------------------


class Dataset:
    """A finished dataset, memory-mapped: what is in memory is what was asked for, not the dataset.

    Raises:
        SanaError: there is none, it is of another version, or a file is missing, truncated or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not is_dataset(directory):
            lines = [f"no dataset in {directory}"]
            if partial_dir(directory).is_dir():
                lines.append(f"{partial_dir(directory)} is unfinished work: an embed that was stopped")
            raise SanaError(*lines, "make one with: sana embed (with the same --config)")
        self.index = files.read_sealed_json(directory / INDEX)
        if self.index["format_version"] != FORMAT_VERSION:
            raise SanaError(
                f"{directory}: format version {self.index['format_version']}; this sana reads version {FORMAT_VERSION}",
                "embed it again with: sana embed --overwrite",
            )
        self._captions = [self._open(shard) for shard in self.index["captions"]]
        self._images = [self._open(shard) for shard in self.index["images"]]
        self._caption_starts = np.cumsum([0, *(shard["count"] for shard in self.index["captions"])])
        self._image_starts = np.cumsum([0, *(shard["count"] for shard in self.index["images"])])

    def _open(self, shard: Mapping[str, Any]) -> dict[str, Tensor]:
        path = self.directory / shard["file"]
        files.check_size(path, shard["bytes"])
        return files.read_tensors(path)

    def __len__(self) -> int:
        return int(self.index["counts"]["images"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a sample."""
        image = self.index["image"]
        return image["channels"], image["height"], image["width"]

    @property
    def bytes(self) -> int:
        """Size on disk of the shards."""
        return sum(shard["bytes"] for shard in (*self.index["captions"], *self.index["images"]))

    def verify(self) -> Iterator[str]:
        """Compare every file with the index, byte for byte; yields the name of each as it is found whole.

        Raises:
            SanaError: naming the damaged file.
        """
        yield INDEX  # its own hash was checked when it was read
        for shard in (*self.index["captions"], *self.index["images"]):
            files.check_hash(self.directory / shard["file"], shard["sha256"])
            yield shard["file"]

    def states(self, caption_ids: Iterable[int]) -> list[Tensor]:
        """The states (tokens, D) of each caption."""
        found = []
        for shard, row in _locate(self._captions, self._caption_starts, list(caption_ids)):
            start, end = shard["offsets"][row : row + 2].tolist()
            found.append(shard["states"][start:end])
        return found

    def texts(self) -> list[str]:
        """All captions, by id."""
        return [text for shard in self._captions for text in _unpack_texts(shard["text"], shard["text_offsets"])]

    def _rows(self, rows: np.ndarray) -> Iterator[tuple[dict[str, Tensor], int]]:
        return _locate(self._images, self._image_starts, rows)

    def images(self, rows: np.ndarray) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], or latents as the transformer sees them, float32."""
        if self.index["image"]["kind"] == "latents":
            return torch.stack([shard["latents"][row] for shard, row in self._rows(rows)]).float()
        return torch.stack([shard["images"][row] for shard, row in self._rows(rows)]).float() / 127.5 - 1

    def caption_ids(self, rows: np.ndarray) -> list[list[int]]:
        """The ids of each image's captions."""
        return [[i for i in shard["caption_ids"][row].tolist() if i >= 0] for shard, row in self._rows(rows)]

    def labels(self) -> Tensor | None:
        """All labels (n,), where the source had them."""
        if not all("labels" in shard for shard in self._images):
            return None
        return torch.cat([shard["labels"] for shard in self._images])

    def sample_ids(self, rows: np.ndarray) -> list[str]:
        """The source's name of each image."""
        names = []
        for shard, row in self._rows(rows):
            start, end = shard["sample_id_offsets"][row : row + 2].tolist()
            names.append(shard["sample_ids"][start:end].numpy().tobytes().decode("utf-8", errors="surrogatepass"))
        return names


def _locate(
    shards: Sequence[dict[str, Tensor]], starts: np.ndarray, rows: Sequence[int] | np.ndarray
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """The shard that each row of the whole lies in, and its place there; `starts` is where each shard begins."""
    numbers = np.searchsorted(starts, rows, side="right") - 1
    for number, row in zip(numbers, rows, strict=True):
        yield shards[number], int(row - starts[number])


def sample_rows(first: int, count: int, length: int, seed: int) -> np.ndarray:
    """The rows that samples `first`.. `first + count` of a training run are: each epoch a permutation of its own.

    A pure function of its arguments: the order needs no state to be resumed, and batches run on over the epochs' ends.
    """
    positions = np.arange(first, first + count)
    rows = np.empty(count, dtype=np.int64)
    for epoch in np.unique(positions // length):
        inside = positions // length == epoch
        rows[inside] = _permutation(length, seed, int(epoch))[positions[inside] % length]
    return rows


@lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(length)
