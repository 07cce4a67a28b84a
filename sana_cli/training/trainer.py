"""All that moves during a run, in one process or many: weights, their average, the optimizer. It knows no files.

One step is the gradient of the mean loss over its images, whatever they are cut into: micro-batches, processes, shards.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli import flow
from sana_cli.config.keys import ModelConfig, TrainConfig
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import Interrupted, SanaError
from sana_cli.model import SanaTransformer, build
from sana_cli.runtime.distributed import Spread, World, shard, whole
from sana_cli.sampling import sampler
from sana_cli.training.batches import Batch, Block, Reader, blocks, held_out_batch, training_batch
from sana_cli.training.metrics import Losses
from sana_cli.training.optim import Optimizer, WeightAverage, ema_decay, lr_factor

SAMPLES_NAMED = 8  # in the message about a loss that is not finite
Stop = Callable[[], int | None]  # the number of the signal that asks for an end, if one does


@dataclass(frozen=True)
class Place:
    """Where and how a run computes."""

    device: torch.device
    precision: str
    here: World = World()  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class Step:
    """What an optimizer step was, the same in every process."""

    losses: np.ndarray  # (n,) of each image, float64
    sigma: np.ndarray  # (n,) float64
    grad_norm: float  # before clipping
    lr: float

    @property
    def loss(self) -> float:
        """Mean over the images."""
        return float(self.losses.mean())


def batch_loss(
    model: nn.Module, batch: Batch, config: ModelConfig, sigma_floor: float, device: torch.device, precision: str
) -> Tensor:
    """The squared error of the velocity, for each image: (B,) in float32. Every noise level weighs the same (the paper's loss).

    Where samples are predicted, levels below `sigma_floor` weigh less (`flow.prediction_error`).
    """
    x_0, noise, sigma = (t.to(device) for t in (batch.x_0, batch.noise, batch.sigma))
    with sampler.autocast(device, precision):
        prediction = model(
            flow.interpolate(x_0, noise, sigma),
            batch.states.to(device).float(),
            sigma * flow.TRAIN_TIMESTEPS * config.timestep_scale,
            encoder_attention_mask=batch.mask.to(device),
            dropout_keys=batch.dropout_keys.to(device),
            caption_index=batch.caption_index.to(device),
        )
    target = flow.prediction_target(x_0, noise, config.prediction_type)
    error = F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)
    return flow.prediction_error(error, sigma, config.prediction_type, sigma_floor)


class NotFiniteError(SanaError):
    """A loss or a gradient is not a number that can be learned from. The weights are those of the step before."""


class Trainer:
    """A model in training. Every method is to be called by all processes of a run, and gives all of them the same."""

    def __init__(
        self,
        model_config: ModelConfig,
        train: TrainConfig,
        place: Place,
        dataset: Dataset,
        images: int,
        held_out: Dataset | None = None,
        weights: Mapping[str, Tensor] | None = None,
        average: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Begin with the initial weights of `train.seed`, or with `weights`, and with their `average`.

        Args:
            model_config: resolved.
            train: the optimisation.
            place: device, precision and processes.
            dataset: what is trained on.
            images: how many a step sees, over all micro-batches and processes.
            held_out: what `evaluate` takes the loss of.
            weights: whole, by name.
            average: whole, by name; None: a copy of the weights.
        """
        self.train, self.place, self.dataset, self.images, self.held_out = train, place, dataset, images, held_out
        self.model_config = model_config
        self.step = 0
        here, device = place.here, place.device
        self.sharded = here.size > 1 and train.parallel == "fsdp"
        model = build(model_config, train.seed if weights is None else None, train.init)
        if weights is not None:  # drawing initial ones first, to overwrite them, would take seconds
            copies = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}
            model.load_state_dict(copies, assign=True)
        model = model.to("cpu" if self.sharded else device)  # shards go to the device block by block
        self.average = WeightAverage(model)
        if average is not None:
            self.average.model.load_state_dict(average)
        model.train().activation_checkpointing = train.activation_checkpointing
        layers = list(model.transformer_blocks)
        if train.compile:
            for layer in layers:
                layer.compile()
        self.spread = Spread(model, layers, train.parallel, here, device)
        if self.sharded:
            shard(self.average.model, list(self.average.model.transformer_blocks), device)
        self.model: SanaTransformer = model
        self.parameters = list(model.parameters())
        self.optimizer = Optimizer(model, train, device)
        self.blocks = blocks(images, train.batch_size, here.rank, here.size)
        self.reader = Reader(partial(training_batch, dataset, train))

    def resume(self, optimizer: Mapping[str, Tensor], step: int) -> None:
        """Go on after `step` steps, with what the optimizer remembered."""
        self.optimizer.load(optimizer, step)
        self.step = step

    # -- one step

    def _check_stop(self, stop: Stop) -> None:
        if number := self.place.here.largest(stop() or 0):
            raise Interrupted("interrupted", exit_code=128 + number)

    def advance(self, stop: Stop = lambda: None) -> Step:
        """One optimizer step over all its images.

        Raises:
            Interrupted: `stop` said so, before a micro-batch; the gradients so far are dropped and the weights are those of
                the last step.
            NotFiniteError: a loss or the gradient is not finite; the weights are untouched.
        """
        losses, sigma = self._gradients(stop)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.train.grad_clip or math.inf)
        grad_norm = float(whole(norm))
        if not (np.isfinite(losses).all() and math.isfinite(grad_norm)):
            self.optimizer.zero_grad()
            raise self._not_finite(losses, sigma)
        lr = self.train.lr * lr_factor(self.train, self.step)
        self.optimizer.step(lr)
        self.average.update(self.model, ema_decay(self.train, self.step))
        self.step += 1
        return Step(losses, sigma, grad_norm, lr)

    def _gradients(self, stop: Stop) -> tuple[np.ndarray, np.ndarray]:
        """Leave the step's gradient in the parameters; the losses and noise levels of all its images."""
        here = self.place.here
        offset = self.step * self.images
        found = []
        self.optimizer.zero_grad()
        try:
            with self._weights_cast_once():
                for m, block in enumerate(self.blocks):
                    self._check_stop(stop)
                    batch = self.reader.get((offset + block.first, block.count), self._following(m))
                    with self.spread.gradients(last=m + 1 == len(self.blocks)):
                        losses = self._losses(self.spread.model, batch)
                        share = 0.0 if block.padding else here.size / self.images  # processes' gradients are averaged
                        (losses.sum() * share).backward()
                    if not block.padding:
                        found.append((block, losses.detach(), batch.sigma))
        except BaseException:
            self.optimizer.zero_grad()
            raise
        return self._collect(found, self.images)

    def _weights_cast_once(self) -> AbstractContextManager[object]:
        """Around a step's micro-batches: what autocast makes of a parameter for the first serves them all.

        Not of what is made of parameters first: joined matrices, and 1x1 convolutions taken as matrices, are cast each time.
        Autocast forgets what it made at the end of its outermost context, which is this one; it is itself off, as the backward
        pass wants it. Shards are gathered anew for each micro-batch, and what is made of them goes with them.
        """
        return nullcontext() if self.sharded else torch.autocast(self.place.device.type, enabled=False)

    def _losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch_loss(model, batch, self.model_config, self.train.sigma_floor, self.place.device, self.place.precision)

    def _following(self, m: int) -> tuple[int, int] | None:
        """The micro-batch after number `m`, which the next step's first may be."""
        offset, block = self.step * self.images, self.blocks[(m + 1) % len(self.blocks)]
        if m + 1 == len(self.blocks):
            offset += self.images
            if self.step + 1 >= self.train.steps:
                return None
        return offset + block.first, block.count

    def _collect(self, found: Iterable[tuple[Block, Tensor, Tensor]], images: int) -> tuple[np.ndarray, np.ndarray]:
        """Every image's loss and noise level at its place, from all processes: in the same order however they were shared out."""
        both = torch.zeros(2, images, dtype=torch.float64)
        for block, losses, sigma in found:
            both[0, block.first : block.first + block.count] = losses.cpu().double()
            both[1, block.first : block.first + block.count] = sigma.double()
        losses_of_all, sigma_of_all = self.place.here.total(both).numpy()
        return losses_of_all, sigma_of_all

    def _not_finite(self, losses: np.ndarray, sigma: np.ndarray) -> NotFiniteError:
        wrong = ~np.isfinite(losses)
        what = "loss" if wrong.any() else "gradient"
        if not wrong.any():
            wrong[:] = True
        numbers = self.step * self.images + np.flatnonzero(wrong)
        rows = np.concatenate([training_batch(self.dataset, self.train, int(n), 1).rows for n in numbers[:SAMPLES_NAMED]])
        ids, more = self.dataset.sample_ids(rows), len(numbers) - SAMPLES_NAMED
        error = NotFiniteError(
            f"step {self.step + 1}: the {what} is not finite; weights are untouched",
            f"sigma {sigma[wrong].min():.3f} to {sigma[wrong].max():.3f}, samples {', '.join(ids)}"
            + (f" and {more} more" if more > 0 else ""),
        )
        error.told = not self.place.here.first
        return error

    # -- held-out loss

    @torch.no_grad()
    def evaluate(self, stop: Stop = lambda: None) -> Losses:
        """The loss of the average's weights on the held-out images, with their fixed noise and noise levels.

        Raises:
            Interrupted: `stop` said so.
        """
        assert self.held_out is not None, "there is a held-out dataset"
        here, model = self.place.here, self.average.model
        images = min(self.train.held_out_images, len(self.held_out))
        found = []
        for block in blocks(images, self.train.batch_size, here.rank, here.size):
            self._check_stop(stop)
            batch = held_out_batch(self.held_out, self.train, block.first, block.count, images)
            losses = self._losses(model, batch)
            if not block.padding:
                found.append((block, losses, batch.sigma))
        counted = Losses()
        losses_of_all, sigma_of_all = self._collect(found, images)
        counted.add(losses_of_all.tolist(), sigma_of_all.tolist())
        return counted

    # -- what a checkpoint holds

    def _gathered(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Whole tensors, at the first process alone."""
        there = {}
        for name, tensor in named:
            full = whole(tensor.detach())
            if self.place.here.first:
                there[name] = full.cpu() if full is not tensor else full
        return there

    def weights(self) -> dict[str, Tensor]:
        """What the optimizer moves, at the first process."""
        return self._gathered(self.model.state_dict().items())

    def average_weights(self) -> dict[str, Tensor]:
        """The weights to use, at the first process."""
        return self._gathered(self.average.model.state_dict().items())

    def optimizer_state(self) -> dict[str, Tensor]:
        """What the optimizer remembers, at the first process."""
        return self._gathered(self.optimizer.state())

    def close(self) -> None:
        """Let the reader's thread end."""
        self.reader.close()
