"""Micro-batches: which images a step sees, and all that is drawn for each. It knows no model and no optimizer.

Every draw (row, caption, noise level, noise) is a pure function of the seed and the image's number in
the run. So a run does not depend on how its steps are cut into micro-batches or shared out over
processes, and resuming one needs a step number and no random state.

Shapes: B images of a micro-batch, K distinct captions among theirs, C H W of a sample, L caption tokens,
D caption width, n images of a step.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from sana_cli.dataset.order import Shuffle
from sana_cli.dataset.trainset import TrainSet
from sana_cli.runtime.distributed import World
from sana_cli.text import pad_states
from sana_cli.training.objective import MicroBatch, Objective

TRAINING, HELD_OUT, LEVELS = 1, 2, 3  # domains of the counter-based generator; the order of rows has 0
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Slice:
    """Which images of a step make up a micro-batch of one process.

    Processes run in step, so each has as many as any other. One that has no image left is `padding`: it
    goes through the model with another's first image, and counts for nothing.
    """

    numbers: np.ndarray  # (B,) of the step's images, from 0
    padding: bool = False


def cut(shape_numbers: np.ndarray, batch_size: int, world: World) -> list[Slice]:
    """The micro-batches of this process, from the shape of each image of a step (n,).

    Images are grouped by shape in the order of the step, and each group is cut into runs of `batch_size`
    images or fewer. Run number m * processes + rank is micro-batch m of process `rank`.
    """
    groups = [np.flatnonzero(shape_numbers == shape) for shape in np.unique(shape_numbers)]
    runs = [group[at : at + batch_size] for group in groups for at in range(0, len(group), batch_size)]
    rounds = -(-len(runs) // world.size)
    places = range(world.rank, rounds * world.size, world.size)
    return [Slice(runs[at]) if at < len(runs) else Slice(runs[0][:1], padding=True) for at in places]


def quantiles(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Where in the density of noise levels images of a run are, (n,) in (0, 1), by their numbers (n,).

    The golden ratio's sequence, from a start that depends on the seed. Each number is uniform, and any run
    of them covers (0, 1) evenly: a step sees all noise levels, and its loss and gradient vary less than
    with independent draws (Kingma et al., arXiv 2107.00630, appendix I.1, do the same within a batch).
    """
    start = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, 0, LEVELS])).random()
    return np.clip((start + numbers * GOLDEN) % 1, 1e-7, 1 - 1e-7)


def training_batch(
    train_set: TrainSet, objective: Objective, seed: int, numbers: np.ndarray, step: int = 0
) -> MicroBatch:
    """Images of a run by their numbers (B,), with everything drawn for them from (seed, number) alone.

    `step` is how many steps came before theirs.
    """
    rows = training_rows(train_set, numbers)
    levels = quantiles(numbers, seed)
    drawn = _draw(train_set, objective, seed, TRAINING, numbers, rows, levels, objective.caption_dropout)
    return replace(drawn, step=step)


def held_out_batch(
    train_set: TrainSet, objective: Objective, seed: int, numbers: np.ndarray, images: int
) -> MicroBatch:
    """Held-out images by their numbers (B,) below `images`: spread evenly over the set, the same each time.

    Captions are not dropped, and noise levels are the even quantiles of the training density. So the loss
    depends on the weights alone.
    """
    rows = held_out_rows(numbers, len(train_set), images)
    levels = (Shuffle(images, (seed, HELD_OUT))(numbers) + 0.5) / images
    return _draw(train_set, objective, seed, HELD_OUT, numbers, rows, levels, 0.0)


def held_out_rows(numbers: np.ndarray, length: int, images: int) -> np.ndarray:
    """Rows (B,) of a held-out set of `length` rows, by their numbers (B,) below `images`: evenly spread."""
    return numbers * length // images


def training_rows(train_set: TrainSet, numbers: np.ndarray) -> np.ndarray:
    """Rows (B,) of images of a run, by their numbers (B,)."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)  # consecutive numbers together
    return np.concatenate([train_set.rows(int(run[0]), len(run)) for run in runs])


def _draw(
    train_set: TrainSet, objective: Objective, seed: int, domain: int, numbers: np.ndarray, rows: np.ndarray,
    levels: np.ndarray, caption_dropout: float,
) -> MicroBatch:  # fmt: skip
    x_0, draws = train_set.samples(rows), objective.draws
    chosen: list[int] = []
    noise = np.empty((len(rows), 1 + draws.noises, *x_0.shape[1:]), dtype=np.float32)
    uniforms = np.empty((len(rows), draws.uniforms), dtype=np.float32)
    normals = np.empty((len(rows), draws.normals), dtype=np.float32)
    for i, (number, (ids, weights)) in enumerate(
        zip(numbers.tolist(), train_set.captions(rows), strict=True)
    ):
        generator = np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, domain]))
        which, dropped = generator.random(2)
        noise[i] = generator.standard_normal(noise.shape[1:], dtype=np.float32)
        chosen.append(
            train_set.null_caption if dropped < caption_dropout else ids[pick(which, weights, len(ids))]
        )
        uniforms[i] = generator.random(draws.uniforms, dtype=np.float32)
        normals[i] = generator.standard_normal(draws.normals, dtype=np.float32)
    null = [train_set.null_caption] * draws.null_caption
    distinct, index = np.unique([*chosen, *null], return_inverse=True)
    states, mask = pad_states(train_set.states(distinct.tolist()))
    of_images, of_null = torch.from_numpy(index).split([len(chosen), len(null)])
    noises = torch.from_numpy(noise)
    return MicroBatch(
        rows=rows,
        x_0=x_0,
        noise=noises[:, 0],
        sigma=objective.noise_levels(torch.from_numpy(levels)),
        states=states,
        mask=mask,
        caption_index=of_images,
        noises=noises[:, 1:] if draws.noises else None,
        uniforms=torch.from_numpy(uniforms) if draws.uniforms else None,
        normals=torch.from_numpy(normals) if draws.normals else None,
        null_index=of_null if null else None,
    )


def pick(which: float, weights: Sequence[float] | None, count: int) -> int:
    """Which of `count` a uniform number in [0, 1) means, in proportion to `weights`."""
    if weights is None:
        return int(which * count)
    ends = np.cumsum(weights)
    return min(int(np.searchsorted(ends, which * ends[-1], side="right")), count - 1)


class StepBatches:
    """The micro-batches of a run's steps in one process. A thread makes the next during training."""

    def __init__(
        self,
        train_set: TrainSet,
        objective: Objective,
        seed: int,
        images: int,
        batch_size: int,
        world: World,
        pins: bool = False,
    ) -> None:
        """`images` of a step, over all processes; `pins`: batches are made in pinned memory, for a GPU."""
        self.pins = pins
        self.train_set, self.objective, self.seed, self.images = train_set, objective, seed, images
        self.batch_size, self.world = batch_size, world
        self.waited = 0.0  # seconds in which training waited for a batch
        self._cut: tuple[int, list[Slice]] | None = None  # of the step asked for last
        # one thread of torch's in there: with as many as cores, two teams of them would spin against each other
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="batches", initializer=lambda: torch.set_num_threads(1)
        )
        self._ahead: tuple[tuple[int, int], Future[MicroBatch]] | None = None

    def cut(self, step: int) -> list[Slice]:
        """The micro-batches of the step after `step` steps."""
        if self._cut is None or self._cut[0] != step:
            rows = self.train_set.rows(step * self.images, self.images)
            self._cut = step, cut(self.train_set.shape_numbers(rows), self.batch_size, self.world)
        return self._cut[1]

    def of_step(self, step: int, is_last: bool) -> Iterator[tuple[Slice, MicroBatch]]:
        """Each micro-batch of the step after `step` steps. With `is_last` none is made ahead for the next step."""
        parts = self.cut(step)
        for m, part in enumerate(parts):
            start = time.perf_counter()
            ahead, self._ahead = self._ahead, None
            batch = (
                ahead[1].result() if ahead is not None and ahead[0] == (step, m) else self.make(step, part)
            )
            if m + 1 < len(parts):
                self._begin(step, m + 1, parts[m + 1])
            elif not is_last:
                self._begin(step + 1, 0, self.cut(step + 1)[0])
            self.waited += time.perf_counter() - start
            yield part, batch

    def _begin(self, step: int, m: int, part: Slice) -> None:
        self._ahead = (step, m), self._thread.submit(self.make, step, part)

    def make(self, step: int, part: Slice) -> MicroBatch:
        """A micro-batch of the step after `step` steps."""
        numbers = step * self.images + part.numbers
        batch = training_batch(self.train_set, self.objective, self.seed, numbers, step)
        return batch.pinned() if self.pins else batch

    def names(self, step: int, numbers: np.ndarray) -> list[str]:
        """What the source calls images of the step after `step` steps, by their numbers in it."""
        return self.train_set.names(training_rows(self.train_set, step * self.images + numbers))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
