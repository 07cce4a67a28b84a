"""From the bytes of a file to pixels: bounded, upright, sRGB, of given size and channels.

`containers.py` decides which bytes the decoders see, `depth.py` handles brightness and
transparency, `colour.py` colour profiles. It runs in worker processes.

Shapes: H W height and width in pixels, C channels.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

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


def unread_reason(name: str) -> str | None:
    """Why a picture with this suffix is not read; None if it is read or is no picture."""
    suffix = Path(name).suffix.lower()
    return f"pictures of {suffix} are not read: convert it to PNG or JPEG" if suffix in UNREAD else None


def decode_image(image: bytes | Path | np.ndarray) -> Image.Image:
    """Decode a file, its bytes or pixels: upright, L or RGB in sRGB, transparency over white.

    Only the first frame is decoded. White depends on the data type (255, 65535 or 1.0), never
    on the values.

    Raises:
        BadImage: it is not an image or is damaged, is over `MAX_PIXELS` or `MAX_FILE_BYTES`, or
            has values out of range.
        OSError: the file cannot be read.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
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
                return _decode(*containers.strip_metadata(file, beginning, size))
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


def _decode(file: BinaryIO, info: Mapping[str, Any]) -> Image.Image:
    """Decode to 8 bits, L or RGB. `info` has profile and orientation by Pillow's names."""
    with Image.open(file, formats=depth.FORMATS) as opened:
        width, height = opened.size
        if width * height > MAX_PIXELS:
            raise BadImage(f"{width:,} x {height:,} pixels; the most is {MAX_PIXELS:,} in all")
        opened.info.update(info)
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
        turn = _TURNS.get(_orientation(opened))
    if image.mode in ("LA", "RGBA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    plain = image.copy() if image is opened else image  # independent of the file
    plain = plain if turn is None else plain.transpose(turn)
    plain.info = {}
    return plain


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(opened: Image.Image) -> Any:
    """The EXIF orientation, 1 to 8; 1 if it cannot be read. Pillow already rotates TIFF."""
    try:
        value = opened.getexif().get(ExifTags.Base.Orientation, 1)
        hash(value)
    except Exception:  # a broken EXIF raises many kinds: the image is used as it is
        return 1
    return value


# --- fitting ----------------------------------------------------------------------------------


def fit_image(image: Image.Image, size: tuple[int, int], channels: int, fit: str = "crop") -> np.ndarray:
    """Resize (bicubic, antialiased) and convert: (C, H, W) uint8.

    "crop" covers `size` and cuts out the centre; "pad" fits the whole image in, on white.
    """
    height, width = size
    if channels not in (1, 3):
        raise SanaError(f"model.in_channels: images have 1 or 3 channels, not {channels}", exit_code=2)
    image = image.convert("L" if channels == 1 else "RGB")
    scale = buckets.scale((image.height, image.width), size, fit)
    if fit == "crop":  # resize only the visible box: the image may be very long
        inner = min(image.width, width / scale), min(image.height, height / scale)
        left, top = (image.width - inner[0]) / 2, (image.height - inner[1]) / 2
        if image.size != (width, height):
            box = (left, top, left + inner[0], top + inner[1])
            image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    else:
        inside = (
            min(width, max(1, round(image.width * scale))),
            min(height, max(1, round(image.height * scale))),
        )
        if inside != image.size:
            image = image.resize(inside, Image.Resampling.BICUBIC)
        if inside != (width, height):
            sheet = Image.new(image.mode, (width, height), "white")
            sheet.paste(image, ((width - inside[0]) // 2, (height - inside[1]) // 2))
            image = sheet
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


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
            decoded = decode_image(encoded)
            original = decoded.height, decoded.width
            pixels = fit_image(decoded, fitting.size_for(*original), fitting.channels, fitting.fit)
            found.append(Fitted(np.ascontiguousarray(pixels), original))
        except BadImage as error:
            found.append(str(error))
        except SanaError:
            raise
        except OSError as error:
            found.append(f"cannot be read: {error.strerror or error}")
        except (Exception, MemoryError) as error:  # an unusual image can raise anything
            found.append(f"cannot be used: {type(error).__name__}")
    return found
