"""A finished dataset, opened, checked and read. `layout.py` says what its files hold.

Shapes: B rows asked for, C H W of an image, D width of a caption state.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sana_cli.dataset.layout import (
    FORMAT_VERSION,
    INDEX,
    SKIPPED,
    decode,
    is_dataset,
    partial_dir,
    unpack_texts,
)
from sana_cli.errors import SanaError
from sana_cli.runtime import files, records


class Dataset:
    """A finished dataset, memory-mapped: memory holds what is asked for, not the dataset.

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
        index = files.read_sealed_json(directory / INDEX)
        if index.get("format_version") != FORMAT_VERSION:
            raise SanaError(
                f"{directory}: format version {index.get('format_version')}; this sana reads version {FORMAT_VERSION}",
                "embed it again with: sana embed --overwrite",
            )
        self.index = records.checked(records.Index, index, directory / INDEX)
        counts = self.index.counts
        for kind, shards, count in (
            ("captions", self.index.captions, counts.captions),
            ("images", self.index.images, counts.images),
        ):
            if sum(shard.count for shard in shards) != count:
                raise SanaError(f"{directory / INDEX}: {kind}: its shards do not have as many as it says")
        self._captions = [self._open(shard, self._captions_fit) for shard in self.index.captions]
        self._images = [self._open(shard, self._images_fit) for shard in self.index.images]
        self._caption_starts = np.cumsum([0, *(shard.count for shard in self.index.captions)])
        self._image_starts = np.cumsum([0, *(shard.count for shard in self.index.images)])

    def _open(self, shard: records.Shard, fit: Callable[[dict[str, Tensor], int], bool]) -> dict[str, Tensor]:
        path = self.directory / shard.file
        files.check_size(path, shard.bytes)
        tensors = files.read_tensors(path)
        try:
            whole = fit(tensors, shard.count)
        except (KeyError, IndexError, RuntimeError):  # a tensor is missing or empty
            whole = False
        if not whole:
            raise self._damaged(path)
        return tensors

    def _damaged(self, path: Path) -> SanaError:
        return SanaError(
            f"{path} is damaged: its tensors are not those of a dataset",
            f"sana inspect --verify {self.directory} looks at every byte; sana embed --overwrite makes it anew",
        )

    def _captions_fit(self, tensors: dict[str, Tensor], count: int) -> bool:
        states, offsets, ends = tensors["states"], tensors["offsets"], tensors["text_offsets"]
        return (
            (states.dtype, states.shape[1:]) == (torch.bfloat16, (self.index.caption_dim,))
            and all((t.dtype, t.shape) == (torch.int64, (count + 1,)) for t in (offsets, ends))
            and bool(offsets[0] == 0 and offsets[-1] == len(states) and (offsets.diff() > 0).all())
            and bool(ends[0] == 0 and (ends.diff() >= 0).all())
            and (tensors["text"].dtype, tensors["text"].ndim) == (torch.uint8, 1)
        )

    def _images_fit(self, tensors: dict[str, Tensor], count: int) -> bool:
        kind, dtype = (
            ("images", torch.uint8) if self.index.image.kind == "pixels" else ("latents", torch.bfloat16)
        )
        samples, ids, ends = tensors[kind], tensors["caption_ids"], tensors["sample_id_offsets"]
        weights, labels = tensors.get("caption_weights"), tensors.get("labels")
        return (
            (samples.dtype, samples.shape) == (dtype, (count, *self.image_shape))
            and (ids.dtype, ids.ndim, len(ids)) == (torch.int32, 2, count)
            and (ends.dtype, ends.shape) == (torch.int64, (count + 1,))
            and (tensors["sample_ids"].dtype, tensors["sample_ids"].ndim) == (torch.uint8, 1)
            and (weights is None or (weights.dtype, weights.shape) == (torch.float32, ids.shape))
            and (labels is None or (labels.dtype in (torch.int16, torch.int32) and labels.shape == (count,)))
        )

    def __len__(self) -> int:
        return self.index.counts.images

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a sample."""
        return self.index.image.shape

    @property
    def bytes(self) -> int:
        """Size of the shards on disk."""
        return sum(shard.bytes for shard in self.index.shards)

    def verify(self) -> Iterator[str]:
        """Compare every file with the index, byte for byte; yields the name of each whole file.

        Raises:
            SanaError: naming the damaged file.
        """
        yield INDEX  # its own hash was checked when it was read
        for shard in self.index.shards:
            files.check_hash(self.directory / shard.file, shard.sha256)
            yield shard.file
        if self.index.counts.skipped:
            files.check_hash(self.directory / SKIPPED, self.index.skipped_sha256 or "")
            yield SKIPPED

    def skipped(self) -> Iterator[records.LeftOut]:
        """The entries that were left out."""
        if self.index.counts.skipped:
            path = self.directory / SKIPPED
            with path.open(encoding="utf-8") as file:
                yield from (records.checked(records.LeftOut, json.loads(line), path) for line in file)

    def states(self, caption_ids: Iterable[int]) -> list[Tensor]:
        """The states (tokens, D) of each caption.

        Raises:
            SanaError: there is no such caption, so a file is damaged.
        """
        found, wanted = [], list(caption_ids)
        if any(not 0 <= number < self._caption_starts[-1] for number in wanted):
            raise self._damaged(self.directory)
        for shard, row in _locate(self._captions, self._caption_starts, wanted):
            start, end = shard["offsets"][row : row + 2].tolist()
            found.append(shard["states"][start:end])
        return found

    def longest_caption(self) -> int:
        """Tokens of the longest caption."""
        return max(
            int(shard["offsets"].diff().max()) for shard in self._captions if len(shard["offsets"]) > 1
        )

    def texts(self) -> list[str]:
        """All captions, by id."""
        return [
            text for shard in self._captions for text in unpack_texts(shard["text"], shard["text_offsets"])
        ]

    def _rows(self, rows: np.ndarray) -> Iterator[tuple[dict[str, Tensor], int]]:
        return _locate(self._images, self._image_starts, rows)

    def images(self, rows: np.ndarray) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], or latents as the transformer sees them, float32."""
        if self.index.image.kind == "latents":
            return torch.stack([shard["latents"][row] for shard, row in self._rows(rows)]).float()
        return self.pixels(rows).float() / 127.5 - 1

    def pixels(self, rows: np.ndarray) -> Tensor:
        """Images (B, C, H, W) as they are stored, uint8."""
        return torch.stack([shard["images"][row] for shard, row in self._rows(rows)])

    def caption_ids(self, rows: np.ndarray) -> list[list[int]]:
        """The ids of each image's captions, at least one."""
        found = [[i for i in shard["caption_ids"][row].tolist() if i >= 0] for shard, row in self._rows(rows)]
        if not all(found):
            raise self._damaged(self.directory)
        return found

    def caption_weights(self, rows: np.ndarray) -> list[list[float] | None]:
        """The weights of each image's captions, in the same order; None where all are equal."""
        return [
            shard["caption_weights"][row][shard["caption_ids"][row] >= 0].tolist()
            if "caption_weights" in shard
            else None
            for shard, row in self._rows(rows)
        ]

    def labels(self) -> Tensor | None:
        """All labels (n,), if the source had them."""
        if not all("labels" in shard for shard in self._images):
            return None
        return torch.cat([shard["labels"] for shard in self._images])

    def sample_ids(self, rows: np.ndarray) -> list[str]:
        """The source's name of each image."""
        names = []
        for shard, row in self._rows(rows):
            start, end = shard["sample_id_offsets"][row : row + 2].tolist()
            names.append(decode(shard["sample_ids"][start:end].numpy().tobytes()))
        return names


def _locate(
    shards: Sequence[dict[str, Tensor]], starts: np.ndarray, rows: Sequence[int] | np.ndarray
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """The shard of each row, and the row inside it; `starts` are the first rows of shards."""
    numbers = np.searchsorted(starts, rows, side="right") - 1
    for number, row in zip(numbers, rows, strict=True):
        yield shards[number], int(row - starts[number])
