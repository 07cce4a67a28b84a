"""What of an image file the decoders get to see, and what a file is that none of them takes.

What lies beside the pixels (text, previews, records of cameras) is not handed on at all: it cannot spoil an image, nor fill the
memory. The colour profile and what tells the orientation are read here, and given beside it.
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

MAX_PROFILE_BYTES = 16 * 2**20  # of a colour profile; those of printing presses have up to four million
MAX_REMARK_BYTES = 2**20  # of an orientation's record in a PNG

_Pieces = list[bytes | tuple[int, int]]  # of a file: bytes in place of its own, or its own from one position to another


class _Joined(io.RawIOBase):
    """Pieces of a file as a file: no copy of them is made."""

    def __init__(self, file: BinaryIO, pieces: _Pieces) -> None:
        self.file, self.pieces, self.at = file, pieces, 0
        self.ends = list(accumulate(len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces))

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position."""
        at = offset + (0, self.at, self.ends[-1])[whence]
        if at < 0:
            raise ValueError(f"negative position {at}")
        self.at = at
        return at

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, up to the end of a piece."""
        index = bisect_right(self.ends, self.at)
        if index == len(self.ends):
            return 0
        piece, start = self.pieces[index], self.at - (self.ends[index - 1] if index else 0)
        if isinstance(piece, bytes):
            found = piece[start : start + len(buffer)]
        else:
            self.file.seek(piece[0] + start)
            found = self.file.read(min(len(buffer), piece[1] - piece[0] - start))
        buffer[: len(found)] = found
        self.at += len(found)
        return len(found)


def bare(file: BinaryIO, beginning: bytes, size: int) -> tuple[BinaryIO, dict[str, Any]]:
    """The file without what its pixels do not need, and of that the profile and the orientation, by Pillow's names for them."""
    pieces, remarks = _Pieces(), dict[str, Any]()
    for pattern, strip in _STRIP:
        if re.match(pattern, beginning, re.DOTALL):
            pieces, remarks = strip(file, size)
    if not pieces or pieces == [(0, size)]:
        return file, remarks
    return io.BufferedReader(_Joined(file, pieces)), remarks


def _keep(pieces: _Pieces, start: int, end: int) -> None:
    """Add a part of the file; what lies side by side is one piece."""
    last = pieces[-1]
    if isinstance(last, tuple) and last[1] == start:
        pieces[-1] = last[0], end
    else:
        pieces.append((start, end))


def _bare_png(file: BinaryIO, size: int) -> tuple[_Pieces, dict[str, Any]]:
    """Without any chunk that may be left out but the transparency. One that is damaged or too large is as if not there."""
    pieces, remarks, at = _Pieces([(0, 8)]), dict[str, Any](), 8
    while at < size:
        file.seek(at)
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        end = at + 12 + length
        if not (len(kind) == 4 and kind.isalpha() and kind[0] & 32) or kind == b"tRNS":
            _keep(pieces, at, min(end, size))  # a decoder may not pass over it; if it is damaged, the image is
        elif kind in _PNG_REMARKS and length <= MAX_PROFILE_BYTES:
            data, check = file.read(length), file.read(4)
            if zlib.crc32(kind + data).to_bytes(4, "big") == check:
                remarks = _PNG_REMARKS[kind](data) | remarks
        if kind == b"IEND":
            break
        at = end
    return pieces, remarks


def _png_profile(data: bytes) -> dict[str, Any]:
    profile = _unfolded(data.partition(b"\0")[2][1:], MAX_PROFILE_BYTES)
    return {} if profile is None else {"icc_profile": profile}


def _png_text(data: bytes) -> dict[str, Any]:
    """The two texts that may tell an orientation: XMP, and EXIF as ImageMagick wrote it before there was a chunk for it."""
    key, _, rest = data.partition(b"\0")
    if key == b"XML:com.adobe.xmp":
        parts = rest[2:].split(b"\0", 2)
        text = _unfolded(parts[-1], MAX_REMARK_BYTES) if rest[:1] == b"\1" else parts[-1]
        return {"xmp": text} if text is not None and len(text) <= MAX_REMARK_BYTES else {}
    if key == b"Raw profile type exif":
        text = _unfolded(rest[1:], MAX_REMARK_BYTES) if rest[:1] == b"\0" else rest
        return {key.decode(): text.decode("latin-1")} if text is not None and len(text) <= MAX_REMARK_BYTES else {}
    return {}


_PNG_REMARKS: dict[bytes, Callable[[bytes], dict[str, Any]]] = {
    b"iCCP": _png_profile,
    b"eXIf": lambda data: {"exif": b"Exif\0\0" + data} if len(data) <= MAX_REMARK_BYTES else {},
    b"iTXt": _png_text,
    b"zTXt": _png_text,
    b"tEXt": _png_text,
}


def _unfolded(packed: bytes, most: int) -> bytes | None:
    """What was packed by zlib; None if that is damaged, or more than `most` bytes."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(packed, most)
    except zlib.error:
        return None
    return found if stream.eof else None


def _bare_jpeg(file: BinaryIO, size: int) -> tuple[_Pieces, dict[str, Any]]:
    """Without comments and applications' segments but the two that say how colours are stored."""
    pieces, remarks, at = _Pieces([(0, 2)]), dict[str, Any](), 2
    profile: dict[int, bytes] = {}
    parts = 0
    while True:
        file.seek(at)
        head = file.read(4)
        if len(head) == 4 and not (head[0] == 0xFF and 0 < head[1] < 0xFF):  # decoders go on to the next marker
            file.seek(at)
            if found := re.search(rb"\xff[\x01-\xfe]", file.read(2**16)):
                at += found.start()
                continue
        marker, length = head[1] if len(head) == 4 else 0, int.from_bytes(head[2:], "big")
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA or length < 2 or at + 2 + length > size:  # pixels begin, or it is damaged
            _keep(pieces, at, size)
            break
        if marker == 0xFE or 0xE0 <= marker <= 0xEF:
            data = file.read(length - 2)
            if (marker == 0xE0 and data[:5] == b"JFIF\0" and length >= 16) or (
                marker == 0xEE and data[:5] == b"Adobe" and length >= 14
            ):
                _keep(pieces, at, at + 2 + length)
            elif marker == 0xE1 and data[:6] == b"Exif\0\0":
                remarks["exif"] = remarks["exif"] + data[6:] if "exif" in remarks else data
            elif marker == 0xE1 and data.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                remarks["xmp"] = data.partition(b"\0")[2]
            elif marker == 0xE2 and data.startswith(b"ICC_PROFILE\0") and len(data) >= 14:
                profile[data[12]], parts = data[14:], data[13]
        else:
            _keep(pieces, at, at + 2 + length)
        at += 2 + length
    if profile and sorted(profile) == list(range(1, parts + 1)):
        remarks["icc_profile"] = b"".join(profile[part] for part in sorted(profile))
    return pieces, remarks


_TIFF_REMARKS = frozenset((269, 270, 271, 272, 282, 283, 285, 290, 291, 296, 297, 305, 306, 315, 316, 330, 333, 337))
_TIFF_XMP, _TIFF_PROFILE = 700, 34675


def _bare_tiff(file: BinaryIO, size: int) -> tuple[_Pieces, dict[str, Any]]:
    """With only those tags in its first directory that pixels, profile and orientation need, and without further ones."""
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:1] == b"I" else ">"
    large = 43 in head[2:4]  # BigTIFF
    at = struct.unpack(order + ("8xQ" if large else "4xL8x"), head)[0] if len(head) == 16 else size
    number, entry = ("Q", "HHQ8s") if large else ("H", "HHL4s")
    width = struct.calcsize("<" + entry)
    file.seek(min(at, size))
    found = file.read(struct.calcsize("<" + number))
    count = struct.unpack(order + number, found)[0] if len(found) == struct.calcsize("<" + number) else 2**16
    entries = file.read(count * width) if count < 2**16 else b""
    if not entries or len(entries) < count * width:
        return [], {}  # damaged: let the decoder say how
    kept = []
    for start in range(0, len(entries), width):
        tag, kind = struct.unpack_from(order + "HH", entries, start)
        text = kind in (1, 7)  # bytes
        if (tag == _TIFF_PROFILE and text) or (tag < 2**15 and tag not in _TIFF_REMARKS and (tag != _TIFF_XMP or text)):
            kept.append(entries[start : start + width])
    if len(kept) == count:
        return [], {}
    directory = struct.pack(order + number, len(kept)) + b"".join(kept) + bytes(8 if large else 4)
    return [(0, at), directory, (at + len(directory), max(size, at + len(directory)))], {}


def _bare_avif(file: BinaryIO, size: int) -> tuple[_Pieces, dict[str, Any]]:
    """With its EXIF under another name: a broken one is fatal to the decoder, and the orientation is told elsewhere."""
    file.seek(0)
    pieces, at = _Pieces(), 0
    for match in re.finditer(rb"infe.{8}(?=Exif)", file.read(2**20), re.DOTALL):  # the table of contents, which comes first
        pieces += [(at, match.end()), b"free"]
        at = match.end() + 4
    return [*pieces, (at, size)], {}


_STRIP: tuple[tuple[bytes, Callable[[BinaryIO, int], tuple[_Pieces, dict[str, Any]]]], ...] = (
    (rb"\x89PNG\r\n\x1a\n", _bare_png),
    (rb"\xff\xd8\xff", _bare_jpeg),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", _bare_tiff),
    (rb"....ftyp", _bare_avif),
)


# --- what a file is, where it is no image that is read ----------------------------------------------------------------

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


def what_it_is(beginning: bytes) -> str:
    """The reason for a file that no decoder takes, from its first bytes."""
    for pattern, name in _KINDS:
        if re.match(pattern, beginning, re.DOTALL):
            if name in ("AVIF", "WebP") and not features.check(name.lower()):
                return f"{name} pictures are not read by this build of Pillow: install Pillow's wheel, or convert it to PNG"
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
