"""The flow against closed forms (fields, orders, densities) and diffusers' schedulers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sana_cli import flow

DETERMINISTIC = ("dpm++", "euler", "heun")


def no_noise() -> Tensor:
    raise AssertionError("a deterministic solver asked for noise")


def run(solver: str, velocity: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: list[float]) -> Tensor:
    *_, last = flow.SOLVERS[solver](velocity, x, sigmas, no_noise)
    return last.x


def test_path_and_target() -> None:
    x_0, noise = torch.randn(2, 3, 1, 4, 4).unbind()
    assert torch.equal(flow.interpolate(x_0, noise, torch.zeros(3)), x_0)
    assert torch.equal(flow.interpolate(x_0, noise, torch.ones(3)), noise)
    low, high = (flow.interpolate(x_0, noise, torch.full((3,), s)) for s in (0.3, 0.4))
    velocity = flow.prediction_target(x_0, noise, "flow_prediction")
    assert torch.allclose((high - low) / 0.1, velocity, atol=1e-5)
    data = flow.prediction_target(x_0, noise, "sample")
    x = flow.interpolate(x_0, noise, torch.full((len(x_0),), 0.3))
    assert torch.allclose(flow.velocity_of(velocity, x, 0.3, "flow_prediction"), velocity, atol=1e-5)
    assert torch.allclose(flow.velocity_of(data, x, 0.3, "sample"), velocity, atol=1e-5)


@pytest.mark.parametrize("solver", DETERMINISTIC)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("flow_shift", [1.0, 3.0])
def test_a_straight_path_is_integrated_exactly(solver: str, steps: int, flow_shift: float) -> None:
    """If all paths end in one point, velocity = (x - x_0) / sigma; any solver ends there."""
    x_0, noise = torch.randn(2, 5, dtype=torch.float64).unbind()
    sigmas = flow.solver_sigmas(solver, steps, flow_shift)
    start = (1 - sigmas[0]) * x_0 + sigmas[0] * noise
    end = run(solver, lambda x, sigma: (x - x_0) / sigma, start, sigmas)
    assert torch.allclose(end, x_0, atol=1e-12)


def gaussian_velocity(std: float) -> Callable[[Tensor, float], Tensor]:
    """E[noise - x_0 | x_t] for data N(0, std^2)."""

    def velocity(x: Tensor, sigma: float) -> Tensor:
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        return x * (sigma - (1 - sigma) * std**2) / variance

    return velocity


def gaussian_flow(x: Tensor, std: float, start: float, end: float) -> Tensor:
    """The exact solution: x scales with the standard deviation of the marginal."""

    def deviation(sigma: float) -> float:
        return math.sqrt((1 - sigma) ** 2 * std**2 + sigma**2)

    return x * deviation(end) / deviation(start)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpm++", 2), ("heun", 2)])
def test_order_of_each_solver(solver: str, order: int) -> None:
    """Halving the step divides the error by 2^order (sigma 0.9 to 0.1: log-SNR is finite)."""
    x, velocity = torch.ones(1, dtype=torch.float64), gaussian_velocity(0.5)
    exact = gaussian_flow(x, 0.5, 0.9, 0.1)

    def error(steps: int) -> float:
        sigmas = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64).tolist()
        return float((run(solver, velocity, x, sigmas) - exact).abs())

    measured = math.log2(error(64) / error(128))
    assert measured == pytest.approx(order, abs=0.15)


def test_solvers_agree_on_the_gaussian_from_noise_to_data() -> None:
    x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for solver in DETERMINISTIC:
        end = run(solver, gaussian_velocity(0.5), x, flow.solver_sigmas(solver, 200))
        assert float(end.std() / x.std()) == pytest.approx(0.5, rel=0.01)


STEPS = (1, 2, 3, 4, 6, 7, 18, 20, 30, 50)


def toy_velocity() -> tuple[Tensor, Callable[[Tensor, float], Tensor]]:
    """A start, and a field curved in space and time."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 6, generator=generator) / 3
    return torch.randn(2, 6, generator=generator), lambda x, sigma: torch.tanh(x @ weight) * (1 + sigma)


@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 4.0, 6.0])
def test_dpm_is_diffusers_scheduler_step_by_step(flow_shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    for steps in STEPS:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            flow_shift=flow_shift,
            num_train_timesteps=1000,
        )
        scheduler.set_timesteps(steps)
        sigmas = flow.solver_sigmas("dpm++", steps, flow_shift)
        assert torch.allclose(torch.tensor(sigmas), scheduler.sigmas.float(), atol=1e-6)
        timesteps = [flow.model_timestep("dpm++", sigma) for sigma in sigmas[:-1]]
        assert timesteps == scheduler.timesteps.tolist()
        x, velocity = toy_velocity()
        for step, timestep in zip(
            flow.SOLVERS["dpm++"](velocity, x, sigmas, no_noise), scheduler.timesteps, strict=True
        ):
            x = scheduler.step(velocity(x, sigmas[step.index]), timestep, x).prev_sample
            assert torch.allclose(step.x, x, atol=2e-5)


@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 4.0, 6.0])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_euler_and_heun_are_diffusers_schedulers_step_by_step(solver: str, flow_shift: float) -> None:
    """With their double shift: the constructor shifts the lowest level, `set_timesteps` all."""
    diffusers = pytest.importorskip("diffusers")
    kinds = {
        "euler": diffusers.FlowMatchEulerDiscreteScheduler,
        "heun": diffusers.FlowMatchHeunDiscreteScheduler,
    }
    for steps in STEPS:
        scheduler = kinds[solver](shift=flow_shift)
        scheduler.set_timesteps(steps)
        sigmas = flow.solver_sigmas(solver, steps, flow_shift)
        assert torch.allclose(torch.tensor(sigmas), scheduler.sigmas.unique().flip(0), atol=1e-6)
        times = iter(scheduler.timesteps.tolist())
        x, velocity = toy_velocity()

        def watched(x: Tensor, sigma: float, times: Any = times, velocity: Any = velocity) -> Tensor:
            assert flow.model_timestep(solver, sigma) == pytest.approx(next(times), abs=1e-3)
            return velocity(x, sigma)

        found = [step.x for step in flow.SOLVERS[solver](watched, x, sigmas, no_noise)]
        assert len(found) == steps
        assert next(times, None) is None  # the same evaluations
        theirs = []
        for timestep in scheduler.timesteps:
            x = scheduler.step(velocity(x, float(timestep) / 1000), timestep, x).prev_sample
            theirs.append(x)
        if solver == "heun":  # diffusers returns a sample after each evaluation; every second one is a step
            theirs = [*theirs[1:-1:2], theirs[-1]] if steps > 1 else theirs
        # diffusers' (x - (x - sigma v)) / sigma is inexact in float32 at sigma 0.001
        blur = 2e-4 if solver == "heun" else 2e-5
        assert all(torch.allclose(a, b, atol=blur) for a, b in zip(found, theirs, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_scm_is_diffusers_scheduler_step_by_step(steps: int) -> None:
    """With `SanaSprintPipeline`'s wrapping of its model, which our solver does not need."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.SCMScheduler()
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    scheduler.set_begin_index(0)
    noises = torch.randn(steps, 2, 6, generator=torch.Generator().manual_seed(1))
    start, velocity = toy_velocity()
    sigmas = flow.solver_sigmas("scm", steps)
    drawn = iter(noises)
    found = list(flow.SOLVERS["scm"](velocity, start, sigmas, lambda: next(drawn)))
    sigma_data, x = scheduler.config.sigma_data, start * scheduler.config.sigma_data
    for index, time in enumerate(scheduler.timesteps[:-1]):
        sigma = time.sin() / (time.cos() + time.sin())
        assert flow.model_timestep("scm", sigmas[index], 0.5) == pytest.approx(float(sigma), abs=1e-6)
        size = (sigma**2 + (1 - sigma) ** 2).sqrt()
        scaled = x / sigma_data * size
        out = (
            (1 - 2 * sigma) * scaled + (1 - 2 * sigma + 2 * sigma**2) * velocity(scaled, float(sigma))
        ) / size
        generator = torch.Generator().manual_seed(100 + index)
        noise = torch.randn(2, 6, generator=generator)
        x, x_0 = scheduler.step(
            out * sigma_data, time, x, generator=torch.Generator().manual_seed(100 + index), return_dict=False
        )
        x = (
            x + scheduler.timesteps[index + 1].sin() * (noises[index] - noise) * sigma_data
        )  # our noise instead of its own
        level = torch.tensor(sigmas[index + 1])
        assert torch.allclose(found[index].x_0, x_0 / sigma_data, atol=1e-5)
        assert torch.allclose(
            found[index].x, x / sigma_data * (level**2 + (1 - level) ** 2).sqrt(), atol=1e-5
        )


def test_densities() -> None:
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    even = flow.uniform(z)
    assert float(even.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(even.var()) == pytest.approx(1 / 12, rel=0.01)
    normal = flow.logit_normal(z, mean=-0.5, std=1.5)
    assert float(normal.median()) == pytest.approx(1 / (1 + math.exp(0.5)), abs=0.005)
    assert float(torch.logit(normal.double()).std()) == pytest.approx(1.5, rel=0.01)


def test_shift() -> None:
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(flow.shift_sigma(sigma, 1.0), sigma)
    shifted = flow.shift_sigma(sigma, 3.0)
    assert shifted[5] == pytest.approx(0.75)
    assert torch.allclose(flow.shift_sigma(shifted, 1 / 3), sigma)
    assert (shifted[1:-1] > sigma[1:-1]).all()


def test_guidance() -> None:
    conditional, null = torch.tensor([3.0]), torch.tensor([1.0])
    assert flow.guide(conditional, null, 1.0) == conditional
    assert flow.guide(conditional, null, 0.0) == null
    assert flow.guide(conditional, null, 2.0) == 5.0
    assert flow.in_interval(0.5, (0.2, 0.5))
    assert not flow.in_interval(0.6, (0.2, 0.5))


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_predicted_x_0_and_levels(solver: str) -> None:
    sigmas = flow.solver_sigmas(solver, 5)
    assert len(sigmas) == 6
    assert sigmas[-1] == 0
    assert sigmas == sorted(sigmas, reverse=True)
    x_0 = torch.tensor([2.0], dtype=torch.float64)
    for step in flow.SOLVERS[solver](
        lambda x, sigma: (x - x_0) / sigma, torch.ones(1, dtype=torch.float64), sigmas, lambda: torch.zeros(1)
    ):
        assert torch.allclose(step.x_0, x_0)
