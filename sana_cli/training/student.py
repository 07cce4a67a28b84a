"""The student of a distillation: its architecture and the weights that it begins with, from a teacher's.

It begins as the teacher in all but two new embedders: a student's timestep is sigma itself, and its
guidance scale is an input. It knows no objective.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli.config.keys import Architecture
from sana_cli.flow import TRAIN_TIMESTEPS
from sana_cli.model import TIMESTEP_CHANNELS, SanaTransformer, TwoLayer, build, sinusoid

SINE = TIMESTEP_CHANNELS // 2  # the channel of `sinusoid` that is sin(timestep)
TIME_SLOPE, GUIDANCE_SLOPE = 16.0, 2.4  # of the knots; of guidance, times their range
RIDGE = 1.0  # keeps linear_2 small: with 1e-4 it reaches 18, and training destroys the model
TIME_EMBEDDER = "time_embed.timestep_embedder."
GUIDANCE_EMBEDDER = "time_embed.guidance_embedder."
_TEACHERS = "time_embed.emb.timestep_embedder."


def student_architecture(teacher: Architecture, guidance_scale: float) -> Architecture:
    """The teacher's, with the guidance scale as an input and sigma itself as the timestep.

    `guidance_scale` is `guidance_embeds_scale` of the config.
    """
    own = {"guidance_embeds": True, "guidance_embeds_scale": guidance_scale}
    return teacher.model_copy(update=own | {"timestep_scale": 1 / TRAIN_TIMESTEPS})


def new_student(
    teacher: Mapping[str, Tensor],
    architecture: Architecture,
    timestep_scale: float,
    guidance: tuple[float, float],
) -> tuple[SanaTransformer, float]:
    """A student with a copy of a teacher's weights, and how far off its time embedding is from the teacher's.

    Args:
        teacher: its tensors, by name.
        architecture: of the student.
        timestep_scale: of the teacher.
        guidance: the range of scales that the student is to learn.

    Returns:
        The student, float32, and the root mean square of the error over the spread of the target.
    """
    student = build(architecture)
    own = student.state_dict()
    for name, tensor in teacher.items():
        if name in own:
            own[name].copy_(tensor)
    embedder = TwoLayer(TIMESTEP_CHANNELS, architecture.inner_dim, nn.SiLU())
    theirs = {name: tensor for name, tensor in teacher.items() if name.startswith(_TEACHERS)}
    embedder.load_state_dict({name.removeprefix(_TEACHERS): t.float() for name, t in theirs.items()})
    assert student.time_embed.guidance_embedder is not None
    error = refit_time(embedder, student.time_embed.timestep_embedder, TRAIN_TIMESTEPS * timestep_scale)
    low, high = (architecture.guidance_embeds_scale * scale for scale in guidance)
    open_guidance(student.time_embed.guidance_embedder, low, high)
    return student, error


@torch.no_grad()
def refit_time(teacher: TwoLayer, student: TwoLayer, scale: float) -> float:
    """Make a time embedder of sigma what a teacher's is of `scale` sigma, in closed form.

    `linear_1` becomes a row of soft knots on sin sigma, and `linear_2` the ridge regression of the
    teacher's embedding on them. Returns the root mean square error over the target's spread.
    Through the teacher's own sinusoids of 1000 sigma, the derivative by time would be up to 1000
    times too large (SANA-Sprint, section 3.2, trains the whole teacher anew for that).
    """
    if scale == 1:
        student.load_state_dict(teacher.state_dict())
        return 0.0
    sigma = torch.linspace(0, 1, 2001)
    target = teacher(sinusoid(scale * sigma)).double()
    set_knots(student.linear_1, -0.05, 1.0, TIME_SLOPE)
    hidden = F.silu(student.linear_1(sinusoid(sigma))).double()
    known = torch.cat([hidden, torch.ones(len(sigma), 1, dtype=torch.float64)], dim=1)
    penalty = RIDGE * torch.eye(known.shape[1], dtype=torch.float64)
    found = torch.linalg.solve(known.T @ known + penalty, known.T @ target)
    student.linear_2.weight.copy_(found[:-1].T)
    student.linear_2.bias.copy_(found[-1])
    error = student(sinusoid(sigma)).double() - target
    return float((error.square().mean() / target.var(0).mean()).sqrt())


@torch.no_grad()
def open_guidance(embedder: TwoLayer, low: float, high: float) -> None:
    """Make a guidance embedder tell scales `low` to `high` (times `guidance_embeds_scale`) apart, adding nothing yet.

    As usually initialised it is dead: sinusoids of 0.1 to 0.4 hardly differ. With both layers at zero, as
    in diffusers' research script, only the last bias ever learns.
    """
    margin = (high - low) / 2
    set_knots(embedder.linear_1, low - margin / 3, high + margin, GUIDANCE_SLOPE / (high - low))
    embedder.linear_2.weight.zero_()
    embedder.linear_2.bias.zero_()


def set_knots(linear: nn.Linear, low: float, high: float, slope: float) -> None:
    """Make a layer on `sinusoid` of x the numbers +-slope (sin x - sin knot), knots even over [low, high]."""
    count = linear.out_features
    sign = torch.where(torch.arange(count) % 2 == 0, slope, -slope)
    linear.weight.zero_()
    linear.weight[:, SINE] = sign
    linear.bias.copy_(-sign * torch.sin(torch.linspace(low, min(high, math.pi / 2), count)))
