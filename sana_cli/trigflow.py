"""TrigFlow, the variables of continuous-time consistency models (arXiv 2410.11081), around a flow model.

It is arithmetic on tensors and knows no model. With a flow sample x_s = (1 - s) data + s noise:

    s = sin t / (cos t + sin t),   x = cos t data + sin t noise = (cos t + sin t) x_s,   F = dx / dt

Time t runs from 0 (data) to pi / 2 (noise). Papers and diffusers scale x by sigma_data 0.5 of the data;
here it is that of the flow, so all of theirs are half of these. Shapes: B images, C H W of a sample.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SIGMA_DATA = 0.5
NORM_OFFSET = 0.1  # c of sCM's normalised tangent, at sigma_data


def per_image(values: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def time_of(sigma: Tensor) -> Tensor:
    """t at flow noise levels (B,)."""
    return torch.atan2(sigma, 1 - sigma)


def sigma_of(time: Tensor) -> Tensor:
    """The flow noise level at t, (B,)."""
    return time.sin() / (time.cos() + time.sin())


def log_normal(z: Tensor, mean: float, std: float) -> Tensor:
    """Flow noise levels (B,) whose tan t is exp(mean + std z) / sigma_data, z standard normal (sCM, section 4.1)."""
    tangent = torch.exp(mean + std * z) / SIGMA_DATA
    return tangent / (1 + tangent)


def derivative(x: Tensor, x_0: Tensor, time: Tensor) -> Tensor:
    """F = dx / dt at (x, t) where x_0 is the predicted data: (cos t x - x_0) / sin t."""
    return (per_image(time.cos()) * x - x_0) / per_image(time.sin())


def data_of(x: Tensor, derivative: Tensor, time: Tensor) -> Tensor:
    """The predicted data: cos t x - sin t F."""
    return per_image(time.cos()) * x - per_image(time.sin()) * derivative


Network = Callable[[Tensor, Tensor], Tensor]  # F at (x, t)


def tangent_by_jvp(network: Network, x: Tensor, time: Tensor, velocity: Tensor) -> Tensor:
    """cos t sin t dF / dt along dx / dt = velocity, by forward-mode differentiation."""
    weight = time.cos() * time.sin()
    _, tangent, *_ = torch.func.jvp(network, (x, time), (per_image(weight) * velocity, weight))
    return tangent


def tangent_by_difference(
    network: Network, x: Tensor, time: Tensor, velocity: Tensor, output: Tensor, step: float
) -> Tensor:
    """cos t sin t dF / dt by a backward difference over `step` of t, from F = `output` at (x, t)."""
    before = network(x - step * velocity, time - step)
    return per_image(time.cos() * time.sin()) * (output - before) / step


def consistency_tangent(
    x: Tensor, output: Tensor, velocity: Tensor, tangent: Tensor, time: Tensor, warmup: float
) -> Tensor:
    """The normalised tangent g of sCM (arXiv 2410.11081, algorithm 1).

    Args:
        x: at t.
        output: the network's F at (x, t).
        velocity: the teacher's dx / dt.
        tangent: cos t sin t dF / dt along it.
        time: t (B,).
        warmup: 0 to 1, the strength of the part that needs the tangent.
    """
    cos, sin = per_image(time.cos()), per_image(time.sin())
    g = -(cos**2) * (output - velocity) - warmup * (cos * sin * x + tangent)
    norm = torch.linalg.vector_norm(g.flatten(1), dim=1)
    return g / per_image(norm + NORM_OFFSET / SIGMA_DATA)


def consistency_loss(output: Tensor, g: Tensor, time: Tensor, log_variance: Tensor) -> Tensor:
    """sCM's loss of each image (B,): mean of (F - F- - g)^2 / (sigma_data tan t) / exp(u) + u.

    F- is F without gradient, and u (B,) the learned log variance (SANA-Sprint, eq. 9).
    """
    error = (output - output.detach() - g).square().flatten(1).mean(1)
    return error / (SIGMA_DATA * time.tan()) / log_variance.exp() + log_variance
