r"""Text files: captions, prompts, metadata, configs. It knows nothing of what the text means.

Files are UTF-8, with or without a byte order mark. Lines end at \n, \r\n or \r only; unlike in
`str.splitlines`, other separators are part of the text. UTF-16 and UTF-32 are recognised and
refused.
"""

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path

_MARKS = (  # UTF-32 first, since its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_LINE_END = re.compile(r"\r\n|\n|\r")
_SAMPLE = 256  # bytes that are searched for the zeros of UTF-16 without a mark


class NotTextError(ValueError):
    """Bytes that are not UTF-8. The text is "UTF-16; save it as UTF-8", or the bad byte."""


def other_encoding(raw: bytes) -> str | None:
    """Detect UTF-16 or UTF-32 from the first bytes of a file; None if neither."""
    for mark, name in _MARKS:
        if raw.startswith(mark):
            return name
    beginning = raw[:_SAMPLE]
    zeros = [position % 2 for position, byte in enumerate(beginning) if byte == 0]
    # Latin text in UTF-16 has a zero in most even or most odd bytes, and only there
    if len(zeros) > len(beginning) // 4 and len(set(zeros)) == 1:
        return "UTF-16"
    return None


def check_encoding(raw: bytes) -> None:
    """Refuse the first bytes of a file in UTF-16 or UTF-32.

    Raises:
        NotTextError: they are in one of these.
    """
    if name := other_encoding(raw):
        raise NotTextError(f"{name}; save it as UTF-8")


def decode(raw: bytes) -> str:
    """Decode the bytes of a file, without a byte order mark.

    Raises:
        NotTextError: they are not UTF-8; says why.
    """
    check_encoding(raw)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotTextError(f"{error.reason} at byte {error.start}") from error


def is_utf8(line: str) -> bool:
    """Whether a line from `read_lines` was valid UTF-8."""
    return not any("\udc80" <= character <= "\udcff" for character in line)


def split_lines(text: str) -> list[str]:
    """Split text into lines, without their ends. The last line needs no end."""
    lines = _LINE_END.split(text)
    return lines[:-1] if lines[-1] == "" else lines


def read(path: Path, most_bytes: int | None = None) -> str:
    """Read a text file.

    Raises:
        OSError: it cannot be read.
        NotTextError: it is not UTF-8 or exceeds `most_bytes`; says why.
    """
    with path.open("rb") as file:
        raw = file.read() if most_bytes is None else file.read(most_bytes + 1)
    if most_bytes is not None and len(raw) > most_bytes:
        raise NotTextError(f"over {most_bytes:,} bytes")
    return decode(raw)


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file of any size. Bytes outside UTF-8 become lone surrogates.

    So a bad line, which `is_utf8` finds, does not spoil the others.

    Raises:
        OSError: it cannot be read.
        NotTextError: it is UTF-16 or UTF-32.
    """
    file = path.open("rb")
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=None) as text:
        check_encoding(file.peek(_SAMPLE)[:_SAMPLE])  # a pipe can be opened only once
        for line in text:
            yield line.removesuffix("\n")
