"""MNIST as it is, images fitted, and datasets that come back as they went in or are called damaged."""

import gzip
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import embedded, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sana_cli import sources as data
from sana_cli.commands.embed import EmbedOptions, EmbedSummary, embed, plan
from sana_cli.config.keys import Config
from sana_cli.dataset import writer
from sana_cli.dataset.order import sample_rows
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.runtime import files


def test_mnist_is_mnist() -> None:
    train, test = data.MNIST("train"), data.MNIST("test")
    assert (train.images.shape, test.images.shape) == ((60000, 28, 28), (10000, 28, 28))
    assert np.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    first = next(iter(train))
    assert (first.id, first.captions, first.label) == ("train-00000", ("5", "five"), 5)


def test_damaged_mnist_is_named(tmp_path: Path) -> None:
    for path in data.ASSETS.glob("*.gz"):
        shutil.copy(path, tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    raw = bytearray(gzip.decompress(labels.read_bytes()))
    raw[1000] ^= 1
    labels.write_bytes(gzip.compress(raw))
    with pytest.raises(SanaError, match=r"train-labels-idx1-ubyte\.gz is damaged: its content is not MNIST's"):
        data.MNIST("train", tmp_path)
    labels.write_bytes(labels.read_bytes()[:-20])
    with pytest.raises(SanaError, match="is not a whole gzip file"):
        data.MNIST("train", tmp_path)
    labels.unlink()
    with pytest.raises(SanaError, match=r"is missing\ndata.path for mnist is a folder"):
        data.MNIST("train", tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "not an IDX file of unsigned bytes"),
        (b"\x00\x00\x08\x02\x00\x00\x00\x01", "truncated"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x03ab", r"says \(3,\), 11 bytes in all, but it has 10"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x01ab", "but it has 10"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, "bytes in all"),
    ],
)
def test_idx_is_read_strictly(raw: bytes, message: str) -> None:
    with pytest.raises(SanaError, match=message):
        data.read_idx(raw, "file")


def test_images_are_fitted() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 224, 8, dtype=np.uint8), (28, 1)))
    fitted = data.fit_image(ramp, (32, 32), 1)
    assert fitted.shape == (1, 32, 32)
    assert (np.diff(fitted[0, 16].astype(int)) >= 0).all()
    assert abs(fitted.mean() - np.asarray(ramp).mean()) < 1
    wide = data.fit_image(Image.new("RGB", (60, 20), (255, 0, 0)), (8, 16), 3)
    assert wide.shape == (3, 8, 16)
    assert (wide[0] == 255).all()
    assert (wide[1:] == 0).all()
    checks = np.zeros((64, 64), dtype=np.uint8)
    checks[::2, ::2] = checks[1::2, 1::2] = 255
    assert abs(data.fit_image(Image.fromarray(checks), (8, 8), 1).astype(int) - 127).max() < 20  # antialiased, not aliased
    with pytest.raises(SanaError, match="1 or 3 channels, not 2"):
        data.fit_image(ramp, (8, 8), 2)


def test_what_is_stored_comes_back(config: Config) -> None:
    dataset = Dataset(config.data.dir)
    source = [sample for sample, _ in zip(data.MNIST("train"), range(40), strict=False)]
    rows = np.array([39, 0, 7])
    images = dataset.images(rows)
    assert images.shape == (3, 1, 16, 16)
    assert images.dtype == torch.float32
    for at, row in enumerate(rows):
        pixels = data.fit_image(data.decode_image(source[row].image), (16, 16), 1)
        assert torch.equal(images[at], torch.from_numpy(pixels.copy()).float() / 127.5 - 1)
        texts = [dataset.texts()[i] for i in dataset.caption_ids(rows)[at]]
        assert tuple(texts) == source[row].captions
    assert dataset.sample_ids(rows) == ["train-00039", "train-00000", "train-00007"]
    labels = dataset.labels()
    assert labels is not None
    assert labels.tolist() == [sample.label for sample in source]
    assert dataset.texts()[dataset.index["null_caption"]] == ""
    assert len(dataset.texts()) == len(set(dataset.texts()))


@settings(max_examples=30, deadline=None)
@given(
    captions=st.lists(st.lists(st.text(max_size=8), min_size=1, max_size=3, unique=True), min_size=1, max_size=6),
    channels=st.sampled_from([1, 3]),
    windows_count=st.integers(1, 3),
)
def test_any_dataset_comes_back(
    tmp_path_factory: pytest.TempPathFactory, captions: list[list[str]], channels: int, windows_count: int
) -> None:
    folder = tmp_path_factory.mktemp("set")
    plan = {"source": "drawn"}
    states: dict[str, torch.Tensor] = {}
    ids: dict[str, int] = {}
    windows, pixels = [], []
    for number in range(windows_count):
        new = [text for row in (captions if number else [[""], *captions]) for text in row]
        fresh = {text: torch.randn(1 + len(text), 4).bfloat16() for text in dict.fromkeys(new) if text not in states}
        ids |= {text: len(ids) + at for at, text in enumerate(fresh)}
        states |= fresh
        pixels.append(np.random.default_rng(number).integers(0, 256, (len(captions), channels, 2, 3), dtype=np.uint8))
        names = [f"é/{number}-{i}" for i in range(len(captions))]
        nothing = [None] * len(captions)
        images = writer.Images(torch.from_numpy(pixels[-1]), names, captions, nothing, nothing)
        windows.append(([fresh] if fresh else [], images))
    for number in reversed(range(windows_count)):  # in any order, by any writer of the same plan
        into = writer.DatasetWriter(folder, plan)
        shards = [into.write_captions(number, at, fresh) for at, fresh in enumerate(windows[number][0])]
        into.write(number, shards, windows[number][1], ids, [])
    image = {"kind": "pixels", "channels": channels, "height": 2, "width": 3}
    encoder = {"encoder": "drawn", "architecture": "none", "weights": "", "dtype": "fp32"}
    facts = {"image": image, "encoder": encoder, "source": {}, "caption_dim": 4}
    writer.DatasetWriter(folder, plan).finish(windows_count, ids, facts)
    dataset = Dataset(folder)
    assert dataset.labels() is None
    assert dataset.texts() == list(states)
    for text, found in zip(dataset.texts(), dataset.states(range(len(states))), strict=True):
        assert torch.equal(found, states[text])
    rows = np.arange(len(dataset))[::-1].copy()
    assert torch.equal(dataset.images(rows), torch.from_numpy(np.concatenate(pixels)[rows]).float() / 127.5 - 1)
    assert [[dataset.texts()[i] for i in ids] for ids in dataset.caption_ids(rows)] == (captions * windows_count)[::-1]
    assert dataset.sample_ids(rows)[0] == f"é/{windows_count - 1}-{len(captions) - 1}"


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (small_config(tmp_path / name) for name in ("a", "b"))
    embedded(first)
    embedded(second)
    for path in sorted(first.data.dir.iterdir()):
        assert path.read_bytes() == (second.data.dir / path.name).read_bytes(), path.name


def test_every_flipped_byte_is_found(config: Config) -> None:
    chosen = random.Random(0)
    paths = sorted(config.data.dir.iterdir())
    for trial in range(200):
        path = paths[trial % len(paths)]
        whole = path.read_bytes()
        at = chosen.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << chosen.randrange(8))]) + whole[at + 1 :])
        with pytest.raises(SanaError, match=path.name):
            list(Dataset(config.data.dir).verify())
        path.write_bytes(whole)
    assert list(Dataset(config.data.dir).verify()) == ["index.json", *(p.name for p in paths if p.name != "index.json")]


def test_missing_and_truncated_files_are_named(config: Config) -> None:
    shard = config.data.dir / "images-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(SanaError, match=f"expected {len(whole):,} bytes, found {len(whole) - 1:,}"):
        Dataset(config.data.dir)
    shard.unlink()
    with pytest.raises(SanaError, match=r"images-00000\.safetensors is missing"):
        Dataset(config.data.dir)
    (config.data.dir / "index.json").unlink()
    with pytest.raises(SanaError, match="no dataset in .*\nmake one with: sana embed"):
        Dataset(config.data.dir)


def test_embedding_again_is_a_no_op_or_a_refusal(config: Config) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in config.data.dir.iterdir()}
    assert embedded(config).was_there
    assert {path.name: path.stat().st_mtime_ns for path in config.data.dir.iterdir()} == before
    for override, field in (
        ("data.split=test", r"source\.split 'train', not 'test'"),
        ("data.image_size=24", "image.height 16, not 24"),
        ("model.in_channels=3", "image.channels 1, not 3"),
        ("text.max_length=20", "text.max_length: .* has 300, not 20"),
        ("text.encoder=some/model", "text.encoder: .* has 'tiny', not 'some/model'"),
    ):
        with pytest.raises(SanaError, match=f"{field}.*\n.*--overwrite"):
            embedded(small_config(config.data.dir.parent, override))
    changed = small_config(config.data.dir.parent, "data.image_size=24")
    *_, summary = embed(EmbedOptions(changed, limit=40, overwrite=True))
    assert isinstance(summary, EmbedSummary)
    assert not summary.was_there
    assert Dataset(config.data.dir).image_shape == (1, 24, 24)
    assert sorted(path.name for path in config.data.dir.parent.iterdir()) == ["data"]


def test_a_failing_overwrite_keeps_the_old_dataset(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_sealed_json", full)
        with pytest.raises(SanaError, match="the disk is full"):
            list(embed(EmbedOptions(small_config(config.data.dir.parent, "data.image_size=24"), limit=9, overwrite=True)))
    assert Dataset(config.data.dir).image_shape == (1, 16, 16)
    list(embed(EmbedOptions(small_config(config.data.dir.parent, "data.image_size=24"), limit=9, overwrite=True)))
    assert Dataset(config.data.dir).image_shape == (1, 24, 24)
    assert sorted(path.name for path in config.data.dir.parent.iterdir()) == ["data"]


def test_a_strangers_folder_is_not_touched(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config.data.dir.mkdir()
    (config.data.dir / "thesis.txt").write_text("all of it")
    with pytest.raises(SanaError, match="holds thesis.txt, which is no part of a dataset"):
        embedded(config)
    assert (config.data.dir / "thesis.txt").read_text() == "all of it"


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    found = plan(EmbedOptions(small_config(tmp_path)))
    assert (found.images, found.image_shape, found.image_bytes) == (60000, (1, 16, 16), 60000 * 256)
    assert found.lesson_bytes == 60000 * 300 * 2304 * 4
    assert list(tmp_path.iterdir()) == []


def test_each_epoch_is_a_permutation_and_batches_run_on() -> None:
    rows = sample_rows(0, 30, 10, seed=3)
    for epoch in range(3):
        assert sorted(rows[epoch * 10 : (epoch + 1) * 10]) == list(range(10))
    assert rows[:10].tolist() != rows[10:20].tolist()
    assert sample_rows(7, 9, 10, seed=3).tolist() == rows[7:16].tolist()
    assert sample_rows(0, 10, 10, seed=4).tolist() != rows[:10].tolist()
