r"""Text files, read in one way: captions, prompts, metadata, configs.

They are UTF-8, with or without a byte order mark. Lines end at \n, \r\n or \r, and nowhere else: other characters that some
programs break lines at are part of the text. UTF-16 and UTF-32 are recognised and refused by name. It knows nothing of what
the text means.
"""

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path

_MARKS = (  # the longer first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_LINE_END = re.compile(r"\r\n|\n|\r")
_LOOKED_AT = 256  # bytes in which the zeros of UTF-16 without a mark are looked for


class NotTextError(ValueError):
    """Bytes that are not UTF-8. The text says why: "UTF-16; save it as UTF-8", or where the first wrong byte is."""


def other_encoding(raw: bytes) -> str | None:
    """The name of the Unicode encoding, not UTF-8, that a file's first bytes are in; None if they do not show one."""
    for mark, name in _MARKS:
        if raw.startswith(mark):
            return name
    beginning = raw[:_LOOKED_AT]
    zeros = [position % 2 for position, byte in enumerate(beginning) if byte == 0]
    # mostly Latin text in UTF-16: a zero in every second byte, and in no other
    if len(zeros) > len(beginning) // 4 and len(set(zeros)) == 1:
        return "UTF-16"
    return None


def check_encoding(raw: bytes) -> None:
    """Refuse the beginning of a file in UTF-16 or UTF-32.

    Raises:
        NotTextError: it is one.
    """
    if name := other_encoding(raw):
        raise NotTextError(f"{name}; save it as UTF-8")


def decode(raw: bytes) -> str:
    """The text of a file's bytes, without a byte order mark.

    Raises:
        NotTextError: they are not UTF-8; says why.
    """
    check_encoding(raw)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotTextError(f"{error.reason} at byte {error.start}") from error


def decode_loosely(raw: bytes) -> str:
    """The same, but bytes that are not UTF-8 become lone surrogates, which `is_whole` finds: one bad line spoils itself only.

    Raises:
        NotTextError: it is UTF-16 or UTF-32, of which no line can be read.
    """
    check_encoding(raw)
    return raw.decode("utf-8-sig", errors="surrogateescape")


def is_whole(text: str) -> bool:
    """Whether text from `decode_loosely` or `read_lines` was UTF-8."""
    return not any("\udc80" <= character <= "\udcff" for character in text)


def split_lines(text: str) -> list[str]:
    """The lines of a text, without their ends. A last line needs none."""
    lines = _LINE_END.split(text)
    return lines[:-1] if lines[-1] == "" else lines


def read(path: Path, most_bytes: int | None = None) -> str:
    """All of a text file.

    Raises:
        OSError: it cannot be read.
        NotTextError: it is not UTF-8, or is longer than `most_bytes`; says why.
    """
    with path.open("rb") as file:
        raw = file.read() if most_bytes is None else file.read(most_bytes + 1)
    if most_bytes is not None and len(raw) > most_bytes:
        raise NotTextError(f"over {most_bytes:,} bytes")
    return decode(raw)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file one after another, however long it is; see `decode_loosely` for bytes that are not UTF-8.

    Raises:
        OSError: it cannot be read.
        NotTextError: it is UTF-16 or UTF-32.
    """
    file = path.open("rb")
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=None) as text:
        check_encoding(file.peek(_LOOKED_AT)[:_LOOKED_AT])  # one opening: of a pipe there is no second
        for line in text:
            yield line.removesuffix("\n")
