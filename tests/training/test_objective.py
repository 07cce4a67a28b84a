"""Rectified flow against its definition: velocity, predicted x_0, weights of noise levels."""

import numpy as np
import pytest
import torch
from helpers import rectified_flow, train_set
from torch import Tensor, nn

from sana_cli import flow
from sana_cli.config.keys import Config
from sana_cli.training.batches import training_batch


def test_loss_is_the_squared_error_of_the_velocity(config: Config) -> None:
    objective = rectified_flow(config)
    batch = training_batch(train_set(config), objective, 0, np.arange(8))

    class Oracle(nn.Module):
        def forward(self, x: Tensor, states: Tensor, timestep: Tensor, **_: object) -> Tensor:
            sigma = (timestep / 1000).view(-1, 1, 1, 1)
            return (x - batch.x_0) / sigma  # noise - x_0 only if x_t and the signs are right

    losses = objective.losses(Oracle(), batch)["loss"]
    assert losses.shape == (8,)
    assert float(losses.max()) < 1e-6


def test_loss_of_predicted_data_is_that_of_the_velocity_down_to_the_floor(config: Config) -> None:
    """For a wrong x_0, the loss is the error of the velocity that a solver computes from it."""
    objective = rectified_flow(config, prediction_type="sample", sigma_floor=0.5)
    batch = training_batch(train_set(config), objective, 0, np.arange(32))
    off = torch.linspace(-1, 2, 16 * 16).view(1, 16, 16)

    class Guess(nn.Module):
        def forward(self, *_: object, **__: object) -> Tensor:
            return batch.x_0 + off

    losses = objective.losses(Guess(), batch)["loss"]
    assert 0 < int((batch.sigma < 0.5).sum()) < 32
    for x_0, noise, sigma, loss in zip(batch.x_0, batch.noise, batch.sigma, losses, strict=True):
        x = (1 - sigma) * x_0 + sigma * noise
        wrong = flow.velocity_of(x_0 + off, x, float(sigma), "sample") - (noise - x_0)
        share = min(float(sigma) / 0.5, 1.0) ** 2
        assert float(loss) == pytest.approx(share * float(wrong.square().mean()), rel=1e-3)
