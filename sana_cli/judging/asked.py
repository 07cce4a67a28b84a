"""What captions ask of a picture: a value of each attribute that they name.

It reads the attributes of datasets. It knows no network and draws nothing.

Shapes: n images or pictures, C H W of one, a judged attributes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.sources.entry import UNSEEN
from sana_cli.units import natural

FEWEST_VALUES, MOST_VALUES = 2, 300  # of an attribute that is judged
LEAST_IMAGES = 3.0  # of a value, on average, of an attribute that is judged
MOST_IMAGES = 60_000  # of a dataset, for training a judge and for its statistics
SEEN = "seen"  # the kind of captions that training has, and of real pictures of the training set

Values = Mapping[str, Sequence[str]]  # of each judged attribute, by name
Meaning = tuple[int, ...]  # the number of a value of each judged attribute; -1 is not asked


def judged_rows(dataset: Dataset) -> np.ndarray:
    """The images that a judge learns from: all, or `MOST_IMAGES` evenly spaced ones.

    The first ones would not do: a dataset may be sorted by class.
    """
    count = min(len(dataset), MOST_IMAGES)
    return np.arange(count) * len(dataset) // count


def split_rows(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Images of `judged_rows` to train on, and those to test on: every tenth, at least one."""
    rows = judged_rows(dataset)
    tested = np.arange(len(rows)) % 10 == min(9, len(rows) - 1)
    return rows[~tested], rows[tested]


def judged_attributes(dataset: Dataset) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """The attributes that can be judged, each with its values in natural order, and notes on the others.

    They have 2 to 300 values, and at least 3 images of a value on average. `unseen` is never
    judged: it is no part of a picture.
    """
    judged, notes = dict[str, tuple[str, ...]](), []
    ids = dataset.attribute_ids()
    for column, (name, values) in enumerate(dataset.attributes.items()):
        if name == UNSEEN:
            continue
        images = int((ids[:, column] >= 0).sum())
        if FEWEST_VALUES <= len(values) <= MOST_VALUES and images >= LEAST_IMAGES * len(values):
            judged[name] = tuple(sorted(values, key=natural))
        else:
            notes.append(
                f"{name} is not judged: {len(values):,} values in {images:,} images; "
                f"that needs {FEWEST_VALUES} to {MOST_VALUES} values, and {LEAST_IMAGES:g} images of each on average"
            )
    return judged, tuple(notes)


def values_of(dataset: Dataset, attributes: Values) -> Tensor:
    """The value of each image's attributes (n, a), as its place in `attributes`.

    It is -1 where an image has none, or one that `attributes` lacks. Datasets may number values
    differently, so they are compared by text.
    """
    ids, names, columns = dataset.attribute_ids(), list(dataset.attributes), []
    for name, values in attributes.items():
        if name in names:
            places = places_in(values, dataset.attributes[name])
            columns.append(places[ids[:, names.index(name)]])
        else:
            columns.append(torch.full((len(ids),), -1))
    return torch.stack(columns, dim=1)


def places_in(values: Sequence[str], others: Sequence[str]) -> Tensor:
    """The place in `values` of each other value, or -1; and a -1 at the end, for the index -1."""
    place = {value: number for number, value in enumerate(values)}
    return torch.tensor([*(place.get(value, -1) for value in others), -1])


def unseen_kinds(dataset: Dataset, held_out: Dataset | None) -> tuple[str, ...]:
    """The kinds of images in the held-out set that training lacks, by its attribute `unseen`.

    The value "seen" is no such kind.
    """
    if held_out is None or UNSEEN in dataset.attributes:
        return ()
    return tuple(kind for kind in held_out.attributes.get(UNSEEN, ()) if kind != SEEN)


def meanings(dataset: Dataset, attributes: Values, rows: np.ndarray) -> dict[int, Meaning]:
    """What the captions of these images ask, by id; those that ask nothing are left out.

    A caption asks for the attributes that it names, with the value on which all its images agree.
    """
    shown, found = values_of(dataset, attributes)[rows].tolist(), dict[int, Meaning]()
    for ids, says, values in zip(
        dataset.caption_ids(rows), dataset.caption_attributes(rows), shown, strict=True
    ):
        for caption, names in zip(ids, says, strict=True):
            asks = tuple(
                value if name in names else -1 for name, value in zip(attributes, values, strict=True)
            )
            agreed = found.setdefault(caption, asks)
            if agreed != asks:
                found[caption] = tuple(a if a == b else -1 for a, b in zip(agreed, asks, strict=True))
    return {caption: asks for caption, asks in sorted(found.items()) if any(value >= 0 for value in asks)}


@dataclass(frozen=True)
class Drawn:
    """Pictures of captions of one kind."""

    kind: str
    pixels: Tensor  # (n, C, H, W)
    captions: Sequence[str]  # n
    asked: Tensor  # (n, a), the number of the value that each caption asks of each attribute, or -1


@dataclass(frozen=True)
class Prompts:
    """The captions of one kind: what they ask, and which of them are drawn."""

    kind: str
    dataset: Dataset  # that has their states
    shares: np.ndarray  # how often training draws each caption of the dataset, of images of this kind
    texts: Sequence[str]  # all captions of the dataset
    meaning: Mapping[str, Meaning]  # of each caption that asks something
    drawn: tuple[int, ...]  # ids of those that are drawn

    def of(self, captions: Sequence[str], pixels: Tensor) -> "Drawn":
        """Pictures (n, C, H, W) of n of these captions."""
        asked = torch.tensor([self.meaning[caption] for caption in captions], dtype=torch.long)
        width = len(next(iter(self.meaning.values())))
        return Drawn(self.kind, pixels, captions, asked.reshape(len(captions), width))

    def as_frequent(self, count: int) -> list[int]:
        """Choose `count` of the drawn captions (their ids), as often as training draws each.

        Other frequencies raise the Fréchet distance: real digits in even numbers of each are
        0.2 further from all of MNIST.
        """
        chosen = self.shares[list(self.drawn)]
        places = np.searchsorted(chosen.cumsum() / chosen.sum(), (np.arange(count) + 0.5) / count)
        return [self.drawn[place] for place in places]


def prompts_of(dataset: Dataset, held_out: Dataset | None, attributes: Values) -> list[Prompts]:
    """The captions of the dataset, then those of each unseen kind of the held-out set.

    Captions of a kind that name every judged attribute are the only ones drawn, if training
    draws them at least half as often as all that ask something. Else all of these are drawn.

    Raises:
        SanaError: no caption of the dataset names an attribute on which its images agree.
    """
    found = [_prompts(SEEN, dataset, np.arange(len(dataset)), attributes)]
    if not found[0].drawn:
        raise SanaError(
            f"{dataset.directory}: no caption means one value of {' or '.join(attributes)}",
            "each names none, or belongs to images of several; it can be judged `by` captions",
        )
    kinds = unseen_kinds(dataset, held_out)
    for number, kind in enumerate(kinds):
        assert held_out is not None, "it has the kinds"
        rows = np.flatnonzero(kind_numbers(held_out, kinds).numpy() == number)
        prompts = _prompts(kind, held_out, rows, attributes)
        found += [prompts] if prompts.drawn else []
    return found


def kind_numbers(held_out: Dataset, kinds: Sequence[str]) -> Tensor:
    """The place of each image's kind in `kinds` (n,), -1 where it has none of them."""
    return values_of(held_out, {UNSEEN: kinds})[:, 0]


def _prompts(kind: str, dataset: Dataset, rows: np.ndarray, attributes: Values) -> Prompts:
    asked, texts = meanings(dataset, attributes, rows), dataset.texts()
    shares = _shares(dataset, rows)
    whole = tuple(caption for caption, asks in asked.items() if min(asks) >= 0)
    meaning = {texts[caption]: asks for caption, asks in asked.items()}
    frequent = shares[list(whole)].sum() >= shares[list(asked)].sum() / 2
    return Prompts(kind, dataset, shares, texts, meaning, whole if frequent else tuple(asked))


def _shares(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """How often training draws each caption of the dataset, if it draws each of these images once."""
    shares = np.zeros(dataset.index.counts.captions)
    for ids, weights in zip(dataset.caption_ids(rows), dataset.caption_weights(rows), strict=True):
        given = np.array(weights if weights is not None else [1.0] * len(ids))
        np.add.at(shares, ids, given / given.sum())
    return shares


def every_caption(dataset: Dataset) -> Prompts | None:
    """All captions of a dataset's images, asking for no attribute. None: there are not two."""
    rows, texts = np.arange(len(dataset)), dataset.texts()
    ids = sorted({caption for found in dataset.caption_ids(rows) for caption in found})
    meaning: dict[str, Meaning] = {texts[caption]: () for caption in ids}
    if len(ids) < 2:
        return None
    return Prompts(SEEN, dataset, _shares(dataset, rows), texts, meaning, tuple(ids))
