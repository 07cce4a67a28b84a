"""Hugging Face datasets: columns, classes as captions, and splits."""

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import embedded, encoded, small_config
from helpers.folders import RGB, folder, image_bytes, images, listed, opened, picture, refused, write

from sana_cli import sources as data
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.sources import Entry, Skipped


def test_hugging_face_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {
        "image": [{"bytes": encoded(picture(seed)), "path": None} for seed in range(3)],
        "text": ["a", "", "c"],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    config = small_config(tmp_path, "data.source=datasets", f"data.path={tmp_path / 'saved'}", *RGB)
    summary = embedded(config)
    assert listed(config) == [("train-00000000", ("a",)), ("train-00000002", ("c",))]
    assert summary.first_skipped == ("train-00000001: no caption",)
    expected = data.fit_image(picture(2), (16, 16), 3)
    found = Dataset(config.data.dir).images(np.array([1]))[0]
    assert torch.equal(found, torch.from_numpy(expected.copy()).float() / 127.5 - 1)
    assert embedded(config).was_there
    with pytest.raises(SanaError, match=r"data\.caption_field: .* has no column words; it has image, text"):
        embedded(
            small_config(
                tmp_path / "x",
                "data.source=datasets",
                f"data.path={tmp_path / 'saved'}",
                "data.caption_field=words",
            )
        )


def labelled(folder: Path, labels: list[Any], kind: str = "class") -> Path:
    datasets = pytest.importorskip("datasets")
    classes = datasets.ClassLabel(names=["tabby_cat", "dog"])
    feature = {"class": classes, "list": datasets.Sequence(classes), "int": datasets.Value("int64")}[kind]
    features = datasets.Features({"picture": datasets.Image(), "label": feature})
    pictures = [{"bytes": image_bytes(seed), "path": None} for seed in range(len(labels))]
    made = datasets.Dataset.from_dict({"picture": pictures, "label": labels}, features=features)
    datasets.DatasetDict({"train": made, "val": made.select([0])}).save_to_disk(folder / "saved")
    made.save_to_disk(folder / "one")
    return folder / "saved"


def test_classes_of_a_dataset_are_captions(tmp_path: Path) -> None:
    saved = labelled(tmp_path, [1, 0, -1, None])
    fields = {"caption_field": "label", "image_field": "picture"}
    source = opened(saved, "datasets", **fields, caption_template="a {}.")
    found = list(source)
    assert [(e.id, e.captions, e.attributes) for e in found if isinstance(e, Entry)] == [
        ("train-00000000", ("a dog.",), {"label": "dog"}),
        ("train-00000001", ("a tabby cat.",), {"label": "tabby_cat"}),
    ]
    assert [(e.name, e.reason) for e in found if isinstance(e, Skipped)] == [
        ("train-00000002", "no caption: its class is -1, which has no name"),
        ("train-00000003", "no caption: its class is None, which has no name"),
    ]
    assert opened(saved, "datasets", **fields).fingerprint() != source.fingerprint()
    more = (
        "data.caption_field=label",
        "data.image_field=picture",
        "data.caption_template=a {}.",
        "data.workers=0",
    )
    config = small_config(tmp_path, "data.source=datasets", f"data.path={saved}", *more, *RGB)
    embedded(config)
    dataset = Dataset(config.data.dir)
    assert dataset.attributes == {"label": ["dog", "tabby_cat"]}
    assert dataset.attribute_ids().tolist() == [[0], [1]]


def test_lists_of_classes_are_several_captions(tmp_path: Path) -> None:
    saved = labelled(tmp_path, [[1, 0], [-1, 1], [-1], [], None], "list")
    found = list(opened(saved, "datasets", caption_field="label", image_field="picture"))
    assert [(e.captions, e.attributes) for e in found if isinstance(e, Entry)] == [
        (("dog", "tabby cat"), {}),
        (("dog",), {}),
    ]
    assert len([e for e in found if isinstance(e, Skipped) and e.reason.startswith("no caption")]) == 3


def test_columns_that_are_not_there_are_told_from_those_that_are(tmp_path: Path) -> None:
    saved = labelled(tmp_path, [0])
    refused(
        saved, r"data\.image_field: .* no column image; .*\n.*--set data\.image_field=picture", "datasets"
    )
    given = {"image_field": "picture"}
    refused(
        saved,
        r"data\.caption_field: .* no column text; .*\n.*--set data\.caption_field=label",
        "datasets",
        **given,
    )
    plain = labelled(tmp_path / "plain", [0], "int")
    error = refused(
        plain, r"data\.caption_field: .* no column text; it has picture, label$", "datasets", **given
    )
    assert error.exit_code == 2
    (entry,) = opened(plain, "datasets", **given, caption_field="label")
    assert entry == Skipped("train-00000000", "a caption is not text: 0")


def test_splits_of_saved_datasets_are_told(tmp_path: Path) -> None:
    saved = labelled(tmp_path, [0])
    fields = {"caption_field": "label", "image_field": "picture"}
    assert opened(saved, "datasets", **fields, split="val").count() == 1
    refused(
        saved, r"data\.split: .* has no split test\nit has train, val", "datasets", **fields, split="test"
    )
    refused(
        tmp_path / "one",
        r"data\.split: .* has no split test\nit was saved without",
        "datasets",
        **fields,
        split="test",
    )
    refused(
        saved / "val",
        r"data\.split: .* has no split val\nit was saved without",
        "datasets",
        **fields,
        split="val",
    )


def test_tables_that_git_lfs_has_not_fetched_are_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(
        tmp_path,
        {"data/train-0.parquet": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"},
    )
    refused(tmp_path, r"train-0\.parquet is a Git LFS pointer", "datasets")


def test_csv_written_by_the_library_comes_back(tmp_path: Path) -> None:
    """Captions survive, whatever the writer quotes."""
    chosen = random.Random(3)
    texts = ["".join(chosen.choices('a ,"\n\t;é|=', k=12)) + "." for _ in range(60)]
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [["file_name", "text"], *((f"{n}.png", text) for n, text in enumerate(texts))]
        )
    write(tmp_path, images(*(f"{n}.png" for n in range(60))))
    assert folder(tmp_path) == ({f"{n}.png": (text.strip(),) for n, text in enumerate(texts)}, [])
