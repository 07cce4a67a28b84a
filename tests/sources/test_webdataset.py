"""Tar shards: each entry is read, ignored for a reason, or listed; and splits of shards."""

import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from helpers import embedded, encoded, small_config
from helpers.folders import (
    RGB,
    finished,
    image_bytes,
    images,
    listed,
    opened,
    picture,
    read,
    refused,
    tar_of,
    write,
)

from sana_cli.commands.embed import EmbedOptions, embed, plan
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.sources import Skipped, webdataset
from sana_cli.sources.splits import split_of


def test_webdataset(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    link = tarfile.TarInfo("etc.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar_of(
        source / "shard-0.tar",
        [
            ("a/0001.jpg", encoded(picture(0), "JPEG")), ("a/0001.txt", b"first"), ("a/0001.cls", b"3"),
            ("0002.json", json.dumps({"text": ["second", "2nd"], "caption_weights": [1, 2]}).encode()),
            ("0002.png", encoded(picture(1))),
            ("0003.png", encoded(picture(2))),
            ("../climbs.png", encoded(picture(3))),
            ("/rooted.png", encoded(picture(3))),
            ("0004.txt", b"no picture"),
            ("0005.png", b"no picture either"), ("0005.txt", b"fifth"),
            ("0006.png", encoded(picture(2))), ("0006.txt", b"\xff\xfe"),
        ],
        (link,),
    )  # fmt: skip
    whole = tar_of(
        source / "shard-1.tar", [("x.png", encoded(picture(5))), ("x.txt", b"ex"), ("y.png", bytes(5000))]
    ).read_bytes()
    (source / "shard-1.tar").write_bytes(whole[: len(whole) // 2 + 700])
    config = small_config(tmp_path, "data.source=webdataset", f"data.path={source}", *RGB)
    assert plan(EmbedOptions(config)).images is None
    summary = embedded(config)
    assert listed(config) == [
        ("shard-0.tar/a/0001", ("first",)), ("shard-0.tar/0002", ("second", "2nd")), ("shard-1.tar/x", ("ex",
        ))
    ]  # fmt: skip
    skipped = {entry.name: entry.reason for entry in Dataset(config.data.dir).skipped()}
    assert skipped == {
        "shard-0.tar/0003": "no caption",
        "shard-0.tar/../climbs.png": "its name leads out of the source",
        "shard-0.tar//rooted.png": "its name leads out of the source",
        "shard-0.tar/0004": "no image",
        "shard-0.tar/0005": "not an image of a known kind",
        "shard-0.tar/0006": "its captions are not UTF-8: UTF-16; save it as UTF-8",
        "shard-0.tar/etc.png": "not a regular file",
        "shard-1.tar": skipped["shard-1.tar"],
    }
    assert skipped["shard-1.tar"].startswith("damaged: ")
    assert summary.skipped == 8


def test_damaged_tars_say_what_is_lost(tmp_path: Path) -> None:
    members = [
        (f"{n}.{kind}", content)
        for n in range(6)
        for kind, content in (("png", encoded(picture(n))), ("txt", b"cap"))
    ]
    source = tmp_path / "source"
    source.mkdir()
    whole = tar_of(source / "a.tar", members).read_bytes()
    with tarfile.open(source / "a.tar") as tar:
        third = tar.getmembers()[4].offset
    flipped = bytearray(whole)
    flipped[third + 150] ^= 1  # the checksum of a header
    for content, reason in (
        (bytes(flipped), "no header at byte"),
        (whole[:third], "cut short"),
        (whole[: third + 100], "cut short"),
        (whole + whole, "another archive follows"),
    ):
        (source / "a.tar").write_bytes(content)
        config = small_config(
            tmp_path, "data.source=webdataset", f"data.path={source}", *RGB, f"run.dir={tmp_path}"
        )
        summary = finished(config, overwrite=True)
        assert any(reason in line for line in summary.first_skipped)
        assert summary.images == (6 if content == whole + whole else 2)
        with pytest.raises(SanaError, match="leave out `strict`"):
            list(embed(EmbedOptions(config, overwrite=True, strict=True)))


def shard(path: Path, members: Iterable[tuple[str, bytes | str | None]]) -> Path:
    """Write a tar; None is an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for seed, (name, content) in enumerate(members):
            raw = (
                image_bytes(seed)
                if content is None
                else content.encode()
                if isinstance(content, str)
                else content
            )
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
    shard(
        tmp_path / ".hidden" / "mac.tar", [*members, (".git/2.png", None), ("Thumbs.db", "x"), (".png", None)]
    )
    shard(tmp_path / ".hidden" / "._mac.tar", [("x", aside)])
    assert tars(tmp_path / ".hidden") == ({"mac.tar/0": ("zero",), "mac.tar/d/1": ("one",)}, [])


def test_members_that_are_not_read_are_listed(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | str | None]] = [
        ("0.jpg", None), ("0.png", None), ("0.txt", "zero"), ("0.cls", "3"), ("0.seg.png", None), ("0.heic",
        "x"),
        ("0.txt", "again"),
        ("1.heic", "x"), ("1.txt", "one"),
        ("2.txt", "two"),
        ("v1.0_001.png", None), ("v1.0_001.txt", "x"), ("v1.0_002.png", None),
        ("3.json", '{"text": "\\u00e9"}'), ("3.png", None),
        ("4.png", None), ("4.txt", "four".encode("utf-16")), ("5.png", None), ("5.json",
        '{"text": "x"}'.encode("utf-16")),
        ("8.png", None), ("8.json", '{"file_name": "x", "prompt": "x"}'), ("6.png", None), ("6.txt",
        "a\u2028b\rc\x85"),
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


APART = ": its parts are not adjacent; sort the shard by name (tar --sort=name)"


@pytest.mark.parametrize("most", [1, 10_000])
def test_shards_that_are_not_sorted_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Both halves of a separated pair are reported as apart; a single half is not."""
    monkeypatch.setattr(webdataset, "MAX_WITHHELD", most)
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
    if most == 1:  # memory is bounded: the first are reported before their other half is found
        said[0], said[2] = ("a.tar/0", "no caption"), ("a.tar/1", "no caption" + APART)
        assert {name for name, _ in left} == {name for name, _ in said} | {"a.tar/3"}
        assert [reason for _, reason in left].count("no image" + APART) == 3
        assert isinstance(next(iter(opened(tmp_path / "a.tar", "webdataset"))), Skipped), (
            "it is reported before the end"
        )
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
    write(root, {**images("loose.png"), "0.parquet": "x", "0_stats.json": "{}", "0.idx": "x",
    "other.parquet": "x",
    "2.tar.gz": "x",
                 "3.zip": "x", "metadata.jsonl": "{}", "README.md": "x", "test/3.zip": "x",
                 "4.heic": "x"})  # fmt: skip
    for name, target in {
        "5.tar": "sub/0.tar",
        "6.tar": str(outside),
        "7.tar": "none",
        "8": "sub",
        "9": str(tmp_path),
    }.items():
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
    assert (
        reasons["loose.png"]
        == reasons["metadata.jsonl"]
        == "not in a tar: data.source=folder reads images in folders"
    )


def test_a_folder_without_shards_says_what_it_has(tmp_path: Path) -> None:
    write(tmp_path, {"0.tar.gz": "x", "1.tgz": "x"})
    error = refused(tmp_path, "is neither a .tar file nor a folder with one", "webdataset")
    assert "0.tar.gz: compressed: unpack it with gunzip" in str(error)
    assert "1.tgz: compressed" in str(error)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x1f\x8b\x08", "compressed: unpack it with gunzip"), (b"PK\x03\x04",
        "compressed: unpack it with unzip"),
        (b"BZh91", "compressed: unpack it with bunzip2"), (b"\x28\xb5\x2f\xfd",
        "compressed: unpack it with unzstd"),
        (b"version https://git-lfs.github.com/spec/v1\n",
        "a Git LFS pointer, not the shard: run git lfs pull"),
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
    """The first entry is yielded before the rest of the shard is read."""
    whole = shard(tmp_path / "a.tar", [member for n in range(2000) for member in pair(f"{n:05d}")])
    entries = iter(opened(whole, "webdataset"))
    next(entries)
    os.truncate(whole, whole.stat().st_size // 2)
    rest = list(entries)
    assert isinstance(rest[-1], Skipped)
    assert 900 < len(rest) < 1100


# --- splits of shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000.tar", "train"), ("train_000.tar", "train"), ("TRAIN.tar", "train"),
        ("imagenet-train-0001.tar", "train"),
        ("train0001.tar", "train"), ("validation-0.tar", "validation"), ("coco_val2017-3.tar", "val"),
        ("test.000.tar", "test"),
        ("trains-0.tar", None), ("contest-0.tar", None), ("000.tar", None), ("latest-00.tar", None),
        ("valley.tar", None),
        ("data/val/000.tar", "val"), ("val/train-000.tar", "val"), ("my-own-0.tar", "my-own"),
        ("of-test-train-0.tar", "train"),
        ("прtrain-0.tar", None), ("training-0.tar", "training"),
    ],
)  # fmt: skip
def test_shards_are_named_after_splits(name: str, split: str | None) -> None:
    assert split_of(name, "my-own") == split


def test_only_the_shards_of_the_split_are_read(tmp_path: Path) -> None:
    for name in ("train-0.tar", "train-1.tar", "val-0.tar", "extra.tar"):
        shard(tmp_path / name, pair(name[0]))
    said = [("extra.tar", "its name has no split, while others are named after {}")]
    assert tars(tmp_path) == (
        {"train-0.tar/t": ("caption of t",), "train-1.tar/t": ("caption of t",)}, [(said[0][0],
        said[0][1].format("train"))]
    )  # fmt: skip
    assert list(tars(tmp_path, split="val")[0]) == ["val-0.tar/v"]
    error = refused(
        tmp_path,
        r"has no shard of test, but of train, val, and 1 without a split in the name",
        "webdataset",
        split="test",
    )
    assert error.exit_code == 2
    assert list(tars(tmp_path / "val-0.tar", split="test")[0]) == ["val-0.tar/v"], (
        "a single given shard is used for any split"
    )
    shard(tmp_path / "Test" / "train-9.tar", pair("9"))
    (tmp_path / "Test" / "val-0.tar").symlink_to("../val-0.tar")
    assert list(tars(tmp_path, split="test")[0]) == ["train-9.tar/9", "val-0.tar/v"], (
        "a folder of the split's name wins"
    )


def test_plain_shards_are_of_train(tmp_path: Path) -> None:
    shard(tmp_path / "000.tar", pair("a"))
    assert list(tars(tmp_path)[0]) == ["000.tar/a"]
    refused(tmp_path, r"data\.split: .* has no folder val\nleave it out", "webdataset", split="val")
    shard(tmp_path / "test" / "000.tar", pair("b"))
    assert list(tars(tmp_path)[0]) == ["000.tar/a"], "another split's folder belongs to that split"
    assert list(tars(tmp_path, split="test")[0]) == ["000.tar/b"]
    shard(tmp_path / "more" / "train" / "0.tar", pair("c"))
    assert list(tars(tmp_path)[0]) == ["more/train/0.tar/c"]
    (tmp_path / "000.tar").unlink()
    (tmp_path / "more").rename(tmp_path / "test" / "more")
    refused(
        tmp_path / "test" / "..",
        r"has no shard of val, but of test, train\n.*data\.split=test",
        "webdataset",
        split="val",
    )
