"""Grids of images with their prompts, as files that say how they were made."""

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
from sana_cli.sampling import labels
from sana_cli.units import as_json

PNG_KEY = "sana"
GRID_GAP = 4
MIN_CELL = 64  # small images are enlarged by a whole factor, so that a person sees them
MAX_CELL = 192  # and no further, for the sake of a long label
FONT_SIZE, LARGEST_FONT = 12, 20  # pixels, of a label
QUALITY = 95  # of JPEG and WebP
MOST_EXIF_BYTES = 65_500  # of a JPEG
MOST_PIXELS_OF = {"JPEG": 65_500, "WEBP": 16_383, "GIF": 65_535}  # to a side


def to_image(pixels: Tensor) -> Image.Image:
    """One (C, H, W) uint8 tensor of one or three channels as a picture."""
    array = pixels.numpy()
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


@dataclass(frozen=True)
class Cell:
    """A place of a grid: which image, and what was asked for."""

    prompt: str
    seed: int


def prompt_rows(prompts: Sequence[str], one_word: bool) -> list[tuple[str, ...]]:
    """Rows of a grid. Where captions are single words, each word of a prompt is an image; else each prompt is."""
    if one_word:
        return [tuple(prompt.split()) for prompt in prompts]
    return [(prompt,) for prompt in prompts]


def grid_cells(rows: Sequence[Sequence[str]], images_per_prompt: int, seed: int) -> list[list[Cell]]:
    """The cells of a grid: image i, counted row by row, has seed + i. Rows of one image each are set side by side."""
    repeated = [[prompt for prompt in row for _ in range(images_per_prompt)] for row in rows]
    if len(repeated) > 1 and all(len(row) == 1 for row in repeated):
        column = [row[0] for row in repeated]
        across = min(8, math.ceil(math.sqrt(len(column))))
        repeated = [column[at : at + across] for at in range(0, len(column), across)]
    seeds = itertools.count(seed)
    return [[Cell(prompt, next(seeds)) for prompt in row] for row in repeated]


def grid_record(cells: Sequence[Sequence[Cell]], settings: SampleConfig, name: str, **more: Any) -> dict[str, Any]:
    """What a grid's PNG says of itself: settings, and each prompt with its seed."""
    return {
        "made_by": f"sana {__version__}",
        "checkpoint": name,
        "settings": settings.model_dump(mode="json", exclude={"prompts", "seed"}),
        **more,
        "images": [[{"prompt": cell.prompt, "seed": cell.seed} for cell in row] for row in cells],
    }


@dataclass(frozen=True)
class _Layout:
    """Where things go on a sheet, in pixels."""

    size: tuple[int, int]  # width and height of the whole
    cell: tuple[int, int]
    line_height: int
    label_heights: Sequence[int]  # of each row
    told: Mapping[str, tuple[labels.Font, Sequence[str]]]  # by prompt: the font, and its lines


def _layout(height: int, width: int, rows: Sequence[Sequence[Cell]]) -> _Layout:
    factor = max(1, -(-MIN_CELL // min(height, width)))
    prompts = {cell.prompt: labels.one_line(cell.prompt) for row in rows for cell in row}
    longest = max(font.getlength(text) for font, text in (labels.readable(text, FONT_SIZE) for text in prompts.values()))
    while factor * width < longest and (factor + 1) * width <= MAX_CELL:
        factor += 1
    cell_height, cell_width = height * factor, width * factor
    size = FONT_SIZE if longest > cell_width / 2 else max(FONT_SIZE, min(cell_height // 5, LARGEST_FONT))
    told = {}
    for prompt, text in prompts.items():
        font, spelt = labels.readable(text, size)
        told[prompt] = (font, labels.wrap(spelt, font, cell_width))
    line_height = max(int(font.getbbox("Aygj")[3]) for font, _ in told.values()) + 4
    label_heights = [line_height * max(len(told[cell.prompt][1]) for cell in row) for row in rows]
    across = max(map(len, rows)) * (cell_width + GRID_GAP) + GRID_GAP
    down = sum(cell_height + label + GRID_GAP for label in label_heights) + GRID_GAP
    return _Layout((across, down), (cell_width, cell_height), line_height, label_heights, told)


def check_grid(
    name: str, path: Path, formats: Mapping[str, str], height: int, width: int, rows: Sequence[Sequence[Cell]]
) -> None:
    """Refuse a grid that its format has no room for, before anything is drawn.

    Raises:
        SanaError: it is larger than the format's largest picture. `name` is what the message calls the output.
    """
    kind = outputs.format_of(name, path, formats)
    across, down = _layout(height, width, rows).size
    most = MOST_PIXELS_OF.get(kind)
    if most is not None and max(across, down) > most:
        raise SanaError(
            f"{name}: {path}: a grid of {across:,} x {down:,} pixels, where {kind} has {most:,} to a side at most",
            "use .png, fewer prompts at once, or --separate DIR",
            exit_code=2,
        )


def grid(pixels: Tensor, rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """A picture of all images (B, C, H, W), row by row, each under its prompt, which may take several lines."""
    height, width = pixels.shape[-2:]
    layout = _layout(height, width, rows)
    cell_width, cell_height = layout.cell
    sheet = Image.new("RGB", layout.size, "white")
    pen = ImageDraw.Draw(sheet)
    images, top = iter(pixels), GRID_GAP
    for row, label_height in zip(rows, layout.label_heights, strict=True):
        for x, cell in enumerate(row):
            left = GRID_GAP + x * (cell_width + GRID_GAP)
            font, lines = layout.told[cell.prompt]
            first = top + label_height - layout.line_height * len(lines)  # short ones stand next to their image
            for number, line in enumerate(lines):
                place = (left + cell_width / 2, first + number * layout.line_height)
                pen.text(place, line, font=font, fill="black", anchor="ma")
            picture = to_image(next(images)).resize(layout.cell, Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top + label_height))
        top += label_height + cell_height + GRID_GAP
    return sheet


def save_picture(image: Image.Image, path: Path, record: Mapping[str, Any]) -> bool:
    """Write a picture, in the format of its suffix, that says how it was made; `read_record` gives it back.

    A PNG has it in its `sana` text chunk (JSON), a JPEG or WebP in the Exif field ImageDescription. Other tools' `parameters`
    stand beside it, in a text chunk, or in UserComment. False where the record is too long for a JPEG, which goes without.
    """
    kind = outputs.format_of("the picture", path, outputs.PICTURES)
    options: dict[str, Any] = {"quality": QUALITY}
    remembers = True
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt(PNG_KEY, as_json(record))
        info.add_itxt("parameters", _parameters(record))
        options = {"pnginfo": info}
    else:
        raw = _exif(record, with_parameters=True)
        if kind == "JPEG" and len(raw) > MOST_EXIF_BYTES:
            raw = _exif(record, with_parameters=False)
        remembers = kind != "JPEG" or len(raw) <= MOST_EXIF_BYTES
        options |= {"exif": raw} if remembers else {}
    with files.whole_file(path) as partial:
        image.save(partial, format=kind, **options)
    return remembers


def _exif(record: Mapping[str, Any], with_parameters: bool) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(record)  # ASCII
    if with_parameters:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + _parameters(record).encode("utf-16-be")
    return exif.tobytes()


def _parameters(record: Mapping[str, Any]) -> str:
    """The same in the words of other tools' `parameters` chunk: prompts, then settings by name."""
    cells, settings = [cell for row in record["images"] for cell in row], record["settings"]
    told = {"Steps": settings["steps"], "Sampler": settings["solver"], "CFG scale": settings["guidance_scale"]}
    told |= {"Seed": cells[0]["seed"], "Model": record["checkpoint"], "Version": record["made_by"]}
    if "weights_sha256" in record:
        told["Model hash"] = record["weights_sha256"][:10]  # as much of it as other tools give
    text = "\n".join(cell["prompt"] for cell in cells) + "\n" + ", ".join(f"{key}: {value}" for key, value in told.items())
    return text.encode("utf-8", "backslashreplace").decode()


def read_record(path: Path) -> dict[str, Any]:
    """How a picture of ours was made.

    Raises:
        SanaError: it is no PNG, JPEG or WebP, or not one of ours.
    """
    try:
        with Image.open(path, formats=sorted(set(outputs.PICTURES.values()))) as image:
            image.load()
            text = getattr(image, "text", {}).get(PNG_KEY) or image.getexif().get(ExifTags.Base.ImageDescription)
            if not isinstance(text, str) or not text.startswith("{"):  # cameras write an ImageDescription too
                raise SanaError(
                    f"{path} does not say how it was made", "only pictures that sana wrote carry their prompts and settings"
                )
            return records.checked(records.Picture, json.loads(text), path)
    except (OSError, ValueError, TypeError, SyntaxError, RecursionError, Image.DecompressionBombError) as error:
        raise SanaError(f"{path} is not a picture that can be read: {error}") from error


def save_film(frames: Sequence[Image.Image], path: Path) -> None:
    """An animation of the images appearing, its last frame held for two seconds: GIF, WebP or PNG, as its suffix says."""
    durations = [80] * (len(frames) - 1) + [2000]
    kind = outputs.format_of("the film", path, outputs.FILMS)
    with files.whole_file(path) as partial:
        frames[0].save(partial, format=kind, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)
