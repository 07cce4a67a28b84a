"""`sana embed`: images and captions to a pre-embedded dataset. It prints nothing and knows nothing of training."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sana_cli import files, hub, store
from sana_cli.autoencoder import Autoencoder, read_info
from sana_cli.config import Config
from sana_cli.data import Sample, Source, fit_image, open_source
from sana_cli.device import peak_memory, resolve_device
from sana_cli.errors import SanaError
from sana_cli.text import CaptionEncoder, asked_for, check_same_encoder, load_encoder


@dataclass(frozen=True)
class EmbedOptions:
    """What to embed, and where to."""

    config: Config
    out: Path | None = None  # None: config.data.dir
    limit: int | None = None  # None: all images
    overwrite: bool = False

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
    images: int
    image_shape: tuple[int, int, int]
    image_bytes: int
    lesson_bytes: int


@dataclass(frozen=True)
class EmbedStep:
    """Progress: images written so far, and distinct captions encoded for them."""

    images: int
    total: int
    captions: int


@dataclass(frozen=True)
class EmbedSummary:
    """A finished dataset."""

    directory: Path
    was_there: bool  # it matched already, and nothing was done
    images: int
    captions: int
    tokens: int
    bytes: int
    lesson_bytes: int  # what one padded float32 array for each image, the lesson's layout, would have taken
    seconds: float
    peak_memory: int


def _source(options: EmbedOptions) -> tuple[Source, int, dict[str, Any]]:
    source = open_source(options.config.data)
    count = min(len(source), options.limit or len(source))
    fingerprint = source.fingerprint()
    return source, count, fingerprint if count == len(source) else fingerprint | {"limit": count}


def _image(config: Config) -> dict[str, Any]:
    height, width = config.data.sample_sides
    shape = {"channels": config.model.in_channels, "height": height, "width": width}
    if config.data.autoencoder is None:
        return {"kind": "pixels", **shape}
    return {"kind": "latents", **shape, "factor": config.data.factor, "autoencoder": hub.model_name(config.data.autoencoder)}


def _load_autoencoder(config: Config, device: torch.device) -> Autoencoder | None:
    """The autoencoder that the config names, if it does, found to give what the config says."""
    source, channels = config.data.autoencoder, config.model.in_channels
    if source is None:
        return None
    info = read_info(source)
    for key, said, found in (
        ("data.latent_factor", config.data.factor, info.factor),
        ("model.in_channels", channels, info.latent_channels),
    ):
        if said != found:
            raise SanaError(f"{key}: {said}, where {source} has {found}", f"use --set {key}={found}", exit_code=2)
    return Autoencoder(source, device, torch.float32 if device.type == "cpu" else torch.bfloat16)


def plan(options: EmbedOptions) -> EmbedPlan:
    """What would be done (`--dry-run`)."""
    _, count, fingerprint = _source(options)
    image = _image(options.config)
    shape = image["channels"], image["height"], image["width"]
    return EmbedPlan(
        directory=options.directory,
        exists=store.is_dataset(options.directory),
        source=fingerprint,
        encoder=asked_for(options.config.text),
        images=count,
        image_shape=shape,
        image_bytes=count * int(np.prod(shape)) * (1 if image["kind"] == "pixels" else 2),
        lesson_bytes=count * store.LESSON_BYTES_PER_IMAGE,
    )


def embed(options: EmbedOptions) -> Iterator[EmbedStep | EmbedSummary]:
    """Embed the config's source; yields progress, and at the end an `EmbedSummary`.

    A finished dataset of the same source, encoder and image size is left as it is.

    Raises:
        SanaError: a finished dataset differs, naming the field (unless `overwrite`, which replaces it once the new one is
            whole); the source, the encoder or the disk fails.
    """
    start = time.perf_counter()
    directory, config = options.directory, options.config
    source, count, fingerprint = _source(options)
    device = resolve_device(config.run.device)
    if store.is_dataset(directory) and not options.overwrite:
        dataset = store.Dataset(directory)
        _check_same(dataset, fingerprint, config)
        yield _summary(dataset, start, peak_memory(device), was_there=True)
        return
    if directory.exists() and not store.is_dataset(directory) and any(directory.iterdir()):
        raise SanaError(
            f"{directory} is not empty and no dataset of sana's",
            "give another place with --out or --set data.dir=DIR",
            exit_code=2,
        )
    autoencoder = _load_autoencoder(config, device)
    encoder = load_encoder(config.text, device)
    image = _image(config) | ({} if autoencoder is None else {"autoencoder_fingerprint": autoencoder.fingerprint})
    try:
        with files.whole_folder(directory, store.partial_dir(directory)) as folder:
            writer = store.DatasetWriter(folder)
            samples = itertools.islice(iter(source), count)
            done = 0
            while window := list(itertools.islice(samples, store.WINDOW)):
                for step in _write_window(writer, window, encoder, autoencoder, config):
                    yield EmbedStep(done + step, count, len(writer.caption_ids))
                done += len(window)
            writer.finish(image, encoder.fingerprint, fingerprint, encoder.dim)
    except OSError as error:
        raise files.storage_error(error, f"writing {directory}") from error
    yield _summary(store.Dataset(directory), start, peak_memory(device), was_there=False)


IMAGES_AT_ONCE = 64  # through an autoencoder


def _write_window(
    writer: store.DatasetWriter,
    window: list[Sample],
    encoder: CaptionEncoder,
    autoencoder: Autoencoder | None,
    config: Config,
) -> Iterator[int]:
    """One shard of images, and one of the captions that it is the first to bring. Yields how many images are ready."""
    first = [] if writer.caption_ids else [""]  # the null caption leads
    captions = (caption for sample in window for caption in sample.captions)
    new = [caption for caption in dict.fromkeys([*first, *captions]) if caption not in writer.caption_ids]
    if new:
        states = dict(encoder.encode(new))
        writer.add_captions({caption: states[caption] for caption in new})
    channels = config.model.in_channels if autoencoder is None else 3
    parts = []
    for begin in range(0, len(window), IMAGES_AT_ONCE):
        fitted = [fit_image(sample.image, config.data.size, channels) for sample in window[begin : begin + IMAGES_AT_ONCE]]
        pixels = torch.from_numpy(np.stack(fitted))
        parts.append(pixels if autoencoder is None else autoencoder.encode(pixels.float() / 127.5 - 1))
        if not parts[-1].isfinite().all():
            raise SanaError(f"the autoencoder gave latents that are not finite, in samples {begin} on of a window")
        yield begin + len(pixels)
    writer.add_images(
        [sample.id for sample in window],
        torch.cat(parts),
        [sample.captions for sample in window],
        [sample.label for sample in window],
    )


def _check_same(dataset: store.Dataset, source: dict[str, Any], config: Config) -> None:
    where, way_out = str(dataset.directory), "make it anew with --overwrite, or another beside it with --set data.dir=DIR"
    for name, recorded, given in (("source", dataset.index["source"], source), ("image", dataset.index["image"], _image(config))):
        extra = [key for key in recorded if key not in given and key != "autoencoder_fingerprint"]  # known once it is loaded
        for key in (*given, *extra):
            if recorded.get(key) != given.get(key):
                raise SanaError(f"{where} was made with {name}.{key} {recorded.get(key)!r}, not {given.get(key)!r}", way_out)
    check_same_encoder(dataset.index["encoder"], asked_for(config.text), where, way_out)


def _summary(dataset: store.Dataset, start: float, memory: int, was_there: bool) -> EmbedSummary:
    counts = dataset.index["counts"]
    return EmbedSummary(
        directory=dataset.directory,
        was_there=was_there,
        images=counts["images"],
        captions=counts["captions"],
        tokens=counts["tokens"],
        bytes=dataset.bytes,
        lesson_bytes=counts["images"] * store.LESSON_BYTES_PER_IMAGE,
        seconds=time.perf_counter() - start,
        peak_memory=memory,
    )
