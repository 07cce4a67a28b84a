"""How much memory training takes, found by a step with tensors that have shapes and no numbers."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana_cli.adapters import attach, changes_from
from sana_cli.config.keys import Architecture, Config, ObjectiveConfig, OptimConfig
from sana_cli.dataset.match import open_held_out
from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.trainset import Mixture
from sana_cli.errors import SanaError
from sana_cli.kernels import arithmetic_as_asked
from sana_cli.model import SanaTransformer, build
from sana_cli.runtime.device import (
    MAX_KEPT_BLOCK,
    autocast,
    has_native_bf16,
    mkl_keeps_to_avx2,
    resident_memory,
)
from sana_cli.sampling.pictures import prompt_rows
from sana_cli.sampling.sampler import MOST_IMAGES, SHARE_OF_FREE_MEMORY
from sana_cli.training.initial import find_base_model
from sana_cli.training.objective import LOSS, Draws, MicroBatch, RectifiedFlow, total
from sana_cli.training.optim import Optimizer, optimizer_bytes
from sana_cli.training.prompts import GRID_SHAPES
from sana_cli.training.task import make_objective, what_moves
from sana_cli.training.trainable import Trainable, WeightAverage
from sana_cli.training.trainer import Placement
from sana_cli.weights.checkpoint import adapter_parameters, transformer_path

# what is no tensor, measured on CPUs by benchmarks/memory.py
MAPPED = 1 << 21  # bytes of a file that become resident where any are read: Linux maps up to a huge page
KERNELS = 35 << 20  # bytes of what oneDNN compiles where it multiplies; `runtime.device` limits how many
HOLES = {"fp32": 0.25, "bf16": 0.5}  # of activations: holes in the heap, split by small tensors


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, in one process. Shared memory (`dataset`, mapped from its files) counts too."""

    program: int  # Python and its libraries; 0 on CUDA, whose own memory holds tensors only
    weights: int
    teacher: int  # of a distillation
    gradients: int
    average: int  # 0 where it lies in the machine's memory and not in the device's
    optimizer: int
    activations: int  # of a micro-batch, and what its operations and the optimizer's need
    dataset: int
    overhead: int = (
        0  # on a CPU: what malloc holds between tensors and cannot give them, and oneDNN's kernels
    )

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


class _Peak(TorchDispatchMode):
    """The most bytes that tensors made under it hold at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.largest = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # one made before, of which the result may be a view
                self._known.add(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        self.live += size
        self.peak = max(self.peak, self.live)
        if size <= MAX_KEPT_BLOCK:
            self.largest = max(self.largest, size)  # of those that lie in the heap
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.live -= size


_NONE = Draws()


def _batch(
    model: Architecture, images: int, side: tuple[int, int], tokens: int, draws: Draws = _NONE
) -> MicroBatch:
    """A batch of these sizes, with a caption of its own for each image."""
    sample = torch.empty(images, model.in_channels, *side)
    captions = images + draws.null_caption
    return MicroBatch(
        rows=np.arange(images),
        x_0=sample,
        noise=torch.empty_like(sample),
        sigma=torch.empty(images),
        states=torch.empty(captions, tokens, model.caption_channels),
        mask=torch.ones(captions, tokens, dtype=torch.bool),
        caption_index=torch.arange(images),
        step=0,
        noises=torch.empty(images, draws.noises, *sample.shape[1:]),
        uniforms=torch.empty(images, draws.uniforms),
        normals=torch.empty(images, draws.normals),
        null_index=torch.zeros(1, dtype=torch.int64),
    )


def program_memory(model: Architecture, config: Config, precision: str) -> int:
    """Bytes of this process once it has trained: Python, its libraries, and what they load at first use.

    Trains a minimal model for one real step.
    """
    least: dict[str, Any] = {
        "num_layers": 1,
        "num_attention_heads": 1,
        "num_cross_attention_heads": 1,
        "attention_head_dim": 8,
    }
    least |= {"cross_attention_head_dim": 8, "sample_size": model.patch_size, "caption_channels": 8}
    least |= {"interpolation_scale": None, "guidance_embeds": False}
    small = build(model.model_copy(update=least), seed=0)
    optimizer = Optimizer(dict(small.named_parameters()), config.optim, torch.device("cpu"))
    average = WeightAverage(small, Trainable())
    objective = RectifiedFlow(ObjectiveConfig(), small.config.timestep_scale, precision)
    batch = _batch(small.config, 1, (model.patch_size, model.patch_size), 1)
    objective.losses(small, batch)[LOSS].sum().backward()
    optimizer.step(0.0)
    average.update(0.0)
    return resident_memory()


def training_memory(
    model: Architecture,
    config: Config,
    train_set: Mixture,
    placement: Placement,
    drawn: int,
    available: int | None = None,
    teacher: Architecture | None = None,
) -> Memory:
    """What one process needs to train.

    Args:
        model: the architecture.
        config: its `optim`, `adapter`, `train` and batch.
        train_set: what is read, which stays mapped.
        placement: device, precision and processes.
        drawn: images of a sample grid, at most, which are sampled at once where there is room.
        available: bytes that the device has for this process; None: as many as it takes.
        teacher: of a distillation.
    """
    train, optim, device = config.train, config.optim, placement.device
    datasets = [part.dataset for part in train_set.parts]
    (_, *side), (_, *sampled_side) = train_set.shapes[0], next(iter(datasets[0].shapes))  # the largest
    cells = min(drawn, MOST_IMAGES, _grid_cells(config, datasets[0]))
    cells = -(-cells // min(GRID_SHAPES, len(datasets[0].shapes)))  # images of one shape are drawn at once
    tokens = max(dataset.longest_caption() for dataset in datasets)
    in_step = train.batch_size * train.accumulate
    has_rounds = train.accumulate > 1 or (len(train_set.shapes) > 1 and in_step > 1)
    program = 0 if device.type == "cuda" else program_memory(model, config, placement.precision)
    as_asked = nullcontext() if device.type == "cpu" else arithmetic_as_asked()
    adapters = adapter_parameters(model, config.adapter) if config.adapter.on else {}
    # as if on a CPU: the operations and their results are the same elsewhere
    with FakeTensorMode(), as_asked:
        fake = _model(model, config, adapters, placement)
        taught = None if teacher is None else _frozen(teacher, placement, train.activation_checkpointing)
        objective = make_objective(config, model, placement.precision, taught)
        objective.use_average(fake)
        learned = nn.ModuleDict(objective.modules).named_parameters()
        moving = {name: p for name, p in (*fake.named_parameters(), *learned) if p.requires_grad}
        batch = _batch(model, train.batch_size, (side[0], side[1]), tokens, objective.draws)
        peak = _Peak()
        with peak, torch.autocast("cpu", enabled=False):  # casts are kept for a step, as in training
            for _ in range(1 + has_rounds):  # the second begins with gradients
                total(objective.losses(fake, batch)).sum().backward()
        moved = _bytes(moving.values())
        of_gradients = peak.peak - moved
        for parameter in moving.values():
            parameter.grad = None
        of_step = _step_peak(moving, optim)

        def sampled(images: int) -> int:
            plain = _batch(model, 2 * images, (sampled_side[0], sampled_side[1]), tokens)
            guidance = plain.sigma if model.guidance_embeds else None
            with _Peak() as sampling, torch.no_grad(), autocast(torch.device("cpu"), placement.precision):
                captions = fake.captions(plain.states, plain.mask, plain.caption_index)
                fake(plain.x_0, captions, plain.sigma, guidance)
            return sampling.peak

        of_one, of_all = sampled(1), sampled(cells)
    shards = placement.world.size if train.parallel == "fsdp" else 1
    weights = _bytes(fake.parameters())
    of_teacher = 0 if taught is None else _bytes(taught.parameters())
    average = 4 * sum(p.numel() for p in moving.values()) if optim.ema_decay is not None else 0
    in_use = 0
    if optim.ema_device == "cpu" and device.type != "cpu":
        in_use, average = (moved if average else 0), 0  # while samples are drawn, without gradients
    copy = moved if placement.world.size > 1 and shards == 1 else 0  # DDP's buckets
    whole = weights if shards > 1 else 0  # rank 0 samples with all weights
    epochs = train.steps * in_step / train_set.images_per_epoch
    read = sum(_mapped(part.dataset, epochs * float(part.images)) for part in train_set.parts)
    held_out = None if device.type == "cuda" else open_held_out(config, datasets[0])
    read += 0 if held_out is None else _mapped(held_out, config.log.held_out_images)
    bf16 = device.type == "cpu" and placement.precision == "bf16" and has_native_bf16(device)
    held = Memory(
        program=program,
        weights=weights // shards,
        teacher=of_teacher // shards,
        gradients=moved // shards + copy,
        average=average // shards,
        optimizer=optimizer_bytes(moving.items(), optim) // shards,
        activations=0,
        dataset=0 if device.type == "cuda" else read,
        overhead=KERNELS if bf16 or (device.type == "cpu" and mkl_keeps_to_avx2()) else 0,
    )
    room = of_all if available is None else int(SHARE_OF_FREE_MEMORY * max(0, available - held.total))
    of_samples = max(of_one, min(of_all, room)) + in_use + whole - moved
    of_files = 0 if device.type == "cuda" else _base_bytes(config)  # mapped while the models are made
    of_loading = of_files - held.gradients - held.optimizer - held.overhead - held.dataset
    of_training = max(of_gradients, of_samples, of_step, 0)
    holes = 0
    if device.type == "cpu":
        holes = int(HOLES["bf16" if bf16 else "fp32"] * of_training)
        if train.activation_checkpointing:  # the input of each block is kept, in a hole of the block before
            holes += model.num_layers * peak.largest
    activations = max(of_training, of_loading - holes)
    return replace(held, activations=activations, overhead=held.overhead + holes)


def _grid_cells(config: Config, dataset: Dataset) -> int:
    """How many cells the sample grid has, at most; `prompts.encode_prompts` chooses them."""
    if config.sample.prompts is None:
        return max(1, dataset.index.counts.captions - 1)  # without the null caption
    return sum(map(len, prompt_rows(config.sample.prompts, dataset.index.one_word_captions)))


def _mapped(dataset: Dataset, images: float) -> int:
    """Bytes of a dataset's files that are resident once so many images have been read, in any order."""
    each = max(MAPPED, dataset.bytes / len(dataset))
    return int(min(dataset.bytes, images * each))


def _base_bytes(config: Config) -> int:
    """Size of the files that a run begins with: a base, or a teacher; 0 if there are none."""
    path = config.distill.teacher if config.distill.on else config.train.init_from
    with suppress(SanaError, OSError):
        if path is not None:
            weights = transformer_path(find_base_model(Path(path)))
            inside = [weights] if weights.is_file() else list(weights.glob("*.safetensors"))
            return sum(file.stat().st_size for file in inside)
    return 0


def _model(
    model: Architecture, config: Config, adapters: Mapping[str, Tensor], placement: Placement
) -> SanaTransformer:
    """A model whose parameters have the types and the adapters that training gives them."""
    fake = SanaTransformer(model)
    trainable = what_moves(config)
    if config.adapter.on:
        if placement.precision == "bf16" and has_native_bf16(placement.device):
            Trainable().to_bf16(fake)  # frozen matrices
        tensors = {name: torch.empty(tensor.shape) for name, tensor in adapters.items()}
        attach(fake, changes_from(tensors, scale=1.0), config.adapter.dropout)
    trainable.freeze_others(fake)
    if config.train.weights == "bf16":
        trainable.to_bf16(fake)
    fake.train().activation_checkpointing = config.train.activation_checkpointing
    return fake


def _frozen(teacher: Architecture, placement: Placement, activation_checkpointing: bool) -> SanaTransformer:
    """A model that does not move, in the types that training gives it."""
    fake = SanaTransformer(teacher).requires_grad_(False)
    fake.activation_checkpointing = activation_checkpointing
    if placement.precision == "bf16" and has_native_bf16(placement.device):
        Trainable().to_bf16(fake)
    return fake


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _step_peak(moving: Mapping[str, nn.Parameter], optim: OptimConfig) -> int:
    """Bytes that an optimizer step takes beside state and gradients: parameters move one after another."""
    name, largest = max(moving.items(), key=lambda item: item[1].numel())
    optimizer = Optimizer({name: largest}, optim, torch.device("cpu"))
    largest.grad = torch.empty_like(largest)
    optimizer.step(0.0)  # makes the state
    largest.grad = torch.empty_like(largest)
    with _Peak() as peak:
        optimizer.step(0.0)
    largest.grad = None
    return peak.peak


# --- what would fit ---------------------------------------------------------------------------


def smaller(config: Config, device: torch.device) -> Iterator[Config]:
    """A config with changes that take less memory, mildest first, each with those before it."""
    train, optim = config.train, config.optim
    if not train.activation_checkpointing:
        config = _but(config, train={"activation_checkpointing": True})
        yield config
    if train.batch_size > 1:
        images = train.batch_size * train.accumulate
        config = _but(config, train={"batch_size": 1, "accumulate": images})
        yield config
    uses_average = config.distill.on and config.distill.method == "consistency"
    if train.parallel == "ddp" and device.type != "cpu" and optim.ema_decay is not None and not uses_average:
        config = _but(config, optim={"ema_device": "cpu"})
        yield config
    if config.adapter.on:
        return
    needs_fp32 = config.distill.on and config.distill.method == "scm"
    if train.parallel == "ddp" and train.precision != "fp32" and has_native_bf16(device) and not needs_fp32:
        yield _but(config, train={"weights": "bf16"}, optim={"optimizer": "came"})
    if train.init_from is not None and train.weights == "fp32":
        yield _but(config, adapter={"kind": "lora"})


def _but(config: Config, **sections: Mapping[str, Any]) -> Config:
    changed = {name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()}
    return config.model_copy(update=changed)
