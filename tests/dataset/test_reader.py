"""Datasets are read as they were written, or reported as damaged."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import again, embedded

from sana_cli import sources as data
from sana_cli.config.keys import Config
from sana_cli.dataset import reader
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.runtime import files


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
    assert list(dataset.attributes) == ["label"]
    labels = [dataset.attributes["label"][number] for number in dataset.attribute_ids()[:, 0]]
    assert labels == [sample.attributes["label"] for sample in source]
    assert dataset.caption_attributes(rows) == [[["label"], ["label"]]] * 3
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


Tensors = dict[str, torch.Tensor]


def changed_shard(config: Config, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a shard, with an index that fits it."""
    path, index = config.data.dir / "images-00000.safetensors", config.data.dir / "index.json"
    tensors = {name: tensor.clone() for name, tensor in files.read_tensors(path).items()}
    change(tensors)
    files.write_tensors(path, tensors)
    content = json.loads(index.read_text())
    del content["sha256"]
    content["images"][0] |= {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
    files.write_sealed_json(index, content)


def a_value_of(name: str, value: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[7] = value

    return change


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def says_nothing(tensors: Tensors) -> None:
    tensors["caption_attributes"] = torch.zeros(40, 2, dtype=torch.int64)


def without_attributes(tensors: Tensors) -> None:
    del tensors["attributes"]


@pytest.mark.parametrize(
    "damage",
    [
        a_value_of("attributes", 10),
        a_value_of("attributes", -2),
        changed("attributes", torch.Tensor.long),
        changed("attributes", torch.Tensor.float),
        changed("attributes", lambda t: t[:, 0]),
        changed("attributes", lambda t: t[1:]),
        changed("attributes", lambda t: torch.cat([t, t], dim=1)),
        a_value_of("caption_attributes", 2),
        a_value_of("caption_attributes", -1),
        changed("caption_attributes", torch.Tensor.int),
        changed("caption_attributes", lambda t: t[:, :1]),
        changed("caption_attributes", lambda t: t[1:]),
        without_attributes,
    ],
)
def test_damaged_attributes_are_refused(config: Config, damage: Callable[[Tensors], None]) -> None:
    changed_shard(config, says_nothing)
    dataset = Dataset(config.data.dir)
    assert len(dataset.attributes["label"]) == 10
    assert dataset.caption_attributes(np.arange(40)) == [[[], []]] * 40
    del dataset
    changed_shard(config, damage)
    with pytest.raises(SanaError, match=r"images-00000\.safetensors is damaged: its tensors are not those"):
        Dataset(config.data.dir)


def test_a_shard_without_attributes_has_none(config: Config) -> None:
    changed_shard(config, without_attributes)
    dataset = Dataset(config.data.dir)
    assert dataset.attribute_ids().tolist() == [[-1]] * 40
    assert dataset.caption_attributes(np.arange(2)) == [[[], []]] * 2


def test_more_shards_than_stay_open_are_read_alike(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is checked, and few are mapped afterwards."""
    monkeypatch.setattr("sana_cli.commands.embed.IMAGES_AT_ONCE", 5)
    monkeypatch.setattr("sana_cli.commands.embed.writer.WINDOW", 5)
    few = again(config, f"data.dir={config.data.dir}-few")
    embedded(few)
    rows = np.random.default_rng(0).permutation(40)

    def content(dataset: Dataset) -> list[object]:
        texts = dataset.texts()
        ids = dataset.caption_ids(rows)
        return [
            dataset.images(rows).tolist(), [[texts[i] for i in row] for row in ids], dataset.sample_ids(rows),
            dataset.original_sizes().tolist(), dataset.attribute_ids().tolist(), dataset.longest_caption(),
            [state.tolist() for state in dataset.states(np.concatenate(ids))],
        ]  # fmt: skip

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(few.data.dir))

    expected = content(Dataset(few.data.dir))
    assert len(list(few.data.dir.glob("images-*"))) == 8
    monkeypatch.setattr(reader, "MOST_OPEN", 3)
    dataset = Dataset(few.data.dir)
    assert content(dataset) == expected
    if Path("/proc/self/maps").exists():
        assert 0 < mapped() <= 6
        sizes = dataset.original_sizes(), dataset.attribute_ids()
        del dataset
        assert mapped() == 0, sizes
    shard = few.data.dir / "images-00001.safetensors"
    files.write_tensors(shard, files.read_tensors(few.data.dir / "images-00000.safetensors"))
    with shard.open("r+b") as file:
        file.write(b"\0")
    with pytest.raises(SanaError, match=r"images-00001\.safetensors is damaged"):
        Dataset(few.data.dir)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to mmap 24 bytes from file <x>: Cannot allocate memory (12)"),
        MemoryError("Cannot allocate memory (os error 12)"),
    ],
)
def test_a_system_that_maps_no_more_files_is_one_message(
    config: Config, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(files, "safe_open", fails)
    with pytest.raises(SanaError, match=r"safetensors cannot be mapped into memory: .*\n.*vm\.max_map_count"):
        Dataset(config.data.dir)


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
