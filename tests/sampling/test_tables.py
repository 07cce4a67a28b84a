"""Templates with braces: expanded row by row, or refused in one message."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana_cli.errors import SanaError
from sana_cli.sampling.tables import Table, check_single_words, parse_table


def test_two_pairs_are_rows_and_columns() -> None:
    assert parse_table("a {red, dark blue } monster with {horns,a crown,antennae}, on black") == Table(
        title="a […] monster with […], on black",
        rows=("red", "dark blue"),
        columns=("horns", "a crown", "antennae"),
        prompts=(
            (
                "a red monster with horns, on black",
                "a red monster with a crown, on black",
                "a red monster with antennae, on black",
            ),
            (
                "a dark blue monster with horns, on black",
                "a dark blue monster with a crown, on black",
                "a dark blue monster with antennae, on black",
            ),
        ),
    )


def test_one_pair_is_a_row() -> None:
    assert parse_table("{4,four,7}") == Table("", ("",), ("4", "four", "7"), (("4", "four", "7"),))
    assert parse_table("a {red} cat").prompts == (("a red cat",),)
    assert parse_table("{a,b}, {c}").title == "", "there is no word in it"


CHOICES = st.lists(st.text("abc é", min_size=1, max_size=5).filter(str.strip), min_size=1, max_size=5)
TEXT = st.text('xyz ,.\\n"', max_size=6)


@given(CHOICES, CHOICES, TEXT, TEXT, TEXT)
def test_every_pair_of_choices_is_a_prompt(
    rows: list[str], columns: list[str], first: str, middle: str, last: str
) -> None:
    table = parse_table(f"{first}{{{','.join(rows)}}}{middle}{{{','.join(columns)}}}{last}")
    assert [prompt for row in table.prompts for prompt in row] == [
        first + row.strip() + middle + column.strip() + last
        for row, column in itertools.product(rows, columns)
    ]
    assert [len(row) for row in table.prompts] == [len(columns)] * len(rows)
    assert list(table.rows) == [row.strip() for row in rows]
    assert list(table.columns) == [column.strip() for column in columns]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("a monster", "has no braces"),
        ("", "has no braces"),
        ("{a}{b}{c}", "has 3 pairs of braces, where a table has one or two"),
        ("{a}{b}{c}{d,e}", "has 4 pairs of braces"),
        ("a {red,} monster", "has an empty choice"),
        ("{a,b} {c, ,d}", "has an empty choice"),
        ("{}", "has an empty choice"),
        ("a {red", "has a brace without its other half"),
        ("a red}", "has a brace without its other half"),
        ("}a{", "has a brace without its other half"),
        ("{a} b}", "has a brace without its other half"),
        ("{a,{b,c}}", "has braces in braces"),
        ("{{a,b}}", "has braces in braces"),
        ("{a {b,c}", "a brace that is not closed"),
    ],
)
def test_what_is_no_table_is_refused(template: str, problem: str) -> None:
    with pytest.raises(SanaError, match=problem) as refused:
        parse_table(template)
    assert str(refused.value).startswith(f"`grid`: {template!r} has ")
    assert refused.value.exit_code == 2


@given(st.text("{},a ", max_size=12))
def test_a_template_is_a_table_or_a_mistake(template: str) -> None:
    try:
        table = parse_table(template)
    except SanaError as refused:
        assert refused.exit_code == 2
        return
    assert template.count("{") == template.count("}") in (1, 2)
    assert not any(brace in prompt for row in table.prompts for prompt in row for brace in "{}")
    assert all(choice and choice == choice.strip() for choice in table.columns)


def test_single_words() -> None:
    check_single_words(parse_table("{4, four}"))
    check_single_words(parse_table(" {4,7}{a,b} "))
    with pytest.raises(SanaError, match="`grid`: 'a 4' is not a single word, as the captions of this"):
        check_single_words(parse_table("{a,b} {4,7}"))
