"""Any source embedded: what is stored is what was there, what cannot be used is listed, and killed work goes on."""

import csv
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import embedded, process_environment, small_config
from PIL import Image

from sana_cli import sources as data
from sana_cli.commands import embed as embedding
from sana_cli.commands.embed import EmbedOptions, EmbedSummary, embed, plan
from sana_cli.commands.inspect import InspectOptions, inspect
from sana_cli.config.keys import Config
from sana_cli.dataset import layout, writer
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.training.batches import pick

RGB = ("model.in_channels=3", "data.image_size=16")


def picture(seed: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def folder_config(tmp_path: Path, source: Path, *more: str) -> Config:
    return small_config(tmp_path, f"data.path={source}", "data.source=folder", "data.workers=0", *RGB, *more)


def listed(config: Config) -> list[tuple[str, tuple[str, ...]]]:
    """(sample id, captions) of every image of a dataset."""
    dataset = Dataset(config.data.dir)
    rows, texts = np.arange(len(dataset)), dataset.texts()
    captions = [tuple(texts[i] for i in ids) for ids in dataset.caption_ids(rows)]
    return list(zip(dataset.sample_ids(rows), captions, strict=True))


def metadata_folder(source: Path, rows: list[dict[str, Any]]) -> Path:
    source.mkdir(parents=True, exist_ok=True)
    for seed, row in enumerate(rows):
        path = source / row["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return source


# --- sources ----------------------------------------------------------------------------------------------------------


def test_metadata_jsonl(tmp_path: Path) -> None:
    rows = [
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
    assert torch.equal(dataset.images(np.array([1]))[0], torch.from_numpy(expected.copy()).float() / 127.5 - 1)
    assert not dataset.index["one_word_captions"]


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
    labels = Dataset(config.data.dir).labels()
    assert labels is not None
    assert labels.tolist() == [0, 0, 1]


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
    more = ("data.source=idx", "data.split=test", f"model.in_channels={channels}", "data.class_names=[shirt, shoe, bag]")
    config = small_config(tmp_path, f"data.path={source}", "data.caption_template=a {}", *more)
    embedded(config)
    assert listed(config)[1] == ("test-000001", ("a shoe",))
    expected = data.fit_image(Image.fromarray(pixels[1]), (16, 16), channels)
    found = Dataset(config.data.dir).images(np.array([1]))[0]
    assert torch.equal(found, torch.from_numpy(expected.copy()).float() / 127.5 - 1)
    with pytest.raises(SanaError, match=r"data\.class_names: 2 names, where a label is 2"):
        embedded(small_config(tmp_path / "x", f"data.path={source}", *more, "data.class_names=[a, b]"))


def tar_of(path: Path, members: list[tuple[str, bytes]], odd: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in odd:
            tar.addfile(info)
    return path


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
        ("shard-0.tar/a/0001", ("first",)), ("shard-0.tar/0002", ("second", "2nd")), ("shard-1.tar/x", ("ex",))
    ]  # fmt: skip
    skipped = {entry["name"]: entry["reason"] for entry in Dataset(config.data.dir).skipped()}
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


def test_hugging_face_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": encoded(picture(seed)), "path": None} for seed in range(3)], "text": ["a", "", "c"]}
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
            small_config(tmp_path / "x", "data.source=datasets", f"data.path={tmp_path / 'saved'}", "data.caption_field=words")
        )


def test_missing_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for settings, message in (
        (["data.source=folder"], r"data\.path: the folder source needs to know where to read"),
        (["data.source=folder", "data.path=/nowhere"], r"data\.path: no folder /nowhere"),
        (["data.source=folder", f"data.path={tmp_path / 'empty'}"], 'neither metadata.jsonl(.|\n)*"file_name": "0001.png"'),
        (["data.source=webdataset", f"data.path={tmp_path / 'empty'}"], "is no .tar file, nor a folder that has any"),
        (["data.source=idx", f"data.path={tmp_path / 'empty'}"], r"has no train-images\*"),
        (["data.source=mnist", "data.split=valid"], r"data\.split: mnist has train and test, not 'valid'"),
    ):
        with pytest.raises(SanaError, match=message):
            embedded(small_config(tmp_path, *settings))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SanaError, match=r"pip install 'sana-cli\[datasets\]'"):
        embedded(small_config(tmp_path, "data.source=datasets", "data.path=some/thing"))


# --- images -----------------------------------------------------------------------------------------------------------


def test_images_come_upright_grey_opaque_and_in_eight_bits() -> None:
    upright = picture(0, (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter: what a camera held sideways writes
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    assert np.array_equal(np.asarray(data.decode_image(encoded(turned, "PNG", exif=exif))), np.asarray(upright))
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    assert np.asarray(data.decode_image(encoded(clear))).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 8, 7])
    assert np.asarray(data.decode_image(encoded(palette, transparency=0))).tolist() == [[[255, 255, 255]]]
    deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(data.decode_image(encoded(deep))).tolist() == [[0, 128, 255]]
    grey = data.decode_image(encoded(Image.new("L", (1, 1), 7)))
    assert data.fit_image(grey, (1, 1), 3).tolist() == [[[7]], [[7]], [[7]]]
    assert data.decode_image(encoded(Image.new("CMYK", (1, 1)), "JPEG")).mode == "RGB"


def test_padding_keeps_the_whole_image() -> None:
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    padded = data.fit_image(wide, (16, 16), 3, fit="pad")
    assert (padded[1, 4:12] == 0).all()
    assert (padded[:, :4] == 255).all()
    assert (padded[:, 12:] == 255).all()
    assert (data.fit_image(wide, (16, 16), 3)[1] == 0).all()


def bad_files(folder: Path) -> dict[str, str]:
    """One file of each kind of trouble, and what should be said of it."""
    outside = folder.parent / "outside.png"
    picture(0).save(outside)
    whole = encoded(picture(0), "PNG")
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("hello")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    Image.new("1", (12_000, 9_000)).save(folder / "large.png")
    (folder / "link.png").symlink_to(outside)
    (folder / "unreadable.png").write_bytes(whole)
    (folder / "unreadable.png").chmod(0)
    picture(0).save(folder / "captionless.png")
    reasons = {
        "truncated.png": "damaged: ",
        "text.png": "not an image of a known kind",
        "empty.png": "an empty file",
        "folder.png": "not a regular file",
        "bomb.png": "more than 100,000,000 pixels",
        "large.png": "12,000 x 9,000 pixels; the most is 100,000,000 in all",
        "link.png": "a link that leads out of the source",
        "missing.png": "no such file",
        "../outside.png": "its name leads out of the source",
        str(outside): "its name leads out of the source",
        "captionless.png": ("no caption", "a caption is not text: 7"),
    }
    if os.geteuid() != 0:
        reasons["unreadable.png"] = "cannot be read"
    return reasons


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_entries_are_left_out_and_listed(tmp_path: Path, workers: int) -> None:
    source = metadata_folder(tmp_path / "source", [{"file_name": f"{n:04d}.png", "text": f"number {n}"} for n in range(1000)])
    reasons = bad_files(source)
    lines = (source / "metadata.jsonl").read_bytes().splitlines()
    chosen = random.Random(0)
    for name in reasons:
        row = {"file_name": name, "text": "" if name == "captionless.png" else "bad"}
        lines.insert(chosen.randrange(len(lines)), json.dumps(row).encode())
    lines[5:5] = [
        b'{"file_name": "\xff.png", "text": "x"}',
        b"{",
        b"[]",
        b'{"text": "nameless"}',
        b'{"file_name": "captionless.png", "text": 7}',
    ]
    lines.append(json.dumps({"file_name": "0000.png", "text": "again"}).encode())
    (source / "metadata.jsonl").write_bytes(b"\n".join(lines))
    config = folder_config(tmp_path, source, f"data.workers={workers}")
    *_, summary = embed(EmbedOptions(config))
    assert isinstance(summary, EmbedSummary)
    assert summary.images == 1000
    skipped = {entry["name"]: entry["reason"] for entry in Dataset(config.data.dir).skipped()}
    for name, reason in reasons.items():
        assert skipped.pop(name).startswith(reason), name  # of two rows for one name, the last
    assert skipped.pop("0000.png") == "named twice; the first is kept"
    if "unreadable.png" not in reasons:  # root reads everything, so no row is about it
        assert skipped.pop("unreadable.png") == "metadata.jsonl does not name it"
    assert sorted(skipped.values()) == [
        "no file_name", "not JSON", "not UTF-8: invalid start byte at byte 15 of the line", "not a JSON object"
    ]  # fmt: skip
    assert all(captions == (f"number {int(name[:4])}",) for name, captions in listed(config))
    report = inspect(InspectOptions(str(config.data.dir), verify=True))
    assert report.facts["left out"] == f"{summary.skipped}, listed in skipped.jsonl"
    listing = config.data.dir / "skipped.jsonl"
    listing.write_text(listing.read_text().replace("no caption", "no kaption"))
    with pytest.raises(SanaError, match="skipped.jsonl is damaged"):
        inspect(InspectOptions(str(config.data.dir), verify=True))
    with pytest.raises(SanaError, match=r"\n?.*: .*\nleave out --strict"):
        list(embed(EmbedOptions(folder_config(tmp_path / "strict", source), strict=True)))
    assert not (tmp_path / "strict" / "data").exists()


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "metadata.jsonl").write_text('{"file_name": "no.png", "text": "x"}\n')
    with pytest.raises(SanaError, match=r"no entry can be used\nno\.png: no such file"):
        embedded(folder_config(tmp_path, source))
    assert not (tmp_path / "data").exists()


def test_too_small_a_disk_is_said_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 1000})())
    with pytest.raises(SanaError, match="needs at least 10,240 bytes, and its disk has 1,000 free"):
        embedded(small_config(tmp_path))
    assert list(tmp_path.iterdir()) == []


# --- the same bytes, however it went ----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A folder of 300 images, three of them bad, with distinct captions of all lengths."""
    words = random.Random(1)
    rows = [
        {"file_name": f"{n:04d}.png", "text": [f"{n} " + "x" * words.randrange(60), f"shared {n % 7}"]} for n in range(300)
    ]  # fmt: skip
    source = metadata_folder(tmp_path / "many", rows)
    for name in ("0003.png", "0150.png", "0299.png"):
        (source / name).write_bytes(b"broken")
    return source


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "WINDOW", 64)
    monkeypatch.setattr(writer, "WINDOW_BYTES", 64 * 1024)


def stop_after_a_window(config: Config) -> None:
    """Embed until a window is whole, and leave it at that."""
    steps = embed(EmbedOptions(config))
    while not any(layout.partial_dir(config.data.dir).glob("window-*.json")):
        next(steps)
    steps.close()


def test_workers_do_not_change_a_byte(tmp_path: Path, many: Path, small_windows: None) -> None:
    made = []
    for workers in (0, 1, 3):
        config = folder_config(tmp_path / str(workers), many, f"data.workers={workers}")
        list(embed(EmbedOptions(config)))
        made.append(contents(config.data.dir))
    assert made[0] == made[1] == made[2]
    assert len([name for name in made[0] if name.startswith("images-")]) == 5
    assert len([name for name in made[0] if name.startswith("captions-")]) > 5  # bounded by bytes too


def test_interrupted_work_goes_on(tmp_path: Path, many: Path, small_windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = folder_config(tmp_path / "whole", many)
    list(embed(EmbedOptions(whole)))
    config = folder_config(tmp_path / "cut", many)
    write, calls = writer.DatasetWriter.write, []

    def failing(self: writer.DatasetWriter, window: int, *rest: Any) -> None:
        calls.append(window)
        if len(calls) in (3, 5):
            raise OSError(28, "No space left on device")
        write(self, window, *rest)

    monkeypatch.setattr(writer.DatasetWriter, "write", failing)
    for _ in range(2):
        with pytest.raises(SanaError, match="the disk is full"):
            list(embed(EmbedOptions(config)))
        assert not config.data.dir.exists()
    *_, summary = embed(EmbedOptions(config))
    assert isinstance(summary, EmbedSummary)
    assert calls == [0, 1, 2, 2, 3, 3, 4]  # what was whole was not done again
    assert summary.resumed == 3
    assert contents(config.data.dir) == contents(whole.data.dir)
    assert not layout.partial_dir(config.data.dir).exists()


def test_unfinished_work_of_another_plan_is_not_mixed_in(tmp_path: Path, many: Path, small_windows: None) -> None:
    config = folder_config(tmp_path, many)
    stop_after_a_window(config)
    other = folder_config(tmp_path, many, "data.image_size=8")
    *_, summary = embed(EmbedOptions(other))
    assert summary.resumed == 0
    fresh = folder_config(tmp_path / "fresh", many, "data.image_size=8")
    list(embed(EmbedOptions(fresh)))
    assert contents(other.data.dir) == contents(fresh.data.dir)


def test_a_changed_source_is_refused(tmp_path: Path, many: Path) -> None:
    config = folder_config(tmp_path, many)
    list(embed(EmbedOptions(config)))
    assert next(iter(embed(EmbedOptions(config)))).was_there
    picture(7, (30, 30)).save(many / "0001.png")
    with pytest.raises(SanaError, match=r"was made with source\.sha256 .*\n.*--overwrite"):
        list(embed(EmbedOptions(config)))
    with pytest.raises(SanaError, match=r"was made with (source\.sha256|image\.fit)"):
        list(embed(EmbedOptions(folder_config(tmp_path, many, "data.fit=pad"))))


SMALL_WINDOWS = "from sana_cli import store\nstore.WINDOW, writer.WINDOW_BYTES = 64, 65536\n"
LATE = """
import os, time
from sana_cli.commands import embed
if os.environ.get("RANK") == "1":
    opened = embed._source
    embed._source = lambda options: (time.sleep(1), opened(options))[1]
"""


def embed_process(tmp_path: Path, config: Config, *launch: str) -> Callable[[], "subprocess.Popen[bytes]"]:
    """Start `sana embed` with small windows as a process of its own, or as several, of which one is late."""
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    script = tmp_path / "small.py"
    body = "from sana_cli.cli import app\nif __name__ == '__main__':\n    app(['embed', '--config', 'config.yaml'])\n"
    script.write_text(SMALL_WINDOWS + LATE + body)
    command = [sys.executable, *launch, str(script)]
    return lambda: subprocess.Popen(
        command, cwd=tmp_path, env=process_environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_killed_work_goes_on(tmp_path: Path, many: Path, small_windows: None) -> None:
    """SIGKILL whenever a new file appears: the bytes in the end are those of work that nobody stopped."""
    whole = folder_config(tmp_path / "whole", many)
    list(embed(EmbedOptions(whole)))
    config = folder_config(tmp_path / "cut", many)
    (tmp_path / "cut").mkdir(exist_ok=True)
    start, partial, kills = embed_process(tmp_path / "cut", config), layout.partial_dir(config.data.dir), 0
    for target in (2, 5, 9):
        process = start()
        while process.poll() is None and len(list(partial.glob("*"))) < target:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.communicate()
    process = start()
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr.decode()
    assert kills >= 2
    assert contents(config.data.dir) == contents(whole.data.dir)


def test_a_killed_worker_is_one_message(tmp_path: Path, many: Path, small_windows: None) -> None:
    """What kills processes for want of memory picks one: the others end, nothing hangs, and the work goes on when asked."""
    whole = folder_config(tmp_path / "whole", many)
    list(embed(EmbedOptions(whole)))
    config = folder_config(tmp_path / "cut", many, "data.workers=2")

    def kill_one() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.001)
        workers[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(SanaError, match=r"was killed, possibly out of memory\n.*data\.workers=1"):
        list(embed(EmbedOptions(config)))
    killer.join()
    assert not config.data.dir.exists()
    list(embed(EmbedOptions(config)))
    assert contents(config.data.dir) == contents(whole.data.dir)
    for worker in multiprocessing.active_children():  # they end by themselves
        worker.join(60)
        assert worker.exitcode is not None


def test_two_processes_make_the_same_bytes(tmp_path: Path, many: Path, small_windows: None) -> None:
    whole = folder_config(tmp_path / "whole", many)
    list(embed(EmbedOptions(whole)))
    (tmp_path / "two").mkdir()
    config = folder_config(tmp_path / "two", many)
    launch = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=0",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    )
    process = embed_process(tmp_path / "two", config, *launch)()
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr.decode()
    assert stdout.decode().count("images ") == 1, "one process speaks"
    assert contents(config.data.dir) == contents(whole.data.dir)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_captions_are_drawn_by_their_weights() -> None:
    draws = np.random.default_rng(0).random(40_000)
    counts = np.bincount([pick(which, [3.0, 0.5, 0.5], 3) for which in draws]) / len(draws)
    assert counts == pytest.approx([0.75, 0.125, 0.125], abs=0.01)
    assert [pick(which, None, 4) for which in (0.0, 0.26, 0.9999)] == [0, 1, 3]
    assert {pick(which, [1.0, 2.0], 2) for which in (0.0, 0.34, 0.999999)} == {0, 1}


# --- what a review found ----------------------------------------------------------------------------------------------


def test_damaged_tars_say_what_is_lost(tmp_path: Path) -> None:
    members = [(f"{n}.{kind}", content) for n in range(6) for kind, content in (("png", encoded(picture(n))), ("txt", b"cap"))]
    source = tmp_path / "source"
    source.mkdir()
    whole = tar_of(source / "a.tar", members).read_bytes()
    with tarfile.open(source / "a.tar") as tar:
        third = tar.getmembers()[4].offset
    flipped = bytearray(whole)
    flipped[third + 150] ^= 1  # in a header's checksum
    for content, reason in (
        (bytes(flipped), "no header at byte"),
        (whole[:third], "cut short"),
        (whole[: third + 100], "cut short"),
        (whole + whole, "another archive follows"),
    ):
        (source / "a.tar").write_bytes(content)
        config = small_config(tmp_path, "data.source=webdataset", f"data.path={source}", *RGB, f"run.dir={tmp_path}")
        *_, summary = embed(EmbedOptions(config, overwrite=True))
        assert any(reason in line for line in summary.first_skipped)
        assert summary.images == (6 if content == whole + whole else 2)
        with pytest.raises(SanaError, match="leave out --strict"):
            list(embed(EmbedOptions(config, overwrite=True, strict=True)))


def test_a_change_of_content_alone_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "tars"
    source.mkdir()
    pairs = [
        (f"{n}.{kind}", content) for n in range(200) for kind, content in (("png", encoded(picture(n))), ("txt", b"cap%03d" % n))
    ]
    tar = tar_of(source / "a.tar", pairs)
    config = small_config(tmp_path, "data.source=webdataset", f"data.path={source}", *RGB)
    list(embed(EmbedOptions(config)))
    with pytest.raises(SanaError, match=r"source\.caption_field"):
        list(
            embed(
                EmbedOptions(
                    small_config(tmp_path, "data.source=webdataset", f"data.path={source}", *RGB, "data.caption_field=x")
                )
            )
        )
    tar.write_bytes(tar.read_bytes().replace(b"cap100", b"dog100"))
    with pytest.raises(SanaError, match=r"source\.sha256"):
        list(embed(EmbedOptions(config)))
    images = tmp_path / "images"
    images.mkdir()
    (images / "metadata.jsonl").write_text('{"file_name": "a.ppm", "text": "x"}\n')
    Image.new("RGB", (8, 8), "red").save(images / "a.ppm")
    config = folder_config(tmp_path / "second", images)
    list(embed(EmbedOptions(config)))
    Image.new("RGB", (8, 8), "blue").save(images / "a.ppm")
    with pytest.raises(SanaError, match=r"source\.sha256"):
        list(embed(EmbedOptions(config)))


def test_other_peoples_folders_are_never_replaced(tmp_path: Path, many: Path) -> None:
    config = folder_config(tmp_path, many)
    partial, site = layout.partial_dir(config.data.dir), tmp_path / "site"
    for folder, name in ((partial, "thesis.txt"), (site, "home.html")):
        folder.mkdir()
        (folder / name).write_text("mine")
    (site / "index.json").write_text("{}")
    with pytest.raises(SanaError, match="holds thesis.txt, which is no part of a dataset of sana's"):
        list(embed(EmbedOptions(config)))
    with pytest.raises(SanaError, match="holds home.html, which is no part of a dataset of sana's"):
        list(embed(EmbedOptions(config, out=site, overwrite=True)))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SanaError, match="is a file"):
        list(embed(EmbedOptions(config, out=tmp_path / "file")))
    assert {path.read_text() for path in (partial / "thesis.txt", site / "home.html", tmp_path / "file")} == {"mine"}


def test_odd_images_and_rows_are_left_out(tmp_path: Path) -> None:
    source = metadata_folder(tmp_path / "source", [{"file_name": "good.png", "text": "fine"}])
    Image.new("L", (5_000_000, 1)).save(source / "long.png")
    (source / "x.png").symlink_to(source / "y.png")
    (source / "y.png").symlink_to(source / "x.png")
    picture(1).save(source / "1:2.png")
    rows: list[dict[str, Any]] = [
        {"file_name": "long.png", "text": "long"}, {"file_name": ".", "text": "x"}, {"file_name": "\ud800.png", "text": "x"},
        {"file_name": "x.png", "text": "x"}, {"file_name": "a\x00.png", "text": "x"}, {"file_name": "1:2.png", "text": "colon"},
        {"file_name": "w.png", "text": ["a"], "caption_weights": [10**400]}, {"file_name": "n" * 5000, "text": "x"},
    ]  # fmt: skip
    with (source / "metadata.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    config = folder_config(tmp_path, source)
    embedded(config)
    assert [name for name, _ in listed(config)] == ["good.png", "long.png", "1:2.png"]
    assert len(list(Dataset(config.data.dir).skipped())) == 6


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


def test_strict_looks_at_what_was_done_before(tmp_path: Path, many: Path, small_windows: None) -> None:
    config = folder_config(tmp_path, many)
    stop_after_a_window(config)
    for _ in range(2):
        with pytest.raises(SanaError, match=r"0003\.png: .*\nleave out --strict"):
            list(embed(EmbedOptions(config, strict=True)))
        list(embed(EmbedOptions(config)))  # then it is finished, and looked at as it is


def test_what_was_whole_but_not_in_its_place_is_put_there(tmp_path: Path, many: Path) -> None:
    config = folder_config(tmp_path, many)
    list(embed(EmbedOptions(config)))
    before, partial = contents(config.data.dir), layout.partial_dir(config.data.dir)
    config.data.dir.rename(partial)
    aside = partial.with_name(partial.name + ".replaced")
    aside.mkdir()
    (aside / "rest").write_text("of a deletion")
    (step,) = embed(EmbedOptions(config))
    assert isinstance(step, EmbedSummary)
    assert step.was_there
    assert contents(config.data.dir) == before
    *_, step = embed(EmbedOptions(config, overwrite=True))
    assert contents(config.data.dir) == before
    assert not aside.exists()


def test_a_link_as_the_dataset_directory(tmp_path: Path, many: Path) -> None:
    (tmp_path / "disk").mkdir()
    config = folder_config(tmp_path, many)
    config.data.dir.symlink_to(tmp_path / "disk", target_is_directory=True)
    for _ in range(2):
        list(embed(EmbedOptions(config, overwrite=True)))
        assert config.data.dir.is_symlink()
        assert layout.is_dataset(tmp_path / "disk")


def test_interrupting_is_prompt(tmp_path: Path, many: Path) -> None:
    config = folder_config(tmp_path, many)
    steps = embed(EmbedOptions(config))
    next(steps)
    steps.close()  # the reader stops at its next images, and nobody waits for the window
    *_, summary = embed(EmbedOptions(config))
    assert summary.images == 297


def test_captions_that_are_cut_are_counted(tmp_path: Path) -> None:
    rows = [
        {"file_name": "0.png", "text": ["one two three four", "one two"]},
        {"file_name": "1.png", "text": "one two three"},
        {"file_name": "2.png", "text": ["one two three four", "five six seven eight nine"]},
    ]
    config = folder_config(tmp_path, metadata_folder(tmp_path / "source", rows), "text.max_length=4")
    summary = embedded(config)
    assert summary.cut == 2, "distinct captions of more than three words, and the beginning"
    assert embedded(config).cut == 2, "also where it was there already"
    assert inspect(InspectOptions(str(config.data.dir))).facts["cut"] == "2 captions, at text.max_length"
    whole = folder_config(tmp_path / "whole", tmp_path / "source")
    assert embedded(whole).cut == 0
