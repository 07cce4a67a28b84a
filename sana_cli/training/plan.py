"""What a training run would do: sizes, time and memory, found on the meta device and without writing."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sana_cli.choices import PredictionType
from sana_cli.config.document import yaml_value
from sana_cli.config.keys import Architecture, Config
from sana_cli.dataset.match import check_matches, resolve_architecture
from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.trainset import Mixture
from sana_cli.errors import SanaError
from sana_cli.model import build
from sana_cli.runtime.device import (
    free_memory,
    has_native_bf16,
    resident_memory,
    resolve_device,
    resolve_precision,
)
from sana_cli.runtime.distributed import World
from sana_cli.runtime.launch import launch
from sana_cli.training import metrics
from sana_cli.training.compiling import missing_compiler
from sana_cli.training.initial import check_student
from sana_cli.training.optim import optimizer_bytes
from sana_cli.training.prompts import GRID_CAPTIONS
from sana_cli.training.task import make_train_set
from sana_cli.training.trainable import Trainable
from sana_cli.training.trainer import Placement, adds_too_many_in_bf16, check_micro_batches
from sana_cli.units import human_bytes
from sana_cli.weights.checkpoint import adapter_parameters, parameter_count
from sana_cli.weights.stored import StoredWeights


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one process is expected to hold at its peak, and of what."""

    total: int
    parts: Mapping[str, int]
    available: int | None  # on the device; None: unknown
    advice: str | None  # what would fit, where this does not


@dataclass(frozen=True)
class TrainPlan:
    """What `train` would do."""

    run: Path
    dataset: Path
    images: int  # of an epoch
    held_out: Path | None
    held_out_images: int
    steps: int
    processes: int
    micro_batch: int  # images that a process takes at once
    micro_batches: int  # of a step, in each process
    batch: int  # images of a step, over all of them
    epochs: float
    parameters: int
    trained: int  # of them, or of adapters beside them
    device: str
    precision: str
    precision_reason: str
    checkpoint_bytes: int  # of one
    disk_bytes: int  # of those that are kept, and the next while it is written
    disk_free: int
    model: Architecture
    prediction_type: PredictionType
    memory: MemoryPlan | None = None  # only where asked for: it takes seconds to find

    def with_images(self, images: int) -> "TrainPlan":
        """The plan of a run that goes on with so many images a step, however they are cut now."""
        rounds = -(-images // (self.micro_batch * self.processes))
        return replace(self, batch=images, micro_batches=rounds, epochs=self.steps * images / self.images)


def choose_device(config: Config) -> torch.device:
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
        raise SanaError(
            f"run.device: {device} is one GPU, and torchrun started {launch().size} processes",
            "use run.device=cuda",
        )
    if not launch().says_local_rank and torch.cuda.device_count() > 1:
        raise SanaError(
            "LOCAL_RANK is not in the environment, so all processes of this machine would share one GPU",
            "start with torchrun, or let the launcher set it to the number of the process on its machine",
        )
    return resolve_device(f"cuda:{launch().local_rank}")


def make_plan(
    config: Config,
    dataset: Dataset,
    held_out: Dataset | None,
    with_memory: bool,
    teacher: StoredWeights | None = None,
) -> TrainPlan:
    """The plan of a run that begins. Memory is with the `teacher` of a distillation.

    Raises:
        SanaError: the dataset or the teacher is not the config's, or the device, TensorBoard or precision cannot be had,
            or a step has too many micro-batches for bf16 gradients.
    """
    train = config.train
    check_matches(config, dataset)
    if config.model.dropout:
        raise SanaError("model.dropout: models are trained without dropout here", "set it to 0", exit_code=2)
    model = resolve_architecture(config, dataset)
    if teacher is not None:
        check_student(config, teacher, model)
    if config.log.tensorboard:
        metrics.check_tensorboard()
    device = choose_device(config)
    precision, native = resolve_precision(train.precision, device), has_native_bf16(device)
    _check_bf16(config, device, precision)
    if train.compile is True and (missing := missing_compiler(device)) is not None:
        raise SanaError(
            f"train.compile: this machine lacks {missing}", "install it, or use train.compile=auto"
        )
    reason = (
        f"{device.type} {'has' if native else 'lacks'} native bf16"
        if train.precision == "auto"
        else "as asked"
    )
    empty = build(model, seed=None)
    parameters = parameter_count(empty.parameters())
    processes = launch().size
    batch = train.batch_size * train.accumulate * processes
    train_set = make_train_set(config, dataset)
    each = train_set.images_per_epoch
    check_micro_batches(train, batch, len(train_set.shapes), processes)
    one = _checkpoint_bytes(config, model)
    placement = Placement(device, precision, World(launch().rank, processes))
    existing = next(
        path for path in (config.run.dir.absolute(), *config.run.dir.absolute().parents) if path.exists()
    )
    return TrainPlan(
        run=config.run.dir,
        dataset=config.data.dir,
        images=max(1, round(each)),
        held_out=None if held_out is None else held_out.directory,
        held_out_images=0 if held_out is None else min(config.log.held_out_images, len(held_out)),
        steps=train.steps,
        processes=processes,
        micro_batch=train.batch_size,
        micro_batches=train.accumulate,
        batch=batch,
        epochs=train.steps * batch / each,
        parameters=parameters,
        trained=parameter_count(adapter_parameters(model, config.adapter).values())
        if config.adapter.on
        else parameters,
        device=str(device),
        precision=precision,
        precision_reason=reason,
        checkpoint_bytes=one,
        disk_bytes=one * (config.save.keep + 1),
        disk_free=shutil.disk_usage(existing).free,
        model=model,
        prediction_type=config.objective.prediction_type,
        memory=_memory(config, train_set, model, placement, None if teacher is None else teacher.model)
        if with_memory
        else None,
    )


def _check_bf16(config: Config, device: torch.device, precision: str) -> None:
    """Refuse bf16 weights where arithmetic would not be bf16, or would be emulated.

    Raises:
        SanaError: so it is.
    """
    if config.train.weights == "bf16" and not (precision == "bf16" and has_native_bf16(device)):
        raise SanaError(
            f"train.weights: bf16 needs a device with native bf16, and {device} has none",
            "use train.weights=fp32",
            exit_code=2,
        )


def _checkpoint_bytes(config: Config, model: Architecture) -> int:
    """The tensors of a checkpoint: what moves, its average in float32, and the optimizer's state."""
    moving: dict[str, Tensor]
    if config.adapter.on:
        moving = adapter_parameters(model, config.adapter)
    else:
        empty = build(model, seed=None)
        if config.train.weights == "bf16":
            Trainable().to_bf16(empty)
        moving = dict(empty.named_parameters())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in moving.values())
    average = 4 * parameter_count(moving.values())
    if config.adapter.on:
        average *= 2 if config.optim.ema_decay is not None else 1  # the file for diffusers has a copy
    elif config.optim.ema_decay is None:
        average = 0
    return weights + average + optimizer_bytes(moving.items(), config.optim)


def _memory(
    config: Config,
    train_set: Mixture,
    model: Architecture,
    placement: Placement,
    teacher: Architecture | None,
) -> MemoryPlan:
    from sana_cli.training import estimate  # slow to import, and training has no use for it

    device = placement.device
    available = free_memory(device)
    if available is not None and device.type != "cuda":
        available += resident_memory()  # the estimate counts what this process holds already

    def needed(config: Config) -> estimate.Memory:
        return estimate.training_memory(
            model, config, train_set, placement, GRID_CAPTIONS, available, teacher
        )

    memory = needed(config)
    advice = None
    if available is not None and memory.total > available:
        advice = f"more than the {human_bytes(available)} that {device} has free"
        for smaller in estimate.smaller(config, device):
            train, processes = smaller.train, placement.world.size
            images = train.batch_size * train.accumulate * processes
            if adds_too_many_in_bf16(train, images, len(train_set.shapes), processes):
                continue
            total = needed(smaller).total
            options = " ".join(f"--set {key}={value}" for key, value in _changes(config, smaller))
            if total <= available:
                advice += f"; {human_bytes(total)} would do with {options}"
                break
        else:
            advice += "; no setting makes it fit"
    return MemoryPlan(memory.total, vars(memory), available, advice)


def _changes(config: Config, other: Config) -> Iterator[tuple[str, str]]:
    """Keys whose values another config changes, with those, as `--set` takes them."""
    before = config.to_dict()
    for section, values in other.to_dict().items():
        for key, value in values.items():
            if value != before[section][key]:
                yield f"{section}.{key}", yaml_value(value)
