"""What a training step minimises. Rectified flow is the first objective; `task.py` chooses one.

It knows the path from data to noise (`flow.py`) and calls a transformer, but no dataset, optimizer or
process. Held-out loss and memory estimate use the same object as training.

Shapes: B images of a micro-batch, K distinct captions among theirs, C H W of a sample, L caption tokens,
D caption width, n further noises, u uniform and v normal numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli import flow
from sana_cli.choices import PredictionType
from sana_cli.config.keys import ObjectiveConfig, SampleConfig
from sana_cli.model import SanaTransformer
from sana_cli.runtime.device import autocast

LOSS = "loss"  # the name of the loss that a person watches


@dataclass(frozen=True)
class Draws:
    """What an objective wants drawn for each image beside a caption, a noise level and a noise."""

    noises: int = 0  # further standard normal noises of a sample's shape
    uniforms: int = 0  # numbers in [0, 1)
    normals: int = 0  # standard normal numbers
    null_caption: bool = False  # the states of the null caption, once in each micro-batch


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch and everything drawn for it."""

    rows: np.ndarray  # (B,) of the train set
    x_0: Tensor  # (B, C, H, W)
    noise: Tensor  # (B, C, H, W)
    sigma: Tensor  # (B,)
    states: Tensor  # (K, L, D)
    mask: Tensor  # (K, L)
    caption_index: Tensor  # (B,) int64: which of the K is each image's
    step: int | None = None  # optimizer steps before this one; None: held-out images
    noises: Tensor | None = None  # (B, n, C, H, W), as `Draws` asks, like the rest
    uniforms: Tensor | None = None  # (B, u)
    normals: Tensor | None = None  # (B, v)
    null_index: Tensor | None = None  # (1,) int64

    def to(self, device: torch.device) -> Self:
        """The same on a device. A copy from pinned memory is made while the device still computes."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pinned(self) -> Self:
        """The same in pinned memory, from which a GPU copies by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        tensors: dict[str, Any] = {
            key: change(value) for key, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of what is minimised, (B,)."""
    return torch.stack(list(terms.values())).sum(0)


class Objective(Protocol):
    """What a trainer asks of an objective."""

    @property
    def prediction_type(self) -> PredictionType:
        """What the output of the trained transformer is, which a checkpoint records."""

    @property
    def name(self) -> str:
        """What a model card calls it."""

    @property
    def caption_dropout(self) -> float:
        """The share of captions to replace by the null caption."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Extra modules that are trained, saved and resumed with the transformer, by name.

        They are whole in each process, and see each image alone.
        """

    @property
    def frozen(self) -> Mapping[str, SanaTransformer]:
        """Frozen transformers that it uses, by name. They are not saved."""

    @property
    def draws(self) -> Draws:
        """What is drawn for each image."""

    def use_average(self, average: nn.Module) -> None:
        """Take the transformer with the averaged weights, which the trainer keeps up to date."""

    def rate(self, name: str) -> float:
        """The learning rate of a parameter of the transformer or of `modules`, over the run's."""

    def noise_levels(self, quantiles: Tensor) -> Tensor:
        """Sigma (B,), float32, at these quantiles (B,), float64, of the density of noise levels."""

    def losses(self, transformer: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        """What is minimised, by name, of each image, (B,), float32. The batch is on the transformer's device.

        A step follows the gradient of their sum. `loss` is the one that a person watches; of
        held-out images it is all.
        """

    def sampling(self, sample: SampleConfig) -> SampleConfig:
        """How a checkpoint of this objective is sampled, where a run asks for `sample`."""


class RectifiedFlow:
    """The squared error of the velocity at a random noise level; all levels weigh alike (SANA, section 3.2)."""

    name = "rectified flow"
    modules: Mapping[str, nn.Module] = {}
    frozen: Mapping[str, SanaTransformer] = {}
    draws = Draws()

    def __init__(self, config: ObjectiveConfig, timestep_scale: float, precision: str) -> None:
        self.config, self.timestep_scale, self.precision = config, timestep_scale, precision
        self.prediction_type: PredictionType = config.prediction_type
        self.caption_dropout = config.caption_dropout

    def noise_levels(self, quantiles: Tensor) -> Tensor:
        """Logit-normal or uniform, then shifted towards noise (SD3, arXiv 2403.03206, section 3.1)."""
        normal = torch.special.ndtri(quantiles).float()
        sigma = flow.uniform(normal)
        if self.config.sigma_density == "logit_normal":
            sigma = flow.logit_normal(normal, self.config.logit_mean, self.config.logit_std)
        assert self.config.flow_shift is not None, "taken from the base when the run began"
        return flow.shift_sigma(sigma, self.config.flow_shift)

    def use_average(self, average: nn.Module) -> None:
        """The loss does not depend on it."""

    def rate(self, name: str) -> float:  # noqa: ARG002
        """All alike."""
        return 1.0

    def losses(self, transformer: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        """Mean squared error over C, H and W. Predicted data is weighed by `flow.prediction_error`."""
        x_0, noise, sigma = batch.x_0, batch.noise, batch.sigma
        with autocast(x_0.device, self.precision):
            prediction = transformer(
                flow.interpolate(x_0, noise, sigma),
                batch.states.float(),
                sigma * flow.TRAIN_TIMESTEPS * self.timestep_scale,
                encoder_attention_mask=batch.mask,
                caption_index=batch.caption_index,
            )
        target = flow.prediction_target(x_0, noise, self.prediction_type)
        error = F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)
        return {LOSS: flow.prediction_error(error, sigma, self.prediction_type, self.config.sigma_floor)}

    def sampling(self, sample: SampleConfig) -> SampleConfig:
        """As asked: any solver of the flow will do."""
        return sample
