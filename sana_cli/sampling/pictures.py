"""Grids of images with their prompts, and picture files that record how they were made.

It knows no model: images come as tensors, settings as records.
"""

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
from sana_cli.sampling.labels import Label
from sana_cli.units import as_json

PNG_KEY = "sana"
GRID_GAP = 4
MIN_CELL = 64  # pixels; smaller images are enlarged by a whole factor
MAX_CELL = 192  # pixels; images are enlarged up to this for a long label
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


def prompt_rows(prompts: Sequence[str], one_word: bool) -> list[tuple[str, ...]]:
    """Rows of a grid: an image for each prompt, or with one-word captions, for each word."""
    if one_word:
        return [tuple(prompt.split()) for prompt in prompts]
    return [(prompt,) for prompt in prompts]


def grid_cells(rows: Sequence[Sequence[str]], images_per_prompt: int, seed: int) -> list[list[Cell]]:
    """The cells of a grid. Image i, counted row by row, has seed + i.

    If each prompt has a single image, several of these share a row.
    """
    repeated = [[prompt for prompt in row for _ in range(images_per_prompt)] for row in rows]
    if len(repeated) > 1 and all(len(row) == 1 for row in repeated):
        column = [row[0] for row in repeated]
        across = min(8, math.ceil(math.sqrt(len(column))))
        repeated = [column[first : first + across] for first in range(0, len(column), across)]
    seeds = itertools.count(seed)
    return [[Cell(prompt, next(seeds)) for prompt in row] for row in repeated]


def grid_record(cells: Sequence[Sequence[Cell]], settings: SampleConfig, name: str, **more: Any) -> Picture:
    """The record in a grid's file: settings, and each prompt with its seed."""
    return Picture(
        made_by=f"sana {__version__}",
        checkpoint=name,
        settings=settings.model_dump(mode="json", exclude={"prompts", "seed"}),
        **more,
        images=[[Drawn(prompt=cell.prompt, seed=cell.seed) for cell in row] for row in cells],
    )


@dataclass(frozen=True)
class _Layout:
    """Sizes on a grid's sheet, in pixels, and its labels."""

    size: tuple[int, int]  # width and height of the sheet
    cell: tuple[int, int]  # width and height of an image
    line_height: int
    label_heights: Sequence[int]  # of each row
    labels: Mapping[str, Label]  # by prompt


def _layout(height: int, width: int, rows: Sequence[Sequence[Cell]]) -> _Layout:
    """The layout of a grid of images of this size."""
    prompts = {cell.prompt for row in rows for cell in row}
    longest = max(labels.length(prompt, labels.SMALLEST_FONT) for prompt in prompts)
    factor = max(1, -(-MIN_CELL // min(height, width)))
    while factor * width < longest and (factor + 1) * width <= MAX_CELL:
        factor += 1
    cell_height, cell_width = height * factor, width * factor
    size = labels.SMALLEST_FONT
    if longest <= cell_width / 2:
        size = max(size, min(cell_height // 5, labels.LARGEST_FONT))
    fitted = {prompt: labels.fit(prompt, size, cell_width) for prompt in prompts}
    line_height = max(label.line_height for label in fitted.values())
    label_heights = [line_height * max(len(fitted[cell.prompt].lines) for cell in row) for row in rows]
    sheet_width = max(map(len, rows)) * (cell_width + GRID_GAP) + GRID_GAP
    sheet_height = sum(cell_height + label_height + GRID_GAP for label_height in label_heights) + GRID_GAP
    return _Layout((sheet_width, sheet_height), (cell_width, cell_height), line_height, label_heights, fitted)


def check_grid(
    name: str, path: Path, formats: Mapping[str, str], height: int, width: int, rows: Sequence[Sequence[Cell]]
) -> None:
    """Refuse a grid that is too large for its file format, before anything is drawn.

    `height` and `width` are those of an image in pixels.

    Raises:
        SanaError: it is larger than the format's largest picture; begins with `name`.
    """
    kind = outputs.format_of(name, path, formats)
    across, down = _layout(height, width, rows).size
    most = MOST_PIXELS_OF.get(kind)
    if most is not None and max(across, down) > most:
        raise SanaError(
            f"{name}: {path}: a grid of {across:,} x {down:,} pixels, "
            f"where {kind} has {most:,} to a side at most",
            "use .png, fewer prompts at once, or `separate` DIR",
            exit_code=2,
        )


def grid(pixels: Tensor, rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """A picture of all images (B, C, H, W), row by row, each below its prompt."""
    height, width = pixels.shape[-2:]
    layout = _layout(height, width, rows)
    cell_width, cell_height = layout.cell
    sheet = Image.new("RGB", layout.size, "white")
    pen = ImageDraw.Draw(sheet)
    images, top = iter(pixels), GRID_GAP
    for row, label_height in zip(rows, layout.label_heights, strict=True):
        for column, cell in enumerate(row):
            left = GRID_GAP + column * (cell_width + GRID_GAP)
            label = layout.labels[cell.prompt]
            y = top + label_height - layout.line_height * len(label.lines)  # its last line meets the image
            for line in label.lines:
                pen.text((left + cell_width / 2, y), line, font=label.font, fill="black", anchor="ma")
                y += layout.line_height
            picture = to_image(next(images)).resize(layout.cell, Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top + label_height))
        top += label_height + cell_height + GRID_GAP
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
        info = PngImagePlugin.PngInfo()
        info.add_itxt(PNG_KEY, as_json(record.as_json()))
        info.add_itxt("parameters", _parameters(record))
        options = {"pnginfo": info}
    else:
        raw = _exif(record, with_parameters=True)
        if kind == "JPEG" and len(raw) > MOST_EXIF_BYTES:
            raw = _exif(record, with_parameters=False)
        fits = kind != "JPEG" or len(raw) <= MOST_EXIF_BYTES
        options |= {"exif": raw} if fits else {}
    with files.whole_file(path) as partial:
        image.save(partial, format=kind, **options)
    return fits


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
