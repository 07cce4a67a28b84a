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

from sana_cli import __version__
from sana_cli.autoencoder import Autoencoder, AutoencoderInfo, read_info
from sana_cli.choices import Offload, Precision, Solver, Weights
from sana_cli.config.keys import SampleConfig
from sana_cli.errors import SanaError
from sana_cli.runtime import files, hub, outputs, textfile
from sana_cli.runtime.device import Stage, peak_memory, resolve_device, resolve_precision
from sana_cli.sampling import pictures, sampler
from sana_cli.sampling.conditioning import load_pipeline_encoder, prompt_notes, prompt_states
from sana_cli.sampling.pipeline import Pipeline, given_settings, open_pipeline
from sana_cli.sampling.tables import Table, check_single_words, parse_table
from sana_cli.weights import checkpoint
from sana_cli.weights.applied import Applied, notes_on, read_applied


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
        checkpoint=job.place,
        shipped=checkpoint.is_shipped(job.place),
        saved=saved,
        images=listing,
        settings=job.settings,
        pixels=pixels,
        seconds=time.perf_counter() - start,
        peak_memory=peak_memory(job.device),
        notes=(*notes, *_adapter_notes(job), *more),
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
    place: Path  # of the checkpoint
    pipeline: Pipeline
    settings: SampleConfig
    cells: list[list[pictures.Cell]]  # the grid
    table: Table | None  # its labels, if it is a table
    applied: tuple[Applied, ...]  # adapters
    decoder: AutoencoderInfo | None  # None: samples are pixels
    shape: tuple[int, int, int]  # channels, height and width of a sample
    outputs: _Outputs
    device: torch.device
    precision: str
    stage: Stage

    @property
    def recipe(self) -> sampler.Recipe:
        """How all images are sampled."""
        return sampler.Recipe(self.settings, self.shape, self.pipeline.prediction_type, self.precision)

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
    place = checkpoint.find_checkpoint(options.checkpoint)
    pipeline = open_pipeline(place, options.encoder, options.instruction, options.autoencoder)
    if pipeline.adapters:
        checkpoint.find_base(place)  # whether it is there
    applied = _applied(options, pipeline)
    settings = _settings(options, pipeline)
    cells = _cells(options, pipeline, table, settings.seed)
    decoder = _autoencoder(pipeline)
    factor = decoder.factor if decoder else 1
    shape = _shape(options, pipeline, factor)
    to = _outputs(options, place, [cell for row in cells for cell in row])
    height, width = (side * factor for side in shape[1:])
    for name, path, formats in (
        ("`out`", to.grid, outputs.PICTURES),
        ("`trajectory`", to.trajectory, outputs.FILMS),
    ):
        if path is not None:
            pictures.check_grid(name, path, formats, height, width, cells, table)
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision or pipeline.precision, device)
    stage = Stage(device, options.offload != "none", options.report)
    return _Job(
        options,
        place,
        pipeline,
        settings,
        cells,
        table,
        applied,
        decoder,
        shape,
        to,
        device,
        precision,
        stage,
    )


def _applied(options: SampleOptions, pipeline: Pipeline) -> tuple[Applied, ...]:
    """The adapters that are asked for."""
    if options.adapter and options.checkpoint is None:
        raise SanaError(
            f"`adapter`: {options.adapter[0]} changes a model, and which one is not said",
            "give it with `checkpoint` BASE; a run of adapters is drawn from with `checkpoint` RUN alone",
            exit_code=2,
        )
    return read_applied(options.adapter, pipeline.model, options.weights)


def _settings(options: SampleOptions, pipeline: Pipeline) -> SampleConfig:
    """The pipeline's sampling settings, overridden by the options."""
    if pipeline.unknown_scheduler is not None and options.solver is None:
        raise pipeline.unknown_scheduler
    given = {
        key: getattr(options, key)
        for key in ("steps", "guidance_scale", "guidance_interval", "solver", "flow_shift", "seed")
        if getattr(options, key) is not None
    }
    settings = given_settings(pipeline, pipeline.sample.model_dump(), given)
    if settings.solver == "scm" and settings.flow_shift != 1:
        if options.flow_shift is not None:
            raise SanaError(
                "`flow_shift`: the scm solver has noise levels of its own, which have no shift", exit_code=2
            )
        settings = settings.model_copy(update={"flow_shift": 1.0})
    if pipeline.model.guidance_embeds:
        for name in ("negative_prompt", "guidance_interval"):
            if getattr(options, name) is not None:
                raise SanaError(
                    f"`{name}`: this model has its guidance built in, and no null branch to steer by",
                    exit_code=2,
                )
    return settings


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


def _autoencoder(pipeline: Pipeline) -> AutoencoderInfo | None:
    """The autoencoder that decodes samples. None: samples are pixels."""
    if not pipeline.latents:
        return None
    channels = pipeline.sample_shape[0]
    if pipeline.autoencoder is None:
        raise SanaError(
            f"{pipeline.place} draws latents of {channels} channels, "
            "and which autoencoder they are of is not on record",
            "give it with `autoencoder` PATH (or a Hugging Face id)",
        )
    info = read_info(pipeline.autoencoder)
    if info.latent_channels != channels:
        raise SanaError(
            f"`autoencoder`: {info.source} has latents of {info.latent_channels} channels; "
            f"{pipeline.place} draws {channels}"
        )
    return info


def _shape(options: SampleOptions, pipeline: Pipeline, factor: int) -> tuple[int, int, int]:
    """Channels, height and width of a sample, for images `factor` times as large."""
    channels, *trained = pipeline.sample_shape
    unit, sides = pipeline.model.patch_size * factor, []
    for name, asked, default in (
        ("height", options.height, trained[0]),
        ("width", options.width, trained[1]),
    ):
        side = default * factor if asked is None else asked
        if side < 1 or side % unit:
            of = f"{unit}, the patch size times the autoencoder's factor of {factor}"
            of = f"the patch size {unit}" if factor == 1 else of
            raise SanaError(f"`{name}`: {side} is not a multiple of {of}", exit_code=2)
        sides.append(side // factor)
    return channels, sides[0], sides[1]


def _outputs(options: SampleOptions, place: Path, cells: Sequence[pictures.Cell]) -> _Outputs:
    """Where pictures go.

    Raises:
        SanaError: a suffix says an unknown format, two outputs are the same file, or an output
            is an input.
    """
    stem = f"sample-{place.absolute().name if place.is_dir() else place.stem}"
    grid = trajectory = None
    separate: list[Path] = []
    if options.out is not None:
        grid = outputs.output("`out`", options.out, f"{stem}.png", outputs.PICTURES)
    elif options.separate is None:
        grid = outputs.free_name(_beside(place)[0] / f"{stem}.png")
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


def _beside(folder: Path) -> tuple[Path, str]:
    """The folder for a checkpoint's pictures, and the checkpoint's name in their record."""
    if checkpoint.is_shipped(folder):
        return Path(), f"sana {__version__}, {folder.name}"
    whole = folder.absolute()
    in_run = whole.parent.name == "checkpoints"
    place = whole.parents[1] if in_run else whole.parent
    name = f"{place.name}/{whole.name}" if in_run else whole.name
    return (place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place), name


# --- encoding ---------------------------------------------------------------------------------


def _encode(job: _Job) -> tuple[list[Tensor], list[Tensor], tuple[str, ...]]:
    """Caption states of each image, those of its null branch, and notes on the prompts."""
    with job.stage.hold("encoder", lambda: load_pipeline_encoder(job.pipeline, job.device)) as encoder:
        captions, nulls = prompt_states(job.pipeline, encoder, job.prompts, job.options.negative_prompt)
        notes = prompt_notes(job.pipeline, encoder, job.prompts, job.options.negative_prompt)
        del encoder
    return captions, nulls, notes


# --- drawing and decoding ---------------------------------------------------------------------


def _adapter_notes(job: _Job) -> list[str]:
    """Which adapters were trained on another model than this, or with other text."""

    def base_sha256() -> str:
        own = checkpoint.base_record(job.place)
        return own.sha256 if own else checkpoint.read_transformer(job.place)[0].sha256

    return notes_on(job.applied, base_sha256, job.pipeline.text)


def _draw(
    job: _Job, captions: list[Tensor], nulls: list[Tensor]
) -> Generator[SampleStep, None, list[Tensor]]:
    """Solve for all images; yields progress.

    Returns:
        The samples (B, C, H, W). If a trajectory is wanted, also the noise, and the samples
        after each solver step.
    """
    last: dict[int, sampler.SampledStep] = {}  # by first image of the batch
    frames: dict[int, dict[int, Tensor]] = {}  # by solver step, by first image of the batch
    dtype = torch.float32 if job.precision == "fp32" else None

    def load() -> Any:
        applied = [one.changes for one in job.applied]
        return checkpoint.load_transformer(job.place, job.options.weights, job.device, dtype, applied)

    with job.stage.hold("transformer", load) as model:
        drawn = sampler.sample_images(model, captions, nulls, job.seeds, job.recipe)
        del model
        try:
            for step in drawn:
                last[step.first] = step
                if job.outputs.trajectory is not None:
                    frames.setdefault((step.done - 1) % job.settings.steps, {})[step.first] = (
                        step.images.cpu()
                    )
                yield SampleStep("draw", step.done, step.total)
        except sampler.NoRoomError as error:
            raise SanaError(
                str(error), "draw smaller ones (`height`, `width`), or elsewhere (`device` cpu)"
            ) from error
        del drawn
    samples = sampler.final_images(last.values())
    if not samples.isfinite().all():
        raise SanaError(
            f"the images of {job.place} are not finite", "try `solver` euler, or a smaller `guidance_scale`"
        )
    if job.outputs.trajectory is None:
        return [samples]
    noise = sampler.Noise(job.seeds, job.shape)()
    after = [torch.cat([by_batch[first] for first in sorted(by_batch)]) for by_batch in frames.values()]
    return [samples, noise, *after]


def _decode(job: _Job, sheets: list[Tensor]) -> Generator[SampleStep, None, list[Tensor]]:
    """Turn sheets of samples (B, C, H, W) into sheets of pixels, uint8; yields progress."""
    info = job.decoder
    if info is None:
        return [sampler.to_pixels(sheet) for sheet in sheets]
    dtype, total = None if job.precision == "bf16" else torch.float32, sum(map(len, sheets))
    decoded: list[list[Tensor]] = [[] for _ in sheets]
    yield SampleStep("decode", 0, total)
    with job.stage.hold("decoder", lambda: Autoencoder(info.source, job.device, dtype)) as decoder:
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
    to, facts = job.outputs, _facts(job, pixels)
    try:
        listing = _write_separate(job, pixels, facts)
        notes = () if to.grid is None else _write_grid(job, pixels, to.grid, facts)
        if to.trajectory is not None:
            film = [pictures.grid(frame, job.cells, job.table) for frame in frames]
            pictures.save_film(film, to.trajectory)
    except OSError as error:
        raise files.storage_error(error, "writing the pictures (`out` says where)") from error
    return (*to.separate, *(path for path in (to.grid, to.trajectory) if path is not None)), listing, notes


def _facts(job: _Job, pixels: Tensor) -> dict[str, Any]:
    """What a picture file says of how it was made, beside its settings and prompts."""
    options = job.options
    facts: dict[str, Any] = {
        "weights": options.weights,
        "size": list(pixels.shape[1:]),
        "precision": job.precision,
    }
    if job.decoder is not None:
        facts["autoencoder"] = hub.model_name(job.decoder.source)
    if digest := checkpoint.weights_sha256(job.place, options.weights):
        facts["weights_sha256"] = digest
    if options.negative_prompt:
        facts["negative_prompt"] = options.negative_prompt
    if (base := checkpoint.base_record(job.place)) is not None:
        facts["base"] = {"name": base.name, "sha256": base.sha256}
    if job.applied:
        facts["adapters"] = [applied.record for applied in job.applied]
    return {"name": _beside(job.place)[1], **facts}


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
