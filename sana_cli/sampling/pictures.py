"""Grids and tables of images with their prompts, and picture files that record how they were made.

It knows no model: images come as tensors, settings as records.
"""

import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageDraw, PngImagePlugin
from torch import Tensor

from sana_cli import __version__
from sana_cli.config.keys import SampleConfig
from sana_cli.errors import SanaError
from sana_cli.runtime import files, outputs, records
from sana_cli.runtime.records import Drawn, Picture
from sana_cli.sampling import labels
from sana_cli.sampling.labels import Font, Label
from sana_cli.sampling.tables import Table
from sana_cli.units import as_json

PNG_KEY = "sana"
GRID_GAP = 4  # pixels, also between a label and the next
WIDE_GAP = 12  # pixels, between rows of long labels, and between the columns of a table
MIN_CELL = 64  # pixels; smaller images are enlarged by a whole factor
TABLE_CELL = 128  # pixels; the same in a table of few columns
FEW_COLUMNS = 8
MAX_CELL = 192  # pixels; images are enlarged up to this for a long label
MOST_IN_ROW = 8  # images of a single prompt
QUALITY = 95  # of JPEG and WebP
MOST_EXIF_BYTES = 65_500  # of a JPEG
MOST_PIXELS_OF = {"JPEG": 65_500, "WEBP": 16_383, "GIF": 65_535}  # to a side


def to_image(pixels: Tensor) -> Image.Image:
    """A picture from a uint8 tensor (C, H, W) of one or three channels."""
    array = pixels.numpy()
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


@dataclass(frozen=True)
class Cell:
    """An image of a grid: its prompt and its seed."""

    prompt: str
    seed: int
    size: tuple[int, ...] | None = None  # channels, height, width, where images of the grid differ


def prompt_rows(prompts: Sequence[str], one_word: bool) -> list[tuple[str, ...]]:
    """Rows of a grid: an image for each prompt, or with one-word captions, for each word."""
    if one_word:
        return [tuple(prompt.split()) for prompt in prompts]
    return [(prompt,) for prompt in prompts]


def grid_cells(rows: Sequence[Sequence[str]], images_per_prompt: int, seed: int) -> list[list[Cell]]:
    """The cells of a grid. Image i, counted row by row, has seed + i.

    If each prompt has a single image, several of these share a row. Many images of a single
    prompt take several rows.
    """
    alone = len(rows) == len(rows[0]) == 1 and images_per_prompt > MOST_IN_ROW
    if alone or (images_per_prompt == 1 and all(len(row) == 1 for row in rows)):
        column = [prompt for row in rows for prompt in row for _ in range(images_per_prompt)]
        across = _across(len(column))
        rows = [column[first : first + across] for first in range(0, len(column), across)]
        return table_cells(rows, 1, seed)
    return table_cells(rows, images_per_prompt, seed)


def _across(count: int) -> int:
    """How many of `count` images share a row: nearly a square, with few places left over."""
    side = min(MOST_IN_ROW, math.ceil(math.sqrt(count)))
    return min(side, min(MOST_IN_ROW, side + 1), key=lambda across: -count % across)


def table_cells(rows: Sequence[Sequence[str]], images_per_prompt: int, seed: int) -> list[list[Cell]]:
    """The cells of a table, whose rows stay as they are. Seeds as in `grid_cells`."""
    seeds = itertools.count(seed)
    return [[Cell(prompt, next(seeds)) for prompt in row for _ in range(images_per_prompt)] for row in rows]


def grid_record(cells: Sequence[Sequence[Cell]], settings: SampleConfig, name: str, **more: Any) -> Picture:
    """The record in a grid's file: settings, and each prompt with its seed."""
    return Picture(
        made_by=f"sana {__version__}",
        checkpoint=name,
        settings=settings.model_dump(mode="json", exclude={"prompts", "seed"}),
        **more,
        images=[[_drawn(cell) for cell in row] for row in cells],
    )


def _drawn(cell: Cell) -> Drawn:
    drawn = Drawn(prompt=cell.prompt, seed=cell.seed)
    return drawn if cell.size is None else drawn.but(size=list(cell.size))


@dataclass(frozen=True)
class _Line:
    """A line of text on a sheet, in pixels. `anchor`: which point of it `at` is, as Pillow has it."""

    at: tuple[float, float]
    text: str
    font: Font
    anchor: str


@dataclass(frozen=True)
class _Sheet:
    """Where images and text are on a sheet, in pixels."""

    size: tuple[int, int]  # width and height of the sheet
    cell: tuple[int, int]  # width and height of an image
    places: list[tuple[int, int]]  # left and top of each image
    lines: list[_Line]


def _lines(label: Label, x: float, top: float, line_height: int, anchor: str = "ma") -> list[_Line]:
    """The lines of a label from `top` down, centred at `x`."""
    return [
        _Line((x, top + number * line_height), text, label.font, anchor)
        for number, text in enumerate(label.lines)
    ]


def _sheet(height: int, width: int, rows: Sequence[Sequence[Cell]], table: Table | None) -> _Sheet:
    """The layout for images of this size."""
    return _grid_sheet(height, width, rows) if table is None else _table_sheet(height, width, rows, table)


def _factor(height: int, width: int, least: int, room: float) -> int:
    """How much images are enlarged: to `least` pixels, and if MAX_CELL allows, `room` in width."""
    factor = max(1, -(-least // min(height, width)))
    while factor * width < room and (factor + 1) * width <= MAX_CELL:
        factor += 1
    return factor


def _grid_sheet(height: int, width: int, rows: Sequence[Sequence[Cell]]) -> _Sheet:
    """Each image below its prompt."""
    prompts = {cell.prompt for row in rows for cell in row}
    longest = max(labels.length(prompt, labels.SMALLEST_FONT) for prompt in prompts)
    factor = _factor(height, width, MIN_CELL, longest + 2 * GRID_GAP)
    cell_height, cell_width = height * factor, width * factor
    # short labels are a fifth of a cell, long ones a twenty-fifth
    size = cell_height // 5 if longest <= cell_width / 2 else cell_width // 25
    size = max(labels.SMALLEST_FONT, min(size, labels.LARGEST_FONT))
    fitted = {prompt: labels.fit(prompt, size, cell_width - 2 * GRID_GAP) for prompt in prompts}
    line_height = max(label.line_height for label in fitted.values())
    gap = WIDE_GAP if any(len(label.lines) > 1 for label in fitted.values()) else GRID_GAP
    places, lines, bottom = [], [], GRID_GAP - gap
    for row in rows:
        top = bottom + gap + line_height * max(len(fitted[cell.prompt].lines) for cell in row)
        bottom = top + cell_height
        for column, cell in enumerate(row):
            left = GRID_GAP + column * (cell_width + GRID_GAP)
            places.append((left, top))
            label = fitted[cell.prompt]
            label_top = top - line_height * len(label.lines)  # its last line meets the image
            lines += _lines(label, left + cell_width / 2, label_top, line_height)
    across = max(map(len, rows)) * (cell_width + GRID_GAP) + GRID_GAP
    return _Sheet((across, bottom + GRID_GAP), (cell_width, cell_height), places, lines)


def _table_sheet(height: int, width: int, rows: Sequence[Sequence[Cell]], table: Table) -> _Sheet:
    """The title on top, below it the columns' labels, and the rows' labels at the left."""
    each = len(rows[0]) // len(table.columns)  # images of a cell, side by side
    least = TABLE_CELL if len(rows[0]) <= FEW_COLUMNS else MIN_CELL
    widest = labels.widest_word(table.columns, labels.SMALLEST_FONT)
    factor = _factor(height, width, least, (widest + 2 * GRID_GAP) / each)
    cell_height, cell_width = height * factor, width * factor
    column_width = each * (cell_width + GRID_GAP) - GRID_GAP
    size = max(labels.SMALLEST_FONT, min(cell_width // 8, labels.LARGEST_FONT))
    while size > labels.SMALLEST_FONT and labels.widest_word(table.columns, size) > column_width - GRID_GAP:
        size -= 1
    heads = [labels.fit(text, size, column_width - GRID_GAP) for text in table.columns]
    sides = [labels.fit(text, size, max(cell_width, MAX_CELL)) for text in table.rows]
    side_width = math.ceil(max(label.width for label in sides))
    column_gap = GRID_GAP if each == 1 else WIDE_GAP
    left = GRID_GAP + (side_width + 2 * GRID_GAP if side_width else 0)  # of the first column
    across = left + len(heads) * (column_width + column_gap) - column_gap + GRID_GAP
    title = labels.fit(table.title, size, max(across, 2 * MAX_CELL) - 2 * GRID_GAP)
    if title.width + 2 * GRID_GAP > across:
        wider = math.ceil(title.width) + 2 * GRID_GAP
        left, across = left + (wider - across) // 2, wider
    line_height = max(label.line_height for label in (title, *heads, *sides))
    places, lines, top = [], [], GRID_GAP
    if table.title:
        lines += _lines(title, across / 2, top, line_height)
        top += line_height * len(title.lines) + GRID_GAP
    top += line_height * max(len(label.lines) for label in heads)  # of the first row
    for number, label in enumerate(heads):
        middle = left + number * (column_width + column_gap) + column_width / 2
        lines += _lines(label, middle, top - line_height * len(label.lines), line_height)
    for label in sides:
        label_height = line_height * len(label.lines)
        row_height = max(cell_height, label_height)
        lines += _lines(label, left - 2 * GRID_GAP, top + (row_height - label_height) / 2, line_height, "ra")
        for image in range(each * len(heads)):
            before = image * (cell_width + GRID_GAP) + image // each * (column_gap - GRID_GAP)
            places.append((left + before, top + (row_height - cell_height) // 2))
        top += row_height + GRID_GAP
    return _Sheet((across, top), (cell_width, cell_height), places, lines)


def check_grid(
    name: str,
    path: Path,
    formats: Mapping[str, str],
    height: int,
    width: int,
    rows: Sequence[Sequence[Cell]],
    table: Table | None = None,
) -> None:
    """Refuse a grid that is too large for its file format, before anything is drawn.

    `height` and `width` are those of an image in pixels.

    Raises:
        SanaError: it is larger than the format's largest picture; begins with `name`.
    """
    kind = outputs.format_of(name, path, formats)
    across, down = _sheet(height, width, rows, table).size
    most = MOST_PIXELS_OF.get(kind)
    if most is not None and max(across, down) > most:
        raise SanaError(
            f"{name}: {path}: a grid of {across:,} x {down:,} pixels, "
            f"where {kind} has {most:,} to a side at most",
            "use .png, fewer prompts at once, or `separate` DIR",
            exit_code=2,
        )


def grid(
    pixels: Tensor | Sequence[Tensor], rows: Sequence[Sequence[Cell]], table: Table | None = None
) -> Image.Image:
    """A picture of all images (C, H, W), row by row, each below its prompt or in a table.

    Cells have room for the highest and the widest image; smaller ones are in the middle of theirs.

    Args:
        pixels: uint8, an image for each cell.
        rows: the cells.
        table: labels of rows and columns, in place of each cell's prompt.
    """
    images = list(pixels)
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    layout = _sheet(height, width, rows, table)
    factor = layout.cell[0] // width
    sheet = Image.new("RGB", layout.size, "white")
    pen = ImageDraw.Draw(sheet)
    for line in layout.lines:
        pen.text(line.at, line.text, font=line.font, fill="black", anchor=line.anchor)
    for (left, top), image in zip(layout.places, images, strict=True):
        across, down = (factor * image.shape[side] for side in (2, 1))
        place = left + (layout.cell[0] - across) // 2, top + (layout.cell[1] - down) // 2
        sheet.paste(to_image(image).resize((across, down), Image.Resampling.NEAREST), place)
    return sheet


def save_picture(image: Image.Image, path: Path, record: Picture) -> bool:
    """Write a picture with a record of how it was made, in the format of its suffix.

    A PNG has the record in its `sana` text chunk (JSON), a JPEG or WebP in the Exif field
    ImageDescription. The `parameters` that other tools read are in another text chunk, or in
    UserComment. `read_record` reads the record.

    Returns:
        Whether the record was written: a JPEG has no room for a long one.
    """
    kind = outputs.format_of("the picture", path, outputs.PICTURES)
    options: dict[str, Any] = {"quality": QUALITY}
    fits = True
    if kind == "PNG":
        options = {"pnginfo": _png_info(record)}
    else:
        raw = _exif(record, with_parameters=True)
        if kind == "JPEG" and len(raw) > MOST_EXIF_BYTES:
            raw = _exif(record, with_parameters=False)
        fits = kind != "JPEG" or len(raw) <= MOST_EXIF_BYTES
        options |= {"exif": raw} if fits else {}
    with files.whole_file(path) as partial:
        image.save(partial, format=kind, **options)
    return fits


def to_png(image: Image.Image, record: Picture | None = None) -> bytes:
    """The bytes of a PNG file, as `save_picture` writes it, or without a record."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=None if record is None else _png_info(record))
    return buffer.getvalue()


def _png_info(record: Picture) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PNG_KEY, as_json(record.as_json()))
    info.add_itxt("parameters", _parameters(record))
    return info


def _exif(record: Picture, with_parameters: bool) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(record.as_json())  # ASCII
    if with_parameters:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + _parameters(
            record
        ).encode("utf-16-be")
    return exif.tobytes()


def _parameters(record: Picture) -> str:
    """A record as other tools' `parameters` chunk has it: prompts, then settings by name."""
    settings = record.settings
    parts = {
        "Steps": settings["steps"],
        "Sampler": settings["solver"],
        "CFG scale": settings["guidance_scale"],
    }
    parts |= {"Seed": record.cells[0].seed, "Model": record.checkpoint, "Version": record.made_by}
    if record.weights_sha256 is not None:
        parts["Model hash"] = record.weights_sha256[:10]  # as other tools shorten it
    settings_line = ", ".join(f"{key}: {value}" for key, value in parts.items())
    text = "\n".join([*(cell.prompt for cell in record.cells), settings_line])
    return text.encode("utf-8", "backslashreplace").decode()


def read_record(path: Path) -> Picture:
    """Read the record of how a picture of ours was made.

    Raises:
        SanaError: it is no PNG, JPEG or WebP, or not one of ours.
    """
    try:
        with Image.open(path, formats=sorted(set(outputs.PICTURES.values()))) as image:
            image.load()
            text = getattr(image, "text", {}).get(PNG_KEY) or image.getexif().get(
                ExifTags.Base.ImageDescription
            )
            if not isinstance(text, str) or not text.startswith("{"):  # cameras write an ImageDescription too
                raise SanaError(
                    f"{path} does not say how it was made",
                    "only pictures that sana wrote carry their prompts and settings",
                )
            return records.checked(Picture, json.loads(text), path)
    except (
        OSError,
        ValueError,
        TypeError,
        SyntaxError,
        RecursionError,
        Image.DecompressionBombError,
    ) as error:
        raise SanaError(f"{path} is not a picture that can be read: {error}") from error


def save_film(frames: Sequence[Image.Image], path: Path) -> None:
    """Write an animation (GIF, WebP or PNG, by suffix) that holds its last frame for 2 s."""
    durations = [80] * (len(frames) - 1) + [2000]  # ms
    kind = outputs.format_of("the film", path, outputs.FILMS)
    with files.whole_file(path) as partial:
        frames[0].save(
            partial, format=kind, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0
        )
