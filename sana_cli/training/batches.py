"""Micro-batches: which images a step sees, and all that is drawn for each of them. It knows no model and no optimizer.

Every draw (row of the dataset, caption, dropout, noise level, noise) is a pure function of the seed and the image's number
in the run. So a run does not depend on how its steps are cut into micro-batches or shared out over processes, and resuming
one needs a step number and no random state.

Shapes: B images of a micro-batch, K distinct captions among theirs, C H W of an image, L caption tokens, D caption width.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sana_cli import flow
from sana_cli.config.keys import TrainConfig
from sana_cli.dataset.order import sample_rows
from sana_cli.dataset.reader import Dataset
from sana_cli.text import pad_states

DRAWS, HELD_OUT, LEVELS = 1, 2, 3  # domains of the counter-based generator; the order of the data (`store.sample_rows`) has 0

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Block:
    """Images `first` .. `first + count` of a step: a micro-batch of one process.

    Processes run in step, so each has as many blocks as any other. One that has no image left is `padding`: it goes through
    the model with another block's first image, and counts for nothing.
    """

    first: int
    count: int
    padding: bool = False


def blocks(images: int, batch_size: int, rank: int, processes: int) -> list[Block]:
    """The micro-batches of process `rank`: block m * processes + rank of the step's images, for m = 0, 1, ... (design).

    Blocks hold `batch_size` images; the last that has any may hold fewer.
    """
    rounds = -(-images // (batch_size * processes))
    firsts = [(m * processes + rank) * batch_size for m in range(rounds)]
    return [Block(at, min(batch_size, images - at)) if at < images else Block(0, 1, padding=True) for at in firsts]


@dataclass(frozen=True)
class Batch:
    """A micro-batch, ready for the device: what the transformer sees and what it should answer."""

    rows: np.ndarray  # (B,) of the dataset
    x_0: Tensor  # (B, C, H, W)
    noise: Tensor  # (B, C, H, W)
    sigma: Tensor  # (B,)
    states: Tensor  # (K, L, D)
    mask: Tensor  # (K, L)
    caption_index: Tensor  # (B,) int64: which of the K is each image's
    dropout_keys: Tensor  # (B,) int64


def training_batch(dataset: Dataset, train: TrainConfig, first: int, count: int) -> Batch:
    """Images `first` .. `first + count` of a run with everything drawn for them, from (seed, image number) alone."""
    rows = sample_rows(first, count, len(dataset), train.seed)
    return _draw(dataset, train, DRAWS, first, rows, train.caption_dropout, quantiles(first, count, train.seed))


def quantiles(first: int, count: int, seed: int) -> np.ndarray:
    """Where in the density of noise levels images `first` .. `first + count` of a run are, in (0, 1).

    It is the golden ratio's sequence, from a start that depends on the seed. Each number is uniform, and any run of them covers
    (0, 1) evenly: so a step sees all noise levels, and its loss and gradient vary less than with independent draws (Kingma
    et al., arXiv 2107.00630, appendix I.1, do the same within a batch).
    """
    start = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, 0, LEVELS])).random()
    return np.clip((start + np.arange(first, first + count) * GOLDEN) % 1, 1e-7, 1 - 1e-7)


def held_out_batch(dataset: Dataset, train: TrainConfig, first: int, count: int, images: int) -> Batch:
    """The same for held-out images: always the same `images` of them, spread evenly over the dataset.

    Captions are not dropped, and the noise levels are the even quantiles of the training density: so that the loss depends on
    the weights alone, and little on which images and levels they met.
    """
    rows = np.arange(first, first + count) * len(dataset) // images
    place = np.random.Generator(np.random.Philox(key=[train.seed, 0], counter=[0, 0, 0, HELD_OUT])).permutation(images)
    return _draw(dataset, train, HELD_OUT, first, rows, 0.0, (place[first : first + count] + 0.5) / images)


def _draw(
    dataset: Dataset, train: TrainConfig, domain: int, first: int, rows: np.ndarray, caption_dropout: float, levels: np.ndarray
) -> Batch:
    count, shape = len(rows), dataset.image_shape
    choices = list(zip(dataset.caption_ids(rows), dataset.caption_weights(rows), strict=True))
    chosen: list[int] = []
    noise, keys = np.empty((count, *shape), dtype=np.float32), np.empty(count, dtype=np.int64)
    for i, (ids, weights) in enumerate(choices):
        generator = np.random.Generator(np.random.Philox(key=[train.seed, first + i], counter=[0, 0, 0, domain]))
        which, dropped = generator.random(2)
        noise[i] = generator.standard_normal(shape, dtype=np.float32)
        keys[i] = generator.integers(2**63)
        chosen.append(dataset.index["null_caption"] if dropped < caption_dropout else ids[pick(which, weights, len(ids))])
    drawn = torch.special.ndtri(torch.from_numpy(levels)).float()
    sigma = flow.uniform(drawn)
    if train.sigma_density == "logit_normal":
        sigma = flow.logit_normal(drawn, train.logit_mean, train.logit_std)
    sigma = flow.shift_sigma(sigma, train.flow_shift)
    distinct, index = np.unique(chosen, return_inverse=True)
    states, mask = pad_states(dataset.states(distinct.tolist()))
    x_0, drawn_noise = dataset.images(rows), torch.from_numpy(noise)
    return Batch(rows, x_0, drawn_noise, sigma, states, mask, torch.from_numpy(index), torch.from_numpy(keys))


def pick(which: float, weights: Sequence[float] | None, count: int) -> int:
    """Which of `count` a uniform number in [0, 1) means, in proportion to `weights`."""
    if weights is None:
        return int(which * count)
    ends = np.cumsum(weights)
    return min(int(np.searchsorted(ends, which * ends[-1], side="right")), count - 1)


class Reader:
    """Makes micro-batches, each next one in a thread while the one before is trained on. `waited` is what that did not hide."""

    def __init__(self, make: Callable[[int, int], Batch]) -> None:
        self.make = make
        self.waited = 0.0  # seconds
        # one thread of torch's in there: with as many as cores, two teams of them would spin against each other
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=lambda: torch.set_num_threads(1))
        self._ahead: tuple[tuple[int, int], Future[Batch]] | None = None

    def get(self, wanted: tuple[int, int], following: tuple[int, int] | None) -> Batch:
        """The micro-batch of `wanted` (first, count); `following` is begun at once."""
        start = time.perf_counter()
        ahead = self._ahead
        batch = ahead[1].result() if ahead is not None and ahead[0] == wanted else self.make(*wanted)
        self._ahead = None if following is None else (following, self._thread.submit(self.make, *following))
        self.waited += time.perf_counter() - start
        return batch

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=True, cancel_futures=True)
