"""Captions and their weights, from a metadata field, a row or a text file."""

from collections.abc import Mapping
from typing import Any

from sana_cli.runtime import textfile
from sana_cli.runtime.files import is_lfs_pointer
from sana_cli.sources.entry import BadImage

MAX_WEIGHT = 1e6  # float32 holds sums of such weights; a caption below 1 / MAX_WEIGHT is dropped
MAX_CAPTION_BYTES = 100_000

Captions = tuple[tuple[str, ...], tuple[float, ...] | None]  # captions, and their weights or None


def captions_of(value: Any, weights: Any = None) -> Captions:
    """Read captions from a metadata value: a string, or a list of strings.

    Raises:
        BadImage: no caption is usable; says why.
    """
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
        raise BadImage("no caption" if value is None else f"a caption is not text: {value!r:.60}")
    if weights is None:
        kept = [(text.strip(), 1.0) for text in found if text.strip()]
    else:
        numbers = weights if isinstance(weights, list | tuple) else [weights]
        valid = all(type(number) in (int, float) and 0 <= number <= MAX_WEIGHT for number in numbers)
        if len(numbers) != len(found) or not valid:
            raise BadImage("its caption weights are not one number from 0 to a million for each caption")
        kept = [
            (text.strip(), float(weight))
            for text, weight in zip(found, numbers, strict=True)
            if text.strip() and weight >= 1 / MAX_WEIGHT
        ]
    if not kept:
        raise BadImage("no caption")
    if any(len(text.encode("utf-8", errors="surrogatepass")) > MAX_CAPTION_BYTES for text, _ in kept):
        raise BadImage(f"a caption of over {MAX_CAPTION_BYTES:,} bytes")
    return tuple(text for text, _ in kept), None if weights is None else tuple(weight for _, weight in kept)


def captions_of_row(row: Mapping[str, Any], field: str) -> Captions:
    """Read captions from `field` of a metadata row, and weights from `caption_weights`.

    Raises:
        BadImage: no caption is usable; says why.
    """
    if field not in row:
        others = ", ".join(name for name in row if name not in ("file_name", "caption_weights"))
        raise BadImage(f"no caption: it has no {field}" + (f", but {others:.60}" if others else ""))
    return captions_of(row[field], row.get("caption_weights"))


def captions_of_text(raw: bytes) -> tuple[str, ...]:
    """Read captions from the bytes of a text file, one per line.

    Raises:
        BadImage: the file is not text or has no caption; says why.
    """
    if is_lfs_pointer(raw):
        raise BadImage("its captions are a Git LFS pointer: fetch them with git lfs pull")
    try:
        return captions_of(textfile.split_lines(textfile.decode(raw)))[0]
    except textfile.NotTextError as error:
        raise BadImage(f"its captions are not UTF-8: {error}") from error
