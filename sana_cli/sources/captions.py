"""Captions, their weights and what they say, from a metadata field, a row or a text file."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from sana_cli.config.keys import DataConfig
from sana_cli.runtime import textfile
from sana_cli.runtime.files import is_lfs_pointer
from sana_cli.sources.attributes import attributes_of, brief, named_in_captions
from sana_cli.sources.entry import BadImage

MAX_WEIGHT = 1e6  # float32 holds sums of such weights; a caption below 1 / MAX_WEIGHT is dropped
MAX_CAPTION_BYTES = 100_000


class Captions(NamedTuple):
    """The captions of an image, and what a row says of them and of the image."""

    captions: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    attributes: Mapping[str, str] = MappingProxyType({})
    says: tuple[frozenset[str], ...] | None = None


def captions_of(value: Any, weights: Any = None, attributes: Any = None, says: Any = None) -> Captions:
    """Read captions from a metadata value: a string, or a list of strings.

    The other values are the row's `caption_weights`, its attributes and its `caption_attributes`.

    Raises:
        BadImage: no caption is usable; says why.
    """
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
        raise BadImage("no caption" if value is None else f"a caption is not text: {brief(value)}")
    shown = attributes_of(attributes)
    named = named_in_captions(says, len(found), shown) or [frozenset(shown)] * len(found)
    if weights is None:
        kept = [(text.strip(), 1.0, names) for text, names in zip(found, named, strict=True) if text.strip()]
    else:
        numbers = weights if isinstance(weights, list | tuple) else [weights]
        valid = all(type(number) in (int, float) and 0 <= number <= MAX_WEIGHT for number in numbers)
        if len(numbers) != len(found) or not valid:
            raise BadImage("its caption weights are not one number from 0 to a million for each caption")
        kept = [
            (text.strip(), float(weight), names)
            for text, weight, names in zip(found, numbers, named, strict=True)
            if text.strip() and weight >= 1 / MAX_WEIGHT
        ]
    if not kept:
        raise BadImage("no caption")
    if any(len(text.encode("utf-8", errors="surrogatepass")) > MAX_CAPTION_BYTES for text, _, _ in kept):
        raise BadImage(f"a caption of over {MAX_CAPTION_BYTES:,} bytes")
    texts, numbers, named = zip(*kept, strict=True)
    return Captions(texts, None if weights is None else numbers, shown, None if says is None else named)


def captions_of_row(row: Mapping[str, Any], data: DataConfig) -> Captions:
    """Read captions and attributes from the fields of a metadata row that a config names.

    Raises:
        BadImage: no caption is usable; says why.
    """
    field = data.caption_field
    if field not in row:
        own = ("file_name", "caption_weights", "caption_attributes", data.attribute_field)
        others = ", ".join(name for name in row if name not in own)
        raise BadImage(f"no caption: it has no {field}" + (f", but {others:.60}" if others else ""))
    return captions_of(row[field], row.get("caption_weights"), *attribute_fields(row, data))


def attribute_fields(row: Mapping[str, Any], data: DataConfig) -> tuple[Any, Any]:
    """A row's attributes and `caption_attributes`, as they stand there; None without, or if not to be read."""
    if data.attribute_field is None:
        return None, None
    return row.get(data.attribute_field), row.get("caption_attributes")


def captions_of_text(raw: bytes) -> tuple[str, ...]:
    """Read captions from the bytes of a text file, one per line.

    Raises:
        BadImage: the file is not text or has no caption; says why.
    """
    if is_lfs_pointer(raw):
        raise BadImage("its captions are a Git LFS pointer: fetch them with git lfs pull")
    try:
        return captions_of(textfile.split_lines(textfile.decode(raw))).captions
    except textfile.NotTextError as error:
        raise BadImage(f"its captions are not UTF-8: {error}") from error
