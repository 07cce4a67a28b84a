"""Windows of a source, encoded and written: each caption through the encoder once, images as pixels or latents.

While one window is encoded, the next is read and the one before is written.

Shapes: L tokens of a caption, D width of its states.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana_cli.autoencoder import Autoencoder
from sana_cli.dataset import writer
from sana_cli.errors import SanaError
from sana_cli.runtime.device import return_memory
from sana_cli.runtime.distributed import World
from sana_cli.runtime.records import CaptionShard, LeftOut
from sana_cli.sources.attributes import ADVICE, MOST, MOST_VALUES
from sana_cli.sources.entry import Entry
from sana_cli.sources.images import Fitted
from sana_cli.sources.windows import IMAGES_AT_ONCE, SourceWindow, WindowReader
from sana_cli.text import CaptionEncoder

SECONDS_BETWEEN_YIELDS = 0.5  # while a window is read
FIRST_SKIPPED = 5  # entries that a summary or a message names


def strict_error(name: str, reason: str) -> SanaError:
    """The message about an entry that cannot be used, where none may be left out."""
    return SanaError(f"{name}: {reason}", "leave out `strict` to go on without such entries")


class Embedder:
    """Encodes the windows of one process and writes them."""

    def __init__(
        self,
        encoder: CaptionEncoder,
        autoencoder: Autoencoder | None,
        into: writer.DatasetWriter,
        strict: bool,
    ) -> None:
        self.encoder, self.autoencoder, self.into, self.strict = encoder, autoencoder, into, strict
        self.caption_ids: dict[str, int] = {"": 0}  # the null caption leads
        self.attributes: dict[str, dict[str, int]] = {}  # by name: the number of each value
        self.resumed = 0  # windows that were there already

    def windows(self, reader: WindowReader, world: World) -> Iterator[None]:
        """Take every window of the source, and write those of this process. Yields often, for progress."""
        with ThreadPoolExecutor(1) as reading, _Background() as background:
            ahead = reading.submit(self._read, reader, world)
            try:
                while True:
                    while not ahead.done():
                        wait([ahead], timeout=SECONDS_BETWEEN_YIELDS)
                        yield
                    window, wanted = ahead.result()
                    if window is None:
                        break
                    ahead = reading.submit(self._read, reader, world)
                    captions = self._number(window)
                    if wanted:
                        yield from self._write(window, captions, background)
                    del window, captions
                    return_memory(self.encoder.device)  # small tensors leave holes that malloc keeps
                    yield
                background.wait()
            finally:
                reader.close()

    def _read(self, reader: WindowReader, world: World) -> tuple[SourceWindow | None, bool]:
        """The next window, and whether this process is to write it."""
        number = reader.windows
        record = self.into.done(number, hashes=True)
        self.resumed += record is not None
        if record is not None and self.strict and record.skipped:
            raise strict_error(record.skipped[0].name, record.skipped[0].reason)
        wanted = record is None and number % world.size == world.rank
        return reader.next(wanted), wanted

    def _number(self, window: SourceWindow) -> list[str]:
        """Give ids to what is new in a window, captions and attributes; those captions, in order."""
        new = [caption for caption in window.captions if caption not in self.caption_ids]
        self.caption_ids |= {caption: len(self.caption_ids) + at for at, caption in enumerate(new)}
        for name, value in window.attributes:
            known = self.attributes.setdefault(name, {})
            known.setdefault(value, len(known))
            if len(self.attributes) > MOST:
                what = f"the images have over {MOST} attributes, one of them {name!r}"
                raise SanaError(f"data.attribute_field: {what}", *ADVICE)
            if len(known) > MOST_VALUES:
                what = f"the attribute {name!r} has over {MOST_VALUES:,} values, one of them {value!r:.60}"
                raise SanaError(f"data.attribute_field: {what}", *ADVICE)
        if self.strict and window.skipped:
            _, first = window.skipped[0]
            raise strict_error(first.name, first.reason)
        return ["", *new] if window.number == 0 else new

    def _write(self, window: SourceWindow, captions: list[str], background: "_Background") -> Iterator[None]:
        """Encode a window and begin to write it."""
        tokens = self.encoder.tokenize(captions)
        cut = sum(self.encoder.is_cut(caption, tokens=found) for caption, found in tokens.items())
        shards: list[Future[CaptionShard]] = []
        for run in self._runs(captions, tokens):
            states = dict(self.encoder.encode_tokens({caption: tokens[caption] for caption in run}))
            in_order = {caption: states[caption] for caption in run}
            shards.append(background.do(self.into.write_captions, window.number, len(shards), in_order))
            del states, in_order
            yield
        images, written = list(self._images(window)), [shard.result() for shard in shards]
        skipped = [LeftOut(name=entry.name, reason=entry.reason) for _, entry in window.skipped]
        background.do(self.into.write, window.number, written, images, self.caption_ids, skipped, cut)

    def _runs(self, captions: Sequence[str], tokens: dict[str, tuple[list[int], int]]) -> Iterator[list[str]]:
        """Captions in this order, in runs whose states fit into a shard."""
        run: list[str] = []
        budget = room = writer.WINDOW_BYTES // (2 * self.encoder.dim)  # tokens of a shard
        for caption in captions:
            length = len(tokens[caption][0])
            if run and length > room:
                yield run
                run, room = [], budget
            run.append(caption)
            room -= length
        if run:
            yield run

    def _images(self, window: SourceWindow) -> Iterator[writer.Images]:
        """The images of each shape, by rising height, then width; inside each in the order of the source."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for number, image in enumerate(window.images):
            by_shape.setdefault(image.pixels.shape, []).append(number)
        for shape in sorted(by_shape):
            numbers = by_shape[shape]
            yield self._of_one_shape(
                [window.entries[number] for number in numbers], [window.images[number] for number in numbers]
            )

    def _of_one_shape(self, entries: Sequence[Entry], images: Sequence[Fitted]) -> writer.Images:
        return writer.Images(
            pixels=self._samples(entries, images),
            original_sizes=[image.original for image in images],
            sample_ids=[entry.id for entry in entries],
            captions=[entry.captions for entry in entries],
            weights=[entry.weights for entry in entries],
            attributes=[
                {name: self.attributes[name][value] for name, value in entry.attributes.items()}
                for entry in entries
            ],
            says=[entry.says for entry in entries],
            names=list(self.attributes),
        )

    def _samples(self, entries: Sequence[Entry], images: Sequence[Fitted]) -> Tensor:
        """Pixels (n, C, H, W) uint8 of images of one shape, or their latents."""
        if self.autoencoder is None:
            return _stacked(images)
        parts = []
        for begin in range(0, len(entries), IMAGES_AT_ONCE):
            pixels = _stacked(images[begin : begin + IMAGES_AT_ONCE])
            parts.append(self.autoencoder.encode(pixels.float() / 127.5 - 1))
            if not parts[-1].isfinite().all():
                raise SanaError(
                    f"the autoencoder gave latents that are not finite, from {entries[begin].id} on"
                )
        return torch.cat(parts)

    def reasons(self) -> Iterator[str]:
        """Why entries were left out, a few of them."""
        record = self.into.done(0)
        return (
            f"{entry.name}: {entry.reason}" for entry in (record.skipped[:FIRST_SKIPPED] if record else [])
        )


def _stacked(images: Sequence[Fitted]) -> Tensor:
    return torch.from_numpy(np.stack([image.pixels for image in images]))


class _Background:
    """Does one thing at a time in a thread. A failure is raised where the next thing is given to it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._latest: Future[Any] | None = None

    def __enter__(self) -> "_Background":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def do(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Begin once the thing before is done."""
        self.wait()
        self._latest = self._thread.submit(function, *arguments)
        return self._latest

    def wait(self) -> None:
        """Until the latest thing is done."""
        if self._latest is not None:
            self._latest.result()
