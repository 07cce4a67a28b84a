"""`sana embed`: images and captions to a pre-embedded dataset. It prints nothing."""

import contextlib
import itertools
import shutil
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sana_cli import buckets
from sana_cli.autoencoder import Autoencoder, read_info
from sana_cli.config.keys import Config
from sana_cli.dataset import layout, writer
from sana_cli.dataset.embedding import FIRST_SKIPPED, Embedder, strict_error
from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.shapes import ShapeReport, most_enlarged, report
from sana_cli.errors import SanaError
from sana_cli.runtime import files, hub
from sana_cli.runtime.device import peak_memory, resolve_device
from sana_cli.runtime.distributed import World, world
from sana_cli.sources import Source, open_source
from sana_cli.sources.windows import IMAGES_AT_ONCE, WindowReader
from sana_cli.text import check_same_encoder, config_fingerprint, load_encoder

FEW = 256  # images: fewer are decoded without worker processes
FIRST_ENLARGED = 5  # images that a summary names
FOUND_LATER = ("autoencoder_fingerprint", "height", "width")  # of the image record: not in every config


@dataclass(frozen=True)
class EmbedOptions:
    """What to embed, and where to."""

    config: Config
    out: Path | None = None  # None: config.data.dir
    limit: int | None = None  # None: all entries
    overwrite: bool = False
    strict: bool = False  # stop at the first entry that cannot be used

    @property
    def directory(self) -> Path:
        """The dataset directory."""
        return self.out or self.config.data.dir


@dataclass(frozen=True)
class EmbedPlan:
    """What `embed` would do, found without an encoder and without writing."""

    directory: Path
    exists: bool  # a finished dataset lies there
    source: dict[str, Any]
    encoder: dict[str, Any]
    images: int | None  # None: only reading the source would tell
    image_shape: tuple[int, int, int]  # with buckets, the square one of the largest size
    shapes: int  # how many an image may have
    image_bytes: int | None  # at most


@dataclass(frozen=True)
class EmbedStep:
    """Progress: entries of the source taken so far, and distinct captions found in them."""

    images: int
    total: int | None
    captions: int
    split: str


@dataclass(frozen=True)
class EmbedSummary:
    """A finished dataset."""

    directory: Path
    was_there: bool  # it was finished and matched: nothing was done
    resumed: int  # windows of an earlier embed that were kept
    images: int
    captions: int
    tokens: int
    skipped: int  # entries that were left out
    first_skipped: tuple[str, ...]  # name and reason of some of them
    bytes: int
    seconds: float
    peak_memory: int
    cut: int = 0  # captions longer than text.max_length, which were cut there
    notes: tuple[str, ...] = ()  # what a person should know of the encoder, or why work was not shared out
    shapes: tuple[ShapeReport, ...] = ()  # with data.buckets: what became of the images
    most_enlarged: tuple[str, ...] = ()  # names of a few, with how much
    fit: str = "crop"
    held_out: "EmbedSummary | None" = None  # the held-out split, a dataset of its own


# --- what, and whether it is there already ----------------------------------------------------


def _source(options: EmbedOptions) -> tuple[Source, int | None, dict[str, Any]]:
    source = open_source(options.config.data)
    there = source.count()
    fingerprint = source.fingerprint()
    if options.limit is None or (there is not None and options.limit >= there):
        return source, there, fingerprint
    return source, options.limit, fingerprint | {"limit": options.limit}


def _image(config: Config) -> dict[str, Any]:
    """What the index says of the images. With buckets, their most common shape is known when all are written."""
    height, width = config.data.sample_sides
    shape: dict[str, Any] = {"channels": config.model.in_channels}
    if config.data.buckets is None:
        shape |= {"buckets": None, "height": height, "width": width}
    else:
        shape |= {"buckets": list(config.data.buckets)}
    fit = {"fit": config.data.fit}
    if config.data.autoencoder is None:
        return {"kind": "pixels", **shape, **fit}
    name = hub.model_name(config.data.autoencoder)
    return {"kind": "latents", **shape, **fit, "factor": config.data.factor, "autoencoder": name}


def plan(options: EmbedOptions) -> EmbedPlan:
    """What would be done (`--dry-run`)."""
    _, count, fingerprint = _source(options)
    data, channels = options.config.data, options.config.model.in_channels
    return EmbedPlan(
        directory=options.directory,
        exists=layout.is_dataset(options.directory),
        source=fingerprint,
        encoder=config_fingerprint(options.config.text),
        images=count,
        image_shape=(channels, *data.sample_sides),
        shapes=1 if data.buckets is None else len(buckets.all_shapes(data.buckets)),
        image_bytes=None if count is None else count * _sample_bytes(options.config, data.size),
    )


def _sample_bytes(config: Config, size: tuple[int, int]) -> int:
    """Bytes of the sample of an image of this height and width."""
    height, width = (side // config.data.factor for side in size)
    return config.model.in_channels * height * width * (1 if config.data.autoencoder is None else 2)


def _fewest_bytes(config: Config) -> int:
    """Bytes of the smallest sample that there can be."""
    sizes = [config.data.size] if config.data.buckets is None else buckets.all_shapes(config.data.buckets)
    return min(_sample_bytes(config, size) for size in sizes)


def _check_same(dataset: Dataset, source: dict[str, Any], config: Config) -> None:
    where, way_out = (
        str(dataset.directory),
        "make it anew with `overwrite`, or another beside it with --set data.dir=DIR",
    )
    for name, recorded, given in (
        ("source", dataset.index.source, source),
        ("image", dataset.index.image.as_json(), _image(config)),
    ):
        extra = [key for key in recorded if key not in given and key not in FOUND_LATER]
        for key in (*given, *extra):
            if recorded.get(key) != given.get(key):
                raise SanaError(
                    f"{where} was made with {name}.{key} {recorded.get(key)!r}, not {given.get(key)!r}",
                    way_out,
                )
    fingerprint = dataset.index.encoder.as_json()
    check_same_encoder(fingerprint, config_fingerprint(config.text), where, way_out)


def _check_room(directory: Path, needed: int) -> None:
    """Refuse a dataset that the disk has no room for.

    Raises:
        SanaError: before anything is written.
    """
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise SanaError(
            f"{directory} needs at least {needed:,} bytes, and its disk has {free:,} free",
            "free some space, or put it elsewhere with `out` DIR or --set data.dir=DIR",
        )


# --- the work ---------------------------------------------------------------------------------


def embed(options: EmbedOptions) -> Iterator[EmbedStep | EmbedSummary]:
    """Embed the config's source, and its held-out split; yields progress, and at the end an `EmbedSummary`.

    A finished dataset of the same source, encoder and image size is left as it is. Interrupted work goes on
    after its last whole window. Under torchrun the processes share the windows, and rank 0 alone yields.

    Raises:
        SanaError: a finished dataset differs, naming the field (unless `overwrite`, which replaces it once
            the new one is whole); the source, the encoder or the disk fails; no entry can be used, or with
            `strict`, one cannot.
    """
    parts, summaries = [options, *_held_out(options)], []
    with world() as here:
        for part in parts:
            for step in _embed(part, here):
                if isinstance(step, EmbedSummary):
                    summaries.append(step)
                else:
                    yield step
    if summaries:
        yield replace(summaries[0], held_out=summaries[1] if len(summaries) > 1 else None)


def _held_out(options: EmbedOptions) -> list[EmbedOptions]:
    """The held-out split as a dataset of its own, if there is one. Its source is opened before any work."""
    split = options.config.data.held_out
    if split is None:
        return []
    data = options.config.data.model_copy(update={"split": split, "held_out_split": None})
    try:
        open_source(data)
    except SanaError as error:
        open_source(options.config.data)  # what is wrong with the whole source is not the split's fault
        first, *rest = str(error).splitlines()
        raise SanaError(f"data.held_out_split: {first}", *rest, exit_code=error.exit_code) from error
    config = options.config.model_copy(update={"data": data})
    return [replace(options, config=config, out=layout.held_out_dir(options.directory, split))]


def _embed(options: EmbedOptions, here: World) -> Iterator[EmbedStep | EmbedSummary]:
    """One split."""
    start = time.perf_counter()
    config = options.config
    directory = options.directory.resolve() if options.directory.is_symlink() else options.directory
    try:
        source, count, fingerprint = _source(options)
    except OSError as error:
        raise files.storage_error(error, f"reading {config.data.path}") from error
    device = resolve_device(config.run.device)
    dataset = _finished(options, directory, fingerprint, here)
    if dataset is not None:
        if here.first:
            yield _summary(dataset, start, peak_memory(device), was_there=True)
        return
    image, partial = _image(config), layout.partial_dir(directory)
    _check_room(directory, 0 if count is None or partial.exists() else count * _fewest_bytes(config))
    autoencoder, encoder = _load_autoencoder(config, device), load_encoder(config.text, device)
    if autoencoder is not None:
        image["autoencoder_fingerprint"] = autoencoder.fingerprint
    facts = {
        "image": image,
        "caption_dim": encoder.dim,
        "encoder": encoder.fingerprint,
        "source": fingerprint,
    }
    pixels = int(np.prod(config.data.size)) * (3 if autoencoder is not None else config.model.in_channels)
    most = writer.WINDOW_BYTES * (1 if config.data.buckets is None else writer.MANY_SHAPES)
    part, size = (
        max(IMAGES_AT_ONCE, min(writer.WINDOW, most // bytes_each))
        for bytes_each in (pixels, _sample_bytes(config, config.data.size))
    )
    plan = {
        "source": fingerprint,
        "image": image,
        "encoder": encoder.fingerprint,
        "window": size,
        "part": part,
    }
    entries = source if count is None else itertools.islice(iter(source), count)
    reader = WindowReader(config, entries, size, part, few=count is not None and count < FEW)
    with _writing(directory) as held:
        with here.together():
            if (
                here.first
            ):  # continues an earlier embed of the same plan, or clears the folder; the others find it so
                held.enter_context(files.locked(directory))
                writer.DatasetWriter(partial, plan)
        embedder = Embedder(encoder, autoencoder, writer.DatasetWriter(partial, plan), options.strict)
        for _ in embedder.windows(reader, here):
            if here.first:
                yield EmbedStep(reader.taken, count, len(embedder.captions), config.data.split)
        here.wait()
        if here.first:
            if not any(record.images for record in map(embedder.into.done, range(reader.windows)) if record):
                raise SanaError(f"{config.data.source}: no entry can be used", *embedder.reasons())
            embedder.into.finish(reader.windows, facts | embedder.facts())
            files.put_in_place(partial, directory)
            done = _summary(
                Dataset(directory), start, peak_memory(device), was_there=False, resumed=embedder.resumed
            )
            yield replace(done, notes=(*encoder.warnings(), *reader.notes))
        here.wait()


def _finished(
    options: EmbedOptions, directory: Path, fingerprint: dict[str, Any], here: World
) -> Dataset | None:
    """The dataset, if it is there and is the one asked for; None if it has to be made."""
    partial, config = layout.partial_dir(directory), options.config
    with here.together():  # before rank 0 takes the lock
        if here.first:
            files.check_unlocked(directory)
    layout.check_only_ours(partial)
    if layout.is_dataset(partial) and not (partial / layout.PLAN).exists() and not directory.exists():
        with contextlib.suppress(SanaError):  # whole, but stopped before it was renamed
            _check_same(Dataset(partial), fingerprint, config)
            files.put_in_place(partial, directory)
    if not layout.is_dataset(directory) or options.overwrite:
        layout.check_only_ours(directory)
        return None
    dataset = Dataset(directory)
    _check_same(dataset, fingerprint, config)
    for entry in dataset.skipped() if options.strict else ():
        raise strict_error(entry.name, entry.reason)
    return dataset


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[contextlib.ExitStack]:
    """Around the work, with a stack for its lock: a failing disk or a killed worker is one message."""
    try:
        with contextlib.ExitStack() as held:
            yield held
    except OSError as error:
        raise files.storage_error(error, f"writing {directory}") from error
    except BrokenProcessPool as error:
        raise SanaError(
            "a process that decodes images was killed, possibly out of memory",
            "run the command again to go on, with fewer: --set data.workers=1",
        ) from error


def _load_autoencoder(config: Config, device: torch.device) -> Autoencoder | None:
    """The autoencoder of the config, if there is one. Its channels and factor must be those of the config."""
    source, channels = config.data.autoencoder, config.model.in_channels
    if source is None:
        return None
    info = read_info(source)
    for key, said, found in (
        ("data.latent_factor", config.data.factor, info.factor),
        ("model.in_channels", channels, info.latent_channels),
    ):
        if said != found:
            raise SanaError(
                f"{key}: {said}, where {source} has {found}", f"use --set {key}={found}", exit_code=2
            )
    return Autoencoder(source, device)


def _summary(dataset: Dataset, start: float, memory: int, was_there: bool, resumed: int = 0) -> EmbedSummary:
    counts, shapes = dataset.index.counts, report(dataset)
    skipped = itertools.islice(dataset.skipped(), FIRST_SKIPPED)
    return EmbedSummary(
        directory=dataset.directory,
        was_there=was_there,
        resumed=resumed,
        images=counts.images,
        captions=counts.captions,
        tokens=counts.tokens,
        skipped=counts.skipped,
        first_skipped=tuple(f"{entry.name}: {entry.reason}" for entry in skipped),
        bytes=dataset.bytes,
        seconds=time.perf_counter() - start,
        peak_memory=memory,
        cut=counts.cut,
        shapes=shapes,
        most_enlarged=most_enlarged(shapes, FIRST_ENLARGED),
        fit=dataset.index.image.fit,
    )
