"""`sana sample`: prompts to pictures with any SANA. Encoder, transformer and decoder take turns on the device.

It prints nothing and knows nothing of training: `pipeline.py` says what stands around a transformer.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from sana_cli.sampling.pipeline import Pipeline, given_settings, open_pipeline
from sana_cli.text import CaptionEncoder, as_of_today, check_same_encoder, knew_capitals, load_encoder, unseen_words
from sana_cli.weights import checkpoint

MOST_WORDS = 8  # that are named in a note
MOST_EXAMPLES = 20  # captions on a checkpoint's record


@dataclass(frozen=True)
class SampleOptions:
    """What to draw, and how. `None` takes what the checkpoint has on record."""

    prompts: tuple[str, ...] = ()
    checkpoint: Path | None = None  # None: the newest whole one under runs/
    prompts_file: Path | None = None  # `-` is stdin
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
    weights: Weights = "ema"
    device: str = "auto"
    offload: Offload = "auto"
    precision: Precision | None = None  # of the transformer; None: as trained, or as stored
    encoder: str | None = None  # where the caption encoder lies, if it is not where its name tells
    instruction: str | None = None  # in place of the family's
    autoencoder: str | None = None  # in place of the family's or the recorded one
    out: str | Path | None = None  # a picture; a folder, or a path that ends in a slash: there, by its own name
    separate: Path | None = None  # a folder for a picture of each image, in place of a grid, or beside `out`
    trajectory: str | Path | None = None  # a film, as `out`
    report: Callable[[str, str], None] = lambda _what, _name: None  # told of each model that comes to the device or goes


@dataclass(frozen=True)
class SampleStep:
    """Progress: "encode", solver steps over all batches ("draw"), and images out of latents ("decode")."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class SampleSummary:
    """What was drawn, and where it is."""

    checkpoint: Path
    shipped: bool  # the weights that come with the package drew
    saved: tuple[Path, ...]
    images: tuple[dict[str, Any], ...]  # prompt, seed, and file where each has its own
    settings: SampleConfig
    pixels: Tensor  # (B, C, H, W) uint8
    seconds: float
    peak_memory: int
    notes: tuple[str, ...] = ()  # what a person should know: prompts that were cut, words never trained on


def _settings(options: SampleOptions, pipeline: Pipeline) -> SampleConfig:
    """The pipeline's sampling defaults with what the options say instead."""
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
            raise SanaError("--flow-shift: the scm solver has noise levels of its own, which know no shift", exit_code=2)
        settings = settings.model_copy(update={"flow_shift": 1.0})
    if pipeline.model.guidance_embeds:
        for name in ("negative_prompt", "guidance_interval"):
            if getattr(options, name) is not None:
                option = name.replace("_", "-")
                raise SanaError(f"--{option}: this model has its guidance built in, and no null branch to steer by", exit_code=2)
    return settings


def _prompts(options: SampleOptions, pipeline: Pipeline) -> tuple[str, ...]:
    """Those of the command line, then those of the file, where lines that begin with # are comments."""
    lines: list[str] = []
    if options.prompts_file is not None:
        try:
            text = (
                textfile.decode(sys.stdin.buffer.read())
                if str(options.prompts_file) == "-"
                else textfile.read(options.prompts_file)
            )
        except OSError as error:
            raise SanaError(f"--prompts-file: {options.prompts_file}: {error.strerror}", exit_code=2) from error
        except textfile.NotTextError as error:
            raise SanaError(f"--prompts-file: {options.prompts_file} is not UTF-8 text: {error}", exit_code=2) from error
        lines = [line for line in textfile.split_lines(text) if not line.lstrip().startswith("#")]
    prompts = tuple(prompt for prompt in (*options.prompts, *lines) if prompt.strip())
    if not prompts:
        known = " ".join(repr(caption) for caption in pipeline.example_captions[:4])
        raise SanaError(
            "nothing to draw: give prompts, or --prompts-file with one a line",
            f"this checkpoint was trained on captions such as {known}",
            exit_code=2,
        )
    return prompts


def _autoencoder(pipeline: Pipeline) -> AutoencoderInfo | None:
    """What decodes the samples, checked before anything long begins."""
    if not pipeline.latents:
        return None
    channels = pipeline.sample_shape[0]
    if pipeline.autoencoder is None:
        raise SanaError(
            f"{pipeline.place} draws latents of {channels} channels, and which autoencoder they are of is not on record",
            "give it with --autoencoder PATH (or a Hugging Face id)",
        )
    info = read_info(pipeline.autoencoder)
    if info.latent_channels != channels:
        raise SanaError(
            f"--autoencoder: {info.source} has latents of {info.latent_channels} channels; {pipeline.place} draws {channels}"
        )
    return info


def _shape(options: SampleOptions, pipeline: Pipeline, factor: int) -> tuple[int, int, int]:
    """Channels, height and width of a sample, for images `factor` times as large."""
    channels, *trained = pipeline.sample_shape
    unit, sides = pipeline.model.patch_size * factor, []
    for name, asked, default in (("height", options.height, trained[0]), ("width", options.width, trained[1])):
        side = default * factor if asked is None else asked
        if side < 1 or side % unit:
            of = f"the patch size {unit}" if factor == 1 else f"{unit}, the patch size times the autoencoder's factor of {factor}"
            raise SanaError(f"--{name}: {side} is not a multiple of {of}", exit_code=2)
        sides.append(side // factor)
    return channels, sides[0], sides[1]


def _load_encoder(pipeline: Pipeline, device: torch.device) -> CaptionEncoder:
    if pipeline.text is None:
        raise SanaError(
            f"{pipeline.place} takes caption states {pipeline.model.caption_channels} wide, and whose they are is not on record",
            "say which encoder made them with --encoder PATH (or tiny, or a Hugging Face id)",
        )
    try:
        encoder = load_encoder(pipeline.text, device)
    except SanaError as error:
        way = "was trained with" if pipeline.kind == "checkpoint" else "takes"
        raise SanaError(
            str(error), f"prompts are encoded by what {pipeline.place.name} {way}; --encoder PATH says where that lies"
        ) from error
    if pipeline.fingerprint is not None:
        check_same_encoder(
            as_of_today(pipeline.fingerprint, pipeline.example_captions),
            encoder.fingerprint,
            str(pipeline.place),
            "--encoder PATH must be the model that the checkpoint was trained with"
            if pipeline.text.encoder != "tiny"
            else "the tiny encoder has changed since: embed and train again",
        )
    if encoder.dim != pipeline.model.caption_channels:
        raise SanaError(
            f"the encoder {pipeline.text.encoder} gives states {encoder.dim} wide; {pipeline.place} takes "
            f"{pipeline.model.caption_channels}",
            "give its own with --encoder PATH",
        )
    return encoder


def _encode(
    pipeline: Pipeline, encoder: CaptionEncoder, prompts: list[str], negative: str | None
) -> tuple[list[Tensor], list[Tensor]]:
    """States of each prompt, and of the null caption or the negative prompt beside it."""
    # ours are trained on bf16 states; others were handed what their encoder gave
    dtype = torch.bfloat16 if pipeline.kind == "checkpoint" else torch.float32
    states = dict(encoder.encode(prompts, dtype))
    captions = [states[prompt] for prompt in prompts]
    if pipeline.model.guidance_embeds:  # which has no null branch
        return captions, captions
    if negative or pipeline.null_caption is None:
        ((_, null),) = encoder.encode([negative or ""], dtype, instruct=False)
    else:
        null = pipeline.null_caption
        if pipeline.null_follows_prompt:
            return captions, [null[: len(caption)] for caption in captions]
    return captions, [null] * len(captions)


def sample(options: SampleOptions) -> Iterator[SampleStep | SampleSummary]:
    """Draw; yields progress, and at the end a `SampleSummary`.

    Under `offload` "auto" and "model" encoder, transformer and decoder are on the device one at a time; "none" keeps each.

    Raises:
        SanaError: no checkpoint, an encoder or autoencoder that cannot be had or is another one, an impossible setting, a
            full disk.
    """
    start = time.perf_counter()
    place = checkpoint.find_checkpoint(options.checkpoint)
    pipeline = open_pipeline(place, options.encoder, options.instruction, options.autoencoder)
    settings, prompts = _settings(options, pipeline), _prompts(options, pipeline)
    info = _autoencoder(pipeline)
    shape = _shape(options, pipeline, info.factor if info else 1)
    rows = pictures.prompt_rows(prompts, pipeline.one_word_captions)
    cells = pictures.grid_cells(rows, options.images_per_prompt, settings.seed)
    flat = [cell for row in cells for cell in row]
    files_to_write = _outputs(options, place, flat)
    height, width = (side * (info.factor if info else 1) for side in shape[1:])
    for name, path, formats in (
        ("--out", files_to_write.grid, outputs.PICTURES),
        ("--trajectory", files_to_write.trajectory, outputs.FILMS),
    ):
        if path is not None:
            pictures.check_grid(name, path, formats, height, width, cells)
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision or pipeline.precision, device)
    stage = Stage(device, options.offload != "none", options.report)

    yield SampleStep("encode", 0, 1)
    with stage.hold("encoder", lambda: _load_encoder(pipeline, device)) as encoder:
        captions, nulls = _encode(pipeline, encoder, [cell.prompt for cell in flat], options.negative_prompt)
        notes = _notes(pipeline, encoder, [cell.prompt for cell in flat], options.negative_prompt)
        del encoder
    yield SampleStep("encode", 1, 1)

    # ours were trained in float32 under autocast; others are held as they are stored, where that is how they run
    dtype = torch.float32 if pipeline.kind == "checkpoint" or precision == "fp32" else None
    last: dict[int, sampler.SampledStep] = {}
    frames: dict[int, dict[int, Tensor]] = {}  # by solver step, by first image of the batch
    with stage.hold("transformer", lambda: checkpoint.load_transformer(place, options.weights, device, dtype)) as model:
        drawn = sampler.sample_images(model, captions, nulls, [cell.seed for cell in flat], shape, settings, precision)
        del model
        try:
            for step in drawn:
                last[step.first] = step
                if files_to_write.trajectory is not None:
                    frames.setdefault((step.done - 1) % settings.steps, {})[step.first] = step.images.cpu()
                yield SampleStep("draw", step.done, step.total)
        except sampler.NoRoomError as error:
            raise SanaError(str(error), "draw smaller ones (--height, --width), or elsewhere (--device cpu)") from error
        del drawn
    samples = sampler.final_images(last.values())
    last.clear()
    if not samples.isfinite().all():
        raise SanaError(f"the images of {place} are not finite", "try --solver euler, or a smaller --guidance-scale")
    sheets = [samples]
    if files_to_write.trajectory is not None:
        sheets += [sampler.Noise([cell.seed for cell in flat], shape)()]
        sheets += [torch.cat([by[first] for first in sorted(by)]) for by in frames.values()]
    if info is None:
        pixels, *shown = (sampler.to_pixels(sheet) for sheet in sheets)
    else:
        decoder_dtype = None if precision == "bf16" else torch.float32
        yield SampleStep("decode", 0, len(sheets) * len(flat))
        with stage.hold("decoder", lambda: Autoencoder(info.source, device, decoder_dtype)) as decoder:
            decoded: list[list[Tensor]] = [[] for _ in sheets]
            for into, sheet in zip(decoded, sheets, strict=True):
                for some in decoder.decode(sheet):
                    into.extend(sampler.to_pixels(some))
                    yield SampleStep("decode", sum(map(len, decoded)), len(sheets) * len(flat))
            del decoder
        pixels, *shown = (torch.stack(images) for images in decoded)
    try:
        facts = {"precision": precision} | _decoded_by(info)
        saved, listing, remembers = _write(options, files_to_write, place, settings, cells, pixels, facts)
        if not remembers:
            notes += (f"{files_to_write.grid} has no room for all its prompts and does not say how it was made; a .png does",)
        if files_to_write.trajectory is not None:
            pictures.save_film([pictures.grid(sheet, cells) for sheet in shown], files_to_write.trajectory)
            saved = (*saved, files_to_write.trajectory)
    except OSError as error:
        raise files.storage_error(error, "writing the pictures (--out says where)") from error
    shipped, seconds = place == checkpoint.shipped(), time.perf_counter() - start
    yield SampleSummary(place, shipped, saved, listing, settings, pixels, seconds, peak_memory(device), notes)


def _notes(pipeline: Pipeline, encoder: CaptionEncoder, prompts: list[str], negative: str | None) -> tuple[str, ...]:
    """What would otherwise be a picture of something else, without a word."""
    notes = []
    cut = [prompt for prompt in dict.fromkeys(prompts) if encoder.is_cut(prompt)]
    cut += [negative] if negative and encoder.is_cut(negative, instruct=False) else []
    if cut:
        notes.append(
            f"{len(cut)} of the prompts are longer than text.max_length, {encoder.text.max_length} tokens, and were cut there: "
            f"{cut[0]!r:.60}"
        )
    some = len(pipeline.example_captions) >= MOST_EXAMPLES  # there may be more captions than those on record
    if some and pipeline.fingerprint is not None and knew_capitals(pipeline.fingerprint):
        notes.append("this checkpoint is of an earlier sana: words that had capitals in its captions have other vectors now")
    unseen = unseen_words([*prompts, *([negative] if negative else [])], pipeline.words)
    if unseen:
        more = f" and {len(unseen) - MOST_WORDS} more" if len(unseen) > MOST_WORDS else ""
        notes.append(f"words that this checkpoint was never trained on: {' '.join(unseen[:MOST_WORDS])}{more}")
    return tuple(notes)


def _decoded_by(info: AutoencoderInfo | None) -> dict[str, str]:
    return {} if info is None else {"autoencoder": hub.model_name(info.source)}


@dataclass(frozen=True)
class _Outputs:
    """The files that will be written, known before anything is drawn."""

    grid: Path | None
    separate: tuple[Path, ...]  # one for each image, or none
    trajectory: Path | None


def _outputs(options: SampleOptions, place: Path, cells: Sequence[pictures.Cell]) -> _Outputs:
    """Where pictures go.

    Raises:
        SanaError: a suffix says a format that is not written, or two outputs, or an output and an input, are one file.
    """
    stem = f"sample-{place.absolute().name if place.is_dir() else place.stem}"
    grid = trajectory = None
    separate: list[Path] = []
    if options.out is not None:
        grid = outputs.output("--out", options.out, f"{stem}.png", outputs.PICTURES)
    elif options.separate is None:
        grid = outputs.free_name(_beside(place)[0] / f"{stem}.png")
    if options.trajectory is not None:
        trajectory = outputs.output("--trajectory", options.trajectory, f"{stem}.gif", outputs.FILMS)
    if options.separate is not None:
        if options.separate.exists() and not options.separate.is_dir():
            raise SanaError(
                f"--separate: {options.separate} is no folder", "give a folder, or --out for one picture", exit_code=2
            )
        for index, cell in enumerate(cells):
            word = re.sub(r"\W+", "-", cell.prompt.lower())[:40].strip("-")
            separate.append(options.separate / f"{index:04d}-{word or 'image'}.png")
    writes = [("--out", grid), ("--trajectory", trajectory), *(("--separate", path) for path in separate)]
    outputs.check_distinct(writes, [("--prompts-file", options.prompts_file), ("--checkpoint", options.checkpoint)])
    return _Outputs(grid, tuple(separate), trajectory)


def _write(
    options: SampleOptions,
    to: _Outputs,
    checkpoint_place: Path,
    settings: SampleConfig,
    cells: list[list[pictures.Cell]],
    pixels: Tensor,
    facts: dict[str, Any],
) -> tuple[tuple[Path, ...], tuple[dict[str, Any], ...], bool]:
    """The grid, and a file for each image, as they are wanted; gives the files, what each image is, and if all say how made."""
    _, name = _beside(checkpoint_place)
    more: dict[str, Any] = {"weights": options.weights, "size": list(pixels.shape[1:]), **facts}
    if digest := checkpoint.weights_sha256(checkpoint_place, options.weights):
        more["weights_sha256"] = digest
    if options.negative_prompt:
        more["negative_prompt"] = options.negative_prompt
    flat = [cell for row in cells for cell in row]
    listing = [{"prompt": cell.prompt, "seed": cell.seed} for cell in flat]
    for cell, image, path, said in zip(flat, pixels, to.separate, listing, strict=False):
        pictures.save_picture(pictures.to_image(image), path, pictures.grid_record([[cell]], settings, name, **more))
        said["file"] = str(path)
    remembers = True
    if to.grid is not None:
        remembers = pictures.save_picture(
            pictures.grid(pixels, cells), to.grid, pictures.grid_record(cells, settings, name, **more)
        )
    return (*to.separate, *([to.grid] if to.grid is not None else [])), tuple(listing), remembers


def _beside(folder: Path) -> tuple[Path, str]:
    """Where pictures of a checkpoint go, and its name in their record: the run that it lies in, or the folder around it."""
    if folder == checkpoint.shipped():
        return Path(), f"sana {__version__}, {folder.name}"
    whole = folder.absolute()
    in_run = whole.parent.name == "checkpoints"
    place = whole.parents[1] if in_run else whole.parent
    name = f"{place.name}/{whole.name}" if in_run else whole.name
    return (place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place), name
