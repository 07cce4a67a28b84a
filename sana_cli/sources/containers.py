"""Which bytes of an image file the decoders see, and what a file is that no decoder accepts.

Text, previews and camera data are removed, so that they can neither break decoding nor fill the
memory. The colour profile and the orientation are read here and returned separately.
"""

import io
import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import Any, BinaryIO

from PIL import features

MAX_PROFILE_BYTES = 16 * 2**20  # of a colour profile; those of printing presses have up to 4 MB
MAX_INFO_BYTES = 2**20  # of EXIF or XMP in a PNG

_Pieces = list[bytes | tuple[int, int]]  # replacement bytes, or (start, end) in the original file


class _Joined(io.RawIOBase):
    """A file made of pieces of another, without a copy."""

    def __init__(self, file: BinaryIO, pieces: _Pieces) -> None:
        self.file, self.pieces, self.position = file, pieces, 0
        lengths = (len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces)
        self.ends = list(accumulate(lengths))

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position."""
        position = offset + (0, self.position, self.ends[-1])[whence]
        if position < 0:
            raise ValueError(f"negative position {position}")
        self.position = position
        return position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, up to the end of a piece."""
        index = bisect_right(self.ends, self.position)
        if index == len(self.ends):
            return 0
        piece, start = self.pieces[index], self.position - (self.ends[index - 1] if index else 0)
        if isinstance(piece, bytes):
            found = piece[start : start + len(buffer)]
        else:
            self.file.seek(piece[0] + start)
            found = self.file.read(min(len(buffer), piece[1] - piece[0] - start))
        buffer[: len(found)] = found
        self.position += len(found)
        return len(found)


def strip_metadata(file: BinaryIO, beginning: bytes, size: int) -> tuple[BinaryIO, dict[str, Any]]:
    """Keep what pixels need. Also return profile and orientation, by Pillow's names."""
    pieces, info = _Pieces(), dict[str, Any]()
    for pattern, strip in _STRIPPERS:
        if re.match(pattern, beginning, re.DOTALL):
            pieces, info = strip(file, size)
    if not pieces or pieces == [(0, size)]:
        return file, info
    return io.BufferedReader(_Joined(file, pieces)), info


def _keep(pieces: _Pieces, start: int, end: int) -> None:
    """Add a range of the file, joined to the last one if adjacent."""
    last = pieces[-1]
    if isinstance(last, tuple) and last[1] == start:
        pieces[-1] = last[0], end
    else:
        pieces.append((start, end))


def _strip_png(file: BinaryIO, size: int) -> tuple[_Pieces, dict[str, Any]]:
    """Remove ancillary chunks except transparency. Ignore info that is damaged or too large."""
    pieces, info, start = _Pieces([(0, 8)]), dict[str, Any](), 8
    while start < size:
        file.seek(start)
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        end = start + 12 + length
        if not (len(kind) == 4 and kind.isalpha() and kind[0] & 32) or kind == b"tRNS":
            _keep(pieces, start, min(end, size))  # decoders need it: if it is damaged, so is the image
        elif kind in _PNG_INFO and length <= MAX_PROFILE_BYTES:
            data, check = file.read(length), file.read(4)
            if zlib.crc32(kind + data).to_bytes(4, "big") == check:
                info = _PNG_INFO[kind](data) | info
        if kind == b"IEND":
            break
        start = end
    return pieces, info


def _png_profile(data: bytes) -> dict[str, Any]:
    profile = _inflate(data.partition(b"\0")[2][1:], MAX_PROFILE_BYTES)
    return {} if profile is None else {"icc_profile": profile}


def _png_text(data: bytes) -> dict[str, Any]:
    """Read XMP, and EXIF in text as older ImageMagick wrote it, for the orientation."""
    key, _, rest = data.partition(b"\0")
    if key == b"XML:com.adobe.xmp":
        parts = rest[2:].split(b"\0", 2)
        text = _inflate(parts[-1], MAX_INFO_BYTES) if rest[:1] == b"\1" else parts[-1]
        return {"xmp": text} if text is not None and len(text) <= MAX_INFO_BYTES else {}
    if key == b"Raw profile type exif":
        text = _inflate(rest[1:], MAX_INFO_BYTES) if rest[:1] == b"\0" else rest
        if text is not None and len(text) <= MAX_INFO_BYTES:
            return {key.decode(): text.decode("latin-1")}
    return {}


_PNG_INFO: dict[bytes, Callable[[bytes], dict[str, Any]]] = {
    b"iCCP": _png_profile,
    b"eXIf": lambda data: {"exif": b"Exif\0\0" + data} if len(data) <= MAX_INFO_BYTES else {},
    b"iTXt": _png_text,
    b"zTXt": _png_text,
    b"tEXt": _png_text,
}


def _inflate(packed: bytes, most: int) -> bytes | None:
    """Decompress zlib data; None if it is damaged or longer than `most` bytes."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(packed, most)
    except zlib.error:
        return None
    return found if stream.eof else None


def _strip_jpeg(file: BinaryIO, size: int) -> tuple[_Pieces, dict[str, Any]]:
    """Remove comments and application segments except JFIF and Adobe (the colour space)."""
    pieces, info, start = _Pieces([(0, 2)]), dict[str, Any](), 2
    profile: dict[int, bytes] = {}
    parts = 0
    while True:
        file.seek(start)
        head = file.read(4)
        if len(head) == 4 and not (head[0] == 0xFF and 0 < head[1] < 0xFF):
            file.seek(start)  # as decoders do, skip to the next marker
            if found := re.search(rb"\xff[\x01-\xfe]", file.read(2**16)):
                start += found.start()
                continue
        marker, length = head[1] if len(head) == 4 else 0, int.from_bytes(head[2:], "big")
        end = start + 2 + length
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA or length < 2 or end > size:  # pixels begin, or damage
            _keep(pieces, start, size)
            break
        if marker == 0xFE or 0xE0 <= marker <= 0xEF:
            data = file.read(length - 2)
            is_jfif = marker == 0xE0 and data[:5] == b"JFIF\0" and length >= 16
            is_adobe = marker == 0xEE and data[:5] == b"Adobe" and length >= 14
            if is_jfif or is_adobe:
                _keep(pieces, start, end)
            elif marker == 0xE1 and data[:6] == b"Exif\0\0":
                info["exif"] = info["exif"] + data[6:] if "exif" in info else data
            elif marker == 0xE1 and data.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                info["xmp"] = data.partition(b"\0")[2]
            elif marker == 0xE2 and data.startswith(b"ICC_PROFILE\0") and len(data) >= 14:
                profile[data[12]], parts = data[14:], data[13]
        else:
            _keep(pieces, start, end)
        start = end
    if profile and sorted(profile) == list(range(1, parts + 1)):
        info["icc_profile"] = b"".join(profile[part] for part in sorted(profile))
    return pieces, info


_TIFF_UNUSED = frozenset(  # text, units, sub-images and the like
    (269, 270, 271, 272, 282, 283, 285, 290, 291, 296, 297, 305, 306, 315, 316, 330, 333, 337)
)
_TIFF_XMP, _TIFF_PROFILE = 700, 34675


def _strip_tiff(file: BinaryIO, size: int) -> tuple[_Pieces, dict[str, Any]]:
    """Keep only the first directory, with the tags for pixels, profile and orientation."""
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:1] == b"I" else ">"
    is_big = 43 in head[2:4]  # BigTIFF
    start = struct.unpack(order + ("8xQ" if is_big else "4xL8x"), head)[0] if len(head) == 16 else size
    number, entry = ("Q", "HHQ8s") if is_big else ("H", "HHL4s")
    width = struct.calcsize("<" + entry)
    file.seek(min(start, size))
    found = file.read(struct.calcsize("<" + number))
    count = struct.unpack(order + number, found)[0] if len(found) == struct.calcsize("<" + number) else 2**16
    entries = file.read(count * width) if count < 2**16 else b""
    if not entries or len(entries) < count * width:
        return [], {}  # damaged: the decoder says how
    kept = []
    for offset in range(0, len(entries), width):
        tag, kind = struct.unpack_from(order + "HH", entries, offset)
        is_bytes = kind in (1, 7)
        is_needed = tag < 2**15 and tag not in _TIFF_UNUSED and (tag != _TIFF_XMP or is_bytes)
        if is_needed or (tag == _TIFF_PROFILE and is_bytes):
            kept.append(entries[offset : offset + width])
    if len(kept) == count:
        return [], {}
    directory = struct.pack(order + number, len(kept)) + b"".join(kept) + bytes(8 if is_big else 4)
    end = start + len(directory)
    return [(0, start), directory, (end, max(size, end))], {}


def _strip_avif(file: BinaryIO, size: int) -> tuple[_Pieces, dict[str, Any]]:
    """Hide EXIF: the decoder fails on a broken one, and orientation is stored elsewhere."""
    file.seek(0)
    pieces, start = _Pieces(), 0
    contents = file.read(2**20)  # the table of contents is first
    for match in re.finditer(rb"infe.{8}(?=Exif)", contents, re.DOTALL):
        pieces += [(start, match.end()), b"free"]
        start = match.end() + 4
    return [*pieces, (start, size)], {}


_STRIPPERS: tuple[tuple[bytes, Callable[[BinaryIO, int], tuple[_Pieces, dict[str, Any]]]], ...] = (
    (rb"\x89PNG\r\n\x1a\n", _strip_png),
    (rb"\xff\xd8\xff", _strip_jpeg),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", _strip_tiff),
    (rb"....ftyp", _strip_avif),
)


# --- files that no decoder accepts ------------------------------------------------------------

_KINDS = (
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"GIF8[79]a", "GIF"),
    (rb"BM", "BMP"),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF"),
    (rb"RIFF....WEBP", "WebP"),
    (rb"....ftypavi[fs]", "AVIF"),
    (rb"P[1-6]\s", "PPM"),
)
_OTHERS = (
    (rb"....ftyp(?:hei|hev|mif1.{0,40}hei)", "a HEIC picture"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (rb"\0\0\0\x0cJXL |\xff\x0a", "a JPEG XL picture"),
    (rb"8BPS", "a Photoshop file"),
    (rb"gimp xcf", "a GIMP file"),
    (rb"v/1\x01", "an OpenEXR picture"),
    (rb"#\?RADIANCE", "a Radiance picture"),
    (rb"DDS ", "a DDS texture"),
    (rb"\0\0\x01\0", "an icon"),
    (rb"%PDF", "a PDF"),
    (rb"%!PS", "a PostScript file"),
)


def why_undecodable(beginning: bytes) -> str:
    """Why no decoder accepts a file, from its first bytes."""
    for pattern, name in _KINDS:
        if re.match(pattern, beginning, re.DOTALL):
            if name in ("AVIF", "WebP") and not features.check(name.lower()):
                todo = "install Pillow's wheel, or convert it to PNG"
                return f"{name} pictures are not read by this build of Pillow: {todo}"
            return f"damaged, or a kind of {name} that is not read: convert it to PNG"
    for pattern, name in _OTHERS:
        if re.match(pattern, beginning, re.DOTALL):
            return f"{name}, which is not read: convert it to PNG or JPEG"
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<"):
        if b"<svg" in text:
            return "an SVG drawing, which is not read: convert it to PNG"
        if re.search(rb"<!doctype html|<html|<head|<body", text):
            return "an HTML page, not an image"
    return "not an image of a known kind"
