"""What stands around a transformer when it is sampled: caption encoder, autoencoder, solver and their settings.

It is on record in our step folders and in diffusers pipelines. A transformer on its own is given what its family was
published with. This module keeps no weights but a null caption's, and knows neither prompts nor devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from sana_cli.choices import PredictionType
from sana_cli.config.file import load_run_config
from sana_cli.config.instructions import DIFFUSERS, NAMED, OFFICIAL
from sana_cli.config.keys import Architecture, SampleConfig, TextConfig
from sana_cli.errors import SanaError, first_line
from sana_cli.runtime import files
from sana_cli.runtime.records import CheckpointRecord
from sana_cli.text import UNGATED_GEMMA, text_config
from sana_cli.weights import checkpoint, configs
from sana_cli.weights.reader import read_weights
from sana_cli.weights.stored import StoredWeights

INDEX = "model_index.json"
PIPELINES = ("SanaPipeline", "SanaSprintPipeline")
GEMMA_DIM = 2304  # width of Gemma 2 2B's states
DC_AE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"


@dataclass(frozen=True)
class Pipeline:
    """A transformer and what it needs. Where the encoder or the autoencoder is None, it has to be given or is not needed."""

    place: Path  # what `checkpoint.find_checkpoint` found
    kind: str  # checkpoint (ours), pipeline (diffusers), or transformer (alone: the rest is its family's)
    origin: str  # of the weights: diffusers, official or lesson
    model: Architecture
    prediction_type: PredictionType
    text: TextConfig | None
    fingerprint: Mapping[str, Any] | None  # of the encoder, where it is on record
    null_caption: Tensor | None  # (tokens, D), where there is one on record
    one_word_captions: bool
    example_captions: tuple[str, ...]
    latents: bool  # samples are latents, not pixels
    autoencoder: str | None
    sample_shape: tuple[int, int, int]  # channels, height and width of a sample, as trained
    precision: str  # bf16, fp32 or auto
    sample: SampleConfig
    words: frozenset[str] | None = (
        None  # of all captions that it was trained on, in lower case; None: not on record
    )
    adapters: bool = False  # a step folder of adapters alone
    unknown_scheduler: SanaError | None = None  # why the pipeline's own solver cannot be had; another can

    @property
    def null_follows_prompt(self) -> bool:
        """Whether the null caption is cut to the length of each prompt: the lesson dropped captions under their own mask."""
        return self.origin == "lesson"


def open_pipeline(
    place: Path,
    encoder: str | None = None,
    instruction: str | None = None,
    autoencoder: str | None = None,
    weights: StoredWeights | None = None,
) -> Pipeline:
    """What stands around the transformer at `place`, with what the caller gives instead.

    Args:
        place: a step folder, a diffusers pipeline or transformer folder, or a file of weights.
        encoder: where the caption encoder lies; it must be the one on record, where one is.
        instruction: in place of the family's; "" for none.
        autoencoder: in place of the one on record or the family's.
        weights: of the transformer there, if the caller has read them already.

    Raises:
        SanaError: nothing is there, or it cannot be understood.
    """
    around = _around(place)
    pipeline = (
        _ours(place, around) if (around / checkpoint.RECORD).is_file() else _theirs(place, around, weights)
    )
    text = pipeline.text
    if encoder is not None:
        text = TextConfig(encoder=encoder) if text is None else text.model_copy(update={"encoder": encoder})
    if instruction is not None:
        if pipeline.fingerprint is not None:
            raise SanaError(
                "`instruction`: this checkpoint records how its captions were encoded", exit_code=2
            )
        text = (
            None
            if text is None
            else text.model_copy(update={"instruction": NAMED.get(instruction, instruction) or None})
        )
    if autoencoder is not None and not pipeline.latents:
        raise SanaError(f"`autoencoder`: {place} draws pixels, not latents", exit_code=2)
    return replace(pipeline, text=text, autoencoder=autoencoder or pipeline.autoencoder)


def given_settings(pipeline: Pipeline, base: Mapping[str, Any], given: Mapping[str, Any]) -> SampleConfig:
    """The sampling settings `base` of a pipeline, overridden by `given`.

    Raises:
        SanaError: names each setting that is wrong.
    """
    try:
        settings = SampleConfig.model_validate({**base, **given})
    except ValidationError as error:
        lines = [f"`{e['loc'][0]}`: {e['msg'][0].lower()}{e['msg'][1:]}" for e in error.errors()]
        raise SanaError(*lines, exit_code=2) from error
    low, high = settings.guidance_interval
    if low >= high:
        raise SanaError(f"`guidance_interval`: {low} must be below {high}", exit_code=2)
    if pipeline.model.guidance_embeds and settings.solver != "scm":
        raise SanaError(f"`solver`: a Sprint model is for scm, not {settings.solver}", exit_code=2)
    if settings.solver == "scm" and not pipeline.model.guidance_embeds:
        raise SanaError(
            "`solver`: scm is for Sprint models, which this is not; choose dpm++, euler or heun", exit_code=2
        )
    return settings


def check_few_step(pipeline: Pipeline, given: Mapping[str, Any]) -> None:
    """Refuse settings that have no meaning for a few-step model; those that are None are not given.

    Raises:
        SanaError: names the first one.
    """
    if not pipeline.model.guidance_embeds:
        return
    if given.get("flow_shift") not in (None, 1):
        raise SanaError(
            "`flow_shift`: the scm solver has noise levels of its own, which have no shift", exit_code=2
        )
    for name in ("negative_prompt", "guidance_interval"):
        if given.get(name) is not None:
            raise SanaError(
                f"`{name}`: this model has its guidance built in, and no null branch to steer by", exit_code=2
            )


def _around(place: Path) -> Path:
    """The folder whose records speak of `place`: a file or folder named inside a pipeline has that pipeline around it."""
    folder = (place if place.is_dir() else place.parent).absolute()
    if folder.name == "transformer" and any(
        (folder.parent / name).is_file() for name in (checkpoint.RECORD, INDEX)
    ):
        return folder.parent
    return folder


def _ours(place: Path, folder: Path) -> Pipeline:
    """From `sana.json`."""
    record = checkpoint.read_record(folder)
    try:
        return _from_record(place, folder, record)
    except (KeyError, TypeError, ValueError) as error:
        raise SanaError(
            f"{folder / checkpoint.RECORD} is damaged: {type(error).__name__} {first_line(error)}"
        ) from error


def _from_record(place: Path, folder: Path, record: CheckpointRecord) -> Pipeline:
    fingerprint = record.encoder.as_json()
    model, predicted = configs.read_model_config(folder / "transformer")
    return Pipeline(
        place=place,
        kind="checkpoint",
        origin="diffusers",
        model=model,
        prediction_type=predicted,
        text=text_config(fingerprint, _whereabouts(folder, "encoder", record.encoder.encoder)),
        fingerprint=fingerprint,
        null_caption=files.read_tensors(folder / checkpoint.NULL_CAPTION)["states"],
        one_word_captions=record.one_word_captions,
        example_captions=tuple(record.example_captions),
        latents=record.image.kind == "latents",
        autoencoder=record.autoencoder and _whereabouts(folder, "autoencoder", record.autoencoder),
        sample_shape=record.image.shape,
        precision=record.precision,
        sample=SampleConfig.model_validate(record.sample),
        words=None if record.words is None else frozenset(record.words),
        adapters=record.base is not None,
    )


def _whereabouts(folder: Path, what: str, name: str) -> str:
    """Where a recorded encoder or autoencoder lies: as the run's config beside the checkpoint says, or as it is called."""
    path = folder.resolve().parent.parent / "config.yaml"
    if name != "tiny" and path.is_file():
        try:
            config = load_run_config(path.parent)
        except SanaError:  # not a config of ours, so it says nothing
            return name
        there = Path((config.text.encoder if what == "encoder" else config.data.autoencoder) or "")
        if there.is_absolute() and there.name == name and there.is_dir():
            return str(there)
    return name


def _theirs(place: Path, folder: Path, weights: StoredWeights | None) -> Pipeline:
    """From the folders of a diffusers pipeline, or for a transformer alone, from its family."""
    weights = weights or read_weights(checkpoint.transformer_path(place))
    model, sample = weights.model, _family_sampling(weights)
    text: TextConfig | None = _family_text(weights)
    is_pipeline = (folder / INDEX).is_file()
    autoencoder = DC_AE if model.in_channels == configs.LATENT_CHANNELS else None
    unknown: SanaError | None = None
    if is_pipeline:
        kind = files.read_json(folder / INDEX).get("_class_name")
        if kind not in PIPELINES:
            raise SanaError(
                f"{folder} is a {kind}; the pipelines that can be sampled are {' and '.join(PIPELINES)}"
            )
        scheduler = folder / "scheduler" / "scheduler_config.json"
        if scheduler.is_file():
            try:
                sample = sample.model_copy(update=configs.solver_of(files.read_json(scheduler), scheduler))
            except SanaError as error:
                unknown = error
        if (folder / "text_encoder").is_dir():
            text = TextConfig(encoder=str(folder.resolve()), instruction=DIFFUSERS, lowercase=True)
        if (folder / "vae").is_dir():
            autoencoder = str(folder.resolve())
    side = model.sample_size
    return Pipeline(
        place=place,
        kind="pipeline" if is_pipeline else "transformer",
        origin=weights.origin,
        model=model,
        prediction_type=weights.prediction_type,
        text=text,
        fingerprint=None,
        null_caption=None if weights.null_caption is None else weights.null_caption.clone(),
        one_word_captions=weights.origin == "lesson",
        example_captions=("4", "two", "six")
        if weights.origin == "lesson"
        else ("a red cube on a blue sphere",),
        latents=autoencoder is not None or model.in_channels not in (1, 3),
        autoencoder=autoencoder,
        sample_shape=(model.in_channels, side, side),
        precision="fp32" if weights.dtypes == ("float32",) else "auto",
        sample=sample,
        unknown_scheduler=unknown,
    )


def _family_sampling(weights: StoredWeights) -> SampleConfig:
    """The settings that a family was published with."""
    if weights.origin == "lesson":  # which has no guidance
        return SampleConfig(steps=20, guidance_scale=1.0, flow_shift=1.0)
    if weights.model.guidance_embeds:  # diffusers `pipeline_sana_sprint.py`
        return SampleConfig(solver="scm", steps=2, guidance_scale=4.5, flow_shift=1.0)
    if weights.model.in_channels in (1, 3):  # pixels: nobody published any, so what suits ours
        return SampleConfig()
    shift = 6.0 if weights.model.sample_size >= 128 else 3.0  # 6 for the 4K model
    if weights.origin == "official" and (configs.family(weights.model), weights.model.sample_size) == (
        "Sana 0.6B",
        32,
    ):
        shift = 4.0  # NVlabs/Sana `Sana_600M_img1024.yaml`; its copy in diffusers' format says 3
    return SampleConfig(solver="dpm++", steps=20, guidance_scale=4.5, flow_shift=shift)


def _family_text(weights: StoredWeights) -> TextConfig | None:
    """The encoder and the instruction that a family was trained with; None if its captions are not Gemma 2's."""
    if weights.model.caption_channels != GEMMA_DIM:
        return None
    if weights.origin == "lesson":
        return TextConfig(encoder="google/gemma-2-2b-it", template="lesson")
    if weights.origin == "official":
        return TextConfig(encoder=UNGATED_GEMMA, instruction=OFFICIAL)
    return TextConfig(encoder=UNGATED_GEMMA, instruction=DIFFUSERS, lowercase=True)
