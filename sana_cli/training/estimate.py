"""How much memory training will take, found by going through a step with tensors that have shapes and no numbers.

It knows no dataset.
"""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana_cli.config.keys import ModelConfig, TrainConfig
from sana_cli.model import SanaTransformer, build
from sana_cli.runtime.device import resident_memory
from sana_cli.sampling import sampler
from sana_cli.training.optim import Optimizer, WeightAverage, optimizer_numbers


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, in one process. What is shared by others (`dataset`, mapped from its files) counts too."""

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
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
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


def _pass(model: SanaTransformer, batch: int, side: tuple[int, int], tokens: int, precision: str, device: torch.device) -> Tensor:
    """A pass on the CPU: in its own arithmetic if it is the `device` meant, else in the one asked for."""
    config = model.config
    assert config.caption_channels is not None, "resolved"
    with sampler.autocast(torch.device("cpu"), precision):
        prediction: Tensor = (model if device.type == "cpu" else model.predict)(
            torch.empty(batch, config.in_channels, *side),
            torch.empty(batch, tokens, config.caption_channels),
            torch.empty(batch),
            None,
            torch.ones(batch, tokens, dtype=torch.bool),
            dropout_keys=torch.zeros(batch, dtype=torch.int64),
        )
    return prediction


def program_memory(config: ModelConfig, train: TrainConfig, precision: str) -> int:
    """Bytes of this process once it has trained: Python, its libraries, and what those load when they are first used.

    The least of models is trained for a step, in earnest.
    """
    least = {"num_layers": 1, "num_attention_heads": 1, "num_cross_attention_heads": 1, "attention_head_dim": 8}
    side, patch = config.patch_size, config.patch_size
    small = config.model_copy(
        update=least | {"cross_attention_head_dim": 8, "sample_size": patch, "caption_channels": 8, "interpolation_scale": None}
    )
    model = build(small, seed=0)
    optimizer, average = Optimizer(model, train, torch.device("cpu")), WeightAverage(model)
    prediction = _pass(model, 1, (side, side), 1, precision, torch.device("cpu"))
    prediction.float().square().mean().backward()
    optimizer.step(0.0)
    average.update(model, 0.0)
    return resident_memory()


def training_memory(
    config: ModelConfig, train: TrainConfig, side: tuple[int, int], tokens: int, precision: str, device: torch.device,
    processes: int, dataset_bytes: int, drawn: int,
) -> Memory:  # fmt: skip
    """What a process needs to train.

    Args:
        config: resolved.
        train: the optimisation.
        side: height and width of a sample.
        tokens: of the longest caption.
        precision: bf16 or fp32.
        device: where.
        processes: how many share the weights, if `train.parallel` is fsdp.
        dataset_bytes: that are read, which stay mapped.
        drawn: images of a sample grid, which are drawn at once.
    """
    program = 0 if device.type == "cuda" else program_memory(config, train, precision)
    with FakeTensorMode():  # as if on a CPU: the operations and their results are the same elsewhere
        model = SanaTransformer(config)
        model.train().activation_checkpointing = train.activation_checkpointing
        parameters = sum(p.numel() for p in model.parameters())
        peak = _Peak()
        with peak:
            prediction = _pass(model, train.batch_size, side, tokens, precision, device)
            F.mse_loss(prediction.float(), torch.empty_like(prediction)).backward()
        gradients = 4 * parameters
        with_activations = peak.peak - gradients
        for parameter in model.parameters():
            parameter.grad = None
        del prediction
        sampling = _Peak()
        with sampling, torch.no_grad():
            _pass(model, 2 * min(drawn, sampler.MOST_IMAGES), side, tokens, precision, device)
    shards = processes if train.parallel == "fsdp" else 1
    moments = 4 * optimizer_numbers(model, train)
    copy = 4 * parameters if processes > 1 and shards == 1 else 0  # DDP's buckets
    return Memory(
        program=program,
        weights=4 * parameters // shards,
        gradients=gradients // shards + copy,
        average=4 * parameters // shards,
        optimizer=moments // shards,
        activations=max(with_activations, sampling.peak - gradients, 0),
        dataset=0 if device.type == "cuda" else dataset_bytes,
    )
