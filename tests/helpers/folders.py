"""Folders, shards and sets of images, and what a source reads from them."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import small_config
from sana_cli.commands.embed import EmbedOptions, EmbedSummary, embed
from sana_cli.config.keys import Config, DataConfig
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.sources import Entry, Skipped, Source, open_source


def picture(seed: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def folder_config(tmp_path: Path, source: Path, *more: str) -> Config:
    return small_config(tmp_path, f"data.path={source}", "data.source=folder", "data.workers=0", *RGB, *more)


def finished(config: Config, **options: Any) -> EmbedSummary:
    """Embed the whole source, with these options of the command."""
    *_, summary = embed(EmbedOptions(config, **options))
    assert isinstance(summary, EmbedSummary)
    return summary


def listed(config: Config) -> list[tuple[str, tuple[str, ...]]]:
    """(sample id, captions) of every image of a dataset."""
    dataset = Dataset(config.data.dir)
    rows, texts = np.arange(len(dataset)), dataset.texts()
    captions = [tuple(texts[i] for i in ids) for ids in dataset.caption_ids(rows)]
    return list(zip(dataset.sample_ids(rows), captions, strict=True))


def metadata_folder(source: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    source.mkdir(parents=True, exist_ok=True)
    for seed, row in enumerate(rows):
        path = source / row["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return source


def tar_of(path: Path, members: list[tuple[str, bytes]], odd: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in odd:
            tar.addfile(info)
    return path


RGB = ("model.in_channels=3", "data.image_size=16")


def image_bytes(seed: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes | str | None]) -> Path:
    """Write files by name; None is an image unlike the others."""
    for seed, (name, content) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made = image_bytes(seed) if content is None else content
        path.write_bytes(made.encode() if isinstance(made, str) else made)
    return root


def images(*names: str) -> dict[str, bytes | str | None]:
    return dict.fromkeys(names)


def rows(*pairs: tuple[str, str]) -> str:
    return "".join(
        json.dumps({"file_name": name, "text": text}, ensure_ascii=False) + "\n" for name, text in pairs
    )


def opened(path: Path, source: str = "folder", **more: Any) -> Source:
    return open_source(DataConfig(source=source, path=path, **more))  # type: ignore[arg-type]


def read(source: Source) -> tuple[dict[str, tuple[str, ...]], list[tuple[str, str]]]:
    """Captions by sample id, and what is skipped; asserts the count and a stable order."""
    found = list(source)
    assert source.count() in (None, len(found))
    assert [getattr(entry, "id", entry) for entry in source] == [
        getattr(entry, "id", entry) for entry in found
    ]
    entries = {entry.id: entry.captions for entry in found if isinstance(entry, Entry)}
    assert len(entries) == sum(isinstance(entry, Entry) for entry in found)
    return entries, [(entry.name, entry.reason) for entry in found if isinstance(entry, Skipped)]


def folder(path: Path, **more: Any) -> tuple[dict[str, tuple[str, ...]], list[tuple[str, str]]]:
    return read(opened(path, **more))


def refused(path: Path, match: str, source: str = "folder", **more: Any) -> SanaError:
    with pytest.raises(SanaError, match=match) as caught:
        opened(path, source, **more)
    return caught.value
