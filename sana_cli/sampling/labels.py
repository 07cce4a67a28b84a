r"""Labels of grids: text that a person can read, in any script, in lines of a given width. It knows no image.

Pillow brings one font, which has ASCII and little else. Other letters are looked for in the fonts that lie on most machines:
DejaVu Sans, which comes with matplotlib (the `plot` extra), and the systems' own. What no font has is spelt out, as \u4e2d.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

MOST_CHARACTERS = 400  # of a label that are looked at
MOST_LINES = 6
NO_CHARACTER = "\uffff"  # which no font has: it is drawn as a font draws what it lacks
SYSTEM_FONTS = (  # by the names under which Pillow finds them on Linux, macOS and Windows
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc",
    "Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "arial.ttf", "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "seguisym.ttf",
)  # fmt: skip

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _matplotlibs_font() -> str | None:
    """DejaVu Sans inside matplotlib, which is not imported for it."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return str(path) if path.is_file() else None


@lru_cache(maxsize=8)
def fonts(size: int) -> tuple[Font, ...]:
    """Pillow's own font and whatever others are here, in the order in which they are tried."""
    found: list[Font] = [ImageFont.load_default(size)]
    for name in filter(None, (_matplotlibs_font(), *SYSTEM_FONTS)):
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return tuple(found)


@lru_cache(maxsize=65536)
def _has(font: Font, character: str) -> bool:
    if character.isspace():
        return True
    drawn, lacking = font.getmask(character), font.getmask(NO_CHARACTER)
    return drawn.size != lacking.size or bytes(drawn) != bytes(lacking)


def readable(text: str, size: int) -> tuple[Font, str]:
    """A font and the text to draw with it: the first font that has every letter, or the one that lacks fewest, and these spelt out."""
    here, letters = fonts(size), set(text)
    best = min(here, key=lambda font: sum(not _has(font, letter) for letter in letters))
    spelt = (c if _has(best, c) else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return best, "".join(spelt)


def one_line(label: str) -> str:
    """A label without line breaks, control characters and runs of white space."""
    return " ".join("".join(c if c.isprintable() else " " for c in label[:MOST_CHARACTERS]).split())


def wrap(text: str, font: Font, width: int, most_lines: int = MOST_LINES) -> list[str]:
    """Lines of at most `width` pixels, broken between words, and inside those that are wider. What is over ends in an ellipsis."""
    lines = list(_lines(text, font, width))
    if len(lines) > most_lines:
        last = lines[most_lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most_lines - 1], last.rstrip() + "…"]
    return lines


def _lines(text: str, font: Font, width: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        if font.getlength(f"{line} {word}" if line else word) <= width:
            line = f"{line} {word}" if line else word
            continue
        if line:
            yield line
        *whole, line = _pieces(word, font, width)
        yield from whole
    yield line


def _pieces(word: str, font: Font, width: int) -> Sequence[str]:
    """A word in pieces that fit; one character at least in each."""
    pieces, piece = [], ""
    for character in word:
        if piece and font.getlength(piece + character) > width:
            pieces.append(piece)
            piece = ""
        piece += character
    return [*pieces, piece]
