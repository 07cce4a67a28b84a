"""Every key of a config: its type, default and meaning, and whether a resumed run may change it.

The defaults are for small images on a CPU; `configs/quickstart.yaml` leaves most as they are. `file.py`
reads files into these classes. It imports no torch, so that a wrong config is refused at once.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from sana_cli import buckets
from sana_cli.choices import Precision, PredictionType, Solver
from sana_cli.config.document import Dumper, yaml_value
from sana_cli.config.instructions import NAMED

BUILT_IN = ("mnist", "critters")  # sources that read no path; both have the splits train and test
MAX_WIDTH = 65536
LARGEST_BUCKET = 32768
WARMUP_STEPS, WARMUP_SHARE = 50, 0.1  # the default warm-up, and its largest share of a short run
PATCH_SIZES = (8, 4, 2, 1)  # tried in this order where a config gives the image size and no patch

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_path(value: Any) -> Any:
    if isinstance(value, Path) or (isinstance(value, str) and value):
        return Path(at_home(os.fspath(value)))
    raise ValueError("must be a path")


def at_home(value: Any) -> Any:
    """Expand `~` at the start of a path: no shell does it in YAML, or after the = of --set."""
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111 (it may be a model's id)


def _is_size(value: Any) -> Any:
    sides = value if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError("must be a number of pixels, or [height, width]")
    return _as_tuple(value)


def _have_tables(sizes: tuple[int, ...]) -> tuple[int, ...]:
    for size in sizes:
        buckets.unit(size)
        if size > LARGEST_BUCKET:
            raise ValueError(f"{size} is too large; the most is {LARGEST_BUCKET}")
    return tuple(sorted(set(sizes)))


def _is_precision(value: Any) -> Any:
    if value in ("fp16", "float16", "half"):
        raise ValueError(
            "cannot be fp16: it overflows in the sums of linear attention, and in Gemma 2, and ends in NaN; "
            "use bf16, fp32 or auto"
        )
    return value


def _is_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise ValueError("must be auto, cpu, mps, cuda or cuda:N")
    return value


def _distinct_paths(value: Any) -> Any:
    if isinstance(value, dict) and len({str(Path(str(key))) for key in value}) < len(value):
        raise ValueError("names a folder twice")
    return value


def _distinct(numbers: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(numbers)) < len(numbers):
        raise ValueError("names one twice")
    return tuple(sorted(numbers))


def _named_instruction(value: Any) -> Any:
    return NAMED.get(value, value) if isinstance(value, str) else value


PathField = Annotated[Path, BeforeValidator(_as_path)]
IdOrPath = Annotated[str, Field(min_length=1), BeforeValidator(at_home)]
Interval = Annotated[tuple[Fraction, Fraction], BeforeValidator(_as_tuple)]
Betas = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
    BeforeValidator(_as_tuple),
]
Prompts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Sizes = Annotated[
    tuple[PositiveInt, ...], Field(min_length=1), BeforeValidator(_as_tuple), AfterValidator(_have_tables)
]
Times = Annotated[float, Field(ge=1e-3)]  # that an image is seen in an epoch


class Section(BaseModel):
    """Frozen and strict: an unknown key, a wrong type or an infinite number is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def fixed(default: Any, description: str) -> Any:
    """A key that a resumed run keeps: with another value its steps would be another run's."""
    return Field(default, description=description, json_schema_extra={"on_resume": "fixed"})


def free(default: Any, description: str) -> Any:
    """A key that may change when a run is resumed.

    Keys of `data` and `text` are free: the dataset is compared by its hash instead. So is the cut
    of a step into micro-batches: a resumed run keeps the images of its steps, however they are cut.
    """
    return Field(default, description=description, json_schema_extra={"on_resume": "may change"})


class DataConfig(Section):
    """Where images and captions come from, and where the pre-embedded dataset lies."""

    source: Literal["mnist", "critters", "folder", "idx", "webdataset", "datasets"] = free(
        "mnist",
        "where images and captions come from; mnist is built in, critters are drawn (needs the critters extra)",
    )
    path: PathField | None = free(
        None,
        "where the source reads: a folder, a .tar, or a Hugging Face id; null: the files that come with sana",
    )
    images: PositiveInt = free(20_000, "how many images critters draws; its held-out split has a tenth")
    seed: NonNegativeInt = free(0, "which images critters draws")
    split: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")] = free(
        "train", "the part of the source to embed: a sub-folder, or the shards of that name"
    )
    held_out_split: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")] | None = free(
        "auto",
        "a second part, embedded into DIR-SPLIT, whose loss train logs; auto: test for mnist and critters, else none; "
        "null: none",
    )
    caption_field: Annotated[str, Field(min_length=1)] = free(
        "text", "the field or column of captions: a string, or a list of them"
    )
    attribute_field: Annotated[str, Field(min_length=1)] | None = free(
        "attributes", "the field or column of named attributes, which sana eval judges; null: none are read"
    )
    image_field: Annotated[str, Field(min_length=1)] = free(
        "image", "the column of images, in Hugging Face datasets"
    )
    caption_template: str = free(
        "{}",
        "the caption of a class, where {} is its name (class-named folders, idx, class columns of datasets)",
    )
    class_names: Prompts | None = free(
        None, "what labels 0, 1, ... are called (idx); null: EMNIST's mapping file, else their numbers"
    )
    fit: Literal["crop", "pad"] = free("crop", "crop: cut the centre out; pad: the whole image, on white")
    workers: NonNegativeInt | None = free(
        None, "processes that decode images; null: as many as cores, at most 8"
    )
    dir: PathField = free(Path("data/quickstart"), "the dataset directory that embed writes and train reads")
    image_size: Annotated[int | tuple[int, int], BeforeValidator(_is_size)] = free(
        32, "pixels: one number, or [height, width]; unused where there are data.buckets"
    )
    autoencoder: IdOrPath | None = free(
        None,
        "a DC-AE, by id or local path, whose latents are trained on; null: pixels (needs the latent extra)",
    )

    buckets: Sizes | None = free(
        None,
        "sizes of the published tables of shapes, such as [1024] or [512, 1024]: an image takes the shape closest to "
        "its own, of the largest size that does not enlarge it; null: all images have image_size",
    )
    repeats: Times = fixed(
        1.0, "how often an epoch of training has each image; 0.5: half of the images, each time others"
    )
    also: Annotated[dict[PathField, Times], BeforeValidator(_distinct_paths)] = fixed(
        {},
        "further datasets to train on, with how often an epoch has each of their images: {data/more: 0.5}",
    )
    latent_factor: PositiveInt = free(32, "how many times smaller the autoencoder's latents are than images")

    @property
    def held_out(self) -> str | None:
        """The held-out split, if there is to be one."""
        if self.held_out_split != "auto":
            return self.held_out_split
        return "test" if self.source in BUILT_IN and self.split == "train" else None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels: with buckets, of the square of the largest size."""
        if self.buckets is not None:
            return self.buckets[-1], self.buckets[-1]
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def factor(self) -> int:
        """How many times larger an image is than its sample: 1, or the autoencoder's factor."""
        return 1 if self.autoencoder is None else self.latent_factor

    @property
    def sample_sides(self) -> tuple[int, int]:
        """Height and width of what the transformer sees."""
        height, width = self.size
        return height // self.factor, width // self.factor

    @property
    def units(self) -> tuple[int, ...]:
        """Numbers of pixels that the patch size times the factor must divide, for it to divide every side."""
        return self.size if self.buckets is None else tuple(map(buckets.unit, self.buckets))


class TextConfig(Section):
    """The caption encoder, the same for embed and sample."""

    encoder: IdOrPath = free(
        "tiny",
        "tiny (built in, offline), or a Hugging Face id or local path: Gemma 2, T5, BERT, ModernBERT, ...",
    )
    revision: str | None = free(None, "branch, tag or commit of a Hugging Face id")
    dtype: Annotated[Precision, BeforeValidator(_is_precision)] = free(
        "auto", "auto: fp32 on a CPU and on a GPU without bf16 arithmetic, bf16 elsewhere"
    )
    max_length: Annotated[int, Field(ge=2)] = free(300, "tokens kept of a caption")
    instruction: Annotated[str, BeforeValidator(_named_instruction)] | None = free(
        None,
        "put before each caption and cut off its states (the paper's complex human instruction); official: that of "
        "NVlabs/Sana; diffusers: that of its SanaPipeline",
    )
    template: Literal["none", "chat", "lesson"] = free(
        "none",
        "chat: the tokenizer's chat template around each caption; lesson: the same, begun twice, as the lesson did",
    )
    lowercase: bool = free(False, "lower-case and strip captions first, as diffusers' SanaPipeline does")
    layer: PositiveInt | None = free(
        None,
        "how many of the encoder's layers run, before its final norm; the others are left out; null: all of them",
    )


class ModelConfig(Section):
    """The transformer, in the names of diffusers' `SanaTransformer2DModel`."""

    in_channels: Annotated[int, Field(gt=0, le=65536)] = fixed(
        1, "channels of a sample; images are converted to this many"
    )
    patch_size: Annotated[int, Field(gt=0, le=1024)] = fixed(
        8, "side of the square patch that becomes one token"
    )
    sample_size: Annotated[int, Field(gt=0, le=2**20)] | None = fixed(
        None, "side of a sample; null: the dataset's"
    )
    num_layers: Annotated[int, Field(gt=0, le=1000)] = fixed(4, "transformer blocks")
    num_attention_heads: Annotated[int, Field(gt=0, le=65536)] = fixed(
        4, "heads of the linear self-attention"
    )
    attention_head_dim: Annotated[int, Field(gt=0, le=65536)] = fixed(32, "width of a self-attention head")
    num_cross_attention_heads: Annotated[int, Field(gt=0, le=65536)] = fixed(
        2, "heads of the cross-attention over captions"
    )
    cross_attention_head_dim: Annotated[int, Field(gt=0, le=65536)] = fixed(
        64, "width of a cross-attention head"
    )
    caption_channels: Annotated[int, Field(gt=0, le=2**20)] | None = fixed(
        None, "width of a caption state; null: the dataset's"
    )
    mlp_ratio: Annotated[float, Field(gt=0, le=1000)] = fixed(
        2.5, "hidden width of the Mix-FFN over the inner width"
    )
    attention_bias: bool = fixed(False, "biases in self-attention's query, key and value")
    dropout: Annotated[float, Field(ge=0, lt=1)] = fixed(0.0, "dropout after each attention")
    qk_norm: Literal["rms_norm_across_heads"] | None = fixed(
        None, "norm of queries and keys (SANA-1.5 and Sprint)"
    )
    guidance_embeds: bool = fixed(False, "the guidance scale is an input of the model (Sprint)")
    guidance_embeds_scale: Annotated[float, Field(gt=0)] = fixed(
        0.1, "the model is given guidance_scale * this"
    )
    timestep_scale: Annotated[float, Field(gt=0)] = fixed(1.0, "the model is given 1000 * sigma * this")
    interpolation_scale: Annotated[float, Field(gt=0)] | None = fixed(
        None, "scale of fixed sine-cosine positions (2K models 1, 4K models 2); null: no positions"
    )

    @property
    def inner_dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    def resolved(self, sample_size: int, caption_channels: int) -> "Architecture":
        """The architecture for a dataset's sample size and caption width; sizes given here win."""
        own = {key: value for key, value in self.model_dump().items() if value is not None}
        return Architecture.model_validate(
            {"sample_size": sample_size, "caption_channels": caption_channels} | own
        )

    def problems(self) -> Iterator[str]:
        """Contradictions between fields; each line begins with the field to change."""
        if self.inner_dim > MAX_WIDTH:
            yield f"num_attention_heads: a width of {self.inner_dim:,}; the most is {MAX_WIDTH:,}"
        if int(self.mlp_ratio * self.inner_dim) < 1:
            yield f"mlp_ratio: {self.mlp_ratio:g} of the width {self.inner_dim} leaves the Mix-FFN nothing"
        if self.interpolation_scale is not None:
            if self.inner_dim % 4:
                yield f"interpolation_scale: positions need an inner width that 4 divides, not {self.inner_dim}"
            if self.sample_size is not None and self.sample_size < self.patch_size:
                yield f"interpolation_scale: positions need a sample_size of a patch at least, {self.patch_size}"


class Architecture(ModelConfig):
    """The shape of a transformer: a model config in which nothing is left to a dataset.

    `ModelConfig.resolved` makes one from a config; `weights` reads one from a file.
    """

    sample_size: Annotated[int, Field(gt=0, le=2**20)]
    caption_channels: Annotated[int, Field(gt=0, le=2**20)]


class ObjectiveConfig(Section):
    """What a step minimises: rectified flow."""

    prediction_type: PredictionType = fixed(
        "flow_prediction",
        "what the transformer's output is; flow_prediction: the velocity, as published; sample: the data x_0, "
        "which small models of pixels learn sooner (JiT, arXiv 2511.13720)",
    )
    sigma_density: Literal["logit_normal", "uniform"] = fixed("logit_normal", "how noise levels are drawn")
    logit_mean: float = fixed(0.0, "mean of the logit-normal density")
    logit_std: Annotated[float, Field(gt=0)] = fixed(1.0, "standard deviation of the logit-normal density")
    flow_shift: Annotated[float, Field(gt=0)] | None = fixed(
        2.3,
        "s in sigma -> s sigma / (1 + (s - 1) sigma): more high noise levels; the paper's is 3 or more; null: that of "
        "the scheduler of train.init_from, for sampling too where sample.flow_shift is not given",
    )
    sigma_floor: Annotated[float, Field(gt=0, le=1)] = fixed(
        0.5,
        "for prediction_type sample, whose error over sigma is the velocity's: below this sigma the error is "
        "divided by this instead, so that low noise levels do not outweigh the others",
    )
    caption_dropout: Fraction = fixed(
        0.1, "share of captions replaced by the null caption, which guidance needs"
    )


class OptimConfig(Section):
    """How weights move: the optimizer, its learning rate, the average of the weights."""

    optimizer: Literal["adamw", "muon", "came"] = fixed(
        "adamw",
        "muon: Muon for the matrices inside blocks, with updates scaled to the size of AdamW's; AdamW for the rest; "
        "came: CAME (arXiv 2307.02047), the published models' own, whose second moments take next to no memory",
    )
    lr: Annotated[float, Field(gt=0)] = fixed(6e-3, "peak learning rate")
    schedule: Literal["constant", "cosine", "linear"] = fixed(
        "cosine", "learning rate after the warm-up; cosine and linear end at zero"
    )
    warmup_steps: NonNegativeInt | None = fixed(
        None, "steps of linear warm-up; null: 50, or a tenth of the steps of a shorter run"
    )
    betas: Betas = fixed((0.9, 0.99), "AdamW's, and the first two of CAME, whose third is 0.9999")
    momentum: Annotated[float, Field(ge=0, lt=1)] = fixed(0.95, "Muon's")
    weight_decay: Annotated[float, Field(ge=0)] = fixed(0.05, "on matrices and convolutions only, decoupled")
    grad_clip: Annotated[float, Field(gt=0)] | None = fixed(
        1.0, "largest gradient norm of a step; null: no limit"
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = fixed(
        0.998,
        "decay of the averaged weights, which are sampled; warms up as (1 + step) / (10 + step); null: no average",
    )

    ema_device: Literal["same", "cpu"] = free(
        "same", "where the averaged weights lie; cpu: in the machine's memory, in place of the GPU's"
    )

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of `steps`: as asked for, or what suits its length."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(WARMUP_STEPS, int(WARMUP_SHARE * steps))


class AdapterConfig(Section):
    """Low-rank adapters of frozen weights (LoRA, arXiv 2106.09685), in place of training all weights."""

    kind: Literal["none", "lora", "dora"] = fixed(
        "none",
        "none: all weights are trained; lora: W + scale B A; dora: the same with its row norms trained apart "
        "(arXiv 2402.09353)",
    )
    rank: PositiveInt = fixed(16, "rank of each adapter")
    alpha: Annotated[float, Field(gt=0)] | None = fixed(
        None,
        "an adapter's scale is alpha / rank, or alpha / sqrt(rank) if rank_stabilized; null: alpha is the rank",
    )
    rank_stabilized: bool = fixed(False, "divide alpha by sqrt(rank) (rsLoRA, arXiv 2312.03732)")
    dropout: Annotated[float, Field(ge=0, lt=1)] = fixed(0.0, "dropout of an adapter's input")
    targets: Prompts = fixed(
        ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point"),
        "layers with an adapter, by the end of their names",
    )

    @property
    def on(self) -> bool:
        """Whether adapters are trained."""
        return self.kind != "none"


class DistillConfig(Section):
    """Few-step distillation of a teacher (SANA-Sprint, arXiv 2503.09641), in place of rectified flow."""

    teacher: PathField | None = free(
        None,
        "what the student begins as and learns from: a run, a checkpoint, a diffusers folder or file; null: no "
        "distillation (sana distill fills in all of these)",
    )
    method: Literal["consistency", "scm"] = fixed(
        "consistency",
        "consistency: steps of the guided teacher lead to a clamped target of the averaged student; scm: the "
        "continuous-time loss of SANA-Sprint, for teachers that predict the velocity",
    )
    tangent: Literal["difference", "jvp"] = fixed(
        "difference",
        "scm's derivative along the path; difference: a backward difference; jvp: exact, and slower",
    )
    tangent_warmup: NonNegativeInt = fixed(100, "steps over which scm's tangent grows to its full strength")
    steps: Annotated[
        tuple[Annotated[int, Field(gt=0, le=64)], ...], Field(min_length=1), BeforeValidator(_as_tuple)
    ] = fixed((1, 2, 4), "counts of solver steps whose noise levels consistency learns")
    largest: Fraction = fixed(0.5, "share of images at sigma 1, where drawing begins")
    stride: Interval = fixed(
        (0.1, 0.3), "range of the teacher's step from sigma to sigma (1 - stride), of consistency"
    )
    anchor: Fraction = fixed(
        0.35, "below this sigma, consistency learns the teacher's own prediction of the data"
    )
    guidance: Annotated[tuple[PositiveFloat, PositiveFloat], BeforeValidator(_as_tuple)] = fixed(
        (1.0, 4.0), "range of guidance scales that the student learns as its input"
    )
    guidance_interval: Interval = fixed((0.0, 1.0), "the range of sigma in which the teacher is guided")
    critic: bool = fixed(
        True,
        "heads on the teacher's features of noised samples learn to tell drawn from real (LADD, arXiv 2403.12015), "
        "and the student to deceive them",
    )
    critic_loss: Literal["relativistic", "hinge"] = fixed(
        "relativistic",
        "relativistic: a drawn and a real sample of one caption are compared (arXiv 1807.00734); hinge: as published",
    )
    critic_weight: Annotated[float, Field(ge=0)] = fixed(0.5, "weight of the adversarial loss")
    critic_warmup: NonNegativeInt = fixed(
        300, "steps over which the adversarial loss grows to its weight; the critic learns from the start"
    )
    critic_rate: PositiveFloat = fixed(2.0, "the critic's learning rate over the student's")
    guidance_rate: PositiveFloat = fixed(0.1, "that of the guidance embedder over the rest of the student's")
    critic_blocks: (
        Annotated[
            tuple[NonNegativeInt, ...],
            Field(min_length=1),
            BeforeValidator(_as_tuple),
            AfterValidator(_distinct),
        ]
        | None
    ) = fixed(None, "blocks whose output the heads see; null: four, evenly spread")
    critic_logit_mean: float = fixed(
        -2.0, "mean of the logit-normal density of noise that the heads see; the paper's 0.1 hides haze"
    )
    critic_logit_std: PositiveFloat = fixed(1.0, "standard deviation of that density")

    @property
    def on(self) -> bool:
        """Whether a teacher is distilled."""
        return self.teacher is not None


class TrainConfig(Section):
    """How long a run is, how its steps are cut, where it starts."""

    steps: PositiveInt = free(3000, "optimizer steps")
    batch_size: PositiveInt = free(32, "images of a micro-batch of one process")
    accumulate: PositiveInt = free(
        1, "micro-batches of a step in each process, whose gradients are averaged over their images"
    )
    precision: Annotated[Precision, BeforeValidator(_is_precision)] = fixed(
        "auto", "arithmetic; auto: bf16 where the device has it natively, else fp32"
    )
    weights: Literal["fp32", "bf16"] = fixed(
        "fp32",
        "type of the trained matrices and their gradients; bf16: half the memory, and each update is rounded up "
        "or down at random, so that small ones count too (needs native bf16); averages stay fp32",
    )
    chunk: PositiveInt = fixed(
        1,
        "images of one shape that follow each other in the order, where there are several shapes; 1: a plain shuffle",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = fixed(
        0, "of the initial weights, the order of the data and every draw"
    )
    init: Literal["official", "fan_in"] = free(
        "fan_in",
        "initial weights; official: those of NVlabs/Sana, made for wide models; fan_in: the same, but embedders by "
        "their own width and captions at full strength, from which narrow models learn sooner",
    )
    init_from: PathField | None = free(
        None,
        "weights to start from: a run, a checkpoint, a diffusers folder or file, an official or lesson file",
    )
    parallel: Literal["ddp", "fsdp"] = free(
        "ddp",
        "under torchrun; ddp: the whole model in each process; fsdp: a shard of every parameter in each",
    )
    activation_checkpointing: bool = free(
        False, "keep only the input of each block and recompute the rest: less memory, a third more time"
    )
    compile: bool | Literal["auto"] = free(
        "auto",
        "torch.compile each block; auto: where the steps that are left pay for its start, as measured on this "
        "machine; a resumed run goes on as it began",
    )


class LogConfig(Section):
    """What a run writes about itself, and how often."""

    every: PositiveInt = free(10, "steps between lines of metrics.jsonl")
    sample_every: PositiveInt = free(
        500, "steps between sample grids; there is always one at step 0 and at the end"
    )
    held_out_every: PositiveInt = free(
        500, "steps between held-out losses; there is always one at the end (needs data.held_out_split)"
    )
    held_out_images: PositiveInt = free(
        512, "images of a held-out loss, always the same, with the same noise"
    )
    tensorboard: bool = free(False, "also write TensorBoard's event files (needs the tensorboard extra)")


class SaveConfig(Section):
    """Checkpoints: how often, and how many stay."""

    every: PositiveInt = free(500, "steps between checkpoints; there is always one at the end")
    keep: PositiveInt = free(2, "checkpoints kept, the newest")


class SampleConfig(Section):
    """How checkpoints of this run are sampled; options of `sana sample` override it."""

    steps: PositiveInt = free(8, "solver steps")
    guidance_scale: Annotated[float, Field(ge=0)] = free(
        2.5, "1 is none; above 1 follows the prompt more, with less variety"
    )
    guidance_interval: Interval = free((0.0, 1.0), "the range of sigma in which guidance is used")
    solver: Solver = free(
        "dpm++", "dpm++: DPM-Solver++ 2M; euler; heun; scm: the consistency sampler of Sprint models"
    )
    flow_shift: Annotated[float, Field(gt=0, le=1000)] = free(
        2.3,
        "as objective.flow_shift, for the solver's steps; euler and heun apply it twice, as diffusers' do",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = free(0, "image i of a grid has seed + i")
    prompts: Prompts | None = free(
        None, "prompts of the grids sampled during training; null: captions of the dataset"
    )

    @property
    def in_words(self) -> str:
        """Solver, steps and guidance in one line."""
        low, high = self.guidance_interval
        where = "" if (low, high) == (0, 1) else f" at {low:g} to {high:g}"
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        return f"{self.solver}, {steps}, guidance {self.guidance_scale:g}{where}"


class RunConfig(Section):
    """Where a run lies and on what it runs."""

    dir: PathField = free(Path("runs/quickstart"), "the run directory that train writes")
    device: Annotated[str, AfterValidator(_is_device)] = free("auto", "auto, cpu, mps, cuda or cuda:N")


class Config(Section):
    """A whole experiment."""

    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    adapter: AdapterConfig = AdapterConfig()
    distill: DistillConfig = DistillConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    save: SaveConfig = SaveConfig()
    sample: SampleConfig = SampleConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="before")
    @classmethod
    def _patch_that_fits(cls, values: Any) -> Any:
        """Choose a patch where none is given: the largest that divides the image and fits the model's width.

        A patch of more numbers than the width loses some of its noise, which a velocity must predict
        (JiT, arXiv 2511.13720).
        """
        data, model = (
            (values.get(name) for name in ("data", "model")) if isinstance(values, dict) else (None, None)
        )
        if not isinstance(data, dict) or not isinstance(model or {}, dict):
            return values
        if "image_size" not in data and data.get("buckets") is None:
            return values
        if (model or {}).get("patch_size") is not None:
            return values
        try:
            checked = DataConfig.model_validate(data)
            shape = ModelConfig.model_validate((model or {}) | {"patch_size": 1})
        except ValidationError:  # reported where the section itself is validated
            return values
        sides = [pixels // checked.factor for pixels in checked.units]
        dividing = [size for size in PATCH_SIZES if not any(side % size for side in sides)]
        narrow = (size for size in dividing if size**2 * shape.in_channels <= shape.inner_dim)
        fits = next(narrow, 1)
        return {**values, "model": {**(model or {}), "patch_size": fits}}

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        problems = [*self._data_problems(), *self._model_problems(), *self._run_problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _data_problems(self) -> Iterator[str]:
        data = self.data
        if data.source in BUILT_IN and data.split not in ("train", "test"):
            yield f"data.split: {data.source} has train and test, not {data.split!r}"
        if data.source in BUILT_IN and data.held_out not in ("train", "test", None):
            yield f"data.held_out_split: {data.source} has train and test, not {data.held_out!r}"
        if data.held_out == data.split:
            yield f"data.held_out_split: {data.split} is what is trained on"
        if data.buckets is not None and data.source in BUILT_IN:
            yield f"data.buckets: are for images of many shapes; {data.source} has one, data.image_size"
        here = os.path.realpath(data.dir)
        named = dict[str, Path]()
        for directory in data.also:
            if (place := os.path.realpath(directory)) == here:
                yield f"data.also: {directory} is data.dir as well; data.repeats says how often it is seen"
            elif place in named:
                yield f"data.also: {directory} is {named[place]} as well; keep one"
            named[place] = directory
        if self.text.instruction is not None and self.text.template != "none":
            yield "text.instruction: and text.template exclude each other; keep one"

    def _model_problems(self) -> Iterator[str]:
        model, (height, width), factor = self.model, self.data.size, self.data.factor
        if self.data.buckets is not None:
            yield from self._bucket_problems(self.data.buckets)
        elif height % factor or width % factor:
            yield f"data.latent_factor: {factor} does not divide data.image_size {height}x{width}"
        elif height // factor % model.patch_size or width // factor % model.patch_size:
            of = "" if factor == 1 else f" / {factor}"
            yield f"model.patch_size: {model.patch_size} does not divide data.image_size {height}x{width}{of}"
        yield from (f"model.{problem}" for problem in model.problems())
        if model.guidance_embeds and not self.distill.on:
            yield (
                "model.guidance_embeds: a Sprint model is distilled, and steps on the flow would undo that; train "
                "adapters of the model that it came from, and draw with sana sample --checkpoint SPRINT --adapter RUN"
            )

    def _bucket_problems(self, sizes: tuple[int, ...]) -> Iterator[str]:
        factor, patch = self.data.factor, self.model.patch_size
        for key, divisor in (("data.buckets", factor), ("model.patch_size", factor * patch)):
            for size, unit in zip(sizes, self.data.units, strict=True):
                if unit % divisor:
                    yield (
                        f"{key}: shapes of size {size} have sides in steps of {unit} pixels, which {divisor} does "
                        f"not divide; the smallest size that fits is {divisor * buckets.UNITS}"
                    )
                    return

    def _run_problems(self) -> Iterator[str]:
        warmup, (low, high) = self.optim.warmup(self.train.steps), self.sample.guidance_interval
        if warmup >= self.train.steps:
            yield f"optim.warmup_steps: {warmup} leaves none of train.steps {self.train.steps}"
        if self.sample.solver == "scm" and not self.model.guidance_embeds:
            yield "sample.solver: scm is for Sprint models, which have model.guidance_embeds"
        yield from self._distill_problems()
        if low >= high:
            yield f"sample.guidance_interval: {low} must be below {high}"
        if self.optim.optimizer == "came" and self.optim.betas[0] == 0:
            yield "optim.betas: came divides by how much its first average changes; its beta must be above 0"
        yield from self._memory_problems()
        if self.objective.flow_shift is None and self.train.init_from is None:
            yield "objective.flow_shift: null is that of train.init_from, and there is none"
        yield from self._adapter_problems()
        if self.adapter.on and self.train.init_from is None and not self.distill.on:
            yield "train.init_from: adapters need the model that they are for"
        if os.path.realpath(self.run.dir) == os.path.realpath(self.data.dir):
            yield f"run.dir: {self.run.dir} is data.dir as well; a run needs a directory of its own"

    def _distill_problems(self) -> Iterator[str]:
        distill = self.distill
        if not distill.on:
            for key in sorted(distill.model_fields_set - {"teacher"}):
                if getattr(distill, key) != type(distill).model_fields[key].default:
                    yield f"distill.{key}: is given, and distill.teacher is not; begin with: sana distill TEACHER"
                    return
            return
        if not self.model.guidance_embeds:
            yield "model.guidance_embeds: a student has its guidance as an input; set it to true"
        if self.sample.solver != "scm":
            yield f"sample.solver: a student is drawn with scm, not {self.sample.solver}"
        elif self.sample.flow_shift != 1:
            yield "sample.flow_shift: the noise levels of scm have no shift; set it to 1"
        if self.adapter.on:
            yield "adapter.kind: a student learns with all its weights; leave it at none"
        if self.train.init_from is not None:
            yield "train.init_from: a student begins as distill.teacher; leave it at null"
        for key in ("guidance", "stride", "guidance_interval"):
            low, high = getattr(distill, key)
            if low >= high:
                yield f"distill.{key}: {low:g} must be below {high:g}"
        if distill.stride[0] <= 0:
            yield "distill.stride: must begin above 0"
        if distill.method == "scm" and self.train.weights == "bf16":
            yield "train.weights: scm's tangent needs float32; leave it at fp32"
        if distill.method == "scm" and distill.tangent == "jvp" and self.train.parallel == "fsdp":
            yield "distill.tangent: jvp does not pass through shards; use difference"
        if distill.method == "consistency" and self.optim.ema_decay is None:
            yield "optim.ema_decay: consistency's target is the averaged student; say a decay, such as 0.99"
        if distill.method == "consistency" and self.optim.ema_device == "cpu":
            yield "optim.ema_device: consistency uses the average in every step; leave it at same"
        for block in distill.critic_blocks or ():
            if block >= self.model.num_layers:
                yield f"distill.critic_blocks: {block}, and the model has blocks 0 to {self.model.num_layers - 1}"

    def _adapter_problems(self) -> Iterator[str]:
        if "kind" not in self.adapter.model_fields_set:
            for key in sorted(self.adapter.model_fields_set):
                yield f"adapter.{key}: is given, and adapter.kind is not; say lora, dora or none"

    def _memory_problems(self) -> Iterator[str]:
        if self.train.weights == "bf16":
            if self.adapter.on:
                yield "train.weights: adapters are few, and stay fp32; leave it at fp32"
            if self.train.precision == "fp32":
                yield "train.weights: bf16 needs train.precision bf16 or auto"
            if self.train.parallel == "fsdp":
                yield "train.weights: bf16 cannot be sharded; use train.parallel ddp, or leave it at fp32"
        if self.optim.ema_device == "cpu" and self.train.parallel == "fsdp":
            yield "optim.ema_device: shards of the average stay with their weights; leave it at same"

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
            lines += [
                "",
                f"{name}:  # {(section_field.annotation.__doc__ or '').splitlines()[0].rstrip('.')}",
            ]
            for key, key_field in type(section).model_fields.items():
                value = section.model_dump(mode="json")[key]
                lines.append(f"  {key}: {yaml_value(value)}  # {key_field.description}")
        return "\n".join(lines[1:]) + "\n"


def may_change(section: str, key: str) -> bool:
    """Whether a key may change when a run is resumed: the key says so itself."""
    field = Config.model_fields[section].annotation.model_fields.get(key)  # type: ignore[union-attr]
    return field is not None and field.json_schema_extra["on_resume"] == "may change"


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
