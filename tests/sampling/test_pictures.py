"""Grids of images, and files that say how they were made."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import sampled, trained
from helpers.steps import drawn
from PIL import GifImagePlugin, Image, ImageDraw

from sana_cli.config.keys import Config
from sana_cli.errors import SanaError
from sana_cli.runtime import files
from sana_cli.sampling import pictures
from sana_cli.sampling.tables import parse_table
from sana_cli.weights import checkpoint


def test_grids_keep_how_they_were_made(step: Path, tmp_path: Path) -> None:
    summary = drawn(
        step, "4 two", "six", out=tmp_path / "grid.png", seed=11, trajectory=tmp_path / "appearing.gif"
    )
    record = pictures.read_record(tmp_path / "grid.png")
    assert record.as_json()["images"] == [
        [{"prompt": "4", "seed": 11}, {"prompt": "two", "seed": 12}], [{"prompt": "six", "seed": 13}]
    ]  # fmt: skip
    assert [(cell.prompt, cell.seed) for cell in record.cells] == [("4", 11), ("two", 12), ("six", 13)]
    assert record.settings["solver"] == "dpm++"
    assert record.checkpoint == "mine"
    with Image.open(tmp_path / "appearing.gif") as gif:
        assert isinstance(gif, GifImagePlugin.GifImageFile)
        assert gif.n_frames == 1 + summary.settings.steps
    with Image.open(tmp_path / "grid.png") as grid:
        cell = max(1, -(-pictures.MIN_CELL // 16)) * 16
        assert grid.width == 2 * (cell + pictures.GRID_GAP) + pictures.GRID_GAP
    separate = drawn(step, "4 two", separate=tmp_path / "each")
    assert [path.name for path in separate.saved] == ["0000-4.png", "0001-two.png"]
    with Image.open(tmp_path / "each" / "0001-two.png") as image:
        assert (image.size, image.mode) == ((16, 16), "L")
        assert image.tobytes() == separate.pixels[1].numpy().tobytes()
    default = drawn(step, "4", out=None), drawn(step, "4", out=None)
    assert [summary.saved[0].name for summary in default] == ["sample-mine.png", "sample-mine-2.png"]
    plain = tmp_path / "plain.png"
    Image.new("L", (4, 4)).save(plain)
    with pytest.raises(SanaError, match="does not say how it was made"):
        pictures.read_record(plain)


def test_sentences_stand_in_a_square() -> None:
    cells = pictures.grid_cells(pictures.prompt_rows([f"a red {n}" for n in range(9)], one_word=False), 1, 0)
    assert [len(row) for row in cells] == [3, 3, 3]
    assert pictures.prompt_rows(["4 two", "six"], one_word=True) == [("4", "two"), ("six",)]
    widths = {  # of the rows for so many sentences: nearly square, with few places left over
        1: [1], 2: [2], 4: [2, 2], 5: [3, 2], 6: [3, 3], 8: [4, 4], 10: [5, 5], 12: [4] * 3, 13: [5, 5, 3],
        16: [4] * 4, 64: [8] * 8, 70: [8] * 8 + [6],
    }  # fmt: skip
    for count, expected in widths.items():
        cells = pictures.grid_cells([(f"a red {n}",) for n in range(count)], 1, 7)
        assert [len(row) for row in cells] == expected
        assert [cell for row in cells for cell in row] == [
            pictures.Cell(f"a red {n}", 7 + n) for n in range(count)
        ]
    strip, square = (pictures.grid_cells([("four",)], count, 3) for count in (8, 64))
    assert [len(row) for row in strip] == [8]
    assert [len(row) for row in square] == [8] * 8
    assert [cell.seed for row in square for cell in row] == list(range(3, 67))
    repeated = pictures.grid_cells([("4", "two")], 2, 5)
    assert [(cell.prompt, cell.seed) for cell in repeated[0]] == [("4", 5), ("4", 6), ("two", 7), ("two", 8)]


def test_pictures_speak_the_language_of_other_tools(config: Config, tmp_path: Path) -> None:
    folder, path = trained(config).checkpoint, tmp_path / "o.png"
    sampled(folder, "4 two", out=path)
    with Image.open(path) as image:
        text = image.info["parameters"]
    assert text.splitlines()[:2] == ["4", "two"]
    assert "Steps: 2, Sampler: dpm++, CFG scale: 2.5, Seed: 0, Model: run/step-000004" in text
    assert pictures.read_record(path).settings["steps"] == 2
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"Model hash: {digest[:10]}" in text
    assert pictures.read_record(path).weights_sha256 == digest
    raw = hashlib.sha256((folder / checkpoint.RAW_WEIGHTS).read_bytes()).hexdigest()
    assert checkpoint.weights_sha256(folder, "raw") == raw != digest
    assert checkpoint.weights_sha256(weights.parent) is None
    metadata = files.read_metadata(weights)
    assert metadata["modelspec.architecture"] == "sana"
    assert metadata["modelspec.title"] == "run step-000004"


# --- where things are on a sheet -----------------------------------------------------------------------------


LONG = (
    "a tall orange monster with white horns and three eyes, frowning, on black",
    "a small round blue monster with a crown, smiling, on white",
    "a red monster",
)


def coloured(count: int, side: int = 32) -> torch.Tensor:
    """Images of one colour each, none of which text has: (B, 3, side, side)."""
    colours = torch.tensor([[200, 40 + number, 90] for number in range(count)], dtype=torch.uint8)
    return colours[:, :, None, None].expand(count, 3, side, side)


def places(sheet: np.ndarray, count: int) -> list[tuple[int, int, int, int]]:
    """Left, top, width and height of each image of `coloured`, which must be whole."""
    found = []
    for number in range(count):
        ys, xs = np.nonzero((sheet == [200, 40 + number, 90]).all(-1))
        box = int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1
        assert len(xs) == box[2] * box[3], "a whole rectangle"
        found.append(box)
    return found


def ink(sheet: np.ndarray, left: int, top: int, right: int, bottom: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the text in a part of a sheet, which must have some."""
    ys, xs = np.nonzero((sheet[top:bottom, left:right] < 128).all(-1))
    return left + int(xs.min()), top + int(ys.min()), left + int(xs.max()) + 1, top + int(ys.max()) + 1


@pytest.mark.parametrize(("count", "side"), [(1, 32), (8, 32), (13, 32), (4, 512), (5, 64)])
def test_long_prompts_are_readable_above_their_images(count: int, side: int) -> None:
    cells = pictures.grid_cells([(LONG[n % len(LONG)],) for n in range(count)], 1, 0)
    sheet = np.asarray(pictures.grid(coloured(count, side), cells))
    found = places(sheet, count)
    assert {box[2:] for box in found} == {(max(side, 192),) * 2}, "enlarged for the long labels"
    assert found == sorted(found, key=lambda box: (box[1], box[0])), "row by row"
    across = len(cells[0])
    for number, (left, top, width, height) in enumerate(found):
        above = 0 if number < across else found[number - across][1] + height
        start, highest, end, lowest = ink(sheet, left, above, left + width, top)
        assert abs(start + end - 2 * left - width) <= 4, "centred"
        assert min(start - left, left + width - end) >= 2, "apart from its neighbours"
        assert top - lowest < 12, "near its image"
        assert number < across or highest - above > top - lowest, "farther from the one above"
    white = (sheet == 255).all(-1)
    assert white[:2].all()
    assert white[:, :2].all()
    assert white[-2:].all()
    assert white[:, -2:].all()


@pytest.mark.parametrize("side", [16, 32, 512])
@pytest.mark.parametrize("each", [1, 3])
def test_a_table_has_its_words_beside_and_above(each: int, side: int) -> None:
    made = parse_table("a {red,dark blue} monster with {horns,a crown,antennae}")
    cells = pictures.table_cells(made.prompts, each, 11)
    sheet = np.asarray(pictures.grid(coloured(6 * each, side), cells, made))
    found = places(sheet, 6 * each)
    lefts, tops = sorted({box[0] for box in found}), sorted({box[1] for box in found})
    assert [box[:2] for box in found] == [(left, top) for top in tops for left in lefts], "row by row"
    assert (len(lefts), len(tops)) == (3 * each, 2)
    (width, height), *others = {box[2:] for box in found}
    assert not others
    assert width == height == max(side, 128 if 3 * each <= 8 else 64)
    for top in tops:
        start, highest, end, lowest = ink(sheet, 0, top, lefts[0], top + height)
        assert 0 < lefts[0] - end < 16, "beside its row"
        assert start >= 2
        assert abs(highest + lowest - 2 * top - height) < 12, "in the middle of its row"
    starts = [*lefts[::each], sheet.shape[1] + 4]
    # the title ends at the first line of pixels without ink below its beginning
    dark = [bool((line < 128).all(-1).any()) for line in sheet[: tops[0]]]
    title_end = dark.index(False, dark.index(True))
    start, _, end, _ = ink(sheet, 0, 0, sheet.shape[1], title_end)
    assert abs(start + end - sheet.shape[1]) <= 4, "the title is centred"
    for column in range(3):
        last = lefts[column * each + each - 1]
        start, _, end, lowest = ink(sheet, starts[column], title_end, last + width, tops[0])
        assert abs(start + end - starts[column] - last - width) <= 4, "above the middle of its images"
        assert 0 < tops[0] - lowest < 16
    if each > 1:
        assert lefts[each] - lefts[each - 1] > lefts[1] - lefts[0], "columns are apart"


def test_one_pair_of_braces_has_no_words_at_the_left() -> None:
    made = parse_table("{4,four,7}")
    sheet = np.asarray(pictures.grid(coloured(3), pictures.table_cells(made.prompts, 1, 0), made))
    assert [box[0] for box in places(sheet, 3)] == [4, 4 + 132, 4 + 264]
    assert sheet.shape[1] == 3 * 132 + 4


def test_a_long_title_widens_its_sheet_and_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made = parse_table(f"{LONG[0]} and with {{antennae}}")
    written: list[str] = []
    text = ImageDraw.ImageDraw.text

    def noted(self: Any, at: Any, line: str, **more: Any) -> None:
        written.append(line)
        text(self, at, line, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    sheet = np.asarray(pictures.grid(coloured(1), pictures.table_cells(made.prompts, 1, 0), made))
    assert " ".join(written).strip() == f"{LONG[0]} and with […] antennae"
    (left, _, width, _), *_ = places(sheet, 1)
    assert abs(2 * left + width - sheet.shape[1]) <= 2
    assert 200 < sheet.shape[1] <= 400


def test_words_of_a_column_are_not_broken() -> None:
    """Where a word is wider than its column, the font is smaller or the images larger."""
    for word in ("extraordinarily", "antidisestablishmentarian"):
        made = parse_table(f"{{{word},b}}")
        sheet = np.asarray(pictures.grid(coloured(2), pictures.table_cells(made.prompts, 1, 0), made))
        (left, top, width, _), _ = places(sheet, 2)
        _, highest, _, lowest = ink(sheet, left, 0, left + width, top)
        assert lowest - highest < 20, "one line"
