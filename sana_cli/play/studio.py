"""Models that stay on the device, and what they draw for one request of the page.

It knows no browser and no thread: a request comes as a record, answers are yielded.
"""

import time
import traceback
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from sana_cli.choices import Solver
from sana_cli.config.keys import SampleConfig
from sana_cli.errors import SanaError
from sana_cli.runtime.device import is_out_of_memory, release_memory
from sana_cli.sampling import pictures, sampler
from sana_cli.sampling.conditioning import load_pipeline_encoder, prompt_notes, prompt_states
from sana_cli.sampling.opened import Opened
from sana_cli.sampling.pictures import Cell
from sana_cli.weights import checkpoint

MOST_CHARACTERS = 1000  # of a prompt
MOST_WORDS = 8  # of a prompt, if each is a picture
MOST_STEPS = 100
MOST_GUIDANCE = 100.0
MOST_VARIATIONS = 12
FEW_STEPS = 4  # the slider of few-step models ends here
MANY_STEPS = 20  # and that of the others
MOST_KEPT = 32  # prompts whose states are kept: 3 MB each with Gemma 2
NO_ROOM = "start sana play with --height, --width or --device cpu"  # what to do then, on the page
MANY_TOKENS = 1024  # of a sample; from here on, a batch is no faster than one image after another


class PictureRequest(BaseModel):
    """What a tab asks for."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    tab: Annotated[str, Field(min_length=1, max_length=64)]  # which one asks
    prompt: Annotated[str, Field(max_length=MOST_CHARACTERS)]
    seed: Annotated[int, Field(ge=0, lt=2**53)]  # a browser's integers end there
    guidance_scale: Annotated[float, Field(ge=0, le=MOST_GUIDANCE)]
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    variations: Annotated[int, Field(ge=0, le=MOST_VARIATIONS)] = 0  # other seeds of the prompt
    trajectory: bool = False  # also the pictures after each solver step

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read a request from JSON.

        Raises:
            SanaError: names the first value that is missing or impossible.
        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))[:80]
            message = f"{first['msg'][0].lower()}{first['msg'][1:]}"
            raise SanaError(f"`{where}`: {message}" if where else message, exit_code=2) from error


@dataclass(frozen=True)
class Message:
    """A part of the answer: JSON facts, and a PNG or nothing."""

    kind: Literal["step", "picture", "variation", "frame", "error", "replaced", "done"]
    facts: Mapping[str, Any] = field(default_factory=dict)
    png: bytes = b""


class Studio:
    """Caption encoder, transformer and autoencoder of a checkpoint, loaded once."""

    def __init__(self, opened: Opened, solver: Solver | None = None) -> None:
        """Load the models.

        Args:
            opened: the checkpoint.
            solver: in place of the one on record.

        Raises:
            SanaError: a model is missing or does not fit.
        """
        self.opened, self._solver = opened, solver
        self.settings = opened.settings({"solver": solver})
        self._pipeline = opened.pipeline
        with _room(
            opened.device,
            f"there is no room on {opened.device} for encoder, transformer and autoencoder together",
            "draw with sana sample, which loads one at a time, or elsewhere (`device` cpu)",
        ):
            self._encoder = load_pipeline_encoder(opened.pipeline, opened.device, opened.precision)
            if self._pipeline.null_caption is None and not self._pipeline.model.guidance_embeds:
                _, (null,) = prompt_states(self._pipeline, self._encoder, [""], None)
                if not self._pipeline.null_follows_prompt:  # else each prompt has its own
                    self._pipeline = replace(self._pipeline, null_caption=null)
            self._model = opened.load_transformer()
            self._decoder = None if opened.decoder is None else opened.load_decoder(opened.decoder)
        self._facts = opened.facts(opened.shape[0] if self._decoder is None else 3)
        self._kept: OrderedDict[tuple[str, ...], tuple[list[Tensor], list[Tensor], tuple[str, ...]]]
        self._kept = OrderedDict()

    def about(self) -> dict[str, Any]:
        """What the page shows of the checkpoint, and limits and defaults of its controls."""
        opened, settings, pipeline = self.opened, self.settings, self._pipeline
        short = (caption for caption in pipeline.example_captions if len(caption) <= MOST_CHARACTERS)
        examples = [caption for caption in short if caption.strip()][:8]
        first = " ".join(examples[::3][:3] if pipeline.one_word_captions else examples[:1])
        most, low, high = MANY_STEPS, 1.0, float(max(8, round(1.5 * settings.guidance_scale)))
        if pipeline.model.guidance_embeds:
            most, (low, high) = FEW_STEPS, checkpoint.learned_guidance(opened.place) or (low, high)
        return {
            "name": opened.name,
            "device": str(opened.device),
            "precision": opened.precision,
            "height": opened.size[0],
            "width": opened.size[1],
            "solver": settings.solver,
            "one_word": pipeline.one_word_captions,
            "examples": examples if pipeline.one_word_captions else sorted(examples, key=len),
            "prompt": first,
            "seed": settings.seed,
            "guidance_scale": settings.guidance_scale,
            "least_guidance": min(low, settings.guidance_scale),
            "most_guidance": max(high, settings.guidance_scale),
            "steps": min(settings.steps, MOST_STEPS),
            "most_steps": min(max(most, settings.steps), MOST_STEPS),
            "most_characters": MOST_CHARACTERS,
            "trajectory": self._decoder is None,  # decoding each frame takes long
        }

    def draw(self, request: PictureRequest) -> Generator[Message, None, None]:
        """Draw: the picture first, then its variations, then its trajectory.

        Yields a message after each solver step, so that the caller can stop in between. Those of
        the picture have what it will be, if that needs no decoder. Variation i has the seeds that
        follow those of the one before.

        Raises:
            SanaError: nothing to draw, too many words, no room, images that are not finite.
        """
        start = time.perf_counter()
        given = request.model_dump(include={"seed", "guidance_scale", "steps"})
        settings = self.opened.settings(given | {"solver": self._solver})
        words = self._words(request.prompt)
        captions, nulls, notes = self._encode(words)
        cells = [Cell(word, settings.seed + number) for number, word in enumerate(words)]
        frames = sampler.Frames(settings.steps, all_of_them=request.trajectory)
        for step in self._sample(captions, nulls, cells, settings):
            frames.add(step)
            whole = self._decoder is None and len(step.x_0) == len(cells) and step.done < step.total
            preview = pictures.to_png(_side_by_side(sampler.to_pixels(step.x_0))) if whole else b""
            yield Message("step", {"done": step.done, "total": step.total}, preview)
        picture = self._picture(self._decode(frames.last), cells, settings)
        seconds = time.perf_counter() - start
        yield Message("picture", {"seed": settings.seed, "seconds": seconds, "notes": notes}, picture)
        yield from self._variations(request.variations, captions, nulls, cells, settings)
        if request.trajectory:
            yield from self._trajectory(frames, cells)

    def _words(self, prompt: str) -> tuple[str, ...]:
        """The captions that a prompt stands for."""
        rows = pictures.prompt_rows([prompt] if prompt.strip() else [], self._pipeline.one_word_captions)
        if not rows:
            raise SanaError("nothing to draw: the prompt is empty")
        if len(rows[0]) > MOST_WORDS:
            raise SanaError(f"{len(rows[0])} words; each is a picture, and there is room for {MOST_WORDS}")
        return rows[0]

    def _encode(self, words: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor], tuple[str, ...]]:
        """Caption states, null states and notes, of the last prompts from memory."""
        if words not in self._kept:
            device = self.opened.device
            with _room(device, f"there is no room on {device} to encode the prompt", NO_ROOM):
                states = prompt_states(self._pipeline, self._encoder, list(words), None)
            self._kept[words] = *states, prompt_notes(self._pipeline, self._encoder, list(words), None)
        self._kept.move_to_end(words)
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return self._kept[words]

    def _sample(
        self, captions: list[Tensor], nulls: list[Tensor], cells: Sequence[Cell], settings: SampleConfig
    ) -> Iterator[sampler.SampledStep]:
        seeds = [cell.seed for cell in cells]
        try:
            yield from sampler.sample_images(
                self._model, captions, nulls, seeds, self.opened.recipe(settings)
            )
        except sampler.NoRoomError as error:
            raise SanaError(str(error), NO_ROOM) from error

    def _decode(self, samples: Tensor) -> Tensor:
        """Pixels (B, C, H, W), uint8, of samples."""
        if not samples.isfinite().all():
            raise SanaError(
                f"the images of {self.opened.name} are not finite",
                "try less guidance, or start sana play with --precision fp32",
            )
        if self._decoder is None:
            return sampler.to_pixels(samples)
        device = self.opened.device
        with _room(device, f"there is no room on {device} to decode the picture", NO_ROOM):
            return sampler.to_pixels(torch.cat(list(self._decoder.decode(samples))))

    def _picture(self, pixels: Tensor, cells: Sequence[Cell], settings: SampleConfig) -> bytes:
        """A PNG of images side by side, with their record."""
        record = pictures.grid_record([cells], settings, **self._facts)
        return pictures.to_png(_side_by_side(pixels), record)

    def _variations(
        self,
        count: int,
        captions: list[Tensor],
        nulls: list[Tensor],
        cells: Sequence[Cell],
        settings: SampleConfig,
    ) -> Iterator[Message]:
        """The same prompt with the next seeds."""
        tokens = self.opened.shape[1] * self.opened.shape[2] // self._pipeline.model.patch_size**2
        at_once = 1 if tokens >= MANY_TOKENS else max(count, 1)
        rows = [
            [replace(cell, seed=cell.seed + number * len(cells)) for cell in cells]
            for number in range(1, count + 1)
        ]
        for first in range(0, count, at_once):
            some = rows[first : first + at_once]
            flat = [cell for row in some for cell in row]
            last = sampler.Frames(settings.steps, all_of_them=False)
            for step in self._sample(captions * len(some), nulls * len(some), flat, settings):
                last.add(step)
                yield Message("step")
            for row, pixels in zip(some, self._decode(last.last).split(len(cells)), strict=True):
                yield Message("variation", {"seed": row[0].seed}, self._picture(pixels, row, settings))

    def _trajectory(self, frames: sampler.Frames, cells: Sequence[Cell]) -> Iterator[Message]:
        """The picture from noise to its last step."""
        noise = sampler.Noise([cell.seed for cell in cells], self.opened.shape)()
        for number, samples in enumerate([noise, *frames.sheets]):
            png = pictures.to_png(_side_by_side(self._decode(samples)))
            yield Message("frame", {"number": number}, png)


@contextmanager
def _room(device: torch.device, *lines: str) -> Iterator[None]:
    """Turn out of memory in the block into a message of these lines, and release what it held.

    Raises:
        SanaError: there was no room.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # which keep the tensors alive
        release_memory(device)
        raise SanaError(*lines) from None


def _side_by_side(pixels: Tensor) -> Image.Image:
    """One picture of images (B, C, H, W)."""
    return pictures.to_image(torch.cat(list(pixels), dim=-1))
