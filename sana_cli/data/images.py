"""From a file's bytes to pixels that fit: bounded, upright, in the channels asked for. It runs in worker processes.

Shapes: H W height and width in pixels, C channels.
"""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sana_cli.data.entry import BadImage
from sana_cli.errors import SanaError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # the decoders that are let near a stranger's file
MAX_PIXELS = 100_000_000
MAX_FILE_BYTES = 512 * 2**20


def decode_image(image: bytes | Path | np.ndarray) -> Image.Image:
    """The picture in a file or its bytes: whole, the right way up, RGB or grey, transparency over white.

    Raises:
        BadImage: it is none, is cut short, or is larger than `MAX_PIXELS` or `MAX_FILE_BYTES`.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    size = len(image) if isinstance(image, bytes) else image.stat().st_size
    if size == 0:
        raise BadImage("an empty file")
    if size > MAX_FILE_BYTES:
        raise BadImage(f"a file of {size:,} bytes; the most is {MAX_FILE_BYTES:,}")
    file = io.BytesIO(image) if isinstance(image, bytes) else image
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=FORMATS) as opened:  # remarks on odd files
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"{width:,} x {height:,} pixels; the most is {MAX_PIXELS:,} in all")
            opened.load()
            return _plain(ImageOps.exif_transpose(opened))
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not an image of a known kind") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {MAX_PIXELS:,} pixels") from error
    except MemoryError as error:
        raise BadImage("too large for memory") from error
    except Exception as error:  # decoders raise whatever they stumble over
        raise BadImage(f"damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def _plain(image: Image.Image) -> Image.Image:
    """Eight bits, grey or RGB; what was transparent is white."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: the full range to 8
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        return Image.fromarray((values.clip(0, top) / top * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        above = image.convert("RGBA")
        below = Image.new("RGBA", above.size, "white")
        return Image.alpha_composite(below, above).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def fit_image(image: Image.Image, size: tuple[int, int], channels: int, fit: str = "crop") -> np.ndarray:
    """Resize (bicubic, antialiased) and convert: (C, H, W) uint8.

    "crop" covers `size` and cuts the centre out; "pad" fits the whole image in, on white.
    """
    height, width = size
    if channels not in (1, 3):
        raise SanaError(f"model.in_channels: images have 1 or 3 channels, not {channels}", exit_code=2)
    image = image.convert("L" if channels == 1 else "RGB")
    ratios = height / image.height, width / image.width
    if fit == "crop":  # the box that will be seen is resized, and nothing else, however long the image is
        scale = max(ratios)
        inner = min(image.width, width / scale), min(image.height, height / scale)
        left, top = (image.width - inner[0]) / 2, (image.height - inner[1]) / 2
        if image.size != (width, height):
            box = (left, top, left + inner[0], top + inner[1])
            image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    else:
        scale = min(ratios)
        inside = min(width, max(1, round(image.width * scale))), min(height, max(1, round(image.height * scale)))
        if inside != image.size:
            image = image.resize(inside, Image.Resampling.BICUBIC)
        if inside != (width, height):
            sheet = Image.new(image.mode, (width, height), "white")
            sheet.paste(image, ((width - inside[0]) // 2, (height - inside[1]) // 2))
            image = sheet
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def decode_all(
    images: Sequence[bytes | Path | np.ndarray], size: tuple[int, int], channels: int, fit: str
) -> list[np.ndarray | str]:
    """Each image as (C, H, W) uint8, or the reason why it cannot be used."""
    found: list[np.ndarray | str] = []
    for image in images:
        try:
            found.append(np.ascontiguousarray(fit_image(decode_image(image), size, channels, fit)))
        except BadImage as error:
            found.append(str(error))
        except SanaError:
            raise
        except OSError as error:
            found.append(f"cannot be read: {error.strerror or error}")
        except (Exception, MemoryError) as error:  # whatever an odd image makes of the library
            found.append(f"cannot be used: {type(error).__name__}")
    return found
