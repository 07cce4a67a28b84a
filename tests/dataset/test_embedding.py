"""Windows that are taken part by part make the dataset that whole ones make, whoever writes them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import contents, small_config
from torch import Tensor
from whole.test_shapes import make_pictures

from sana_cli.commands.embed import EmbedOptions, EmbedSummary, embed
from sana_cli.config.keys import Config
from sana_cli.dataset import embedding, writer
from sana_cli.dataset.embedding import Embedder
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.runtime.distributed import World
from sana_cli.sources.entry import Entry
from sana_cli.sources.windows import SourcePart, WindowReader

BATCH = 5  # images that the autoencoder takes at once


class Means:
    """An autoencoder whose latents are the means of 4 x 4 pixels, in a fourth channel of all three."""

    fingerprint = "means"

    def encode(self, pixels: Tensor) -> Tensor:
        means = F.avg_pool2d(pixels, 4)
        return torch.cat([means, means.mean(1, keepdim=True)], dim=1).bfloat16()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A hundred pictures of many shapes, two of which cannot be read."""
    folder = make_pictures(tmp_path / "pictures", count=100)
    for number in (11, 99):
        (folder / f"{number:03d}.png").write_bytes(b"no image")
    return folder


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana_cli.commands.embed.IMAGES_AT_ONCE", BATCH)
    monkeypatch.setattr(embedding, "IMAGES_AT_ONCE", BATCH)
    monkeypatch.setattr("sana_cli.commands.embed._load_autoencoder", lambda *_: Means())
    monkeypatch.setattr(writer, "WINDOW", 24)
    monkeypatch.setattr(writer, "MANY_SHAPES", 1)


def the_config(folder: Path, pictures: Path, shapes: str = "data.image_size=64") -> Config:
    folder.mkdir()
    return small_config(
        folder, "data.source=folder", f"data.path={pictures}", "data.workers=0", shapes,
        "data.autoencoder=means", "data.latent_factor=4", "model.in_channels=4", "model.patch_size=1",
    )  # fmt: skip


def made(config: Config, monkeypatch: pytest.MonkeyPatch, part: int) -> EmbedSummary:
    """Embed with parts of so many images; windows have 24."""
    monkeypatch.setattr(writer, "WINDOW_BYTES", part * 3 * math.prod(config.data.size))
    *_, summary = embed(EmbedOptions(config))
    assert isinstance(summary, EmbedSummary)
    return summary


@pytest.mark.parametrize("shapes", ["data.image_size=64", "data.buckets=[64, 128]"])
def test_parts_make_the_dataset_of_whole_windows(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, shapes: str
) -> None:
    whole, parts, cut = (the_config(tmp_path / name, pictures, shapes) for name in ("whole", "parts", "cut"))
    summary = made(whole, monkeypatch, part=24)
    expected = contents(whole.data.dir)
    assert (summary.images, summary.skipped) == (98, 2)
    assert len({name.split("-")[1][:5] for name in expected if name.startswith("images-")}) == 5
    made(parts, monkeypatch, part=7)
    assert contents(parts.data.dir) == expected
    write, calls = writer.DatasetWriter.write, list[int]()

    def failing(self: writer.DatasetWriter, window: int, *rest: Any) -> None:
        calls.append(window)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(self, window, *rest)

    monkeypatch.setattr(writer.DatasetWriter, "write", failing)
    with pytest.raises(SanaError, match="the disk is full"):
        made(cut, monkeypatch, part=7)
    assert made(cut, monkeypatch, part=7).resumed == 2
    assert calls == [0, 1, 2, 2, 3, 4]
    assert contents(cut.data.dir) == expected


def test_the_latents_are_those_of_each_image(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = the_config(tmp_path / "a", pictures)
    made(config, monkeypatch, part=7)
    dataset, reader = Dataset(config.data.dir), WindowReader(config, [], 1, 1, few=True)
    names, texts = dataset.sample_ids(torch.arange(98).numpy()), dataset.texts()
    assert names == [f"{number:03d}.png" for number in range(100) if number not in (11, 99)]
    for row in range(0, 98, 9):
        rows = torch.tensor([row]).numpy()
        entry = Entry("", pictures / names[row], ("",))
        reader = WindowReader(config, [entry], 1, 1, few=True)
        part = reader.next(wanted=True)
        assert part is not None
        pixels = torch.from_numpy(part.images[0].pixels.copy())[None]
        assert torch.equal(dataset.images(rows), Means().encode(pixels.float() / 127.5 - 1).float())
        assert texts[dataset.caption_ids(rows)[0][0]] == f"number {int(names[row][:3])}"


@pytest.mark.parametrize("count", [1, 23, 24, 25, 47, 48, 49, 60])
@pytest.mark.parametrize("part", [5, 8, 24])
def test_windows_end_where_they_are_full(tmp_path: Path, count: int, part: int) -> None:
    config = the_config(tmp_path / "a", tmp_path)
    entries = [Entry(str(number), b"", (f"caption {number}",)) for number in range(count)]
    reader = WindowReader(config, entries, 24, part, few=True)
    parts = list[SourcePart]()
    while (one := reader.next(wanted=False)) is not None:
        parts.append(one)
    assert [text for one in parts for text in one.captions] == [entry.captions[0] for entry in entries]
    assert reader.windows == -(-count // 24)
    for number in range(reader.windows):
        of_window = [one for one in parts if one.window == number]
        assert sum(len(one.captions) for one in of_window) == min(24, count - 24 * number)
        assert not any(one.ends for one in of_window[:-1])
        assert of_window[-1].ends or number == reader.windows - 1


def test_processes_share_windows_of_several_parts(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two processes would, one after the other: each reads all, and writes its own windows."""
    whole, shared = (the_config(tmp_path / name, pictures) for name in ("whole", "shared"))
    made(whole, monkeypatch, part=24)
    windows = Embedder.windows

    def both(self: Embedder, reader: WindowReader, _: World) -> Any:
        entries = list(reader.entries)
        other = Embedder(self.encoder, self.autoencoder, self.into, self.strict)
        again = WindowReader(shared, entries, reader.size, reader.part, few=True)
        yield from windows(other, again, World(rank=1, size=2))
        assert sorted(path.name for path in self.into.folder.glob("window-*")) == [
            "window-00001.json", "window-00003.json"
        ]  # fmt: skip
        reader.entries = iter(entries)
        yield from windows(self, reader, World(rank=0, size=2))

    monkeypatch.setattr(Embedder, "windows", both)
    assert made(shared, monkeypatch, part=7).images == 98
    assert contents(shared.data.dir) == contents(whole.data.dir)


def test_more_captions_than_ids_are_refused(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "MOST_CAPTIONS", 40)
    with pytest.raises(SanaError, match=r"over 40 different captions\n.*data\.also"):
        made(the_config(tmp_path / "a", pictures), monkeypatch, part=7)


def test_words_of_all_windows_are_on_record(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of windows that an earlier process wrote."""
    config = the_config(tmp_path / "a", pictures)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writer.DatasetWriter, "finish", full)
        with pytest.raises(SanaError, match="the disk is full"):
            made(config, monkeypatch, part=7)
    assert made(config, monkeypatch, part=7).resumed == 5
    index = Dataset(config.data.dir).index
    assert index.words == sorted({"number", *map(str, range(10))})
    assert index.counts.longest == 4  # the beginning, "number" and two digits
    assert not index.one_word_captions


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")
