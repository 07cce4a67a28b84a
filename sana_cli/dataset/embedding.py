"""Windows of a source, encoded and written: each caption through the encoder once, images as pixels or latents.

While one part of a window is encoded, the next is read and the window before is written.

Shapes: L tokens of a caption, D width of its states, n images of a shape.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana_cli.autoencoder import Autoencoder
from sana_cli.dataset import writer
from sana_cli.dataset.captions import CaptionIds
from sana_cli.errors import SanaError
from sana_cli.runtime.device import return_memory
from sana_cli.runtime.distributed import World
from sana_cli.runtime.records import CaptionShard, LeftOut
from sana_cli.sources.attributes import ADVICE, MOST, MOST_VALUES
from sana_cli.sources.entry import Entry
from sana_cli.sources.images import Fitted
from sana_cli.sources.windows import IMAGES_AT_ONCE, SourcePart, WindowReader
from sana_cli.text import CaptionEncoder, words_of

SECONDS_BETWEEN_YIELDS = 0.5  # while a window is read
FIRST_SKIPPED = 5  # entries that a summary or a message names
MOST_CAPTIONS = 2**31  # different ones: their ids are stored as int32
MOST_WORDS = 20_000  # of all captions, that an index or a checkpoint has; of more, it has none


def strict_error(name: str, reason: str) -> SanaError:
    """The message about an entry that cannot be used, where none may be left out."""
    return SanaError(f"{name}: {reason}", "leave out `strict` to go on without such entries")


Shape = tuple[int, ...]  # channels, height and width of the pixels of an image


@dataclass
class _Window:
    """What has been taken of a window: images as they are stored, and captions that are still to be encoded."""

    number: int
    ids: dict[str, int] = field(default_factory=dict)  # of all its captions
    captions: list[str] = field(default_factory=list)  # those that are new
    entries: dict[Shape, list[Entry]] = field(default_factory=dict)
    originals: dict[Shape, list[tuple[int, int]]] = field(default_factory=dict)
    samples: dict[Shape, list[Tensor]] = field(default_factory=dict)  # (n, C, H, W), part by part
    skipped: list[LeftOut] = field(default_factory=list)


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
        self.captions = CaptionIds(into.folder)
        self.captions.number([""])  # the null caption leads
        self.one_word = True  # all captions are single words
        self.words: set[str] | None = set()  # of all captions; None: too many
        self.attributes: dict[str, dict[str, int]] = {}  # by name: the number of each value
        self.resumed = 0  # windows that were there already
        self._looked_at = -1, False  # the window that is read, and whether this process is to write it

    def windows(self, reader: WindowReader, world: World) -> Iterator[None]:
        """Take every window of the source, and write those of this process. Yields often, for progress."""
        taken: _Window | None = None  # one of ours that is not written yet
        with ThreadPoolExecutor(1) as reading, _Background() as background:
            ahead = reading.submit(self._read, reader, world)
            try:
                while True:
                    while not ahead.done():
                        wait([ahead], timeout=SECONDS_BETWEEN_YIELDS)
                        yield
                    part, wanted = ahead.result()
                    if part is not None:
                        ahead = reading.submit(self._read, reader, world)
                        ids, new = self._number(part)
                        if wanted:
                            taken = taken or _Window(part.window)
                            self._take(taken, part, ids, new)
                    if taken is not None and (part is None or part.ends):
                        yield from self._write(taken, background)
                        taken = None
                    if part is None:
                        break
                    del part, ids, new
                    return_memory(self.encoder.device)  # small tensors leave holes that malloc keeps
                    yield
                background.wait()
            finally:
                reader.close()
                self.captions.close()

    def _read(self, reader: WindowReader, world: World) -> tuple[SourcePart | None, bool]:
        """The next part of a window, and whether this process is to write that."""
        number = reader.window
        if number == self._looked_at[0]:
            return reader.next(self._looked_at[1]), self._looked_at[1]
        is_ours = number % world.size == world.rank
        record = self.into.done(number, hashes=is_ours)  # each is read again by the one that would write it
        self.resumed += record is not None
        if record is not None and self.strict and record.skipped:
            raise strict_error(record.skipped[0].name, record.skipped[0].reason)
        wanted = record is None and is_ours
        self._looked_at = number, wanted
        return reader.next(wanted), wanted

    def _number(self, part: SourcePart) -> tuple[dict[str, int], list[str]]:
        """Give ids to what is new in a part, captions and attributes.

        Returns the ids of its captions, and those of them that are new, in order.
        """
        ids, new = self.captions.number(list(part.captions))
        if len(self.captions) > MOST_CAPTIONS:
            raise SanaError(
                f"the images have over {MOST_CAPTIONS:,} different captions",
                "make several datasets of them, which data.also brings together",
            )
        self._learn(new)
        for name, value in part.attributes:
            known = self.attributes.setdefault(name, {})
            known.setdefault(value, len(known))
            if len(self.attributes) > MOST:
                what = f"the images have over {MOST} attributes, one of them {name!r}"
                raise SanaError(f"data.attribute_field: {what}", *ADVICE)
            if len(known) > MOST_VALUES:
                what = f"the attribute {name!r} has over {MOST_VALUES:,} values, one of them {value!r:.60}"
                raise SanaError(f"data.attribute_field: {what}", *ADVICE)
        if self.strict and part.skipped:
            _, first = part.skipped[0]
            raise strict_error(first.name, first.reason)
        return ids, new

    def _learn(self, captions: Sequence[str]) -> None:
        """Note what the index says of all captions: whether they are single words, and their words."""
        self.one_word = self.one_word and all(len(caption.split()) == 1 for caption in captions)
        for caption in captions:
            if self.words is None:
                return
            self.words.update(words_of(caption))
            if len(self.words) > MOST_WORDS:
                self.words = None

    def facts(self) -> dict[str, Any]:
        """What the index says of all captions and attributes, once all windows are taken."""
        return {
            "one_word_captions": self.one_word,
            "words": None if self.words is None else sorted(self.words),
            "attributes": {name: list(values) for name, values in self.attributes.items()},
        }

    def _take(self, into: _Window, part: SourcePart, ids: dict[str, int], captions: list[str]) -> None:
        """Add a part to its window, its images as pixels or latents."""
        into.ids |= ids
        into.captions += captions
        into.skipped += [LeftOut(name=entry.name, reason=entry.reason) for _, entry in part.skipped]
        by_shape: dict[Shape, list[int]] = {}
        for number, image in enumerate(part.images):
            by_shape.setdefault(image.pixels.shape, []).append(number)
        for shape, numbers in by_shape.items():
            entries = [part.entries[number] for number in numbers]
            images = [part.images[number] for number in numbers]
            into.entries.setdefault(shape, []).extend(entries)
            into.originals.setdefault(shape, []).extend(image.original for image in images)
            into.samples.setdefault(shape, []).append(self._samples(entries, images))
        part.images.clear()  # their pixels are not needed any more

    def _write(self, window: _Window, background: "_Background") -> Iterator[None]:
        """Encode the new captions of a window, and begin to write it."""
        captions = ["", *window.captions] if window.number == 0 else window.captions  # the null caption leads
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
        background.do(self.into.write, window.number, written, images, window.ids, window.skipped, cut)

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

    def _images(self, window: _Window) -> Iterator[writer.Images]:
        """The images of each shape, by rising height, then width; inside each in the order of the source."""
        for shape in sorted(window.entries):
            entries, samples = window.entries[shape], window.samples.pop(shape)
            yield writer.Images(
                pixels=samples[0] if len(samples) == 1 else torch.cat(samples),
                original_sizes=window.originals[shape],
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
