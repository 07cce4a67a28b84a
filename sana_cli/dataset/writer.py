"""Writes a dataset, window by window, and goes on after the last whole window. It knows no source."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_cli.dataset.layout import FORMAT_VERSION, INDEX, PLAN, SKIPPED, check_only_ours, pack_texts
from sana_cli.errors import SanaError
from sana_cli.runtime import files, records
from sana_cli.runtime.records import CaptionShard, ImageShard, Index, LeftOut, Shard, Window
from sana_cli.units import as_json

WINDOW = 4096  # entries of the source in a shard, at most
WINDOW_BYTES = 128 * 2**20  # of pixels, and of caption states, in a shard, at most
MANY_SHAPES = 4  # times WINDOW_BYTES of pixels in a window where each of many shapes has a shard


@dataclass(frozen=True)
class Images:
    """The images of one shape of a window, (n, C, H, W) uint8, or bf16 latents, and what belongs to each."""

    pixels: Tensor
    original_sizes: Sequence[tuple[int, int]]  # height and width of each before it was fitted
    sample_ids: Sequence[str]
    captions: Sequence[Sequence[str]]
    weights: Sequence[Sequence[float] | None]
    attributes: Sequence[Mapping[str, int]]  # by name: the number of the value
    says: Sequence[Sequence[frozenset[str]] | None]  # attributes that each caption names; None: all
    names: Sequence[str]  # of the attributes known so far, in the order of their columns


class DatasetWriter:
    """Writes a dataset window by window into `folder`, going on after the last whole window.

    A window is a fixed run of the source's entries. Its record, `window-00000.json`, is written after its
    shards: without a record, the window counts as missing. `finish` turns the records into the index.
    Windows may be written in any order, by several processes, with the same bytes as a result.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """Go on in `folder`, or clear it if it was made by another plan."""
        self.folder = folder
        if not self._same_plan(plan):
            check_only_ours(folder)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            files.write_sealed_json(folder / PLAN, plan)

    def _same_plan(self, plan: Mapping[str, Any]) -> bool:
        try:
            return {
                k: v for k, v in files.read_sealed_json(self.folder / PLAN).items() if k != "sha256"
            } == dict(plan)
        except (SanaError, OSError):
            return False

    def _record(self, window: int) -> Path:
        return self.folder / f"window-{window:05d}.json"

    def done(self, window: int, hashes: bool = False) -> Window | None:
        """A window's record, if its shards are whole: by size, and with `hashes` byte for byte."""
        path = self._record(window)
        if not path.is_file():
            return None
        try:
            record = records.checked(Window, files.read_sealed_json(path), path)
            for shard in (*record.captions, *record.images):
                files.check_size(self.folder / shard.file, shard.bytes)
                if hashes:
                    files.check_hash(self.folder / shard.file, shard.sha256)
        except SanaError:
            return None
        return record

    def write_captions(self, window: int, number: int, states: Mapping[str, Tensor]) -> CaptionShard:
        """Write one shard of a window's new captions, with their states (tokens, D)."""
        text, text_offsets = pack_texts(list(states))
        offsets = torch.tensor([0, *accumulate(map(len, states.values()))], dtype=torch.int64)
        joined = torch.cat(list(states.values()))
        tensors = {"states": joined, "offsets": offsets, "text": text, "text_offsets": text_offsets}
        shard = self._write(_name("captions", window, number), len(states), tensors)
        longest = int(offsets.diff().max())
        return CaptionShard(**vars(shard), tokens=int(offsets[-1]), longest=longest)

    def write(
        self,
        window: int,
        captions: Sequence[CaptionShard],
        images: Sequence[Images],
        caption_ids: Mapping[str, int],
        skipped: Sequence[LeftOut],
        cut: int = 0,
    ) -> None:
        """Write a window's images, a shard for each shape, and its record.

        Its caption shards are written already. `caption_ids` has its captions, others or not. `cut` is how
        many of its new captions were longer than the encoder takes.
        """
        shards = []
        for number, part in enumerate(images):
            tensors = _pack_images(part, caption_ids)
            shard = self._write(_name("images", window, number), len(part.sample_ids), tensors)
            height, width = part.pixels.shape[2:]
            shards.append(ImageShard(**vars(shard), height=height, width=width))
        record = Window(captions=list(captions), images=shards, skipped=list(skipped), cut=cut)
        files.write_sealed_json(self._record(window), record.as_json())

    def _write(self, name: str, count: int, tensors: Mapping[str, Tensor]) -> Shard:
        path = self.folder / f"{name}.safetensors"
        files.write_tensors(path, tensors)
        return Shard(file=path.name, count=count, bytes=path.stat().st_size, sha256=files.sha256_file(path))

    def finish(self, windows: int, facts: Mapping[str, Any]) -> None:
        """Write the index, which makes this a dataset, and remove what else is there.

        Args:
            windows: how many there are; all are written. The null caption is the first of the first.
            facts: what else the index says: image, encoder, source, caption_dim, attributes,
                one_word_captions, words. Height and width of `image` are those of the most common shape.
        """
        if not (self.folder / INDEX).is_file():
            self._write_index(windows, facts)
        index = records.checked(Index, files.read_sealed_json(self.folder / INDEX), self.folder / INDEX)
        keep = {INDEX, SKIPPED, PLAN, *(shard.file for shard in index.shards)}
        for path in self.folder.iterdir():  # records of windows, and half-written files of killed processes
            if path.name not in keep:
                path.unlink()
        (self.folder / PLAN).unlink(missing_ok=True)

    def _write_index(self, windows: int, facts: Mapping[str, Any]) -> None:
        """Take one record after the other: entries that were left out may be many."""
        images, texts = list[dict[str, Any]](), list[dict[str, Any]]()
        shapes, counts, longest = Counter[tuple[int, int]](), Counter[str](), 0
        with (self.folder / SKIPPED).open("w", encoding="utf-8") as left_out:
            for record in map(self.done, range(windows)):
                assert record is not None, "a window is missing"
                for image in record.images:
                    shapes[image.height, image.width] += image.count
                    images.append(image.as_json())
                for shard in record.captions:
                    counts["captions"] += shard.count
                    counts["tokens"] += shard.tokens
                    longest = max(longest, shard.longest)
                    texts.append(shard.model_dump(mode="json", exclude={"tokens", "longest"}))
                left_out.writelines(as_json(entry.as_json()) + "\n" for entry in record.skipped)
                counts["skipped"] += len(record.skipped)
                counts["cut"] += record.cut
        if counts["skipped"]:
            files.sync(self.folder / SKIPPED)
        else:
            (self.folder / SKIPPED).unlink()
        height, width = max(shapes, key=lambda shape: (shapes[shape], shape[0] * shape[1], -shape[0]))
        index = {
            "format_version": FORMAT_VERSION,
            "counts": {
                "images": shapes.total(),
                **{name: counts[name] for name in ("captions", "tokens", "skipped", "cut")},
                "longest": longest,
            },
            **facts,
            "image": {**facts["image"], "height": height, "width": width},
            "null_caption": 0,
            "skipped_sha256": files.sha256_file(self.folder / SKIPPED) if counts["skipped"] else None,
            "captions": texts,
            "images": images,
        }
        files.write_sealed_json(self.folder / INDEX, index)


def _name(kind: str, window: int, number: int) -> str:
    """The name of a window's shard without its suffix."""
    return f"{kind}-{window:05d}" + (f"-{number}" if number else "")


def _pack_images(images: Images, caption_ids: Mapping[str, int]) -> dict[str, Tensor]:
    most = max(map(len, images.captions))
    rows = [[caption_ids[caption] for caption in row] + [-1] * (most - len(row)) for row in images.captions]
    joined, offsets = pack_texts(images.sample_ids)
    tensors = {
        "images" if images.pixels.dtype == torch.uint8 else "latents": images.pixels,
        "original_sizes": torch.tensor(images.original_sizes, dtype=torch.int32),
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
    if images.names:
        values = [[row.get(name, -1) for name in images.names] for row in images.attributes]
        tensors["attributes"] = torch.tensor(values, dtype=torch.int32)
    if images.names and any(says is not None for says in images.says):
        bits = {name: 1 << column for column, name in enumerate(images.names)}
        named = [
            [sum(bits[name] for name in names) for names in says or [frozenset(shown)] * len(row)]
            for row, says, shown in zip(images.captions, images.says, images.attributes, strict=True)
        ]
        padded_bits = [row + [0] * (most - len(row)) for row in named]
        tensors["caption_attributes"] = torch.tensor(padded_bits, dtype=torch.int64)
    return tensors
