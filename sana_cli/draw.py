"""From caption states and seeds to pictures: the sampling loop around a transformer, and PNG grids with their record.

`train` and `sample` draw with the same function. It knows neither where captions were encoded nor where weights came from.

Shapes: B images drawn, C H W of a sample, L caption tokens, D caption width.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image, ImageDraw, PngImagePlugin
from torch import Tensor

from sana_cli import __version__, files, flow, labels, outputs, records
from sana_cli.config import ModelConfig, SampleConfig
from sana_cli.device import free_memory, is_out_of_memory, release_memory
from sana_cli.errors import SanaError
from sana_cli.model import SanaTransformer
from sana_cli.text import pad_states
from sana_cli.units import as_json

FALLBACK_IMAGES = 64  # at once, where the system does not say how much memory is free
MOST_IMAGES = 256  # at once: more are no faster, and say later how far they are
SHARE_OF_FREE_MEMORY = 0.5
PNG_KEY = "sana"
GRID_GAP = 4
MIN_CELL = 64  # small images are enlarged by a whole factor, so that a person sees them
MAX_CELL = 192  # and no further, for the sake of a long label
FONT_SIZE, LARGEST_FONT = 12, 20  # pixels, of a label
QUALITY = 95  # of JPEG and WebP
MOST_EXIF_BYTES = 65_500  # of a JPEG
MOST_PIXELS_OF = {"JPEG": 65_500, "WEBP": 16_383, "GIF": 65_535}  # to a side


# --- sampling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DrawStep:
    """After each solver step of each batch: how far, and the images so far."""

    done: int  # solver steps done, over all batches
    total: int
    images: Tensor  # (b, C, H, W) of this batch, at its noise level
    x_0: Tensor  # (b, C, H, W), the data this step points at
    first: int  # index of the batch's first image
    sigma: float


class NoRoomError(SanaError):
    """Not even one image fits into memory. What to do about it depends on the command."""


class Noise:
    """Standard normal noise for images of `seeds`, (b, C, H, W) at each call.

    Every image has a CPU generator of its own, so that it gets the same numbers on every device and in any batch.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        self.generators, self.shape = [torch.Generator().manual_seed(seed) for seed in seeds], shape
        self.device = device

    def __call__(self) -> Tensor:
        """The next noise of every image."""
        drawn = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(self.device)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast, or none for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def images_at_once(config: ModelConfig, shape: tuple[int, int, int], branches: int, device: torch.device) -> int:
    """How many images of `shape` fit beside one another in the memory that is free, 1 at least.

    What lives at once in a pass without gradients is the residual stream, a few tensors as wide, and the Mix-FFN's hidden one
    three times: before its convolution, after it, and in the convolution's own memory.
    """
    free = free_memory(device)
    if free is None:
        return FALLBACK_IMAGES
    tokens = math.prod(shape[1:]) // config.patch_size**2
    width = 8 * config.inner_dim + 3 * 2 * int(config.mlp_ratio * config.inner_dim)
    each = 4 * (branches * tokens * width + 6 * math.prod(shape))
    return max(1, min(MOST_IMAGES, int(SHARE_OF_FREE_MEMORY * free) // each))


@torch.inference_mode()
def draw(
    model: SanaTransformer,
    captions: Sequence[Tensor],
    null_captions: Sequence[Tensor],
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    settings: SampleConfig,
    precision: str,
) -> Iterator[DrawStep]:
    """Draw one image for each of `captions`, states (tokens, D), with the null caption and the seed beside it.

    Where guidance is used, the conditional and the null branch run as one batch, each with its own caption mask. A model
    with `guidance_embeds` is told the scale instead and has no null branch. An image depends on its caption, seed and
    settings, and on nothing else in the call beyond floating-point rounding. Where memory runs out, half as many are drawn at
    once, from the batch on that had no room: a batch may so be yielded twice in part, the second time with fewer images.

    Raises:
        NoRoomError: there is no room for one image.
    """
    assert len(captions) == len(null_captions) == len(seeds), "one of each for every image"
    device = next(model.parameters()).device
    may_guide = not model.config.guidance_embeds and settings.guidance_scale != 1
    at_once = images_at_once(model.config, shape, 2 if may_guide else 1, device)
    sigmas = flow.solver_sigmas(settings.solver, settings.steps, settings.flow_shift)
    first = done = 0
    while first < len(captions):
        end = min(first + at_once, len(captions))
        given = captions[first:end], null_captions[first:end] if may_guide else [], seeds[first:end]
        total, fits = done + settings.steps * -(-(len(captions) - first) // at_once), True
        try:
            for number, step in enumerate(_draw_batch(model, *given, shape, settings, precision, sigmas), 1):
                yield DrawStep(done + number, total, step.x, step.x_0, first, step.sigma)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if at_once == 1:
                raise NoRoomError(
                    f"there is no room on {device} to draw a single image of {' x '.join(map(str, shape))}"
                ) from error
            fits = False
        if fits:
            first, done = end, done + settings.steps
        else:  # this batch again; not in the handler, whose traceback holds the tensors that were too many
            at_once = -(-(end - first) // 2)
            release_memory(device)


def _draw_batch(
    model: SanaTransformer,
    captions: Sequence[Tensor],
    null_captions: Sequence[Tensor],
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    settings: SampleConfig,
    precision: str,
    sigmas: Sequence[float],
) -> Iterator[flow.SolverStep]:
    """The images of one batch, after each solver step. Without `null_captions` there is no guidance."""
    device, count = next(model.parameters()).device, len(captions)
    scale, embeds = settings.guidance_scale, model.config.guidance_embeds
    wanted = [*captions, *null_captions]
    distinct = {id(state): state for state in wanted}  # images that share a caption share its tensor
    place = {key: number for number, key in enumerate(distinct)}
    states, mask = (t.to(device) for t in pad_states(list(distinct.values())))  # (K, L, D), (K, L)
    index = torch.tensor([place[id(state)] for state in wanted], device=device)
    with autocast(device, precision):
        both = model.captions(states.float(), mask, index)
    alone = both.rows(0, count)

    def velocity(x: Tensor, sigma: float) -> Tensor:
        guided = bool(null_captions) and flow.in_interval(sigma, settings.guidance_interval)
        time = flow.model_timestep(settings.solver, sigma, model.config.timestep_scale)
        told = torch.tensor([scale * model.config.guidance_embeds_scale], device=device) if embeds else None
        with autocast(device, precision):
            output = model(
                torch.cat([x, x]) if guided else x, both if guided else alone, torch.tensor([time], device=device), guidance=told
            ).float()
        prediction = flow.guide(output[:count], output[count:], scale) if guided else output
        return flow.velocity_of(prediction, x, sigma, model.config.prediction_type)

    noise = Noise(seeds, shape, device)
    yield from flow.SOLVERS[settings.solver](velocity, noise(), sigmas, noise)


def final_images(drawn: Iterable[DrawStep]) -> Tensor:
    """The images (B, C, H, W) of all batches, in order, from what `draw` yielded."""
    last = {step.first: step.images for step in drawn}
    return torch.cat([last[first].cpu() for first in sorted(last)])


def to_pixels(images: Tensor) -> Tensor:
    """[-1, 1] to uint8, (B, C, H, W), on the CPU."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


# --- pictures ---------------------------------------------------------------------------------------------------------


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
