"""A checkpoint opened for sampling: what draws, how large, on what, and what a picture says of it.

Whatever can be refused before weights are loaded is refused here. It knows no prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_cli import __version__
from sana_cli.autoencoder import Autoencoder, AutoencoderInfo, read_info
from sana_cli.choices import Precision, Weights
from sana_cli.config.keys import SampleConfig
from sana_cli.errors import SanaError
from sana_cli.model import SanaTransformer
from sana_cli.runtime import hub
from sana_cli.runtime.device import has_native_bf16, resolve_device, resolve_precision
from sana_cli.sampling import sampler
from sana_cli.sampling.pipeline import Pipeline, check_few_step, given_settings, open_pipeline
from sana_cli.weights import checkpoint
from sana_cli.weights.applied import Applied, notes_on, read_applied

NO_ROOM = "draw smaller ones (`height`, `width`), or elsewhere (`device` cpu)"  # what to do then


@dataclass(frozen=True)
class Opened:
    """A checkpoint, what it needs around it, and where it will draw. No weights are loaded."""

    place: Path  # of the checkpoint
    pipeline: Pipeline
    applied: tuple[Applied, ...]  # adapters that it is given
    weights: Weights
    decoder: AutoencoderInfo | None  # None: samples are pixels
    shape: tuple[int, int, int]  # channels, height and width of a sample
    device: torch.device
    precision: str  # bf16 or fp32

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        factor = self.decoder.factor if self.decoder else 1
        return self.shape[1] * factor, self.shape[2] * factor

    @property
    def folder(self) -> Path:
        """The folder for its pictures: that of the run, or the one beside the checkpoint."""
        if checkpoint.is_shipped(self.place):
            return Path()
        folder = self._run or self.place.absolute().parent
        return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder

    @property
    def name(self) -> str:
        """What records and people call it."""
        if checkpoint.is_shipped(self.place):
            return f"sana {__version__}, {self.place.name}"
        name = self.place.absolute().name
        return f"{self._run.name}/{name}" if self._run else name

    @property
    def _run(self) -> Path | None:
        """The run that a step folder is in."""
        whole = self.place.absolute()
        return whole.parents[1] if whole.parent.name == "checkpoints" else None

    def settings(self, given: Mapping[str, Any], negative_prompt: str | None = None) -> SampleConfig:
        """The sampling settings on record, overridden by those of `given` that are not None.

        Raises:
            SanaError: names each setting that is wrong or has no meaning here.
        """
        pipeline, given = self.pipeline, {key: value for key, value in given.items() if value is not None}
        if pipeline.unknown_scheduler is not None and "solver" not in given:
            raise pipeline.unknown_scheduler
        settings = given_settings(pipeline, pipeline.sample.model_dump(), given)
        check_few_step(pipeline, given | {"negative_prompt": negative_prompt})
        if pipeline.model.guidance_embeds:
            settings = settings.model_copy(update={"flow_shift": 1.0})
        return settings

    def recipe(self, settings: SampleConfig) -> sampler.Recipe:
        """How its images are sampled."""
        return sampler.Recipe(settings, self.shape, self.pipeline.prediction_type, self.precision)

    def load_transformer(self) -> SanaTransformer:
        """The transformer with its adapters, on the device."""
        dtype = torch.float32 if self.precision == "fp32" else None
        changes = [one.changes for one in self.applied]
        model = checkpoint.load_transformer(self.place, self.weights, self.device, dtype, changes)
        return model.ready_to_draw()

    def load_decoder(self, info: AutoencoderInfo) -> Autoencoder:
        """The autoencoder, on the device: in bf16 where the transformer is and the device computes in it."""
        half = self.precision == "bf16" and has_native_bf16(self.device)
        return Autoencoder(info.source, self.device, torch.bfloat16 if half else torch.float32)

    def check_finite(self, samples: Tensor) -> None:
        """Refuse samples that overflowed.

        Raises:
            SanaError: a value is not finite.
        """
        if not samples.isfinite().all():
            raise SanaError(
                f"the images of {self.place} are not finite",
                "try `solver` euler, or a smaller `guidance_scale`",
            )

    def adapter_notes(self) -> list[str]:
        """Which adapters were trained on another model than this, or with other text."""

        def base_sha256() -> str:
            own = checkpoint.base_record(self.place)
            return own.sha256 if own else checkpoint.read_transformer(self.place)[0].sha256

        return notes_on(self.applied, base_sha256, self.pipeline.text)

    def facts(self, channels: int, negative_prompt: str | None = None) -> dict[str, Any]:
        """What a picture file says of how it was made, beside its settings and prompts.

        Args:
            channels: of an image.
            negative_prompt: of all images.
        """
        facts: dict[str, Any] = {
            "name": self.name,
            "weights": self.weights,
            "size": [channels, *self.size],
            "precision": self.precision,
        }
        if self.decoder is not None:
            facts["autoencoder"] = hub.model_name(self.decoder.source)
        if digest := checkpoint.weights_sha256(self.place, self.weights):
            facts["weights_sha256"] = digest
        if negative_prompt:
            facts["negative_prompt"] = negative_prompt
        if (base := checkpoint.base_record(self.place)) is not None:
            facts["base"] = {"name": base.name, "sha256": base.sha256}
        if self.applied:
            facts["adapters"] = [applied.record for applied in self.applied]
        return facts


def open_checkpoint(
    path: Path | None = None,
    *,
    adapter: Sequence[str] = (),
    weights: Weights = "ema",
    height: int | None = None,
    width: int | None = None,
    encoder: str | None = None,
    instruction: str | None = None,
    autoencoder: str | None = None,
    device: str = "auto",
    precision: Precision | None = None,
) -> Opened:
    """Open a checkpoint.

    Args:
        path: of the checkpoint; None: the newest whole one under runs/, else the shipped one.
        adapter: `FILE` or `FILE:SCALE`, put on it in this order.
        weights: averaged or raw, where there are both.
        height: of images in pixels; None: as trained. So is `width`.
        width: see `height`.
        encoder: the caption encoder, if the recorded name is not enough.
        instruction: before each prompt, in place of the family's.
        autoencoder: in place of the family's or the recorded one.
        device: what it draws on.
        precision: of the transformer; None: as trained, or as stored.

    Raises:
        SanaError: no checkpoint, or something around it is missing, unknown or does not fit.
    """
    place = checkpoint.find_checkpoint(path)
    pipeline = open_pipeline(place, encoder, instruction, autoencoder)
    if pipeline.adapters:
        checkpoint.find_base(place)  # whether it is there
    if adapter and path is None:
        raise SanaError(
            f"`adapter`: {adapter[0]} changes a model, and which one is not said",
            "give it with `checkpoint` BASE; a run of adapters is drawn from with `checkpoint` RUN alone",
            exit_code=2,
        )
    applied = read_applied(adapter, pipeline.model, weights)
    decoder = _decoder(pipeline)
    shape = _shape(pipeline, decoder.factor if decoder else 1, height, width)
    on = resolve_device(device)
    return Opened(
        place=place,
        pipeline=pipeline,
        applied=applied,
        weights=weights,
        decoder=decoder,
        shape=shape,
        device=on,
        precision=resolve_precision(precision or pipeline.precision, on),
    )


def _decoder(pipeline: Pipeline) -> AutoencoderInfo | None:
    """The autoencoder that decodes samples. None: samples are pixels."""
    if not pipeline.latents:
        return None
    channels = pipeline.sample_shape[0]
    if pipeline.autoencoder is None:
        raise SanaError(
            f"{pipeline.place} draws latents of {channels} channels, "
            "and which autoencoder they are of is not on record",
            "give it with `autoencoder` PATH (or a Hugging Face id)",
        )
    info = read_info(pipeline.autoencoder)
    if info.latent_channels != channels:
        raise SanaError(
            f"`autoencoder`: {info.source} has latents of {info.latent_channels} channels; "
            f"{pipeline.place} draws {channels}"
        )
    return info


def _shape(pipeline: Pipeline, factor: int, height: int | None, width: int | None) -> tuple[int, int, int]:
    """Channels, height and width of a sample, for images `factor` times as large."""
    channels, *trained = pipeline.sample_shape
    unit, sides = pipeline.model.patch_size * factor, []
    for name, asked, default in (("height", height, trained[0]), ("width", width, trained[1])):
        side = default * factor if asked is None else asked
        if side < 1 or side % unit:
            of = f"{unit}, the patch size times the autoencoder's factor of {factor}"
            of = f"the patch size {unit}" if factor == 1 else of
            raise SanaError(f"`{name}`: {side} is not a multiple of {of}", exit_code=2)
        sides.append(side // factor)
    return channels, sides[0], sides[1]
