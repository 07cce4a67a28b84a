"""`sana sample`: draw pictures for prompts with any SANA.

Encoder, transformer and decoder take turns on the device. It prints nothing.
`sampling/pipeline.py` knows what a transformer needs around it.
"""

import re
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_cli.choices import Offload, Precision, Solver, Weights
from sana_cli.config.keys import SampleConfig
from sana_cli.errors import SanaError
from sana_cli.runtime import files, outputs, textfile
from sana_cli.runtime.device import Stage, peak_memory
from sana_cli.sampling import pictures, sampler
from sana_cli.sampling.conditioning import load_pipeline_encoder, prompt_notes, prompt_states
from sana_cli.sampling.opened import NO_ROOM, Opened, open_checkpoint
from sana_cli.sampling.pipeline import Pipeline
from sana_cli.sampling.tables import Table, check_single_words, parse_table
from sana_cli.text import CaptionEncoder
from sana_cli.weights import checkpoint


@dataclass(frozen=True)
class SampleOptions:
    """What to draw, and how. `None` takes what the checkpoint has on record."""

    prompts: tuple[str, ...] = ()
    checkpoint: Path | None = None  # None: the newest whole one under runs/
    prompts_file: Path | None = None  # `-` is stdin
    grid: str | None = None  # a template with braces, in place of prompts: `tables.parse_table`
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    solver: Solver | None = None
    flow_shift: float | None = None
    seed: int | None = None
    negative_prompt: str | None = None
    images_per_prompt: int = 1
    height: int | None = None
    width: int | None = None
    adapter: tuple[str, ...] = ()  # FILE or FILE:SCALE, put on the checkpoint in this order
    weights: Weights = "ema"
    device: str = "auto"
    offload: Offload = "auto"
    precision: Precision | None = None  # of the transformer; None: as trained, or as stored
    encoder: str | None = None  # a folder or id, if the recorded name is not enough
    instruction: str | None = None  # in place of the family's
    autoencoder: str | None = None  # in place of the family's or the recorded one
    out: str | Path | None = None  # a picture, or a folder (or DIR/) for one
    separate: Path | None = None  # a folder with each image, in place of a grid or beside `out`
    trajectory: str | Path | None = None  # an animation, as `out`
    report: Callable[[str, str], None] = lambda _what, _name: None  # of models loaded and freed


@dataclass(frozen=True)
class SampleStep:
    """Progress: "encode", "draw" (solver steps of all batches), and "decode" (images)."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class SampleSummary:
    """What was drawn, and where it is."""

    checkpoint: Path
    shipped: bool  # the checkpoint comes with the package: `shipped:NAME`, by its folder's name
    saved: tuple[Path, ...]
    images: tuple[dict[str, Any], ...]  # prompt, seed, and file where each has its own
    settings: SampleConfig
    pixels: Tensor  # (B, C, H, W) uint8
    seconds: float
    peak_memory: int
    notes: tuple[str, ...] = ()  # warnings: prompts that were cut, words never trained on


def sample(options: SampleOptions) -> Iterator[SampleStep | SampleSummary]:
    """Draw; yields progress, and at the end a `SampleSummary`.

    With `offload` "auto" and "model" encoder, transformer and decoder are on the device one at
    a time. "none" keeps each.

    Raises:
        SanaError: no checkpoint, an encoder or autoencoder that is missing or does not fit, an
            impossible setting, a full disk.
    """
    start = time.perf_counter()
    job = _prepare(options)
    yield SampleStep("encode", 0, 1)
    captions, nulls, notes = _encode(job)
    yield SampleStep("encode", 1, 1)
    sheets = yield from _draw(job, captions, nulls)
    pixels, *frames = yield from _decode(job, sheets)
    saved, listing, more = _write(job, pixels, frames)
    yield SampleSummary(
        checkpoint=job.opened.place,
        shipped=checkpoint.is_shipped(job.opened.place),
        saved=saved,
        images=listing,
        settings=job.settings,
        pixels=pixels,
        seconds=time.perf_counter() - start,
        peak_memory=peak_memory(job.opened.device),
        notes=(*notes, *job.opened.adapter_notes(), *more),
    )


# --- preparing: everything that can be refused is refused here --------------------------------


@dataclass(frozen=True)
class _Outputs:
    """The files that will be written."""

    grid: Path | None
    separate: tuple[Path, ...]  # one for each image, or none
    trajectory: Path | None


@dataclass(frozen=True)
class _Job:
    """What will be drawn, with what, and where to."""

    options: SampleOptions
    opened: Opened
    settings: SampleConfig
    cells: list[list[pictures.Cell]]  # the grid
    table: Table | None  # its labels, if it is a table
    outputs: _Outputs
    stage: Stage

    @property
    def flat(self) -> list[pictures.Cell]:
        """The cells one by one."""
        return [cell for row in self.cells for cell in row]

    @property
    def prompts(self) -> list[str]:
        """The prompt of each image."""
        return [cell.prompt for cell in self.flat]

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return [cell.seed for cell in self.flat]


def _prepare(options: SampleOptions) -> _Job:
    table = _table(options)
    opened = open_checkpoint(
        options.checkpoint,
        adapter=options.adapter,
        weights=options.weights,
        height=options.height,
        width=options.width,
        encoder=options.encoder,
        instruction=options.instruction,
        autoencoder=options.autoencoder,
        device=options.device,
        precision=options.precision,
    )
    keys = ("steps", "guidance_scale", "guidance_interval", "solver", "flow_shift", "seed")
    settings = opened.settings({key: getattr(options, key) for key in keys}, options.negative_prompt)
    cells = _cells(options, opened.pipeline, table, settings.seed)
    to = _outputs(options, opened, [cell for row in cells for cell in row])
    for name, path, formats in (
        ("`out`", to.grid, outputs.PICTURES),
        ("`trajectory`", to.trajectory, outputs.FILMS),
    ):
        if path is not None:
            pictures.check_grid(name, path, formats, *opened.size, cells, table)
    stage = Stage(opened.device, options.offload != "none", options.report)
    return _Job(options, opened, settings, cells, table, to, stage)


def _table(options: SampleOptions) -> Table | None:
    """The table of `grid`, if it is asked for."""
    if options.grid is None:
        return None
    if options.prompts or options.prompts_file is not None:
        other = "`prompts_file`" if options.prompts_file is not None else f"the prompt {options.prompts[0]!r}"
        raise SanaError(
            f"`grid`: there is {other} too, and a grid's template has all its prompts",
            "give one or the other, and the template in quotes",
            exit_code=2,
        )
    return parse_table(options.grid)


def _cells(
    options: SampleOptions, pipeline: Pipeline, table: Table | None, seed: int
) -> list[list[pictures.Cell]]:
    """The cells of the table, or of the grid of all prompts."""
    if table is None:
        rows = pictures.prompt_rows(_prompts(options, pipeline), pipeline.one_word_captions)
        return pictures.grid_cells(rows, options.images_per_prompt, seed)
    if pipeline.one_word_captions:
        check_single_words(table)
    return pictures.table_cells(table.prompts, options.images_per_prompt, seed)


def _prompts(options: SampleOptions, pipeline: Pipeline) -> tuple[str, ...]:
    """The prompts of the options, then those of the file, without comments."""
    lines: list[str] = []
    if options.prompts_file is not None:
        try:
            text = (
                textfile.decode(sys.stdin.buffer.read())
                if str(options.prompts_file) == "-"
                else textfile.read(options.prompts_file)
            )
        except OSError as error:
            raise SanaError(
                f"`prompts_file`: {options.prompts_file}: {error.strerror}", exit_code=2
            ) from error
        except textfile.NotTextError as error:
            raise SanaError(
                f"`prompts_file`: {options.prompts_file} is not UTF-8 text: {error}", exit_code=2
            ) from error
        lines = [line for line in textfile.split_lines(text) if not line.lstrip().startswith("#")]
    prompts = tuple(prompt for prompt in (*options.prompts, *lines) if prompt.strip())
    if not prompts:
        known = " ".join(repr(caption) for caption in pipeline.example_captions[:4])
        raise SanaError(
            "nothing to draw: give prompts, or `prompts_file` with one a line",
            f"this checkpoint was trained on captions such as {known}",
            exit_code=2,
        )
    return prompts


def _outputs(options: SampleOptions, opened: Opened, cells: Sequence[pictures.Cell]) -> _Outputs:
    """Where pictures go.

    Raises:
        SanaError: a suffix says an unknown format, two outputs are the same file, or an output
            is an input.
    """
    place = opened.place
    stem = f"sample-{place.absolute().name if place.is_dir() else place.stem}"
    grid = trajectory = None
    separate: list[Path] = []
    if options.out is not None:
        grid = outputs.output("`out`", options.out, f"{stem}.png", outputs.PICTURES)
    elif options.separate is None:
        grid = outputs.free_name(opened.folder / f"{stem}.png")
    if options.trajectory is not None:
        trajectory = outputs.output("`trajectory`", options.trajectory, f"{stem}.gif", outputs.FILMS)
    if options.separate is not None:
        if options.separate.exists() and not options.separate.is_dir():
            raise SanaError(
                f"`separate`: {options.separate} is not a folder",
                "give a folder, or `out` for one picture",
                exit_code=2,
            )
        for index, cell in enumerate(cells):
            word = re.sub(r"\W+", "-", cell.prompt.lower())[:40].strip("-")
            separate.append(options.separate / f"{index:04d}-{word or 'image'}.png")
    writes = [("`out`", grid), ("`trajectory`", trajectory), *(("`separate`", path) for path in separate)]
    outputs.check_distinct(
        writes, [("`prompts_file`", options.prompts_file), ("`checkpoint`", options.checkpoint)]
    )
    return _Outputs(grid, tuple(separate), trajectory)


# --- encoding ---------------------------------------------------------------------------------


def _encode(job: _Job) -> tuple[list[Tensor], list[Tensor], tuple[str, ...]]:
    """Caption states of each image, those of its null branch, and notes on the prompts."""
    pipeline = job.opened.pipeline

    def load() -> CaptionEncoder:
        return load_pipeline_encoder(pipeline, job.opened.device, job.opened.precision)

    with job.stage.hold("encoder", load) as encoder:
        captions, nulls = prompt_states(pipeline, encoder, job.prompts, job.options.negative_prompt)
        notes = prompt_notes(pipeline, encoder, job.prompts, job.options.negative_prompt)
        del encoder
    return captions, nulls, notes


# --- drawing and decoding ---------------------------------------------------------------------


def _draw(
    job: _Job, captions: list[Tensor], nulls: list[Tensor]
) -> Generator[SampleStep, None, list[Tensor]]:
    """Solve for all images; yields progress.

    Returns:
        The samples (B, C, H, W). If a trajectory is wanted, also the noise, and the samples
        after each solver step.
    """
    frames = sampler.Frames(job.settings.steps, all_of_them=job.outputs.trajectory is not None)
    recipe = job.opened.recipe(job.settings)
    with job.stage.hold("transformer", job.opened.load_transformer) as model:
        drawn = sampler.sample_images(model, captions, nulls, job.seeds, recipe)
        del model
        try:
            for step in drawn:
                frames.add(step)
                yield SampleStep("draw", step.done, step.total)
        except sampler.NoRoomError as error:
            raise SanaError(str(error), NO_ROOM) from error
        del drawn
    job.opened.check_finite(frames.last)
    if job.outputs.trajectory is None:
        return [frames.last]
    noise = sampler.Noise(job.seeds, job.opened.shape)()
    return [frames.last, noise, *frames.sheets]


def _decode(job: _Job, sheets: list[Tensor]) -> Generator[SampleStep, None, list[Tensor]]:
    """Turn sheets of samples (B, C, H, W) into sheets of pixels, uint8; yields progress."""
    info = job.opened.decoder
    if info is None:
        return [sampler.to_pixels(sheet) for sheet in sheets]
    total = sum(map(len, sheets))
    decoded: list[list[Tensor]] = [[] for _ in sheets]
    yield SampleStep("decode", 0, total)
    with job.stage.hold("decoder", lambda: job.opened.load_decoder(info)) as decoder:
        for into, sheet in zip(decoded, sheets, strict=True):
            for some in decoder.decode(sheet):
                into.extend(sampler.to_pixels(some))
                yield SampleStep("decode", sum(map(len, decoded)), total)
        del decoder
    return [torch.stack(images) for images in decoded]


# --- writing ----------------------------------------------------------------------------------


def _write(
    job: _Job, pixels: Tensor, frames: Sequence[Tensor]
) -> tuple[tuple[Path, ...], tuple[dict[str, Any], ...], tuple[str, ...]]:
    """Write the pictures that are wanted.

    Args:
        job: what was drawn, and where to.
        pixels: all images (B, C, H, W).
        frames: the same from noise to the last step, for the trajectory.

    Returns:
        The files, what each image is, and notes.
    """
    to, facts = job.outputs, job.opened.facts(pixels.shape[1], job.options.negative_prompt)
    try:
        listing = _write_separate(job, pixels, facts)
        notes = () if to.grid is None else _write_grid(job, pixels, to.grid, facts)
        if to.trajectory is not None:
            film = [pictures.grid(frame, job.cells, job.table) for frame in frames]
            pictures.save_film(film, to.trajectory)
    except OSError as error:
        raise files.storage_error(error, "writing the pictures (`out` says where)") from error
    return (*to.separate, *(path for path in (to.grid, to.trajectory) if path is not None)), listing, notes


def _write_separate(job: _Job, pixels: Tensor, facts: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    listing: list[dict[str, Any]] = [{"prompt": cell.prompt, "seed": cell.seed} for cell in job.flat]
    for cell, image, path, entry in zip(job.flat, pixels, job.outputs.separate, listing, strict=False):
        pictures.save_picture(
            pictures.to_image(image), path, pictures.grid_record([[cell]], job.settings, **facts)
        )
        entry["file"] = str(path)
    return tuple(listing)


def _write_grid(job: _Job, pixels: Tensor, path: Path, facts: dict[str, Any]) -> tuple[str, ...]:
    """Write the grid. A note says so if its file has no room for the record."""
    sheet = pictures.grid(pixels, job.cells, job.table)
    record = pictures.grid_record(job.cells, job.settings, **facts)
    if pictures.save_picture(sheet, path, record):
        return ()
    return (f"{path} has no room for all its prompts and does not say how it was made; a .png does",)
