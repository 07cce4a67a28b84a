r"""Labels of grids: legible text in any script, in lines of a given width. It knows no image.

Pillow's own font has little more than ASCII. For other letters the fonts of most machines are
tried: DejaVu Sans, which comes with matplotlib (the `plot` extra), and those of the operating
system. A letter that no font has is written as its code, such as \u4e2d.
"""

import bisect
import importlib.util
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

SMALLEST_FONT, LARGEST_FONT = 12, 20  # pixels
MOST_CHARACTERS = 400  # of a label; the rest is left out
MOST_LINES = 6
NO_CHARACTER = "\uffff"  # in no font: drawn as a font draws any letter that it lacks
SYSTEM_FONTS = (  # as Pillow finds them on Linux, macOS and Windows
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc", "Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "arial.ttf", "msyh.ttc",
    "YuGothM.ttc", "malgun.ttf", "seguisym.ttf",
)  # fmt: skip

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Label:
    """A font, and the lines to draw with it."""

    font: Font
    lines: list[str]

    @property
    def line_height(self) -> int:
        """Pixels from one line to the next."""
        return int(self.font.getbbox("Aygj")[3]) + 4

    @property
    def width(self) -> float:
        """Pixels that its longest line takes."""
        return max(map(self.font.getlength, self.lines))


def fit(text: str, size: int, width: int) -> Label:
    """A label in a font of `size` pixels, in even lines of at most `width` pixels."""
    font, text = readable(one_line(text), size)
    return Label(font, wrap(text, font, even_width(text, font, width)))


def length(text: str, size: int) -> float:
    """Pixels that a label takes on one line, in a font of `size` pixels."""
    font, text = readable(one_line(text), size)
    return font.getlength(text)


def widest_word(texts: Iterable[str], size: int) -> float:
    """Pixels that the widest word of some labels takes, in a font of `size` pixels."""
    return max((length(word, size) for text in texts for word in text.split()), default=0)


def _matplotlibs_font() -> str | None:
    """DejaVu Sans of matplotlib, found without importing it."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return str(path) if path.is_file() else None


@lru_cache(maxsize=8)
def fonts(size: int) -> tuple[Font, ...]:
    """Pillow's own font and the others of this machine, in the order that they are tried in."""
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
    """The first font that lacks fewest letters of a text, and the text with these as codes."""
    letters = set(text)
    best = min(fonts(size), key=lambda font: sum(not _has(font, letter) for letter in letters))
    legible = (c if _has(best, c) else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return best, "".join(legible)


def one_line(label: str) -> str:
    """A label cut to `MOST_CHARACTERS`, without control characters and runs of white space."""
    return " ".join("".join(c if c.isprintable() else " " for c in label[:MOST_CHARACTERS]).split())


def wrap(text: str, font: Font, width: int, most_lines: int = MOST_LINES) -> list[str]:
    """Lines of at most `width` pixels, broken between words, or inside a word that is wider.

    If there are more than `most_lines`, the last one ends in an ellipsis.
    """
    lines = list(_lines(text, font, width))
    if len(lines) > most_lines:
        last = lines[most_lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most_lines - 1], last.rstrip() + "…"]
    return lines


def even_width(text: str, font: Font, width: int) -> int:
    """The narrowest width that takes no more lines than `width` and breaks no more words."""
    least = math.ceil(max(map(font.getlength, text.split()), default=0))
    if least >= width:
        return width
    most_lines = len(list(_lines(text, font, width)))
    narrower = range(least, width)
    return least + bisect.bisect_left(
        narrower, True, key=lambda narrow: len(list(_lines(text, font, narrow))) <= most_lines
    )


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


def _pieces(word: str, font: Font, width: int) -> list[str]:
    """Pieces of a word that fit, or of one character each."""
    pieces, piece = [], ""
    for character in word:
        if piece and font.getlength(piece + character) > width:
            pieces.append(piece)
            piece = ""
        piece += character
    return [*pieces, piece]
