"""`sana train`: rectified flow on a pre-embedded dataset. A generator of steps; it prints nothing.

Every draw (order of the data, caption, dropout, noise level, noise) is a pure function of the seed and the sample's place
in the run, so micro-batch size does not change what is learned, and resuming needs a step number and no random state.

Shapes: B images of a micro-batch, C H W of an image, L caption tokens, D caption width.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sana_cli import __version__, checkpoint, draw, files, flow, formats, hub
from sana_cli.autoencoder import Autoencoder
from sana_cli.config import Config, ModelConfig, TrainConfig, differences
from sana_cli.device import has_native_bf16, peak_memory, release_memory, resolve_device, resolve_precision
from sana_cli.errors import Interrupted, SanaError
from sana_cli.model import SanaTransformer, build
from sana_cli.store import Dataset, sample_rows
from sana_cli.text import asked_for, check_same_encoder, load_encoder, pad_states

# what may differ between a run and its resumption; the dataset is compared by its hash instead of its path
MAY_CHANGE = {"train.steps", "train.log_every", "train.save_every", "train.keep", "train.sample_every", "train.init_from"}
GRID_CAPTIONS = 20  # captions of the dataset in a sample grid
DRAWS = 1  # the domain of the counter-based generator that training uses; the order of the data has another


@dataclass(frozen=True)
class TrainOptions:
    """What to train. `stop` is asked after each micro-batch; a signal number from it ends the run, saved."""

    config: Config
    resume: str = "none"  # none, auto, or the path of a step folder
    stop: Callable[[], int | None] = lambda: None


@dataclass(frozen=True)
class TrainPlan:
    """What `train` would do, found on the meta device and without writing."""

    run: Path
    dataset: Path
    images: int
    steps: int
    batch: int  # images of a step
    epochs: float
    parameters: int
    device: str
    precision: str
    precision_reason: str
    checkpoint_bytes: int  # of one; train.keep of them are kept
    model: ModelConfig


@dataclass(frozen=True)
class TrainStep:
    """After an optimizer step (or, at the beginning, before the first): what a person watches."""

    step: int
    steps: int
    loss: float  # mean over the images of this step
    lr: float
    grad_norm: float
    samples_per_second: float
    seconds_left: float
    memory: int
    saved: Path | None = None
    sampled: Path | None = None
    warning: str | None = None  # what went wrong beside training, which goes on


@dataclass(frozen=True)
class TrainSummary:
    """A finished run."""

    run: Path
    checkpoint: Path
    grid: Path | None
    steps: int
    first_step: int  # where this process began; `steps` if there was nothing left to do
    loss: float
    seconds: float
    peak_memory: int
    skipped: tuple[str, ...] = ()  # checkpoints that resuming passed over, and why


# --- planning ---------------------------------------------------------------------------------------------------------


def _check_dataset(config: Config, dataset: Dataset) -> ModelConfig:
    """The resolved model config, or a refusal that names the field in which dataset and config differ."""
    way_out = "embed it again with: sana embed --overwrite, or point data.dir at another"
    where = str(dataset.directory)
    check_same_encoder(dataset.index["encoder"], asked_for(config.text), where, way_out)
    channels, height, width = dataset.image_shape
    image, autoencoder = dataset.index["image"], config.data.autoencoder
    recorded, asked = image.get("autoencoder"), None if autoencoder is None else hub.model_name(autoencoder)
    if recorded != asked:
        raise SanaError(f"data.autoencoder: {where} has {recorded or 'pixels'}, not {asked or 'pixels'}", way_out)
    factor = image.get("factor", 1)
    if (height * factor, width * factor) != config.data.size:
        sizes = f"{height * factor}x{width * factor}", "x".join(map(str, config.data.size))
        raise SanaError(f"data.image_size: {where} has {sizes[0]}, not {sizes[1]}", way_out)
    if channels != config.model.in_channels:
        raise SanaError(f"model.in_channels: {where} has {channels}, not {config.model.in_channels}", way_out)
    if config.model.caption_channels not in (None, dataset.index["caption_dim"]):
        raise SanaError(
            f"model.caption_channels: {where} has {dataset.index['caption_dim']}, not {config.model.caption_channels}", way_out
        )
    size = config.model.sample_size or max(height, width)
    return config.model.model_copy(update={"sample_size": size, "caption_channels": dataset.index["caption_dim"]})


def plan(options: TrainOptions) -> TrainPlan:
    """What would be done (`--dry-run`)."""
    config = options.config
    dataset = Dataset(config.data.dir)
    model = _check_dataset(config, dataset)
    device = resolve_device(config.run.device)
    precision, native = resolve_precision(config.train.precision, device), has_native_bf16(device)
    reason = f"{device.type} {'has' if native else 'lacks'} native bf16" if config.train.precision == "auto" else "as asked"
    parameters = checkpoint.parameter_count(build(model, seed=None).parameters())
    batch = config.train.batch_size * config.train.accumulate
    return TrainPlan(
        run=config.run.dir,
        dataset=config.data.dir,
        images=len(dataset),
        steps=config.train.steps,
        batch=batch,
        epochs=config.train.steps * batch / len(dataset),
        parameters=parameters,
        device=str(device),
        precision=precision,
        precision_reason=reason,
        checkpoint_bytes=16 * parameters,  # float32: EMA, raw weights, two moments
        model=model,
    )


# --- draws ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A micro-batch, ready for the device: what the transformer sees and what it should answer."""

    rows: np.ndarray  # (B,) of the dataset
    x_0: Tensor  # (B, C, H, W)
    noise: Tensor  # (B, C, H, W)
    sigma: Tensor  # (B,)
    states: Tensor  # (B, L, D)
    mask: Tensor  # (B, L)


def make_batch(dataset: Dataset, train: TrainConfig, first: int, count: int) -> Batch:
    """Samples `first` .. `first + count` of a run with everything drawn for them, from (seed, sample number) alone."""
    shape = dataset.image_shape
    rows = sample_rows(first, count, len(dataset), train.seed)
    choices = list(zip(dataset.caption_ids(rows), dataset.caption_weights(rows), strict=True))
    chosen, z = [], np.empty(count, dtype=np.float32)
    noise = np.empty((count, *shape), dtype=np.float32)
    for i, (ids, weights) in enumerate(choices):
        generator = np.random.Generator(np.random.Philox(key=[train.seed, first + i], counter=[0, 0, 0, DRAWS]))
        which, dropped = generator.random(2)
        z[i] = generator.standard_normal(dtype=np.float32)
        noise[i] = generator.standard_normal(shape, dtype=np.float32)
        null = dropped < train.caption_dropout
        chosen.append(dataset.index["null_caption"] if null else ids[pick(which, weights, len(ids))])
    drawn = torch.from_numpy(z)
    sigma = flow.uniform(drawn)
    if train.sigma_density == "logit_normal":
        sigma = flow.logit_normal(drawn, train.logit_mean, train.logit_std)
    states, mask = pad_states(dataset.states(chosen))
    return Batch(rows, dataset.images(rows), torch.from_numpy(noise), flow.shift_sigma(sigma, train.flow_shift), states, mask)


def pick(which: float, weights: Sequence[float] | None, count: int) -> int:
    """Which of `count` a uniform number in [0, 1) means, in proportion to `weights`."""
    if weights is None:
        return int(which * count)
    ends = np.cumsum(weights)
    return int(np.searchsorted(ends, which * ends[-1], side="right"))


def batch_loss(model: nn.Module, batch: Batch, timestep_scale: float, device: torch.device, precision: str) -> Tensor:
    """The squared error of the velocity, for each image: (B,) in float32."""
    x_0, noise, sigma = (t.to(device) for t in (batch.x_0, batch.noise, batch.sigma))
    with draw.autocast(device, precision):
        velocity = model(
            flow.interpolate(x_0, noise, sigma),
            batch.states.to(device).float(),
            sigma * flow.TRAIN_TIMESTEPS * timestep_scale,
            encoder_attention_mask=batch.mask.to(device),
        )
    return F.mse_loss(velocity.float(), flow.velocity_target(x_0, noise), reduction="none").flatten(1).mean(1)


def lr_factor(train: TrainConfig, step: int) -> float:
    """The learning rate of the step after `step`, over the peak: linear warm-up, then constant, cosine or linear decay."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    if train.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if train.schedule == "linear" else 1.0


def ema_decay(train: TrainConfig, step: int) -> float:
    """Decay of the weight average at the update after `step`: young averages forget faster."""
    return min(train.ema_decay, (1 + step) / (10 + step))


# --- the run ----------------------------------------------------------------------------------------------------------


class _Run:
    """All that moves during a run. Each method does one thing; `train` below is the order they come in."""

    def __init__(self, options: TrainOptions, dataset: Dataset) -> None:
        config = options.config
        self.config, self.dataset, self.dir = config, dataset, config.run.dir
        self.device = resolve_device(config.run.device)
        self.precision = resolve_precision(config.train.precision, self.device)
        self.model_config = _check_dataset(config, dataset)
        self.texts = dataset.texts()
        self.null_caption = dataset.states([dataset.index["null_caption"]])[0]
        self.step = 0
        self.model = build(self.model_config, config.train.seed).to(self.device)
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            matrix = parameter.ndim >= 2 and not name.endswith("scale_shift_table")
            (decayed if matrix else plain).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.train.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.train.lr,
            betas=config.train.betas,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.ema: AveragedModel | None = None
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}

    def start(self) -> None:
        """The EMA begins as a copy of the weights, once they are what the run starts from."""
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.config.train.ema_decay))
        self.ema.n_averaged.fill_(1)
        self.ema.requires_grad_(False).eval()

    @property
    def ema_model(self) -> SanaTransformer:
        assert self.ema is not None
        module = self.ema.module
        assert isinstance(module, SanaTransformer)
        return module

    # -- one step

    def advance(self, stop: Callable[[], int | None]) -> tuple[float, float, float]:
        """One optimizer step over all its micro-batches; returns loss, gradient norm and learning rate.

        Raises:
            Interrupted: `stop` said so; the gradients so far are dropped and the weights are those of the last step.
            SanaError: loss or gradient is not finite; the weights are untouched.
        """
        train = self.config.train
        total = train.batch_size * train.accumulate
        loss_sum, sigmas, rows = 0.0, [], []
        self.optimizer.zero_grad(set_to_none=True)
        for micro in range(train.accumulate):
            batch = make_batch(self.dataset, train, self.step * total + micro * train.batch_size, train.batch_size)
            if self.model_config.dropout:
                torch.manual_seed(int.from_bytes(hashlib.sha256(f"{train.seed} {self.step} {micro}".encode()).digest()[:8]))
            losses = batch_loss(self.model, batch, self.model_config.timestep_scale, self.device, self.precision)
            (losses.sum() / total).backward()
            loss_sum += float(losses.detach().sum())
            sigmas.append(batch.sigma)
            rows.append(batch.rows)
            if signal_number := stop():
                self.optimizer.zero_grad(set_to_none=True)
                raise Interrupted("interrupted", exit_code=128 + signal_number)
        grad_norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), train.grad_clip or math.inf))
        if not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):
            sigma, ids = torch.cat(sigmas), self.dataset.sample_ids(np.concatenate(rows))
            raise SanaError(
                f"step {self.step + 1}: the {'loss' if not math.isfinite(loss_sum) else 'gradient'} is not finite; weights are untouched",
                f"sigma {float(sigma.min()):.3f} to {float(sigma.max()):.3f}, samples {', '.join(ids[:8])}{', ...' if len(ids) > 8 else ''}",
                "lower train.lr, or use train.precision: fp32, and go on with --resume auto",
            )
        lr = train.lr * lr_factor(train, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        assert self.ema is not None
        self.ema.multi_avg_fn = get_ema_multi_avg_fn(ema_decay(train, self.step))
        self.ema.update_parameters(self.model)
        self.step += 1
        return loss_sum / total, grad_norm, lr

    # -- pictures

    def encode_prompts(self) -> tuple[list[list[draw.Cell]], list[Tensor]]:
        """The grid that is drawn again and again, and its caption states. The encoder, where needed, is freed at once."""
        texts = {text: caption_id for caption_id, text in enumerate(self.texts)}
        sample, one_word = self.config.sample, bool(self.dataset.index["one_word_captions"])
        if sample.prompts is not None:
            rows = draw.prompt_rows(sample.prompts, one_word)
        else:
            captions = sorted((text for text in texts if text), key=lambda text: (not text.isdecimal(), texts[text]))
            captions = captions[:: max(1, len(captions) // GRID_CAPTIONS)][:GRID_CAPTIONS]
            captions = sorted(captions) if all(map(str.isdecimal, captions)) else captions
            rows = [tuple(captions[at : at + 10]) for at in range(0, len(captions), 10)]
        cells = draw.grid_cells(rows, 1, sample.seed)
        prompts = [cell.prompt for row in cells for cell in row]
        states = {prompt: self.dataset.states([texts[prompt]])[0] for prompt in prompts if prompt in texts}
        unknown = [prompt for prompt in prompts if prompt not in texts]
        if unknown:
            encoder = load_encoder(self.config.text, self.device)
            check_same_encoder(self.dataset.index["encoder"], encoder.fingerprint, str(self.dataset.directory))
            states |= dict(encoder.encode(unknown))
            del encoder
            release_memory(self.device)
        return cells, [states[prompt] for prompt in prompts]

    def try_sample(self, cells: list[list[draw.Cell]], states: list[Tensor]) -> tuple[Path | None, str | None]:
        """`sample`, or why it could not be done: a picture is not worth a run."""
        try:
            return self.sample(cells, states), None
        except (SanaError, OSError, RuntimeError) as error:
            release_memory(self.device)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return None, f"no samples at step {self.step}: {reason}"

    def sample(self, cells: list[list[draw.Cell]], states: list[Tensor]) -> Path:
        """Draw the grid with the weights to use, into `samples/`."""
        seeds = [cell.seed for row in cells for cell in row]
        settings, shape = self.config.sample, self.dataset.image_shape
        nulls = [self.null_caption] * len(states)
        drawn = draw.draw(self.ema_model, states, nulls, seeds, shape, settings, self.precision)
        images = draw.final_images(drawn)
        if self.config.data.autoencoder is not None:  # loaded for the picture alone, and freed
            images = torch.cat(list(Autoencoder(self.config.data.autoencoder, self.device).decode(images)))
            release_memory(self.device)
        images = draw.to_pixels(images)
        path = self.dir / "samples" / f"{checkpoint.step_name(self.step)}.png"
        draw.save_png(draw.grid(images, cells), path, draw.grid_record(cells, settings, f"{self.dir.name}/{path.stem}"))
        return path

    # -- files

    def save(self) -> Path:
        """A checkpoint of this step."""
        raw = self.model.state_dict()
        moments = {
            f"{kind}.{name}": self.optimizer.state[parameter][kind]
            for parameter, name in self.names.items()
            for kind in ("exp_avg", "exp_avg_sq")
            if parameter in self.optimizer.state
        }
        config, train = self.config.to_dict(), self.config.train
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        del config["train"]["init_from"]  # a path, which means nothing elsewhere
        parameters = checkpoint.parameter_count(raw.values())
        dataset = {"sha256": self.dataset.index["sha256"], "images": len(self.dataset)}
        record = {
            "version": checkpoint.RECORD_VERSION,
            "made_by": f"sana {__version__}",
            "step": self.step,
            "parameters": parameters,
            "encoder": self.dataset.index["encoder"],
            "one_word_captions": self.dataset.index["one_word_captions"],
            "example_captions": [text for text in self.texts[: GRID_CAPTIONS + 1] if text],
            "image": self.dataset.index["image"],
            "autoencoder": self.dataset.index["image"].get("autoencoder"),
            "precision": self.precision,
            "sample": config["sample"],
            "dataset": dataset,
        }
        state = {
            "step": self.step,
            "samples_seen": self.step * train.batch_size * train.accumulate,
            "precision": self.precision,
            "dataset_sha256": dataset["sha256"],
            "config": {section: config[section] for section in ("model", "train", "sample")},
        }
        whole = checkpoint.Checkpoint(
            step=self.step,
            weights=self.ema_model.state_dict(),
            raw_weights=raw,
            optimizer=moments,
            state=state,
            model=self.model_config,
            sample=self.config.sample,
            record=record,
            null_caption=self.null_caption,
            card=_card(record, train),
            config_sha256=digest,
        )
        return checkpoint.save_checkpoint(self.dir, whole, train.keep)

    def init_from(self, path: Path) -> None:
        """Begin with the weights of another SANA, of any format.

        Raises:
            SanaError: it has another architecture, or means something else by time, than this config; names each field.
        """
        source = checkpoint.load_transformer(path)
        theirs, ours = source.config.model_dump(), self.model_config.model_dump()
        free = {"dropout"} | ({"sample_size"} if self.model_config.interpolation_scale is None else set())
        wrong = [f"model.{key}: it has {old!r}, not {new!r}" for key, old, new in differences(theirs, ours) if key not in free]
        if wrong:
            raise SanaError(f"train.init_from: {path} is not the model of this config:", *wrong, "set these as it has them")
        self.model.load_state_dict(source.state_dict())

    def load(self, folder: Path) -> None:
        """Continue from a step folder, bit for bit.

        Raises:
            SanaError: it was made with another config, dataset or precision; names each field.
        """
        state = files.read_json(folder / checkpoint.STATE)
        now = self.config.to_dict()
        old, new = ({f"{s}": c[s] for s in ("model", "train")} for c in (state["config"], now))
        wrong = [
            f"{key}: the run has {before!r}, not {after!r}"
            for key, before, after in differences(old, new)
            if key not in MAY_CHANGE
        ]
        if state["dataset_sha256"] != self.dataset.index["sha256"]:
            wrong.append(f"data.dir: {self.dataset.directory} is not the dataset that the run was trained on")
        if state["precision"] != self.precision:
            wrong.append(f"train.precision: the run used {state['precision']}, and here it would be {self.precision}")
        if wrong:
            raise SanaError(f"{folder} cannot be resumed with this config:", *wrong, "start another run with --set run.dir=DIR")
        names = dict(self.model.named_parameters())
        weights = files.read_tensors(folder / checkpoint.RAW_WEIGHTS)
        formats.check_tensors(weights, self.model, folder / checkpoint.RAW_WEIGHTS, "this config")
        self.model.load_state_dict(weights)
        self.start()
        self.ema_model.load_state_dict(files.read_tensors(folder / "transformer" / formats.WEIGHTS))
        self.step = int(state["step"])
        for key, tensor in files.read_tensors(folder / checkpoint.OPTIMIZER).items():
            kind, _, name = key.partition(".")
            slot = self.optimizer.state[names[name]]
            slot[kind] = tensor.to(self.device, copy=True)
            slot["step"] = torch.tensor(float(self.step), device=self.device if self.device.type == "cuda" else "cpu")


def _card(record: Mapping[str, Any], train: TrainConfig) -> str:
    """The model card of a step folder."""
    image = record["image"]
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [sana, flow-matching]
---
# A SANA of {record["parameters"]:,} parameters

Trained from a pre-embedded dataset of {record["dataset"]["images"]:,} images, {image["channels"]} x {image["height"]} x {image["width"]},
for {record["step"]:,} steps of {train.batch_size * train.accumulate} with rectified flow. Captions are encoded by
`{record["encoder"]["encoder"]}`; `sana.json` has every setting. Made by {record["made_by"]}.

    sana sample --checkpoint . {" ".join(json.dumps(caption) for caption in record["example_captions"][:3])}

The transformer alone, with diffusers (`velocity = noise - data`, `timestep = 1000 sigma`):

    from diffusers import SanaTransformer2DModel
    transformer = SanaTransformer2DModel.from_pretrained(".", subfolder="transformer")
"""


def _keep_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run takes again, and a last line that was cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    partial = path.with_name(path.name + ".partial")
    files.write_text(partial, "".join(f"{line}\n" for line in kept))
    partial.replace(path)


def _resume_from(options: TrainOptions) -> tuple[Path | None, tuple[str, ...]]:
    """Which step folder to continue from, and the newer ones passed over. Refuses what would mix two runs."""
    run, there = options.config.run.dir, checkpoint.steps(options.config.run.dir)
    if options.resume == "none":
        if there:
            raise SanaError(
                f"{run} has checkpoints already, the newest {there[-1].name}",
                "continue it with --resume auto, or start another run with --set run.dir=DIR",
            )
        return None, ()
    if options.resume == "auto":
        folder, skipped = checkpoint.newest_step(run, hashes=True)
        if there and folder is None:
            raise SanaError(
                f"no checkpoint of {run} is whole:", *skipped, "start another run with --set run.dir=DIR, or remove these"
            )
        return folder, tuple(skipped)
    folder = checkpoint.find_checkpoint(Path(options.resume))
    for _ in checkpoint.verify(folder, hashes=True):
        pass
    later = [path.name for path in there if checkpoint.step_of(path) > checkpoint.step_of(folder)]
    if later:
        raise SanaError(
            f"{run} has later checkpoints than {folder.name}: {', '.join(later)}",
            "continue into another run with --set run.dir=DIR, or remove them",
        )
    return folder, ()


def train(options: TrainOptions) -> Iterator[TrainStep | TrainSummary]:
    """Train; yields a `TrainStep` for each step, and at the end a `TrainSummary`.

    Raises:
        Interrupted: `options.stop` said so; the last whole step has been saved.
        SanaError: no dataset, another dataset than the config's, a run directory in use, a number that is not finite, or
            a disk that fails. The checkpoints that were there stay.
    """
    begin = time.perf_counter()
    config, steps = options.config, options.config.train.steps
    folder, skipped = _resume_from(options)
    run = _Run(options, Dataset(config.data.dir))
    if folder is not None:
        run.load(folder)
        if run.step >= steps:
            yield TrainSummary(run.dir, folder, None, run.step, run.step, math.nan, 0.0, peak_memory(run.device), skipped)
            return
    else:
        if config.train.init_from is not None:
            run.init_from(config.train.init_from)
        run.start()
    first_step = saved_step = run.step
    cells, states = run.encode_prompts()
    metrics_path, metrics = run.dir / "metrics.jsonl", None
    try:
        (run.dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        files.write_text(run.dir / "config.yaml", config.to_yaml())
        _keep_metrics(metrics_path, run.step)
        metrics = metrics_path.open("a", encoding="utf-8")
        if run.step == 0:
            grid, warning = run.try_sample(cells, states)
            memory = peak_memory(run.device)
            yield TrainStep(0, steps, math.nan, 0.0, math.nan, 0.0, math.nan, memory, sampled=grid, warning=warning)
        else:
            grid = None
        images = config.train.batch_size * config.train.accumulate
        loss = math.nan
        losses, logged = [], time.perf_counter()
        rate, training = 0.0, 0.0
        while run.step < steps:
            clock = time.perf_counter()
            try:
                loss, grad_norm, lr = run.advance(options.stop)
            except torch.OutOfMemoryError as error:
                raise SanaError(
                    f"step {run.step + 1}: out of memory on {run.device}; the last checkpoint is whole",
                    "lower train.batch_size and raise train.accumulate by as much (the step stays the same), use train.precision: bf16,",
                    "or train a smaller model (model.num_layers); then go on with --resume auto",
                ) from error
            except Interrupted as interrupt:
                path = run.save() if run.step > saved_step else None
                where = path or (folder if run.step == saved_step and folder else None)
                raise Interrupted(
                    f"stopped after step {run.step}" + (f", which is saved in {where}" if where else "; nothing was saved yet"),
                    "continue with: sana train --resume auto (and the same config)",
                    exit_code=interrupt.exit_code,
                ) from None
            training += time.perf_counter() - clock
            losses.append(loss)
            rate = (run.step - first_step) * images / training
            if run.step % config.train.log_every == 0 or run.step == steps:
                now = time.perf_counter()
                line = {
                    "step": run.step,
                    "loss": sum(losses) / len(losses),
                    "lr": lr,
                    "grad_norm": grad_norm,
                    "samples_per_second": len(losses) * images / (now - logged),
                    "memory_bytes": peak_memory(run.device),
                }
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
                losses, logged = [], now
            saved = sampled = warning = None
            if run.step % config.train.save_every == 0 or run.step == steps:
                saved, saved_step = run.save(), run.step
            if run.step % config.train.sample_every == 0 or run.step == steps:
                sampled, warning = run.try_sample(cells, states)
                grid = sampled or grid
            left = (steps - run.step) * images / rate
            memory = peak_memory(run.device)
            yield TrainStep(run.step, steps, loss, lr, grad_norm, rate, left, memory, saved, sampled, warning)
        last = run.dir / "checkpoints" / checkpoint.step_name(run.step)
        seconds = time.perf_counter() - begin
        yield TrainSummary(run.dir, last, grid, run.step, first_step, loss, seconds, peak_memory(run.device), skipped)
    except OSError as error:
        raise files.storage_error(error, f"writing {run.dir}") from error
    finally:
        if metrics is not None:
            metrics.close()
