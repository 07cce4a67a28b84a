"""Pixels of any depth, to eight bits: brightness by the kind of image and never by its values, and what is transparent.

White is 255, 65535, the largest integer of 32 bits, or 1.0. Values that cannot be meant so are refused.
Shapes: H W height and width in pixels.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin

from sana_cli.sources import colour
from sana_cli.sources.entry import BadImage

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")  # the decoders that are let near a stranger's file

_FAR = 0.05  # beyond black or white; nearer, floating-point values are what sharpening and resizing leave, and are cut off
_MANY = 0.01  # of all values
_STRIP_PIXELS = 2**20  # converted at a time, so that doubles of a large image do not fill the memory


@dataclass(frozen=True)
class Numbers:
    """Grey of more than eight bits, or with a sign: what stands for white is known from the kind, not from the values."""

    values: np.ndarray  # (H, W)
    kind: str  # in words
    white: int
    inverted: bool = False  # 0 is white, and `white` is black


def _tags(opened: Image.Image) -> Mapping[int, Any]:
    return opened.tag_v2 if isinstance(opened, TiffImagePlugin.TiffImageFile) else {}


def numbers_of(opened: Image.Image) -> Numbers | None:
    """The values of a loaded image that is no plain 8-bit one."""
    tags, mode = _tags(opened), opened.mode
    signed = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2
    if mode == "F":
        values, kind, white = np.asarray(opened), "floating-point values", 1
    elif mode.startswith("I") or (mode == "L" and signed):
        # Pillow brings PGM of any depth to 16 bits
        values, bits = np.asarray(opened), tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        if bits == 32 and not signed:
            values = values.view(np.uint32)
        elif bits == 8:
            values = values.view(np.int8)
        kind, white = f"{'signed ' if signed else ''}{bits}-bit integers", 2 ** (bits - signed) - 1
    else:
        return None
    # Pillow turns 8 bits over by itself, and leaves these
    return Numbers(values, kind, white, tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0)


def _refuse_unmeant(numbers: Numbers) -> None:
    """Refuse values that are surely not meant to lie between black at 0 and white at `white`.

    Raises:
        BadImage: says what they are, and what to do.
    """
    values, white, whole = numbers.values, numbers.white, numbers.values.dtype.kind != "f"
    low, high = values.min().item(), values.max().item()
    if not math.isfinite(low) or not math.isfinite(high):
        raise BadImage(f"{numbers.kind}, some of them not finite: convert it to 8 bits")
    outside = int(np.count_nonzero(values < (0 if whole else -_FAR))) if low < 0 else 0
    if low < 0 and 2 * np.count_nonzero(values < 0) > values.size:
        outside = values.size
    if high > (1 + _FAR) * white:
        integers = np.array_equal(values, np.rint(values))  # 0 to 255, say, of which many may be 0
        outside += values.size if integers else int(np.count_nonzero(values > (1 + _FAR) * white))
    lowest, highest = (str(low), str(high)) if whole else (f"{low:.4g}", f"{high:.4g}")
    black, bright = (white, 0) if numbers.inverted else (0, white)
    if outside > _MANY * values.size:
        ends = f"black is {black} and white is {bright}"
        raise BadImage(f"{numbers.kind} from {lowest} to {highest}, where {ends}: convert it to 8 bits")
    # black all over; or of 32 bits the lower 24 alone, which make one grey of 255 and black
    least = max(white / 510, 2**24 if whole and white >= 2**24 else 0)
    if low != high and (high < least or (numbers.inverted and low > white - least)):
        span = f"from {lowest} to {highest}" if numbers.inverted else f"up to {highest}"
        what = f"convert it to {16 if high > 255 and white > 65535 else 8} bits" if whole else f"scale them to 0 to {white}"
        raise BadImage(f"{numbers.kind} {span}, where white is {bright}: {what}")


def from_numbers(numbers: Numbers, key: Any, profile: Any) -> Image.Image:
    """L; or LA where one value is the key for what is transparent."""
    _refuse_unmeant(numbers)
    curve = colour.to_srgb(profile, "L")
    assert not isinstance(curve, ImageCms.ImageCmsTransform)
    height, width = numbers.values.shape
    grey, rows = np.empty((height, width), dtype=np.uint8), max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        levels = (numbers.values[top : top + rows].astype(np.float64) / numbers.white).clip(0, 1)
        levels = 255 * (1 - levels if numbers.inverted else levels)
        grey[top : top + rows] = (np.interp(levels, np.arange(256), curve) if curve is not None else levels).round()
    image = Image.fromarray(grey)
    if isinstance(key, int):
        image.putalpha(Image.fromarray(np.where(numbers.values == key, 0, 255).astype(np.uint8)))
    return image


# --- how pixels are stored --------------------------------------------------------------------------------------------

_NATIVE = "L" if sys.byteorder == "little" else "B"
_AS_STORED = {"I;16S": "I;16NS", "I;16BS": "I;16NS", "I;32S": "I;32NS", "I;32BS": "I;32NS", "F;32F": "F;32NF", "F;32BF": "F;32NF"}


def _raw_mode(tile: Any) -> str:
    """How a tile's pixels are stored, in Pillow's short names."""
    raw = tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args
    return raw if isinstance(raw, str) else ""


def _with_raw_mode(tile: Any, raw: str) -> Any:
    return tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))


def mend_tiles(opened: ImageFile.ImageFile) -> list[Any]:
    """The tiles of an open image, with what Pillow gets wrong in TIFF put right, and would read as noise.

    libtiff hands values over in the machine's order, whatever the file's. Where each channel lies by itself, 16 bits are still 16.
    """
    if not isinstance(opened, TiffImagePlugin.TiffImageFile):
        return list(opened.tile)
    tiles = list[Any]()
    deep = opened.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,))[0] == 16
    for tile in opened.tile:
        raw = _raw_mode(tile)
        if tile.codec_name == "libtiff":
            raw = _AS_STORED.get(raw, raw)
        elif deep and len(raw) == 1:
            raw += ";16L" if opened.tag_v2.prefix == b"II" else ";16B"
        tiles.append(_with_raw_mode(tile, raw))
    return tiles


def _low_bytes(file: BinaryIO) -> Image.Image | None:
    """An image of 16-bit colours, of which Pillow keeps the high bytes, with the low ones in their place; None for others."""
    with Image.open(file, formats=FORMATS) as opened:
        tiles = []
        for tile in mend_tiles(opened):
            raw = _raw_mode(tile)
            if tile.codec_name in ("ppm", "ppm_plain"):
                if tile.args[1] <= 255:
                    return None
                tiles.append(tile._replace(args=(raw, 256)))
            elif raw == "LA;16B":  # four bytes: grey's high and low one, and those of alpha
                tiles.append(_with_raw_mode(tile, "RGBA"))
            elif raw[-4:-1] == ";16":
                order = raw[-1] if raw[-1] != "N" else _NATIVE
                tiles.append(_with_raw_mode(tile, raw[:-1] + ("B" if order == "L" else "L")))
            else:
                return None
        opened.tile = tiles
        opened.load()
        return opened.copy()


def refuse_faint_colours(opened: Image.Image, tile: Any, file: BinaryIO) -> None:
    """Refuse 16-bit colours that are all under 256: eight bits have nothing but black for them.

    Raises:
        BadImage: they are.
    """
    if ";16" not in _raw_mode(tile) and tile.codec_name not in ("ppm", "ppm_plain"):
        return
    bands = slice(4 if opened.mode == "CMYK" else 3)  # without alpha
    high: Any = opened.getextrema()
    if all(most == 0 for _, most in high[bands]):
        lower = _low_bytes(file)
        low: Any = lower.getextrema() if lower is not None else ()
        if any(least != most for least, most in low[bands]):
            raise BadImage("16-bit colours up to 255 at most, where white is 65535: convert it to 8 bits")


# --- transparency -----------------------------------------------------------------------------------------------------


def with_alpha(opened: Image.Image, tiles: list[Any], file: BinaryIO) -> Image.Image:
    """An 8-bit image as L, LA, RGB, RGBA, CMYK or LAB, with whatever says what is transparent as alpha."""
    mode, raw, key = opened.mode, _raw_mode(tiles[0]) if tiles else "", opened.info.get("transparency")
    if raw == "LA;16B":
        return Image.merge("LA", (opened.getchannel("R"), opened.getchannel("A")))
    if mode == "P" and key is not None:
        opened.info["transparency"] = key[:256] if isinstance(key, bytes) else key
        return opened.convert("RGBA")
    if mode == "RGB" and isinstance(key, tuple):
        if raw == "RGB;16B":
            return _with_deep_key(opened, file, key)
        opened.info["transparency"] = tuple(value & 255 for value in key)
        return opened.convert("RGBA")
    if mode in ("1", "L"):
        grey = opened.convert("L")
        if isinstance(key, int):
            if raw in ("L;2", "L;4"):  # Pillow spreads the values over 0 to 255, but not the key
                most = 2 ** int(raw[2:]) - 1
                key = (key & most) * 255 // most
            grey.putalpha(grey.point([0 if value == key & 255 else 255 for value in range(256)]))
        return grey
    if mode in ("La", "PA", "RGBa"):
        return opened.convert("LA" if mode == "La" else "RGBA")
    return opened if mode in ("LA", "RGB", "RGBA", "CMYK", "LAB") else opened.convert("RGB")


def _with_deep_key(opened: Image.Image, file: BinaryIO, key: tuple[int, ...]) -> Image.Image:
    """RGBA of a PNG of 16 bits, where one colour in 16 bits stands for transparent."""
    low = _low_bytes(file)
    values = np.asarray(opened).astype(np.uint16) << 8 | np.asarray(low)
    image = opened.copy()
    image.putalpha(Image.fromarray(np.where((values == np.array(key)).all(2), 0, 255).astype(np.uint8)))
    return image
