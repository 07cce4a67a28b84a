"""Output paths: devices and links, suffixes and slashes, one path given twice, file modes."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import process_environment
from PIL import Image

from sana_cli.commands.eval import EvalOptions, evaluate
from sana_cli.commands.sample import SampleOptions, SampleSummary, sample
from sana_cli.errors import SanaError
from sana_cli.runtime import files, outputs
from sana_cli.sampling import pictures, sampler
from sana_cli.weights import checkpoint


def drawn(**options: object) -> SampleSummary:
    *_, summary = sample(SampleOptions(("4 two",), checkpoint.shipped(), steps=1, device="cpu", **options))  # type: ignore[arg-type]
    assert isinstance(summary, SampleSummary)
    return summary


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_pipe_is_written_into_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    summary = drawn(out=pipe)
    reader.join(timeout=60)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert got[0].startswith(b"\x89PNG")
    assert summary.saved == (pipe,)
    assert list(tmp_path.iterdir()) == [pipe], "no other file remains"


def test_a_device_is_never_renamed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for /dev/null: a character device is opened for writing and never replaced."""
    target = tmp_path / "device"
    target.write_bytes(b"")
    there = target.stat()
    fake = os.stat_result((stat.S_IFCHR | 0o666, *tuple(there)[1:]))
    plain = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **k: fake if self == target else plain(self, **k))
    with files.whole_file(target) as partial:
        assert partial.parent != target.parent
        partial.write_bytes(b"into it")
    monkeypatch.undo()
    assert target.read_bytes() == b"into it"
    assert target.stat().st_ino == there.st_ino


def test_stdout_takes_a_picture(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sana_cli", "sample", "4", "-q", "--steps", "1", "--out", "/dev/stdout"],
        cwd=tmp_path, env=process_environment(tmp_path), capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (tmp_path / "got.png").write_bytes(done.stdout)
    assert pictures.read_record(tmp_path / "got.png").as_json()["images"] == [[{"prompt": "4", "seed": 0}]]
    assert done.stdout.endswith(b"IEND\xaeB`\x82"), "nothing follows the picture"


@pytest.mark.parametrize("exists", [True, False])
def test_links_are_followed(exists: bool, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    real, link, over = tmp_path / "far" / "real.png", tmp_path / "link.png", tmp_path / "over.png"
    link.symlink_to(Path("far") / "real.png")
    over.symlink_to(link)
    if exists:
        real.write_bytes(b"old")
        real.chmod(0o640)
    drawn(out=over)
    assert over.is_symlink()
    assert link.is_symlink()
    assert real.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "far").iterdir()) == ["real.png"]
    if exists:
        assert stat.S_IMODE(real.stat().st_mode) == 0o640, "a replaced file keeps its mode"
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(SanaError, match="writing the pictures"):
        drawn(out=tmp_path / "a")


def test_a_failure_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "kept.txt"
    target.write_text("old")

    def fail() -> None:
        with files.whole_file(target) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_modes_follow_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        files.write_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(2)})
        files.write_json(tmp_path / "j.json", {})
        with files.whole_file(tmp_path / "w.txt") as partial:
            partial.write_text("text")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_a_file_system_without_modes_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    (tmp_path / "w.txt").write_text("old")
    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    files.write_tensors(tmp_path / "t.safetensors", {"a": torch.arange(2.0)})
    with files.whole_file(tmp_path / "w.txt") as partial:
        partial.write_text("new")
    assert files.read_tensors(tmp_path / "t.safetensors")["a"].tolist() == [0, 1]
    assert (tmp_path / "w.txt").read_text() == "new"


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP"), ("a", "PNG")],
)
def test_a_suffix_says_the_format_and_every_format_remembers(name: str, kind: str, tmp_path: Path) -> None:
    summary = drawn(out=tmp_path / name, seed=3)
    with Image.open(tmp_path / name) as image:
        assert image.format == kind
    record = pictures.read_record(tmp_path / name).as_json()
    assert record["images"] == [[{"prompt": "4", "seed": 3}, {"prompt": "two", "seed": 4}]]
    assert summary.saved == (tmp_path / name,)


@pytest.mark.parametrize(("name", "kind"), [("f.gif", "GIF"), ("f.webp", "WEBP"), ("f.png", "PNG")])
def test_films_too(name: str, kind: str, tmp_path: Path) -> None:
    drawn(out=tmp_path / "a.png", trajectory=tmp_path / name)
    with Image.open(tmp_path / name) as film:
        assert film.format == kind
        assert getattr(film, "n_frames", 1) == 2


def test_what_no_suffix_means_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    for options, message in (
        ({"out": tmp_path / "a.bmp"}, r"`out`: .*a\.bmp: \.bmp is not one of \.png, \.jpg, \.jpeg, \.webp"),
        ({"out": tmp_path / "a.gif"}, r"`out`: .*\.gif is not one of"),
        (
            {"trajectory": tmp_path / "a.mp4"},
            r"`trajectory`: .*a\.mp4: \.mp4 is not one of \.gif, \.webp, \.png",
        ),
        ({"out": ""}, "`out`: the path is empty"),
    ):
        with pytest.raises(SanaError, match=message) as caught:
            drawn(**options)
        assert caught.value.exit_code == 2
    with pytest.raises(SanaError, match=r"`out`: .*\.csv is not one of \.json"):
        list(evaluate(EvalOptions(checkpoint.shipped(), out=tmp_path / "r.csv")))
    assert list(tmp_path.iterdir()) == []


def test_a_slash_or_a_folder_means_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = Path("there")
    there.mkdir()
    assert [drawn(out="new/", trajectory="film/").saved] == [
        (Path("new/sample-quickstart.png"), Path("film/sample-quickstart.gif"))
    ]
    assert drawn(out=there).saved == (there / "sample-quickstart.png",)
    assert drawn(out="there").saved == (there / "sample-quickstart-2.png",), (
        "no picture in a folder is overwritten"
    )
    Path("file").write_text("kept")
    with pytest.raises(SanaError, match="`separate`: file is not a folder"):
        drawn(separate=Path("file"))
    assert Path("file").read_text() == "kept"


def test_two_outputs_are_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link.png").symlink_to("a.png")
    Path("prompts.png").write_text("4\n")
    for options in (
        {"out": "a.png", "trajectory": "a.png"},
        {"out": "a.png", "trajectory": tmp_path / "a.png"},
        {"out": "sub/../a.png", "trajectory": "./a.png"},
        {"out": "a.png", "trajectory": "link.png"},
        {"out": "each/0001-two.png", "separate": Path("each")},
    ):
        with pytest.raises(SanaError, match="are the same file") as caught:
            drawn(**options)
        assert caught.value.exit_code == 2
    with pytest.raises(SanaError, match="`prompts_file` and `out` are the same file"):
        drawn(out="prompts.png", prompts_file=Path("prompts.png"))
    assert Path("prompts.png").read_text() == "4\n"
    assert not Path("a.png").exists()
    with pytest.raises(SanaError, match="`out` and `plot` are the same file"):
        outputs.check_distinct([("`out`", Path("r.json")), ("`plot`", Path("./r.json"))])
    both = drawn(out="a.png", separate=Path("each"))
    assert [path.name for path in both.saved] == ["0000-4.png", "0001-two.png", "a.png"]


def test_folders_keep_what_is_in_them_and_a_dash_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval.json").write_text("kept")
    assert outputs.output("`out`", ".", "eval.json", outputs.DOCUMENTS) == Path("eval-2.json")
    with pytest.raises(SanaError, match="`out`: - is not a file\nstdout is /dev/stdout"):
        drawn(out="-")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json"]


def test_grids_that_a_format_has_no_room_for_are_refused_before_they_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "sample_images", lambda *_: pytest.fail("it was drawn"))
    many = tuple("4 two" for _ in range(260))
    for name, option in (("m.webp", "out"), ("m.webp", "trajectory"), ("m.jpg", "out")):
        prompts = many if name == "m.webp" else many * 4
        places = {"out": tmp_path / "p.png"} | {option: tmp_path / name}
        options = SampleOptions(prompts, checkpoint.shipped(), steps=1, device="cpu", **places)  # type: ignore[arg-type]
        with pytest.raises(
            SanaError, match=rf"`{option}`: .*a grid of .* pixels, where (WEBP|JPEG) has .* at most"
        ) as caught:
            list(sample(options))
        assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_jpeg_without_room_for_its_record_says_so(tmp_path: Path) -> None:
    def grid(count: int, name: str) -> SampleSummary:
        prompts = tuple("4 two 4 six" for _ in range(count))
        *_, summary = sample(
            SampleOptions(prompts, checkpoint.shipped(), steps=1, device="cpu", out=tmp_path / name)
        )
        assert isinstance(summary, SampleSummary)
        return summary

    assert grid(150, "some.jpg").notes == (), "there is room without the words for other tools"
    assert len(pictures.read_record(tmp_path / "some.jpg").images) == 150
    (note,) = grid(720, "many.jpg").notes
    assert "many.jpg has no room for all its prompts" in note
    assert grid(180, "many.webp").notes == ()
    assert len(pictures.read_record(tmp_path / "many.webp").images) == 180


def test_stdout_is_appended_to_and_nothing_else_is_written_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sana_cli", "sample", "4", "--steps", "1", "--out", "/dev/stdout"]
    common = {"cwd": tmp_path, "env": process_environment(tmp_path), "timeout": 300, "check": False}
    target = tmp_path / "all.bin"
    target.write_bytes(b"kept\n")
    with target.open("ab") as into:
        done = subprocess.run(
            [*command, "--trajectory", "film.gif"], stdout=into, stderr=subprocess.PIPE, **common
        )  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    kept, _, picture = target.read_bytes().partition(b"\n")
    assert kept == b"kept"
    assert picture.startswith(b"\x89PNG")
    assert picture.endswith(b"IEND\xaeB`\x82")
    assert b"film.gif" in done.stderr
    refused = subprocess.run([*command, "--json"], capture_output=True, **common)  # type: ignore[call-overload]
    assert (refused.returncode, refused.stdout) == (2, b"")
    judged = [sys.executable, "-m", "sana_cli", "eval", "shipped", "--out", "/dev/stdout"]
    refused = subprocess.run(judged, capture_output=True, **common)  # type: ignore[call-overload]
    assert (refused.returncode, refused.stdout) == (2, b"")


def test_an_impossible_place_for_results_is_said_before_the_judging(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("kept")
    with pytest.raises(SanaError, match="writing .*eval.json: Not a directory"):
        list(evaluate(EvalOptions(checkpoint.shipped(), out=tmp_path / "file.txt" / "eval.json")))
