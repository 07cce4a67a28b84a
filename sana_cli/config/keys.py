"""Every knob, typed, with its default; and YAML files read into them with all problems reported at once.

The defaults are for small images on a CPU, and `configs/quickstart.yaml` leaves most as they are. A file holds what differs.
It knows nothing of torch, so that `sana --help` and a wrong config answer at once.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sana_cli.choices import Precision, Solver
from sana_cli.config.document import Dumper, yaml_value

MAX_WIDTH = 65536
WARMUP_STEPS, WARMUP_SHARE = 50, 0.1  # the default warm-up: so many steps, and at most this share of a short run
PATCH_SIZES = (8, 4, 2, 1)  # tried in this order where only the size of images is given
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_path(value: Any) -> Any:
    if isinstance(value, Path) or (isinstance(value, str) and value):
        return Path(at_home(os.fspath(value)))
    raise ValueError("must be a path")


def at_home(value: Any) -> Any:
    """`~` at the beginning of a path is the home folder: no shell has seen to it in YAML, or behind the = of --set."""
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111 (it may be a model's id)


def _is_size(value: Any) -> Any:
    sides = value if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError("must be a number of pixels, or [height, width]")
    return _as_tuple(value)


def _is_precision(value: Any) -> Any:
    if value in ("fp16", "float16", "half"):
        raise ValueError(
            "cannot be fp16: it overflows in the sums of linear attention, and in Gemma 2, and ends in NaN; use bf16, fp32 or auto"
        )
    return value


def _is_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise ValueError("must be auto, cpu, mps, cuda or cuda:N")
    return value


PathField = Annotated[Path, BeforeValidator(_as_path)]
IdOrPath = Annotated[str, Field(min_length=1), BeforeValidator(at_home)]
Interval = Annotated[tuple[Fraction, Fraction], BeforeValidator(_as_tuple)]
Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(_as_tuple)]
Prompts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class Section(BaseModel):
    """Frozen and strict: an unknown key, a wrong type or an infinite number is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where images and captions come from, and where the pre-embedded dataset lies."""

    source: Literal["mnist", "folder", "idx", "webdataset", "datasets"] = Field(
        "mnist", description="where images and captions come from; mnist is built in"
    )
    path: PathField | None = Field(
        None, description="where the source reads: a folder, a .tar, or a Hugging Face id; null: the files that come with sana"
    )
    split: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")] = Field(
        "train", description="the part of the source to embed: a sub-folder, or the shards that are named after it"
    )
    held_out_split: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")] | None = Field(
        "auto",
        description="the part that embed puts into DIR-SPLIT, whose loss train watches; auto: test for mnist, else none; null: none",
    )
    caption_field: Annotated[str, Field(min_length=1)] = Field(
        "text", description="the field or column of captions: a string, or a list of them"
    )
    image_field: Annotated[str, Field(min_length=1)] = Field(
        "image", description="the column of images, in Hugging Face datasets"
    )
    caption_template: str = Field(
        "{}", description="the caption of a class, where {} is its name (class-named folders, idx, class columns of datasets)"
    )
    class_names: Prompts | None = Field(
        None, description="what labels 0, 1, ... are called (idx); null: EMNIST's mapping file, else their numbers"
    )
    fit: Literal["crop", "pad"] = Field("crop", description="crop: cut the centre out; pad: the whole image, on white")
    workers: NonNegativeInt | None = Field(None, description="processes that decode images; null: as many as cores, at most 8")
    dir: PathField = Field(Path("data/quickstart"), description="the dataset directory that embed writes and train reads")
    image_size: Annotated[int | tuple[int, int], BeforeValidator(_is_size)] = Field(
        32, description="pixels: one number, or [height, width]"
    )
    autoencoder: IdOrPath | None = Field(
        None, description="a DC-AE, by id or local path, whose latents are trained on; null: pixels (needs the latent extra)"
    )

    latent_factor: PositiveInt = Field(32, description="how many times smaller the autoencoder's latents are than images")

    @property
    def held_out(self) -> str | None:
        """The held-out split, if there is to be one."""
        if self.held_out_split != "auto":
            return self.held_out_split
        return "test" if self.source == "mnist" and self.split == "train" else None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def factor(self) -> int:
        """Pixels to a side of a sample's element: 1, or the autoencoder's factor."""
        return 1 if self.autoencoder is None else self.latent_factor

    @property
    def sample_sides(self) -> tuple[int, int]:
        """Height and width of what the transformer sees."""
        height, width = self.size
        return height // self.factor, width // self.factor


class TextConfig(Section):
    """The caption encoder, which embed and sample share."""

    encoder: IdOrPath = Field(
        "tiny", description="tiny (built in, offline), or a Hugging Face id or local path: Gemma 2, T5, BERT, ModernBERT, ..."
    )
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    dtype: Annotated[Precision, BeforeValidator(_is_precision)] = Field("auto", description="auto: fp32 on a CPU, bf16 elsewhere")
    max_length: Annotated[int, Field(ge=2)] = Field(300, description="tokens kept of a caption")
    instruction: str | None = Field(
        None, description="put before each caption and cut off its states (the paper's complex human instruction)"
    )
    template: Literal["none", "chat", "lesson"] = Field(
        "none",
        description="chat: the tokenizer's chat template around each caption; lesson: the same, begun twice, as the lesson did",
    )
    lowercase: bool = Field(False, description="lower-case and strip captions first, as diffusers' SanaPipeline does")


class ModelConfig(Section):
    """The transformer, in the names of diffusers' `SanaTransformer2DModel`."""

    in_channels: Annotated[int, Field(gt=0, le=65536)] = Field(
        1, description="channels of a sample; images are converted to this many"
    )
    patch_size: Annotated[int, Field(gt=0, le=1024)] = Field(8, description="side of the square patch that becomes one token")
    sample_size: Annotated[int, Field(gt=0, le=2**20)] | None = Field(None, description="side of a sample; null: the dataset's")
    num_layers: Annotated[int, Field(gt=0, le=1000)] = Field(4, description="transformer blocks")
    num_attention_heads: Annotated[int, Field(gt=0, le=65536)] = Field(4, description="heads of the linear self-attention")
    attention_head_dim: Annotated[int, Field(gt=0, le=65536)] = Field(32, description="width of a self-attention head")
    num_cross_attention_heads: Annotated[int, Field(gt=0, le=65536)] = Field(
        2, description="heads of the cross-attention over captions"
    )
    cross_attention_head_dim: Annotated[int, Field(gt=0, le=65536)] = Field(64, description="width of a cross-attention head")
    caption_channels: Annotated[int, Field(gt=0, le=2**20)] | None = Field(
        None, description="width of a caption state; null: the dataset's"
    )
    mlp_ratio: Annotated[float, Field(gt=0, le=1000)] = Field(2.5, description="hidden width of the Mix-FFN over the inner width")
    attention_bias: bool = Field(False, description="biases in self-attention's query, key and value")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout after each attention")
    qk_norm: Literal["rms_norm_across_heads"] | None = Field(None, description="norm of queries and keys (SANA-1.5 and Sprint)")
    guidance_embeds: bool = Field(False, description="the guidance scale is an input of the model (Sprint)")
    guidance_embeds_scale: Annotated[float, Field(gt=0)] = Field(0.1, description="the model is given guidance_scale * this")
    timestep_scale: Annotated[float, Field(gt=0)] = Field(1.0, description="the model is given 1000 * sigma * this")
    prediction_type: Literal["flow_prediction", "sample"] = Field(
        "flow_prediction",
        description="what the transformer's output is; flow_prediction: the velocity, as published; sample: the data, which small "
        "models of pixels learn sooner (JiT, arXiv 2511.13720)",
    )
    interpolation_scale: Annotated[float, Field(gt=0)] | None = Field(
        None, description="fixed sine-cosine positions, this much apart from one another (2K models 1, 4K models 2); null: none"
    )

    @property
    def inner_dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    def problems(self) -> Iterator[str]:
        """What no single field shows: each line begins with the field to change."""
        if self.inner_dim > MAX_WIDTH:
            yield f"num_attention_heads: a width of {self.inner_dim:,}; the most is {MAX_WIDTH:,}"
        if int(self.mlp_ratio * self.inner_dim) < 1:
            yield f"mlp_ratio: {self.mlp_ratio:g} of the width {self.inner_dim} leaves the Mix-FFN nothing"
        if self.interpolation_scale is not None:
            if self.inner_dim % 4:
                yield f"interpolation_scale: positions need an inner width that 4 divides, not {self.inner_dim}"
            if self.sample_size is not None and self.sample_size < self.patch_size:
                yield f"interpolation_scale: positions need a sample_size of a patch at least, {self.patch_size}"


class TrainConfig(Section):
    """The optimisation."""

    steps: PositiveInt = Field(3000, description="optimizer steps")
    batch_size: PositiveInt = Field(32, description="images of a micro-batch of one process")
    accumulate: PositiveInt = Field(
        1, description="micro-batches of a step in each process, whose gradients are averaged over their images"
    )
    precision: Annotated[Precision, BeforeValidator(_is_precision)] = Field(
        "auto", description="auto: bf16 where the device has it natively, else fp32; weights stay fp32"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: Muon for the matrices inside blocks, whose updates it makes the size of AdamW's; AdamW for the rest",
    )
    lr: Annotated[float, Field(gt=0)] = Field(6e-3, description="peak learning rate")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "cosine", description="what follows the warm-up; cosine and linear end at zero"
    )
    warmup_steps: NonNegativeInt | None = Field(
        None, description="steps of linear warm-up; null: 50, or a tenth of the steps of a shorter run"
    )
    betas: Betas = Field((0.9, 0.99), description="AdamW's")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="Muon's")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.05, description="on matrices and convolutions only, decoupled")
    grad_clip: Annotated[float, Field(gt=0)] | None = Field(1.0, description="largest gradient norm of a step; null: no limit")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.998, description="of the weights to sample with; warms up as (1 + step) / (10 + step)"
    )
    caption_dropout: Fraction = Field(0.1, description="share of captions replaced by the null caption, which guidance needs")
    sigma_density: Literal["logit_normal", "uniform"] = Field("logit_normal", description="how noise levels are drawn")
    logit_mean: float = Field(0.0, description="of the logit-normal density")
    logit_std: Annotated[float, Field(gt=0)] = Field(1.0, description="of the logit-normal density")
    flow_shift: Annotated[float, Field(gt=0)] = Field(
        2.3, description="s in sigma -> s sigma / (1 + (s - 1) sigma): more of the higher noise levels; the paper's is 3 or more"
    )
    sigma_floor: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5,
        description="for prediction_type sample, whose error over sigma is the velocity's: below this sigma it is divided by this "
        "instead, so that low noise levels do not outweigh the others",
    )
    init: Literal["official", "fan_in"] = Field(
        "fan_in",
        description="initial weights; official: those of NVlabs/Sana, made for wide models; fan_in: the same, but embedders by their "
        "own width and captions at full strength, from which narrow models learn sooner",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="of the initial weights, the order of the data and every draw"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="under torchrun; ddp: the whole model in each process; fsdp: a shard of every parameter in each"
    )
    activation_checkpointing: bool = Field(
        False, description="keep only what goes into each block, and compute the rest again: less memory, a third more time"
    )
    compile: bool = Field(False, description="torch.compile each block: minutes to start, faster steps on a GPU")
    log_every: PositiveInt = Field(10, description="steps between lines of metrics.jsonl")
    save_every: PositiveInt = Field(500, description="steps between checkpoints; there is always one at the end")
    keep: PositiveInt = Field(2, description="checkpoints kept, the newest")
    sample_every: PositiveInt = Field(500, description="steps between sample grids; there is always one at step 0 and at the end")
    held_out_every: PositiveInt = Field(
        500, description="steps between held-out losses; there is always one at the end (where data.held_out_split is there)"
    )
    held_out_images: PositiveInt = Field(512, description="images of a held-out loss, always the same, with the same noise")
    tensorboard: bool = Field(False, description="also write TensorBoard's event files (needs the tensorboard extra)")
    init_from: PathField | None = Field(
        None, description="weights to start from: a run, a checkpoint, a diffusers folder or file, an official or lesson file"
    )

    @property
    def warmup(self) -> int:
        """Steps of warm-up: as asked for, or what suits the length of the run."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(WARMUP_STEPS, int(WARMUP_SHARE * self.steps))


class SampleConfig(Section):
    """How checkpoints of this run are sampled, unless `sana sample` is told otherwise."""

    steps: PositiveInt = Field(8, description="solver steps")
    guidance_scale: Annotated[float, Field(ge=0)] = Field(
        2.5, description="1 is none; above 1 follows the prompt more, with less variety"
    )
    guidance_interval: Interval = Field((0.0, 1.0), description="the range of sigma in which guidance is used")
    solver: Solver = Field(
        "dpm++", description="dpm++: DPM-Solver++ 2M; euler; heun; scm: the consistency sampler of Sprint models"
    )
    flow_shift: Annotated[float, Field(gt=0, le=1000)] = Field(
        2.3, description="as train.flow_shift, for the solver's steps; euler and heun apply it twice, as diffusers' do"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="image i of a grid has seed + i")
    prompts: Prompts | None = Field(None, description="of the grids drawn while training; null: captions of the dataset")

    @property
    def in_words(self) -> str:
        """Solver, steps and guidance, as commands tell them."""
        low, high = self.guidance_interval
        where = "" if (low, high) == (0, 1) else f" at {low:g} to {high:g}"
        return f"{self.solver}, {self.steps} steps, guidance {self.guidance_scale:g}{where}"


class RunConfig(Section):
    """Where a run lies and on what it runs."""

    dir: PathField = Field(Path("runs/quickstart"), description="the run directory that train writes")
    device: Annotated[str, AfterValidator(_is_device)] = Field("auto", description="auto, cpu, mps, cuda or cuda:N")


class Config(Section):
    """A whole experiment."""

    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="before")
    @classmethod
    def _patch_that_fits(cls, values: Any) -> Any:
        """Where the size of images is given and the patch is not, take the largest of `PATCH_SIZES` that divides it."""
        data, model = (values.get(name) for name in ("data", "model")) if isinstance(values, dict) else (None, None)
        if not isinstance(data, dict) or "image_size" not in data or not isinstance(model or {}, dict):
            return values
        if (model or {}).get("patch_size") is not None:
            return values
        try:
            sides = DataConfig.model_validate(data).sample_sides
        except ValidationError:  # which is told of in its own place
            return values
        fits = next(size for size in PATCH_SIZES if not any(side % size for side in sides))
        return {**values, "model": {**(model or {}), "patch_size": fits}}

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        problems = []
        if self.data.source == "mnist" and self.data.split not in ("train", "test"):
            problems.append(f"data.split: mnist has train and test, not {self.data.split!r}")
        if self.data.source == "mnist" and self.data.held_out not in ("train", "test", None):
            problems.append(f"data.held_out_split: mnist has train and test, not {self.data.held_out!r}")
        if self.data.held_out == self.data.split:
            problems.append(f"data.held_out_split: {self.data.split} is what is trained on")
        model, (height, width), factor = self.model, self.data.size, self.data.factor
        if height % factor or width % factor:
            problems.append(f"data.latent_factor: {factor} does not divide data.image_size {height}x{width}")
        elif height // factor % model.patch_size or width // factor % model.patch_size:
            of = "" if factor == 1 else f" / {factor}"
            problems.append(f"model.patch_size: {model.patch_size} does not divide data.image_size {height}x{width}{of}")
        problems += [f"model.{problem}" for problem in model.problems()]
        if self.text.instruction is not None and self.text.template != "none":
            problems.append("text.instruction: and text.template exclude each other; keep one")
        if model.guidance_embeds:
            problems.append("model.guidance_embeds: is for distilled models that are sampled, and cannot be trained here")
        if self.sample.solver == "scm" and not model.guidance_embeds:
            problems.append("sample.solver: scm is for Sprint models, which have model.guidance_embeds")
        if self.train.warmup >= self.train.steps:
            problems.append(f"train.warmup_steps: {self.train.warmup} leaves none of train.steps {self.train.steps}")
        if os.path.realpath(self.run.dir) == os.path.realpath(self.data.dir):
            problems.append(f"run.dir: {self.run.dir} is data.dir as well; a run needs a directory of its own")
        low, high = self.sample.guidance_interval
        if low >= high:
            problems.append(f"sample.guidance_interval: {low} must be below {high}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def to_yaml(self) -> str:
        """The whole config, resolved, as YAML that loads back to itself."""
        return yaml.dump(self.to_dict(), Dumper=Dumper, sort_keys=False, allow_unicode=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries."""
        return self.model_dump(mode="json")

    def to_commented_yaml(self) -> str:
        """Every key with what it means, as YAML that loads back to this config: a file to start one's own from."""
        lines = []
        for name, section_field in Config.model_fields.items():
            section = getattr(self, name)
            lines += ["", f"{name}:  # {(section_field.annotation.__doc__ or '').splitlines()[0].rstrip('.')}"]
            for key, key_field in type(section).model_fields.items():
                value = section.model_dump(mode="json")[key]
                lines.append(f"  {key}: {yaml_value(value)}  # {key_field.description}")
        return "\n".join(lines[1:]) + "\n"


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) for each value that differs between two nested dictionaries."""
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after
