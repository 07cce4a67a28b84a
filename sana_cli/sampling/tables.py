"""Prompts as a table, from a template such as "a {red,blue} monster with {horns,a crown}".

It knows no image and no checkpoint.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sana_cli.errors import SanaError

PLACE = "[…]"  # in a title, where the template has braces


@dataclass(frozen=True)
class Table:
    """The prompts of a template, and the words that label them."""

    title: str  # the template with `PLACE` for its braces; "" if it has no other words
    rows: tuple[str, ...]  # the label of each row; "" for the only row of a single pair of braces
    columns: tuple[str, ...]  # the label of each column
    prompts: tuple[tuple[str, ...], ...]  # row by row


def parse_table(template: str) -> Table:
    """Expand a template: its first pair of braces gives the rows, its second the columns.

    With one pair of braces there is one row. Spaces around a choice do not count.

    Raises:
        SanaError: no braces or more than two pairs, an empty choice, nested or unbalanced
            braces; names `grid`.
    """
    if re.search(r"\{[^}]*\{", template):
        raise _error(template, "braces in braces, or a brace that is not closed")
    parts = re.split(r"\{([^{}]*)\}", template)
    around, inside = parts[::2], parts[1::2]
    if any(brace in text for text in around for brace in "{}"):
        raise _error(template, "a brace without its other half")
    if not inside:
        raise _error(template, "no braces")
    if len(inside) > 2:
        raise _error(template, f"{len(inside)} pairs of braces, where a table has one or two")
    choices = [tuple(choice.strip() for choice in pair.split(",")) for pair in inside]
    if not all(map(all, choices)):
        raise _error(template, "an empty choice")
    has_words = re.search(r"\w", "".join(around)) is not None
    title = _filled(around, [PLACE] * len(choices)) if has_words else ""
    columns = choices[-1]
    if len(choices) == 1:
        return Table(title, ("",), columns, (tuple(_filled(around, [column]) for column in columns),))
    rows = choices[0]
    prompts = tuple(tuple(_filled(around, [row, column]) for column in columns) for row in rows)
    return Table(title, rows, columns, prompts)


def check_single_words(table: Table) -> None:
    """Refuse prompts of several words, for a checkpoint whose captions are single words.

    Raises:
        SanaError: names the first such prompt.
    """
    for prompt in (prompt for row in table.prompts for prompt in row):
        if len(prompt.split()) != 1:
            raise SanaError(
                f"`grid`: {prompt!r} is not a single word, as the captions of this checkpoint are",
                "give a template such as '{4,four,7}'",
                exit_code=2,
            )


def _filled(around: Sequence[str], words: Sequence[str]) -> str:
    """A template with a word in each pair of braces; `around` is the text around these."""
    return "".join(itertools.chain(*itertools.zip_longest(around, words, fillvalue="")))


def _error(template: str, problem: str) -> SanaError:
    return SanaError(
        f"`grid`: {template!r} has {problem}",
        "give a template such as 'a {red,blue} monster with {horns,a crown}', in quotes",
        exit_code=2,
    )
