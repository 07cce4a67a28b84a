"""Several processes, as torchrun starts them: which one this is, what they agree on, and a model spread over them.

One process needs none of it, and no environment variables. It reads torchrun's and knows no model, dataset or file.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch.distributed
from torch import Tensor, nn

from sana_cli.errors import SanaError
from sana_cli.runtime.launch import launch

WAIT = timedelta(days=7)  # for another process: a share of an embedding, a checkpoint or a grid of samples

# Groups that have been left, which are never freed. Freeing one waits for gloo's threads while it holds the interpreter, which
# a thread that is letting go of its last tensor waits for in turn: one end of a run in a hundred would hang.
_left: list[Any] = []


@dataclass(frozen=True)
class World:
    """This process among its equals. Every method but `first` is to be called by all of them."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes what is written once."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on once all processes are here.

        Raises:
            SanaError: another one has ended.
        """
        if self.size > 1:
            with others_gone():
                torch.distributed.barrier()

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' tensors, on the CPU."""
        if self.size > 1:
            with others_gone():
                torch.distributed.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return value
        values = torch.tensor([value])
        with others_gone():
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return int(values)

    def gather(self, value: Any) -> list[Any]:
        """What each process has to say, as JSON, at all of them."""
        if self.size == 1:
            return [value]
        said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        room = torch.zeros(self.largest(len(said)), dtype=torch.uint8)
        room[: len(said)] = said
        heard = [torch.empty_like(room) for _ in range(self.size)]
        with others_gone():
            torch.distributed.all_gather(heard, room)
        return [json.loads(bytes(one.tolist()).rstrip(b"\0")) for one in heard]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes do, with no word among them in it, and leave together: what goes wrong in one stops all.

        Raises:
            SanaError: what the block raised in some processes, told by the first.
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
        said = self.gather(None if problem is None else [str(problem), problem.exit_code])
        wrong = {rank: text_and_code for rank, text_and_code in enumerate(said) if text_and_code is not None}
        if not wrong:
            return
        rank, (text, code) = next(iter(wrong.items()))
        lines = text.splitlines()
        if len(wrong) < self.size:
            lines[0] = f"process {rank} of {self.size}: {lines[0]}"
        error = SanaError(*lines, exit_code=code)
        error.told = not self.first
        raise error


@contextmanager
def others_gone() -> Iterator[None]:
    """Words for what a broken connection means.

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
        gone.told = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
        raise gone from error


@contextmanager
def world(cuda: bool = False) -> Iterator[World]:
    """The processes of this run, connected for as long as the block lasts; alone without torchrun.

    They talk through gloo; with `cuda`, tensors on GPUs go through NCCL.
    """
    process = launch()
    if process.size == 1:
        yield World()
        return
    if cuda:
        torch.cuda.set_device(process.local_rank)  # where NCCL and FSDP look for it
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=WAIT)
    here = World(torch.distributed.get_rank(), process.size)
    try:
        yield here
    except SanaError as error:
        error.process = here.rank
        raise
    finally:
        _left.append(torch.distributed.group.WORLD)
        torch.distributed.destroy_process_group()


class Spread:
    """A model spread over the processes: a replica in each (`ddp`), or a shard of every parameter (`fsdp`).

    `model` is what to call for training.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], kind: str, here: World, device: torch.device) -> None:
        self.model, self._replica = model, None
        if here.size > 1 and kind == "fsdp":
            shard(model, blocks, device)
        elif here.size > 1:
            own = [device.index] if device.type == "cuda" else None
            # of a depthwise convolution's weight (C, 1, 3, 3), whose memory is the same whichever strides it is given
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            self._replica = nn.parallel.DistributedDataParallel(model, device_ids=own)
            self.model = self._replica

    @contextmanager
    def gradients(self, last: bool) -> Iterator[None]:
        """Around a micro-batch's forward and backward pass. Replicas exchange gradients in the last of a step only.

        Shards exchange them in each: what is not exchanged would have to be kept whole, which is what shards are to avoid.
        """
        wait = self._replica.no_sync() if self._replica is not None and not last else nullcontext()
        with wait, others_gone():
            yield


def shard(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """FSDP2: each block's parameters, and the rest's, are shards in each process, gathered when the block runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded. To be called by all processes."""
    gather = cast("Callable[[], Tensor] | None", getattr(tensor, "full_tensor", None))
    return tensor if gather is None else gather()


def shard_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, which every process has, on the parameter's device: all of it, or this process's shard."""
    tensor = tensor.to(parameter.device, copy=True)
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(tensor, mesh, parameter.placements, src_data_rank=None)
