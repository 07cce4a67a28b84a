"""Metadata files: their places, their contents, and the file names in their rows."""

import csv
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import embedded
from helpers.folders import (
    folder,
    folder_config,
    images,
    listed,
    metadata_folder,
    picture,
    refused,
    rows,
    write,
)

from sana_cli import sources as data
from sana_cli.dataset.reader import Dataset
from sana_cli.sources.walk import fold


def test_metadata_jsonl(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"file_name": "b.png", "text": "a red cube"},
        {"file_name": "sub/a.png", "text": ["a blue ball", " a ball "], "caption_weights": [3, 1]},
        {"file_name": "c.png", "text": ["a red cube"], "other": 5},
    ]
    config = folder_config(tmp_path, metadata_folder(tmp_path / "source", rows))
    summary = embedded(config)
    assert (summary.images, summary.captions, summary.skipped) == (3, 4, 0)
    assert listed(config) == [
        ("b.png", ("a red cube",)), ("sub/a.png", ("a blue ball", "a ball")), ("c.png", ("a red cube",))
    ]  # fmt: skip
    dataset = Dataset(config.data.dir)
    assert dataset.caption_weights(np.array([0, 1])) == [[1.0], [3.0, 1.0]]
    expected = data.fit_image(picture(1), (16, 16), 3)
    assert torch.equal(
        dataset.images(np.array([1]))[0], torch.from_numpy(expected.copy()).float() / 127.5 - 1
    )
    assert not dataset.index.one_word_captions


def test_metadata_csv_and_other_fields_and_splits(tmp_path: Path) -> None:
    source = tmp_path / "source" / "test"
    source.mkdir(parents=True)
    with (source / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["file_name", "prompt"], ["x,y.png", "one, two\nlines"], ["z.png", "zed"]])
    for seed, name in enumerate(("x,y.png", "z.png")):
        picture(seed).save(source / name)
    config = folder_config(tmp_path, tmp_path / "source", "data.split=test", "data.caption_field=prompt")
    embedded(config)
    assert listed(config) == [("x,y.png", ("one, two\nlines",)), ("z.png", ("zed",))]


# --- in sub-folders, and above a split ----------------------------------------------------------------------


def test_metadata_in_sub_folders_names_files_beside_it(tmp_path: Path) -> None:
    write(tmp_path, images("birds/1.png", "cats/1.png", "cats/deep/2.png", "dogs/1.png", "loose.png"))
    write(tmp_path, {
        "birds/metadata.jsonl": rows(("1.png", "a macaw"), ("9.png", "gone"), ("../cats/1.png", "climbs")),
        "cats/Metadata.CSV": "file_name,text\n1.png,a cat\ndeep/2.png,a deep cat\n",
    })  # fmt: skip
    write(tmp_path, {"dogs/1.txt": "never: there is metadata", "loose.txt": "nor here"})
    entries, left = folder(tmp_path)
    assert entries == {
        "birds/1.png": ("a macaw",),
        "cats/1.png": ("a cat",),
        "cats/deep/2.png": ("a deep cat",),
    }
    assert left == [
        ("birds/9.png", "no such file"),
        ("birds/../cats/1.png", "its name leads out of the source"),
        ("dogs/1.png", "no metadata names it"),
        ("loose.png", "no metadata names it"),
    ]


def test_metadata_above_and_below_is_read_from_the_top_down(tmp_path: Path) -> None:
    write(tmp_path, images("train/cat/1.png", "train/cat/2.png", "train/3.png", "val/1.png"))
    write(tmp_path, {
        "metadata.jsonl": rows(
            ("train/cat/1.png", "top"), ("val/1.png", "another split's"), ("val/none.png", "nor this"),
            ("train/4.png", "gone"),
            ("./train//3.png", "odd"), ("other.png", "of none"), ("../up.png", "x"),
        ) + "{\n",
        "train/metadata.csv": "file_name,text\ncat/1.png,middle\n",
        "train/cat/metadata.jsonl": rows(("1.png", "below"), ("2.png", "two")),
    })  # fmt: skip
    entries, left = folder(tmp_path)
    assert entries == {"cat/1.png": ("top",), "3.png": ("odd",), "cat/2.png": ("two",)}
    assert left == [
        ("4.png", "no such file"),
        ("../up.png", "its name leads out of the source"),
        ("../metadata.jsonl:8", "not JSON"),
        ("cat/1.png", "named twice; the first is kept"),
        ("cat/1.png", "named twice; the first is kept"),
    ]
    assert folder(tmp_path, split="val")[0] == {"1.png": ("another split's",)}


@pytest.mark.parametrize("name", ["train\\cat\\1.png", "Train/Cat/1.PNG", "./train/./cat//1.png"])
def test_names_above_a_split_may_be_spelt_as_elsewhere(tmp_path: Path, name: str) -> None:
    write(tmp_path, {**images("train/cat/1.png"), "metadata.jsonl": rows((name, "x"))})
    assert folder(tmp_path) == ({"cat/1.png": ("x",)}, [])


def test_metadata_above_that_names_nothing_of_the_split_is_refused(tmp_path: Path) -> None:
    """Its names may be relative to another folder; class names must not replace captions."""
    write(
        tmp_path,
        {**images("train/cat/1.png"), "metadata.jsonl": rows(("cat/1.png", "x"), ("val/2.png", "y"))},
    )
    refused(tmp_path, r"metadata\.jsonl names no image of train/\n.*train/NAME")
    write(tmp_path, {"train/cat/metadata.jsonl": rows(("1.png", "x"))})
    assert folder(tmp_path)[0] == {"cat/1.png": ("x",)}


def test_metadata_above_the_given_folder_is_named(tmp_path: Path) -> None:
    """Captions one folder up are not read, so class names would replace them."""
    write(
        tmp_path,
        {**images("all/images/cat/1.png"), "all/metadata.csv": "file_name,text\nimages/cat/1.png,x\n"},
    )
    refused(tmp_path / "all" / "images", r"all/metadata\.csv names images of .*\n.*data\.path=.*/all$")
    assert folder(tmp_path / "all")[0] == {"images/cat/1.png": ("x",)}
    write(tmp_path, {"all/metadata.csv": "file_name,text\nelsewhere/1.png,x\n"})
    assert folder(tmp_path / "all" / "images")[0] == {"cat/1.png": ("cat",)}
    write(tmp_path, {"all/metadata.csv": b"\xff\xfe\0of another program"})
    assert folder(tmp_path / "all" / "images")[0] == {"cat/1.png": ("cat",)}


def test_one_metadata_file_of_a_folder_is_read_and_the_others_are_listed(tmp_path: Path) -> None:
    write(tmp_path, {
        **images("a.png", "b.png", "train/c.png"), "metadata.jsonl": rows(("a.png", "x")),
        "METADATA.csv": "file_name,text\nb.png,y\n", "metadata.parquet": b"PAR1",
    })  # fmt: skip
    (tmp_path / "train").rename(tmp_path / "sub")
    entries, left = folder(tmp_path)
    assert entries == {"a.png": ("x",)}
    assert left == [
        ("METADATA.csv", "metadata.jsonl beside it is read"),
        ("b.png", "metadata.jsonl does not name it"),
        (
            "metadata.parquet",
            ".parquet is not read here: data.source=datasets reads it, or save it as metadata.jsonl",
        ),
        ("sub/c.png", "metadata.jsonl does not name it"),
    ]


def test_metadata_that_leads_out_or_nowhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {**images("in/cat/1.png"), "out.jsonl": rows(("1.png", "x"))})
    link = tmp_path / "in" / "cat" / "metadata.jsonl"
    for target, reason in (
        (tmp_path / "out.jsonl", "leads out of"),
        (tmp_path / "none", "leads nowhere"),
        (link, "in a circle"),
    ):
        link.symlink_to(target)
        refused(tmp_path / "in", rf"metadata\.jsonl: a link.* {reason}")
        link.unlink()
    (tmp_path / "in" / "train").mkdir()
    (tmp_path / "in" / "metadata.jsonl").symlink_to(tmp_path / "out.jsonl")
    refused(tmp_path / "in", r"metadata\.jsonl is a link that leads out of")


# --- other formats, and the names in them -------------------------------------------------------------------
JSON_ROWS = [{"file_name": "a.png", "text": "x"}, {"file_name": "b.png", "text": "y"}]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metadata.jsonl", "", "is empty"), ("metadata.jsonl", "\ufeff\n \n", "is empty"),
        ("metadata.jsonl", json.dumps(JSON_ROWS), "is one JSON array"),
        ("metadata.jsonl", json.dumps(JSON_ROWS, indent=1), "is one JSON array"),
        ("metadata.jsonl", "[\n" + ",\n".join(map(json.dumps, JSON_ROWS)) + "\n]", "is one JSON array"),
        ("metadata.jsonl", json.dumps(JSON_ROWS[0], indent=1), "is one JSON object"),
        ("metadata.jsonl", json.dumps({"a.png": "x"}), "is one JSON object"), ("metadata.jsonl", '"x"',
        "is one JSON value"),
        ("metadata.jsonl", '{"image": "a.png", "text": "x"}\n',
        "no line has file_name; the first has image, text"),
        ("metadata.jsonl", '{"file_name": "a.png", "caption": "x"}\n',
        r"no line has text; .* caption\n.*data\.caption_field"),
        ("metadata.jsonl", rows(("a.png", "x")).encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("metadata.jsonl", rows(("a.png", "x")).encode("utf-16-be"), "UTF-16; save it as UTF-8"),
        ("metadata.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "is a Git LFS pointer"),
        ("metadata.csv", "", "is empty"), ("metadata.csv", "\n\n", "is empty"), ("metadata.csv", "sep=,\n",
        "is empty"),
        ("metadata.csv", "file_name;text\na.png;x\n",
        "separated by ';', not by commas\nsave it as CSV with commas"),
        ("metadata.csv", '\ufeff"file_name";"text"\n', "separated by ';'"),
        ("metadata.csv", "sep=;\nfile_name;text\n", "separated by ';'"),
        ("metadata.csv", "file_name\ttext\na.png\tx\n", "separated by tabs"),
        ("metadata.csv", "a.png;a cat, asleep; x\n", "separated by ';'"),
        ("metadata.csv", "a|b\n", r"separated by '\|'"), ("metadata.csv", "a.png,a cat; asleep\n",
        "is a row already"),
        ("metadata.csv", "image,text\n1,x\n", "has no column file_name; it has image, text"),
        ("metadata.csv", "file_name,caption\n1,x\n",
        r"has no column text; it has file_name, caption\n.*data\.caption_field"),
        ("metadata.csv", "file_name,text,text\n1,x,y\n", "has 2 columns text"),
        ("metadata.csv", "file_name,text\na.png,x\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("metadata.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "is a Git LFS pointer"),
    ],
)  # fmt: skip
def test_metadata_of_other_kinds_is_refused_by_name(
    tmp_path: Path, name: str, content: str | bytes, reason: str
) -> None:
    """At once, also in a sub-folder: neither classes nor .txt replace it."""
    write(tmp_path, {**images("cat/a.png"), "cat/a.txt": "x", f"cat/{name}": content})
    refused(tmp_path, rf"cat/{name}.*{reason}")


def test_metadata_that_is_a_little_odd_is_read(tmp_path: Path) -> None:
    write(tmp_path, images("a/1.png", "b/1.png", "c/1.png", "d/1.png", "d/2.png"))
    write(tmp_path, {
        "a/metadata.jsonl": "\ufeff\n\n" + rows(("1.png", "one\u2028line")).replace("\n", "\r\n"),
        "b/metadata.csv": "\ufeffsep=,\r\nfile_name, text \r\n\r\n1.png,b\r\n,\r\n",
        "c/metadata.csv": "file_name,text\r1.png,c\r2.png,\"d\"\"e\"\r",
        "d/metadata.jsonl": "[]\n" + rows(("1.png", "d")) + '{"file_name": "2.png", "caption": "e"}\n',
    })  # fmt: skip
    entries, left = folder(tmp_path)
    assert entries == {"a/1.png": ("one\u2028line",), "b/1.png": ("b",), "c/1.png": ("c",), "d/1.png": ("d",)}
    assert left == [
        ("c/2.png", "no such file"),
        ("d/metadata.jsonl:1", "not a JSON object"),
        ("d/2.png", "no caption: it has no text, but caption"),
    ]


def test_rows_of_csv_that_cannot_be_read_are_listed_by_line(tmp_path: Path) -> None:
    content = b'sep=,\nfile_name,text\n\n1.png,"two\nlines"\n2.png\n3.png,\xff\n4.png,an inch (2" or 3)\n5.png,"open\n6.png,six\n'
    write(tmp_path, {**images(*(f"{n}.png" for n in range(1, 7))), "metadata.csv": content})
    entries, left = folder(tmp_path)
    assert entries == {"1.png": ("two\nlines",), "4.png": ('an inch (2" or 3)',)}
    assert left == [
        ("metadata.csv:6", "1 fields, where the first line has 2"),
        ("metadata.csv:7", "not UTF-8"),
        ("metadata.csv:10", 'a quote (") that does not close'),
        *((f"{n}.png", "metadata.csv does not name it") for n in (2, 3, 5, 6)),
    ]


NFC, NFD = (unicodedata.normalize(form, "Übergröße-é") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("named", "there"),
    [
        (f"{NFC}.png", f"{NFD}.png"), (f"{NFD}.png", f"{NFC}.png"), (f"{NFD.upper()}.PNG", f"{NFC}.png"),
        ("cats/1.png", "Cats/1.PNG"),
        ("sub\\a.png", "sub/a.png"), (".\\sub\\\\A.PNG", "sub/a.png"), ("./sub//a.png", "sub/a.png"),
        ("sub/./a.png", "sub/a.png"),
        ("STRASSE.png", "straße.png"), ("1:2.png", "1:2.png"), ("a\\b.png", "a\\b.png"),
    ],
)  # fmt: skip
def test_names_are_found_by_the_spelling_on_the_disk(tmp_path: Path, named: str, there: str) -> None:
    write(tmp_path, {**images(there), "metadata.jsonl": rows((named, "x"), (there, "again"))})
    assert folder(tmp_path) == ({there: ("x",)}, [(there, "named twice; the first is kept")])


def test_names_that_several_files_have_are_not_guessed(tmp_path: Path) -> None:
    write(tmp_path, images("a.png", "A.png", f"{NFD}.png", f"{NFD.lower()}.png"))
    write(tmp_path, {"metadata.jsonl": rows(("a.PNG", "x"), ("A.png", "exact"), (f"{NFC}.png", "same case"))})
    entries, left = folder(tmp_path)
    assert entries == {"A.png": ("exact",), f"{NFD}.png": ("same case",)}
    assert left[0] == ("a.PNG", "no such file, and several are spelt nearly so: A.png, a.png")


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("cat/1.PNG", r"no such file; is it cats/1.png?"), ("tabby_cta.png",
        "no such file; is it tabby_cat.png?"),
        ("tabby_cat.jpg", "no such file; is it tabby_cat.png?"), ("tabby_cat",
        "no such file; is it tabby_cat.png?"),
        ("cats/2.png", "no such file"), ("photo.png", "no such file"), ("0002.png", "no such file"),
        ("dogs/0001.png", "no such file; is it 0001.png?"), ("1.png", "no such file; is it cats/1.png?"),
        ("dogs/1.png", "no such file"),
        ("..\\a.png", "its name leads out of the source"), ("\\a.png", "its name leads out of the source"),
        ("C:\\a.png", "its name leads out of the source"), ("c:/a.png", "its name leads out of the source"),
        ("x\\..\\..\\a.png", "its name leads out of the source"),
        ("cats", "not a regular file"), ("cats/", "not a regular file"), (".", "not a file name"), ("./",
        "not a file name"),
    ],
)  # fmt: skip
def test_names_that_are_not_found_say_what_is_near(tmp_path: Path, named: str, reason: str) -> None:
    write(
        tmp_path,
        {
            **images("cats/1.png", "tabby_cat.png", "0001.png"),
            "tabby_cat.txt": "x",
            "metadata.jsonl": rows((named, "x")),
        },
    )
    _, left = folder(tmp_path)
    assert left[0] == (named, reason)


@pytest.mark.parametrize("seed", range(5))
def test_any_respelling_finds_its_file(tmp_path: Path, seed: int) -> None:
    chosen = random.Random(seed)
    letters = "abcxyzäöüéñå한글ß"
    names = {
        "/".join("".join(chosen.choices(letters, k=4)) for _ in range(chosen.randrange(1, 4))) + ".png"
        for _ in range(40)
    }
    names = {name for name in names if sum(fold(name) == fold(other) for other in names) == 1}
    names = {unicodedata.normalize(chosen.choice(("NFC", "NFD")), name) for name in names}
    write(tmp_path, images(*names))

    def respelt(name: str) -> str:
        name = unicodedata.normalize(chosen.choice(("NFC", "NFD")), name)
        name = chosen.choice((str.upper, str.lower, str.swapcase, str))(name)
        return chosen.choice(("", "./", ".//")) + name.replace("/", chosen.choice(("/", "//", "/./", "\\")))

    listed_names = sorted(names)
    write(tmp_path, {"metadata.jsonl": rows(*((respelt(name), name) for name in listed_names))})
    entries, left = folder(tmp_path)
    assert entries == {name: (name,) for name in listed_names}
    assert left == []
