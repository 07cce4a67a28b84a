"""From caption states and seeds to images: the sampling loop around a transformer.

All commands sample with `sample_images`. This module does not know where captions were encoded
or where weights came from.

Shapes: B images, b of one batch, C H W of a sample, K distinct captions, L caption tokens,
D caption width.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sana_cli import flow
from sana_cli.choices import PredictionType
from sana_cli.config.keys import Architecture, SampleConfig
from sana_cli.errors import SanaError
from sana_cli.model import SanaTransformer
from sana_cli.runtime.device import autocast, free_memory, is_out_of_memory, release_memory
from sana_cli.text import pad_states

FALLBACK_IMAGES = 64  # in a batch, if the free memory is unknown
MOST_IMAGES = 256  # in a batch: more are no faster, and show progress later
SHARE_OF_FREE_MEMORY = 0.5  # for a batch


@dataclass(frozen=True)
class Recipe:
    """How images are sampled, the same for all of them."""

    settings: SampleConfig
    shape: tuple[int, int, int]  # channels, height and width of a sample
    prediction_type: PredictionType
    precision: str  # bf16 or fp32


@dataclass(frozen=True)
class SampledStep:
    """A solver step of one batch: progress, and the batch's images so far."""

    done: int  # solver steps done, over all batches
    total: int
    images: Tensor  # (b, C, H, W) of this batch, at its noise level
    x_0: Tensor  # (b, C, H, W), predicted from this step
    first: int  # index of the batch's first image
    sigma: float


class NoRoomError(SanaError):
    """Not even one image fits into memory. Commands add what to do."""


class Noise:
    """Standard normal noise for images with these seeds, (b, C, H, W) at each call.

    Each image has its own CPU generator, so its noise does not depend on device or batch.
    """

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device | str = "cpu"
    ) -> None:
        self.generators, self.shape = [torch.Generator().manual_seed(seed) for seed in seeds], shape
        self.device = device

    def __call__(self) -> Tensor:
        """The next noise of every image."""
        drawn = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(self.device)


def images_at_once(
    config: Architecture, shape: tuple[int, int, int], branches: int, device: torch.device
) -> int:
    """How many images of `shape` (C, H, W) fit into the free memory as one batch, at least 1.

    A pass without gradients holds the residual stream and a few tensors as wide. It also holds
    the Mix-FFN's hidden tensor three times: before its convolution, after it, and in the
    convolution's workspace.

    Args:
        config: of the transformer.
        shape: of a sample.
        branches: passes for one image: 2 with guidance, else 1.
        device: where it runs.
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
    captions: Sequence[Tensor],  # (L, D) each
    null_captions: Sequence[Tensor],  # (L, D) each
    seeds: Sequence[int],
    recipe: Recipe,
) -> Iterator[SampledStep]:
    """Sample one image for each caption, with its null caption and its seed.

    With guidance, the conditional and the null branch run as one batch, each with its own
    caption mask. A model with `guidance_embeds` gets the scale instead and has no null branch.
    Apart from floating-point rounding, an image depends only on its caption, seed and recipe.
    On out-of-memory the batch size is halved and the batch restarted, so some of its steps may
    be yielded twice.

    Raises:
        NoRoomError: there is no room for one image.
    """
    assert len(captions) == len(null_captions) == len(seeds), "one of each for every image"
    device, settings, shape = next(model.parameters()).device, recipe.settings, recipe.shape
    may_guide = not model.config.guidance_embeds and settings.guidance_scale != 1
    at_once = images_at_once(model.config, shape, 2 if may_guide else 1, device)
    sigmas = flow.solver_sigmas(settings.solver, settings.steps, settings.flow_shift)
    first = done = 0
    while first < len(captions):
        end = min(first + at_once, len(captions))
        given = captions[first:end], null_captions[first:end] if may_guide else [], seeds[first:end]
        total, fits = done + settings.steps * -(-(len(captions) - first) // at_once), True
        try:
            for number, step in enumerate(_sample_batch(model, *given, recipe, sigmas), 1):
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
        else:  # this batch again; outside the handler, whose traceback keeps the tensors alive
            at_once = -(-(end - first) // 2)
            release_memory(device)


def _sample_batch(
    model: SanaTransformer,
    captions: Sequence[Tensor],
    null_captions: Sequence[Tensor],
    seeds: Sequence[int],
    recipe: Recipe,
    sigmas: Sequence[float],
) -> Iterator[flow.SolverStep]:
    """Sample one batch. Without `null_captions` there is no guidance."""
    device, count, settings = next(model.parameters()).device, len(captions), recipe.settings
    scale, embeds = settings.guidance_scale, model.config.guidance_embeds
    wanted = [*captions, *null_captions]
    distinct = {id(state): state for state in wanted}  # images that share a caption share its tensor
    number_of = {key: number for number, key in enumerate(distinct)}
    states, mask = (t.to(device) for t in pad_states(list(distinct.values())))  # (K, L, D), (K, L)
    index = torch.tensor([number_of[id(state)] for state in wanted], device=device)
    with autocast(device, recipe.precision):
        both = model.captions(states.float(), mask, index)
    alone = both.rows(0, count)

    def velocity(x: Tensor, sigma: float) -> Tensor:
        guided = bool(null_captions) and flow.in_interval(sigma, settings.guidance_interval)
        time = flow.model_timestep(settings.solver, sigma, model.config.timestep_scale)
        embedded = (
            torch.tensor([scale * model.config.guidance_embeds_scale], device=device) if embeds else None
        )
        with autocast(device, recipe.precision):
            output = model(
                torch.cat([x, x]) if guided else x,
                both if guided else alone,
                torch.tensor([time], device=device),
                guidance=embedded,
            ).float()
        prediction = flow.guide(output[:count], output[count:], scale) if guided else output
        return flow.velocity_of(prediction, x, sigma, recipe.prediction_type)

    noise = Noise(seeds, recipe.shape, device)
    yield from flow.SOLVERS[settings.solver](velocity, noise(), sigmas, noise)


def final_images(drawn: Iterable[SampledStep]) -> Tensor:
    """The final images (B, C, H, W), in order, from the steps that `sample_images` yielded."""
    last = {step.first: step.images for step in drawn}
    return torch.cat([last[first].cpu() for first in sorted(last)])


class Frames:
    """The images (B, C, H, W) after each solver step, gathered over batches."""

    def __init__(self, steps: int, all_of_them: bool = True) -> None:
        """`steps` of the solver. Keep the images after each of them, or only after the last."""
        self.steps, self.all_of_them = steps, all_of_them
        self._by_step: dict[int, dict[int, Tensor]] = {}  # and by first image of the batch

    def add(self, step: SampledStep) -> None:
        """Take in a step that `sample_images` yielded."""
        number = (step.done - 1) % self.steps if self.all_of_them else 0
        self._by_step.setdefault(number, {})[step.first] = step.images.cpu()

    @property
    def sheets(self) -> list[Tensor]:
        """All images after each step, in order."""
        return [torch.cat([of[first] for first in sorted(of)]) for of in self._by_step.values()]

    @property
    def last(self) -> Tensor:
        """The final images."""
        return self.sheets[-1]


def to_pixels(images: Tensor) -> Tensor:
    """Turn images (B, C, H, W) in [-1, 1] into uint8 pixels on the CPU."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
