"""Several processes, as torchrun starts them: ranks, communication, DDP and FSDP.

A single process needs no environment variables. This module knows no model, dataset or file.
"""

import json
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch.distributed
from torch import Tensor, nn

from sana_cli.errors import SanaError
from sana_cli.runtime.launch import launch

WAIT = timedelta(days=7)  # for another process to embed its share, or write a checkpoint or a grid

# Old process groups are never freed. Freeing one waits for gloo's threads with the GIL held,
# while such a thread may need the GIL to free its last tensor: one run in a hundred would hang.
_old_groups: list[Any] = []

# A thread of gloo frees its reference to a tensor some time after the call. If that is the last one and Python is
# about to end, that thread is ended in the midst of it and the process aborts: one in five did after such a call.
_recent: deque[Tensor] = deque(maxlen=256)


@dataclass(frozen=True)
class World:
    """The rank of this process, and communication: every rank must call each method."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints and writes shared files."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all ranks are here.

        Raises:
            SanaError: another one has ended.
        """
        if self.size > 1:
            with _connection_errors():
                torch.distributed.barrier()  # through gloo: a GPU that waits for hours would look like a fault

    def total(self, values: Tensor) -> Tensor:
        """Sum a CPU tensor over all ranks, in place."""
        if self.size > 1:
            _recent.append(values)
            with _connection_errors():
                torch.distributed.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """The maximum over all ranks."""
        if self.size == 1:
            return value
        values = torch.tensor([value])
        _recent.append(values)
        with _connection_errors():
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return int(values)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order, on every rank; a value must be JSON."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        padded = torch.zeros(self.largest(len(text)), dtype=torch.uint8)
        padded[: len(text)] = text
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        _recent.extend((padded, *gathered))
        with _connection_errors():
            torch.distributed.all_gather(gathered, padded)
        return [json.loads(bytes(one.tolist()).rstrip(b"\0")) for one in gathered]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block, without communication inside, on every rank. If one fails, all raise.

        Raises:
            SanaError: the error of the lowest failing rank; only rank 0 prints it.
        """
        problem: SanaError | None = None
        try:
            yield
        except SanaError as error:
            problem = error
        if self.size > 1:
            self._agree(problem)
        elif problem is not None:
            raise problem

    def _agree(self, problem: SanaError | None) -> None:
        """Raise the first problem of any rank on all of them."""
        gathered = self.gather(None if problem is None else [str(problem), problem.exit_code])
        failed = {rank: entry for rank, entry in enumerate(gathered) if entry is not None}
        if not failed:
            return
        rank, (text, code) = next(iter(failed.items()))
        lines = text.splitlines()
        if len(failed) < self.size:
            lines[0] = f"process {rank} of {self.size}: {lines[0]}"
        error = SanaError(*lines, exit_code=code)
        error.silent = not self.first
        raise error


@contextmanager
def _connection_errors() -> Iterator[None]:
    """Turn a broken connection into an error message.

    Raises:
        SanaError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        broken = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if not broken:
            raise
        gone = SanaError("another process of this run has stopped; its message says why")
        gone.silent = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
        raise gone from error


@contextmanager
def world(cuda: bool = False) -> Iterator[World]:
    """Connect the processes of this run during the block; without torchrun, just this one.

    They communicate through gloo; with `cuda`, GPU tensors go through NCCL.
    """
    process = launch()
    if process.size == 1:
        yield World()
        return
    if cuda:
        torch.cuda.set_device(process.local_rank)  # NCCL and FSDP read it
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=WAIT)
    here = World(torch.distributed.get_rank(), process.size)
    try:
        yield here
    except SanaError as error:
        error.process = here.rank
        raise
    finally:
        _old_groups.append(torch.distributed.group.WORLD)
        torch.distributed.destroy_process_group()


class Replicas:
    """A model in DDP; unwrapped with one process or shards. Call `model` for training."""

    def __init__(self, model: nn.Module, world: World | None, device: torch.device) -> None:
        self.model, self._replica = model, None
        if world is not None and world.size > 1:
            own = [device.index] if device.type == "cuda" else None
            # about depthwise weights (C, 1, 3, 3), whose memory is the same for either strides
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            self._replica = nn.parallel.DistributedDataParallel(model, device_ids=own)
            self.model = self._replica

    @contextmanager
    def gradients(self, last: bool) -> Iterator[None]:
        """Wrap a forward and backward pass. DDP syncs gradients in a step's `last` micro-batch.

        Shards sync in every micro-batch: otherwise each rank would have to hold whole
        gradients.
        """
        no_sync = self._replica.no_sync() if self._replica is not None and not last else nullcontext()
        with no_sync, _connection_errors():
            yield


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients of parameters that are whole in each process. Every rank must call this."""
    with _connection_errors():
        for parameter in parameters:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad.div_(torch.distributed.get_world_size())


def shard(
    model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, methods: Sequence[str] = ()
) -> None:
    """Shard a model with FSDP2. Each block's parameters are gathered when it runs.

    `methods` are those that compute as `forward` does.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # a pass may have no backward one
    for method in methods:
        register_fsdp_forward_method(model, method)


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded. Every rank must call this."""
    gather = cast("Callable[[], Tensor] | None", getattr(tensor, "full_tensor", None))
    return tensor if gather is None else gather()


def replicate(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, or a sum over shards, whole on every rank. Every rank must call this."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(tensor, DTensor)
    return tensor.redistribute(placements=[Replicate()] * mesh.ndim)


def shard_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Copy a whole `tensor` to the parameter's device; only this rank's shard if sharded."""
    return _distributed_like(parameter, tensor, replicated=False)


def replicate_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Copy a whole `tensor` to the parameter's device; whole on every rank even if that is sharded."""
    return _distributed_like(parameter, tensor, replicated=True)


def _distributed_like(parameter: Tensor, tensor: Tensor, replicated: bool) -> Tensor:
    tensor = tensor.to(parameter.device, copy=True)
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    assert isinstance(parameter, DTensor)
    placements = [Replicate()] * mesh.ndim if replicated else parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
