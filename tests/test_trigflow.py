"""TrigFlow against closed forms, and distillation term by term against diffusers' research script.

The script is `examples/research_projects/sana/train_sana_sprint_diffusers.py`. Its formulas are written here in its own
variables: data and noise are half of ours (`SIGMA_DATA`). What is ours by choice, and not compared: the heads
(no batch norm, no spectral norm), one loss for student and critic of the same images in place of alternate steps, guidance
scales from a range in place of a list, and a log variance that is a function of sigma alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.sanas import reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sana_cli import flow, trigflow
from sana_cli.config.keys import Architecture, DistillConfig
from sana_cli.kernels import forward_derivatives
from sana_cli.model import SanaTransformer, build
from sana_cli.training import distillation
from sana_cli.training.distillation import WEIGHTING, Distillation
from sana_cli.training.objective import MicroBatch
from sana_cli.training.student import student_architecture
from sana_cli.trigflow import per_image

TEACHER = Architecture(
    in_channels=4, sample_size=6, patch_size=1, num_layers=2, num_attention_heads=4, attention_head_dim=8,
    num_cross_attention_heads=2, cross_attention_head_dim=16, caption_channels=12, timestep_scale=0.001,
    qk_norm="rms_norm_across_heads",
)  # fmt: skip
STUDENT = student_architecture(TEACHER, 0.1)
IMAGES, SIDE = 5, 6


def randn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def times(count: int = IMAGES) -> Tensor:
    return torch.linspace(0.1, 1.5, count, dtype=torch.float64)


# --- closed forms -------------------------------------------------------------------------------


def test_sigma_and_time_are_inverse() -> None:
    sigma = torch.linspace(0, 1, 101, dtype=torch.float64)
    time = trigflow.time_of(sigma)
    torch.testing.assert_close(trigflow.sigma_of(time), sigma)
    assert time[[0, -1]].tolist() == pytest.approx([0, math.pi / 2])
    torch.testing.assert_close(time.tan()[1:-1], (sigma / (1 - sigma))[1:-1])


def test_the_derivative_is_that_of_the_path_and_of_sana_sprint() -> None:
    """With data and noise, F is d/dt (cos t data + sin t noise); with a velocity, the paper's output transform."""
    data, noise, v, time = randn(3, IMAGES, 4, 3, 3)[0], *randn(2, IMAGES, 4, 3, 3, seed=1), times()
    cos, sin = per_image(time.cos()), per_image(time.sin())
    x, s = cos * data + sin * noise, per_image(trigflow.sigma_of(time))
    of_path = trigflow.derivative(x, data, time)
    torch.testing.assert_close(of_path, -sin * data + cos * noise)
    torch.testing.assert_close(trigflow.data_of(x, of_path, time), data)
    x_s = x / (cos + sin)
    torch.testing.assert_close(x_s, (1 - s) * data + s * noise)
    scale = (s**2 + (1 - s) ** 2).sqrt()
    torch.testing.assert_close(x * scale, x_s)
    published = ((1 - 2 * s) * x_s + (1 - 2 * s + 2 * s**2) * v) / scale
    torch.testing.assert_close(trigflow.derivative(x, x_s - s * v, time), published)
    torch.testing.assert_close(trigflow.data_of(x, published, time), x_s - s * v)


def test_tangents_of_a_known_network() -> None:
    """F = A x + b sin t: its derivative along dx / dt is A dx / dt + b cos t; a difference is off by h / 2 b sin t."""
    matrix, b, x, velocity = randn(8, 8), randn(8, seed=1), *randn(2, IMAGES, 8, seed=2)
    time, shape = times(), (IMAGES, 2, 2, 2)

    def network(x: Tensor, time: Tensor) -> Tensor:
        return (x.flatten(1) @ matrix.T + time.sin()[:, None] * b).view(shape)

    given = (network, x.view(shape), time, velocity.view(shape))
    weight = (time.cos() * time.sin())[:, None]
    exact = weight * (velocity @ matrix.T + time.cos()[:, None] * b)
    tangent = trigflow.tangent_by_jvp(*given)
    output = given[0](given[1], given[2])
    torch.testing.assert_close(output, network(*given[1:3]))
    torch.testing.assert_close(tangent.flatten(1), exact)
    for step in (1e-2, 1e-3):
        found = trigflow.tangent_by_difference(*given, output, step).flatten(1)
        off = weight * time.sin()[:, None] * b * step / 2
        torch.testing.assert_close(found - exact, off, rtol=2 * step, atol=step**2)


def random_model(architecture: Architecture, seed: int) -> SanaTransformer:
    """A model all of whose weights matter."""
    model = build(architecture, seed, "fan_in").requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        parameter.add_(0.1 * randn(*parameter.shape, seed=number, dtype=torch.float32))
    return model


def test_tangents_of_a_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, against a central difference in float64. The model's own `.float()` are then `.double()`."""
    model = random_model(STUDENT, 0)
    sizes = (IMAGES, 4, SIDE, SIDE)
    x, velocity = (randn(*sizes, seed=seed, dtype=torch.float32) for seed in (1, 2))
    states, guidance = randn(IMAGES, 5, 12, seed=3, dtype=torch.float32), torch.linspace(0.1, 0.4, IMAGES)
    time = times().float()

    def network(x: Tensor, time: Tensor) -> Tensor:
        sigma = trigflow.sigma_of(time)
        at = x / per_image(time.cos() + time.sin())
        v = model(at, states.to(x), sigma, guidance.to(x))
        return trigflow.derivative(x, at - per_image(sigma) * v, time)

    with forward_derivatives():
        output, tangent = network(x, time), trigflow.tangent_by_jvp(network, x, time, velocity)
    torch.testing.assert_close(output, network(x, time), rtol=1e-5, atol=1e-5)
    difference = trigflow.tangent_by_difference(network, x, time, velocity, output, distillation.DIFFERENCE)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    model.double()
    wide, at, along, h = x.double(), time.double(), velocity.double(), 1e-6  # larger ones meet ReLU's kinks
    ahead, behind = (network(wide + step * along, at + step) for step in (h, -h))
    central = per_image(at.cos() * at.sin()) * (ahead - behind) / (2 * h)

    def error(found: Tensor) -> float:
        return float((found.double() - central).norm() / central.norm())

    assert error(tangent) < 1e-5
    assert error(difference) < 0.01
    assert error(-tangent) > 1
    assert error(tangent / per_image(time.cos() * time.sin())) > 0.1


def test_the_tangent_of_consistency_in_numbers() -> None:
    """g in plain numbers and the published units: any flipped sign, or another constant, is far off."""
    shape, time = (IMAGES, 3, 2, 2), times()
    x, output, velocity, tangent = randn(4, *shape)
    for warmup in (0.0, 0.4, 1.0):
        g = trigflow.consistency_tangent(x, output, velocity, tangent, time, warmup)
        for image in range(IMAGES):
            cos, sin = math.cos(time[image]), math.sin(time[image])
            x_t, f, dx, df = (0.5 * part[image].numpy().ravel() for part in (x, output, velocity, tangent))
            raw = np.array(
                [
                    cos * cos * dx[i] - cos * cos * f[i] - warmup * cos * sin * x_t[i] - warmup * df[i]
                    for i in range(12)
                ]
            )
            expected = raw / (math.sqrt(sum(raw**2)) + 0.1)
            np.testing.assert_allclose(g[image].numpy().ravel(), expected, rtol=1e-12)
    for large in (1.0, 1e6):
        norm = (
            trigflow.consistency_tangent(large * x, output, velocity, tangent, time, 1.0)
            .flatten(1)
            .norm(dim=1)
        )
        assert norm.max() <= 1
    assert norm.min() > 0.999


def test_the_gradient_of_the_loss_of_consistency() -> None:
    """By F it is -2 g weight / n, for n numbers of a sample; by u, 1 - error weight."""
    time, g = times(), randn(IMAGES, 3, 2, 2)
    output, u = randn(IMAGES, 3, 2, 2, seed=1).requires_grad_(), randn(IMAGES, seed=2).requires_grad_()
    loss = trigflow.consistency_loss(output, g, time, u)
    weight = 1 / (0.5 * time.tan()) / u.exp()
    error = g.square().flatten(1).mean(1)
    torch.testing.assert_close(loss, weight * error + u)
    by_output, by_u = torch.autograd.grad(loss.sum(), (output, u))
    torch.testing.assert_close(by_output, -2 * g * per_image(weight.detach()) / 12)
    torch.testing.assert_close(by_u, 1 - (weight * error).detach())


def test_the_consistency_function_of_a_gaussian_has_no_tangent() -> None:
    """For data N(m, c^2) the teacher's field and the map from (x, t) to its end are known."""
    mean, std, time = 0.7, 0.4, times()
    x = randn(IMAGES, 2, 3, 3) + mean

    def spread(time: Tensor) -> Tensor:
        return per_image((time.cos() ** 2 * std**2 + time.sin() ** 2).sqrt())

    def teacher(x: Tensor, time: Tensor) -> Tensor:
        cos = per_image(time.cos())
        return trigflow.derivative(x, mean + cos * std**2 * (x - cos * mean) / spread(time) ** 2, time)

    def student(x: Tensor, time: Tensor) -> Tensor:
        end = mean + std * (x - per_image(time.cos()) * mean) / spread(time)
        return trigflow.derivative(x, end, time)

    velocity = teacher(x, time)
    output, tangent = student(x, time), trigflow.tangent_by_jvp(student, x, time, velocity)
    g = trigflow.consistency_tangent(x, output, velocity, tangent, time, 1.0)
    assert g.abs().max() < 1e-12
    difference = trigflow.tangent_by_difference(student, x, time, velocity, output, 1e-5)
    assert trigflow.consistency_tangent(x, output, velocity, difference, time, 1.0).abs().max() < 1e-4
    for wrong in (
        trigflow.consistency_tangent(x, output, velocity, tangent, time, 0.5),
        trigflow.consistency_tangent(x, output, velocity, -tangent, time, 1.0),
        trigflow.consistency_tangent(x, teacher(x, time), velocity,
                                     trigflow.tangent_by_jvp(teacher, x, time, velocity), time, 1.0),
    ):  # fmt: skip
        assert wrong.flatten(1).norm(dim=1).max() > 0.1


# --- diffusers' research script -----------------------------------------------------------------

HALF = 0.5  # its sigma_data
CONFIG = DistillConfig(
    teacher=Path("t"), method="scm", tangent="jvp", tangent_warmup=10, largest=0.5, guidance=(1.0, 5.0),
    guidance_interval=(0.0, 1.0), critic=True, critic_loss="hinge", critic_weight=0.5, critic_warmup=0,
    critic_blocks=(0, 1), critic_logit_mean=-0.6 - math.log(HALF), critic_logit_std=1.0,
)  # fmt: skip
STEP = 4  # of its warm-up of 10


def trig(
    model: Any, x: Tensor, time: Tensor, states: Tensor, mask: Tensor, scale: Tensor | None = None
) -> Tensor:
    """Its wrapper: dx / dt of TrigFlow, at x over sigma_data, of a model of the flow."""
    t = time.view(-1, 1, 1, 1)
    s = t.sin() / (t.cos() + t.sin())
    root = (s**2 + (1 - s) ** 2).sqrt()
    given = x * root
    v = model(given, states, s.flatten(), guidance=scale, encoder_attention_mask=mask).sample
    return ((1 - 2 * s) * given + (1 - 2 * s + 2 * s**2) * v) / root


@dataclass(frozen=True)
class Pair:
    """The same random models here and in diffusers, and what is drawn for a few images."""

    student: SanaTransformer
    distillation: Distillation
    their_student: Any
    their_teacher: Any
    batch: MicroBatch
    z: Tensor  # normals of the noise levels

    @property
    def guidance(self) -> Tensor:
        assert self.batch.uniforms is not None
        return 1 + 4 * self.batch.uniforms[:, 0]


@pytest.fixture
def pair() -> Iterator[Pair]:
    pytest.importorskip("diffusers")
    their_student, their_teacher = reference(STUDENT), reference(TEACHER)
    for number, parameter in enumerate(their_teacher.parameters()):  # otherwise than the student
        parameter.data += 0.05 * randn(*parameter.shape, seed=number, dtype=torch.float32)
    student, teacher = build(STUDENT, seed=None), build(TEACHER, seed=None)
    student.load_state_dict(their_student.state_dict(), assign=True)
    teacher.load_state_dict(their_teacher.state_dict(), assign=True)
    z = torch.linspace(-1.5, 1.2, IMAGES)
    uniforms = torch.rand(IMAGES, 3, generator=torch.Generator().manual_seed(5))
    uniforms[:, distillation.AT_LARGEST] = torch.tensor([0.1, 0.9, 0.6, 0.4, 0.7])
    made = Distillation(CONFIG, STUDENT, teacher, "flow_prediction", "fp32", is_pixels=False, seed=0)
    for number, parameter in enumerate(made.modules[WEIGHTING].parameters()):
        parameter.data = 0.3 * randn(*parameter.shape, seed=number, dtype=torch.float32)
    sizes = (IMAGES, 4, SIDE, SIDE)
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[1, 4:], mask[3, 1:] = False, False
    batch = MicroBatch(
        rows=np.arange(IMAGES),
        x_0=randn(*sizes, seed=1, dtype=torch.float32),
        noise=randn(*sizes, seed=2, dtype=torch.float32),
        sigma=made.noise_levels(torch.special.ndtr(z.double())),
        states=randn(4, 7, 12, seed=3, dtype=torch.float32),
        mask=mask,
        caption_index=torch.tensor([0, 1, 2, 1, 0]),
        step=STEP,
        noises=randn(IMAGES, 3, 4, SIDE, SIDE, seed=4, dtype=torch.float32),
        uniforms=uniforms,
        normals=randn(IMAGES, 2, seed=6, dtype=torch.float32),
        null_index=torch.tensor([3]),
    )
    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward derivative
        yield Pair(student, made, their_student, their_teacher, batch, z)


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Assert that two tensors differ by less than rounding in float32, relative to the largest number."""
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_noise_levels_are_the_script_s(pair: Pair) -> None:
    """Of the sCM term (mean 0.2, std 1.6) and of the critic (mean -0.6, std 1), from the same normal numbers."""
    near(trigflow.time_of(pair.batch.sigma), torch.atan((1.6 * pair.z + 0.2).exp() / HALF))
    sigma = flow.logit_normal(pair.z, CONFIG.critic_logit_mean, CONFIG.critic_logit_std)
    near(trigflow.time_of(sigma), torch.atan((pair.z - 0.6).exp() / HALF))


def test_continuous_consistency_is_the_script_s(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's guided dx / dt, F, the tangent, g before and after its norm, and the loss."""
    seen: dict[str, Tensor] = {}

    def spied(
        x: Tensor, output: Tensor, velocity: Tensor, tangent: Tensor, time: Tensor, warmup: float
    ) -> Tensor:
        seen.update(
            x=x, output=output, velocity=velocity, tangent=tangent, time=time, warmup=torch.tensor(warmup)
        )
        seen["g"] = honest(x, output, velocity, tangent, time, warmup)
        return seen["g"]

    honest = trigflow.consistency_tangent
    monkeypatch.setattr(trigflow, "consistency_tangent", spied)
    batch, scale = pair.batch, pair.guidance
    losses = pair.distillation.losses(pair.student, batch)
    t = torch.atan((1.6 * pair.z + 0.2).exp() / HALF)
    cos, sin = t.cos().view(-1, 1, 1, 1), t.sin().view(-1, 1, 1, 1)
    x_t = cos * HALF * batch.x_0 + sin * HALF * batch.noise
    states, mask = batch.states[batch.caption_index], batch.mask[batch.caption_index]
    assert batch.null_index is not None
    none, no_mask = batch.states[batch.null_index.expand(IMAGES)], batch.mask[batch.null_index.expand(IMAGES)]
    with torch.no_grad():
        null = HALF * trig(pair.their_teacher, x_t / HALF, t, none, no_mask)
        given = HALF * trig(pair.their_teacher, x_t / HALF, t, states, mask)
        dx_dt = null + scale.view(-1, 1, 1, 1) * (given - null)

        def network(x: Tensor, time: Tensor) -> Tensor:
            return trig(pair.their_student, x, time.flatten(), states, mask, 0.1 * scale)

        at, along = (x_t / HALF, t.view(-1, 1, 1, 1)), (cos * sin * dx_dt / HALF, cos * sin)
        f, of_f = torch.func.jvp(network, at, along)[:2]
        r = min(1, STEP / 10)
        raw = -cos * cos * (HALF * f - dx_dt) - r * (cos * sin * x_t + HALF * of_f)
        g = raw / (raw.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 0.1)
        logvar = pair.distillation.modules[WEIGHTING](batch.sigma).view(-1, 1, 1, 1)
        weight = 1 / (t.tan() * HALF).view(-1, 1, 1, 1)
        loss = ((weight / logvar.exp()) * g.square() + logvar).mean()
    near(HALF * seen["x"], x_t)
    near(seen["time"], t)
    near(seen["output"], f)
    near(HALF * seen["velocity"], dx_dt)
    near(seen["tangent"], of_f)
    assert float(seen["warmup"]) == pytest.approx(r)
    near(seen["g"], g)
    norm = raw.flatten(1).norm(dim=1)  # before its norm: |g| is norm / (norm + 0.1)
    near(0.1 * seen["g"].flatten(1).norm(dim=1) / (1 - seen["g"].flatten(1).norm(dim=1)), norm, 1e-4)
    near(losses["loss"].mean(), loss)
    ours = torch.autograd.grad(losses["loss"].mean(), list(pair.student.parameters()))
    theirs = dict(pair.their_student.named_parameters())
    live = network(x_t / HALF, t.view(-1, 1, 1, 1))
    objective = ((weight / logvar.exp()) * (live - f - g).square() + logvar).mean()
    of_theirs = torch.autograd.grad(objective, list(theirs.values()))
    for (name, _), gradient in zip(pair.student.named_parameters(), ours, strict=True):
        near(gradient, of_theirs[list(theirs).index(name)], 1e-4)


def test_the_adversarial_part_is_the_script_s(pair: Pair) -> None:
    """Real samples with another noise, half of them at the largest time; features; hinge losses of the same logits."""
    batch, scale = pair.batch, pair.guidance
    losses = pair.distillation.losses(pair.student, batch)
    assert batch.uniforms is not None
    assert batch.noises is not None
    assert batch.normals is not None
    of_largest, (of_critic, of_level) = batch.uniforms[:, 2], batch.normals.unbind(1)
    t = torch.atan((1.6 * of_level + 0.2).exp() / HALF)
    t = torch.where(of_largest < 0.5, torch.full_like(t, 1.57080), t)
    of_drawn, of_real, own = (batch.noises[:, number] for number in range(3))
    cos, sin = t.cos().view(-1, 1, 1, 1), t.sin().view(-1, 1, 1, 1)
    x_t = cos * HALF * batch.x_0 + sin * HALF * own
    states, mask = batch.states[batch.caption_index], batch.mask[batch.caption_index]
    f = trig(pair.their_student, x_t / HALF, t, states, mask, 0.1 * scale)
    x_0 = cos * x_t - sin * f * HALF
    t_d = torch.atan((of_critic - 0.6).exp() / HALF)
    features: list[Tensor] = []
    heads = pair.distillation.modules["critic"]

    def logits(data: Tensor, noise: Tensor) -> Tensor:
        features.clear()
        hooks = [
            block.register_forward_hook(lambda _module, _given, made: features.append(made))
            for block in pair.their_teacher.transformer_blocks
        ]
        noised = t_d.cos().view(-1, 1, 1, 1) * data + t_d.sin().view(-1, 1, 1, 1) * HALF * noise
        trig(pair.their_teacher, noised / HALF, t_d, states, mask)
        for hook in hooks:
            hook.remove()
        made: Tensor = heads(features, SIDE)
        return made

    fake, true = logits(x_0, of_drawn), logits(HALF * batch.x_0, of_real)
    near(losses["adversarial"].mean(), 0.5 * -fake.mean(), 1e-4)
    near(losses["critic"].mean(), 0.5 * (F.relu(1 - true).mean() + F.relu(1 + fake).mean()), 1e-4)
