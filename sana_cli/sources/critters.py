"""Critters: small monsters in colour, drawn from a seed, each in words that say what it shows.

The pictures are DiceBear's style Critters (CC0 1.0), put together part by part and rasterised by resvg
(the `critters` extra). Some combinations are never drawn for training (`unseen_kind`). They and some
wordings make up the split `test`, where the attribute `unseen` says which kind an image is.

`phrases.py` writes the captions. This module knows neither encoder nor dataset.
"""

import hashlib
import io
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, resources
from typing import Any

import numpy as np
from PIL import Image

from sana_cli.config.keys import DataConfig
from sana_cli.errors import SanaError
from sana_cli.sources import phrases
from sana_cli.sources.entry import UNSEEN, Entry

VERSION = 1  # of what is drawn and written for a seed

SHAPES = {  # words of a caption, and the parts of the style that are drawn
    "square": "block", "tall": "chimney", "round": "round", "pointed": "peak", "bell-shaped": "bell",
    "stepped": "steps",
}  # fmt: skip
COLOURS = {
    "red": "#e5383b", "orange": "#fb8b24", "yellow": "#ffd60a", "green": "#38b000", "blue": "#3a86ff",
    "purple": "#8338ec", "pink": "#ff8fc7", "brown": "#8b5a2b", "white": "#ffffff",
}  # fmt: skip
HEADS = {
    "horns": "horns", "antennae": "antennae", "round ears": "earsRound", "fin": "fin", "crown": "crown",
    "bobble": "bobble", "sprout": "sprout",
}  # fmt: skip
EYES = {
    "one eye": "mono", "two eyes": "wide", "three eyes": "trio", "four eyes": "four", "happy eyes": "happy",
    "sleepy eyes": "sleepy", "angry eyes": "angry", "a wink": "wink",
}  # fmt: skip
MOUTHS = {
    "smiling": "smile", "laughing": "grin", "showing teeth": "teeth", "surprised": "open",
    "frowning": "frown", "straight": "line", "one tooth": "tooth",
}  # fmt: skip
BACKGROUNDS = {
    "white": "#ffffff", "grey": "#b4bcc8", "black": "#20262f", "pale blue": "#a9d6ff",
    "pale green": "#b5ebbb", "pale yellow": "#ffec99", "pale pink": "#ffc9e0",
}  # fmt: skip
CROWN = "M5 41V11l10 11 10-17 10 17 10-11v30Z"  # larger than the style's, which hides behind a tall body
PLAIN = {"patternProbability": 0, "cheeksProbability": 0, "topProbability": 100, "animationVariant": ["none"]}

KINDS = ("colours", "faces", "phrases", "synonyms")  # of what a test image has that training lacks
PACKAGES = ("dicebear-core", "resvg-py")  # their versions may change a pixel


def unseen_kind(colour: str, head: str, head_colour: str, eyes: str, mouth: str) -> set[str]:
    """Which combinations training lacks: a tenth of the `colours` (body, head, its colour), an eighth of the `faces`.

    Each pair of values is left in: a colour and a head, say, or each eyes with six or seven mouths.
    """
    of_colours, of_heads = list(COLOURS), list(HEADS)
    number = 2 * of_colours.index(colour) + 3 * of_heads.index(head) + of_colours.index(head_colour)
    found = {"colours"} if number % 10 == 7 else set[str]()
    return found | ({"faces"} if list(EYES).index(eyes) == list(MOUTHS).index(mouth) else set())


def clash(colour: str, background: str) -> bool:
    """Whether something of this colour would be lost on this background."""
    return background in (colour, f"pale {colour}")


@dataclass(frozen=True)
class Critter:
    """What one picture shows. It is drawn where it is needed."""

    shape: str
    colour: str
    head: str
    head_colour: str
    eyes: str
    mouth: str
    background: str

    @staticmethod
    def drawn_from(draws: random.Random, unseen: str | None) -> "Critter":
        """A random critter: one that training may have, or one with an unseen combination of this kind."""
        wanted = {unseen} & {"colours", "faces"}
        while True:
            background = draws.choice(list(BACKGROUNDS))
            colour, head_colour = draws.sample([c for c in COLOURS if not clash(c, background)], 2)
            head, eyes, mouth = (draws.choice(list(words)) for words in (HEADS, EYES, MOUTHS))
            if unseen_kind(colour, head, head_colour, eyes, mouth) == wanted:
                shape = draws.choice(list(SHAPES))
                return Critter(shape, colour, head, head_colour, eyes, mouth, background)

    @property
    def attributes(self) -> dict[str, str]:
        """Its attributes by name."""
        return {name.replace("_", " "): value for name, value in vars(self).items()}

    def draw(self, height: int, width: int) -> np.ndarray:
        """Pixels (H, W, 3) uint8. In a picture that is not square it stands at the bottom, in the middle."""
        side = min(height, width)
        sheet = Image.new("RGB", (width, height), BACKGROUNDS[self.background])
        sheet.paste(self._square(side), ((width - side) // 2, height - side))
        return np.asarray(sheet)

    def _square(self, side: int) -> Image.Image:
        import resvg_py
        from dicebear import Avatar

        options = PLAIN | {
            "size": side,
            "seed": "",  # every choice is made below
            "idRandomization": False,
            "backgroundColor": [BACKGROUNDS[self.background]],
            "bodyColor": [COLOURS[self.colour]],
            "accentColor": [COLOURS[self.head_colour]],
            "bodyVariant": [SHAPES[self.shape]],
            "topVariant": [HEADS[self.head]],
            "eyesVariant": [EYES[self.eyes]],
            "mouthVariant": [MOUTHS[self.mouth]],
        }
        svg = Avatar(_style(), options).to_string()
        png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def _style_text() -> str:
    return resources.files("dicebear_styles").joinpath("critters.json").read_text("utf-8")


@lru_cache(1)
def _style() -> Any:
    from dicebear import Style

    style = json.loads(_style_text())
    shadow, crown = style["components"]["top"]["variants"]["crown"]["elements"]
    shadow["attributes"]["transform"] = "translate(3 3.5)"
    for path in (*shadow["children"], crown):
        path["attributes"]["d"] = CROWN
    return Style(style)


class Critters:
    """As many critters as asked for; image i is the same whatever the number. The split `test` has a tenth."""

    def __init__(self, data: DataConfig) -> None:
        try:
            import dicebear  # noqa: F401
            import dicebear_styles  # noqa: F401
            import resvg_py  # noqa: F401
        except ImportError as error:
            raise SanaError(
                "data.source: critters needs dicebear-core, dicebear-styles and resvg-py to draw, "
                f"and {error.name} is not installed",
                "install them with: pip install 'sana-cli[critters]'",
            ) from error
        self.data = data
        self.images = data.images if data.split == "train" else -(-data.images // 10)

    def count(self) -> int | None:
        """Count the images of the split."""
        return self.images

    def __iter__(self) -> Iterator[Entry]:
        return map(self._entry, range(self.images))

    def _entry(self, index: int) -> Entry:
        split = self.data.split
        draws = random.Random(f"critters {VERSION} {self.data.seed} {split} {index}")  # noqa: S311 (no secret)
        name = f"{split}-{index:06d}"
        if split == "train":
            critter = Critter.drawn_from(draws, None)
            captions = phrases.for_training(critter.attributes, draws)
            texts = tuple(caption.text for caption in captions)
            says = tuple(caption.says for caption in captions)
            return Entry(name, critter, texts, critter.attributes, says=says)
        kind = KINDS[index % len(KINDS)]
        critter = Critter.drawn_from(draws, kind)
        caption = phrases.for_test(critter.attributes, draws, kind)
        shown: Mapping[str, str] = {**critter.attributes, UNSEEN: kind}
        return Entry(name, critter, (caption.text,), shown, says=(caption.says,))

    def fingerprint(self) -> dict[str, Any]:
        """Seed, split and count, and what the pictures are drawn with."""
        return {
            "source": "critters",
            "split": self.data.split,
            "version": VERSION,
            "seed": self.data.seed,
            "images": self.images,
            "style": hashlib.sha256(_style_text().encode()).hexdigest(),
            **{package: metadata.version(package) for package in PACKAGES},
        }
