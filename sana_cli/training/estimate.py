"""How much memory training takes, found by a step with tensors that have shapes and no numbers."""

import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana_cli.config.keys import Architecture, Config
from sana_cli.dataset.reader import Dataset
from sana_cli.kernels import arithmetic_as_asked
from sana_cli.model import SanaTransformer, build
from sana_cli.runtime.device import resident_memory
from sana_cli.sampling.sampler import MOST_IMAGES
from sana_cli.training.objective import MicroBatch, Objective
from sana_cli.training.optim import Optimizer, optimizer_numbers
from sana_cli.training.task import make_objective
from sana_cli.training.trainable import Trainable, WeightAverage
from sana_cli.training.trainer import Placement
from sana_cli.weights.checkpoint import parameter_count


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, in one process. Shared memory (`dataset`, mapped from its files) counts too."""

    program: int  # Python and its libraries; 0 on CUDA, whose own memory holds tensors only
    weights: int
    gradients: int
    average: int
    optimizer: int
    activations: int  # of a micro-batch, and what its operations need
    dataset: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


class _Peak(TorchDispatchMode):
    """The most bytes that tensors made under it hold at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
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
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.live -= size


def _batch(model: Architecture, images: int, side: tuple[int, int], tokens: int) -> MicroBatch:
    """A batch of these sizes, with a caption of its own for each image."""
    sample = torch.empty(images, model.in_channels, *side)
    return MicroBatch(
        rows=np.arange(images),
        x_0=sample,
        noise=torch.empty_like(sample),
        sigma=torch.empty(images),
        states=torch.empty(images, tokens, model.caption_channels),
        mask=torch.ones(images, tokens, dtype=torch.bool),
        caption_index=torch.arange(images),
    )


def program_memory(model: Architecture, config: Config, precision: str) -> int:
    """Bytes of this process once it has trained: Python, its libraries, and what they load at first use.

    Trains a minimal model for one real step.
    """
    least = {
        "num_layers": 1,
        "num_attention_heads": 1,
        "num_cross_attention_heads": 1,
        "attention_head_dim": 8,
    }
    least |= {"cross_attention_head_dim": 8, "sample_size": model.patch_size, "caption_channels": 8}
    small = build(model.model_copy(update=least | {"interpolation_scale": None}), seed=0)
    optimizer = Optimizer(dict(small.named_parameters()), config.optim, torch.device("cpu"))
    average = WeightAverage(small, Trainable())
    objective = make_objective(config, small.config, precision)
    objective.losses(small, _batch(small.config, 1, (model.patch_size, model.patch_size), 1)).sum().backward()
    optimizer.step(0.0)
    average.update(0.0)
    return resident_memory()


def training_memory(
    model: Architecture,
    config: Config,
    objective: Objective,
    dataset: Dataset,
    placement: Placement,
    drawn: int,
) -> Memory:
    """What one process needs to train.

    Args:
        model: the architecture.
        config: its `optim`, `train` and batch.
        objective: what a step minimises.
        dataset: what is read, which stays mapped.
        placement: device, precision and processes.
        drawn: images of a sample grid, which are sampled at once.
    """
    train, device = config.train, placement.device
    side, tokens = dataset.image_shape[1:], dataset.longest_caption()
    program = 0 if device.type == "cuda" else program_memory(model, config, placement.precision)
    as_asked = nullcontext() if device.type == "cpu" else arithmetic_as_asked()
    # as if on a CPU: the operations and their results are the same elsewhere
    with FakeTensorMode(), as_asked:
        fake = SanaTransformer(model)
        fake.train().activation_checkpointing = train.activation_checkpointing
        parameters = parameter_count(fake.parameters())
        batch = _batch(model, train.batch_size, side, tokens)
        wide = _batch(model, 2 * min(drawn, MOST_IMAGES), side, tokens)
        peak = _Peak()
        with peak:
            objective.losses(fake, batch).sum().backward()
        gradients = 4 * parameters
        with_activations = peak.peak - gradients
        for parameter in fake.parameters():
            parameter.grad = None
        sampling = _Peak()
        with sampling, torch.no_grad():
            objective.losses(fake, wide)
    shards = placement.world.size if train.parallel == "fsdp" else 1
    moments = 4 * optimizer_numbers(fake.named_parameters(), config.optim)
    copy = 4 * parameters if placement.world.size > 1 and shards == 1 else 0  # DDP's buckets
    whole = 4 * parameters if shards > 1 else 0  # rank 0 samples with all weights
    read = min(1.0, train.steps * train.batch_size * train.accumulate / len(dataset))
    return Memory(
        program=program,
        weights=4 * parameters // shards,
        gradients=gradients // shards + copy,
        average=0 if config.optim.ema_decay is None else 4 * parameters // shards,
        optimizer=moments // shards,
        activations=max(with_activations, sampling.peak + whole - gradients, 0),
        dataset=0 if device.type == "cuda" else int(read * dataset.bytes),
    )
