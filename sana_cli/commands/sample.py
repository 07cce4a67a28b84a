"""`sana sample`: prompts to pictures with a trained checkpoint. Encoder and transformer take turns on the device.

It prints nothing and knows nothing of training: a step folder holds all it needs.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sana_cli import checkpoint, draw, files
from sana_cli.config import SampleConfig, load_config
from sana_cli.device import peak_memory, release_memory, resolve_device
from sana_cli.errors import SanaError
from sana_cli.text import CaptionEncoder, check_same_encoder, load_encoder, text_config

OFFLOADS = ("auto", "model", "none")
WEIGHTS = ("ema", "raw")


@dataclass(frozen=True)
class SampleOptions:
    """What to draw, and how. `None` takes what the checkpoint has on record."""

    prompts: tuple[str, ...] = ()
    checkpoint: Path | None = None  # None: the newest whole one under runs/
    prompts_file: Path | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    solver: str | None = None
    flow_shift: float | None = None
    seed: int | None = None
    negative_prompt: str | None = None
    images_per_prompt: int = 1
    height: int | None = None
    width: int | None = None
    weights: str = "ema"
    device: str = "auto"
    offload: str = "auto"
    encoder: str | None = None  # where the recorded encoder lies, if its name does not tell
    out: Path | None = None
    separate: Path | None = None
    trajectory: Path | None = None


@dataclass(frozen=True)
class SampleStep:
    """Progress: "encode", then solver steps over all batches."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class SampleSummary:
    """What was drawn, and where it is."""

    checkpoint: Path
    saved: tuple[Path, ...]
    images: tuple[dict[str, Any], ...]  # prompt, seed, and file where each has its own
    settings: SampleConfig
    pixels: Tensor  # (B, C, H, W) uint8
    seconds: float
    peak_memory: int


def _settings(options: SampleOptions, record: dict[str, Any]) -> SampleConfig:
    """The recorded sampling defaults with what the options say instead."""
    given = {
        key: getattr(options, key)
        for key in ("steps", "guidance_scale", "guidance_interval", "solver", "flow_shift", "seed")
        if getattr(options, key) is not None
    }
    try:
        settings = SampleConfig.model_validate({**record["sample"], **given})
    except ValidationError as error:
        lines = [f"--{str(e['loc'][0]).replace('_', '-')}: {e['msg'][0].lower()}{e['msg'][1:]}" for e in error.errors()]
        raise SanaError(*lines, exit_code=2) from error
    low, high = settings.guidance_interval
    if low >= high:
        raise SanaError(f"--guidance-interval: {low} must be below {high}", exit_code=2)
    return settings


def _prompts(options: SampleOptions, record: dict[str, Any]) -> tuple[str, ...]:
    lines: list[str] = []
    if options.prompts_file is not None:
        try:
            lines = options.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SanaError(f"--prompts-file: {options.prompts_file} cannot be read as text: {error}", exit_code=2) from error
    prompts = tuple(prompt for prompt in (*options.prompts, *lines) if prompt.strip())
    if not prompts:
        known = " ".join(repr(caption) for caption in record["example_captions"][:4])
        raise SanaError(
            "nothing to draw: give prompts, or --prompts-file with one a line",
            f"this checkpoint was trained on captions such as {known}",
            exit_code=2,
        )
    return prompts


def _shape(options: SampleOptions, record: dict[str, Any], patch: int) -> tuple[int, int, int]:
    image = record["image"]
    height, width = options.height or image["height"], options.width or image["width"]
    for name, side in (("height", height), ("width", width)):
        if side < 1 or side % patch:
            raise SanaError(f"--{name}: {side} is not a multiple of the patch size {patch}", exit_code=2)
    return image["channels"], height, width


def _encoder_path(options: SampleOptions, folder: Path, record: dict[str, Any]) -> str:
    """Where the encoder lies: as told, as the run's config beside the checkpoint says, or as it is called."""
    name = str(record["encoder"]["encoder"])
    if options.encoder is not None:
        return options.encoder
    config = folder.resolve().parents[1] / "config.yaml"
    if name != "tiny" and config.is_file():
        try:
            there = load_config(str(config)).text.encoder
        except SanaError:  # not a config of ours, so it says nothing
            return name
        if Path(there).is_absolute() and Path(there).name == name and Path(there).is_dir():
            return there
    return name


def _load_encoder(options: SampleOptions, folder: Path, record: dict[str, Any], device: torch.device) -> CaptionEncoder:
    path = _encoder_path(options, folder, record)
    try:
        encoder = load_encoder(text_config(record["encoder"], path), device)
    except SanaError as error:
        raise SanaError(
            str(error), f"prompts are encoded by what {folder.name} was trained with; --encoder PATH says where that lies"
        ) from error
    check_same_encoder(
        record["encoder"],
        encoder.fingerprint,
        str(folder),
        "--encoder PATH must be the model that the checkpoint was trained with",
    )
    return encoder


def sample(options: SampleOptions) -> Iterator[SampleStep | SampleSummary]:
    """Draw; yields progress, and at the end a `SampleSummary`.

    Under `offload` "auto" and "model" the encoder is freed before the transformer is loaded; "none" holds both.

    Raises:
        SanaError: no checkpoint, an encoder that cannot be had or is another one, an impossible setting, a full disk.
    """
    start = time.perf_counter()
    for name, value, allowed in (("weights", options.weights, WEIGHTS), ("offload", options.offload, OFFLOADS)):
        if value not in allowed:
            raise SanaError(f"--{name}: {value!r} is not one of {', '.join(allowed)}", exit_code=2)
    folder = checkpoint.find_checkpoint(options.checkpoint)
    record = checkpoint.read_record(folder)
    settings, prompts = _settings(options, record), _prompts(options, record)
    shape = _shape(options, record, checkpoint.read_model_config(folder).patch_size)
    cells = draw.grid_cells(draw.prompt_rows(prompts, record["one_word_captions"]), options.images_per_prompt, settings.seed)
    flat = [cell for row in cells for cell in row]
    device = resolve_device(options.device)

    yield SampleStep("encode", 0, 1)
    wanted = [cell.prompt for cell in flat] + ([options.negative_prompt] if options.negative_prompt else [])
    encoder: CaptionEncoder | None = _load_encoder(options, folder, record, device)
    assert encoder is not None
    states = dict(encoder.encode(wanted))
    if options.offload != "none":
        encoder = None
        release_memory(device)
    yield SampleStep("encode", 1, 1)

    if options.negative_prompt:
        null_caption = states[options.negative_prompt]
    else:
        null_caption = files.read_tensors(folder / checkpoint.NULL_CAPTION)["states"]
    model = checkpoint.load_transformer(folder, options.weights, device)
    drawn = draw.draw(
        model,
        [states[cell.prompt] for cell in flat],
        null_caption,
        [cell.seed for cell in flat],
        shape,
        settings,
        record["precision"],
    )
    last: dict[int, draw.DrawStep] = {}
    frames: dict[int, dict[int, Tensor]] = {}  # by solver step, by first image of the batch
    for step in drawn:
        last[step.first] = step
        if options.trajectory is not None:
            frames.setdefault((step.done - 1) % settings.steps, {})[step.first] = draw.to_pixels(step.images)
        yield SampleStep("draw", step.done, step.total)
    images = draw.final_images(last.values())
    if not images.isfinite().all():
        raise SanaError(f"the images of {folder} are not finite", "try --solver euler, or a smaller --guidance-scale")
    pixels = draw.to_pixels(images)
    try:
        saved, listing = _write(options, folder, settings, cells, pixels)
        if options.trajectory is not None:
            noise = torch.stack([draw.initial_noise(cell.seed, shape) for cell in flat])
            sheets = [draw.to_pixels(noise), *(torch.cat([by[first] for first in sorted(by)]) for by in frames.values())]
            draw.save_gif([draw.grid(sheet, cells) for sheet in sheets], options.trajectory)
            saved = (*saved, options.trajectory)
    except OSError as error:
        raise files.storage_error(error, "writing the pictures (--out PNG says where)") from error
    yield SampleSummary(folder, saved, listing, settings, pixels, time.perf_counter() - start, peak_memory(device))


def _write(
    options: SampleOptions, folder: Path, settings: SampleConfig, cells: list[list[draw.Cell]], pixels: Tensor
) -> tuple[tuple[Path, ...], tuple[dict[str, Any], ...]]:
    """The grid, or a file for each image; returns the files, and what each image is."""
    place, name = _beside(folder)
    more = {"weights": options.weights, "size": list(pixels.shape[1:])}
    if options.negative_prompt:
        more["negative_prompt"] = options.negative_prompt
    flat = [cell for row in cells for cell in row]
    if options.separate is not None:
        paths = []
        for index, (cell, image) in enumerate(zip(flat, pixels, strict=True)):
            word = re.sub(r"\W+", "-", cell.prompt.lower())[:40].strip("-")
            path = options.separate / f"{index:04d}-{word or 'image'}.png"
            draw.save_png(draw.to_image(image), path, draw.grid_record([[cell]], settings, name, **more))
            paths.append(path)
        return tuple(paths), tuple(
            {"prompt": cell.prompt, "seed": cell.seed, "file": str(path)} for cell, path in zip(flat, paths, strict=True)
        )
    path = options.out or _free_name(place / f"sample-{folder.resolve().name}.png")
    draw.save_png(draw.grid(pixels, cells), path, draw.grid_record(cells, settings, name, **more))
    return (path,), tuple({"prompt": cell.prompt, "seed": cell.seed} for cell in flat)


def _beside(folder: Path) -> tuple[Path, str]:
    """Where pictures of a checkpoint go, and its name in their record: the run that it lies in, or the folder around it."""
    whole = folder.resolve()
    in_run = whole.parent.name == "checkpoints"
    place = whole.parents[1] if in_run else whole.parent
    name = f"{place.name}/{whole.name}" if in_run else whole.name
    return (place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place), name


def _free_name(path: Path) -> Path:
    """`path`, or with -2, -3, ... where that is taken: no picture is overwritten unless `--out` says so."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free
