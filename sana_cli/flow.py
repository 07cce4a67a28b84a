"""Rectified flow: the path from data to noise, velocity, noise levels, guidance and solvers.

It is arithmetic on tensors and knows no model: a solver receives a function
`velocity(x, sigma)`. The whole package uses the signs of diffusers, NVlabs/Sana, SD3 and FLUX:

    x_t = (1 - sigma) x_0 + sigma noise,   velocity = dx_t / dsigma = noise - x_0

Sigma 1 is noise, 0 is data.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sana_cli.choices import PredictionType

TRAIN_TIMESTEPS = 1000  # the transformer receives timestep = 1000 sigma


def interpolate(x_0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma) x_0 + sigma noise, for x_0 and noise (B, ...) and sigma (B,)."""
    sigma = sigma.view(-1, *[1] * (x_0.ndim - 1))
    return (1 - sigma) * x_0 + sigma * noise


def prediction_target(x_0: Tensor, noise: Tensor, prediction_type: PredictionType) -> Tensor:
    """What the transformer learns: x_0 ("sample"), or noise - x_0 (arXiv 2209.03003, eq. 1)."""
    return x_0 if prediction_type == "sample" else noise - x_0


def prediction_error(
    error: Tensor, sigma: Tensor, prediction_type: PredictionType, sigma_floor: float
) -> Tensor:
    """Convert the squared error (B,) of a prediction to that of the velocity, the loss.

    The error of a predicted x_0 is divided by sigma^2, since velocity = (x_t - x_0) / sigma
    (JiT, arXiv 2511.13720). `sigma` (B,) counts as at least `sigma_floor`.
    """
    return error / sigma.clamp(min=sigma_floor) ** 2 if prediction_type == "sample" else error


def velocity_of(prediction: Tensor, x: Tensor, sigma: float, prediction_type: PredictionType) -> Tensor:
    """Convert a prediction at `x`, on noise level `sigma`, to the velocity."""
    return (x - prediction) / sigma if prediction_type == "sample" else prediction


def logit_normal(z: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigma = sigmoid(mean + std z), z standard normal (SD3, arXiv 2403.03206, section 3.1)."""
    return torch.sigmoid(mean + std * z)


def uniform(z: Tensor) -> Tensor:
    """sigma = Phi(z), uniform on (0, 1): like `logit_normal`, from standard normal z."""
    return torch.special.ndtr(z)


def shift_sigma(sigma: Tensor, flow_shift: float) -> Tensor:
    """sigma -> s sigma / (1 + (s - 1) sigma): more noise for large images (SD3, eq. 23)."""
    return flow_shift * sigma / (1 + (flow_shift - 1) * sigma)


def guide(conditional: Tensor, null: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): null + scale (conditional - null)."""
    return null + guidance_scale * (conditional - null)


def in_interval(sigma: float, interval: tuple[float, float]) -> bool:
    """Whether guidance is used at sigma (guidance in a limited interval, arXiv 2404.07724)."""
    return interval[0] <= min(sigma, 1.0) <= interval[1]  # a solver may start slightly above 1 by rounding


@dataclass(frozen=True)
class SolverStep:
    """The state after step `index` (from 0): `x` at `sigma`, and the predicted x_0."""

    index: int
    sigma: float
    x: Tensor
    x_0: Tensor


Velocity = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]  # fresh standard normal noise of x's shape, for solvers that add some
Solver = Callable[[Velocity, Tensor, Sequence[float], Noise], Iterator[SolverStep]]


def euler(velocity: Velocity, x: Tensor, sigmas: Sequence[float], _noise: Noise) -> Iterator[SolverStep]:
    """x += (sigma' - sigma) velocity: first order, exact for straight paths."""
    for index, (sigma, lower) in enumerate(itertools.pairwise(sigmas)):
        v = velocity(x, sigma)
        x_0 = x - sigma * v
        x = x + (lower - sigma) * v
        yield SolverStep(index, lower, x, x_0)


def heun(velocity: Velocity, x: Tensor, sigmas: Sequence[float], _noise: Noise) -> Iterator[SolverStep]:
    """The trapezoidal rule (EDM, arXiv 2206.00364, algorithm 1).

    Second order, two evaluations per step. The last step, to sigma 0, is an Euler step, as
    usual.
    """
    for index, (sigma, lower) in enumerate(itertools.pairwise(sigmas)):
        v = velocity(x, sigma)
        x_0 = x - sigma * v
        ahead = x + (lower - sigma) * v
        x = ahead if lower == 0 else x + (lower - sigma) * (v + velocity(ahead, lower)) / 2
        yield SolverStep(index, lower, x, x_0)


def scm(velocity: Velocity, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[SolverStep]:
    """Multistep consistency sampling (sCM, arXiv 2410.11081): predict x_0, add noise, repeat.

    SANA-Sprint (arXiv 2503.09641) states it in TrigFlow's variables. With
    sigma = sin t / (cos t + sin t), its input scaling, its output transform and the step of
    diffusers' `SCMScheduler` reduce to these two lines.
    """
    for index, (sigma, lower) in enumerate(itertools.pairwise(sigmas)):
        x_0 = x - sigma * velocity(x, sigma)
        x = interpolate(x_0, noise(), x.new_tensor([lower]))
        yield SolverStep(index, lower, x, x_0)


def dpm_solver_pp_2m(
    velocity: Velocity, x: Tensor, sigmas: Sequence[float], _noise: Noise
) -> Iterator[SolverStep]:
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2, data prediction, midpoint).

    On the flow path, alpha = 1 - sigma.

    Second order, one evaluation per step. The first step is first order, since it has no
    previous one, and so is the last, since log(alpha / sigma) is infinite at sigma 0. For the
    same reason sigma must start below 1.
    """

    def log_snr(sigma: float) -> float:
        return math.log((1 - sigma) / sigma)

    previous: tuple[float, Tensor] | None = None
    for index, (sigma, lower) in enumerate(itertools.pairwise(sigmas)):
        x_0 = x - sigma * velocity(x, sigma)
        estimate = x_0
        if previous is not None and lower > 0:
            step, last_step = log_snr(lower) - log_snr(sigma), log_snr(sigma) - log_snr(previous[0])
            estimate = x_0 + step / (2 * last_step) * (x_0 - previous[1])  # D = D_0 + D_1 / 2
        # (sigma'/sigma) x - alpha' (exp(-h) - 1) D; exp(-h) = alpha sigma' / (alpha' sigma)
        ratio = lower / sigma
        x = ratio * x + ((1 - lower) - (1 - sigma) * ratio) * estimate
        previous = (sigma, x_0)
        yield SolverStep(index, lower, x, x_0)


SOLVERS: dict[str, Solver] = {"dpm++": dpm_solver_pp_2m, "euler": euler, "heun": heun, "scm": scm}

TRIGFLOW_START = 1.57080  # SANA-Sprint's, slightly above pi / 2
TRIGFLOW_MIDDLE = 1.3  # the start of its second step of two


def solver_sigmas(solver: str, steps: int, flow_shift: float = 1.0) -> list[float]:
    """The `steps` + 1 noise levels, from the first to 0, as in diffusers.

    - dpm++: from 0.999 before the shift, since its variable is infinite at 1
      (`DPMSolverMultistepScheduler` with `use_flow_sigmas`, and the official Flow-DPM-Solver).
      The order of operations is theirs, so that `model_timestep` truncates to the same
      integers.
    - euler, heun: `FlowMatchEulerDiscreteScheduler` and `FlowMatchHeunDiscreteScheduler`, which
      the official Flow-Euler wraps. Even steps from 1 to the shifted 0.001 are shifted again,
      so a flow_shift other than 1 applies twice.
    - scm: TrigFlow times from pi / 2 to 0 (`SCMScheduler`), as sigmas, without a shift.
    """
    if solver == "scm":
        times = torch.linspace(TRIGFLOW_START, 0, steps + 1)
        if steps == 2:
            times = torch.tensor([TRIGFLOW_START, TRIGFLOW_MIDDLE, 0])
        return (times.sin() / (times.cos() + times.sin())).tolist()
    if solver == "dpm++":
        signal = np.linspace(1.0, 1 / TRAIN_TIMESTEPS, steps + 1)
        return shift_sigma(torch.from_numpy(1.0 - signal), flow_shift).flip(0).tolist()
    lowest = shift_sigma(torch.tensor(1 / TRAIN_TIMESTEPS), flow_shift).item()
    return [*shift_sigma(torch.from_numpy(np.linspace(1.0, lowest, steps)), flow_shift).tolist(), 0.0]


def model_timestep(solver: str, sigma: float, timestep_scale: float = 1.0) -> float:
    """The timestep that the transformer receives at `sigma`.

    It is 1000 sigma timestep_scale. DPM-Solver++ truncates 1000 sigma to an integer, as other
    implementations do; SCM passes sigma itself.
    """
    if solver == "scm":
        return sigma
    timestep = sigma * TRAIN_TIMESTEPS
    return (math.floor(timestep) if solver == "dpm++" else timestep) * timestep_scale
