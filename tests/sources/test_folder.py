"""Folders of images: each entry is read, ignored for a reason, or counted and listed."""

import os
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from helpers import embedded, small_config
from helpers.folders import RGB, folder, folder_config, images, listed, opened, picture, refused, rows, write

from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.sources import Entry
from sana_cli.sources.walk import is_hidden


def test_text_files_beside_images(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    for seed, (name, text) in enumerate({"b": "two\n\nanother two\n", "deep/a": "\ufeffdeep"}.items()):
        picture(seed).save(source / f"{name}.jpg")
        (source / f"{name}.txt").write_text(text)
    picture(9).save(source / "alone.png")
    config = folder_config(tmp_path, source)
    assert embedded(config).first_skipped == ("alone.png: no caption",)
    assert listed(config) == [("b.jpg", ("two", "another two")), ("deep/a.jpg", ("deep",))]


def test_class_named_folders(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for seed, name in enumerate(("tabby_cat/1.png", "dog/1.png", "dog/more/2.png", "stray.png")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(source / name)
    config = folder_config(tmp_path, source, "data.caption_template=a photo of a {}.")
    summary = embedded(config)
    assert "stray.png: no caption: no metadata, no .txt beside it" in summary.first_skipped[0]
    assert listed(config) == [
        ("dog/1.png", ("a photo of a dog.",)),
        ("dog/more/2.png", ("a photo of a dog.",)),
        ("tabby_cat/1.png", ("a photo of a tabby cat.",)),
    ]
    dataset = Dataset(config.data.dir)
    assert dataset.attributes == {"label": ["dog", "tabby_cat"]}
    assert dataset.attribute_ids().tolist() == [[0], [0], [1]]
    assert dataset.caption_attributes(np.arange(3)) == [[["label"]]] * 3


def test_a_split_that_is_not_there_is_said(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("train/a.png", "val/b.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(source / name)
    with pytest.raises(SanaError, match=r"data\.split: .* has no folder validation"):
        embedded(folder_config(tmp_path, source, "data.split=validation"))
    (source / "elsewhere").symlink_to(tmp_path)
    with pytest.raises(SanaError, match="is a link that leads out of"):
        embedded(folder_config(tmp_path, source, "data.split=elsewhere"))


# --- unread captions must not be replaced by others ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "todo"),
    [
        ("metadata.parquet", "PAR1", "write metadata.jsonl"), ("cat/metadata.tsv", "x",
        "write metadata.jsonl"),
        ("Metadata.json", "[]", "write metadata.jsonl"), ("metadata.jsonl.gz", "x", "write metadata.jsonl"),
        ("captions.txt", "1.png a cat", "write metadata.jsonl"), ("annotations/captions_train2017.json", "{}",
        "metadata.jsonl"),
        ("train_captions.csv", "x", "write metadata.jsonl"), ("prompts.txt", "x", "write metadata.jsonl"),
        ("cat/1.caption", "a cat asleep", r"rename it 1\.txt"), ("cat/1.png.txt", "a cat asleep",
        r"rename it 1\.txt"),
        ("cat/1.json", '{"caption": "a cat asleep"}', r"write its caption to 1\.txt"),
        ("captions/1.txt", "a cat asleep", r"put it beside its image, cat/1\.png"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("classes", [True, False])
def test_captions_that_are_not_read_are_refused(
    tmp_path: Path, name: str, content: str, todo: str, classes: bool
) -> None:
    write(tmp_path, {**images("cat/1.png"), name: content})
    if classes:
        error = refused(
            tmp_path, rf"{name.split('/')[-1]} seems to hold captions, but is not read: .*folders\n.*{todo}"
        )
        assert error.exit_code == 2
    else:  # metadata wins, and the file is listed or not needed
        write(tmp_path, {"metadata.jsonl": rows(("cat/1.png", "x"))})
        entries, left = folder(tmp_path)
        assert entries == {"cat/1.png": ("x",)}
        assert [name for name, _ in left] == [name] * (
            name.split("/")[-1] not in ("1.caption", "1.png.txt", "1.json", "1.txt")
        )


def test_captions_of_other_programs_above_a_split_are_refused_too(tmp_path: Path) -> None:
    write(tmp_path, {**images("train/cat/1.png"), "._captions.json": "{}", "captions.json": "{}"})
    refused(
        tmp_path,
        r"captions\.json seems to hold captions, but is not read: captions would be the names of folders",
    )
    (tmp_path / "train" / "cat" / "1.png").rename(tmp_path / "train" / "1.png")
    refused(tmp_path, r"captions\.json seems to hold captions, but is not read: there would be no captions")


def test_what_is_no_caption_is_no_hindrance(tmp_path: Path) -> None:
    write(tmp_path, images("cat/1.png"))
    write(tmp_path, {"cat/1.json": '{"shapes": [], "caption": ""}', "labels.txt": "cat", "README.txt": "x",
    "LICENSE": "x",
                     "info.json": "{}", "notes.md": "x", "cat/1.png.json": "[" * 100_000,
                     "cat/1.xml": "<x/>"})  # fmt: skip
    entries, left = folder(tmp_path)
    assert entries == {"cat/1.png": ("cat",)}
    assert left == [
        (name, f"{name[-5:].lstrip('1gs')} is not read here: captions are the names of folders")
        for name in ("cat/1.json", "cat/1.png.json")
    ] + [("labels.txt", ".txt is not read here: captions are the names of folders")]


def test_captions_beside_images_are_found_as_the_disk_spells_them(tmp_path: Path) -> None:
    composed = unicodedata.normalize("NFC", "é")
    write(
        tmp_path,
        images("1.PNG", "2.png", "A.png", "a.png", f"{composed}.png", "3.png", "4.png", "README.png"),
    )
    write(tmp_path, {"1.TXT": "one", "a.txt": "small a", unicodedata.normalize("NFD", "é") + ".txt": "accent",
    "9.txt": "lost",
                     "3.caption": "kohya's", "3.json": "{}", "license.txt": "x", "captions.txt": "x",
                     "4.txt": "four",
                     "metadata.json": "{}", "README.txt": "read"})  # fmt: skip
    entries, left = folder(tmp_path)
    assert entries == {
        "1.PNG": ("one",), "a.png": ("small a",), f"{composed}.png": ("accent",), "4.png": ("four",),
        "README.png": ("read",)
    }  # fmt: skip
    assert left == [
        ("2.png", "no caption"),
        ("3.png", "no caption: 3.caption is not read"),
        ("A.png", "no caption"),
        ("9.txt", "no image"),
        (
            "captions.txt",
            "not read: captions are read from metadata.jsonl, metadata.csv, or .txt of an image's name",
        ),
        (
            "metadata.json",
            "not read: captions are read from metadata.jsonl, metadata.csv, or .txt of an image's name",
        ),
    ]
    write(tmp_path, {"metadata.parquet": "PAR1"})
    refused(
        tmp_path, r"metadata\.parquet seems to hold captions, but is not read: captions would come from \.txt"
    )


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
    """Lines end only at line ends; other encodings are named."""
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


# --- hidden and system entries ------------------------------------------------------------------------------


HIDDEN = [
    ".ipynb_checkpoints/x.png", "cat/.ipynb_checkpoints/1-checkpoint.png", ".Trash-1000/files/old.png",
    "@eaDir/1.png/THUMB.png",
    "__MACOSX/cat/._1.png", "cat/._1.png", "#recycle/2.png", "#snapshot/day/3.png", "lost+found/4.png",
    "$RECYCLE.BIN/5.png",
    "System Volume Information/6.png", ".git/7.png", "cat/Thumbs.db", "cat/desktop.ini", ".DS_Store",
    "cat/.hidden.zip",
    "cat/.metadata.jsonl", ".x/metadata.jsonl", "@EADIR/metadata.csv",
]  # fmt: skip


@pytest.mark.parametrize("captions", ["classes", "text", "metadata"])
def test_hidden_entries_are_passed_over(tmp_path: Path, captions: str) -> None:
    root = tmp_path / ".cache" / "@eaDir"  # the given folder may lie in hidden ones
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
        shown = [entry.attributes for entry in found if isinstance(entry, Entry)]
        assert shown == [{"label": "cat"}, {"label": "dog"}]


def test_names_that_only_look_hidden_are_read(tmp_path: Path) -> None:
    assert not any(
        map(is_hidden, ("a.b", "..", ".", "eaDir", "x@eaDir", "recycle", "thumbs.png", "#1", "$x", "_", "~"))
    )
    write(tmp_path, images("#1/a.png", "$x/a.png", "a.b/a.png"))
    assert len(folder(tmp_path)[0]) == 3


def test_a_row_may_name_a_hidden_file(tmp_path: Path) -> None:
    """A name in the metadata asks for the file."""
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


# --- links --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", ["classes", "metadata"])
def test_links_are_read_or_listed(tmp_path: Path, captions: str) -> None:
    root = write(
        tmp_path / "root",
        images("train/cat/1.png", "train/cat/sub/2.png", "pool/birds/3.png", "pool/birds/.own/4.png"),
    )
    write(tmp_path, images("outside/5.png"))
    for name, target in {
        "birds": "../pool/birds", "kitty": "cat", "cat/up": "..", "cat/self": "self",
        "cat/sub/all": "../../..",
        "out": "../../outside",
        "dead": "none", "5.png": "../../outside/5.png", "cat/3.png": "../../pool/birds/3.png",
        "own": "../pool/birds/.own",
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
    write(
        root, {"train/metadata.jsonl": rows(*((name, "x") for name in names[:-2]), *also, ("own/4.png", "x"))}
    )
    entries, left = folder(root)
    assert list(entries) == [*names[:-2], "cat/sub/2.png", "own/4.png"]
    assert entries["cat/sub/2.png"] == ("by a link",)
    ends = {
        "cat/self",
        "cat/sub/all",
        "cat/up",
        "birds/round",
        "dead",
    }  # nothing is there, and no metadata names it
    assert left[0] == ("out/5.png", "a link that leads out of the source")
    assert left[1] == ("5.png", "a link that leads out of the source")
    assert left[2:] == sorted(item for item in listed.items() if item[0] not in {*ends, "5.png"})


def test_a_folder_is_read_once_whatever_links_there_are(tmp_path: Path) -> None:
    """Whatever links the folders have, each image is read once, by a path that leads to it."""
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


# --- what is not read ---------------------------------------------------------------------------------------


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
    write(
        tmp_path,
        {
            **images("x/1.png"),
            **dict.fromkeys(STRAYS, "x"),
            "data.tar": "x",
            "README.md": "x",
            "x/1.npz": "x",
        },
    )
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
    assert embedded(config).first_skipped == (
        "cat/2.heic: pictures of .heic are not read: convert it to PNG or JPEG",
    )
    assert [entry.name for entry in Dataset(config.data.dir).skipped()] == ["cat/2.heic"]
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
