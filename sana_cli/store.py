"""The pre-embedded dataset on disk: write it, verify it, read it.

    index.json                  written last, knows its own hash: counts, fingerprints, the shards with their hashes
    captions-00000.safetensors  states (tokens, D) bf16 end to end without padding, offsets (n + 1,), and the texts
    images-00000.safetensors    images (n, C, H, W) uint8 or latents (n, C, H, W) bf16, caption_ids (n, k), caption_weights
                                (n, k) where given, labels, sample ids
    skipped.jsonl               the entries that were left out, and why

Every distinct caption is stored once. A dataset is written into a sibling `<name>.partial/`, window by window, and renamed
when whole. It knows nothing of encoders or sources: their fingerprints pass through as dictionaries.

Shapes: n rows of a shard, k captions of an image at most, C H W of an image, D width of a caption state.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana_cli import files, records
from sana_cli.errors import SanaError
from sana_cli.units import as_json

FORMAT_VERSION = 1
WINDOW = 4096  # entries of the source in a shard, at most
WINDOW_BYTES = 128 * 2**20  # of pixels, and of caption states, in a shard, at most
INDEX = "index.json"
SKIPPED = "skipped.jsonl"
PLAN = "plan.json"

# what the lesson stores: one array of 300 x 2304 float32 for each image, padding included
LESSON_BYTES_PER_IMAGE = 300 * 2304 * 4


def partial_dir(directory: Path) -> Path:
    """Where a dataset lies until it is whole."""
    whole = directory if directory.name else directory.absolute()  # "." has no name of its own
    return whole.with_name(whole.name + ".partial")


def held_out_dir(directory: Path, split: str) -> Path:
    """Where the held-out part of a dataset lies: a dataset of its own, beside it."""
    whole = directory if directory.name else directory.absolute()
    return whole.with_name(f"{whole.name}-{split}")


def is_dataset(directory: Path) -> bool:
    """Whether a finished dataset lies here."""
    return (directory / INDEX).is_file()


_OURS = re.compile(r"index\.json|skipped\.jsonl|plan\.json|(captions|images|window)-\d+(-\d+)?\.(safetensors|json)|\.tmp\w+")


def check_only_ours(directory: Path) -> None:
    """Refuse to replace a folder that holds anything but a dataset's files, or a dataset's in the making.

    Raises:
        SanaError: it does; names it.
    """
    if directory.exists() and not directory.is_dir():
        raise SanaError(f"{directory} is a file", "give another place with --out or --set data.dir=DIR", exit_code=2)
    strange = sorted(path.name for path in directory.iterdir() if not _OURS.fullmatch(path.name)) if directory.exists() else []
    if strange:
        raise SanaError(
            f"{directory} holds {strange[0]}, which is no part of a dataset of sana's, so it is not touched",
            "give another place with --out or --set data.dir=DIR",
            exit_code=2,
        )


def _pack_texts(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """UTF-8 bytes end to end, and (n + 1,) offsets into them."""
    encoded = [text.encode("utf-8", errors="surrogatepass") for text in texts]
    offsets = torch.tensor([0, *accumulate(map(len, encoded))], dtype=torch.int64)
    return torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)[: int(offsets[-1])], offsets


def _unpack_texts(joined: Tensor, offsets: Tensor) -> list[str]:
    raw, ends = joined.numpy().tobytes(), offsets.tolist()
    return [_text(raw[a:b]) for a, b in pairwise(ends)]


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8", errors="surrogatepass")
    except UnicodeDecodeError:  # damaged, which `verify` finds
        return raw.decode("utf-8", errors="backslashreplace")


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """The images of a window, (n, C, H, W) uint8, or bf16 if they are latents, and what belongs to each."""

    pixels: Tensor
    sample_ids: Sequence[str]
    captions: Sequence[Sequence[str]]
    weights: Sequence[Sequence[float] | None]
    labels: Sequence[int | None]


class DatasetWriter:
    """Writes a dataset window by window into `folder`, where it can be taken up again after the last whole window.

    A window is a fixed run of the source's entries. Its record, `window-00000.json`, is written after its shards: where
    there is none, the window is not there. `finish` turns the records into the index. Windows may be written in any order,
    by several processes, into the same bytes.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """Go on in `folder`, or begin in it anew if what lies there was made by another plan."""
        self.folder = folder
        if not self._same_plan(plan):
            check_only_ours(folder)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            files.write_sealed_json(folder / PLAN, plan)

    def _same_plan(self, plan: Mapping[str, Any]) -> bool:
        try:
            return {k: v for k, v in files.read_sealed_json(self.folder / PLAN).items() if k != "sha256"} == dict(plan)
        except (SanaError, OSError):
            return False

    def _record(self, window: int) -> Path:
        return self.folder / f"window-{window:05d}.json"

    def done(self, window: int, hashes: bool = False) -> dict[str, Any] | None:
        """A window's record, if it and its shards are whole: by size, and with `hashes` byte for byte."""
        if not self._record(window).is_file():
            return None
        try:
            record = files.read_sealed_json(self._record(window))
            if "cut" not in record:  # of an earlier version
                return None
            for shard in (*record["captions"], *record["images"]):
                files.check_size(self.folder / shard["file"], shard["bytes"])
                if hashes:
                    files.check_hash(self.folder / shard["file"], shard["sha256"])
        except SanaError:
            return None
        return record

    def write_captions(self, window: int, number: int, states: Mapping[str, Tensor]) -> dict[str, Any]:
        """One shard of the captions that a window is the first to bring, with their states (tokens, D); gives its record."""
        text, text_offsets = _pack_texts(list(states))
        offsets = torch.tensor([0, *accumulate(map(len, states.values()))], dtype=torch.int64)
        tensors = {"states": torch.cat(list(states.values())), "offsets": offsets, "text": text, "text_offsets": text_offsets}
        shard = self._write(f"captions-{window:05d}" + (f"-{number}" if number else ""), len(states), tensors)
        return shard | {"tokens": int(offsets[-1])}

    def write(
        self,
        window: int,
        captions: Sequence[Mapping[str, Any]],
        images: Images,
        caption_ids: Mapping[str, int],
        skipped: Sequence[Mapping[str, str]],
        cut: int = 0,
    ) -> None:
        """A window's images, and its record: its caption shards, as `write_captions` gave them, are written already.

        `cut` is how many of its captions were longer than the encoder takes.
        """
        record: dict[str, Any] = {"captions": list(captions), "images": [], "skipped": list(skipped), "cut": cut}
        if images.sample_ids:
            record["images"].append(
                self._write(f"images-{window:05d}", len(images.sample_ids), _pack_images(images, caption_ids))
            )
        files.write_sealed_json(self._record(window), record)

    def _write(self, name: str, count: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        path = self.folder / f"{name}.safetensors"
        files.write_tensors(path, tensors)
        return {"file": path.name, "count": count, "bytes": path.stat().st_size, "sha256": files.sha256_file(path)}

    def finish(self, windows: int, captions: Iterable[str], facts: Mapping[str, Any]) -> None:
        """Write the index: after it, and not before, this is a dataset.

        Args:
            windows: how many there are; all are written.
            captions: all distinct ones, the null caption first.
            facts: what else the index says: image, encoder, source, caption_dim.
        """
        records = [self.done(window) for window in range(windows)]
        if not (self.folder / INDEX).is_file():
            whole = [record for record in records if record is not None]
            assert len(whole) == windows, "a window is missing"
            skipped = [entry for record in whole for entry in record["skipped"]]
            if skipped:
                lines = "".join(as_json(entry) + "\n" for entry in skipped)
                files.write_text(self.folder / SKIPPED, lines)
            image_shards = [shard for record in whole for shard in record["images"]]
            texts = list(captions)
            index = {
                "format_version": FORMAT_VERSION,
                "counts": {
                    "images": sum(shard["count"] for shard in image_shards),
                    "captions": len(texts),
                    "tokens": sum(shard["tokens"] for record in whole for shard in record["captions"]),
                    "skipped": len(skipped),
                    "cut": sum(record["cut"] for record in whole),
                },
                **facts,
                "one_word_captions": all(len(caption.split()) == 1 for caption in texts if caption),
                "null_caption": texts.index(""),
                "skipped_sha256": files.sha256_file(self.folder / SKIPPED) if skipped else None,
                "captions": [
                    {key: shard[key] for key in shard if key != "tokens"} for record in whole for shard in record["captions"]
                ],
                "images": image_shards,
            }
            files.write_sealed_json(self.folder / INDEX, index)
        index = files.read_sealed_json(self.folder / INDEX)
        keep = {INDEX, SKIPPED, *(shard["file"] for shard in (*index["captions"], *index["images"]))}
        for path in self.folder.iterdir():  # records, and what killed processes left half written
            if path.name not in {*keep, PLAN}:
                path.unlink()
        (self.folder / PLAN).unlink(missing_ok=True)


def _pack_images(images: Images, caption_ids: Mapping[str, int]) -> dict[str, Tensor]:
    most = max(map(len, images.captions))
    rows = [[caption_ids[caption] for caption in row] + [-1] * (most - len(row)) for row in images.captions]
    joined, offsets = _pack_texts(images.sample_ids)
    tensors = {
        "images" if images.pixels.dtype == torch.uint8 else "latents": images.pixels,
        "caption_ids": torch.tensor(rows, dtype=torch.int32),
        "sample_ids": joined,
        "sample_id_offsets": offsets,
    }
    if any(weights is not None for weights in images.weights):
        padded = [
            [*(weights or [1.0] * len(row)), *[0.0] * (most - len(row))]
            for row, weights in zip(images.captions, images.weights, strict=True)
        ]
        tensors["caption_weights"] = torch.tensor(padded, dtype=torch.float32)
    if all(label is not None for label in images.labels):
        most_label = max(label for label in images.labels if label is not None)
        tensors["labels"] = torch.tensor(images.labels, dtype=torch.int16 if most_label < 2**15 else torch.int32)
    return tensors


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
        index = files.read_sealed_json(directory / INDEX)
        if index.get("format_version") != FORMAT_VERSION:
            raise SanaError(
                f"{directory}: format version {index.get('format_version')}; this sana reads version {FORMAT_VERSION}",
                "embed it again with: sana embed --overwrite",
            )
        self.index = records.checked(records.Index, index, directory / INDEX)
        for kind in ("captions", "images"):
            if sum(shard["count"] for shard in self.index[kind]) != self.index["counts"][kind]:
                raise SanaError(f"{directory / INDEX}: {kind}: its shards do not have as many as it says")
        self._captions = [self._open(shard, self._captions_fit) for shard in self.index["captions"]]
        self._images = [self._open(shard, self._images_fit) for shard in self.index["images"]]
        self._caption_starts = np.cumsum([0, *(shard["count"] for shard in self.index["captions"])])
        self._image_starts = np.cumsum([0, *(shard["count"] for shard in self.index["images"])])

    def _open(self, shard: Mapping[str, Any], fit: Callable[[dict[str, Tensor], int], bool]) -> dict[str, Tensor]:
        path = self.directory / shard["file"]
        files.check_size(path, shard["bytes"])
        tensors = files.read_tensors(path)
        try:
            whole = fit(tensors, shard["count"])
        except (KeyError, IndexError, RuntimeError):  # a tensor that is not there, or has nothing in it
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
            (states.dtype, states.shape[1:]) == (torch.bfloat16, (self.index["caption_dim"],))
            and all((t.dtype, t.shape) == (torch.int64, (count + 1,)) for t in (offsets, ends))
            and bool(offsets[0] == 0 and offsets[-1] == len(states) and (offsets.diff() > 0).all())
            and bool(ends[0] == 0 and (ends.diff() >= 0).all())
            and (tensors["text"].dtype, tensors["text"].ndim) == (torch.uint8, 1)
        )

    def _images_fit(self, tensors: dict[str, Tensor], count: int) -> bool:
        kind, dtype = ("images", torch.uint8) if self.index["image"]["kind"] == "pixels" else ("latents", torch.bfloat16)
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
        if self.index["counts"].get("skipped"):
            files.check_hash(self.directory / SKIPPED, self.index["skipped_sha256"])
            yield SKIPPED

    def skipped(self) -> Iterator[dict[str, str]]:
        """The entries that were left out: name and reason."""
        if self.index["counts"].get("skipped"):
            with (self.directory / SKIPPED).open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    def states(self, caption_ids: Iterable[int]) -> list[Tensor]:
        """The states (tokens, D) of each caption.

        Raises:
            SanaError: there is no such caption: the ids are of a damaged file.
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
        return max(int(shard["offsets"].diff().max()) for shard in self._captions if len(shard["offsets"]) > 1)

    def texts(self) -> list[str]:
        """All captions, by id."""
        return [text for shard in self._captions for text in _unpack_texts(shard["text"], shard["text_offsets"])]

    def _rows(self, rows: np.ndarray) -> Iterator[tuple[dict[str, Tensor], int]]:
        return _locate(self._images, self._image_starts, rows)

    def images(self, rows: np.ndarray) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], or latents as the transformer sees them, float32."""
        if self.index["image"]["kind"] == "latents":
            return torch.stack([shard["latents"][row] for shard, row in self._rows(rows)]).float()
        return self.pixels(rows).float() / 127.5 - 1

    def pixels(self, rows: np.ndarray) -> Tensor:
        """Images (B, C, H, W) as they are stored, uint8."""
        return torch.stack([shard["images"][row] for shard, row in self._rows(rows)])

    def caption_ids(self, rows: np.ndarray) -> list[list[int]]:
        """The ids of each image's captions, one at least."""
        found = [[i for i in shard["caption_ids"][row].tolist() if i >= 0] for shard, row in self._rows(rows)]
        if not all(found):
            raise self._damaged(self.directory)
        return found

    def caption_weights(self, rows: np.ndarray) -> list[list[float] | None]:
        """The weights of each image's captions, in the same order; None where all are alike."""
        return [
            shard["caption_weights"][row][shard["caption_ids"][row] >= 0].tolist() if "caption_weights" in shard else None
            for shard, row in self._rows(rows)
        ]

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
            names.append(_text(shard["sample_ids"][start:end].numpy().tobytes()))
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
