"""`sana embed`: images and captions to a pre-embedded dataset. It prints nothing and knows nothing of training.

The source is taken in fixed windows. While captions of one are encoded, the next is read and decoded (in processes of their
own) and the one before is written, so that what is in memory is three windows, however large the source.
"""

import contextlib
import itertools
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana_cli.autoencoder import Autoencoder, read_info
from sana_cli.config.keys import Config
from sana_cli.dataset import layout, writer
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.runtime import files, hub
from sana_cli.runtime.device import peak_memory, resolve_device, return_memory
from sana_cli.runtime.distributed import World, world
from sana_cli.sources import Entry, Skipped, Source, open_source
from sana_cli.sources.images import decode_all
from sana_cli.text import CaptionEncoder, asked_for, check_capitals, check_same_encoder, load_encoder

IMAGES_AT_ONCE = 64  # handed to a worker, and put through an autoencoder
FEW = 256  # images that are not worth starting workers for
MOST_WORKERS = 8
FIRST_SKIPPED = 5  # that a summary tells


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
    image_shape: tuple[int, int, int]
    image_bytes: int | None
    lesson_bytes: int | None


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
    was_there: bool  # it matched already, and nothing was done
    resumed: int  # windows that an earlier embed had left
    images: int
    captions: int
    tokens: int
    skipped: int  # entries that were left out
    first_skipped: tuple[str, ...]  # name and reason of some of them
    bytes: int
    lesson_bytes: int  # what one padded float32 array for each image, the lesson's layout, would have taken
    seconds: float
    peak_memory: int
    cut: int = 0  # captions longer than text.max_length, which were cut there
    notes: tuple[str, ...] = ()  # what a person should know: work that could not be shared out
    held_out: "EmbedSummary | None" = None  # the held-out split, a dataset of its own


# --- what, and whether it is there already ----------------------------------------------------------------------------


def _source(options: EmbedOptions) -> tuple[Source, int | None, dict[str, Any]]:
    source = open_source(options.config.data)
    there = source.count()
    fingerprint = source.fingerprint()
    if options.limit is None or (there is not None and options.limit >= there):
        return source, there, fingerprint
    return source, options.limit, fingerprint | {"limit": options.limit}


def _image(config: Config) -> dict[str, Any]:
    height, width = config.data.sample_sides
    shape = {"channels": config.model.in_channels, "height": height, "width": width}
    fit = {} if config.data.fit == "crop" else {"fit": config.data.fit}
    if config.data.autoencoder is None:
        return {"kind": "pixels", **shape, **fit}
    name = hub.model_name(config.data.autoencoder)
    return {"kind": "latents", **shape, **fit, "factor": config.data.factor, "autoencoder": name}


def plan(options: EmbedOptions) -> EmbedPlan:
    """What would be done (`--dry-run`)."""
    _, count, fingerprint = _source(options)
    image = _image(options.config)
    return EmbedPlan(
        directory=options.directory,
        exists=layout.is_dataset(options.directory),
        source=fingerprint,
        encoder=asked_for(options.config.text),
        images=count,
        image_shape=(image["channels"], image["height"], image["width"]),
        image_bytes=None if count is None else count * _sample_bytes(image),
        lesson_bytes=None if count is None else count * layout.LESSON_BYTES_PER_IMAGE,
    )


def _sample_bytes(image: dict[str, Any]) -> int:
    return image["channels"] * image["height"] * image["width"] * (1 if image["kind"] == "pixels" else 2)


def _check_same(dataset: Dataset, source: dict[str, Any], config: Config) -> None:
    where, way_out = str(dataset.directory), "make it anew with --overwrite, or another beside it with --set data.dir=DIR"
    for name, recorded, given in (("source", dataset.index["source"], source), ("image", dataset.index["image"], _image(config))):
        extra = [key for key in recorded if key not in given and key != "autoencoder_fingerprint"]  # known once it is loaded
        for key in (*given, *extra):
            if recorded.get(key) != given.get(key):
                raise SanaError(f"{where} was made with {name}.{key} {recorded.get(key)!r}, not {given.get(key)!r}", way_out)
    check_same_encoder(dataset.index["encoder"], asked_for(config.text), where, way_out)
    check_capitals(dataset.index["encoder"], dataset.texts, where, way_out)


def _check_room(directory: Path, needed: int) -> None:
    """Refuse before the first byte what cannot fit on the disk.

    Raises:
        SanaError: it cannot.
    """
    place = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise SanaError(
            f"{directory} needs at least {needed:,} bytes, and its disk has {free:,} free",
            "free some space, or put it elsewhere with --out DIR or --set data.dir=DIR",
        )


# --- windows ----------------------------------------------------------------------------------------------------------


@dataclass
class _Window:
    """A run of the source's entries. Their captions are known at once; the images of a window to be written are decoded."""

    number: int
    captions: dict[str, None] = field(default_factory=dict)  # distinct, in order; those of images left out are among them
    entries: list[Entry] = field(default_factory=list)  # whose images could be used, and are in `pixels` instead
    pixels: list[np.ndarray] = field(default_factory=list)  # (C, H, W) uint8 of each
    skipped: list[tuple[int, Skipped]] = field(default_factory=list)  # with their place in the window

    def skip(self, place: int, name: str, reason: str) -> None:
        """Leave an entry out; its name may be no text, as file names need not be."""
        self.skipped.append((place, Skipped(name.encode("utf-8", "backslashreplace").decode(), reason)))


class _Reader:
    """Reads windows one after another. Images of wanted ones are decoded, in worker processes where that pays."""

    def __init__(self, config: Config, entries: Iterable[Entry | Skipped], size: int, few: bool) -> None:
        self.entries, self.size = iter(entries), size
        self.fitting = (config.data.size, config.model.in_channels if config.data.autoencoder is None else 3, config.data.fit)
        workers = config.data.workers
        self.workers = (0 if few else min(MOST_WORKERS, os.cpu_count() or 1)) if workers is None else workers
        self.pool: ProcessPoolExecutor | None = None
        self.taken = 0  # entries so far, for whoever watches
        self.windows = 0
        self.notes: tuple[str, ...] = ()
        self.stopped = False

    def close(self) -> None:
        """End the workers, and whoever is reading."""
        self.stopped = True
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def next(self, wanted: bool) -> _Window | None:
        """The next window; None after the last."""
        window, place = _Window(self.windows), 0
        pending: deque[tuple[list[tuple[int, Entry]], Future[list[np.ndarray | str]]]] = deque()
        entries = itertools.islice(self.entries, self.size)
        while not self.stopped and (chunk := list(itertools.islice(entries, IMAGES_AT_ONCE))):
            found: list[tuple[int, Entry]] = []
            for entry in chunk:
                if isinstance(entry, Skipped):
                    window.skip(place, entry.name, entry.reason)
                else:
                    window.captions |= dict.fromkeys(entry.captions)
                    found.append((place, entry))
                place += 1
            if wanted and found:
                pending.append(
                    ([(at, replace(entry, image=b"")) for at, entry in found], self._decode([e.image for _, e in found]))
                )
            while len(pending) > 2 * self.workers:
                self._take(window, *pending.popleft())
            self.taken += len(chunk)
        while pending:
            self._take(window, *pending.popleft())
        if place == 0:
            return None
        self.windows += 1
        window.skipped.sort(key=lambda pair: pair[0])
        return window

    def _decode(self, images: list[Any]) -> Future[list[np.ndarray | str]]:
        if self.workers and not all(isinstance(image, np.ndarray) for image in images):
            try:
                if self.pool is None:
                    self.pool = ProcessPoolExecutor(self.workers, get_context("spawn"))
                return self.pool.submit(decode_all, images, *self.fitting)
            except BrokenProcessPool:
                raise
            except (OSError, ImportError, NotImplementedError) as error:  # no semaphores, or no more processes
                self.workers = 0
                self.notes += (
                    f"images are decoded in one process: this system starts no workers ({error}); data.workers=0 asks for that",
                )
        future: Future[list[np.ndarray | str]] = Future()
        future.set_result(decode_all(images, *self.fitting))
        return future

    @staticmethod
    def _take(window: _Window, entries: list[tuple[int, Entry]], decoded: Future[list[np.ndarray | str]]) -> None:
        for (place, entry), pixels in zip(entries, decoded.result(), strict=True):
            if isinstance(pixels, str):
                window.skip(place, entry.id, pixels)
            else:
                window.entries.append(entry)
                window.pixels.append(pixels)


# --- the work ---------------------------------------------------------------------------------------------------------


def embed(options: EmbedOptions) -> Iterator[EmbedStep | EmbedSummary]:
    """Embed the config's source, and its held-out split; yields progress, and at the end an `EmbedSummary`.

    A finished dataset of the same source, encoder and image size is left as it is. Work that was interrupted goes on after
    its last whole window. Under torchrun the windows are shared out, and the first process alone yields anything.

    Raises:
        SanaError: a finished dataset differs, naming the field (unless `overwrite`, which replaces it once the new one is
            whole); the source, the encoder or the disk fails; no entry can be used, or with `strict`, one cannot.
    """
    parts, split = [options], options.config.data.held_out
    if split is not None:
        data = options.config.data.model_copy(update={"split": split, "held_out_split": None})
        aside = replace(
            options, config=options.config.model_copy(update={"data": data}), out=layout.held_out_dir(options.directory, split)
        )
        try:
            open_source(data)  # before the work, not after it
        except SanaError as error:
            first, *rest = str(error).splitlines()
            raise SanaError(f"data.held_out_split: {first}", *rest, exit_code=error.exit_code) from error
        parts.append(aside)
    summaries = []
    with world() as here:
        for part in parts:
            for step in _embed(part, here):
                if isinstance(step, EmbedSummary):
                    summaries.append(step)
                else:
                    yield step
    if summaries:
        yield replace(summaries[0], held_out=summaries[1] if len(summaries) > 1 else None)


def _embed(options: EmbedOptions, here: World) -> Iterator[EmbedStep | EmbedSummary]:
    """One split."""
    start = time.perf_counter()
    directory, config = options.directory, options.config
    if directory.is_symlink():
        directory = directory.resolve()
    try:
        source, count, fingerprint = _source(options)
    except OSError as error:
        raise files.storage_error(error, f"reading {config.data.path}") from error
    device, partial = resolve_device(config.run.device), layout.partial_dir(directory)
    with here.together():  # before the first of these processes takes the lock
        if here.first:
            files.check_unlocked(directory)
    layout.check_only_ours(partial)
    if layout.is_dataset(partial) and not (partial / layout.PLAN).exists() and not directory.exists():
        with contextlib.suppress(SanaError):  # whole, but stopped before it was in its place
            _check_same(Dataset(partial), fingerprint, config)
            files.put_in_place(partial, directory)
    if layout.is_dataset(directory) and not options.overwrite:
        dataset = Dataset(directory)
        _check_same(dataset, fingerprint, config)
        for entry in dataset.skipped() if options.strict else ():
            raise _strict_error(entry["name"], entry["reason"])
        if here.first:
            yield _summary(dataset, start, peak_memory(device), was_there=True)
        return
    layout.check_only_ours(directory)
    image = _image(config)
    _check_room(directory, 0 if count is None or partial.exists() else count * _sample_bytes(image))
    autoencoder = _load_autoencoder(config, device)
    encoder = load_encoder(config.text, device)
    if autoencoder is not None:
        image["autoencoder_fingerprint"] = autoencoder.fingerprint
    pixels = int(np.prod(config.data.size)) * (3 if autoencoder is not None else config.model.in_channels)
    size = max(IMAGES_AT_ONCE, min(writer.WINDOW, writer.WINDOW_BYTES // pixels))
    made = {"source": fingerprint, "image": image, "encoder": encoder.fingerprint, "window": size}
    facts = {"image": image, "caption_dim": encoder.dim, "encoder": encoder.fingerprint, "source": fingerprint}
    entries = source if count is None else itertools.islice(iter(source), count)
    reader = _Reader(config, entries, size, few=count is not None and count < FEW)
    held = contextlib.ExitStack()
    try:
        with here.together():
            if here.first:  # takes up what an earlier embed of the same plan left, or makes room; the others find it so
                held.enter_context(files.locked(directory))
                writer.DatasetWriter(partial, made)
        work = _Work(encoder, autoencoder, writer.DatasetWriter(partial, made), options.strict)
        for _ in work.windows(reader, here):
            if here.first:
                yield EmbedStep(reader.taken, count, len(work.caption_ids), config.data.split)
        here.wait()
        if here.first:
            if not any(record["images"] for record in map(work.writer.done, range(reader.windows)) if record):
                raise SanaError(f"{options.config.data.source}: no entry can be used", *work.reasons())
            work.writer.finish(reader.windows, work.caption_ids, facts)
            files.put_in_place(partial, directory)
            done = _summary(Dataset(directory), start, peak_memory(device), was_there=False, resumed=work.resumed)
            yield replace(done, notes=reader.notes)
        here.wait()
    except OSError as error:
        raise files.storage_error(error, f"writing {directory}") from error
    except BrokenProcessPool as error:
        raise SanaError(
            "a process that decodes images was killed, possibly out of memory",
            "run the command again to go on, with fewer: --set data.workers=1",
        ) from error
    finally:
        held.close()


class _Work:
    """Captions and images of each window, encoded and written."""

    def __init__(
        self, encoder: CaptionEncoder, autoencoder: Autoencoder | None, writer: writer.DatasetWriter, strict: bool
    ) -> None:
        self.encoder, self.autoencoder, self.writer, self.strict = encoder, autoencoder, writer, strict
        self.caption_ids: dict[str, int] = {"": 0}  # the null caption leads
        self.resumed = 0
        self._cut = 0  # captions of the window at hand that are longer than the encoder takes

    def windows(self, reader: _Reader, here: World) -> Iterator[None]:
        """Every window of the source, those of this process written. Yields often, for progress."""

        def read() -> tuple[_Window | None, bool]:
            number = reader.windows
            record = self.writer.done(number, hashes=True)
            there = record is not None
            self.resumed += there
            if record is not None and self.strict and record["skipped"]:
                raise _strict_error(record["skipped"][0]["name"], record["skipped"][0]["reason"])
            return reader.next(wanted=not there and number % here.size == here.rank), there

        writing: Future[Any] | None = None

        def write(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
            """In the background, one thing at a time: the one before is done, or has failed here."""
            nonlocal writing
            if writing is not None:
                writing.result()
            writing = writers.submit(function, *arguments)
            return writing

        with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writers:
            ahead = reading.submit(read)
            try:
                while True:
                    while not ahead.done():
                        wait([ahead], timeout=0.5)
                        yield
                    window, there = ahead.result()
                    if window is None:
                        break
                    ahead = reading.submit(read)
                    new = [caption for caption in window.captions if caption not in self.caption_ids]
                    leads = [""] if window.number == 0 else []
                    self.caption_ids |= {caption: len(self.caption_ids) + at for at, caption in enumerate(new)}
                    if self.strict and window.skipped:
                        _, first = window.skipped[0]
                        raise _strict_error(first.name, first.reason)
                    if there or window.number % here.size != here.rank:
                        yield
                        continue
                    shards: list[Future[dict[str, Any]]] = []
                    for states in self._captions([*leads, *new]):
                        shards.append(write(self.writer.write_captions, window.number, len(shards), states))
                        del states
                        yield
                    images, captions = self._images(window), [shard.result() for shard in shards]
                    skipped = [{"name": entry.name, "reason": entry.reason} for _, entry in window.skipped]
                    write(self.writer.write, window.number, captions, images, self.caption_ids, skipped, self._cut)
                    del window, shards, captions, images, new
                    return_memory(self.encoder.device)  # many small tensors leave holes that malloc would keep
                    yield
                if writing is not None:
                    writing.result()
            finally:
                reader.close()

    def _captions(self, captions: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """States of captions in this order, in shards of a bounded size."""
        tokens = self.encoder.tokenize(captions)
        self._cut = sum(self.encoder.is_cut(caption, tokens=found) for caption, found in tokens.items())
        run: list[str] = []
        budget = room = writer.WINDOW_BYTES // (2 * self.encoder.dim)  # tokens of a shard
        for caption in captions:
            length = len(tokens[caption][0])
            if run and length > room:
                yield self._states(run, tokens)
                run, room = [], budget
            run.append(caption)
            room -= length
        if run:
            yield self._states(run, tokens)

    def _states(self, captions: Sequence[str], tokens: dict[str, tuple[list[int], int]]) -> dict[str, Tensor]:
        states = dict(self.encoder.encode_tokens({caption: tokens[caption] for caption in captions}))
        return {caption: states[caption] for caption in captions}

    def _images(self, window: _Window) -> writer.Images:
        entries, parts = window.entries, []
        for begin in range(0, len(entries), IMAGES_AT_ONCE):
            pixels = torch.from_numpy(np.stack(window.pixels[begin : begin + IMAGES_AT_ONCE]))
            parts.append(pixels if self.autoencoder is None else self.autoencoder.encode(pixels.float() / 127.5 - 1))
            if self.autoencoder is not None and not parts[-1].isfinite().all():
                raise SanaError(f"the autoencoder gave latents that are not finite, from {entries[begin].id} on")
        return writer.Images(
            pixels=torch.cat(parts) if parts else torch.empty(0),
            sample_ids=[entry.id for entry in entries],
            captions=[entry.captions for entry in entries],
            weights=[entry.weights for entry in entries],
            labels=[entry.label for entry in entries],
        )

    def reasons(self) -> Iterator[str]:
        """Why entries were left out, a few of them."""
        record = self.writer.done(0) or {"skipped": []}
        return (f"{entry['name']}: {entry['reason']}" for entry in record["skipped"][:FIRST_SKIPPED])


def _strict_error(name: str, reason: str) -> SanaError:
    return SanaError(f"{name}: {reason}", "leave out --strict to go on without such entries")


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
    return Autoencoder(source, device)


def _summary(dataset: Dataset, start: float, memory: int, was_there: bool, resumed: int = 0) -> EmbedSummary:
    counts = dataset.index["counts"]
    skipped = itertools.islice(dataset.skipped(), FIRST_SKIPPED)
    return EmbedSummary(
        directory=dataset.directory,
        was_there=was_there,
        resumed=resumed,
        images=counts["images"],
        captions=counts["captions"],
        tokens=counts["tokens"],
        skipped=counts.get("skipped", 0),
        first_skipped=tuple(f"{entry['name']}: {entry['reason']}" for entry in skipped),
        bytes=dataset.bytes,
        lesson_bytes=counts["images"] * layout.LESSON_BYTES_PER_IMAGE,
        seconds=time.perf_counter() - start,
        peak_memory=memory,
        cut=counts.get("cut", 0),
    )
