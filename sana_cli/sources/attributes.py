"""Named attributes of an image, from a metadata row: what the image shows, in words or numbers.

`"attributes": {"colour": "red", "eyes": 3}` says it of the image. `"caption_attributes": [["colour"], []]`
says which of them each caption names, where a caption leaves some out.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sana_cli.errors import SanaError
from sana_cli.sources.entry import BadImage

MOST = 60  # attributes of an image; a caption's are bits of one number
MOST_VALUES = 100_000  # of an attribute: the index lists them all
LONGEST = 200  # characters of a name or a value
ADVICE = (
    'attributes are for example "attributes": {"colour": "red", "eyes": 3}',
    "leave them out with --set data.attribute_field=null",
)


class BadAttributes(BadImage):
    """Attributes that cannot be used."""


def refusal(where: str, error: BadAttributes) -> SanaError:
    """The message about attributes of another form, in the first row that has any."""
    return SanaError(f"{where}: {error}", *ADVICE, exit_code=2)


def brief(value: Any) -> str:
    """The start of a value as Python writes it, for messages."""
    try:
        return f"{value!r:.60}"
    except RecursionError:  # a list of lists of lists
        return "..."


def attributes_of(value: Any) -> dict[str, str]:
    """Read attributes: an object of texts, numbers or booleans, or (in CSV) its JSON. None: no attributes.

    A value of None or of blanks is left out.

    Raises:
        BadAttributes: they are anything else; says why.
    """
    value = _parsed(value)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadAttributes(f"its attributes are no object of names and values: {brief(value)}")
    texts = {str(name): _text(name, one) for name, one in value.items()}
    found = {name: text for name, text in texts.items() if text}
    if len(found) > MOST:
        raise BadAttributes(f"{len(found)} attributes; the most is {MOST}")
    return found


def _text(name: Any, value: Any) -> str:
    if not isinstance(value, str | int | float | None):
        raise BadAttributes(
            f"its attribute {name!r:.60} is not a text, a number or true or false: {brief(value)}"
        )
    text = "" if value is None else value.strip() if isinstance(value, str) else json.dumps(value)
    if not str(name).strip() or max(len(text), len(str(name))) > LONGEST:
        raise BadAttributes(
            f"its attribute {name!r:.60} has an empty name, or a text over {LONGEST} characters"
        )
    if any("\ud800" <= character <= "\udfff" for character in f"{name}{text}"):
        raise BadAttributes(f"its attribute {name!r:.60} has half a character, which UTF-8 cannot write")
    return text


def named_in_captions(
    value: Any, captions: int, attributes: Mapping[str, str]
) -> tuple[frozenset[str], ...] | None:
    """Read which attributes each of so many captions names. None: not said, so each names all.

    Raises:
        BadAttributes: it is no list of names for each caption, or a name is none of the attributes.
    """
    value = _parsed(value)
    if value is None:
        return None
    if not _is_list(value) or len(value) != captions or not all(map(_is_list, value)):
        raise BadAttributes("its caption_attributes are not one list of names for each caption")
    if not all(isinstance(name, str) for names in value for name in names):
        raise BadAttributes("its caption_attributes are not one list of names for each caption")
    found = tuple(map(frozenset, value))
    if unknown := sorted(frozenset().union(*found) - set(attributes)):
        raise BadAttributes(f"its caption_attributes name {unknown[0]!r:.60}, which it has no attribute of")
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _parsed(value: Any) -> Any:
    """A value of CSV, which is text, as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value
