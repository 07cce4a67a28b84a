"""Datasets are read as they were written, or reported as damaged."""

import random

import numpy as np
import pytest
import torch

from sana_cli import sources as data
from sana_cli.config.keys import Config
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError


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
    assert dataset.texts()[dataset.index.null_caption] == ""
    assert len(dataset.texts()) == len(set(dataset.texts()))


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
    assert list(Dataset(config.data.dir).verify()) == [
        "index.json",
        *(p.name for p in paths if p.name != "index.json"),
    ]


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
