"""`sana train`: rectified flow on a pre-embedded dataset. A generator of steps; it prints nothing.

It gives a run its directory: what is saved, logged, drawn and resumed, and in which order. How weights move is
`trainer.py`'s matter. Under torchrun all processes run it, and the first alone writes.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana_cli import __version__
from sana_cli.autoencoder import Autoencoder
from sana_cli.config.keys import WARMUP_STEPS, Config, ModelConfig, differences
from sana_cli.dataset.layout import held_out_dir, is_dataset
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import Interrupted, SanaError
from sana_cli.model import SanaTransformer, build
from sana_cli.runtime import files, hub
from sana_cli.runtime.device import (
    has_native_bf16,
    is_out_of_memory,
    peak_memory,
    release_memory,
    resolve_device,
    resolve_precision,
)
from sana_cli.runtime.distributed import World, world
from sana_cli.runtime.launch import launch
from sana_cli.sampling import pictures, sampler
from sana_cli.text import as_of_today, asked_for, check_capitals, check_same_encoder, load_encoder, unseen_words, words_of
from sana_cli.training import metrics, report
from sana_cli.training.metrics import Losses
from sana_cli.training.optim import optimizer_numbers
from sana_cli.training.trainer import NotFiniteError, Place, Step, Trainer
from sana_cli.weights import checkpoint, configs
from sana_cli.weights.stored import check_tensors

# what may differ between a run and its resumption, beside the data, text, sample and run sections: the dataset is compared
# by its hash, and the images of a step by their number, however they are cut into micro-batches
MAY_CHANGE = {
    f"train.{key}"
    for key in [
        "steps",
        "log_every",
        "save_every",
        "keep",
        "sample_every",
        "init",
        "init_from",
        "held_out_every",
        "held_out_images",
        "tensorboard",
        "batch_size",
        "accumulate",
        "parallel",
        "activation_checkpointing",
        "compile",
    ]
}
GRID_CAPTIONS = 20  # captions of the dataset in a sample grid
MOST_WORDS = 20_000  # of all captions, that a checkpoint remembers; of more, it remembers none
ROWS_ASKED = 1000  # for the label that belongs to a caption


@dataclass(frozen=True)
class TrainOptions:
    """What to train. `stop` is asked before each micro-batch; a signal number from it ends the run, saved."""

    config: Config
    resume: str = "none"  # none, auto, or the path of a step folder
    stop: Callable[[], int | None] = lambda: None


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one process is expected to hold at its peak, and of what."""

    total: int
    parts: Mapping[str, int]


@dataclass(frozen=True)
class TrainPlan:
    """What `train` would do, found on the meta device and without writing."""

    run: Path
    dataset: Path
    images: int
    held_out: Path | None
    held_out_images: int
    steps: int
    processes: int
    micro_batch: int  # images that a process takes at once
    micro_batches: int  # of a step, in each process
    batch: int  # images of a step, over all of them
    epochs: float
    parameters: int
    device: str
    precision: str
    precision_reason: str
    checkpoint_bytes: int  # of one
    disk_bytes: int  # of those that are kept, and the next while it is written
    disk_free: int
    model: ModelConfig
    memory: MemoryPlan | None = None  # only where asked for: it takes seconds to find


@dataclass(frozen=True)
class TrainStart:
    """All is loaded, and nothing has been written yet."""

    plan: TrainPlan
    step: int  # that the run goes on after
    checkpoint: Path | None  # what it goes on from
    notes: tuple[str, ...]  # what a person should know: checkpoints passed over, and why; another cut into micro-batches


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
    data_wait: float  # share of the time in which training waited for images
    memory: int
    held_out_loss: float | None = None  # the latest
    saved: Path | None = None
    sampled: Path | None = None
    warning: str | None = None  # what went wrong beside training, which goes on


@dataclass(frozen=True)
class TrainSummary:
    """A finished run."""

    run: Path
    checkpoint: Path
    grid: Path | None
    report: Path | None
    steps: int
    first_step: int  # where this process began; `steps` if there was nothing left to do
    loss: float
    held_out_loss: float | None
    seconds: float
    peak_memory: int
    skipped: tuple[str, ...] = ()  # checkpoints that resuming passed over, and why


# --- planning ---------------------------------------------------------------------------------------------------------


def _check_dataset(config: Config, dataset: Dataset) -> ModelConfig:
    """The resolved model config, or a refusal that names the field in which dataset and config differ."""
    way_out = "embed it again with: sana embed --overwrite, or point data.dir at another"
    where = str(dataset.directory)
    check_same_encoder(dataset.index["encoder"], asked_for(config.text), where, way_out)
    check_capitals(dataset.index["encoder"], dataset.texts, where, way_out)
    if is_dataset(config.run.dir):
        raise SanaError(
            f"run.dir: {config.run.dir} is a dataset", "a run needs a directory of its own: --set run.dir=DIR", exit_code=2
        )
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


def _open_held_out(config: Config, dataset: Dataset) -> Dataset | None:
    """The held-out dataset, if there is to be one and it is there. It must have been embedded as the other was."""
    split = config.data.held_out
    if split is None or not is_dataset(held_out_dir(config.data.dir, split)):
        return None
    found = Dataset(held_out_dir(config.data.dir, split))
    for key in ("encoder", "image"):
        for field, theirs, ours in differences(found.index[key], dataset.index[key]):
            raise SanaError(
                f"data.held_out_split: {found.directory} has {key} {field} {theirs!r}, and {dataset.directory} has {ours!r}",
                "embed both again with: sana embed --overwrite, or set data.held_out_split=null",
            )
    return found


def _device(config: Config) -> torch.device:
    """Where this process computes: under torchrun, each process of a machine has a GPU of its own.

    Raises:
        SanaError: there is no such device, or not one for each process.
    """
    device = resolve_device(config.run.device)
    if launch().size == 1 or device.type == "cpu":
        return device
    if device.type == "mps":
        raise SanaError("run.device: MPS trains in one process", "leave torchrun out, or use run.device=cpu")
    if ":" in config.run.device:
        raise SanaError(f"run.device: {device} is one GPU, and torchrun started {launch().size} processes", "use run.device=cuda")
    return resolve_device(f"cuda:{launch().local_rank}")


def plan(options: TrainOptions) -> TrainPlan:
    """What would be done (`--dry-run`)."""
    dataset = Dataset(options.config.data.dir)
    return _plan(options.config, dataset, _open_held_out(options.config, dataset), with_memory=True)


def _plan(config: Config, dataset: Dataset, held_out: Dataset | None, with_memory: bool) -> TrainPlan:
    train = config.train
    model = _check_dataset(config, dataset)
    if train.tensorboard:
        metrics.check_tensorboard()
    device = _device(config)
    precision, native = resolve_precision(train.precision, device), has_native_bf16(device)
    reason = f"{device.type} {'has' if native else 'lacks'} native bf16" if train.precision == "auto" else "as asked"
    meta = build(model, seed=None)
    parameters = checkpoint.parameter_count(meta.parameters())
    processes = launch().size
    batch = train.batch_size * train.accumulate * processes
    moments = optimizer_numbers(meta, train)
    one = 4 * (2 * parameters + moments)  # float32: EMA, raw weights, what the optimizer remembers
    memory = _memory_plan(config, dataset, model, precision, device) if with_memory else None
    existing = next(path for path in (config.run.dir.absolute(), *config.run.dir.absolute().parents) if path.exists())
    return TrainPlan(
        run=config.run.dir,
        dataset=config.data.dir,
        images=len(dataset),
        held_out=None if held_out is None else held_out.directory,
        held_out_images=0 if held_out is None else min(train.held_out_images, len(held_out)),
        steps=train.steps,
        processes=processes,
        micro_batch=train.batch_size,
        micro_batches=train.accumulate,
        batch=batch,
        epochs=train.steps * batch / len(dataset),
        parameters=parameters,
        device=str(device),
        precision=precision,
        precision_reason=reason,
        checkpoint_bytes=one,
        disk_bytes=one * (train.keep + 1),
        disk_free=shutil.disk_usage(existing).free,
        model=model,
        memory=memory,
    )


def _memory_plan(config: Config, dataset: Dataset, model: ModelConfig, precision: str, device: torch.device) -> MemoryPlan:
    from sana_cli.training.estimate import training_memory

    read = min(1.0, config.train.steps * config.train.batch_size * config.train.accumulate / len(dataset))
    found = training_memory(
        model, config.train, dataset.image_shape[1:], dataset.longest_caption(), precision, device,
        launch().size, int(read * dataset.bytes), GRID_CAPTIONS,
    )  # fmt: skip
    return MemoryPlan(found.total, dict(vars(found)))


# --- resuming ---------------------------------------------------------------------------------------------------------


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
    if options.resume.lower() in ("latest", "last", "newest", "true", "yes", "on") and not Path(options.resume).exists():
        raise SanaError(f"--resume: {options.resume!r} is no checkpoint", "the newest of the run is --resume auto", exit_code=2)
    folder = checkpoint.find_checkpoint(Path(options.resume).expanduser())
    for _ in checkpoint.verify(folder, hashes=True):
        pass
    later = [path.name for path in there if checkpoint.step_of(path) > checkpoint.step_of(folder)]
    if later:
        raise SanaError(
            f"{run} has later checkpoints than {folder.name}: {', '.join(later)}",
            "continue into another run with --set run.dir=DIR, or remove them",
        )
    return folder, ()


@dataclass(frozen=True)
class _Saved:
    """The part of a step folder that only training needs."""

    folder: Path
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def images(self) -> int:
        """Of a step."""
        return int(self.state["samples_seen"]) // self.step


def _with_its_warmup(saved: _Saved, config: Config) -> Config:
    """The config of a run that goes on: where it leaves the warm-up to the number of steps, it keeps that which it began with."""
    if config.train.warmup_steps is not None:
        return config
    recorded = saved.state["config"]["train"].get("warmup_steps", WARMUP_STEPS)
    return config.model_copy(update={"train": config.train.model_copy(update={"warmup_steps": recorded})})


def _check_resumable(saved: _Saved, config: Config, dataset: Dataset, plan: TrainPlan) -> tuple[str, ...]:
    """Refuse another config, dataset or precision than the run's, field by field; say how else its steps are now cut."""
    recorded, now = saved.state["config"], config.to_dict()
    old, new = ({section: c[section] for section in ("model", "train")} for c in (recorded, now))
    train = config.train
    for section in old:  # a checkpoint of an earlier version has fewer keys: it was made with their defaults
        old[section] = type(getattr(config, section))().model_dump(mode="json") | old[section]
    wrong = [
        f"{key}: the run has {before!r}, not {after!r}" for key, before, after in differences(old, new) if key not in MAY_CHANGE
    ]
    if saved.state["dataset_sha256"] != dataset.index["sha256"]:
        wrong.append(f"data.dir: {dataset.directory} is not the dataset that the run was trained on")
    if saved.state["precision"] != plan.precision:
        wrong.append(f"train.precision: the run used {saved.state['precision']}, and here it would be {plan.precision}")
    cut = [key for key in ("batch_size", "accumulate") if old["train"][key] != new["train"][key]]
    if plan.batch != saved.images and cut:
        wrong.append(
            f"{', '.join(f'train.{key}' for key in cut)}: the run's steps have {saved.images} images, and "
            f"{train.batch_size} x {train.accumulate}{f' x {plan.processes} processes' * (plan.processes > 1)} are {plan.batch}"
        )
    if wrong:
        raise SanaError(f"{saved.folder} cannot be resumed with this config:", *wrong, "start another run with --set run.dir=DIR")
    if plan.batch == saved.images:
        return ()
    rounds = -(-saved.images // (train.batch_size * plan.processes))
    return (
        f"steps stay {saved.images} images, as the run began: {rounds} micro-batches of {train.batch_size} or fewer "
        f"in {plan.processes} process{'es' * (plan.processes > 1)}",
    )


# --- the run ----------------------------------------------------------------------------------------------------------


class _Run:
    """A run and its directory. `train` below is the order in which things happen."""

    def __init__(self, options: TrainOptions, here: World) -> None:
        config = options.config
        self.config, self.dir, self.stop, self.here = config, config.run.dir, options.stop, here
        with here.together():
            self.dataset = Dataset(config.data.dir)
            self.held_out = _open_held_out(config, self.dataset)
            self.plan = _plan(config, self.dataset, self.held_out, with_memory=False)
        self.notes: tuple[str, ...] = ()
        self.skipped: tuple[str, ...] = ()
        saved = None
        with here.together():
            if here.first:
                files.check_unlocked(self.dir)
                folder, self.skipped = _resume_from(options)
                self.notes += tuple(f"passed over: {reason}" for reason in self.skipped)
                saved = None if folder is None else str(folder)
        chosen = here.gather(saved)[0]
        with here.together():
            self.saved = None if chosen is None else _Saved(Path(chosen), checkpoint.read_state(Path(chosen)))
            if self.saved is not None:
                config = self.config = _with_its_warmup(self.saved, config)
                self.notes += _check_resumable(self.saved, config, self.dataset, self.plan)
                batch = self.saved.images
                rounds = -(-batch // (config.train.batch_size * here.size))
                self.plan = replace(
                    self.plan, batch=batch, micro_batches=rounds, epochs=config.train.steps * batch / len(self.dataset)
                )
        seen = here.gather([self.dataset.index["sha256"], self.saved and self.saved.state])
        if any(one != seen[0] for one in seen):
            raise SanaError(
                "the processes do not see the same files: data.dir and run.dir must be on a disk that all machines share"
            )
        split = config.data.held_out
        if split is not None and self.held_out is None:
            self.notes += (
                f"no held-out loss: there is no {held_out_dir(config.data.dir, split)} (sana embed makes it; data.held_out_split)",
            )
        self.window, self.last = Losses(), {"lr": 0.0, "grad_norm": 0.0}
        self.held_out_loss: float | None = None
        self.trainer = self._load()
        self.first_step = self.saved_step = self.trainer.step
        self.grid: Path | None = None
        self.saved_in: Path | None = None if self.saved is None else self.saved.folder

    def _load(self) -> Trainer:
        saved, weights, average, optimizer = self.saved, None, None, {}
        with self.here.together():
            if saved is not None:
                meta = build(self.plan.model, seed=None)
                weights = files.read_tensors(saved.folder / checkpoint.RAW_WEIGHTS)
                average = files.read_tensors(saved.folder / "transformer" / configs.WEIGHTS)
                optimizer = files.read_tensors(saved.folder / checkpoint.OPTIMIZER)
                for name, tensors in ((checkpoint.RAW_WEIGHTS, weights), (Path("transformer") / configs.WEIGHTS, average)):
                    check_tensors(tensors, meta, saved.folder / name, "this config")
            elif self.config.train.init_from is not None:
                weights = self._foreign_weights(self.config.train.init_from)
        place = Place(torch.device(self.plan.device), self.plan.precision, self.here)
        trainer = Trainer(
            self.plan.model, self.config.train, place, self.dataset, self.plan.batch, self.held_out, weights, average
        )
        if saved is not None:
            trainer.resume(optimizer, saved.step)
            self.window = Losses.from_state(saved.state.get("window", {}))
            self.last = dict(saved.state.get("last", self.last))
        return trainer

    def _foreign_weights(self, path: Path) -> dict[str, Tensor]:
        """The weights of another SANA, of any format.

        Raises:
            SanaError: it has another architecture, or means something else by time, than this config; names each field.
        """
        source = checkpoint.load_transformer(path)
        theirs, ours = source.config.model_dump(), self.plan.model.model_dump()
        free = {"dropout"} | ({"sample_size"} if self.plan.model.interpolation_scale is None else set())
        wrong = [f"model.{key}: it has {old!r}, not {new!r}" for key, old, new in differences(theirs, ours) if key not in free]
        if wrong:
            raise SanaError(f"train.init_from: {path} is not the model of this config:", *wrong, "set these as it has them")
        return source.state_dict()

    def due(self, every: int) -> bool:
        """Whether something that is done `every` so many steps, and at the end, is to be done after this one."""
        step = self.trainer.step
        return step % every == 0 or step == self.config.train.steps

    # -- numbers

    def count(self, step: Step) -> None:
        """Take an optimizer step into the next line of the metrics."""
        self.window.add(step.losses.tolist(), step.sigma.tolist())
        self.last = {"lr": step.lr, "grad_norm": step.grad_norm}

    def metrics_line(self) -> dict[str, Any] | None:
        """The line of this step, if one is due and not written yet. The held-out loss may be part of it.

        Raises:
            Interrupted: while the held-out loss was taken; the line is owed.
        """
        train = self.config.train
        evaluate = self.held_out is not None and self.due(train.held_out_every)
        if not self.window.images or not (self.due(train.log_every) or evaluate):
            return None
        line: dict[str, Any] = {"step": self.trainer.step, "loss": self.window.mean, **self.last}
        line["sigma_bins"] = self.window.bins()
        if evaluate:
            found = self.trainer.evaluate(self.stop)
            self.held_out_loss = found.mean
            line |= {"held_out_loss": found.mean, "held_out_sigma_bins": found.bins()}
        self.window = Losses()
        return line

    # -- pictures

    def encode_prompts(self) -> None:
        """The grid that is drawn again and again, and its caption states. The encoder, where needed, is freed at once."""
        texts = {text: caption_id for caption_id, text in enumerate(self.dataset.texts())}
        sample, one_word = self.config.sample, bool(self.dataset.index["one_word_captions"])
        if sample.prompts is not None:
            rows = pictures.prompt_rows(sample.prompts, one_word)
        else:
            captions = self._captions_in_order(texts)
            captions = captions[:: max(1, len(captions) // GRID_CAPTIONS)][:GRID_CAPTIONS]
            rows = [tuple(captions[at : at + 10]) for at in range(0, len(captions), 10)]
        self.encoder_record = dict(as_of_today(self.dataset.index["encoder"], texts))
        words = {word for text in texts for word in words_of(text)}
        self.words = sorted(words) if len(words) <= MOST_WORDS else None
        self.cells = pictures.grid_cells(rows, 1, sample.seed)
        prompts = [cell.prompt for row in self.cells for cell in row]
        states = {prompt: self.dataset.states([texts[prompt]])[0] for prompt in prompts if prompt in texts}
        unknown = [prompt for prompt in prompts if prompt not in texts]
        if unseen := unseen_words(unknown, words):
            self.notes += (f"sample.prompts: words that no caption of the dataset has: {' '.join(unseen)}",)
        if unknown:
            device = self.trainer.place.device
            encoder = load_encoder(self.config.text, device)
            check_same_encoder(
                self.encoder_record, encoder.fingerprint, str(self.dataset.directory), "embed it again: sana embed --overwrite"
            )
            cut = [prompt for prompt in unknown if encoder.is_cut(prompt)]
            if cut:
                self.notes += (f"sample.prompts: {len(cut)} are longer than text.max_length, and are cut there: {cut[0]!r:.60}",)
            states |= dict(encoder.encode(unknown))
            del encoder
            release_memory(device)
        self.states = [states[prompt] for prompt in prompts]
        self.null_caption = self.dataset.states([self.dataset.index["null_caption"]])[0]

    def _captions_in_order(self, texts: Mapping[str, int]) -> list[str]:
        """Numbers first, then by label where images have labels: 0, 1, ..., zero, one, ...; else as they came."""
        label_of: dict[int, int] = {}
        labels = self.dataset.labels()
        if labels is not None:
            rows = np.arange(min(len(self.dataset), ROWS_ASKED))
            for caption_ids, label in zip(self.dataset.caption_ids(rows), labels.tolist(), strict=False):
                for caption_id in caption_ids:
                    label_of.setdefault(caption_id, label)
        last = len(texts)
        return sorted(filter(None, texts), key=lambda text: (not text.isdecimal(), label_of.get(texts[text], last), texts[text]))

    @property
    def grid_path(self) -> Path:
        """Where the grid of this step lies."""
        return self.dir / "samples" / f"{checkpoint.step_name(self.trainer.step)}.png"

    def _newest_grid(self) -> tuple[int, Path] | None:
        """The highest step so far that has learned something, and its grid. A step is saved before it is drawn, so not its own."""
        return max((grid for grid in report.grids(self.dir) if 0 < grid[0] <= self.trainer.step), default=None)

    def grid_due(self) -> bool:
        """Whether to draw now: after resuming, only a grid that a stop cut short."""
        if not self.due(self.config.train.sample_every):
            return False
        resumed_here = self.saved is not None and self.trainer.step == self.first_step
        return not (resumed_here and self.here.gather(self.grid_path.is_file())[0])

    def try_sample(self) -> tuple[Path | None, str | None]:
        """Draw the grid of this step, or say why it could not be done: a picture is not worth a run."""
        model = self._model_to_draw_with()
        if not self.here.first:
            return None, None
        try:
            self.grid = self._sample(model) or self.grid
            return self.grid, None
        except (SanaError, OSError, RuntimeError) as error:
            release_memory(self.trainer.place.device)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return None, f"no samples at step {self.trainer.step}: {reason}"

    def _model_to_draw_with(self) -> SanaTransformer:
        """The average: as it is, or where it is sharded, put together at the first process, which draws alone."""
        average = self.trainer.average.model
        if self.here.size == 1 or self.config.train.parallel == "ddp":
            return average
        weights = self.trainer.average_weights()
        model = build(self.plan.model, seed=None)
        if self.here.first:
            model.load_state_dict({k: w.to(self.trainer.place.device) for k, w in weights.items()}, assign=True)
        return model.eval()

    def _sample(self, model: SanaTransformer) -> Path | None:
        """The grid with the weights to use, into `samples/`; None if the run was asked to stop meanwhile."""
        seeds = [cell.seed for row in self.cells for cell in row]
        settings, shape, place = self.config.sample, self.dataset.image_shape, self.trainer.place
        nulls = [self.null_caption] * len(self.states)
        drawn = []
        for step in sampler.sample_images(model, self.states, nulls, seeds, shape, settings, place.precision):
            drawn.append(step)
            if self.stop():
                return None
        images = sampler.final_images(drawn)
        if self.config.data.autoencoder is not None:  # loaded for the picture alone, and freed
            images = torch.cat(list(Autoencoder(self.config.data.autoencoder, place.device).decode(images)))
            release_memory(place.device)
        path = self.grid_path
        record = pictures.grid_record(self.cells, settings, f"{self.dir.name}/{path.stem}")
        pictures.save_picture(pictures.grid(sampler.to_pixels(images), self.cells), path, record)
        return path

    def try_report(self) -> str | None:
        """Bring report.html up to date, or say why it could not be done."""
        try:
            report.write(self.dir, self.plan.model)
            return None
        except (SanaError, OSError, ValueError) as error:
            return f"no report at step {self.trainer.step}: {str(error).splitlines()[0]}"

    # -- files

    def save(self) -> Path:
        """A checkpoint of this step, written by the first process."""
        trainer, train, step = self.trainer, self.config.train, self.trainer.step
        raw, average, optimizer = trainer.weights(), trainer.average_weights(), trainer.optimizer_state()
        self.saved_step = step
        self.saved_in = self.dir / "checkpoints" / checkpoint.step_name(step)
        if not self.here.first:
            return self.saved_in
        config = self.config.to_dict()
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        del config["train"]["init_from"]  # a path, which means nothing elsewhere
        config["train"]["warmup_steps"] = train.warmup  # which a longer run that goes on from here keeps
        index = self.dataset.index
        dataset = {"sha256": index["sha256"], "images": len(self.dataset)}
        record = {
            "version": checkpoint.RECORD_VERSION,
            "made_by": f"sana {__version__}",
            "step": step,
            "parameters": self.plan.parameters,
            "encoder": self.encoder_record,
            "one_word_captions": index["one_word_captions"],
            "example_captions": [text for text in self.dataset.texts()[: GRID_CAPTIONS + 1] if text],
            **({} if self.words is None else {"words": self.words}),
            "image": index["image"],
            "autoencoder": index["image"].get("autoencoder"),
            "precision": self.plan.precision,
            "sample": config["sample"],
            "dataset": dataset,
        }
        state = {
            "step": step,
            "samples_seen": step * self.plan.batch,
            "precision": self.plan.precision,
            "dataset_sha256": dataset["sha256"],
            "window": self.window.state(),
            "last": self.last,
            "config": {section: config[section] for section in ("model", "train", "sample")},
        }
        samples = self._newest_grid()
        whole = checkpoint.Checkpoint(
            step=step,
            weights=average,
            raw_weights=raw,
            optimizer=optimizer,
            state=state,
            model=self.plan.model,
            sample=self.config.sample,
            record=record,
            null_caption=self.null_caption,
            card=_card(record, self.plan.batch, samples, self.plan.model.prediction_type),
            samples=None if samples is None else samples[1],
            config_sha256=digest,
        )
        return checkpoint.save_checkpoint(self.dir, whole, train.keep)


def _card(record: Mapping[str, Any], batch: int, samples: tuple[int, Path] | None, prediction_type: str) -> str:
    """The model card of a step folder."""
    image, shown = record["image"], ""
    predicts = "its output is the data that it foresees" if prediction_type == "sample" else "its output is noise - data"
    if samples is not None:
        step, _ = samples
        shown = f"![Samples at step {step:,}, by prompt]({checkpoint.SAMPLES})\n\nDrawn at step {step:,}.\n\n"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [sana, flow-matching]
---
# A SANA of {record["parameters"]:,} parameters

{shown}Trained from a pre-embedded dataset of {record["dataset"]["images"]:,} images, {image["channels"]} x {image["height"]} x {image["width"]},
for {record["step"]:,} steps of {batch} with rectified flow. Captions are encoded by
`{record["encoder"]["encoder"]}`; `sana.json` has every setting. Made by {record["made_by"]}.

    sana sample --checkpoint . {" ".join(json.dumps(caption) for caption in record["example_captions"][:3])}

The transformer alone, with diffusers ({predicts}; `timestep = 1000 sigma`):

    from diffusers import SanaTransformer2DModel
    transformer = SanaTransformer2DModel.from_pretrained(".", subfolder="transformer")
"""


# --- the order of things ----------------------------------------------------------------------------------------------


def train(options: TrainOptions) -> Iterator[TrainStart | TrainStep | TrainSummary]:
    """Train; yields a `TrainStart`, a `TrainStep` for each step, and at the end a `TrainSummary`.

    Until `TrainStart` nothing has been written, and it does no harm to stop it by an exception. Every process of several yields
    alike; the first alone writes.

    Raises:
        Interrupted: `options.stop` said so; the last whole step has been saved.
        SanaError: no dataset, another dataset than the config's, a run directory in use, a number that is not finite, or
            a disk that fails. The checkpoints that were there stay.
    """
    begin = time.perf_counter()
    with world(cuda=launch().size > 1 and _device(options.config).type == "cuda") as here:
        run = _Run(options, here)
        with here.together():
            if here.first:
                run.encode_prompts()
        yield TrainStart(run.plan, run.first_step, run.saved_in, run.notes)
        log, held, writes = None, ExitStack(), here.first and run.first_step < options.config.train.steps
        try:
            with here.together():
                if writes:
                    held.enter_context(files.locked(run.dir))
            if writes:
                (run.dir / "checkpoints").mkdir(parents=True, exist_ok=True)
                files.write_text(run.dir / "config.yaml", options.config.to_yaml())
                log = metrics.Log(run.dir, run.first_step, options.config.train.tensorboard)
            loss = math.nan
            for step in _steps(run, log):
                loss = step.loss
                yield step
        except OSError as error:
            raise files.storage_error(error, f"writing {run.dir}") from error
        finally:
            run.trainer.close()
            if log is not None:
                log.close()
            held.close()
        yield _summary(run, loss, time.perf_counter() - begin)


def _summary(run: _Run, loss: float, seconds: float) -> TrainSummary:
    assert run.saved_in is not None, "a finished run has a checkpoint"
    page = run.dir / report.REPORT
    return TrainSummary(
        run.dir, run.saved_in, run.grid, page if page.is_file() else None, run.trainer.step, run.first_step, loss,
        run.held_out_loss, seconds, peak_memory(run.trainer.place.device), run.skipped,
    )  # fmt: skip


def _steps(run: _Run, log: metrics.Log | None) -> Iterator[TrainStep]:
    """Steps to the end. After each, and before the first: its line, its checkpoint, its grid, as they are due.

    What a stop cut short is done before the first step of the run that goes on.
    """
    train, trainer, device = run.config.train, run.trainer, run.trainer.place.device
    if run.first_step >= train.steps:
        return
    step: Step | None = None
    training = logged = waited = rate = 0.0  # seconds in steps: so far, and at the line before; seconds without data by then
    logged_step = trainer.step
    try:
        while True:
            line = run.metrics_line()
            since, wait = training - logged, trainer.reader.waited - waited
            if line is not None:
                if log is not None and since:
                    line["samples_per_second"] = (trainer.step - logged_step) * run.plan.batch / since
                    line["data_wait"] = wait / since
                    line["memory_bytes"] = peak_memory(device)
                if log is not None:
                    log.write(line)
                logged, logged_step, waited = training, trainer.step, trainer.reader.waited
            saved = sampled = warning = None
            if trainer.step != run.saved_step and run.due(train.save_every):
                saved = run.save()
            if run.grid_due():
                sampled, warning = run.try_sample()
                if run.here.first:
                    warning = warning or run.try_report()
                if sampled is not None and log is not None:
                    log.picture(sampled, trainer.step)
            left = (train.steps - trainer.step) * run.plan.batch / rate if rate else math.nan
            yield TrainStep(
                trainer.step, train.steps, math.nan if step is None else step.loss, run.last["lr"],
                math.nan if step is None else step.grad_norm, rate, left, wait / since if since else 0.0, peak_memory(device),
                run.held_out_loss, saved, sampled, warning,
            )  # fmt: skip
            if trainer.step >= train.steps:
                return
            clock = time.perf_counter()
            step = trainer.advance(run.stop)
            training += time.perf_counter() - clock
            run.count(step)
            rate = (trainer.step - run.first_step) * run.plan.batch / training
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SanaError(
            f"step {trainer.step + 1}: out of memory on {device}; the last checkpoint is whole",
            "lower train.batch_size and raise train.accumulate by as much (the step stays the same), or set",
            "train.activation_checkpointing=true, and go on with --resume auto; train.precision=bf16 takes less too, in another run",
        ) from error
    except NotFiniteError as error:
        if trainer.step > run.saved_step:
            run.save()
        lines = str(error).splitlines()
        again = (
            f"start another run from it: --set train.init_from={run.saved_in} --set run.dir=DIR --set train.lr={train.lr / 4:g}"
            if run.saved_in is not None
            else f"start again with another --set train.seed, or --set train.lr={train.lr / 4:g}"
        )
        stopped = NotFiniteError(*lines, *([f"step {trainer.step} is saved in {run.saved_in}"] if run.saved_in else []), again)
        stopped.told = not run.here.first
        raise stopped from error
    except Interrupted as interrupt:
        if trainer.step > run.saved_step:
            run.save()
        where = run.saved_in if run.saved_step == trainer.step else None
        ended = Interrupted(
            f"stopped after step {trainer.step}" + (f", which is saved in {where}" if where else "; nothing was saved yet"),
            "continue with: sana train --resume auto (and the same config)",
            exit_code=interrupt.exit_code,
        )
        ended.told = not run.here.first
        raise ended from None
