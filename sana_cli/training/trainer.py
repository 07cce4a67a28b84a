"""One optimizer step, in one process or many: gradients, weights, their average. It knows no files.

A step is the gradient of the mean loss over its images, whatever they are cut into: micro-batches,
processes, shards.

Shapes: n images of a step, B of a micro-batch.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from sana_cli.config.keys import Config, TrainConfig
from sana_cli.errors import Interrupted, SanaError
from sana_cli.model import SanaTransformer
from sana_cli.runtime.distributed import Replicas, World, average_gradients, shard, whole
from sana_cli.training.batches import Slice, StepBatches, cut, held_out_batch, held_out_rows
from sana_cli.training.metrics import Losses
from sana_cli.training.objective import LOSS, MicroBatch, Objective, total
from sana_cli.training.optim import Optimizer, average_decay, lr_factor
from sana_cli.training.task import Task
from sana_cli.training.trainable import WeightAverage

MOST_NAMED = 8  # samples in the message about a loss that is not finite
MOST_IN_BF16 = 256  # micro-batches that a bf16 gradient adds up: equal ones lose 3 % at 512, 20 % at 1024
OBJECTIVE = "objective."  # before the names of parameters that an objective brings
StopSignal = Callable[[], int | None]  # the number of the signal that asks for an end, or None


@dataclass(frozen=True)
class Placement:
    """Where and how a run computes."""

    device: torch.device
    precision: str
    world: World = World()  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class Step:
    """An optimizer step, the same in every process."""

    losses: np.ndarray  # (n,) of each image, float64
    sigma: np.ndarray  # (n,) float64
    grad_norm: float  # of the transformer, before clipping
    lr: float
    others: Mapping[str, float] = field(default_factory=dict)  # mean of what is minimised beside

    @property
    def loss(self) -> float:
        """Mean over the images."""
        return float(self.losses.mean())


def most_micro_batches(images: int, shapes: int, batch_size: int, processes: int) -> int:
    """Micro-batches of a step in one process, at most; of one shape, exactly."""
    runs = (images + min(shapes, images) * (batch_size - 1)) // batch_size  # the last of a shape may be short
    return -(-runs // processes)


def adds_too_many_in_bf16(train: TrainConfig, images: int, shapes: int, processes: int) -> bool:
    """Whether bf16 gradients of a step would be too small: what is added would round away."""
    most = most_micro_batches(images, shapes, train.batch_size, processes)
    return train.weights == "bf16" and most > MOST_IN_BF16


def check_micro_batches(train: TrainConfig, images: int, shapes: int, processes: int) -> None:
    """Refuse steps of more micro-batches than bf16 gradients can add up.

    Raises:
        SanaError: a step of these `images` may have more, in this many `shapes` and `processes`.
    """
    if adds_too_many_in_bf16(train, images, shapes, processes):
        most = most_micro_batches(images, shapes, train.batch_size, processes)
        raise SanaError(
            f"train.weights: bf16 gradients add up at most {MOST_IN_BF16} micro-batches, "
            f"and a step may have {most}",
            "use a larger train.batch_size, a smaller train.accumulate, or train.weights=fp32",
            exit_code=2,
        )


class NotFiniteError(SanaError):
    """A loss or a gradient is not finite. The weights are those of the step before."""


class _LossModule(nn.Module):
    """Transformer and objective as one module whose output is losses, for DDP."""

    def __init__(self, transformer: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.transformer, self.objective_modules = transformer, nn.ModuleDict(objective.modules)
        self.objective = objective

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        """What is minimised of each image, (B,), by name."""
        return self.objective.losses(self.transformer, batch)


def _detached(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: term.detach() for name, term in terms.items()}


class Trainer:
    """A model in training. All processes of a run call every method, and get the same from it."""

    def __init__(
        self,
        model: SanaTransformer,
        task: Task,
        config: Config,
        placement: Placement,
        images: int,
        average: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Train `model`, on the CPU, which is moved and may be sharded.

        Args:
            model: with the weights to begin with, float32 except what is frozen.
            task: what is learned.
            config: `optim`, `train` and `log` of it.
            placement: device, precision and processes.
            images: how many a step sees, over all micro-batches and processes.
            average: the averaged weights so far, by name; None: a copy of the model's.

        Raises:
            SanaError: a step has too many micro-batches for bf16 gradients.
        """
        self.task, self.config, self.placement, self.images = task, config, placement, images
        self.step = 0
        train, world, device = config.train, placement.world, placement.device
        check_micro_batches(train, images, len(task.train_set.shapes), world.size)
        self.sharded = world.size > 1 and train.parallel == "fsdp"
        task.trainable.freeze_others(model)
        if train.weights == "bf16":
            task.trainable.to_bf16(model)
        model = model.to("cpu" if self.sharded else device)  # shards go to the device block by block
        model.train().activation_checkpointing = train.activation_checkpointing
        averaged = config.optim.ema_decay is not None
        if self.sharded:
            self.average = WeightAverage.of_shards(
                model, task.trainable, averaged, lambda m: shard(m, list(m.transformer_blocks), device)
            )
        else:
            home = torch.device("cpu") if config.optim.ema_device == "cpu" else None
            self.average = WeightAverage(model, task.trainable, averaged, home)
        if average is not None:
            self.average.load(average)
        self.model = model
        self.loss_module = _LossModule(model, task.objective)
        self.loss_module.objective_modules.to(device)
        for frozen in task.objective.frozen.values():
            frozen.activation_checkpointing = train.activation_checkpointing
            frozen.to("cpu" if self.sharded else device)
            if self.sharded:
                shard(frozen, list(frozen.transformer_blocks), device, methods=["features"])
        task.objective.use_average(self.average.model)
        self.replicas = Replicas(self.loss_module, None if self.sharded else world, device)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        others = dict(self.loss_module.objective_modules.named_parameters())
        self.others = list(others.values())
        named |= {f"{OBJECTIVE}{name}": parameter for name, parameter in others.items()}
        rates = {name: task.objective.rate(name.removeprefix(OBJECTIVE)) for name in named}
        self.optimizer = Optimizer(named, config.optim, device, train.seed, rates)
        self.batches = StepBatches(
            task.train_set, task.objective, train.seed, images, train.batch_size, world, device.type == "cuda"
        )

    def resume(self, optimizer: Mapping[str, Tensor], objective: Mapping[str, Tensor], step: int) -> None:
        """Go on after `step` steps, with what the optimizer remembered and the objective had learned."""
        for name, tensor in self.loss_module.objective_modules.state_dict().items():
            tensor.copy_(objective[name])
        self.optimizer.load(optimizer, step)
        self.step = step

    # -- compiled blocks

    def seconds_of_micro_batch(self, times: int = 5) -> float:
        """The least seconds of a micro-batch, forward and back, of so many. Weights and gradients stay as they are."""
        part, least = self.batches.cut(self.step)[0], math.inf
        batch = self.batches.make(self.step, part).to(self.placement.device)
        for _ in range(times):
            begin = time.perf_counter()
            with self._weights_cast_once(), self.replicas.gradients(last=False):
                loss = total(self.replicas.model(batch)).sum()
                loss.backward()
            float(sum(p.grad.sum() for p in self.parameters[:1] if p.grad is not None))  # a GPU is done
            least = min(least, time.perf_counter() - begin)
            self.optimizer.zero_grad()
        return least

    def compile(self) -> tuple[float, float]:
        """Compile the blocks: seconds until the first micro-batch is done, and those of a later one."""
        self.model.compile_blocks()
        first = self.seconds_of_micro_batch(1)
        return first, self.seconds_of_micro_batch()

    # -- one step

    def _check_stop(self, stop: StopSignal) -> None:
        if number := self.placement.world.largest(stop() or 0):
            raise Interrupted("interrupted", exit_code=128 + number)

    def advance(self, stop: StopSignal = lambda: None) -> Step:
        """One optimizer step over all its images.

        Raises:
            Interrupted: `stop` asked for an end before a micro-batch. The gradients so far are dropped,
                and the weights are those of the last step.
            NotFiniteError: a loss or the gradient is not finite; the weights are untouched.
        """
        optim, steps = self.config.optim, self.config.train.steps
        losses, others, sigma = self._gradients(stop)
        if self.sharded:
            average_gradients(self.others)
        most = optim.grad_clip or math.inf
        grad_norm = float(whole(nn.utils.clip_grad_norm_(self.parameters, most)))
        norms = [grad_norm]
        if self.others:  # apart: how large they are says nothing of the transformer's
            norms.append(float(nn.utils.clip_grad_norm_(self.others, most)))
        all_terms = losses + sum(others.values())
        if not (np.isfinite(all_terms).all() and all(map(math.isfinite, norms))):
            self.optimizer.zero_grad()
            raise self._not_finite(all_terms, sigma)
        lr = optim.lr * lr_factor(optim, self.step, steps)
        self.optimizer.step(lr)
        if optim.ema_decay is not None:
            self.average.update(average_decay(optim.ema_decay, self.step))
        self.step += 1
        return Step(losses, sigma, grad_norm, lr, {name: float(of.mean()) for name, of in others.items()})

    def _gradients(self, stop: StopSignal) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
        """Leave the step's gradient in the parameters.

        Returns:
            The loss of all its images, what else was minimised of them, and their noise levels.
        """
        world, device = self.placement.world, self.placement.device
        found, terms = [], dict[str, Tensor]()
        self.optimizer.zero_grad()
        rounds = len(self.batches.cut(self.step))
        self._check_stop(stop)
        try:
            with self._weights_cast_once():
                of_step = self.batches.of_step(self.step, is_last=self.step + 1 >= self.config.train.steps)
                for m, (part, batch) in enumerate(of_step):
                    if m:
                        self._check_stop(stop)
                    self._seed_dropout(part)
                    with self.replicas.gradients(last=m + 1 == rounds):
                        terms = self.replicas.model(batch.to(device))
                        share = 0.0 if part.padding else world.size / self.images  # gradients are averaged
                        (total(terms).sum() * share).backward()
                    if not part.padding:
                        found.append((part, _detached(terms), batch.sigma))
        except BaseException:
            self.optimizer.zero_grad()
            raise
        return self._collect(found, list(terms), self.images)

    def _seed_dropout(self, part: Slice) -> None:
        """Draw the dropout of adapters from the seed and a micro-batch's first image alone.

        So a resumed run draws the same. It is the one thing that depends on how a step is cut.
        """
        if self.config.adapter.dropout:
            first = self.step * self.images + int(part.numbers[0])
            draw = np.random.Generator(np.random.Philox(key=[self.config.train.seed, first]))
            torch.manual_seed(int(draw.integers(2**63)))

    def _weights_cast_once(self) -> AbstractContextManager[object]:
        """Keep autocast's casts of parameters for all micro-batches of a step.

        Autocast caches only casts of parameters: joined and reshaped weights are cast in every micro-batch.
        The cache ends with the outermost context, which is this one; it is itself off, as the backward pass
        needs it. Shards are gathered anew for each micro-batch.
        """
        return nullcontext() if self.sharded else torch.autocast(self.placement.device.type, enabled=False)

    def _collect(
        self, found: Iterable[tuple[Slice, Mapping[str, Tensor], Tensor]], names: Sequence[str], images: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
        """What is minimised of every image, and its noise level, from all processes, in the order of the step."""
        rows = torch.zeros(1 + len(names), images, dtype=torch.float64)
        for part, terms, sigma in found:
            rows[0, part.numbers] = sigma.double()
            for row, name in enumerate(names, 1):
                rows[row, part.numbers] = terms[name].cpu().double()
        sigma_of_all, *of_terms = self.placement.world.total(rows).numpy()
        others = dict(zip(names, of_terms, strict=True))
        return others.pop(LOSS), others, sigma_of_all

    def _not_finite(self, losses: np.ndarray, sigma: np.ndarray) -> NotFiniteError:
        wrong = ~np.isfinite(losses)
        what = "loss" if wrong.any() else "gradient"
        if not wrong.any():
            wrong[:] = True
        numbers = np.flatnonzero(wrong)
        names, more = self.batches.names(self.step, numbers[:MOST_NAMED]), len(numbers) - MOST_NAMED
        error = NotFiniteError(
            f"step {self.step + 1}: the {what} is not finite; weights are untouched",
            f"sigma {sigma[wrong].min():.3f} to {sigma[wrong].max():.3f}, samples {', '.join(names)}"
            + (f" and {more} more" if more > 0 else ""),
        )
        error.silent = not self.placement.world.first
        return error

    # -- held-out loss

    @torch.no_grad()
    def evaluate(self, stop: StopSignal = lambda: None) -> Losses:
        """The loss of the averaged weights on the held-out images, with fixed noise and noise levels.

        Raises:
            Interrupted: `stop` asked for an end.
        """
        held_out, objective, train = self.task.held_out, self.task.objective, self.config.train
        assert held_out is not None, "there is a held-out set"
        images = min(self.config.log.held_out_images, len(held_out))
        rows = held_out_rows(np.arange(images), len(held_out), images)
        found = []
        with self.average.in_use() as model:
            for part in cut(held_out.shape_numbers(rows), train.batch_size, self.placement.world):
                self._check_stop(stop)
                batch = held_out_batch(held_out, objective, train.seed, part.numbers, images)
                terms = objective.losses(model, batch.to(self.placement.device))
                if not part.padding:
                    found.append((part, terms, batch.sigma))
        counted = Losses()
        losses, _, sigma = self._collect(found, [LOSS], images)
        counted.add(losses.tolist(), sigma.tolist())
        return counted

    # -- what a checkpoint holds

    def _gathered(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Whole tensors, at rank 0 alone."""
        there = {}
        for name, tensor in named:
            full = whole(tensor.detach())
            if self.placement.world.first:
                there[name] = full.cpu()
        return there

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the transformer, as the optimizer has it, at rank 0."""
        return self._gathered(self.task.trainable.of(self.model.state_dict()).items())

    def average_weights(self) -> dict[str, Tensor]:
        """The weights to use, of what a checkpoint keeps, at rank 0."""
        return self._gathered(self.task.trainable.of(self.average.model.state_dict()).items())

    def whole_average(self) -> dict[str, Tensor]:
        """All weights to use, those that do not move included, at rank 0."""
        return self._gathered(self.average.model.state_dict().items())

    def objective_weights(self) -> dict[str, Tensor]:
        """What the objective has learned beside the transformer, at rank 0."""
        return self._gathered(self.loss_module.objective_modules.state_dict().items())

    def optimizer_state(self) -> dict[str, Tensor]:
        """What the optimizer remembers, at rank 0."""
        return self._gathered(self.optimizer.state())

    def close(self) -> None:
        """End the reading thread."""
        self.batches.close()
