"""Datasets are read as they were written, or reported as damaged."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import again, embedded, trained

from sana_cli import sources as data
from sana_cli.config.keys import Config
from sana_cli.dataset import embedding, reader
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.runtime import files
from sana_cli.text import words_of


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


@pytest.fixture
def eight(config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The config of a dataset of eight shards of images, of which three stay open."""
    monkeypatch.setattr("sana_cli.commands.embed.IMAGES_AT_ONCE", 5)
    monkeypatch.setattr("sana_cli.commands.embed.writer.WINDOW", 5)
    made = again(config, f"data.dir={config.data.dir}-eight")
    embedded(made)
    assert len(list(made.data.dir.glob("images-*"))) == 8
    monkeypatch.setattr(reader, "MOST_OPEN", 3)
    return made


def test_more_shards_than_stay_open_are_read_alike(eight: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is read when the dataset is opened, and few are mapped afterwards."""
    rows = np.random.default_rng(0).permutation(40)

    def content(dataset: Dataset) -> list[object]:
        texts = dataset.texts()
        ids = dataset.caption_ids(rows)
        return [
            dataset.images(rows).tolist(), [[texts[i] for i in row] for row in ids], dataset.sample_ids(rows),
            [sizes.tolist() for _, sizes in dataset.original_sizes()], dataset.attribute_ids().tolist(), dataset.longest_caption(),
            [state.tolist() for state in dataset.states(np.concatenate(ids))],
        ]  # fmt: skip

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(eight.data.dir))

    with monkeypatch.context() as patched:
        patched.setattr(reader, "MOST_OPEN", 1024)
        expected = content(Dataset(eight.data.dir))
    read = list[str]()
    read_tensors = files.read_tensors

    def noting(path: Path) -> Tensors:
        read.append(path.name)
        return read_tensors(path)

    monkeypatch.setattr(files, "read_tensors", noting)
    dataset = Dataset(eight.data.dir)
    assert not [name for name in read if name.startswith("images-")]
    dataset.images(np.array([12]))
    assert [name for name in read if name.startswith("images-")] == ["images-00002.safetensors"]
    assert content(dataset) == expected
    if Path("/proc/self/maps").exists():
        assert 0 < mapped() <= 6
        sizes = list(dataset.original_sizes()), dataset.attribute_ids()
        del dataset
        assert mapped() == 0, sizes


def overwritten(shard: Path) -> bytes:
    """Damage a shard at its beginning, and leave its size."""
    whole = shard.read_bytes()
    shard.write_bytes(b"\xff" * 64 + whole[64:])
    return whole


def test_a_shard_that_is_read_later_is_checked_then(eight: Config) -> None:
    dataset, shard = Dataset(eight.data.dir), eight.data.dir / "images-00003.safetensors"
    whole = overwritten(shard)
    again_opened = Dataset(eight.data.dir)
    for opened in (dataset, again_opened):
        assert opened.images(np.array([0, 39])).shape == (2, 1, 16, 16)
        for look in (
            lambda one: one.images(np.array([0, 17])),
            lambda one: list(one.original_sizes()),
            lambda one: list(one.verify()),
        ):
            with pytest.raises(SanaError, match=r"images-00003\.safetensors is damaged"):
                look(opened)
    shard.write_bytes(whole[:-1])
    with pytest.raises(SanaError, match=r"images-00003\.safetensors is damaged: expected .* bytes"):
        Dataset(eight.data.dir)
    shard.unlink()
    with pytest.raises(SanaError, match=r"images-00003\.safetensors is missing"):
        Dataset(eight.data.dir)
    with pytest.raises(SanaError, match=r"images-00003\.safetensors is damaged or missing"):
        again_opened.images(np.array([17]))


def test_wrong_tensors_are_found_when_they_are_read_or_verified(eight: Config) -> None:
    changed_shard(eight, changed("attributes", torch.Tensor.long))
    dataset = Dataset(eight.data.dir)
    for look in (lambda: dataset.caption_ids(np.array([0])), lambda: list(dataset.verify())):
        with pytest.raises(
            SanaError, match=r"images-00000\.safetensors is damaged: its tensors are not those"
        ):
            look()


def test_training_names_the_shard_that_is_damaged(eight: Config) -> None:
    """The batches of a run are made in a thread. What it has saved before stays."""
    for shard in eight.data.dir.glob("images-*"):
        overwritten(shard)
    with pytest.raises(SanaError, match=r"images-0000\d\.safetensors is damaged"):
        trained(eight)


def test_the_index_knows_the_words_and_the_longest_of_all_captions(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset(config.data.dir)
    texts = dataset.texts()
    assert dataset.index.words == sorted({word for text in texts for word in words_of(text)})
    assert dataset.longest_caption() == max(map(len, dataset.states(range(len(texts)))))
    assert dataset.texts(3) == texts[:3]
    older = dataset.index.model_copy(update={"counts": dataset.index.counts.but(longest=None)})
    dataset.index = older
    assert dataset.longest_caption() == max(map(len, dataset.states(range(len(texts)))))
    monkeypatch.setattr(embedding, "MOST_WORDS", len(set(texts)) - 2)
    other = again(config, f"data.dir={config.data.dir}-other")
    embedded(other)
    assert Dataset(other.data.dir).index.words is None


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
