"""Read a source in windows (fixed runs of entries), decoded ahead by other processes.

A window is read in parts, which are as large as their pixels allow: often it is a single part. Memory holds about
three parts, however large the source: one that is read, one that is encoded and one that is written. It knows no
encoder and no dataset.
"""

import itertools
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import numpy as np

from sana_cli.config.keys import Config
from sana_cli.sources.entry import Entry, Skipped
from sana_cli.sources.images import Fitted, Fitting, decode_all

IMAGES_AT_ONCE = 64  # per task of a worker
MAX_WORKERS = 8


@dataclass
class SourcePart:
    """A run of entries of a window. Captions are always read; images are decoded only if needed."""

    window: int  # its number
    ends: bool = False  # the window ends with it; not always known of the last one of a source
    captions: dict[str, None] = field(default_factory=dict)  # distinct, in order, skipped images too
    attributes: dict[tuple[str, str], None] = field(default_factory=dict)  # names and values, likewise
    entries: list[Entry] = field(default_factory=list)  # with usable images
    images: list[Fitted] = field(default_factory=list)  # one per entry
    skipped: list[tuple[int, Skipped]] = field(default_factory=list)  # with positions in the part

    def skip(self, position: int, name: str, reason: str) -> None:
        """Skip an entry. Bytes of its name that are not text are escaped."""
        self.skipped.append((position, Skipped(name.encode("utf-8", "backslashreplace").decode(), reason)))


class WindowReader:
    """Reads windows in order. Images are decoded in worker processes if that is faster."""

    def __init__(
        self, config: Config, entries: Iterable[Entry | Skipped], size: int, part: int, few: bool
    ) -> None:
        """Windows have `size` entries, their parts `part`; the last of each may have fewer."""
        self.entries, self.size, self.part = iter(entries), size, part
        channels = config.model.in_channels if config.data.autoencoder is None else 3
        self.fitting = Fitting(config.data.size, channels, config.data.fit, config.data.buckets)
        workers = config.data.workers
        self.workers = (0 if few else min(MAX_WORKERS, os.cpu_count() or 1)) if workers is None else workers
        self.pool: ProcessPoolExecutor | None = None
        self.taken = 0  # entries read so far
        self.windows = 0  # begun so far
        self._left = 0  # entries of the latest
        self.notes: tuple[str, ...] = ()
        self.stopped = False

    def close(self) -> None:
        """Stop the workers and a running read."""
        self.stopped = True
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)

    @property
    def window(self) -> int:
        """The number of the window of the next part."""
        return self.windows - (self._left > 0)

    def next(self, wanted: bool) -> SourcePart | None:
        """Read the next part of a window, decoded if `wanted`; None after the last."""
        part, position, left = SourcePart(self.window), 0, self._left or self.size
        pending: deque[tuple[list[tuple[int, Entry]], Future[list[Fitted | str]]]] = deque()
        entries = itertools.islice(self.entries, min(self.part, left))
        while not self.stopped and (chunk := list(itertools.islice(entries, IMAGES_AT_ONCE))):
            found: list[tuple[int, Entry]] = []
            for entry in chunk:
                if isinstance(entry, Skipped):
                    part.skip(position, entry.name, entry.reason)
                else:
                    part.captions |= dict.fromkeys(entry.captions)
                    part.attributes |= dict.fromkeys(entry.attributes.items())
                    found.append((position, entry))
                position += 1
            if wanted and found:
                without_images = [(number, replace(entry, image=b"")) for number, entry in found]
                pending.append((without_images, self._decode([entry.image for _, entry in found])))
            while len(pending) > 2 * self.workers:
                self._take(part, *pending.popleft())
            self.taken += len(chunk)
        while pending:
            self._take(part, *pending.popleft())
        if position == 0:
            return None
        self.windows = part.window + 1
        self._left = left - position
        part.ends = self._left == 0 or position < self.part
        part.skipped.sort(key=lambda pair: pair[0])
        return part

    def _decode(self, images: list[Any]) -> Future[list[Fitted | str]]:
        """Decode in a worker; here if there are none or all images are pixels already."""
        if self.workers and not all(isinstance(image, np.ndarray) for image in images):
            try:
                if self.pool is None:
                    self.pool = ProcessPoolExecutor(self.workers, get_context("spawn"))
                return self.pool.submit(decode_all, images, self.fitting)
            except BrokenProcessPool:
                raise
            except (OSError, ImportError, NotImplementedError) as error:
                self.workers = 0  # the system has no semaphores, or allows no more processes
                self.notes += (
                    f"images are decoded in one process: this system starts no workers ({error}); "
                    "data.workers=0 asks for that",
                )
        future: Future[list[Fitted | str]] = Future()
        future.set_result(decode_all(images, self.fitting))
        return future

    @staticmethod
    def _take(
        part: SourcePart, entries: list[tuple[int, Entry]], decoded: Future[list[Fitted | str]]
    ) -> None:
        for (position, entry), image in zip(entries, decoded.result(), strict=True):
            if isinstance(image, str):
                part.skip(position, entry.id, image)
            else:
                part.entries.append(entry)
                part.images.append(image)
