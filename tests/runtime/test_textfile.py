"""Text files in the encodings and line ends that people use."""

import codecs
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana_cli.runtime import textfile


@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n\ufeff", exclude_categories=["Cs"])), max_size=6)
)
def test_lines_end_where_people_end_them_and_nowhere_else(lines: list[str]) -> None:
    """U+2028, form feeds and others at which str.splitlines breaks are text."""
    for end in ("\n", "\r\n", "\r"):
        assert textfile.split_lines("".join(line + end for line in lines)) == lines


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_byte_order_mark_is_no_text(mark: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(mark + "früh\r\nspät\u2028noch\rimmer".encode())
    assert textfile.split_lines(textfile.read(path)) == ["früh", "spät\u2028noch", "immer"]
    assert list(textfile.read_lines(path)) == ["früh", "spät\u2028noch", "immer"]


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-32", "UTF-32")],
)
def test_other_encodings_are_named(encoding: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes("a red cube\n".encode(encoding))
    for read in (
        textfile.read,
        lambda path: list(textfile.read_lines(path)),
    ):
        with pytest.raises(textfile.NotTextError, match=f"{name}; save it as UTF-8"):
            read(path)


def test_one_bad_line_spoils_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(b"good\nb\xffd\nalso good")
    lines = list(textfile.read_lines(path))
    assert [textfile.is_utf8(line) for line in lines] == [True, False, True]
    with pytest.raises(textfile.NotTextError, match="invalid start byte at byte 6"):
        textfile.read(path)
    with pytest.raises(textfile.NotTextError, match="over 3 bytes"):
        textfile.read(path, most_bytes=3)
