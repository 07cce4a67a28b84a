"""`sana embed`: the same bytes each time, bad entries are listed, killed work is resumed."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import close, contents, embedded, encoded, process_environment, small_config, wait_until
from helpers.folders import RGB, finished, folder_config, listed, metadata_folder, picture, tar_of
from PIL import Image
from safetensors.torch import load_file

from sana_cli.commands.embed import EmbedOptions, EmbedSummary, embed, plan
from sana_cli.commands.inspect import InspectOptions, inspect
from sana_cli.config.keys import Config
from sana_cli.dataset import layout, writer
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.runtime import files


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (small_config(tmp_path / name) for name in ("a", "b"))
    embedded(first)
    embedded(second)
    for path in sorted(first.data.dir.iterdir()):
        assert path.read_bytes() == (second.data.dir / path.name).read_bytes(), path.name


def test_embedding_again_is_a_no_op_or_a_refusal(config: Config) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in config.data.dir.iterdir()}
    assert embedded(config).was_there
    assert {path.name: path.stat().st_mtime_ns for path in config.data.dir.iterdir()} == before
    for override, field in (
        ("data.split=test", r"source\.split 'train', not 'test'"),
        ("data.image_size=24", "image.height 16, not 24"),
        ("model.in_channels=3", "image.channels 1, not 3"),
        ("text.max_length=20", "text.max_length: .* has 300, not 20"),
        ("text.encoder=some/model", "text.encoder: .* has 'tiny', not 'some/model'"),
    ):
        with pytest.raises(SanaError, match=f"{field}.*\n.*`overwrite`"):
            embedded(small_config(config.data.dir.parent, override))
    changed = small_config(config.data.dir.parent, "data.image_size=24")
    assert not finished(changed, limit=40, overwrite=True).was_there
    assert Dataset(config.data.dir).image_shape == (1, 24, 24)
    assert sorted(path.name for path in config.data.dir.parent.iterdir()) == ["data"]


def test_a_failing_overwrite_keeps_the_old_dataset(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_sealed_json", full)
        with pytest.raises(SanaError, match="the disk is full"):
            list(
                embed(
                    EmbedOptions(
                        small_config(config.data.dir.parent, "data.image_size=24"), limit=9, overwrite=True
                    )
                )
            )
    assert Dataset(config.data.dir).image_shape == (1, 16, 16)
    list(
        embed(
            EmbedOptions(small_config(config.data.dir.parent, "data.image_size=24"), limit=9, overwrite=True)
        )
    )
    assert Dataset(config.data.dir).image_shape == (1, 24, 24)
    assert sorted(path.name for path in config.data.dir.parent.iterdir()) == ["data"]


def test_a_strangers_folder_is_not_touched(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config.data.dir.mkdir()
    (config.data.dir / "thesis.txt").write_text("all of it")
    with pytest.raises(SanaError, match="holds thesis.txt, which is not part of a sana dataset"):
        embedded(config)
    assert (config.data.dir / "thesis.txt").read_text() == "all of it"


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    found = plan(EmbedOptions(small_config(tmp_path)))
    assert (found.images, found.image_shape, found.image_bytes) == (60000, (1, 16, 16), 60000 * 256)
    assert list(tmp_path.iterdir()) == []


# --- sources ------------------------------------------------------------------------------------------------


def test_missing_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for settings, message in (
        (["data.source=folder"], r"data\.path: the folder source needs to know where to read"),
        (["data.source=folder", "data.path=/nowhere"], r"data\.path: no folder /nowhere"),
        (
            ["data.source=folder", f"data.path={tmp_path / 'empty'}"],
            'neither metadata.jsonl(.|\n)*"file_name": "0001.png"',
        ),
        (
            ["data.source=webdataset", f"data.path={tmp_path / 'empty'}"],
            "is neither a .tar file nor a folder with one",
        ),
        (["data.source=idx", f"data.path={tmp_path / 'empty'}"], r"has no train-images\*"),
        (["data.source=mnist", "data.split=valid"], r"data\.split: mnist has train and test, not 'valid'"),
    ):
        with pytest.raises(SanaError, match=message):
            embedded(small_config(tmp_path, *settings))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SanaError, match=r"pip install 'sana-cli\[datasets\]'"):
        embedded(small_config(tmp_path, "data.source=datasets", "data.path=some/thing"))


# --- images -------------------------------------------------------------------------------------------------


def bad_files(folder: Path) -> dict[str, str | tuple[str, str]]:
    """One file of each kind of trouble, and the expected reason."""
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
    reasons: dict[str, str | tuple[str, str]] = {
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
    source = metadata_folder(
        tmp_path / "source", [{"file_name": f"{n:04d}.png", "text": f"number {n}"} for n in range(1000)]
    )
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
    summary = finished(config)
    assert summary.images == 1000
    skipped = {entry.name: entry.reason for entry in Dataset(config.data.dir).skipped()}
    for name, reason in reasons.items():
        assert skipped.pop(name).startswith(reason), name  # the last of two rows for one name
    assert skipped.pop("0000.png") == "named twice; the first is kept"
    if "unreadable.png" not in reasons:  # root can read it
        assert skipped.pop("unreadable.png") == "metadata.jsonl does not name it"
    assert sorted(skipped.values()) == [
        "no file_name", "not JSON", "not UTF-8: invalid start byte at byte 15 of the line",
        "not a JSON object"
    ]  # fmt: skip
    assert all(captions == (f"number {int(name[:4])}",) for name, captions in listed(config))
    report = inspect(InspectOptions(str(config.data.dir), verify=True))
    assert report.facts["left out"] == f"{summary.skipped}, listed in skipped.jsonl"
    listing = config.data.dir / "skipped.jsonl"
    listing.write_text(listing.read_text().replace("no caption", "no kaption"))
    with pytest.raises(SanaError, match="skipped.jsonl is damaged"):
        inspect(InspectOptions(str(config.data.dir), verify=True))
    with pytest.raises(SanaError, match=r"\n?.*: .*\nleave out `strict`"):
        list(embed(EmbedOptions(folder_config(tmp_path / "strict", source), strict=True)))
    assert not (tmp_path / "strict" / "data").exists()


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "metadata.jsonl").write_text('{"file_name": "no.png", "text": "x"}\n')
    with pytest.raises(SanaError, match=r"no entry can be used\nno\.png: no such file"):
        embedded(folder_config(tmp_path, source))
    assert not (tmp_path / "data").exists()


def test_too_small_a_disk_is_said_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 1000})())
    with pytest.raises(SanaError, match="needs at least 10,240 bytes, and its disk has 1,000 free"):
        embedded(small_config(tmp_path))
    assert list(tmp_path.iterdir()) == []


# --- the same bytes, with or without interruptions ----------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A folder of 300 images, three of them bad, with distinct captions of many lengths.

    They have the attribute `group`, and in the second half `late`, which the shared captions leave out.
    """
    words = random.Random(1)
    rows = [
        {
            "file_name": f"{n:04d}.png",
            "text": [f"{n} " + "x" * words.randrange(60), f"shared {n % 7}"],
            "attributes": {"group": n % 7} | ({"late": f"since {n // 100}"} if n >= 150 else {}),
            "caption_attributes": [["group", "late"] if n >= 150 else ["group"], ["group"]],
        }
        for n in range(300)
    ]
    source = metadata_folder(tmp_path / "many", rows)
    for name in ("0003.png", "0150.png", "0299.png"):
        (source / name).write_bytes(b"broken")
    return source


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "WINDOW", 64)
    monkeypatch.setattr(writer, "WINDOW_BYTES", 64 * 1024)


def stop_after_a_window(config: Config) -> None:
    """Embed until one window is complete, then stop."""
    steps = embed(EmbedOptions(config))
    while not any(layout.partial_dir(config.data.dir).glob("window-*.json")):
        next(steps)
    close(steps)


def test_workers_do_not_change_a_byte(tmp_path: Path, many: Path, small_windows: None) -> None:
    made = []
    for workers in (0, 1, 3):
        config = folder_config(tmp_path / str(workers), many, f"data.workers={workers}")
        list(embed(EmbedOptions(config)))
        made.append(contents(config.data.dir))
    assert made[0] == made[1] == made[2]
    assert len([name for name in made[0] if name.startswith("images-")]) == 5
    assert len([name for name in made[0] if name.startswith("captions-")]) > 5  # their bytes are limited too


def test_an_attribute_of_later_windows(tmp_path: Path, many: Path, small_windows: None) -> None:
    """Images in shards from before it was known have none, as have those that lack it beside it."""
    config = folder_config(tmp_path, many)
    finished(config)
    dataset = Dataset(config.data.dir)
    assert dataset.attributes == {"group": [*"0123456"], "late": ["since 1", "since 2"]}
    numbers = [n for n in range(300) if n not in (3, 150, 299)]
    expected = [[n % 7, n // 100 - 1 if n >= 150 else -1] for n in numbers]
    assert dataset.attribute_ids().tolist() == expected
    assert dataset.caption_attributes(np.arange(len(dataset))) == [
        [["group", "late"] if n >= 150 else ["group"], ["group"]] for n in numbers
    ]
    widths = [load_file(path)["attributes"].shape[1] for path in sorted(config.data.dir.glob("images-*"))]
    assert widths == [1, 1, 2, 2, 2]


def test_interrupted_work_goes_on(
    tmp_path: Path, many: Path, small_windows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    summary = finished(config)
    assert calls == [0, 1, 2, 2, 3, 3, 4]  # complete windows are not repeated
    assert summary.resumed == 3
    assert contents(config.data.dir) == contents(whole.data.dir)
    assert not layout.partial_dir(config.data.dir).exists()


def test_unfinished_work_of_another_plan_is_not_mixed_in(
    tmp_path: Path, many: Path, small_windows: None
) -> None:
    config = folder_config(tmp_path, many)
    stop_after_a_window(config)
    other = folder_config(tmp_path, many, "data.image_size=8")
    summary = finished(other)
    assert summary.resumed == 0
    fresh = folder_config(tmp_path / "fresh", many, "data.image_size=8")
    list(embed(EmbedOptions(fresh)))
    assert contents(other.data.dir) == contents(fresh.data.dir)


def test_a_changed_source_is_refused(tmp_path: Path, many: Path) -> None:
    config = folder_config(tmp_path, many)
    list(embed(EmbedOptions(config)))
    (only,) = embed(EmbedOptions(config))
    assert isinstance(only, EmbedSummary)
    assert only.was_there
    picture(7, (30, 30)).save(many / "0001.png")
    with pytest.raises(SanaError, match=r"was made with source\.sha256 .*\n.*`overwrite`"):
        list(embed(EmbedOptions(config)))
    with pytest.raises(SanaError, match=r"was made with (source\.sha256|image\.fit)"):
        list(embed(EmbedOptions(folder_config(tmp_path, many, "data.fit=pad"))))


SMALL_WINDOWS = "from sana_cli.dataset import writer\nwriter.WINDOW, writer.WINDOW_BYTES = 64, 65536\n"
LATE = """
import os, time
from sana_cli.commands import embed
if os.environ.get("RANK") == "1":
    opened = embed._source
    embed._source = lambda options: (time.sleep(1), opened(options))[1]
"""


def embed_process(tmp_path: Path, config: Config, *launch: str) -> Callable[[], "subprocess.Popen[bytes]"]:
    """Start `sana embed` with small windows: one process, or several of which one is late."""
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    script = tmp_path / "small.py"
    body = "from sana_cli.cli import app\nif __name__ == '__main__':\n    app(['embed', '--config', 'config.yaml'])\n"
    script.write_text(SMALL_WINDOWS + LATE + body)
    command = [sys.executable, *launch, str(script)]
    return lambda: subprocess.Popen(
        command,
        cwd=tmp_path,
        env=process_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_killed_work_goes_on(tmp_path: Path, many: Path, small_windows: None) -> None:
    """SIGKILL at each new file: the final bytes are those of an uninterrupted run."""
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
    """As when memory runs out: the other processes end, nothing hangs, work can resume."""
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
    # They end without being killed. Not by `join`: another thread may reap them at that moment, and
    # then `exitcode` is None though they have ended.
    wait_until(lambda: not multiprocessing.active_children(), seconds=60)


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
    assert stdout.decode().count("images ") == 1, "only one process reports"
    assert contents(config.data.dir) == contents(whole.data.dir)


# --- found in reviews ---------------------------------------------------------------------------------------


def test_a_change_of_content_alone_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "tars"
    source.mkdir()
    pairs = [
        (f"{n}.{kind}", content)
        for n in range(200)
        for kind, content in (("png", encoded(picture(n))), ("txt", b"cap%03d" % n))
    ]
    tar = tar_of(source / "a.tar", pairs)
    config = small_config(tmp_path, "data.source=webdataset", f"data.path={source}", *RGB)
    list(embed(EmbedOptions(config)))
    with pytest.raises(SanaError, match=r"source\.caption_field"):
        list(
            embed(
                EmbedOptions(
                    small_config(
                        tmp_path,
                        "data.source=webdataset",
                        f"data.path={source}",
                        *RGB,
                        "data.caption_field=x",
                    )
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
    with pytest.raises(SanaError, match="holds thesis.txt, which is not part of a sana dataset"):
        list(embed(EmbedOptions(config)))
    with pytest.raises(SanaError, match="holds home.html, which is not part of a sana dataset"):
        list(embed(EmbedOptions(config, out=site, overwrite=True)))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SanaError, match="is a file"):
        list(embed(EmbedOptions(config, out=tmp_path / "file")))
    assert {path.read_text() for path in (partial / "thesis.txt", site / "home.html", tmp_path / "file")} == {
        "mine"
    }


def test_odd_images_and_rows_are_left_out(tmp_path: Path) -> None:
    source = metadata_folder(tmp_path / "source", [{"file_name": "good.png", "text": "fine"}])
    Image.new("L", (5_000_000, 1)).save(source / "long.png")
    (source / "x.png").symlink_to(source / "y.png")
    (source / "y.png").symlink_to(source / "x.png")
    picture(1).save(source / "1:2.png")
    rows: list[dict[str, Any]] = [
        {"file_name": "long.png", "text": "long"}, {"file_name": ".", "text": "x"},
        {"file_name": "\ud800.png", "text": "x"},
        {"file_name": "x.png", "text": "x"}, {"file_name": "a\x00.png", "text": "x"}, {"file_name": "1:2.png",
        "text": "colon"},
        {"file_name": "w.png", "text": ["a"], "caption_weights": [10**400]}, {"file_name": "n" * 5000,
        "text": "x"},
    ]  # fmt: skip
    with (source / "metadata.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    config = folder_config(tmp_path, source)
    embedded(config)
    assert [name for name, _ in listed(config)] == ["good.png", "long.png", "1:2.png"]
    assert len(list(Dataset(config.data.dir).skipped())) == 6


def test_strict_looks_at_what_was_done_before(tmp_path: Path, many: Path, small_windows: None) -> None:
    config = folder_config(tmp_path, many)
    stop_after_a_window(config)
    for _ in range(2):
        with pytest.raises(SanaError, match=r"0003\.png: .*\nleave out `strict`"):
            list(embed(EmbedOptions(config, strict=True)))
        list(embed(EmbedOptions(config)))  # now finished, and checked as it is


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
    finished(config, overwrite=True)
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
    close(steps)  # the reader stops at its next images, not at the end of the window
    assert finished(config).images == 297


def test_captions_that_are_cut_are_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"file_name": "0.png", "text": ["one two three four", "one two"]},
        {"file_name": "1.png", "text": "one two three"},
        {"file_name": "2.png", "text": ["one two three four", "five six seven eight nine"]},
    ]
    config = folder_config(tmp_path, metadata_folder(tmp_path / "source", rows), "text.max_length=4")
    summary = embedded(config)
    assert summary.cut == 2, "distinct captions of more than three words; the first token is <bos>"
    assert embedded(config).cut == 2, "also for an existing dataset"
    assert inspect(InspectOptions(str(config.data.dir))).facts["cut"] == "2 captions, at text.max_length"
    whole = folder_config(tmp_path / "whole", tmp_path / "source")
    assert embedded(whole).cut == 0
