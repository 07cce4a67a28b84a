"""Distillation of a teacher into a student that draws in few steps: the second objective.

Consistency trains the student to predict, at every noise level, what the guided teacher would draw, and a
critic makes that sharp. There are two forms of consistency. One takes a step of the teacher and a cut target
of the averaged student, and suits models of any prediction. The other is sCM's loss, as in SANA-Sprint
(arXiv 2503.09641). It knows no dataset, optimizer or process.

Shapes: as in `objective.py`; N tokens of a sample.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sana_cli import flow, trigflow
from sana_cli.choices import PredictionType
from sana_cli.config.keys import Architecture, DistillConfig, SampleConfig
from sana_cli.kernels import forward_derivatives
from sana_cli.model import SanaTransformer
from sana_cli.runtime.device import autocast, exact_float32
from sana_cli.training.critics import Critic, draw_weights
from sana_cli.training.objective import LOSS, Draws, MicroBatch
from sana_cli.training.student import GUIDANCE_EMBEDDER
from sana_cli.trigflow import per_image

LEAK = 0.02  # slope outside of [-1, 1], where pixels are cut
LEVEL_MEAN, LEVEL_STD = 0.2, 1.6  # of scm's noise levels, as published
HUBER = 1e-2  # where the consistency loss turns from squares to magnitudes
CONSISTENCY_SCALE = 0.1  # of its loss, beside the critic's
DIFFERENCE = 2e-3  # of t: an error of 0.6 % at 1e-3 in float32
FREQUENCIES = 32  # of the learned log variance
LAST_BLOCK = 0.95  # of the blocks: the deepest that a head sees, where they are chosen here
CRITIC, WEIGHTING = "critic", "weighting"  # the modules that learn beside the student
W, STRIDE, AT_LARGEST = range(3)  # the uniform numbers
CRITIC_LEVEL, OWN_LEVEL = range(2)  # the normal ones
ON_DRAWN, ON_REAL, OWN_NOISE = range(3)  # the noises


@dataclass(frozen=True)
class _Point:
    """Samples on the path from data to noise, with the guidance that the student is given."""

    x: Tensor  # (B, C, H, W) at sigma
    sigma: Tensor  # (B,)
    guidance: Tensor  # (B,) scales
    batch: MicroBatch


class Distillation:
    """A student learns to draw in one to four steps what its guided teacher draws in many."""

    name = "few-step distillation"
    caption_dropout = 0.0
    draws = Draws(noises=3, uniforms=3, normals=2, null_caption=True)

    def __init__(
        self,
        config: DistillConfig,
        student: Architecture,
        teacher: SanaTransformer,
        prediction_type: PredictionType,
        precision: str,
        is_pixels: bool,
        seed: int,
    ) -> None:
        """Distil `teacher` into a model of architecture `student`, both of which predict alike.

        Args:
            config: how.
            student: its shape, for the critic.
            teacher: with its weights.
            prediction_type: what both predict.
            precision: of the arithmetic.
            is_pixels: samples are pixels, which are cut to [-1, 1] when they are drawn.
            seed: of the critic's initial weights.
        """
        self.config, self.precision, self.is_pixels = config, precision, is_pixels
        self.prediction_type: PredictionType = prediction_type
        self.guidance_embeds_scale = student.guidance_embeds_scale
        self.teacher = teacher.eval().requires_grad_(False)
        self.frozen = {"teacher": self.teacher}
        self.blocks = _blocks(config, teacher.config.num_layers)
        self.modules: dict[str, nn.Module] = {}
        if config.critic:
            self.modules[CRITIC] = Critic(len(self.blocks), student.inner_dim)
            draw_weights(self.modules[CRITIC], torch.Generator().manual_seed(seed))
        if config.method == "scm":
            self.modules[WEIGHTING] = LogVariance()
        self.average: nn.Module | None = None

    @cached_property
    def levels(self) -> Tensor:
        """The noise levels of the solver's steps below the largest."""
        levels = {sigma for count in self.config.steps for sigma in flow.solver_sigmas("scm", count)[:-1]}
        return torch.tensor(sorted(levels)[:-1] or [1.0])

    def use_average(self, average: nn.Module) -> None:
        """Take the averaged student, whose predictions are consistency's target."""
        self.average = average

    def rate(self, name: str) -> float:
        """The critic has a rate of its own, and the guidance embedder moves slowly."""
        if name.startswith(GUIDANCE_EMBEDDER):
            return self.config.guidance_rate
        return self.config.critic_rate if name.startswith(f"{CRITIC}.") else 1.0

    def noise_levels(self, quantiles: Tensor) -> Tensor:
        """A share at sigma 1, and the rest on the levels of the solver's steps; log-normal for scm, as published."""
        config = self.config
        if config.method == "scm":
            normal = torch.special.ndtri(quantiles).float()
            return trigflow.log_normal(normal, LEVEL_MEAN, LEVEL_STD)
        rest = (quantiles - config.largest) / max(1e-9, 1 - config.largest)
        index = (rest * len(self.levels)).long().clamp(0, len(self.levels) - 1)
        return torch.where(quantiles < config.largest, torch.ones(()), self.levels[index]).float()

    def sampling(self, sample: SampleConfig) -> SampleConfig:
        """As asked: a config of a student has the scm solver."""
        return sample

    def losses(self, transformer: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        """`loss` is consistency's; `adversarial` moves the student alone, and `critic` the critic alone."""
        assert batch.uniforms is not None
        assert batch.noises is not None
        low, high = self.config.guidance
        guidance = low + (high - low) * batch.uniforms[:, W]
        x = flow.interpolate(batch.x_0, batch.noise, batch.sigma)
        point = _Point(x, batch.sigma, guidance, batch)
        if self.config.method == "scm":
            terms = {LOSS: self._continuous(transformer, point)}
            drawn = None
        else:
            drawn = self._student(transformer, point)
            terms = {LOSS: self._consistency(drawn, point)}
        if CRITIC in self.modules and batch.step is not None:
            if drawn is None:
                drawn = self._student(transformer, self._own_point(batch, guidance))
            terms |= self._adversarial(drawn, batch)
        return terms

    # -- student and teacher

    def _drawn(self, x_0: Tensor) -> Tensor:
        """What is seen of a prediction: pixels are cut to [-1, 1], as they are when a picture is written.

        A critic of uncut pixels would learn that edge alone. A leak keeps a gradient outside.
        """
        if not self.is_pixels:
            return x_0
        cut = x_0.clamp(-1, 1)
        return cut + LEAK * (x_0 - cut)

    def _student(self, model: nn.Module, point: _Point, precision: str | None = None) -> Tensor:
        """The data that a student predicts."""
        batch = point.batch
        with autocast(point.x.device, precision or self.precision):
            output = model(
                point.x,
                batch.states.float(),
                point.sigma,
                guidance=point.guidance * self.guidance_embeds_scale,
                encoder_attention_mask=batch.mask,
                caption_index=batch.caption_index,
            ).float()
        return self._data(output, point.x, point.sigma)

    def _data(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return output if self.prediction_type == "sample" else x - per_image(sigma) * output

    def _timestep(self, sigma: Tensor) -> Tensor:
        return sigma * flow.TRAIN_TIMESTEPS * self.teacher.config.timestep_scale

    @torch.no_grad()
    def _guided(self, point: _Point) -> Tensor:
        """The data that the teacher predicts, guided by each image's scale inside the interval."""
        batch, count = point.batch, len(point.x)
        assert batch.null_index is not None
        index = torch.cat([batch.caption_index, batch.null_index.expand(count)])
        with autocast(point.x.device, self.precision):
            output = self.teacher(
                torch.cat([point.x, point.x]),
                batch.states.float(),
                self._timestep(point.sigma).repeat(2),
                encoder_attention_mask=batch.mask,
                caption_index=index,
            ).float()
        low, high = self.config.guidance_interval
        inside = (point.sigma >= low) & (point.sigma <= high)
        scale = torch.where(inside, point.guidance, torch.ones_like(point.guidance))
        guided = output[count:] + per_image(scale) * (output[:count] - output[count:])
        return self._data(guided, point.x, point.sigma)

    # -- consistency

    def _consistency(self, drawn: Tensor, point: _Point) -> Tensor:
        """The pseudo-Huber distance to a target one step of the teacher nearer to the data, over that step.

        A network that predicts data has no boundary: at sigma 0 nothing makes it the identity. So low
        levels learn the teacher's own prediction, and the target is averaged and cut to what can be drawn.
        """
        assert self.average is not None
        assert point.batch.uniforms is not None
        low, high = self.config.stride
        stride = low + (high - low) * point.batch.uniforms[:, STRIDE]
        with torch.no_grad():
            x_0, sigma = self._guided(point), point.sigma
            nearer = sigma * (1 - stride)
            x = x_0 + per_image(1 - stride) * (point.x - x_0)
            target = self._student(self.average, _Point(x, nearer, point.guidance, point.batch))
            if self.is_pixels:
                target = target.clamp(-1, 1)
            target = torch.where(per_image(sigma) < self.config.anchor, x_0, target)
        error = (self._drawn(drawn) - target).square().flatten(1).mean(1)
        return CONSISTENCY_SCALE * ((error + HUBER**2).sqrt() - HUBER) / stride

    def _continuous(self, model: nn.Module, point: _Point) -> Tensor:
        """sCM's loss in TrigFlow's variables, with a learned weight. In float32: a tangent is lost in bf16."""
        time = trigflow.time_of(point.sigma)
        x = per_image(time.cos() + time.sin()) * point.x

        def network(x: Tensor, time: Tensor) -> Tensor:
            given = x / per_image(time.cos() + time.sin())
            at = _Point(given, trigflow.sigma_of(time), point.guidance, point.batch)
            return trigflow.derivative(x, self._student(model, at, "fp32"), time)

        with exact_float32():
            output = network(x, time)
        with exact_float32(), torch.no_grad():
            velocity = trigflow.derivative(x, self._guided(point), time)
            if self.config.tangent == "jvp":
                with forward_derivatives():
                    tangent = trigflow.tangent_by_jvp(network, x, time, velocity)
            else:
                tangent = trigflow.tangent_by_difference(network, x, time, velocity, output, DIFFERENCE)
            step = point.batch.step
            warmup = 1.0 if step is None else _strength(step, self.config.tangent_warmup)
            g = trigflow.consistency_tangent(x, output, velocity, tangent, time, warmup)
        return trigflow.consistency_loss(output, g, time, self.modules[WEIGHTING](point.sigma))

    # -- the critic

    def _own_point(self, batch: MicroBatch, guidance: Tensor) -> _Point:
        """Real samples with another noise, some of them at sigma 1: what scm's adversarial part sees."""
        assert batch.uniforms is not None
        assert batch.noises is not None
        assert batch.normals is not None
        sigma = trigflow.log_normal(batch.normals[:, OWN_LEVEL], LEVEL_MEAN, LEVEL_STD)
        at_largest = batch.uniforms[:, AT_LARGEST] < self.config.largest
        sigma = torch.where(at_largest, torch.ones_like(sigma), sigma)
        return _Point(flow.interpolate(batch.x_0, batch.noises[:, OWN_NOISE], sigma), sigma, guidance, batch)

    def _adversarial(self, drawn: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """The adversarial loss of the student, and the critic's loss."""
        assert batch.step is not None
        critic, config, height = self.modules[CRITIC], self.config, self._rows(batch)
        fake = self._features(self._drawn(drawn), batch, ON_DRAWN)
        real_logits = critic(self._features(batch.x_0, batch, ON_REAL), height)
        fake_logits = critic([states.detach() for states in fake], height)
        fixed = {name: tensor.detach() for name, tensor in critic.state_dict().items()}
        adversarial = student_loss(
            config.critic_loss, real_logits.detach(), functional_call(critic, fixed, (fake, height))
        )
        weight = config.critic_weight * _strength(batch.step, config.critic_warmup)
        return {
            "adversarial": weight * adversarial,
            "critic": critic_loss(config.critic_loss, real_logits, fake_logits),
        }

    def _rows(self, batch: MicroBatch) -> int:
        """Rows of tokens of a sample."""
        return batch.x_0.shape[2] // self.teacher.config.patch_size

    def _features(self, x: Tensor, batch: MicroBatch, noise: int) -> list[Tensor]:
        """The teacher's features of noised samples (B, C, H, W) under their captions."""
        assert batch.noises is not None
        assert batch.normals is not None
        normal = batch.normals[:, CRITIC_LEVEL]
        sigma = flow.logit_normal(normal, self.config.critic_logit_mean, self.config.critic_logit_std)
        with autocast(x.device, self.precision):
            features = self.teacher.features(
                self.blocks,
                flow.interpolate(x, batch.noises[:, noise], sigma),
                batch.states.float(),
                self._timestep(sigma),
                batch.mask,
                batch.caption_index,
            )
        return [states.float() for states in features]


class LogVariance(nn.Module):
    """The learned log variance u(sigma) of sCM's weighting, 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.arange(1, FREQUENCIES + 1) * torch.pi, persistent=False)
        self.linear = nn.Linear(FREQUENCIES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, sigma: Tensor) -> Tensor:
        """(B,) at noise levels (B,)."""
        return self.linear(torch.cos(sigma[:, None] * self.frequencies)).squeeze(-1)


def _strength(step: int, warmup: int) -> float:
    """0 at first, growing evenly to 1 over `warmup` steps."""
    return 1.0 if step >= warmup else step / warmup


def _blocks(config: DistillConfig, layers: int) -> tuple[int, ...]:
    """The blocks whose output the heads see: as asked for, or four, evenly spread."""
    if config.critic_blocks is not None:
        return config.critic_blocks
    return tuple(sorted({round(part * LAST_BLOCK * (layers - 1) / 3) for part in range(4)}))


def critic_loss(kind: str, real: Tensor, drawn: Tensor) -> Tensor:
    """What a critic minimises, (B,), from logits (B, n) of real and drawn samples."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real) + F.relu(1 + drawn)).mean(1)
    return F.softplus(drawn.mean(1) - real.mean(1))


def student_loss(kind: str, real: Tensor, drawn: Tensor) -> Tensor:
    """What a student minimises, (B,)."""
    if kind == "hinge":
        return -drawn.mean(1)
    return F.softplus(real.mean(1) - drawn.mean(1))
