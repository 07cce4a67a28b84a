"""MNIST and files in its format: strict bytes, EMNIST's names, several sets in a folder."""

import gzip
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import embedded, small_config
from helpers.folders import listed
from PIL import Image

from sana_cli import sources as data
from sana_cli.config.keys import DataConfig
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.sources import IdxFiles


def test_mnist_is_mnist() -> None:
    train, test = data.MNIST("train"), data.MNIST("test")
    assert (train.images.shape, test.images.shape) == ((60000, 28, 28), (10000, 28, 28))
    assert np.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    first = next(iter(train))
    assert (first.id, first.captions, first.attributes) == ("train-00000", ("5", "five"), {"label": "5"})


def test_damaged_mnist_is_named(tmp_path: Path) -> None:
    for path in data.ASSETS.glob("*.gz"):
        shutil.copy(path, tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    raw = bytearray(gzip.decompress(labels.read_bytes()))
    raw[1000] ^= 1
    labels.write_bytes(gzip.compress(raw))
    with pytest.raises(
        SanaError, match=r"train-labels-idx1-ubyte\.gz is damaged: its content is not MNIST's"
    ):
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


@pytest.mark.parametrize("channels", [1, 3])
def test_idx_files(tmp_path: Path, channels: int) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shape = (6, 10, 12) if channels == 1 else (6, 10, 12, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def header(*sizes: int) -> bytes:
        return bytes([0, 0, 8, len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes)

    (source / "t10k-images-idx-ubyte").write_bytes(header(*shape) + pixels.tobytes())
    (source / "t10k-labels-idx1-ubyte").write_bytes(header(6) + bytes([0, 1, 2, 0, 1, 2]))
    more = (
        "data.source=idx",
        "data.split=test",
        f"model.in_channels={channels}",
        "data.class_names=[shirt, shoe, bag]",
    )
    config = small_config(tmp_path, f"data.path={source}", "data.caption_template=a {}", *more)
    embedded(config)
    assert listed(config)[1] == ("test-000001", ("a shoe",))
    dataset = Dataset(config.data.dir)
    assert dataset.attributes == {"label": ["shirt", "shoe", "bag"]}
    assert dataset.attribute_ids().tolist() == [[0], [1], [2], [0], [1], [2]]
    expected = data.fit_image(Image.fromarray(pixels[1]), (16, 16), channels)
    found = dataset.images(np.array([1]))[0]
    assert torch.equal(found, torch.from_numpy(expected.copy()).float() / 127.5 - 1)
    with pytest.raises(SanaError, match=r"data\.class_names: 2 names, but a label is 2"):
        embedded(small_config(tmp_path / "x", f"data.path={source}", *more, "data.class_names=[a, b]"))


# --- EMNIST and others in MNIST's file format ---------------------------------------------------------------
# an F, since all its rotations and mirror images differ; EMNIST stores it column by column
UPRIGHT = np.array([[9, 9, 9], [9, 0, 0], [9, 9, 0], [9, 0, 0]], dtype=np.uint8)


def idx_bytes(values: Any) -> bytes:
    values = np.asarray(values, dtype=np.uint8)
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_set(
    folder: Path, stem: str, labels: list[int], image: np.ndarray, end: str = "", dot: str = "-"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for what, content in (("images", idx_bytes([image] * len(labels))), ("labels", idx_bytes(labels))):
        name = f"{stem}-{what}{dot}idx{3 if what == 'images' else 1}-ubyte{end}"
        (folder / name).write_bytes(gzip.compress(content) if end else content)
    return folder


def idx_source(folder: Path, **more: Any) -> IdxFiles:
    return IdxFiles(DataConfig(source="idx", path=folder, **more))


def captions_in(found: IdxFiles) -> list[tuple[str, ...]]:
    return [entry.captions for entry in found]


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("name", ["letters", "balanced", "byclass", "bymerge", "digits", "mnist"])
def test_emnist_by_its_own_names_and_upright(tmp_path: Path, name: str, end: str) -> None:
    folder = write_set(tmp_path, f"emnist-{name}-train", [1, 2, 1], UPRIGHT.T, end)
    write_set(tmp_path, f"emnist-{name}-test", [2], 5 + UPRIGHT.T, end)
    train, test = idx_source(folder), idx_source(folder, split="test")
    assert (train.count(), test.count()) == (3, 1)
    assert [entry.id for entry in train] == ["train-000000", "train-000001", "train-000002"]
    for image in (entry.image for entry in train):
        assert isinstance(image, np.ndarray)
        assert np.array_equal(np.asarray(data.decode_image(image)), UPRIGHT)
    (held_out,) = test
    assert isinstance(held_out.image, np.ndarray)
    assert np.array_equal(np.asarray(data.decode_image(held_out.image)), UPRIGHT + 5)
    assert captions_in(train) == [("1",), ("2",), ("1",)]
    assert [entry.attributes for entry in train] == [{"label": "1"}, {"label": "2"}, {"label": "1"}]


def test_emnist_is_named_by_its_mapping(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "emnist-letters-train", [1, 26, 11], UPRIGHT.T, ".gz")
    numbers = idx_source(folder).fingerprint()
    (folder / "emnist-letters-mapping.txt").write_text(
        "".join(f"{i + 1} {65 + i} {97 + i}\n" for i in range(26))
    )
    named = idx_source(folder, caption_template="the letter {}")
    assert captions_in(named) == [
        ("the letter A", "the letter a"), ("the letter Z", "the letter z"), ("the letter K", "the letter k")
    ]  # fmt: skip
    assert [entry.attributes["label"] for entry in named] == ["A or a", "Z or z", "K or k"]
    assert captions_in(idx_source(folder, caption_template="a letter")) == [("a letter",)] * 3, (
        "equal captions count once"
    )
    prints = [numbers, idx_source(folder).fingerprint(), named.fingerprint()]
    (folder / "emnist-letters-mapping.txt").write_bytes(b"\xef\xbb\xbf1 945\r\n26 8364\r\n\r\n11 66")
    assert captions_in(idx_source(folder)) == [("α",), ("€",), ("B",)]
    prints.append(idx_source(folder).fingerprint())
    letters = tuple("abcdefghijklmnopqrstuvwxyz")
    assert captions_in(idx_source(folder, class_names=letters)) == [("a",), ("z",), ("k",)], (
        "labels begin at 1"
    )
    assert captions_in(idx_source(folder, class_names=("none", *letters))) == [("a",), ("z",), ("k",)], (
        "0 may have a name too"
    )
    prints.append(idx_source(folder, class_names=letters).fingerprint())
    assert all(a != b for i, a in enumerate(prints) for b in prints[:i])
    balanced = write_set(tmp_path / "b", "emnist-balanced-test", [0, 10, 46], UPRIGHT.T)
    (balanced / "emnist-balanced-mapping.txt").write_text("0 48\n10 65\n46 116\n")
    assert captions_in(idx_source(balanced, split="test")) == [("0",), ("A",), ("t",)]


def test_a_mapping_that_says_too_little_is_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "emnist-letters-train", [1, 3], UPRIGHT.T)
    for text, message in {
        b"1 65\n2 66\n": "has no name for label 3",
        b"1 65\n3\n": "line 2 is not a label and the codes of its characters: '3'",
        b"1 65\n3 C\n": "line 2 is not a label",
        b"1 65\n3 10\n": "line 2 is not a label",
        b"1 65\n3 99999999999\n": "line 2 is not a label",
        b"1 65\n3 55296\n": "line 2 is not a label",
        "1 65\n3 67\n".encode("utf-16"): "is no text: UTF-16",
        b"\n" * 2**21: "is no text: over",
    }.items():
        (folder / "emnist-letters-mapping.txt").write_bytes(text)
        with pytest.raises(SanaError, match=f"emnist-letters-mapping.txt.*{message}"):
            idx_source(folder)
    with pytest.raises(SanaError, match=r"data\.class_names: 2 names, but a label is 3"):
        idx_source(folder, class_names=("a", "b"))


def test_several_sets_in_a_folder_are_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "emnist-letters-train", [1], UPRIGHT.T)
    # the other split alone is another dataset too
    write_set(tmp_path, "emnist-balanced-test", [1], UPRIGHT.T, ".gz")
    with pytest.raises(
        SanaError, match=r"several datasets: emnist-balanced, emnist-letters\n(.|\n)*folder of its own"
    ):
        idx_source(folder)
    other = write_set(tmp_path / "other", "emnist-letters-train", [1], UPRIGHT.T)
    (other / "emnist-balanced-mapping.txt").write_text("1 65\n")
    assert captions_in(idx_source(other)) == [("1",)], "a mapping alone is not another set"
    write_set(other, "train", [1], UPRIGHT)
    with pytest.raises(SanaError, match=r"several datasets: emnist-letters, train-images\*"):
        idx_source(other)
    with pytest.raises(SanaError, match=r"has no emnist-digits-valid-images\*"):
        idx_source(write_set(tmp_path / "digits", "emnist-digits-train", [1], UPRIGHT.T), split="valid")


@pytest.mark.parametrize(("end", "dot"), [("", "-"), (".gz", "-"), ("", "."), (".gz", ".")])
def test_plain_names_stay_as_they_are(tmp_path: Path, end: str, dot: str) -> None:
    folder = write_set(tmp_path, "t10k", [1, 0], UPRIGHT, end, dot)
    found = idx_source(folder, split="test", class_names=("zero", "one"))
    assert captions_in(found) == [("one",), ("zero",)]
    image = next(iter(found)).image
    assert isinstance(image, np.ndarray)
    assert np.array_equal(image, UPRIGHT), "it is not transposed"
    assert found.fingerprint()["captions"] == ["{}", "zero", "one"]
    assert set(found.fingerprint()) == {"source", "split", "sha256", "captions"}


@pytest.mark.parametrize("dot", ["-", "."])
def test_plain_files_come_before_gzip(tmp_path: Path, dot: str) -> None:
    for stem in ("train", "emnist-mnist-train"):
        folder = tmp_path / stem
        write_set(folder, stem, [7], UPRIGHT, ".gz")
        write_set(folder, stem, [3], UPRIGHT, dot=dot)
        (folder / f"{stem}-images").write_text("notes")
        (folder / f"{stem}-labels.md").write_text("notes")
        assert captions_in(idx_source(folder)) == [("3",)]


def test_emnist_is_embedded_with_its_held_out_split(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "source", "emnist-letters-train", [1, 2], UPRIGHT.T, ".gz")
    write_set(folder, "emnist-letters-test", [2], UPRIGHT.T, ".gz")
    (folder / "emnist-letters-mapping.txt").write_text("1 65 97\n2 66 98\n")
    config = small_config(tmp_path, "data.source=idx", f"data.path={folder}", "data.held_out_split=test")
    summary = embedded(config)
    assert summary.held_out is not None
    dataset = Dataset(config.data.dir)
    texts = dataset.texts()
    assert [{texts[i] for i in ids} for ids in dataset.caption_ids(np.arange(2))] == [{"A", "a"}, {"B", "b"}]
    assert embedded(config).was_there
    (folder / "emnist-letters-mapping.txt").write_text("1 65\n2 66\n")
    with pytest.raises(SanaError, match=r"was made with source\.captions"):
        embedded(config)
