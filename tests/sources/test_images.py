"""Pictures: brightness by format, transparency, colour profiles, metadata, fitting."""

import itertools
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import PIL
import pytest
from helpers import encoded
from helpers.folders import picture
from PIL import Image, ImageCms, TiffImagePlugin, features

from sana_cli import sources as data
from sana_cli.errors import SanaError
from sana_cli.sources import colour, containers, images
from sana_cli.sources.entry import Encoded

ORDERS: tuple[Literal["<", ">"], ...] = ("<", ">")


# --- files, written by hand so that Pillow's reading is not compared with Pillow's writing ------------------


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content) if crc is None else crc)
    )


def png(
    values: Any, depth: int = 8, colour: int = 0, *, before: Iterable[bytes] = (), after: Iterable[bytes] = ()
) -> bytes:
    """A PNG of (H, W) or (H, W, channels) values.

    colour: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha.
    """
    values = np.asarray(values)
    height, width = values.shape[:2]
    rows = values.reshape(height, -1)
    bits = ((rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1).reshape(height, -1).astype(np.uint8)
    packed = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = [
        chunk(b"IHDR", header),
        *before,
        chunk(b"IDAT", zlib.compress(packed)),
        *after,
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(
    values: np.ndarray, *, tags: Iterable[tuple[int, int, int, bytes]] = (), order: Literal["<", ">"] = "<",
    bits: int | None = None,
    photo: int | None = None, packed: bool = False, planar: bool = False, extra: int | None = None,
    raw: bytes | None = None,
) -> bytes:  # fmt: skip
    """A TIFF of (H, W) or (H, W, channels) values; `tags` are (tag, type, count, value)."""
    deep = values.astype(values.dtype.newbyteorder(order))
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    planes = (
        [deep[..., i].tobytes() for i in range(channels)]
        if planar
        else [deep.tobytes() if raw is None else raw]
    )
    planes = [zlib.compress(plane) for plane in planes] if packed else planes

    def shorts(*numbers: int) -> bytes:
        return struct.pack(f"{order}{len(numbers)}H", *numbers)

    def longs(*numbers: int) -> bytes:
        return struct.pack(f"{order}{len(numbers)}L", *numbers)

    photo = (2 if channels > 2 else 1) if photo is None else photo
    bits = values.dtype.itemsize * 8 if bits is None else bits
    found: dict[int, tuple[int, int, bytes]] = {
        256: (4, 1, longs(width)), 257: (4, 1, longs(height)), 258: (3, channels, shorts(*[bits] * channels)),
        259: (3, 1, shorts(8 if packed else 1)), 262: (3, 1, shorts(photo)), 277: (3, 1, shorts(channels)),
        278: (4, 1, longs(height)), 284: (3, 1, shorts(2 if planar else 1)),
        339: (3, channels, shorts(*[{"u": 1, "i": 2, "f": 3}[values.dtype.kind]] * channels)),
    }  # fmt: skip
    if extra is not None:
        found[338] = 3, 1, shorts(extra)
    found |= {tag: (kind, count, value) for tag, kind, count, value in tags}
    at, blob, offsets = 8 + 2 + 12 * (len(found) + 2) + 4, b"", []
    for plane in planes:
        offsets.append(at + len(blob))
        blob += plane + bytes(len(plane) % 2)
    found[273], found[279] = (4, len(planes), longs(*offsets)), (4, len(planes), longs(*map(len, planes)))
    directory = shorts(len(found))
    for tag, (kind, count, value) in sorted(found.items()):
        directory += shorts(tag, kind) + longs(count)
        if len(value) > 4:
            directory, blob, value = directory, blob + value + bytes(len(value) % 2), longs(at + len(blob))
        directory += value.ljust(4, b"\0")
    return (b"II*\0" if order == "<" else b"MM\0*") + longs(8) + directory + longs(0) + blob


def pixels(raw: bytes | Path) -> list[Any]:
    image = data.decode_image(raw)
    assert image.mode in ("L", "RGB")
    return np.asarray(image).tolist()


def refused(raw: bytes) -> str:
    with pytest.raises(data.BadImage) as caught:
        data.decode_image(raw)
    assert len(str(caught.value)) < 150
    return str(caught.value)


# --- brightness depends on the format -----------------------------------------------------------------------


DEEP = np.array([[0, 200, 25_700, 65_535]], dtype=np.uint16)
DARK = np.array([[0, 100, 200, 180]], dtype=np.uint16)


def pgm(values: np.ndarray, most: int, plain: bool) -> bytes:
    head = f"P{2 if plain else 5}\n# made here\n{values.shape[1]} {values.shape[0]}\n{most}\n".encode()
    return head + (
        " ".join(map(str, values.ravel())).encode()
        if plain
        else values.astype(">u2" if most > 255 else "u1").tobytes()
    )


@pytest.mark.parametrize(
    "write",
    [
        lambda values: png(values, 16),
        lambda values: tiff(values),
        lambda values: tiff(values, order=">"),
        lambda values: tiff(values, packed=True),
        lambda values: tiff(values, order=">", packed=True),
        lambda values: tiff(65535 - values, photo=0),
        lambda values: tiff(65535 - values, photo=0, packed=True),
        lambda values: pgm(values, 65535, plain=False),
        lambda values: pgm(values, 65535, plain=True),
        lambda values: encoded(Image.fromarray(values)),
        lambda values: encoded(Image.fromarray(values), "TIFF", compression="tiff_lzw"),
    ],
    ids=["png", "tiff", "big end", "packed", "big end, packed", "white is 0", "white is 0, packed", "pgm",
    "plain pgm", "own png", "own tiff"],
)  # fmt: skip
def test_white_of_16_bits_is_65535_also_where_the_picture_is_dark(write: Any) -> None:
    assert pixels(write(DEEP)) == [[0, 1, 100, 255]]
    assert pixels(write(DARK)) == [[0, 0, 1, 1]]
    assert pixels(write(np.zeros((2, 2), np.uint16))) == [[0, 0], [0, 0]]
    found = refused(write(DARK // 4))
    assert found in (
        "16-bit integers up to 50, where white is 65535: convert it to 8 bits",
        "16-bit integers from 65485 to 65535, where white is 0: convert it to 8 bits",
    )


def test_values_that_fit_no_white_are_refused_by_what_they_are() -> None:
    def grey(kind: str, *values: float, **more: Any) -> bytes:
        return tiff(np.array([values], dtype=kind), **more)

    for more in ({}, {"packed": True}, {"order": ">", "packed": True}):
        assert pixels(grey("f4", 0, 0.5, 1, 1.01, -0.01, **more)) == [[0, 128, 255, 255, 0]]
        assert pixels(grey("i4", 0, 2**30, 2**31 - 1, **more)) == [[0, 128, 255]]
        assert pixels(grey("i2", 0, 2**14, 2**15 - 1, **more)) == [[0, 128, 255]]
    assert pixels(grey("f4", 0, 0.5, 1, order=">")) == [[0, 128, 255]]
    assert pixels(grey("f4", 0, 0.5, 1, photo=0)) == [[255, 128, 0]]
    assert pixels(grey("i4", 0, 2**30, 2**31 - 1, order=">")) == [[0, 128, 255]]
    assert pixels(grey("u4", 0, 2**31, 2**32 - 1)) == [[0, 128, 255]]
    assert pixels(grey("u4", 0, 2**31, 2**32 - 1, packed=True)) == [[0, 128, 255]]
    assert pixels(grey("i1", 0, 64, 127)) == [[0, 129, 255]]
    assert pixels(grey("u1", 0, 64, 255)) == [[0, 64, 255]]
    twelve = np.array([[0x80, 0x0F, 0xFF]], dtype=np.uint8).tobytes()  # 0x800 and 0xFFF
    assert pixels(tiff(np.zeros((1, 2), np.uint16), bits=12, raw=twelve)) == [[128, 255]]

    assert (
        refused(grey("u4", 0, 60000))
        == "32-bit integers up to 60000, where white is 4294967295: convert it to 16 bits"
    )
    assert "up to 16777215, where white is 4294967295" in refused(grey("u4", 5, 2**24 - 1, 70, 3))
    assert (
        refused(grey("i4", 0, 200))
        == "signed 32-bit integers up to 200, where white is 2147483647: convert it to 8 bits"
    )
    assert "signed 32-bit integers from -1000 to 3000, where black is 0" in refused(grey("i4", -1000, 3000))
    assert "signed 16-bit integers from -1000 to 3000, where black is 0" in refused(grey("i2", -1000, 3000))
    assert "floating-point values from -0.01" in refused(grey("f4", -0.01, -0.01, 0.03))
    assert "signed 16-bit integers from -30000 to 3000, where black is 0 and white is 32767" in refused(
        grey("i2", -30000, 3000)
    )
    assert "signed 8-bit integers from -100 to 100" in refused(grey("i1", -100, 100))
    assert "floating-point values from 0 to 255, where black is 0 and white is 1" in refused(
        grey("f4", 0, 255, 128)
    )
    sparse = np.zeros((50, 50), np.float32)
    sparse[0, 0] = 255
    assert "from 0 to 255" in refused(tiff(sparse)), "most values are in range, but the file holds 0 to 255"
    assert "from -1 to 1" in refused(grey("f4", -1, 0.2, 0.3, 1))
    assert "up to 0.001, where white is 1: scale them to 0 to 1" in refused(grey("f4", 0, 0.001))
    for value in (np.nan, np.inf, -np.inf):
        assert "some of them not finite" in refused(grey("f4", 0.5, value))
    bright = np.full((50, 50), 0.5, np.float32)
    bright[0] = 7.5  # 2 % of the values: too many for highlights
    assert "to 7.5" in refused(tiff(bright))
    bright[0, 5:] = 0.5
    assert pixels(tiff(bright))[0][:6] == [255] * 5 + [128]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("most", [1, 15, 255, 1000, 65535])
def test_netpbm_white_is_what_its_header_says(most: int, plain: bool) -> None:
    values = np.array([[0, most // 2, most]])
    assert pixels(pgm(values, most, plain)) == [[0, round(most // 2 / most * 255), 255]]
    colour = np.stack([values, values * 0, values], axis=-1)
    head = f"P{3 if plain else 6} 3 1 {most}\n".encode()
    body = (
        " ".join(map(str, colour.ravel())).encode()
        if plain
        else colour.astype(">u2" if most > 255 else "u1").tobytes()
    )
    assert pixels(head + body)[0][2] == [255, 0, 255]


def test_every_depth_has_its_white() -> None:
    for depth in (1, 2, 4, 8):
        most = 2**depth - 1
        assert pixels(png([[0, most // 2, most]], depth)) == [[0, most // 2 * 255 // most, 255]]
    sixteen = bytes(range(48))
    assert pixels(png([list(range(16))], 4, 3, before=[chunk(b"PLTE", sixteen)])) == [
        np.arange(48).reshape(16, 3).tolist()
    ]
    assert pixels(b"P4 8 1\n\xa5") == [[0, 255, 0, 255, 255, 0, 255, 0]]
    assert pixels(encoded(Image.new("1", (1, 1), 1), "BMP")) == [[255]]
    assert pixels(png([[[10, 255], [10, 0]]], 8, 4)) == [[[10] * 3, [255] * 3]]
    high = np.array([[[0x1234, 0xFFFF, 0x8000]]])
    assert pixels(png(high, 16, 2)) == [[[0x12, 255, 128]]]
    for order, packed, planar in itertools.product(ORDERS, (False, True), (False, True)):
        if not (packed and planar):
            wide = np.array([[[0x1234, 0xFFFF, 0x8000], [0, 0xFF, 0x4000]]], dtype=np.uint16)
            assert pixels(tiff(wide, order=order, packed=packed, planar=planar)) == [
                [[0x12, 255, 128], [0, 0, 64]]
            ]


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colours_that_are_all_under_256_are_refused(channels: int) -> None:
    faint = np.zeros((1, 2, channels), dtype=np.uint16)
    faint[0, :, 3:] = 65535
    writers: list[Callable[[np.ndarray], bytes]] = [lambda v: png(v, 16, 2 if channels == 3 else 6)]
    for order, packed in itertools.product(ORDERS, (False, True)):
        writers.append(partial(tiff, order=order, packed=packed, extra=2 if channels == 4 else None))
    if channels == 3:
        writers.append(lambda v: b"P6 2 1 65535\n" + v.astype(">u2").tobytes())
        writers.append(lambda v: b"P3 2 1 65535\n" + " ".join(map(str, v.ravel())).encode())
        writers.append(lambda v: png(v[..., :2] * [1, 0] + [0, 65535], 16, 4))
    for write in writers:
        assert pixels(write(faint)) == [[[0, 0, 0]] * 2], "black is black"
        some = faint.copy()
        some[0, 1, 0] = 100
        assert (
            refused(write(some))
            == "16-bit colours up to 255 at most, where white is 65535: convert it to 8 bits"
        )


def test_black_ink_is_not_taken_for_faint_colours() -> None:
    plates = np.array([[[0, 0, 0, 65535], [9, 0, 0, 65535]]], dtype=np.uint16)
    assert pixels(tiff(plates, photo=5)) == [[[0, 0, 0]] * 2]
    plates[..., 3] = 0
    assert "16-bit colours" in refused(tiff(plates, photo=5))


def test_the_first_frame_of_several() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    for kind in ("GIF", "TIFF", "PNG", "WEBP", "MPO", "AVIF"):
        if kind == "AVIF" and not features.check("avif"):
            continue
        settings: dict[str, dict[str, Any]] = {
            "WEBP": {"lossless": True},
            "MPO": {"quality": 100},
            "AVIF": {"quality": 100},
        }
        more = settings.get(kind, {})
        found = np.array(pixels(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **more)))
        assert abs(found - [250, 0, 0]).max() < 8, kind


# --- transparency -------------------------------------------------------------------------------------------


def trns(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def test_one_transparent_grey_or_colour_is_compared_at_all_its_bits() -> None:
    values = [[0x8000, 0x8001, 0x80FF, 0]]
    white = [255] * 3
    assert pixels(png(values, 16, before=[trns(0x8001)])) == [[[128] * 3, white, [128] * 3, [0] * 3]]
    assert pixels(png(values, 16, before=[trns(0x80FE)])) == [[[128] * 3] * 3 + [[0] * 3]]
    for depth in (1, 2, 4, 8):
        most = 2**depth - 1
        for key in {0, 1, most}:
            found = pixels(png([list(range(most + 1))], depth, before=[trns(key)]))[0]
            assert found == [white if v == key else [v * 255 // most] * 3 for v in range(most + 1)], (
                depth,
                key,
            )
    colours = [[[0x8000, 0x1001, 0x2002], [0x8000, 0x1001, 0x2003]]]
    assert pixels(png(colours, 16, 2, before=[trns(0x8000, 0x1001, 0x2003)])) == [[[0x80, 0x10, 0x20], white]]
    assert pixels(png([[[1, 2, 3], [1, 2, 4]]], 8, 2, before=[trns(1, 2, 3)])) == [[white, [1, 2, 4]]]
    dark = [[[1, 2, 3], [1, 2, 4]]]  # a transparent colour does not change why it is refused
    assert refused(png(dark, 16, 2, before=[trns(1, 2, 3)])) == refused(png(dark, 16, 2))


def test_alpha_of_any_depth_lies_over_white() -> None:
    assert pixels(png([[[0x1234, 0xFFFF], [0x1234, 0], [0, 0x8000]]], 16, 4)) == [
        [[0x12] * 3, [255] * 3, [127] * 3]
    ]
    assert pixels(png([[[0, 0, 0xFF00, 0xFFFF], [0, 0, 0, 0]]], 16, 6)) == [[[0, 0, 255], [255] * 3]]
    palette = chunk(b"PLTE", bytes([200, 0, 0, 0, 200, 0, 0, 0, 200]))
    found = pixels(png([[0, 1, 2]], 2, 3, before=[palette, chunk(b"tRNS", bytes([255, 128, 0]))]))[0]
    assert found[0] == [200, 0, 0]
    assert np.allclose(found[1], [127, 227, 127], atol=1)
    assert found[2] == [255] * 3
    long = chunk(b"tRNS", bytes([0, 255, 0]) + bytes([255]) * 300)  # longer than any palette
    assert pixels(png([[0, 1]], 2, 3, before=[palette, long])) == [[[255] * 3, [0, 200, 0]]]
    for order, packed in itertools.product(ORDERS, (False, True)):
        half = np.array([[[0, 0, 0xFF00, 0xFFFF], [0, 0, 0, 0]]], dtype=np.uint16)
        assert pixels(tiff(half, order=order, packed=packed, extra=2)) == [[[0, 0, 255], [255] * 3]]
    for extra in (1, 2):  # colours premultiplied by alpha, and others
        grey = tiff(np.array([[[50, 255], [0, 0]]], np.uint8), extra=extra)
        if extra == 2 or int(PIL.__version__.partition(".")[0]) >= 13:
            assert pixels(grey) == [[[50] * 3, [255] * 3]]
        else:
            assert "kind of TIFF that is not read" in refused(grey)
        assert pixels(tiff(np.array([[[50, 0, 0, 255], [0, 0, 0, 0]]], np.uint8), extra=extra)) == [
            [[50, 0, 0], [255] * 3]
        ]
    assert "kind of TIFF that is not read" in refused(tiff(np.zeros((1, 2, 2), np.uint16), extra=2))
    assert pixels(encoded(Image.new("LA", (1, 1), (9, 0)), "WEBP", lossless=True)) == [[[255] * 3]]


# --- colour profiles ----------------------------------------------------------------------------------------


ADOBE = (
    (0.60974, 0.31111, 0.01947),
    (0.20528, 0.62567, 0.06087),
    (0.14919, 0.06322, 0.74457),
)  # r g b as XYZ, by D50
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """The bytes of an ICC profile, version 2, with these tags."""
    text = b"none\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0" + text,
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249), **tags,
    }  # fmt: skip
    at, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", at + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"none", 0x02400000, kind, space, connection)
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + body


def gamma(power: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(power * 256)) + b"\0\0"


def table(levels: np.ndarray) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">I", len(levels)) + (levels * 65535).round().astype(">u2").tobytes()


def rgb_profile(
    primaries: tuple[tuple[float, ...], ...], curve: bytes, more: Mapping[bytes, bytes] = MappingProxyType({})
) -> bytes:
    tags = {
        name + b"XYZ": b"XYZ \0\0\0\0" + fixed(*primary)
        for name, primary in zip((b"r", b"g", b"b"), primaries, strict=True)
    }
    return icc(b"RGB ", {**tags, **{name + b"TRC": curve for name in (b"r", b"g", b"b")}, **more})


def linear_of_srgb(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def srgb_of_linear(values: np.ndarray) -> np.ndarray:
    values = values.clip(0, 1)
    return 255 * np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def converted(colours: np.ndarray, primaries: tuple[tuple[float, ...], ...], power: float) -> np.ndarray:
    """The conversion by definition: linear light, XYZ, linear sRGB light, sRGB's curve."""
    light = (colours / 255.0) ** power @ np.array(primaries) @ np.linalg.inv(np.array(SRGB))
    return srgb_of_linear(light)


COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
ADOBE_PROFILE, P3_PROFILE = rgb_profile(ADOBE, gamma(2.19921875)), rgb_profile(P3, gamma(2.19921875))
GREY_PROFILE = icc(b"GRAY", {b"kTRC": gamma(1.0)})


def cmyk_profile() -> bytes:
    """A profile in which each full plate takes 25 from a lightness of 100, whatever its ink."""
    corners = [100 - 25 * sum(plates) for plates in itertools.product((0, 1), repeat=4)]
    nodes = bytes(itertools.chain.from_iterable((round(max(0, light) * 2.55), 128, 128) for light in corners))
    ramp = bytes(range(256))
    lut = (
        b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + nodes + ramp * 3
    )
    return icc(b"CMYK", {b"A2B0": lut}, b"Lab ", b"prtr")


@pytest.mark.parametrize(
    ("profile", "primaries"), [(ADOBE_PROFILE, ADOBE), (P3_PROFILE, P3)], ids=["Adobe RGB", "P3"]
)
def test_profiles_are_converted_to_srgb_in_every_format(
    profile: bytes, primaries: tuple[tuple[float, ...], ...]
) -> None:
    expected = converted(COLOURS, primaries, 563 / 256)
    assert abs(expected - COLOURS).max() > 20
    image = Image.fromarray(COLOURS)
    kinds: dict[str, dict[str, Any]] = {
        "PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }  # fmt: skip
    for kind, more in kinds.items():
        if kind == "AVIF" and not features.check("avif"):
            continue
        found = np.array(pixels(encoded(image, kind, icc_profile=profile, **more)), dtype=float)
        assert abs(found - expected).max() < (1.5 if kind not in ("JPEG", "AVIF") else 16), kind
        assert abs(found - expected).mean() < 2, kind
    assert np.array_equal(pixels(encoded(image)), COLOURS)
    # alpha is not converted, and the image lies on sRGB white
    clear = np.dstack([COLOURS, np.full((8, 8), 128, np.uint8)])
    clear[0] = 0
    kinds = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True, "exact": True}}
    for kind, more in kinds.items():
        found = np.array(
            pixels(encoded(Image.fromarray(clear), kind, icc_profile=profile, **more)), dtype=float
        )
        assert (found[0] == 255).all()
        assert abs(found[1:] - (expected[1:] * 128 + 255 * 127) / 255).max() < 2, kind
    palette = Image.fromarray(COLOURS).quantize(16)
    exact = converted(np.asarray(palette.convert("RGB")), primaries, 563 / 256)
    assert abs(np.array(pixels(encoded(palette, icc_profile=profile))) - exact).max() < 1.5
    deep = COLOURS.astype(np.uint16) * 257
    assert abs(np.array(pixels(png(deep, 16, 2, before=[icc_chunk(profile)]))) - expected).max() < 1.5
    key = [*(int(v) for v in deep[0, 0])]
    keyed = np.array(pixels(png(deep, 16, 2, before=[icc_chunk(profile), trns(*key)])))
    assert keyed[0, 0].tolist() == [255] * 3
    assert abs(keyed[1:] - expected[1:]).max() < 1.5


def icc_chunk(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"some\0\0" + zlib.compress(profile))


def test_grey_profiles() -> None:
    levels = np.arange(256, dtype=np.uint8)[None]
    exact = srgb_of_linear(levels / 255)  # the profile's light is linear
    for raw in (
        png(levels, before=[icc_chunk(GREY_PROFILE)]),
        encoded(Image.fromarray(levels), "TIFF", icc_profile=GREY_PROFILE),
    ):
        image = data.decode_image(raw)
        assert image.mode == "L"
        assert abs(np.asarray(image) - exact).max() < 1.5
    deep = png(levels.astype(np.uint16) * 257, 16, before=[icc_chunk(GREY_PROFILE)])
    assert abs(np.asarray(data.decode_image(deep)) - exact).max() < 1.5
    between = png(levels[:, 64:-1].astype(np.uint16) * 257 + 128, 16, before=[icc_chunk(GREY_PROFILE)])
    assert (
        abs(np.asarray(data.decode_image(between)) - srgb_of_linear((levels[:, 64:-1] + 0.5) / 255)).max()
        < 1.5
    )
    for depth in (8, 16):
        with_alpha = np.stack([levels, levels * 0 + 255], axis=-1).astype(np.uint16) * (
            257 if depth == 16 else 1
        )
        found = np.array(pixels(png(with_alpha, depth, 4, before=[icc_chunk(GREY_PROFILE)])))
        assert abs(found - exact[..., None]).max() < 1.5
    light = tiff(
        np.linspace(0, 1, 50, dtype=np.float32)[None], tags=[(34675, 7, len(GREY_PROFILE), GREY_PROFILE)]
    )
    assert abs(np.asarray(data.decode_image(light)) - srgb_of_linear(np.linspace(0, 1, 50)))[:, 3:].max() < 2
    assert pixels(png([[0, 1]], 1, before=[icc_chunk(GREY_PROFILE)])) == [[0, 255]]


def test_cmyk_and_lab() -> None:
    ink = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for kind, more in {"TIFF": {}, "JPEG": {"quality": 100}}.items():
        assert np.allclose(pixels(encoded(ink, kind, **more)), [0, 255, 255], atol=2), (
            "Pillow's convention; JPEG inverts it"
        )
        found = np.array(pixels(encoded(ink, kind, icc_profile=cmyk_profile(), **more)))
        assert np.ptp(found) < 5
        assert abs(found.mean() - 185) < 4, "L* of 75 is 185"
    lab = Image.new("LAB", (4, 4), (191, 128, 128))
    settings: list[dict[str, bytes]] = [
        {},
        {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()},
        {"icc_profile": ADOBE_PROFILE},
    ]
    for profile in settings:
        assert np.allclose(pixels(encoded(lab, "TIFF", **profile)), 185, atol=3)


def test_srgb_profiles_leave_every_pixel_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = table(linear_of_srgb(np.linspace(0, 1, 1024)))
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    every = np.stack(np.meshgrid(*[np.arange(0, 256, 5, dtype=np.uint8)] * 3), axis=-1)
    every = np.concatenate([every.reshape(-1, 3), np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)])[None]
    for profile in (own, rgb_profile(SRGB, curve)):
        assert np.array_equal(pixels(encoded(Image.fromarray(every), icc_profile=profile)), every)
    levels = np.arange(256, dtype=np.uint8)[None]
    assert pixels(png(levels, before=[icc_chunk(icc(b"GRAY", {b"kTRC": curve}))])) == levels.tolist()
    assert (
        pixels(png(levels.astype(np.uint16) * 257, 16, before=[icc_chunk(icc(b"GRAY", {b"kTRC": curve}))]))
        == levels.tolist()
    )
    # off by 1 at most
    rough = icc(b"GRAY", {b"kTRC": table(linear_of_srgb(np.linspace(0, 1, 20)))})
    assert pixels(png(levels, before=[icc_chunk(rough)])) == levels.tolist()
    # each profile is built once, and the cache is bounded
    built: list[str] = []
    build = colour._build_transform

    def counted(profile: bytes, mode: str) -> Any:
        built.append(mode)
        return build(profile, mode)

    monkeypatch.setattr(colour, "_build_transform", counted)
    monkeypatch.setattr(colour, "_transforms", {})
    for _ in range(3):
        pixels(encoded(Image.fromarray(COLOURS), icc_profile=own))
    assert built == ["RGB"]
    monkeypatch.setattr(colour, "_MAX_PROFILES", 3)
    for power in range(100, 106):
        pixels(encoded(Image.fromarray(COLOURS), icc_profile=rgb_profile(SRGB, gamma(power / 64))))
    assert len(colour._transforms) == 3


@pytest.mark.parametrize(
    "profile",
    [
        cmyk_profile(),
        GREY_PROFILE,
        b"rubbish",
        ADOBE_PROFILE[:200],
        bytes(2_000_000),
        ADOBE_PROFILE.replace(b"acsp", b"zzzz"),
        b"x",
    ],
    ids=["for CMYK", "for grey", "rubbish", "cut short", "zeros", "without its mark", "a letter"],
)
def test_profiles_that_cannot_be_used_are_as_if_not_there(profile: bytes) -> None:
    image = Image.fromarray(COLOURS)
    assert np.array_equal(pixels(encoded(image, icc_profile=profile)), COLOURS)
    assert np.array_equal(pixels(encoded(image, "TIFF", icc_profile=profile)), COLOURS)
    assert np.array_equal(pixels(encoded(image, "WEBP", icc_profile=profile, lossless=True)), COLOURS)
    plain = encoded(image, "JPEG", quality=95)
    assert pixels(encoded(image, "JPEG", quality=95, icc_profile=profile)) == pixels(plain)
    assert (
        pixels(encoded(image.convert("L"), icc_profile=ADOBE_PROFILE))
        == np.asarray(image.convert("L")).tolist()
    )


def test_a_pillow_without_little_cms_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise ImportError("The _imagingcms C module is not installed")

    monkeypatch.setattr(colour, "_transforms", {})
    monkeypatch.setattr(ImageCms, "ImageCmsProfile", missing)
    assert "no LittleCMS" in refused(encoded(Image.fromarray(COLOURS), icc_profile=ADOBE_PROFILE))


# --- metadata -----------------------------------------------------------------------------------------------


def exif(orientation: int) -> bytes:
    return b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + bytes(4)


# orientation after the camera's maker
BOTH = exif(6)[:9] + b"\2" + struct.pack(">HHII", 0x010F, 2, 4, 0x61626300) + exif(6)[10:]
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
LEVELS = np.random.default_rng(1).integers(0, 256, (4, 6), dtype=np.uint8)
TURNED = np.rot90(LEVELS, -1).tolist()  # what orientation 6 asks for


def folded_zeros(megabytes: int) -> bytes:
    stream = zlib.compressobj(1)
    return b"".join([*(stream.compress(bytes(2**20)) for _ in range(megabytes)), stream.flush()])


PNG_REMARKS = {
    "nothing": [],
    "long text": [chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 3_000_000))],
    "long international text": [chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000))],
    "much text": [chunk(b"tEXt", b"key\0" + b"x" * 2**21)] * 33,
    "long profile": [chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(3_000_000)))],
    "profile folded in another way": [chunk(b"iCCP", b"p\0\7" + zlib.compress(bytes(300)))],
    "broken stream": [chunk(b"zTXt", b"key\0\0rubbish"), chunk(b"iTXt", b"key\0\1\0\0\0rubbish"),
    chunk(b"iCCP", b"p\0\0rubbish")],
    "unknown way of folding": [chunk(b"zTXt", b"key\0\7" + zlib.compress(b"x"))],
    "no key": [chunk(b"tEXt", b""), chunk(b"zTXt", b""), chunk(b"iTXt", b""), chunk(b"iCCP", b"")],
    "keys of Pillow's own": [
        chunk(b"tEXt", b"transparency\0x"), chunk(b"tEXt", b"icc_profile\0x"), chunk(b"tEXt", b"bbox\0x"),
        chunk(b"tEXt", b"exif\0x"),
    ],
    "wrong checksums": [
        chunk(kind, content, crc=1)
        for kind, content in {
            b"tEXt": b"key\0text", b"pHYs": bytes(9), b"iCCP": b"p\0\0" + zlib.compress(ADOBE_PROFILE),
            b"eXIf": exif(6), b"abCd": b"x",
            b"tIME": bytes(7), b"gAMA": bytes(4), b"iTXt": b"XML:com.adobe.xmp\0\0\0\0\0" + XMP,
        }.items()
    ],
    "too short": [chunk(kind, b"") for kind in (b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"acTL", b"fcTL", b"fdAT",
    b"bKGD", b"eXIf")],
    "broken animation": [chunk(b"acTL", bytes(8)), chunk(b"fcTL", struct.pack(">IIIIIHHBB", 7, 9999, 9999, 0,
    0, 0, 0, 0, 0))],
    "broken EXIF": [chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"), chunk(b"tEXt",
    b"Raw profile type exif\0\nexif\n 3\nzz")],
    "empty EXIF": [chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0")],
    "no such orientation": [chunk(b"eXIf", exif(9))],
}  # fmt: skip


@pytest.mark.parametrize("remarks", PNG_REMARKS.values(), ids=PNG_REMARKS)
def test_a_png_is_as_good_as_its_pixels(remarks: list[bytes], tmp_path: Path) -> None:
    for raw in (png(LEVELS, before=remarks), png(LEVELS, after=remarks)):
        assert pixels(raw) == LEVELS.tolist()
        (tmp_path / "a.png").write_bytes(raw)
        assert pixels(tmp_path / "a.png") == LEVELS.tolist()
    cut = png(LEVELS, after=[chunk(b"tEXt", b"key\0" + b"x" * 1000)])
    assert pixels(cut[:-500]) == LEVELS.tolist(), "only the end of a text is missing"


def test_text_takes_no_memory() -> None:
    bomb = folded_zeros(100)
    assert len(bomb) < 2**20
    remarks = [
        chunk(b"zTXt", b"key\0\0" + bomb), chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb), chunk(b"iCCP", b"p\0\0" + bomb),
        *[chunk(b"zTXt", b"key\0\0" + folded_zeros(1))] * 60,
    ]  # fmt: skip
    raw = png(LEVELS, before=remarks, after=remarks)
    tracemalloc.start()
    try:
        assert pixels(raw) == LEVELS.tolist()
        assert tracemalloc.get_traced_memory()[1] < containers.MAX_PROFILE_BYTES * 2.5
    finally:
        tracemalloc.stop()


def test_damaged_pixels_are_refused_as_before() -> None:
    whole = png(np.random.default_rng(0).integers(0, 256, (50, 50)))
    assert refused(whole[: len(whole) // 2]).startswith("damaged: ")
    assert refused(whole.replace(b"PLTE", b"PLTE")[:60] + bytes(100)).startswith("damaged")
    for name in (b"IHDR", b"PLTE", b"tRNS"):  # without these, the pixels cannot be read
        bad = chunk(name, bytes(13), crc=1)
        assert refused(png(LEVELS, before=[bad])).startswith("damaged")
    for kind in ("JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"):
        if kind != "AVIF" or features.check("avif"):
            raw = encoded(
                Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)), kind
            )
            assert refused(raw[: len(raw) // 2]).startswith("damaged"), kind
            assert refused(raw[:20]).startswith("damaged"), kind


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


JPEG = encoded(Image.fromarray(LEVELS), "JPEG", quality=100)
MPF = (
    b"MPF\0MM\0*\0\0\0\x08\0\2"
    + struct.pack(">HHII", 0xB001, 2, 4, 0x41424344)
    + struct.pack(">HHII", 0xB002, 7, 4, 1)
    + bytes(4)
)
JPEG_REMARKS = {
    "comments": segment(0xFE, b"c" * 65533) * 30,
    "short JFIF": segment(0xE0, b"JFIF"),
    "short profile": segment(0xE2, b"ICC_PROFILE\0"),
    "half a profile": segment(0xE2, b"ICC_PROFILE\0\1\2" + ADOBE_PROFILE[:100]),
    "short Adobe": segment(0xEE, b"Adobe"),
    "several pictures, broken": segment(0xE2, MPF),
    "rubbish EXIF": segment(0xE1, b"Exif\0\0rubbish"),
    "long EXIF": segment(0xE1, b"Exif\0\0" + b"x" * 65000) * 3,
    "EXIF that points outside": segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "rubbish of Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\3\xed"),
    "rubbish XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe"),
    "empty ones": b"".join(segment(marker, b"") for marker in (*range(0xE0, 0xF0), 0xFE)),
    "bytes that fill": b"\xff\xff\xff" + segment(0xFE, b"x") + b"\xff\xff",
    "a length that is too short": segment(0xEF, b"")[:-1] + b"\2" + b"some words \xff\0 and more",
}


@pytest.mark.parametrize("remarks", JPEG_REMARKS.values(), ids=JPEG_REMARKS)
def test_a_jpeg_is_as_good_as_its_pixels(remarks: bytes, tmp_path: Path) -> None:
    raw = JPEG[:2] + remarks + JPEG[2:]
    assert pixels(raw) == pixels(JPEG)
    (tmp_path / "a.jpg").write_bytes(raw)
    assert pixels(tmp_path / "a.jpg") == pixels(JPEG)


def test_a_profile_in_several_segments_of_a_jpeg() -> None:
    long = rgb_profile(SRGB, gamma(3), {b"text": b"text\0\0\0\0" + b"x" * 150_000})
    grey = encoded(Image.new("RGB", (8, 8), (128, 128, 128)), "JPEG", quality=100)
    parts = [long[at : at + 60_000] for at in range(0, len(long), 60_000)]
    segments = [
        segment(0xE2, b"ICC_PROFILE\0" + bytes([n, len(parts)]) + part)
        for n, part in enumerate(parts, start=1)
    ]
    expected = srgb_of_linear(np.array((128 / 255) ** 3))
    assert abs(np.array(pixels(grey[:2] + b"".join(reversed(segments)) + grey[2:])) - expected).max() < 2
    for missing in range(len(parts)):
        some = b"".join(segments[:missing] + segments[missing + 1 :])
        assert pixels(grey[:2] + some + grey[2:]) == pixels(grey)


def word(value: int) -> bytes:
    return struct.pack("<L", value)


TIFF_REMARKS = {
    "nothing": [],
    "resolution as text": [(282, 2, 5, b"abcd\0"), (283, 2, 5, b"abcd\0"), (296, 3, 1, b"\3\0")],
    "EXIF before the file": [(34665, 9, 1, struct.pack("<l", -5))],
    "EXIF beyond the file": [(34665, 4, 1, word(10**6))],
    "EXIF in a circle": [(34665, 4, 1, word(8)), (34853, 4, 1, word(8)), (330, 4, 1, word(8))],
    "XMP as numbers": [(700, 4, 2, word(1) + word(2))],
    "XMP as text": [(700, 2, 6, b"abcde\0")],
    "rubbish profile": [(34675, 7, 10, b"0123456789")],
    "profile of numbers": [(34675, 3, 4, b"01234567")],
    "text beyond the file": [(270, 2, 2**31, word(10**6))],
    "a tag of no known type": [(40000, 200, 1, word(1))],
    "rubbish of Photoshop": [(34377, 1, 8, b"8BIMabcd")],
}


@pytest.mark.parametrize("remarks", TIFF_REMARKS.values(), ids=TIFF_REMARKS)
def test_a_tiff_is_as_good_as_its_pixels(remarks: list[tuple[int, int, int, bytes]], tmp_path: Path) -> None:
    for packed in (False, True):
        assert pixels(tiff(LEVELS, tags=remarks, packed=packed)) == LEVELS.tolist()
        (tmp_path / "a.tif").write_bytes(tiff(LEVELS, tags=remarks, packed=packed))
        assert pixels(tmp_path / "a.tif") == LEVELS.tolist()
        assert pixels(tiff(LEVELS, tags=[*remarks, (274, 3, 1, b"\6\0")], packed=packed)) == TURNED


def test_large_tiffs_with_odd_tags() -> None:
    odd = TiffImagePlugin.ImageFileDirectory_v2()
    odd.tagtype[700], odd[700], odd[270] = 4, 7, "words"  # XMP as a number
    for more in ({}, {"tiffinfo": odd}):
        raw = encoded(Image.fromarray(LEVELS), "TIFF", big_tiff=True, **more)
        assert raw.startswith(b"II+\0")
        assert pixels(raw) == LEVELS.tolist()


def test_a_webp_and_an_avif_are_as_good_as_their_pixels() -> None:
    image = Image.fromarray(LEVELS).convert("RGB")
    webp = encoded(
        image, "WEBP", lossless=True, exif=b"Exif\0\0rubbish", icc_profile=b"rubbish", xmp=b"\xff\xfe"
    )
    assert np.array_equal(pixels(webp), np.asarray(image))
    if features.check("avif"):
        avif = encoded(image, "AVIF", quality=100, exif=b"Exif\0\0" + BOTH)
        plain, turned = encoded(image, "AVIF", quality=100), pixels(avif)
        assert turned == np.rot90(pixels(plain), -1).tolist()
        assert avif.count(b"MM\0*") == 1
        assert pixels(avif.replace(b"MM\0*", b"what")) == turned, (
            "its EXIF is broken; the container has the orientation too"
        )


def test_orientation_is_read_wherever_it_may_be() -> None:
    remark = b"\nexif\n      32\n" + (b"Exif\0\0" + exif(6)).hex().encode() + b"\n"
    for before in (
        [chunk(b"eXIf", exif(6))],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP))],
        [chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(remark))],
        [chunk(b"tEXt", b"Raw profile type exif\0" + remark)],
    ):
        assert pixels(png(LEVELS, before=before)) == TURNED
        assert pixels(png(LEVELS, after=before)) == TURNED
        assert pixels(png(LEVELS.astype(np.uint16) * 257, 16, before=before)) == TURNED
    for segments in (
        segment(0xE1, b"Exif\0\0" + exif(6)),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
        segment(0xE1, b"Exif\0\0" + exif(6)[:12]) + segment(0xE1, b"Exif\0\0" + exif(6)[12:]),
    ):
        assert pixels(JPEG[:2] + segments + JPEG[2:]) == np.rot90(pixels(JPEG), -1).tolist()
    both = BOTH.replace(
        struct.pack(">HHII", 0x010F, 2, 4, 0x61626300), struct.pack(">HHII", 0x010F, 99, 7, 7)
    )  # broken
    assert pixels(png(LEVELS, before=[chunk(b"eXIf", both)])) == TURNED
    image = Image.fromarray(LEVELS).convert("RGB")
    webp = encoded(image, "WEBP", lossless=True, exif=b"Exif\0\0" + exif(6))
    assert np.array_equal(pixels(webp), np.rot90(np.asarray(image), -1))
    tag = (274, 3, 1, b"\6\0")
    assert pixels(tiff(LEVELS, tags=[tag])) == TURNED
    assert pixels(tiff(LEVELS, tags=[(700, 1, len(XMP), XMP)])) == TURNED
    assert pixels(tiff(LEVELS, tags=[tag, (700, 1, len(XMP), XMP)])) == TURNED, "once"
    assert pixels(tiff((LEVELS / 255).astype(np.float32), tags=[tag])) == TURNED
    for turns, orientation in ((0, 1), (2, 3), (3, 8)):
        assert (
            pixels(png(LEVELS, before=[chunk(b"eXIf", exif(orientation))]))
            == np.rot90(LEVELS, -turns if turns != 3 else 1).tolist()
        )
    for orientation, expected in {
        2: LEVELS[:, ::-1],
        4: LEVELS[::-1],
        5: LEVELS.T,
        7: LEVELS[::-1, ::-1].T,
    }.items():
        assert pixels(png(LEVELS, before=[chunk(b"eXIf", exif(orientation))])) == expected.tolist()


# --- files that are no pictures, or of other formats --------------------------------------------------------


def test_what_is_no_image_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for raw, reason in {
        pointer: "a Git LFS pointer, not the image: run git lfs pull",
        b"": "an empty file",
        b"<!DOCTYPE html>\n<html><body>404": "an HTML page, not an image",
        b"\xef\xbb\xbf\n <HTML lang=en>": "an HTML page, not an image",
        b"<?xml version='1.0'?>\n<!-- x -->\n<svg xmlns='x'>": "an SVG drawing, which is not read: convert it to PNG",
        b"<svg width='1'/>": "an SVG drawing, which is not read: convert it to PNG",
        b"%PDF-1.7\n": "a PDF, which is not read: convert it to PNG or JPEG",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "a HEIC picture, which is not read: convert it to PNG or JPEG",
        b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic": "a HEIC picture, which is not read: convert it to PNG or JPEG",
        b"\xff\x0arest": "a JPEG XL picture, which is not read: convert it to PNG or JPEG",
        b"\0\0\0\x0cjP  \r\n\x87\n": "a JPEG 2000 picture, which is not read: convert it to PNG or JPEG",
        b"just words": "not an image of a known kind",
        b"<": "not an image of a known kind",
    }.items():
        assert refused(raw) == reason
    if features.check("avif"):
        avif = encoded(Image.new("RGB", (8, 8)), "AVIF")
        monkeypatch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
        monkeypatch.setattr(features, "check", lambda feature: False)
        assert refused(avif).startswith("AVIF pictures are not read by this build of Pillow")


def test_every_suffix_is_read_or_said_not_to_be(tmp_path: Path) -> None:
    kinds = {
        "jpe": "JPEG",
        "jpg": "JPEG",
        "jfif": "JPEG",
        "tif": "TIFF",
        "apng": "PNG",
        "pgm": "PPM",
        "pbm": "PPM",
        "pnm": "PPM",
    }
    for suffix in images.SUFFIXES:
        kind = kinds.get(suffix[1:], suffix[1:].upper())
        if kind != "AVIF" or features.check("avif"):
            Image.new("L", (8, 8), 255).save(tmp_path / f"a{suffix}", kind)
            assert np.mean(pixels(tmp_path / f"a{suffix}")) > 253
        assert images.unread_reason(f"a{suffix}") is None
    assert not set(images.SUFFIXES) & set(images.UNREAD)
    assert images.unread_reason("deep/A.HEIC") == "pictures of .heic are not read: convert it to PNG or JPEG"
    for name in ("a.txt", "a", ".heic", "a.mp4", "a.json", "heic"):
        assert images.unread_reason(name) is None


def test_many_pictures_one_of_them_a_phones(tmp_path: Path) -> None:
    given: list[Encoded] = [png(LEVELS), b"<html>", tmp_path / "none.png", png(DARK // 4, 16), LEVELS]
    first, *reasons, last = images.decode_all(given, images.Fitting((4, 4), 1))
    assert [type(reason) for reason in reasons] == [str, str, str]
    assert reasons[1] == "cannot be read: No such file or directory"
    assert isinstance(first, images.Fitted)
    assert isinstance(last, images.Fitted)
    assert np.array_equal(first.pixels, last.pixels)
    assert first.original == last.original == LEVELS.shape[:2]


# --- fitting ------------------------------------------------------------------------------------------------


def test_images_are_fitted() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 224, 8, dtype=np.uint8), (28, 1)))
    fitted = data.fit_image(ramp, (32, 32), 1)
    assert fitted.shape == (1, 32, 32)
    assert (np.diff(fitted[0, 16].astype(int)) >= 0).all()
    assert abs(fitted.mean() - np.asarray(ramp).mean()) < 1
    wide = data.fit_image(Image.new("RGB", (60, 20), (255, 0, 0)), (8, 16), 3)
    assert wide.shape == (3, 8, 16)
    assert (wide[0] == 255).all()
    assert (wide[1:] == 0).all()
    checks = np.zeros((64, 64), dtype=np.uint8)
    checks[::2, ::2] = checks[1::2, 1::2] = 255
    assert abs(data.fit_image(Image.fromarray(checks), (8, 8), 1).astype(int) - 127).max() < 20  # antialiased
    with pytest.raises(SanaError, match="1 or 3 channels, not 2"):
        data.fit_image(ramp, (8, 8), 2)


def test_images_come_upright_grey_opaque_and_in_eight_bits() -> None:
    upright = picture(0, (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn, from a camera held sideways
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    assert np.array_equal(
        np.asarray(data.decode_image(encoded(turned, "PNG", exif=exif))), np.asarray(upright)
    )
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    assert np.asarray(data.decode_image(encoded(clear))).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 8, 7])
    assert np.asarray(data.decode_image(encoded(palette, transparency=0))).tolist() == [[[255, 255, 255]]]
    deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(data.decode_image(encoded(deep))).tolist() == [[0, 128, 255]]
    grey = data.decode_image(encoded(Image.new("L", (1, 1), 7)))
    assert data.fit_image(grey, (1, 1), 3).tolist() == [[[7]], [[7]], [[7]]]
    assert data.decode_image(encoded(Image.new("CMYK", (1, 1)), "JPEG")).mode == "RGB"


def test_padding_keeps_the_whole_image() -> None:
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    padded = data.fit_image(wide, (16, 16), 3, fit="pad")
    assert (padded[1, 4:12] == 0).all()
    assert (padded[:, :4] == 255).all()
    assert (padded[:, 12:] == 255).all()
    assert (data.fit_image(wide, (16, 16), 3)[1] == 0).all()


# --- JPEG decoders that scale ---------------------------------------------------------------------------------


@cache
def photo(height: int, width: int) -> Image.Image:
    """Colours at every scale, as in a photo, and hard edges."""
    draws = np.random.default_rng(0)
    total = np.zeros((height, width, 3))
    for octave in range(2, 9):
        small = draws.normal(size=(2**octave, 2**octave, 3)).astype(np.float32)
        layers = [
            Image.fromarray(layer).resize((width, height), Image.Resampling.BICUBIC)
            for layer in small.transpose(2, 0, 1)
        ]
        total += np.stack([np.asarray(layer) for layer in layers], axis=-1) * 0.6**octave
    levels = (128 + 90 * total / total.std()).clip(0, 255).astype(np.uint8)
    levels[height // 3 : height // 2, width // 5 : width // 4] = 250, 20, 30
    levels[height // 2 :, width // 2 : width // 2 + 3] = 0
    return Image.fromarray(levels)


def fitted_by(raw: bytes, fitting: images.Fitting) -> tuple[np.ndarray, np.ndarray, images.Decoded]:
    """An image as it is embedded; and all of it decoded first, which is the slow way."""
    (found,) = images.decode_all([raw], fitting)
    assert isinstance(found, images.Fitted)
    whole = data.decode_image(raw)
    assert found.original == (whole.height, whole.width)
    slow = data.fit_image(whole, fitting.size_for(*found.original), fitting.channels, fitting.fit)
    return found.pixels.astype(int), slow.astype(int), images.decode(raw, fitting)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_scaled_jpeg_is_as_if_all_of_it_was_decoded(orientation: int, fit: str, channels: int) -> None:
    raw = encoded(photo(805, 1203), "JPEG", quality=92, exif=b"Exif\0\0" + exif(orientation))
    for size in ((40, 48), (100, 70), (128, 144)):  # by 8, 4 and 2 if cropped; 805 and 1203 are no multiples
        fitting = images.Fitting(size, channels, fit)
        found, slow, decoded = fitted_by(raw, fitting)
        assert found.shape == (channels, *size)
        assert max(decoded.original) == 1203
        times = decoded.image.height / fitting.kept(*decoded.original)[0]
        assert 2 <= times < 4.1 or decoded.image.height < decoded.original[0] / 7
        assert decoded.image.height < decoded.original[0] / 1.9, "it was scaled"
        assert abs(found - slow).mean() < 1
        assert abs(found - slow).max() < 24
        assert abs(found.mean() - slow.mean()) < 0.1
        shifted = abs(found[:, :, 1:] - slow[:, :, :-1]).mean(), abs(found[:, 1:] - slow[:, :-1]).mean()
        assert min(shifted) > 10 * abs(found - slow).mean(), "so that a shift of a tenth would be seen"


def test_a_jpeg_is_never_scaled_below_twice_what_is_kept() -> None:
    raw = encoded(photo(160, 320), "JPEG")
    for side, width in ((20, 80), (21, 160), (40, 160), (41, 320), (160, 320), (400, 320)):
        fitting = images.Fitting((side, side), 3)
        assert images.decode(raw, fitting).image.width == width, side
    wide = images.Fitting((32, 32), 3, buckets=(32, 64))  # (32, 64) is a shape of the second table
    assert images.decode(raw, wide).original == (160, 320)
    assert np.array_equal(*fitted_by(encoded(photo(160, 320)), images.Fitting((20, 20), 3))[:2]), (
        "a PNG is not"
    )


def test_a_jpeg_with_a_profile_is_scaled_in_colour() -> None:
    raw = encoded(photo(805, 1203), "JPEG", quality=92, icc_profile=P3_PROFILE)
    found, slow, decoded = fitted_by(raw, images.Fitting((40, 48), 1))
    assert decoded.image.mode == "RGB"
    assert abs(found - slow).mean() < 1
    plain = images.decode(encoded(photo(80, 120), "JPEG"), images.Fitting((20, 20), 1))
    assert plain.image.mode == "L"


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_grey_printed_and_progressive_jpegs_are_scaled_too(mode: str, progressive: bool) -> None:
    raw = encoded(photo(805, 1203).convert(mode), "JPEG", quality=92, progressive=progressive)
    for channels in (1, 3):
        found, slow, decoded = fitted_by(raw, images.Fitting((40, 48), channels))
        assert decoded.image.width == 151
        assert abs(found - slow).mean() < 1


def test_a_damaged_jpeg_is_refused_when_scaled() -> None:
    raw = encoded(photo(805, 1203), "JPEG")
    (reason,) = images.decode_all([raw[: len(raw) // 2]], images.Fitting((16, 16), 3))
    assert isinstance(reason, str)
    assert reason.startswith("damaged: ")
