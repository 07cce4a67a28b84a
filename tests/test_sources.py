"""What a person's folders and shards hold: everything is read, passed over for a reason, or counted and listed."""

import csv
import io
import json
import os
import random
import tarfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import embedded, small_config
from PIL import Image

from sana_cli.config.keys import DataConfig
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.sources import Entry, Skipped, Source, open_source, webdataset
from sana_cli.sources.splits import split_of
from sana_cli.sources.walk import fold, is_hidden

RGB = ("model.in_channels=3", "data.image_size=16")


def image_bytes(seed: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes | str | None]) -> Path:
    """Files by their names; None is an image of its own."""
    for seed, (name, content) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made = image_bytes(seed) if content is None else content
        path.write_bytes(made.encode() if isinstance(made, str) else made)
    return root


def images(*names: str) -> dict[str, bytes | str | None]:
    return dict.fromkeys(names)


def rows(*pairs: tuple[str, str]) -> str:
    return "".join(json.dumps({"file_name": name, "text": text}, ensure_ascii=False) + "\n" for name, text in pairs)


def opened(path: Path, source: str = "folder", **more: Any) -> Source:
    return open_source(DataConfig(source=source, path=path, **more))  # type: ignore[arg-type]


def read(source: Source) -> tuple[dict[str, tuple[str, ...]], list[tuple[str, str]]]:
    """Captions by sample id, and what is left out. It is counted, and comes in the same order each time."""
    found = list(source)
    assert source.count() in (None, len(found))
    assert [getattr(entry, "id", entry) for entry in source] == [getattr(entry, "id", entry) for entry in found]
    entries = {entry.id: entry.captions for entry in found if isinstance(entry, Entry)}
    assert len(entries) == sum(isinstance(entry, Entry) for entry in found)
    return entries, [(entry.name, entry.reason) for entry in found if isinstance(entry, Skipped)]


def folder(path: Path, **more: Any) -> tuple[dict[str, tuple[str, ...]], list[tuple[str, str]]]:
    return read(opened(path, **more))


def refused(path: Path, match: str, source: str = "folder", **more: Any) -> SanaError:
    with pytest.raises(SanaError, match=match) as caught:
        opened(path, source, **more)
    return caught.value


# --- metadata in sub-folders, and above a split -----------------------------------------------------------------------


def test_metadata_in_sub_folders_names_files_beside_it(tmp_path: Path) -> None:
    write(tmp_path, images("birds/1.png", "cats/1.png", "cats/deep/2.png", "dogs/1.png", "loose.png"))
    write(tmp_path, {
        "birds/metadata.jsonl": rows(("1.png", "a macaw"), ("9.png", "gone"), ("../cats/1.png", "climbs")),
        "cats/Metadata.CSV": "file_name,text\n1.png,a cat\ndeep/2.png,a deep cat\n",
    })  # fmt: skip
    write(tmp_path, {"dogs/1.txt": "never: there is metadata", "loose.txt": "nor here"})
    entries, left = folder(tmp_path)
    assert entries == {"birds/1.png": ("a macaw",), "cats/1.png": ("a cat",), "cats/deep/2.png": ("a deep cat",)}
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
            ("train/cat/1.png", "top"), ("val/1.png", "another split's"), ("val/none.png", "nor this"), ("train/4.png", "gone"),
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
    """Its names may be relative to another folder: the classes' names would be the captions, and nothing said."""
    write(tmp_path, {**images("train/cat/1.png"), "metadata.jsonl": rows(("cat/1.png", "x"), ("val/2.png", "y"))})
    refused(tmp_path, r"metadata\.jsonl names no image of train/\n.*train/NAME")
    write(tmp_path, {"train/cat/metadata.jsonl": rows(("1.png", "x"))})
    assert folder(tmp_path)[0] == {"cat/1.png": ("x",)}


def test_metadata_above_the_given_folder_is_named(tmp_path: Path) -> None:
    """The captions lie one folder up: they are not read there, so class names would take their place."""
    write(tmp_path, {**images("all/images/cat/1.png"), "all/metadata.csv": "file_name,text\nimages/cat/1.png,x\n"})
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
        ("metadata.parquet", ".parquet is not read here: data.source=datasets reads it, or save it as metadata.jsonl"),
        ("sub/c.png", "metadata.jsonl does not name it"),
    ]


def test_metadata_that_leads_out_or_nowhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {**images("in/cat/1.png"), "out.jsonl": rows(("1.png", "x"))})
    link = tmp_path / "in" / "cat" / "metadata.jsonl"
    for target, reason in ((tmp_path / "out.jsonl", "leads out of"), (tmp_path / "none", "leads nowhere"), (link, "in a circle")):
        link.symlink_to(target)
        refused(tmp_path / "in", rf"metadata\.jsonl: a link.* {reason}")
        link.unlink()
    (tmp_path / "in" / "train").mkdir()
    (tmp_path / "in" / "metadata.jsonl").symlink_to(tmp_path / "out.jsonl")
    refused(tmp_path / "in", r"metadata\.jsonl is a link that leads out of")


# --- captions that are not read must not be replaced by others --------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "todo"),
    [
        ("metadata.parquet", "PAR1", "write metadata.jsonl"), ("cat/metadata.tsv", "x", "write metadata.jsonl"),
        ("Metadata.json", "[]", "write metadata.jsonl"), ("metadata.jsonl.gz", "x", "write metadata.jsonl"),
        ("captions.txt", "1.png a cat", "write metadata.jsonl"), ("annotations/captions_train2017.json", "{}", "metadata.jsonl"),
        ("train_captions.csv", "x", "write metadata.jsonl"), ("prompts.txt", "x", "write metadata.jsonl"),
        ("cat/1.caption", "a cat asleep", r"rename it 1\.txt"), ("cat/1.png.txt", "a cat asleep", r"rename it 1\.txt"),
        ("cat/1.json", '{"caption": "a cat asleep"}', r"write its caption to 1\.txt"),
        ("captions/1.txt", "a cat asleep", r"put it beside its image, cat/1\.png"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("classes", [True, False])
def test_captions_that_are_not_read_are_refused(tmp_path: Path, name: str, content: str, todo: str, classes: bool) -> None:
    write(tmp_path, {**images("cat/1.png"), name: content})
    if classes:
        error = refused(tmp_path, rf"{name.split('/')[-1]} seems to hold captions, and is not read: .*folders\n.*{todo}")
        assert error.exit_code == 2
    else:  # metadata wins, and it is listed or is nobody's loss
        write(tmp_path, {"metadata.jsonl": rows(("cat/1.png", "x"))})
        entries, left = folder(tmp_path)
        assert entries == {"cat/1.png": ("x",)}
        assert [name for name, _ in left] == [name] * (name.split("/")[-1] not in ("1.caption", "1.png.txt", "1.json", "1.txt"))


def test_captions_of_other_programs_above_a_split_are_refused_too(tmp_path: Path) -> None:
    write(tmp_path, {**images("train/cat/1.png"), "._captions.json": "{}", "captions.json": "{}"})
    refused(tmp_path, r"captions\.json seems to hold captions, and is not read: captions would be the names of folders")
    (tmp_path / "train" / "cat" / "1.png").rename(tmp_path / "train" / "1.png")
    refused(tmp_path, r"captions\.json seems to hold captions, and is not read: there would be no captions")


def test_what_is_no_caption_is_no_hindrance(tmp_path: Path) -> None:
    write(tmp_path, images("cat/1.png"))
    write(tmp_path, {"cat/1.json": '{"shapes": [], "caption": ""}', "labels.txt": "cat", "README.txt": "x", "LICENSE": "x",
                     "info.json": "{}", "notes.md": "x", "cat/1.png.json": "[" * 100_000, "cat/1.xml": "<x/>"})  # fmt: skip
    entries, left = folder(tmp_path)
    assert entries == {"cat/1.png": ("cat",)}
    assert left == [
        (name, f"{name[-5:].lstrip('1gs')} is not read here: captions are the names of folders")
        for name in ("cat/1.json", "cat/1.png.json")
    ] + [("labels.txt", ".txt is not read here: captions are the names of folders")]


def test_captions_beside_images_are_found_as_the_disk_spells_them(tmp_path: Path) -> None:
    composed = unicodedata.normalize("NFC", "é")
    write(tmp_path, images("1.PNG", "2.png", "A.png", "a.png", f"{composed}.png", "3.png", "4.png", "README.png"))
    write(tmp_path, {"1.TXT": "one", "a.txt": "small a", unicodedata.normalize("NFD", "é") + ".txt": "accent", "9.txt": "lost",
                     "3.caption": "kohya's", "3.json": "{}", "license.txt": "x", "captions.txt": "x", "4.txt": "four",
                     "metadata.json": "{}", "README.txt": "read"})  # fmt: skip
    entries, left = folder(tmp_path)
    assert entries == {
        "1.PNG": ("one",), "a.png": ("small a",), f"{composed}.png": ("accent",), "4.png": ("four",), "README.png": ("read",)
    }  # fmt: skip
    assert left == [
        ("2.png", "no caption"),
        ("3.png", "no caption: 3.caption is not read"),
        ("A.png", "no caption"),
        ("9.txt", "no image"),
        ("captions.txt", "not read: captions are read from metadata.jsonl, metadata.csv, or .txt of an image's name"),
        ("metadata.json", "not read: captions are read from metadata.jsonl, metadata.csv, or .txt of an image's name"),
    ]
    write(tmp_path, {"metadata.parquet": "PAR1"})
    refused(tmp_path, r"metadata\.parquet seems to hold captions, and is not read: captions would come from \.txt")


@pytest.mark.parametrize("with_text", [True, False])
def test_folders_of_other_splits_are_no_classes(tmp_path: Path, with_text: bool) -> None:
    write(tmp_path, images("val/1.png", "Test/1.png"))
    if with_text:
        write(tmp_path, {"val/1.txt": "x"})
    refused(tmp_path, r"has no folder train, but Test, val\n.*data\.split=Test")
    write(tmp_path, images("Train/dog/1.png"))
    assert folder(tmp_path) == ({"dog/1.png": ("dog",)}, [])
    assert refused(tmp_path, r"has no folder dev\nit has Test, Train, val", split="dev").exit_code == 2


def test_captions_are_read_as_text_is(tmp_path: Path) -> None:
    """Lines end at line ends only; other encodings are named."""
    write(tmp_path, images(*(f"{n}.png" for n in range(5))))
    odd = "one\u2028still one\x0cand\x85on"
    write(tmp_path, {
        "0.txt": f"\ufeff{odd}\r\ntwo\rthree\n", "1.txt": "one".encode("utf-16"), "2.txt": b"x\xff",
        "3.txt": "one".encode("utf-16-le"),
        "4.txt": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    })  # fmt: skip
    entries, left = folder(tmp_path)
    assert entries == {"0.png": (odd, "two", "three")}
    assert left == [
        ("1.png", "its captions are not UTF-8: UTF-16; save it as UTF-8"),
        ("2.png", "its captions are not UTF-8: invalid start byte at byte 1"),
        ("3.png", "its captions are not UTF-8: UTF-16; save it as UTF-8"),
        ("4.png", "its captions are a Git LFS pointer: fetch them with git lfs pull"),
    ]


# --- hidden and system entries ----------------------------------------------------------------------------------------

HIDDEN = [
    ".ipynb_checkpoints/x.png", "cat/.ipynb_checkpoints/1-checkpoint.png", ".Trash-1000/files/old.png", "@eaDir/1.png/THUMB.png",
    "__MACOSX/cat/._1.png", "cat/._1.png", "#recycle/2.png", "#snapshot/day/3.png", "lost+found/4.png", "$RECYCLE.BIN/5.png",
    "System Volume Information/6.png", ".git/7.png", "cat/Thumbs.db", "cat/desktop.ini", ".DS_Store", "cat/.hidden.zip",
    "cat/.metadata.jsonl", ".x/metadata.jsonl", "@EADIR/metadata.csv",
]  # fmt: skip


@pytest.mark.parametrize("captions", ["classes", "text", "metadata"])
def test_hidden_entries_are_passed_over(tmp_path: Path, captions: str) -> None:
    root = tmp_path / ".cache" / "@eaDir"  # which the given folder may lie in
    write(root, {**images("cat/1.png", "dog/1.png"), **images(*HIDDEN)})
    if captions == "text":
        write(root, {"cat/1.txt": "cat", "dog/1.txt": "dog", "cat/._1.txt": "\0\5\x16\7"})
    if captions == "metadata":
        write(root, {"metadata.jsonl": rows(("cat/1.png", "cat"), ("dog/1.png", "dog"))})
    found = list(opened(root))
    assert [(entry.id, entry.captions) for entry in found if isinstance(entry, Entry)] == [
        ("cat/1.png", ("cat",)), ("dog/1.png", ("dog",))
    ]  # fmt: skip
    assert len(found) == 2
    if captions == "classes":
        assert [entry.label for entry in found if isinstance(entry, Entry)] == [0, 1]


def test_names_that_only_look_hidden_are_read(tmp_path: Path) -> None:
    assert not any(map(is_hidden, ("a.b", "..", ".", "eaDir", "x@eaDir", "recycle", "thumbs.png", "#1", "$x", "_", "~")))
    write(tmp_path, images("#1/a.png", "$x/a.png", "a.b/a.png"))
    assert len(folder(tmp_path)[0]) == 3


def test_a_row_may_name_a_hidden_file(tmp_path: Path) -> None:
    """Who writes the name down wants the file."""
    write(tmp_path, {**images(".keep/a.png", "b.png"), "metadata.jsonl": rows(
        (".keep/a.png", "x"), (".keep/none.png", "x"), (".keep", "x"), (".out/a.png", "x"), (".\ud800", "x"),
    ).replace("\ud800", "\\ud800")})  # fmt: skip
    (tmp_path / ".out").symlink_to("/")
    entries, left = folder(tmp_path)
    assert entries == {".keep/a.png": ("x",)}
    assert left == [
        (".keep/none.png", "no such file"),
        (".keep", "not a regular file"),
        (".out/a.png", "a link that leads out of the source"),
        (".\ud800", "not a file name"),
        ("b.png", "metadata.jsonl does not name it"),
    ]


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", ["classes", "metadata"])
def test_links_are_read_or_listed(tmp_path: Path, captions: str) -> None:
    root = write(tmp_path / "root", images("train/cat/1.png", "train/cat/sub/2.png", "pool/birds/3.png", "pool/birds/.own/4.png"))
    write(tmp_path, images("outside/5.png"))
    for name, target in {
        "birds": "../pool/birds", "kitty": "cat", "cat/up": "..", "cat/self": "self", "cat/sub/all": "../../..",
        "out": "../../outside",
        "dead": "none", "5.png": "../../outside/5.png", "cat/3.png": "../../pool/birds/3.png", "own": "../pool/birds/.own",
        "pool": "../pool",
    }.items():  # fmt: skip
        (root / "train" / name).symlink_to(target)
    (root / "pool" / "birds" / "back").symlink_to("../../train/cat")
    (root / "pool" / "birds" / "round").symlink_to("..")
    names = ["birds/3.png", "cat/1.png", "cat/3.png", "cat/sub/2.png", "own/4.png"]
    listed = {
        "birds/back": "leads to cat, which is read",
        "birds/round": "a link in a circle",
        "cat/self": "a link in a circle",
        "cat/sub/all": "a link in a circle",
        "cat/up": "a link in a circle",
        "dead": "a link that leads nowhere",
        "kitty": "leads to cat, which is read",
        "out": "a link that leads out of the source",
        "5.png": "a link that leads out of the source",
        "pool/birds": "leads to birds, which is read",
    }
    if captions == "classes":
        entries, left = folder(root)
        assert sorted(entries) == names
        assert left == sorted(listed.items())
        return
    also = [("out/5.png", "x"), ("5.png", "x"), ("kitty/sub/2.png", "by a link")]
    write(root, {"train/metadata.jsonl": rows(*((name, "x") for name in names[:-2]), *also, ("own/4.png", "x"))})
    entries, left = folder(root)
    assert list(entries) == [*names[:-2], "cat/sub/2.png", "own/4.png"]
    assert entries["cat/sub/2.png"] == ("by a link",)
    ends = {"cat/self", "cat/sub/all", "cat/up", "birds/round", "dead"}  # where nothing is, and nobody asked for it
    assert left[0] == ("out/5.png", "a link that leads out of the source")
    assert left[1] == ("5.png", "a link that leads out of the source")
    assert left[2:] == sorted(item for item in listed.items() if item[0] not in {*ends, "5.png"})


def test_a_folder_is_read_once_whatever_links_there_are(tmp_path: Path) -> None:
    """Any web of links among folders: each image is read once, by a path that leads to it."""
    chosen = random.Random(0)
    for trial in range(30):
        root = tmp_path / str(trial)
        places = ["a", "b", "c", "a/d", "a/d/e", "b/f"]
        write(root, images(*(f"{place}/{n}.png" for n, place in enumerate(places))))
        for n in range(8):
            link = root / chosen.choice(places) / f"link{n}"
            link.symlink_to(os.path.relpath(root / chosen.choice([".", *places]), link.parent))
        entries, left = folder(root)
        assert sorted(os.path.realpath(root / name) for name in entries) == sorted(
            os.path.realpath(root / place / f"{n}.png") for n, place in enumerate(places)
        )
        assert len(left) == 8


def test_folders_that_cannot_be_listed_are_said(tmp_path: Path) -> None:
    write(tmp_path, images("cat/1.png", "dog/1.png"))
    (tmp_path / "dog").chmod(0)
    try:
        if os.access(tmp_path / "dog", os.R_OK):
            pytest.skip("root may list any folder")
        assert folder(tmp_path) == ({"cat/1.png": ("cat",)}, [("dog", "cannot be listed: Permission denied")])
        refused(tmp_path / "dog", "cannot be listed: Permission denied")
        refused(tmp_path / "dog", "cannot be listed: Permission denied", "webdataset")
    finally:
        (tmp_path / "dog").chmod(0o755)


# --- what is there and not read ---------------------------------------------------------------------------------------

STRAYS = {
    "a.heic": "pictures of .heic are not read: convert it to PNG or JPEG",
    "b.tar.gz": "compressed: unpack it with gunzip, since shards are read in stream",
    "b.tgz": "compressed: unpack it with gunzip, since shards are read in stream",
    "c.zip": "compressed: unpack it with unzip",
    "d.parquet": ".parquet is not read here: data.source=datasets reads it, or save it as metadata.jsonl",
    "e.csv": "not read: captions are read from metadata.jsonl or metadata.csv, and this is called e.csv",
    "f.mp4": "videos are not read",
    "g.jpg.part": "an unfinished download",
    "h.jpg_large": "its suffix .jpg_large is not read: rename it",
    "sub/HEIC.HEIC": "pictures of .heic are not read: convert it to PNG or JPEG",
}


@pytest.mark.parametrize("captions", ["classes", "text", "metadata"])
def test_strays_are_counted_and_listed(tmp_path: Path, captions: str) -> None:
    write(tmp_path, {**images("x/1.png"), **dict.fromkeys(STRAYS, "x"), "data.tar": "x", "README.md": "x", "x/1.npz": "x"})
    if captions == "text":
        write(tmp_path, {"x/1.txt": "x"})
    if captions == "metadata":
        write(tmp_path, {"metadata.jsonl": rows(("x/1.png", "x"))})
    entries, left = folder(tmp_path)
    assert entries == {"x/1.png": ("x",)}
    assert left == sorted([*STRAYS.items(), ("data.tar", "not read: data.source=webdataset reads .tar")])


def test_strays_are_in_the_dataset_and_change_it_not(tmp_path: Path) -> None:
    source = write(tmp_path / "source", {**images("cat/1.png"), "cat/2.heic": "x"})
    config = small_config(tmp_path, "data.source=folder", f"data.path={source}", "data.workers=0", *RGB)
    assert embedded(config).first_skipped == ("cat/2.heic: pictures of .heic are not read: convert it to PNG or JPEG",)
    assert [entry["name"] for entry in Dataset(config.data.dir).skipped()] == ["cat/2.heic"]
    write(source, {"later.zip": "x"})
    assert embedded(config).was_there
    write(source, images("cat/3.png"))
    with pytest.raises(SanaError, match=r"source\.sha256"):
        embedded(config)


def test_a_folder_without_images_says_what_it_has(tmp_path: Path) -> None:
    write(tmp_path, {"a.heic": "x", "shards/0.tar": "x", "notes.txt": "x"})
    error = refused(tmp_path, r"has neither metadata\.jsonl, metadata\.csv nor images")
    assert "a.heic: pictures of .heic are not read" in str(error)
    assert "shards/0.tar: not read: data.source=webdataset reads .tar" in str(error)
    assert "notes.txt" not in str(error)


# --- metadata of other kinds ------------------------------------------------------------------------------------------

JSON_ROWS = [{"file_name": "a.png", "text": "x"}, {"file_name": "b.png", "text": "y"}]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metadata.jsonl", "", "is empty"), ("metadata.jsonl", "\ufeff\n \n", "is empty"),
        ("metadata.jsonl", json.dumps(JSON_ROWS), "is one JSON array"),
        ("metadata.jsonl", json.dumps(JSON_ROWS, indent=1), "is one JSON array"),
        ("metadata.jsonl", "[\n" + ",\n".join(map(json.dumps, JSON_ROWS)) + "\n]", "is one JSON array"),
        ("metadata.jsonl", json.dumps(JSON_ROWS[0], indent=1), "is one JSON object"),
        ("metadata.jsonl", json.dumps({"a.png": "x"}), "is one JSON object"), ("metadata.jsonl", '"x"', "is one JSON value"),
        ("metadata.jsonl", '{"image": "a.png", "text": "x"}\n', "no line has file_name; the first has image, text"),
        ("metadata.jsonl", '{"file_name": "a.png", "caption": "x"}\n', r"no line has text; .* caption\n.*data\.caption_field"),
        ("metadata.jsonl", rows(("a.png", "x")).encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("metadata.jsonl", rows(("a.png", "x")).encode("utf-16-be"), "UTF-16; save it as UTF-8"),
        ("metadata.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        ("metadata.csv", "", "is empty"), ("metadata.csv", "\n\n", "is empty"), ("metadata.csv", "sep=,\n", "is empty"),
        ("metadata.csv", "file_name;text\na.png;x\n", "parted by ';', not by commas\nsave it as CSV with commas"),
        ("metadata.csv", '\ufeff"file_name";"text"\n', "parted by ';'"),
        ("metadata.csv", "sep=;\nfile_name;text\n", "parted by ';'"),
        ("metadata.csv", "file_name\ttext\na.png\tx\n", "parted by tabs"),
        ("metadata.csv", "a.png;a cat, asleep; x\n", "parted by ';'"),
        ("metadata.csv", "a|b\n", r"parted by '\|'"), ("metadata.csv", "a.png,a cat; asleep\n", "is a row already"),
        ("metadata.csv", "image,text\n1,x\n", "has no column file_name; it has image, text"),
        ("metadata.csv", "file_name,caption\n1,x\n", r"has no column text; it has file_name, caption\n.*data\.caption_field"),
        ("metadata.csv", "file_name,text,text\n1,x,y\n", "has 2 columns text"),
        ("metadata.csv", "file_name,text\na.png,x\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("metadata.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    ],
)  # fmt: skip
def test_metadata_of_other_kinds_is_refused_by_name(tmp_path: Path, name: str, content: str | bytes, reason: str) -> None:
    """At once, also where it lies in a sub-folder: neither classes nor .txt take its place."""
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


# --- names in metadata ------------------------------------------------------------------------------------------------

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
        ("cat/1.PNG", r"no such file; is it cats/1.png?"), ("tabby_cta.png", "no such file; is it tabby_cat.png?"),
        ("tabby_cat.jpg", "no such file; is it tabby_cat.png?"), ("tabby_cat", "no such file; is it tabby_cat.png?"),
        ("cats/2.png", "no such file"), ("photo.png", "no such file"), ("0002.png", "no such file"),
        ("dogs/0001.png", "no such file; is it 0001.png?"), ("1.png", "no such file; is it cats/1.png?"),
        ("dogs/1.png", "no such file"),
        ("..\\a.png", "its name leads out of the source"), ("\\a.png", "its name leads out of the source"),
        ("C:\\a.png", "its name leads out of the source"), ("c:/a.png", "its name leads out of the source"),
        ("x\\..\\..\\a.png", "its name leads out of the source"),
        ("cats", "not a regular file"), ("cats/", "not a regular file"), (".", "not a file name"), ("./", "not a file name"),
    ],
)  # fmt: skip
def test_names_that_are_not_found_say_what_is_near(tmp_path: Path, named: str, reason: str) -> None:
    write(
        tmp_path,
        {**images("cats/1.png", "tabby_cat.png", "0001.png"), "tabby_cat.txt": "x", "metadata.jsonl": rows((named, "x"))},
    )
    _, left = folder(tmp_path)
    assert left[0] == (named, reason)


@pytest.mark.parametrize("seed", range(5))
def test_any_respelling_finds_its_file(tmp_path: Path, seed: int) -> None:
    chosen = random.Random(seed)
    letters = "abcxyzäöüéñå한글ß"
    names = {"/".join("".join(chosen.choices(letters, k=4)) for _ in range(chosen.randrange(1, 4))) + ".png" for _ in range(40)}
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


# --- tars -------------------------------------------------------------------------------------------------------------


def shard(path: Path, members: Iterable[tuple[str, bytes | str | None]]) -> Path:
    """A tar; None is an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for seed, (name, content) in enumerate(members):
            raw = image_bytes(seed) if content is None else content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def pair(key: str, kind: str = "png") -> list[tuple[str, bytes | str | None]]:
    return [(f"{key}.{kind}", None), (f"{key}.txt", f"caption of {key}")]


def tars(path: Path, **more: Any) -> tuple[dict[str, tuple[str, ...]], list[tuple[str, str]]]:
    return read(opened(path, "webdataset", **more))


def test_hidden_members_do_not_part_image_and_caption(tmp_path: Path) -> None:
    aside = b"\0\5\x16\7\0\2\0\0Mac OS X"
    members: list[tuple[str, bytes | str | None]] = [
        ("./._0.png", aside),
        ("./0.png", None),
        ("./._0.txt", aside),
        ("./0.txt", "zero"),
    ]
    members += [
        ("__MACOSX/d/._1.png", aside),
        ("d/1.png", None),
        ("d/.DS_Store", "x"),
        ("d/@eaDir/1.png", None),
        ("d/1.txt", "one"),
    ]
    shard(tmp_path / ".hidden" / "mac.tar", [*members, (".git/2.png", None), ("Thumbs.db", "x"), (".png", None)])
    shard(tmp_path / ".hidden" / "._mac.tar", [("x", aside)])
    assert tars(tmp_path / ".hidden") == ({"mac.tar/0": ("zero",), "mac.tar/d/1": ("one",)}, [])


def test_members_that_are_not_read_are_listed(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | str | None]] = [
        ("0.jpg", None), ("0.png", None), ("0.txt", "zero"), ("0.cls", "3"), ("0.seg.png", None), ("0.heic", "x"),
        ("0.txt", "again"),
        ("1.heic", "x"), ("1.txt", "one"),
        ("2.txt", "two"),
        ("v1.0_001.png", None), ("v1.0_001.txt", "x"), ("v1.0_002.png", None),
        ("3.json", '{"text": "\\u00e9"}'), ("3.png", None),
        ("4.png", None), ("4.txt", "four".encode("utf-16")), ("5.png", None), ("5.json", '{"text": "x"}'.encode("utf-16")),
        ("8.png", None), ("8.json", '{"file_name": "x", "prompt": "x"}'), ("6.png", None), ("6.txt", "a\u2028b\rc\x85"),
        ("7.png", None), ("7.txt", "version https://git-lfs.github.com/spec/v1\n"),
    ]  # fmt: skip
    entries, left = tars(shard(tmp_path / "a.tar", members))
    assert entries == {"a.tar/0": ("zero",), "a.tar/3": ("é",), "a.tar/6": ("a\u2028b", "c\x85".strip())}
    no_key = "no image: a key ends at the first dot of a name, and .0_{} is no suffix of images"
    heic = "pictures of .heic are not read: convert it to PNG or JPEG"
    assert left == [
        ("a.tar/0.heic", heic),
        ("a.tar/0.png", "a second image of its key, whose .jpg is read"),
        ("a.tar/0.txt", "named twice; the first is kept"),
        ("a.tar/1.heic", heic),
        ("a.tar/v1.0_001.png", no_key.format("001.png")),
        ("a.tar/v1.0_002.png", no_key.format("002.png")),
        ("a.tar/4", "its captions are not UTF-8: UTF-16; save it as UTF-8"),
        ("a.tar/5", "its captions are not UTF-8: UTF-16; save it as UTF-8"),
        ("a.tar/8", "no caption: it has no text, but prompt"),
        ("a.tar/7", "its captions are a Git LFS pointer: fetch them with git lfs pull"),
        ("a.tar/2", "no image"),
    ]


APART = ": its parts do not stand together; sort the shard by name (tar --sort=name)"


@pytest.mark.parametrize("most", [1, 10_000])
def test_shards_that_are_not_sorted_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Both halves of what is apart say it; what lacks something for good does not."""
    monkeypatch.setattr(webdataset, "MOST_WITHHELD", most)
    members = [
        ("0.png", None),
        ("9.txt", "alone"),
        ("1.png", None),
        ("0.txt", "zero"),
        *pair("2"),
        ("1.txt", "one"),
        ("8.png", None),
    ]
    members += [*pair("3"), ("2.json", "{}"), *pair("3")]
    entries, left = tars(shard(tmp_path / "a.tar", members))
    assert sorted(entries) == ["a.tar/2", "a.tar/3"]
    said = [
        ("a.tar/0", "no caption" + APART), ("a.tar/9", "no image"), ("a.tar/1", "no caption" + APART),
        ("a.tar/0", "no image" + APART),
        ("a.tar/1", "no image" + APART), ("a.tar/8", "no caption"), ("a.tar/2", "no image" + APART),
    ]  # fmt: skip
    if most == 1:  # memory is bounded: of the first it is not known yet
        said[0], said[2] = ("a.tar/0", "no caption"), ("a.tar/1", "no caption" + APART)
        assert {name for name, _ in left} == {name for name, _ in said} | {"a.tar/3"}
        assert [reason for _, reason in left].count("no image" + APART) == 3
        assert isinstance(next(iter(opened(tmp_path / "a.tar", "webdataset"))), Skipped), "it is not kept until the end"
    else:
        assert left == [("a.tar/3", "named twice; the first is kept"), *said]


def test_what_is_withheld_of_a_damaged_shard_is_said(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [("0.png", None), ("1.png", None), ("0.txt", "zero"), ("2.png", None)])
    with tarfile.open(path) as tar:
        last = tar.getmembers()[3].offset_data
    os.truncate(path, last + 100)
    _, left = tars(path)
    assert left[:2] == [("a.tar/0", "no caption" + APART), ("a.tar/1", "no caption")]
    assert left[-1][1].startswith("damaged: ")


def test_what_lies_beside_shards_is_read_or_listed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", shard(tmp_path / "out.tar", pair("o"))
    for name in ("0.tar", "1.TAR", "sub/0.tar", "test/0.tar", "dev/deep/0.tar"):
        shard(root / name, pair(name[0]))
    write(root, {**images("loose.png"), "0.parquet": "x", "0_stats.json": "{}", "0.idx": "x", "other.parquet": "x",
    "2.tar.gz": "x",
                 "3.zip": "x", "metadata.jsonl": "{}", "README.md": "x", "test/3.zip": "x", "4.heic": "x"})  # fmt: skip
    for name, target in {"5.tar": "sub/0.tar", "6.tar": str(outside), "7.tar": "none", "8": "sub", "9": str(tmp_path)}.items():
        (root / name).symlink_to(target)
    entries, left = tars(root)
    assert sorted(entries) == ["0.tar/0", "1.TAR/1", "sub/0.tar/s"]
    reasons = dict(left)
    assert [name for name, _ in left] == sorted(reasons)
    assert sorted(reasons) == [
        "2.tar.gz",
        "3.zip",
        "4.heic",
        "5.tar",
        "6.tar",
        "7.tar",
        "8",
        "9",
        "loose.png",
        "metadata.jsonl",
        "other.parquet",
    ]
    assert reasons["2.tar.gz"] == "compressed: unpack it with gunzip, since shards are read in stream"
    assert reasons["6.tar"] == reasons["9"] == "a link that leads out of the source"
    assert reasons["7.tar"] == "a link that leads nowhere"
    assert reasons["5.tar"] == "leads to sub/0.tar, which is read"
    assert reasons["8"] == "leads to sub, which is read"
    assert reasons["loose.png"] == reasons["metadata.jsonl"] == "not in a tar: data.source=folder reads images in folders"


def test_a_folder_without_shards_says_what_it_has(tmp_path: Path) -> None:
    write(tmp_path, {"0.tar.gz": "x", "1.tgz": "x"})
    error = refused(tmp_path, "is no .tar file, nor a folder that has any", "webdataset")
    assert "0.tar.gz: compressed: unpack it with gunzip" in str(error)
    assert "1.tgz: compressed" in str(error)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x1f\x8b\x08", "compressed: unpack it with gunzip"), (b"PK\x03\x04", "compressed: unpack it with unzip"),
        (b"BZh91", "compressed: unpack it with bunzip2"), (b"\x28\xb5\x2f\xfd", "compressed: unpack it with unzstd"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the shard: run git lfs pull"),
        (b"", "damaged: empty file"),
    ],
)  # fmt: skip
def test_shards_that_are_something_else_say_what(tmp_path: Path, content: bytes, reason: str) -> None:
    shard(tmp_path / "1.tar", pair("a"))
    (tmp_path / "0.tar").write_bytes(content)
    entries, left = tars(tmp_path)
    assert list(entries) == ["1.tar/a"]
    ((name, why),) = left
    assert name == "0.tar"
    assert why.startswith(reason)


def test_shards_are_streamed(tmp_path: Path) -> None:
    """The first entry comes before the rest of the shard is looked at."""
    whole = shard(tmp_path / "a.tar", [member for n in range(2000) for member in pair(f"{n:05d}")])
    entries = iter(opened(whole, "webdataset"))
    next(entries)
    os.truncate(whole, whole.stat().st_size // 2)
    rest = list(entries)
    assert isinstance(rest[-1], Skipped)
    assert 900 < len(rest) < 1100


# --- splits of shards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000.tar", "train"), ("train_000.tar", "train"), ("TRAIN.tar", "train"), ("imagenet-train-0001.tar", "train"),
        ("train0001.tar", "train"), ("validation-0.tar", "validation"), ("coco_val2017-3.tar", "val"), ("test.000.tar", "test"),
        ("trains-0.tar", None), ("contest-0.tar", None), ("000.tar", None), ("latest-00.tar", None), ("valley.tar", None),
        ("data/val/000.tar", "val"), ("val/train-000.tar", "val"), ("my-own-0.tar", "my-own"), ("of-test-train-0.tar", "train"),
        ("прtrain-0.tar", None), ("training-0.tar", "training"),
    ],
)  # fmt: skip
def test_shards_are_named_after_splits(name: str, split: str | None) -> None:
    assert split_of(name, "my-own") == split


def test_only_the_shards_of_the_split_are_read(tmp_path: Path) -> None:
    for name in ("train-0.tar", "train-1.tar", "val-0.tar", "extra.tar"):
        shard(tmp_path / name, pair(name[0]))
    said = [("extra.tar", "its name says no split, and others are named after {}")]
    assert tars(tmp_path) == (
        {"train-0.tar/t": ("caption of t",), "train-1.tar/t": ("caption of t",)}, [(said[0][0], said[0][1].format("train"))]
    )  # fmt: skip
    assert list(tars(tmp_path, split="val")[0]) == ["val-0.tar/v"]
    error = refused(
        tmp_path, r"has no shard of test, but of train, val, and 1 that are named after none", "webdataset", split="test"
    )
    assert error.exit_code == 2
    assert list(tars(tmp_path / "val-0.tar", split="test")[0]) == ["val-0.tar/v"], "one shard is what was given"
    shard(tmp_path / "Test" / "train-9.tar", pair("9"))
    (tmp_path / "Test" / "val-0.tar").symlink_to("../val-0.tar")
    assert list(tars(tmp_path, split="test")[0]) == ["train-9.tar/9", "val-0.tar/v"], "a folder of the split's name wins"


def test_plain_shards_are_of_train(tmp_path: Path) -> None:
    shard(tmp_path / "000.tar", pair("a"))
    assert list(tars(tmp_path)[0]) == ["000.tar/a"]
    refused(tmp_path, r"data\.split: .* has no folder val\nleave it out", "webdataset", split="val")
    shard(tmp_path / "test" / "000.tar", pair("b"))
    assert list(tars(tmp_path)[0]) == ["000.tar/a"], "what lies in another split's folder is its own"
    assert list(tars(tmp_path, split="test")[0]) == ["000.tar/b"]
    shard(tmp_path / "more" / "train" / "0.tar", pair("c"))
    assert list(tars(tmp_path)[0]) == ["more/train/0.tar/c"]
    (tmp_path / "000.tar").unlink()
    (tmp_path / "more").rename(tmp_path / "test" / "more")
    refused(tmp_path / "test" / "..", r"has no shard of val, but of test, train\n.*data\.split=test", "webdataset", split="val")


# --- Hugging Face -----------------------------------------------------------------------------------------------------


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
    assert [(e.id, e.captions, e.label) for e in found if isinstance(e, Entry)] == [
        ("train-00000000", ("a dog.",), 1), ("train-00000001", ("a tabby cat.",), 0)
    ]  # fmt: skip
    assert [(e.name, e.reason) for e in found if isinstance(e, Skipped)] == [
        ("train-00000002", "no caption: its class is -1, which has no name"),
        ("train-00000003", "no caption: its class is None, which has no name"),
    ]
    assert opened(saved, "datasets", **fields).fingerprint() != source.fingerprint()
    more = ("data.caption_field=label", "data.image_field=picture", "data.caption_template=a {}.", "data.workers=0")
    config = small_config(tmp_path, "data.source=datasets", f"data.path={saved}", *more, *RGB)
    embedded(config)
    labels = Dataset(config.data.dir).labels()
    assert labels is not None
    assert labels.tolist() == [1, 0]


def test_lists_of_classes_are_several_captions(tmp_path: Path) -> None:
    saved = labelled(tmp_path, [[1, 0], [-1, 1], [-1], [], None], "list")
    found = list(opened(saved, "datasets", caption_field="label", image_field="picture"))
    assert [(e.captions, e.label) for e in found if isinstance(e, Entry)] == [(("dog", "tabby cat"), None), (("dog",), None)]
    assert len([e for e in found if isinstance(e, Skipped) and e.reason.startswith("no caption")]) == 3


def test_columns_that_are_not_there_are_told_from_those_that_are(tmp_path: Path) -> None:
    saved = labelled(tmp_path, [0])
    refused(saved, r"data\.image_field: .* no column image; .*\n.*--set data\.image_field=picture", "datasets")
    given = {"image_field": "picture"}
    refused(saved, r"data\.caption_field: .* no column text; .*\n.*--set data\.caption_field=label", "datasets", **given)
    plain = labelled(tmp_path / "plain", [0], "int")
    error = refused(plain, r"data\.caption_field: .* no column text; it has picture, label$", "datasets", **given)
    assert error.exit_code == 2
    (entry,) = opened(plain, "datasets", **given, caption_field="label")
    assert entry == Skipped("train-00000000", "a caption is not text: 0")


def test_splits_of_saved_datasets_are_told(tmp_path: Path) -> None:
    saved = labelled(tmp_path, [0])
    fields = {"caption_field": "label", "image_field": "picture"}
    assert opened(saved, "datasets", **fields, split="val").count() == 1
    refused(saved, r"data\.split: .* has no split test\nit has train, val", "datasets", **fields, split="test")
    refused(tmp_path / "one", r"data\.split: .* has no split test\nit was saved without", "datasets", **fields, split="test")
    refused(saved / "val", r"data\.split: .* has no split val\nit was saved without", "datasets", **fields, split="val")


def test_tables_that_git_lfs_has_not_fetched_are_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path, {"data/train-0.parquet": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"})
    refused(tmp_path, r"train-0\.parquet is a Git LFS pointer", "datasets")


def test_csv_written_by_the_library_comes_back(tmp_path: Path) -> None:
    """Whatever captions a writer quotes, they are those that were given."""
    chosen = random.Random(3)
    texts = ["".join(chosen.choices('a ,"\n\t;é|=', k=12)) + "." for _ in range(60)]
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file_name", "text"], *((f"{n}.png", text) for n, text in enumerate(texts))])
    write(tmp_path, images(*(f"{n}.png" for n in range(60))))
    assert folder(tmp_path) == ({f"{n}.png": (text.strip(),) for n, text in enumerate(texts)}, [])
