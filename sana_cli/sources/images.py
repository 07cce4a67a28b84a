"""From the bytes of a file to pixels: bounded, upright, sRGB, of given size and channels.

`containers.py` decides which bytes the decoders see, `depth.py` handles brightness and
transparency, `colour.py` colour profiles. It runs in worker processes.

A photo has a hundred times the pixels that are kept, and a JPEG decoder can leave most of them out: it sums
blocks of 2, 4 or 8 pixels while it decodes. `decode` lets it, down to `SPARE` times what is kept.

Shapes: H W height and width in pixels, C channels.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError

from sana_cli import buckets
from sana_cli.errors import SanaError, first_line
from sana_cli.runtime.files import is_lfs_pointer
from sana_cli.sources import colour, containers, depth
from sana_cli.sources.entry import BadImage, Encoded

SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
UNREAD = {  # other formats: not read, but reported
    ".arw", ".cr2", ".cr3", ".cur", ".dcm", ".dds", ".dib", ".djvu", ".dng", ".emf", ".eps", ".exr", ".fits",
    ".hdr", ".heic", ".heics", ".heif", ".heifs", ".hif", ".icns", ".ico", ".j2c", ".j2k", ".jp2", ".jpc",
    ".jpf", ".jpm", ".jpx", ".jxl", ".jxr", ".kra", ".nef", ".orf", ".pam", ".pcx", ".pdf", ".pfm", ".psb",
    ".psd", ".qoi", ".raf", ".rw2", ".sgi", ".svg", ".svgz", ".tga", ".wbmp", ".wmf", ".xbm", ".xcf", ".xpm",
}  # fmt: skip
MAX_PIXELS = 100_000_000
MAX_FILE_BYTES = 512 * 2**20
# times the kept height and width that are decoded at least: resizing hides how the decoder scaled
SPARE = 2.0

Box = tuple[float, float, float, float]  # left, top, right and bottom edge, in pixels


def unread_reason(name: str) -> str | None:
    """Why a picture with this suffix is not read; None if it is read or is no picture."""
    suffix = Path(name).suffix.lower()
    return f"pictures of {suffix} are not read: convert it to PNG or JPEG" if suffix in UNREAD else None


@dataclass(frozen=True)
class Fitting:
    """What becomes of images."""

    size: tuple[int, int]  # height and width of all, and of drawings
    channels: int
    fit: str = "crop"
    buckets: tuple[int, ...] | None = None  # sizes of the tables that each image's shape is chosen from

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of this height and width gets."""
        return self.size if self.buckets is None else buckets.choose(self.buckets, height, width, self.fit)

    def kept(self, height: int, width: int) -> tuple[float, float]:
        """Height and width to which the whole of an image of this height and width is resized."""
        scale = buckets.scale((height, width), self.size_for(height, width), self.fit)
        return height * scale, width * scale


@dataclass(frozen=True)
class Decoded:
    """A picture, perhaps smaller than it was."""

    image: Image.Image  # L or RGB
    original: tuple[int, int]  # its height and width before
    box: Box  # where the picture lies in `image`: a last row or column may go beyond it


def decode_image(image: bytes | Path | np.ndarray) -> Image.Image:
    """Like `decode`, all of it."""
    return decode(image).image


def decode(image: bytes | Path | np.ndarray, fitting: Fitting | None = None) -> Decoded:
    """Decode a file, its bytes or pixels: upright, L or RGB in sRGB, transparency over white.

    Only the first frame is decoded. White depends on the data type (255, 65535 or 1.0), never
    on the values. A JPEG is decoded at a half, a quarter or an eighth where `fitting` needs no more.

    Raises:
        BadImage: it is not an image or is damaged, is over `MAX_PIXELS` or `MAX_FILE_BYTES`, or
            has values out of range.
        OSError: the file cannot be read.
    """
    if isinstance(image, np.ndarray):
        return _whole(Image.fromarray(image))
    with io.BytesIO(image) if isinstance(image, bytes) else image.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        if size == 0:
            raise BadImage("an empty file")
        if size > MAX_FILE_BYTES:
            raise BadImage(f"a file of {size:,} bytes; the most is {MAX_FILE_BYTES:,}")
        file.seek(0)
        beginning = file.read(512)
        if is_lfs_pointer(beginning):
            raise BadImage("a Git LFS pointer, not the image: run git lfs pull")
        try:
            with warnings.catch_warnings(action="ignore"):  # about unusual files
                return _decode(*containers.strip_metadata(file, beginning, size), fitting)
        except BadImage:
            raise
        except UnidentifiedImageError as error:
            raise BadImage(containers.why_undecodable(beginning)) from error
        except Image.DecompressionBombError as error:
            raise BadImage(f"more than {MAX_PIXELS:,} pixels") from error
        except MemoryError as error:
            raise BadImage("too large for memory") from error
        except Exception as error:  # decoders raise many kinds
            raise BadImage(f"damaged: {first_line(error)}") from error


def _whole(image: Image.Image) -> Decoded:
    return Decoded(image, (image.height, image.width), (0, 0, image.width, image.height))


def _decode(file: BinaryIO, info: Mapping[str, Any], fitting: Fitting | None) -> Decoded:
    """Decode to 8 bits, L or RGB. `info` has profile and orientation by Pillow's names."""
    with Image.open(file, formats=depth.FORMATS) as opened:
        width, height = opened.size
        if width * height > MAX_PIXELS:
            raise BadImage(f"{width:,} x {height:,} pixels; the most is {MAX_PIXELS:,} in all")
        opened.info.update(info)
        covered = None if fitting is None else _scale_down(opened, fitting)
        opened.tile = tiles = depth.fix_tiles(opened)
        opened.load()
        profile = opened.info.get("icc_profile")
        deep = depth.deep_grey(opened)
        if deep is not None:
            image = depth.to_8_bits(deep, opened.info.get("transparency"), profile)
        else:
            if tiles and opened.mode in ("RGB", "RGBA", "CMYK"):
                depth.refuse_faint_colours(opened, tiles[0], file)
            image = colour.to_srgb(depth.with_alpha(opened, tiles, file), profile)
        orientation = _orientation(opened)
    if image.mode in ("LA", "RGBA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    plain = image.copy() if image is opened else image  # independent of the file
    turn = _TURNS.get(orientation)
    plain = plain if turn is None else plain.transpose(turn)
    plain.info = {}
    if covered is None:
        return _whole(plain)
    box = _turned(covered, plain.size, orientation)
    return Decoded(plain, (width, height) if orientation in _SIDEWAYS else (height, width), box)


def _scale_down(opened: Image.Image, fitting: Fitting) -> tuple[float, float] | None:
    """Let a JPEG decoder leave out what is not needed. Return the width and height that the picture then covers.

    None if it is decoded as it is.
    """
    if not isinstance(opened, JpegImagePlugin.JpegImageFile):
        return None
    width, height = opened.size
    sideways = _orientation(opened) in _SIDEWAYS
    kept = fitting.kept(*((width, height) if sideways else (height, width)))
    least = [max(1, math.ceil(SPARE * side)) for side in (kept if sideways else kept[::-1])]
    # with a profile the colours are needed even for grey
    grey = (
        fitting.channels == 1 and colour.srgb_transform(opened.info.get("icc_profile"), opened.mode) is None
    )
    drafted = opened.draft("L" if grey else None, (least[0], least[1]))
    if drafted is None or opened.size == (width, height):
        return None
    _, (_, _, right, bottom) = drafted
    return right, bottom


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # height and width change places
# where the edge that is first in the file is the last of the turned picture
_FROM_RIGHT, _FROM_BOTTOM = (2, 3, 6, 7), (3, 4, 7, 8)


def _turned(covered: tuple[float, float], size: tuple[int, int], orientation: Any) -> Box:
    """Where the part that began top left and was `covered` wide and high lies in the turned picture of `size`."""
    across, down = covered[::-1] if orientation in _SIDEWAYS else covered
    left = size[0] - across if orientation in _FROM_RIGHT else 0.0
    top = size[1] - down if orientation in _FROM_BOTTOM else 0.0
    return left, top, left + across, top + down


def _orientation(opened: Image.Image) -> Any:
    """The EXIF orientation, 1 to 8; 1 if it cannot be read. Pillow already rotates TIFF."""
    try:
        value = opened.getexif().get(ExifTags.Base.Orientation, 1)
        hash(value)
    except Exception:  # a broken EXIF raises many kinds: the image is used as it is
        return 1
    return value


# --- fitting ----------------------------------------------------------------------------------


def fit_image(
    image: Image.Image, size: tuple[int, int], channels: int, fit: str = "crop", part: Box | None = None
) -> np.ndarray:
    """Resize (bicubic, antialiased) and convert the image, or a part of it: (C, H, W) uint8.

    "crop" covers `size` and cuts out the centre; "pad" fits the whole in, on white.
    """
    height, width = size
    if channels not in (1, 3):
        raise SanaError(f"model.in_channels: images have 1 or 3 channels, not {channels}", exit_code=2)
    image = image.convert("L" if channels == 1 else "RGB")
    whole = (0, 0, image.width, image.height)
    part = whole if part is None else part
    across, down = part[2] - part[0], part[3] - part[1]
    scale = buckets.scale((down, across), size, fit)
    if fit == "crop":  # resize only the visible box: the image may be very long
        inner = min(across, width / scale), min(down, height / scale)
        left, top = part[0] + (across - inner[0]) / 2, part[1] + (down - inner[1]) / 2
        if part != whole or image.size != (width, height):
            box = (left, top, min(left + inner[0], image.width), min(top + inner[1], image.height))
            image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    else:
        inside = min(width, max(1, round(across * scale))), min(height, max(1, round(down * scale)))
        if part != whole or inside != image.size:
            image = image.resize(inside, Image.Resampling.BICUBIC, box=part)
        if inside != (width, height):
            sheet = Image.new(image.mode, (width, height), "white")
            sheet.paste(image, ((width - inside[0]) // 2, (height - inside[1]) // 2))
            image = sheet
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


@dataclass(frozen=True)
class Fitted:
    """An image as it is stored, and its height and width before."""

    pixels: np.ndarray  # (C, H, W) uint8
    original: tuple[int, int]


def decode_all(images: Sequence[Encoded], fitting: Fitting) -> list[Fitted | str]:
    """Decode or draw, and fit each image. The reason in place of one that cannot be used."""
    found: list[Fitted | str] = []
    for image in images:
        try:
            encoded = image if isinstance(image, bytes | Path | np.ndarray) else image.draw(*fitting.size)
            decoded = decode(encoded, fitting)
            size = fitting.size_for(*decoded.original)
            pixels = fit_image(decoded.image, size, fitting.channels, fitting.fit, decoded.box)
            found.append(Fitted(np.ascontiguousarray(pixels), decoded.original))
        except BadImage as error:
            found.append(str(error))
        except SanaError:
            raise
        except OSError as error:
            found.append(f"cannot be read: {error.strerror or error}")
        except (Exception, MemoryError) as error:  # an unusual image can raise anything
            found.append(f"cannot be used: {type(error).__name__}")
    return found
