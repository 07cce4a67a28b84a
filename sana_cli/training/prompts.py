"""The prompts of a run's sample grids, encoded once at the start, and what checkpoints remember of captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sana_cli.config.keys import Config
from sana_cli.dataset.embedding import MOST_WORDS
from sana_cli.dataset.match import open_also
from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.trainset import Shape
from sana_cli.runtime.device import release_memory
from sana_cli.runtime.records import Encoder
from sana_cli.sampling.pictures import Cell, grid_cells, prompt_rows
from sana_cli.sources.entry import LABEL
from sana_cli.text import check_same_encoder, load_encoder, unseen_words
from sana_cli.units import natural
from sana_cli.weights.checkpoint import MOST_EXAMPLES

GRID_CAPTIONS = 20  # captions of the dataset in a sample grid
GRID_SHAPES = 4  # of images in it: the most common ones take turns
MOST_SEARCHED = 100_000  # captions of a dataset that prompts are looked for among: the first
ROWS_ASKED = 1000  # for the class that belongs to a caption


@dataclass(frozen=True)
class GridPrompts:
    """A grid that is sampled again and again, and the caption states for it."""

    cells: list[list[Cell]]
    shapes: list[Shape]  # of the sample of each cell, row by row
    states: list[Tensor]  # (L, D), likewise
    null_caption: Tensor  # (L, D)
    encoder: Encoder  # the fingerprint that checkpoints record
    examples: list[str]  # captions that checkpoints record
    one_word: bool  # all captions are single words
    words: list[str] | None  # of all captions; None: too many
    notes: tuple[str, ...]  # what a person should know


def encode_prompts(config: Config, dataset: Dataset, device: torch.device) -> GridPrompts:
    """The prompts of `sample.prompts`, or captions of the dataset. Only unknown prompts need an encoder."""
    texts = {text: caption_id for caption_id, text in enumerate(dataset.texts(MOST_SEARCHED))}
    index, notes = dataset.index, []
    fingerprint = index.encoder.as_json()
    also = [other for other, _ in open_also(config, dataset)]
    one_word = all(one.index.one_word_captions for one in (dataset, *also))
    cells = grid_cells(_rows(config, dataset, texts, one_word), 1, config.sample.seed)
    words = _words((dataset, *also))
    prompts = [cell.prompt for row in cells for cell in row]
    states = {prompt: dataset.states([texts[prompt]])[0] for prompt in prompts if prompt in texts}
    unknown = [prompt for prompt in prompts if prompt not in texts]
    if unseen := unseen_words(unknown, words):
        notes.append(f"sample.prompts: words that no caption of the dataset has: {' '.join(unseen)}")
    if unknown:
        encoder = load_encoder(config.text, device)
        where = str(dataset.directory)
        check_same_encoder(fingerprint, encoder.fingerprint, where, "embed it again: sana embed --overwrite")
        if cut := [prompt for prompt in unknown if encoder.is_cut(prompt)]:
            notes.append(
                f"sample.prompts: {len(cut)} are longer than text.max_length, and are cut there: {cut[0]!r:.60}"
            )
        states |= dict(encoder.encode(unknown))
        del encoder
        release_memory(device)
    return GridPrompts(
        cells=cells,
        shapes=_shapes(dataset, len(prompts)),
        states=[states[prompt] for prompt in prompts],
        null_caption=dataset.states([index.null_caption])[0],
        encoder=Encoder.model_validate(fingerprint),
        examples=[text for text in list(texts)[: MOST_EXAMPLES + 1] if text],
        one_word=one_word,
        words=words,
        notes=tuple(notes),
    )


def _words(datasets: Sequence[Dataset]) -> list[str] | None:
    """The words of all captions, sorted; None: too many, or not on record."""
    each = [dataset.index.words for dataset in datasets]
    words = {word for known in each for word in known or ()}
    return None if None in each or len(words) > MOST_WORDS else sorted(words)


def _shapes(dataset: Dataset, count: int) -> list[Shape]:
    """The shapes of `count` samples: the most common ones of the dataset take turns, the most common first."""
    common = sorted(dataset.shapes, key=lambda shape: -dataset.shapes[shape])[:GRID_SHAPES]
    return [common[number % len(common)] for number in range(count)]


def _rows(
    config: Config, dataset: Dataset, texts: Mapping[str, int], one_word: bool
) -> list[tuple[str, ...]]:
    if config.sample.prompts is not None:
        return prompt_rows(config.sample.prompts, one_word)
    captions = _in_order(dataset, texts)
    captions = captions[:: max(1, len(captions) // GRID_CAPTIONS)][:GRID_CAPTIONS]
    return [tuple(captions[at : at + 10]) for at in range(0, len(captions), 10)]


def _in_order(dataset: Dataset, texts: Mapping[str, int]) -> list[str]:
    """Captions in the order of a grid: numbers, then words, each by class; without classes as they came."""
    class_of: dict[int, str] = {}
    if list(dataset.attributes) == [LABEL]:
        rows = np.arange(min(len(dataset), ROWS_ASKED))
        names = dataset.attributes[LABEL]
        classes = (
            "" if number < 0 else names[number] for number in dataset.attribute_ids(rows)[:, 0].tolist()
        )
        for caption_ids, name in zip(dataset.caption_ids(rows), classes, strict=True):
            for caption_id in caption_ids:
                class_of.setdefault(caption_id, name)
    return sorted(
        filter(None, texts),
        key=lambda text: (not text.isdecimal(), natural(class_of.get(texts[text], "")), texts[text]),
    )
