"""Pixels of any bit depth, converted to 8 bits, and their transparency.

The data type alone says what white is: 255, 65535, the largest 32-bit integer, or 1.0. Values
that do not fit it are refused.

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

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")  # decoders of untrusted files

_OVERSHOOT = 0.05  # beyond black or white, as left by sharpening and resizing: clipped
_MAX_OUTSIDE = 0.01  # the share of values that may lie further outside
_STRIP_PIXELS = 2**20  # converted at once, since float64 takes eight times the memory


@dataclass(frozen=True)
class DeepGrey:
    """Grey values deeper than 8 bits, or signed. The data type says what white is."""

    values: np.ndarray  # (H, W)
    kind: str  # the data type in words
    white: int
    inverted: bool = False  # 0 is white, and `white` is black


def _tags(opened: Image.Image) -> Mapping[int, Any]:
    return opened.tag_v2 if isinstance(opened, TiffImagePlugin.TiffImageFile) else {}


def deep_grey(opened: Image.Image) -> DeepGrey | None:
    """The values of a loaded image; None if it is plain 8-bit or in colour."""
    tags, mode = _tags(opened), opened.mode
    signed = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2
    if mode == "F":
        values, kind, white = np.asarray(opened), "floating-point values", 1
    elif mode.startswith("I") or (mode == "L" and signed):
        # Pillow converts PGM of any depth to 16 bits
        values, bits = np.asarray(opened), tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        if bits == 32 and not signed:
            values = values.view(np.uint32)
        elif bits == 8:
            values = values.view(np.int8)
        kind, white = f"{'signed ' if signed else ''}{bits}-bit integers", 2 ** (bits - signed) - 1
    else:
        return None
    # Pillow inverts 8-bit values by itself, but not these
    return DeepGrey(values, kind, white, tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0)


def _check_range(grey: DeepGrey) -> None:
    """Refuse values whose range cannot be 0 (black) to `white`.

    Raises:
        BadImage: says what they are, and what to do.
    """
    values, white, is_integer = grey.values, grey.white, grey.values.dtype.kind != "f"
    low, high = values.min().item(), values.max().item()
    if not math.isfinite(low) or not math.isfinite(high):
        raise BadImage(f"{grey.kind}, some of them not finite: convert it to 8 bits")
    outside = int(np.count_nonzero(values < (0 if is_integer else -_OVERSHOOT))) if low < 0 else 0
    if low < 0 and 2 * np.count_nonzero(values < 0) > values.size:
        outside = values.size
    if high > (1 + _OVERSHOOT) * white:
        are_whole = np.array_equal(values, np.rint(values))  # say 0 to 255, of which many may be 0
        outside += values.size if are_whole else int(np.count_nonzero(values > (1 + _OVERSHOOT) * white))
    lowest, highest = (str(low), str(high)) if is_integer else (f"{low:.4g}", f"{high:.4g}")
    black, bright = (white, 0) if grey.inverted else (0, white)
    if outside > _MAX_OUTSIDE * values.size:
        ends = f"black is {black} and white is {bright}"
        raise BadImage(f"{grey.kind} from {lowest} to {highest}, where {ends}: convert it to 8 bits")
    # 8 bits would be all black; or only the low 24 of 32 bits are used, which gives two levels
    least = max(white / 510, 2**24 if is_integer and white >= 2**24 else 0)
    if low != high and (high < least or (grey.inverted and low > white - least)):
        span = f"from {lowest} to {highest}" if grey.inverted else f"up to {highest}"
        bits = 16 if high > 255 and white > 65535 else 8
        todo = f"convert it to {bits} bits" if is_integer else f"scale them to 0 to {white}"
        raise BadImage(f"{grey.kind} {span}, where white is {bright}: {todo}")


def to_8_bits(grey: DeepGrey, key: Any, profile: Any) -> Image.Image:
    """Convert to L in sRGB; to LA if `key` is the value of transparent pixels."""
    _check_range(grey)
    curve = colour.srgb_transform(profile, "L")
    assert not isinstance(curve, ImageCms.ImageCmsTransform)
    height, width = grey.values.shape
    pixels, rows = np.empty((height, width), dtype=np.uint8), max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        levels = (grey.values[top : top + rows].astype(np.float64) / grey.white).clip(0, 1)
        levels = 255 * (1 - levels if grey.inverted else levels)
        levels = np.interp(levels, np.arange(256), curve) if curve is not None else levels
        pixels[top : top + rows] = levels.round()
    image = Image.fromarray(pixels)
    if isinstance(key, int):
        image.putalpha(Image.fromarray(np.where(grey.values == key, 0, 255).astype(np.uint8)))
    return image


# --- how pixels are stored --------------------------------------------------------------------

_NATIVE = "L" if sys.byteorder == "little" else "B"
_NATIVE_ORDER = {
    "I;16S": "I;16NS", "I;16BS": "I;16NS", "I;32S": "I;32NS", "I;32BS": "I;32NS",
    "F;32F": "F;32NF", "F;32BF": "F;32NF",
}  # fmt: skip


def _raw_mode(tile: Any) -> str:
    """Pillow's name for how a tile's pixels are stored."""
    raw = tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args
    return raw if isinstance(raw, str) else ""


def _with_raw_mode(tile: Any, raw: str) -> Any:
    return tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))


def fix_tiles(opened: ImageFile.ImageFile) -> list[Any]:
    """The tiles of an open image, with raw modes that Pillow gets wrong in TIFF corrected.

    libtiff returns values in the machine's byte order, whatever the file's. With planar
    channels, Pillow takes 16-bit values for 8-bit ones. Either way the image would be noise.
    """
    if not isinstance(opened, TiffImagePlugin.TiffImageFile):
        return list(opened.tile)
    tiles = list[Any]()
    deep = opened.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,))[0] == 16
    for tile in opened.tile:
        raw = _raw_mode(tile)
        if tile.codec_name == "libtiff":
            raw = _NATIVE_ORDER.get(raw, raw)
        elif deep and len(raw) == 1:
            raw += ";16L" if opened.tag_v2.prefix == b"II" else ";16B"
        tiles.append(_with_raw_mode(tile, raw))
    return tiles


def _low_bytes(file: BinaryIO) -> Image.Image | None:
    """Load the low bytes of 16-bit colours (Pillow loads the high ones); None for others."""
    with Image.open(file, formats=FORMATS) as opened:
        tiles = []
        for tile in fix_tiles(opened):
            raw = _raw_mode(tile)
            if tile.codec_name in ("ppm", "ppm_plain"):
                if tile.args[1] <= 255:
                    return None
                tiles.append(tile._replace(args=(raw, 256)))
            elif raw == "LA;16B":  # four bytes: high and low of grey, then of alpha
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
    """Refuse 16-bit colours that are all below 256, since 8 bits would be all black.

    Raises:
        BadImage: they all are.
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


# --- transparency -----------------------------------------------------------------------------


def with_alpha(opened: Image.Image, tiles: list[Any], file: BinaryIO) -> Image.Image:
    """Convert 8-bit images to L, LA, RGB, RGBA, CMYK or LAB, with transparency as alpha."""
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
            if raw in ("L;2", "L;4"):  # Pillow scales the values to 0 to 255, but not the key
                most = 2 ** int(raw[2:]) - 1
                key = (key & most) * 255 // most
            grey.putalpha(grey.point([0 if value == key & 255 else 255 for value in range(256)]))
        return grey
    if mode in ("La", "PA", "RGBa"):
        return opened.convert("LA" if mode == "La" else "RGBA")
    return opened if mode in ("LA", "RGB", "RGBA", "CMYK", "LAB") else opened.convert("RGB")


def _with_deep_key(opened: Image.Image, file: BinaryIO, key: tuple[int, ...]) -> Image.Image:
    """Convert a 16-bit PNG to RGBA, where one 16-bit colour means transparent."""
    low = _low_bytes(file)
    values = np.asarray(opened).astype(np.uint16) << 8 | np.asarray(low)
    image = opened.copy()
    image.putalpha(Image.fromarray(np.where((values == np.array(key)).all(2), 0, 255).astype(np.uint8)))
    return image
