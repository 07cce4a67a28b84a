"""A finished dataset, opened, checked and read. `layout.py` says what its files hold.

Shapes: B rows asked for, C H W of an image, D width of a caption state.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
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

S = TypeVar("S", bound=records.Shard)
Tensors = dict[str, Tensor]  # of a shard, by name
MOST_OPEN = 1024  # shards of a kind in a dataset; Linux lets a process map 65,530 files


class _Shards:
    """The tensors of shards of one kind, by number, checked when they are read.

    The MOST_OPEN that were read last stay mapped. Threads may share it.
    """

    def __init__(self, directory: Path, entries: Sequence[S], fit: Callable[[Tensors, S], bool]) -> None:
        self.entries = entries

        @lru_cache(MOST_OPEN)
        def read(number: int) -> Tensors:
            path = directory / entries[number].file
            tensors = files.read_tensors(path)
            try:
                whole = fit(tensors, entries[number])
            except (KeyError, IndexError, RuntimeError):  # a tensor is missing or empty
                whole = False
            if not whole:
                raise _damaged(path, directory)
            return tensors

        self._read = read

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Tensors:
        return self._read(int(number))  # the cache takes a NumPy integer for another key

    def __iter__(self) -> Iterator[Tensors]:
        return map(self._read, range(len(self.entries)))


class Dataset:
    """A finished dataset, memory-mapped: memory holds what is asked for, not the dataset.

    That every file is there in its full size is checked at once, and its tensors when it is first read. Of
    MOST_OPEN shards or fewer, all are read at once.

    Raises:
        SanaError: there is none, it is of another version, or a file is missing, truncated or damaged.
            So does reading a shard that is found to be damaged then.
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
        for entry in self.index.shards:
            files.check_size(directory / entry.file, entry.bytes)
        self._captions = _Shards(directory, self.index.captions, partial(_captions_fit, self.index))
        self._images = _Shards(directory, self.index.images, partial(_images_fit, self.index))
        for opened in (self._captions, self._images):
            if len(opened) <= MOST_OPEN:
                deque(opened, maxlen=0)
        self.shapes = self.index.shapes  # with the number of images of each, largest shape first
        numbers = {shape: number for number, shape in enumerate(self.shapes)}
        channels = self.index.image.channels
        of_shards = [numbers[channels, shard.height, shard.width] for shard in self.index.images]
        self._shape_numbers = np.array(of_shards, dtype=np.int64)
        self._caption_starts = np.cumsum([0, *(shard.count for shard in self.index.captions)])
        self._image_starts = np.cumsum([0, *(shard.count for shard in self.index.images)])

    def __len__(self) -> int:
        return self.index.counts.images

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a sample: of several shapes the most common one."""
        return self.index.image.shape

    @property
    def bytes(self) -> int:
        """Size of the shards on disk."""
        return sum(shard.bytes for shard in self.index.shards)

    def verify(self) -> Iterator[str]:
        """Compare every file with the index, byte for byte, and check its tensors; yields the name of each.

        Raises:
            SanaError: naming the damaged file.
        """
        yield INDEX  # its own hash was checked when it was read
        for opened in (self._captions, self._images):
            for number, entry in enumerate(opened.entries):
                files.check_hash(self.directory / entry.file, entry.sha256)
                opened[number]  # its tensors are checked
                yield entry.file
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
            raise _damaged(self.directory, self.directory)
        for shard, row in _locate(self._captions, self._caption_starts, wanted):
            start, end = shard["offsets"][row : row + 2].tolist()
            found.append(shard["states"][start:end])
        return found

    def shared_states(self, caption_ids: Sequence[int]) -> list[Tensor]:
        """The same, where captions that are alike share a tensor, as a sampler can tell by it."""
        distinct = sorted(set(caption_ids))
        found = dict(zip(distinct, self.states(distinct), strict=True))
        return [found[caption] for caption in caption_ids]

    def longest_caption(self) -> int:
        """Tokens of the longest caption."""
        if self.index.counts.longest is not None:
            return self.index.counts.longest
        return max(
            int(shard["offsets"].diff().max()) for shard in self._captions if len(shard["offsets"]) > 1
        )

    def texts(self, most: int | None = None) -> list[str]:
        """All captions by id, or the first `most` of them."""
        every = (unpack_texts(shard["text"], shard["text_offsets"]) for shard in self._captions)
        return list(islice(chain.from_iterable(every), most))

    def _rows(self, rows: np.ndarray) -> Iterator[tuple[Tensors, int]]:
        return _locate(self._images, self._image_starts, rows)

    def images(self, rows: np.ndarray) -> Tensor:
        """Images (B, C, H, W) of one shape in [-1, 1], or latents as the transformer sees them, float32."""
        if self.index.image.kind == "latents":
            return self._stacked("latents", rows).float()
        return self.pixels(rows).float() / 127.5 - 1

    def pixels(self, rows: np.ndarray) -> Tensor:
        """Images (B, C, H, W) of one shape as they are stored, uint8."""
        return self._stacked("images", rows)

    def _stacked(self, name: str, rows: np.ndarray) -> Tensor:
        """Rows of one shape.

        Raises:
            SanaError: they have several.
        """
        if len(self.shapes) > 1 and len(set(self.shape_numbers(rows).tolist())) > 1:
            raise SanaError(
                f"{self.directory} has images of {len(self.shapes)} shapes, and here all must have one",
                "embed them with data.image_size and without data.buckets, into another data.dir",
            )
        return torch.stack([shard[name][row] for shard, row in self._rows(rows)])

    def shape_numbers(self, rows: np.ndarray) -> np.ndarray:
        """Which of `shapes` each row has, (B,)."""
        shards = np.searchsorted(self._image_starts, rows, side="right") - 1
        found: np.ndarray = self._shape_numbers[shards]
        return found

    def rows_of_shape(self, number: int, places: np.ndarray) -> np.ndarray:
        """The rows (B,) of images by their places among those of a shape, in the order of rows."""
        shards = np.flatnonzero(self._shape_numbers == number)
        starts = self._image_starts[shards]
        ends = np.cumsum(self._image_starts[shards + 1] - starts)
        which = np.searchsorted(ends, places, side="right")
        rows: np.ndarray = self._image_starts[shards + 1][which] - (ends[which] - places)
        return rows

    def original_sizes(self) -> Iterator[tuple[int, np.ndarray]]:
        """For each shard its first row, and height and width of its images before they were fitted, (n, 2)."""
        for first, shard in zip(self._image_starts, self._images, strict=False):
            yield int(first), shard["original_sizes"].clone().numpy()  # else its file would stay mapped

    def caption_ids(self, rows: np.ndarray) -> list[list[int]]:
        """The ids of each image's captions, at least one."""
        found = [[i for i in shard["caption_ids"][row].tolist() if i >= 0] for shard, row in self._rows(rows)]
        if not all(found) or any(max(ids) >= self._caption_starts[-1] for ids in found):
            raise _damaged(self.directory, self.directory)
        return found

    def caption_weights(self, rows: np.ndarray) -> list[list[float] | None]:
        """The weights of each image's captions, in the same order; None where all are equal."""
        return [
            shard["caption_weights"][row][shard["caption_ids"][row] >= 0].tolist()
            if "caption_weights" in shard
            else None
            for shard, row in self._rows(rows)
        ]

    @property
    def attributes(self) -> dict[str, list[str]]:
        """The values of each named attribute, in the order of their numbers."""
        return self.index.attributes

    def attribute_ids(self, rows: np.ndarray | None = None) -> Tensor:
        """The number of each image's value of each attribute (B, a); -1 where an image has none.

        `rows` None: of all images.
        """
        columns = len(self.attributes)
        if rows is None:
            parts = [
                shard.get("attributes", torch.empty(entry.count, 0, dtype=torch.int32)).clone()
                for shard, entry in zip(self._images, self.index.images, strict=True)
            ]
        else:
            none = torch.empty(0, dtype=torch.int32)
            parts = [
                (shard["attributes"][row] if "attributes" in shard else none)[None]
                for shard, row in self._rows(rows)
            ]
        padded = [F.pad(part, (0, columns - part.shape[1]), value=-1) for part in parts]
        return torch.cat(padded).long() if padded else torch.empty(0, columns, dtype=torch.long)

    def caption_attributes(self, rows: np.ndarray) -> list[list[list[str]]]:
        """The names of the attributes that each image's captions name, in the same order."""
        names, found = list(self.attributes), []
        for shard, row in self._rows(rows):
            here = range(shard["attributes"].shape[1] if "attributes" in shard else 0)
            shown = [names[column] for column in here if shard["attributes"][row, column] >= 0]
            count = int((shard["caption_ids"][row] >= 0).sum())
            if "caption_attributes" not in shard:
                found.append([shown] * count)
                continue
            bits = shard["caption_attributes"][row].tolist()[:count]
            found.append([[names[column] for column in here if one >> column & 1] for one in bits])
        return found

    def sample_ids(self, rows: np.ndarray) -> list[str]:
        """The source's name of each image."""
        names = []
        for shard, row in self._rows(rows):
            start, end = shard["sample_id_offsets"][row : row + 2].tolist()
            names.append(decode(shard["sample_ids"][start:end].numpy().tobytes()))
        return names


def _damaged(path: Path, directory: Path) -> SanaError:
    return SanaError(
        f"{path} is damaged: its tensors are not those of a dataset",
        f"sana inspect --verify {directory} looks at every byte; sana embed --overwrite makes it anew",
    )


def _captions_fit(index: records.Index, tensors: Tensors, shard: records.Shard) -> bool:
    """Whether these are the tensors of a shard of captions."""
    count = shard.count
    states, offsets, ends = tensors["states"], tensors["offsets"], tensors["text_offsets"]
    return (
        (states.dtype, states.shape[1:]) == (torch.bfloat16, (index.caption_dim,))
        and all((t.dtype, t.shape) == (torch.int64, (count + 1,)) for t in (offsets, ends))
        and bool(offsets[0] == 0 and offsets[-1] == len(states) and (offsets.diff() > 0).all())
        and bool(ends[0] == 0 and (ends.diff() >= 0).all())
        and (tensors["text"].dtype, tensors["text"].ndim) == (torch.uint8, 1)
    )


def _images_fit(index: records.Index, tensors: Tensors, shard: records.ImageShard) -> bool:
    """Whether these are the tensors of a shard of images."""
    shape = shard.count, index.image.channels, shard.height, shard.width
    kind, dtype = ("images", torch.uint8) if index.image.kind == "pixels" else ("latents", torch.bfloat16)
    samples, ids, ends = tensors[kind], tensors["caption_ids"], tensors["sample_id_offsets"]
    count, sizes = shard.count, tensors["original_sizes"]
    weights, shown = tensors.get("caption_weights"), tensors.get("attributes")
    says, values = tensors.get("caption_attributes"), list(index.attributes.values())
    return (
        (samples.dtype, samples.shape) == (dtype, shape)
        and (sizes.dtype, sizes.shape) == (torch.int32, (count, 2))
        and bool((sizes > 0).all())
        and (ids.dtype, ids.ndim, len(ids)) == (torch.int32, 2, count)
        and (ends.dtype, ends.shape) == (torch.int64, (count + 1,))
        and (tensors["sample_ids"].dtype, tensors["sample_ids"].ndim) == (torch.uint8, 1)
        and (weights is None or (weights.dtype, weights.shape) == (torch.float32, ids.shape))
        and (shown is None or _known(shown, count, values))
        and (says is None or (shown is not None and _named(says, ids, shown)))
    )


def _known(shown: Tensor, count: int, values: Sequence[Sequence[str]]) -> bool:
    """Whether attributes (n, a) are numbers of the values that the index lists."""
    if (shown.dtype, shown.ndim, len(shown)) != (torch.int32, 2, count) or shown.shape[1] > len(values):
        return False
    most = torch.tensor([len(known) for known in values[: shown.shape[1]]])
    return bool(((shown >= -1) & (shown < most)).all())


def _named(says: Tensor, ids: Tensor, shown: Tensor) -> bool:
    """Whether bits (n, k) of captions (n, k) are those of attributes (n, a)."""
    if (says.dtype, says.shape) != (torch.int64, ids.shape):
        return False
    return bool(((says >= 0) & (says < 1 << shown.shape[1])).all())


def _locate(
    shards: _Shards, starts: np.ndarray, rows: Sequence[int] | np.ndarray
) -> Iterator[tuple[Tensors, int]]:
    """The shard of each row, and the row inside it; `starts` are the first rows of shards."""
    numbers = np.searchsorted(starts, rows, side="right") - 1
    for number, row in zip(numbers, rows, strict=True):
        yield shards[number], int(row - starts[number])
