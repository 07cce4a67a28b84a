"""Labels of grids: legible in any script, complete on several lines."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageFont

from sana_cli.sampling import labels, pictures


@pytest.fixture
def only_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with no font but Pillow's."""
    monkeypatch.setattr(labels, "fonts", lambda size: (ImageFont.load_default(size),))


def test_what_a_font_lacks_comes_from_another_one_or_is_spelt_out(
    only_pillows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text = labels.readable("a 中 é", 12)
    assert text.startswith("a \\u4e2d ")
    assert labels.readable("plain", 12)[1] == "plain"
    monkeypatch.undo()
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setattr(labels, "SYSTEM_FONTS", ())
    labels.fonts.cache_clear()
    font, text = labels.readable("Жук é ß €", 12)
    assert text == "Жук é ß €"
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert isinstance(font.path, str)
    assert Path(font.path).is_relative_to(Path(matplotlib.__file__).parent)
    assert labels.readable("a 中", 12)[1] == "a \\u4e2d", "this font lacks it too"
    labels.fonts.cache_clear()


def test_every_letter_that_is_drawn_is_a_letter(only_pillows: None) -> None:
    """No letter of a label is drawn as the box for a missing one."""
    font, text = labels.readable("日本語 한국어 العربية", 12)
    boxes = bytes(font.getmask(labels.NO_CHARACTER))
    assert all(bytes(font.getmask(letter)) != boxes for letter in set(text) - {" "})


def test_wrapping_keeps_every_word_in_lines_that_fit() -> None:
    font = ImageFont.load_default(12)
    text = "a scarlet macaw on a branch beside an extraordinarily-long-hyphenated-word and a cat"
    lines = labels.wrap(text, font, 90, most_lines=50)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert max(font.getlength(line) for line in lines) <= 90
    assert len(lines) > 3
    cut = labels.wrap(text, font, 90, most_lines=2)
    assert len(cut) == 2
    assert cut[1].endswith("…")
    assert max(font.getlength(line) for line in cut) <= 90
    assert labels.wrap("", font, 90) == [""]
    assert labels.wrap("iii", font, 1) == ["i", "i", "i"], "a cell narrower than a letter"


@given(st.lists(st.text("abcdefghij,", min_size=1, max_size=9), max_size=14), st.integers(20, 200))
def test_lines_are_even_and_no_more_than_they_have_to_be(words: list[str], width: int) -> None:
    """As narrow as the number of lines of greedy wrapping allows; every break is between words."""
    text, font = " ".join(words), ImageFont.load_default(12)
    even = labels.even_width(text, font, width)
    greedy, lines = labels.wrap(text, font, width, 99), labels.wrap(text, font, even, 99)
    assert even <= width
    assert len(lines) == len(greedy)
    assert "".join(lines).replace(" ", "") == "".join(words)
    widest = max(map(font.getlength, words), default=0)
    if widest < width:
        assert " ".join(lines) == text, "no word is broken"
        assert even < widest + 1 or len(labels.wrap(text, font, even - 1, 99)) > len(lines)


def test_the_last_line_is_no_single_word_where_it_need_not_be() -> None:
    text = "a tall orange monster with white horns and three eyes, frowning, on black"
    assert labels.wrap(text, ImageFont.load_default(12), 192)[-1] == "black"
    assert labels.fit(text, 12, 192).lines == [
        "a tall orange monster with", "white horns and three", "eyes, frowning, on black"
    ]  # fmt: skip


def test_a_long_prompt_is_whole_in_the_grid_and_hides_no_image() -> None:
    rows = [
        [pictures.Cell("4", 0), pictures.Cell("a long prompt " * 6, 1)],
        [pictures.Cell("two", 2), pictures.Cell("x", 3)],
    ]
    pixels = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 1, 32, 32) * 60 + 7
    sheet = np.asarray(pictures.grid(pixels, rows).convert("L"))
    for number in range(4):
        assert (sheet == 60 * number + 7).sum() >= 64 * 64, "each image is complete"
    short = np.asarray(
        pictures.grid(pixels, [[pictures.Cell("4", 0), pictures.Cell("6", 1)], rows[1]]).convert("L")
    )
    assert sheet.shape[0] > short.shape[0]
