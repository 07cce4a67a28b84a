"""From caption states and seeds to pictures: the sampling loop around a transformer, and PNG grids with their record.

`train` and `sample` draw with the same function. It knows neither where captions were encoded nor where weights came from.

Shapes: B images drawn, C H W of a sample, L caption tokens, D caption width.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sana_cli import flow
from sana_cli.config.keys import ModelConfig, SampleConfig
from sana_cli.errors import SanaError
from sana_cli.model import SanaTransformer
from sana_cli.runtime.device import free_memory, is_out_of_memory, release_memory
from sana_cli.text import pad_states

FALLBACK_IMAGES = 64  # at once, where the system does not say how much memory is free
MOST_IMAGES = 256  # at once: more are no faster, and say later how far they are
SHARE_OF_FREE_MEMORY = 0.5


@dataclass(frozen=True)
class SampledStep:
    """After each solver step of each batch: how far, and the images so far."""

    done: int  # solver steps done, over all batches
    total: int
    images: Tensor  # (b, C, H, W) of this batch, at its noise level
    x_0: Tensor  # (b, C, H, W), the data this step points at
    first: int  # index of the batch's first image
    sigma: float


class NoRoomError(SanaError):
    """Not even one image fits into memory. What to do about it depends on the command."""


class Noise:
    """Standard normal noise for images of `seeds`, (b, C, H, W) at each call.

    Every image has a CPU generator of its own, so that it gets the same numbers on every device and in any batch.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        self.generators, self.shape = [torch.Generator().manual_seed(seed) for seed in seeds], shape
        self.device = device

    def __call__(self) -> Tensor:
        """The next noise of every image."""
        drawn = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(self.device)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast, or none for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def images_at_once(config: ModelConfig, shape: tuple[int, int, int], branches: int, device: torch.device) -> int:
    """How many images of `shape` fit beside one another in the memory that is free, 1 at least.

    What lives at once in a pass without gradients is the residual stream, a few tensors as wide, and the Mix-FFN's hidden one
    three times: before its convolution, after it, and in the convolution's own memory.
    """
    free = free_memory(device)
    if free is None:
        return FALLBACK_IMAGES
    tokens = math.prod(shape[1:]) // config.patch_size**2
    width = 8 * config.inner_dim + 3 * 2 * int(config.mlp_ratio * config.inner_dim)
    each = 4 * (branches * tokens * width + 6 * math.prod(shape))
    return max(1, min(MOST_IMAGES, int(SHARE_OF_FREE_MEMORY * free) // each))


@torch.inference_mode()
def sample_images(
    model: SanaTransformer,
    captions: Sequence[Tensor],
    null_captions: Sequence[Tensor],
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    settings: SampleConfig,
    precision: str,
) -> Iterator[SampledStep]:
    """Draw one image for each of `captions`, states (tokens, D), with the null caption and the seed beside it.

    Where guidance is used, the conditional and the null branch run as one batch, each with its own caption mask. A model
    with `guidance_embeds` is told the scale instead and has no null branch. An image depends on its caption, seed and
    settings, and on nothing else in the call beyond floating-point rounding. Where memory runs out, half as many are drawn at
    once, from the batch on that had no room: a batch may so be yielded twice in part, the second time with fewer images.

    Raises:
        NoRoomError: there is no room for one image.
    """
    assert len(captions) == len(null_captions) == len(seeds), "one of each for every image"
    device = next(model.parameters()).device
    may_guide = not model.config.guidance_embeds and settings.guidance_scale != 1
    at_once = images_at_once(model.config, shape, 2 if may_guide else 1, device)
    sigmas = flow.solver_sigmas(settings.solver, settings.steps, settings.flow_shift)
    first = done = 0
    while first < len(captions):
        end = min(first + at_once, len(captions))
        given = captions[first:end], null_captions[first:end] if may_guide else [], seeds[first:end]
        total, fits = done + settings.steps * -(-(len(captions) - first) // at_once), True
        try:
            for number, step in enumerate(_sample_batch(model, *given, shape, settings, precision, sigmas), 1):
                yield SampledStep(done + number, total, step.x, step.x_0, first, step.sigma)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if at_once == 1:
                raise NoRoomError(
                    f"there is no room on {device} to draw a single image of {' x '.join(map(str, shape))}"
                ) from error
            fits = False
        if fits:
            first, done = end, done + settings.steps
        else:  # this batch again; not in the handler, whose traceback holds the tensors that were too many
            at_once = -(-(end - first) // 2)
            release_memory(device)


def _sample_batch(
    model: SanaTransformer,
    captions: Sequence[Tensor],
    null_captions: Sequence[Tensor],
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    settings: SampleConfig,
    precision: str,
    sigmas: Sequence[float],
) -> Iterator[flow.SolverStep]:
    """The images of one batch, after each solver step. Without `null_captions` there is no guidance."""
    device, count = next(model.parameters()).device, len(captions)
    scale, embeds = settings.guidance_scale, model.config.guidance_embeds
    wanted = [*captions, *null_captions]
    distinct = {id(state): state for state in wanted}  # images that share a caption share its tensor
    place = {key: number for number, key in enumerate(distinct)}
    states, mask = (t.to(device) for t in pad_states(list(distinct.values())))  # (K, L, D), (K, L)
    index = torch.tensor([place[id(state)] for state in wanted], device=device)
    with autocast(device, precision):
        both = model.captions(states.float(), mask, index)
    alone = both.rows(0, count)

    def velocity(x: Tensor, sigma: float) -> Tensor:
        guided = bool(null_captions) and flow.in_interval(sigma, settings.guidance_interval)
        time = flow.model_timestep(settings.solver, sigma, model.config.timestep_scale)
        told = torch.tensor([scale * model.config.guidance_embeds_scale], device=device) if embeds else None
        with autocast(device, precision):
            output = model(
                torch.cat([x, x]) if guided else x, both if guided else alone, torch.tensor([time], device=device), guidance=told
            ).float()
        prediction = flow.guide(output[:count], output[count:], scale) if guided else output
        return flow.velocity_of(prediction, x, sigma, model.config.prediction_type)

    noise = Noise(seeds, shape, device)
    yield from flow.SOLVERS[settings.solver](velocity, noise(), sigmas, noise)


def final_images(drawn: Iterable[SampledStep]) -> Tensor:
    """The images (B, C, H, W) of all batches, in order, from what `draw` yielded."""
    last = {step.first: step.images for step in drawn}
    return torch.cat([last[first].cpu() for first in sorted(last)])


def to_pixels(images: Tensor) -> Tensor:
    """[-1, 1] to uint8, (B, C, H, W), on the CPU."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
