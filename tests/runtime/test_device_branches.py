"""Every branch on the kind of device, driven without such a device: by stubs of PyTorch's functions, or on "meta".

Tensors on "meta" have no numbers, but an operation that meets one of them and one left on the CPU fails, and they
take the forms that are not the CPU's. The last part runs on the CPU and, where there is a GPU, there:
`pytest -k cuda`.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import again, checkpoint_tensors, make_trainer, metrics_lines, sampled, trained
from torch import Tensor, nn

from sana_cli import autoencoder, kernels, text
from sana_cli.adapters import attach, matching, new_changes
from sana_cli.commands import train as train_command
from sana_cli.commands.sample import SampleOptions, SampleSummary, sample
from sana_cli.config.keys import (
    Architecture,
    Config,
    DistillConfig,
    ObjectiveConfig,
    OptimConfig,
    SampleConfig,
    TextConfig,
)
from sana_cli.errors import SanaError
from sana_cli.model import SanaTransformer, build
from sana_cli.runtime import device, distributed
from sana_cli.runtime.distributed import World
from sana_cli.runtime.launch import Launch
from sana_cli.sampling import sampler
from sana_cli.training import estimate, optim, plan, trainer
from sana_cli.training.batches import training_batch
from sana_cli.training.distillation import Distillation
from sana_cli.training.objective import MicroBatch, Objective, RectifiedFlow, total
from sana_cli.training.optim import Optimizer, round_at_random
from sana_cli.training.student import student_architecture

CPU, CUDA, MPS, META = (torch.device(name) for name in ("cpu", "cuda", "mps", "meta"))
SHAPE = Architecture(
    in_channels=1, sample_size=16, patch_size=8, num_layers=2, num_attention_heads=3, attention_head_dim=8,
    num_cross_attention_heads=2, cross_attention_head_dim=12, caption_channels=16, qk_norm="rms_norm_across_heads",
    interpolation_scale=1.0,
)  # fmt: skip


class Reached(Exception):  # noqa: N818 (no error)
    """Raised by a stub, so that a test ends where it is called."""


def machine(patch: pytest.MonkeyPatch, gpus: int = 0, mps: bool = False) -> None:
    """A machine with so many GPUs."""
    patch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    patch.setattr(torch.cuda, "device_count", lambda: gpus)
    patch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.fixture
def autocasts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The kind of device and whether it is on, of each autocast that is made. None of them has an effect."""
    made: list[tuple[str, bool]] = []

    def autocast(kind: str, dtype: torch.dtype | None = None, enabled: bool = True) -> Any:
        made.append((kind, enabled))
        assert dtype in (None, torch.bfloat16)
        return nullcontext()

    monkeypatch.setattr(torch, "autocast", autocast)
    return made


# --- what a machine has -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "mps", "name", "found"),
    [
        (2, True, "auto", "cuda"), (0, True, "auto", "mps"), (0, False, "auto", "cpu"), (2, True, "cpu", "cpu"),
        (2, False, "cuda:1", "cuda:1"), (1, False, "cuda", "cuda"), (0, True, "mps", "mps"),
        (1, False, "cuda:1", "cpu, cuda:0;"), (0, True, "cuda", "cpu, mps;"), (1, False, "mps", "cpu, cuda:0;"),
        (2, True, "meta", "cpu, cuda:0, cuda:1, mps;"), (1, False, "gpu", "no device 'gpu'"),
    ],
)  # fmt: skip
def test_a_device_is_resolved(
    monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool, name: str, found: str
) -> None:
    machine(monkeypatch, gpus, mps)
    if found[-1] in ";'":
        with pytest.raises(SanaError, match=found):
            device.resolve_device(name)
    else:
        assert str(device.resolve_device(name)) == found


@pytest.mark.parametrize(
    ("name", "size", "found"),
    [
        ("cuda", 1, "cuda"), ("auto", 4, "cuda:3"), ("cuda", 4, "cuda:3"), ("cpu", 4, "cpu"),
        ("cuda:1", 4, "is one GPU, and torchrun started 4"), ("mps", 4, "MPS trains in one process"), ("mps", 1, "mps"),
    ],
)  # fmt: skip
def test_each_process_of_a_machine_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, config: Config, name: str, size: int, found: str
) -> None:
    machine(monkeypatch, 4, mps=True)
    monkeypatch.setattr(plan, "launch", lambda: Launch(2, size, 3))
    own = again(config, f"run.device={name}")
    if " " in found:
        with pytest.raises(SanaError, match=found):
            plan.choose_device(own)
    else:
        assert str(plan.choose_device(own)) == found


@pytest.mark.parametrize(("gpus", "refused"), [(1, False), (2, True)])
def test_a_launcher_that_does_not_say_which_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, config: Config, gpus: int, refused: bool
) -> None:
    """With one GPU in each machine there is no choice."""
    machine(monkeypatch, gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SanaError, match="LOCAL_RANK") if refused else nullcontext():
        assert str(plan.choose_device(again(config, "run.device=cuda"))) == "cuda:0"


def test_batches_for_a_gpu_are_made_in_pinned_memory(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor of them, and its copy to the device does not wait; others are copied as before."""
    pinned: set[int] = set()
    waits: list[bool] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        pinned.add(id(copy))
        return copy

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        assert non_blocking == (id(tensor) in pinned)
        waits.append(not non_blocking)
        return tensor

    made = make_trainer(config, 4)
    part = made.batches.cut(0)[0]
    plain = made.batches.make(0, part)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    made.batches.pins = True
    batch = made.batches.make(0, part)
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 6
    assert all(id(tensor) in pinned for tensor in tensors)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: id(tensor) in pinned)
    monkeypatch.setattr(torch.Tensor, "to", to)
    batch.to(torch.device("cuda"))
    plain.to(torch.device("cuda"))
    assert waits == [False] * len(tensors) + [True] * len(tensors)
    made.close()


def test_a_process_without_a_gpu_of_its_own_is_refused(
    monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    machine(monkeypatch, 2)
    monkeypatch.setattr(plan, "launch", lambda: Launch(1, 3, 2))
    with pytest.raises(SanaError, match="no device cuda:2"):
        plan.choose_device(again(config, "run.device=cuda"))


@pytest.mark.parametrize("native", [True, False])
def test_whether_a_gpu_multiplies_in_bf16_is_asked_of_that_gpu(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    """Emulation does not count: it is slow."""
    asked: list[Any] = []

    class Current:
        def __init__(self, which: torch.device) -> None:
            self.which = which

        def __enter__(self) -> None:
            asked.append(self.which)

        def __exit__(self, *_: object) -> None:
            asked.append("left")

    def supported(including_emulation: bool = True) -> bool:
        asked.append("asked")
        return native or including_emulation

    machine(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    there = torch.device("cuda:1")
    assert device.has_native_bf16(there) == native
    assert asked == [there, "asked", "left"]
    assert device.resolve_precision("auto", there) == ("bf16" if native else "fp32")
    assert device.resolve_precision("bf16", there) == "bf16"
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: not native)
    assert device.has_native_bf16(CPU) == (not native)
    assert not device.has_native_bf16(MPS)
    types = [device.frozen_dtype(where) for where in (there, CPU, MPS)]
    assert types == [torch.bfloat16 if native else torch.float32, torch.float32, torch.bfloat16]
    machine(monkeypatch, 0)
    assert not device.has_native_bf16(CUDA)


def test_memory_is_counted_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU what the allocator has reserved is free for its next tensors, but for what they take now."""
    there, numbers = (
        torch.device("cuda:1"),
        {"max": 7, "reserved": 50, "allocated": 20, "free": 1000, "all": 4000},
    )

    def of(name: str) -> Callable[[torch.device], int]:
        return lambda which: numbers[name] if which == there else -1

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", of("max"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", of("reserved"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", of("allocated"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda which: (of("free")(which), numbers["all"]))
    assert device.peak_memory(there) == 7
    assert device.free_memory(there) == 1000 + 50 - 20
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 90)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 30)
    assert device.free_memory(MPS) == 60
    assert device.peak_memory(CPU) > 2**20, "resident bytes"
    free = device.free_memory(CPU)
    assert free is None or free > 2**20


@pytest.mark.parametrize(("kind", "call"), [("cuda", "cuda"), ("mps", "mps"), ("cpu", "malloc_trim")])
def test_memory_is_returned_where_it_is(monkeypatch: pytest.MonkeyPatch, kind: str, call: str) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: called.append("mps"))
    monkeypatch.setattr(device, "_glibc", lambda function, *_: called.append(function))
    device.release_memory(torch.device(kind))
    assert called == [call]


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True), (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False), (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_an_error_that_means_out_of_memory(error: BaseException, is_memory: bool) -> None:
    assert device.is_out_of_memory(error) == is_memory


@pytest.mark.parametrize("before", [(True, False), (True, True), (False, False)])
def test_exact_float32_is_without_tf32_and_leaves_it_as_it_was(before: tuple[bool, bool]) -> None:
    """Also after an error."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)

    def allowed() -> tuple[bool, ...]:
        return tuple(backend.allow_tf32 for backend in backends)

    default = allowed()
    try:
        for backend, was in zip(backends, before, strict=True):
            backend.allow_tf32 = was
        with suppress(Reached), device.exact_float32():
            assert allowed() == (False, False)
            raise Reached
        assert allowed() == before
    finally:
        for backend, was in zip(backends, default, strict=True):
            backend.allow_tf32 = was


def test_tf32_is_switched_whichever_way_a_program_chose_before() -> None:
    """PyTorch refuses to read its older switch once the newer one says something else."""
    cudnn: Any = torch.backends.cudnn
    newer: tuple[Any, ...] = (cudnn.conv, torch.backends.cuda.matmul)

    def precisions() -> list[str]:
        return [operations.fp32_precision for operations in newer]

    default = precisions()
    try:
        for chosen in ("ieee", "tf32"):
            for operations in newer:
                operations.fp32_precision = chosen
            for allowed in (False, True):
                with device.tf32(allowed):
                    assert all((found == "tf32") == allowed for found in precisions())
                assert precisions() == [chosen, chosen]
    finally:
        for operations, was in zip(newer, default, strict=True):
            operations.fp32_precision = was


def test_autocast_is_that_of_the_device(autocasts: list[tuple[str, bool]]) -> None:
    for kind in (CUDA, CPU):
        for precision in ("bf16", "fp32"):
            device.autocast(kind, precision)
    assert autocasts == [("cuda", True), ("cuda", False), ("cpu", True), ("cpu", False)]


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda", [True, False])
def test_tensors_on_gpus_go_through_nccl(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    """The GPU of the process is chosen before it connects. What lies on the CPU goes through gloo in any case."""
    called: list[Any] = []
    monkeypatch.setattr(distributed, "launch", lambda: Launch(5, 8, 1))
    monkeypatch.setattr(torch.cuda, "set_device", lambda which: called.append(("gpu", which)))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, timeout: called.append((backend, timeout))
    )
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: called.append("left"))
    monkeypatch.setattr(distributed, "_old_groups", [])
    with distributed.world(cuda=cuda) as here:
        assert here == World(5, 8)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    assert called == [*([("gpu", 1)] if cuda else []), (backend, distributed.WAIT), "left"]


@pytest.mark.parametrize(
    ("kind", "size", "cuda"), [("cuda:1", 2, True), ("cpu", 2, False), ("cuda", 1, False)]
)
def test_training_asks_for_nccl_where_processes_have_gpus(
    monkeypatch: pytest.MonkeyPatch, config: Config, kind: str, size: int, cuda: bool
) -> None:
    asked: list[bool] = []

    def world(cuda: bool) -> Any:
        asked.append(cuda)
        raise Reached

    monkeypatch.setattr(train_command, "launch", lambda: Launch(0, size, 0))
    monkeypatch.setattr(train_command, "choose_device", lambda _: torch.device(kind))
    monkeypatch.setattr(train_command, "world", world)
    with pytest.raises(Reached):
        next(train_command.train(train_command.TrainOptions(config)))
    assert asked == [cuda]


@pytest.mark.parametrize(("kind", "ids"), [("cuda:3", [3]), ("cpu", None)])
def test_ddp_is_told_the_gpu_of_its_process(monkeypatch: pytest.MonkeyPatch, kind: str, ids: Any) -> None:
    model, given = nn.Linear(2, 2), list[Any]()

    def ddp(module: nn.Module, device_ids: Any) -> nn.Module:
        given.append(device_ids)
        return nn.Sequential(module)

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", ddp)
    replicas = distributed.Replicas(model, World(0, 2), torch.device(kind))
    assert given == [ids]
    assert replicas.model is not model
    assert distributed.Replicas(model, World(), torch.device(kind)).model is model


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_shards_lie_on_the_device(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    import torch.distributed.fsdp as fsdp
    from torch.distributed import device_mesh

    sharded: list[Any] = []
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(device_mesh, "init_device_mesh", lambda *mesh: mesh)
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, mesh, **_: sharded.append((module, mesh)))
    monkeypatch.setattr(fsdp, "register_fsdp_forward_method", lambda *_: None)
    block = nn.Linear(2, 2)
    model = nn.Sequential(block)
    distributed.shard(model, [block], torch.device(f"{kind}:1" if kind == "cuda" else kind))
    assert sharded == [(block, (kind, (2,))), (model, (kind, (2,)))]


# --- what is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "asked", "dtype"),
    [
        ("cpu", "auto", torch.float32), ("cuda", "auto", torch.bfloat16), ("mps", "auto", torch.bfloat16),
        ("cuda", "fp32", torch.float32), ("cpu", "bf16", torch.bfloat16),
    ],
)  # fmt: skip
def test_an_encoder_has_the_type_that_suits_the_device(
    monkeypatch: pytest.MonkeyPatch, kind: str, asked: str, dtype: torch.dtype
) -> None:
    given: list[torch.dtype] = []

    def load(_encoder: str, _revision: str | None, dtype: torch.dtype) -> Any:
        given.append(dtype)
        raise Reached

    monkeypatch.setattr(text, "_from_hugging_face", load)
    monkeypatch.setattr(device, "has_native_bf16", lambda where: where.type == "cuda")
    with pytest.raises(Reached):
        text.load_encoder(TextConfig.model_validate({"encoder": "some", "dtype": asked}), torch.device(kind))
    assert given == [dtype]


@pytest.mark.parametrize(
    ("kind", "asked", "dtype"),
    [
        ("cpu", None, torch.float32), ("cuda", None, torch.bfloat16), ("mps", None, torch.bfloat16),
        ("cuda", torch.float32, torch.float32),
    ],
)  # fmt: skip
def test_an_autoencoder_has_the_type_that_suits_the_device(
    monkeypatch: pytest.MonkeyPatch, kind: str, asked: torch.dtype | None, dtype: torch.dtype
) -> None:
    """And is moved there."""
    given: list[Any] = []

    class Model(nn.Module):
        config = SimpleNamespace(scaling_factor=0.5)
        spatial_compression_ratio = 32

        def to(self, *where: Any) -> Any:
            given.extend(where)
            return self

    def load(*_: object, torch_dtype: torch.dtype, **__: object) -> Any:
        given.append(torch_dtype)
        return Model(), {}

    monkeypatch.setattr(device, "has_native_bf16", lambda where: where.type == "cuda")
    monkeypatch.setattr(autoencoder, "_diffusers", lambda: SimpleNamespace(from_pretrained=load))
    monkeypatch.setattr(autoencoder, "_folder", lambda _: Path())
    monkeypatch.setattr("sana_cli.runtime.hub.check_complete", lambda *_: None)
    monkeypatch.setattr("sana_cli.runtime.hub.load", lambda _what, _source, load, **_: load(True))
    where = torch.device(kind)
    made = autoencoder.Autoencoder("some", where, asked)
    assert given == [dtype, where]
    assert (made.device, made.dtype) == (where, dtype)


# --- how weights move -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "fused"), [("cuda", True), ("cpu", True), ("mps", False)])
def test_adamw_is_fused_where_it_can_be(kind: str, fused: bool) -> None:
    made = Optimizer({"a": nn.Parameter(torch.zeros(2))}, OptimConfig(), torch.device(kind))
    assert [group["fused"] for group in made.param_groups] == [fused] * 2


class OnCuda(nn.Parameter):
    """A parameter that says it is on a GPU."""

    device = property(lambda _: torch.device("cuda:1"))


@pytest.mark.parametrize(("kind", "where"), [(nn.Parameter, "cpu"), (OnCuda, "cuda:1")])
def test_a_resumed_adamw_counts_its_steps_where_it_reads_them(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Parameter], where: str
) -> None:
    """Fused on a GPU it reads the counter there; elsewhere PyTorch keeps it on the CPU."""
    made: list[Any] = []
    tensor = torch.tensor

    def recorded(value: float, device: Any) -> Tensor:
        made.append((value, str(device)))
        return tensor(value)

    optimizer = Optimizer({"a": kind(torch.zeros(2))}, OptimConfig(), torch.device(where))
    monkeypatch.setattr(optim, "shard_like", lambda _parameter, value: value)
    monkeypatch.setattr(torch, "tensor", recorded)
    optimizer.load({"exp_avg.a": torch.ones(2)}, 7)
    assert made == [(7.0, where)]


@pytest.mark.parametrize(("kind", "times"), [("cpu", 2), ("cuda", 0)])
def test_only_a_cpu_returns_memory_while_bf16_weights_move(
    monkeypatch: pytest.MonkeyPatch, kind: str, times: int
) -> None:
    """The GPU's allocator has no such holes, and giving its memory back would stop it in every step."""
    called: list[Any] = []
    monkeypatch.setattr(optim, "RETURNED", 1)
    monkeypatch.setattr(optim, "return_memory", called.append)
    named = {name: nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)) for name in "ab"}
    made = Optimizer(named, OptimConfig(), torch.device(kind))
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    made.step(0.1)
    assert called == [torch.device(kind)] * times


def test_casts_are_kept_for_a_step_by_an_autocast_of_the_device(
    monkeypatch: pytest.MonkeyPatch, config: Config, autocasts: list[tuple[str, bool]]
) -> None:
    made = make_trainer(config, 4)
    monkeypatch.setattr(made, "placement", trainer.Placement(CUDA, "bf16"))
    made._weights_cast_once()
    assert autocasts == [("cuda", False)]
    made.close()


# --- what is foreseen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "available"), [("cuda", 1000), ("cpu", 1000 + 300), ("mps", 1000 + 300)])
def test_what_the_process_holds_already_is_not_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, config: Config, kind: str, available: int
) -> None:
    """Of the machine's memory the estimate counts all that this process has; of a GPU's, tensors alone."""
    monkeypatch.setattr(plan, "free_memory", lambda _: 1000)
    monkeypatch.setattr(plan, "resident_memory", lambda: 300)
    given: list[Any] = []

    def needed(*arguments: Any) -> Any:
        given.append(arguments[5])
        return estimate.Memory(*[0] * 8)

    monkeypatch.setattr(estimate, "training_memory", needed)
    placement = trainer.Placement(torch.device(kind), "fp32")
    plan._memory(config, None, SHAPE, placement, None)  # type: ignore[arg-type]
    assert given == [available]


@pytest.mark.parametrize(("kind", "moves"), [("cuda", True), ("cpu", False)])
def test_an_average_is_moved_to_the_cpu_from_elsewhere_alone(config: Config, kind: str, moves: bool) -> None:
    own = again(config, "optim.ema_decay=0.9", "train.precision=fp32")
    found = list(estimate.smaller(own, torch.device(kind)))
    assert any(one.optim.ema_device == "cpu" for one in found) == moves


@pytest.mark.parametrize(("kind", "native"), [("cuda", True), ("cuda", False)])
def test_bf16_weights_are_advised_where_the_gpu_has_them(
    monkeypatch: pytest.MonkeyPatch, config: Config, kind: str, native: bool
) -> None:
    monkeypatch.setattr(estimate, "has_native_bf16", lambda where: native and where.type == kind)
    found = list(estimate.smaller(again(config, "train.precision=bf16"), torch.device(kind)))
    assert any(one.train.weights == "bf16" for one in found) == native


@pytest.mark.parametrize(
    ("kind", "reason"), [("cuda", "cuda has native bf16"), ("cpu", "cpu lacks native bf16")]
)
def test_a_plan_says_why_it_has_its_precision(
    monkeypatch: pytest.MonkeyPatch, config: Config, kind: str, reason: str
) -> None:
    from sana_cli.dataset.reader import Dataset

    for module in (plan, device):
        monkeypatch.setattr(module, "has_native_bf16", lambda where: where.type == "cuda")
    monkeypatch.setattr(plan, "choose_device", lambda _: torch.device(kind))
    found = plan.make_plan(again(config, "train.precision=auto"), Dataset(config.data.dir), None, False)
    assert (found.device, found.precision_reason) == (kind, reason)
    assert found.precision == ("bf16" if kind == "cuda" else "fp32")


# --- what computes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_fused_where_that_is_fast(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    """Not on a CPU, and not where a forward derivative is taken, which the fused kernel has not."""
    masks: list[Any] = []
    fused = F.scaled_dot_product_attention

    def spied(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        masks.append(attn_mask)
        return fused(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)

    def attend(where: torch.device) -> Tensor:
        q, k = (torch.ones(2, 3, n, 8, device=where, dtype=torch.bfloat16) for n in (7, 5))
        return kernels.attention(q, k, k, torch.zeros(2, 1, 1, 5, device=where) if bias else None)

    assert attend(CPU).shape == (2, 3, 7, 8)
    with kernels.forward_derivatives():
        assert attend(META).shape == (2, 3, 7, 8)
    assert masks == []
    assert attend(META).shape == (2, 3, 7, 8)
    (mask,) = masks
    assert (mask is not None) == bias
    assert mask is None or mask.dtype == torch.bfloat16, "the kernel wants the type of the queries"


def test_fused_attention_is_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, in the CPU's kernel: with gradients of queries, keys and values."""
    found = []
    for fused in (False, True):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 3, n, 8, generator=generator).requires_grad_() for n in (7, 5, 5))
        bias = torch.zeros(2, 1, 1, 5)
        bias[1, ..., 3:] = -10000
        with monkeypatch.context() as patch:
            if fused:
                elsewhere = property(lambda _: CUDA)
                patch.setattr(torch.Tensor, "device", elsewhere)
            out = kernels.attention(q, k, v, bias)
        out.square().sum().backward()
        found.append([out.detach(), *(t.grad for t in (q, k, v))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_only_a_cpu_leaves_an_autocast_that_it_would_emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_native_bf16", lambda _: False)
    for where, on in ((CPU, False), (META, True)):
        weight = torch.zeros(2, device=where)
        with torch.autocast("cpu", torch.bfloat16), kernels.native_arithmetic(weight):
            assert torch.is_autocast_enabled("cpu") == on


def on_meta(model: SanaTransformer) -> SanaTransformer:
    """A model moved to meta, as a trainer moves it to a GPU."""
    return model.to(META)


def drawn_batch(objective: Objective, shape: Architecture = SHAPE) -> MicroBatch:
    """A micro-batch on the CPU, with all that an objective wants drawn."""
    sides = (shape.sample_size, shape.sample_size)
    return estimate._batch(shape, 2, sides, 3, objective.draws)


def all_there(model: nn.Module) -> bool:
    """Whether each parameter that moves has a gradient beside it."""
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return bool(moving) and all(p.grad is not None and p.grad.device == p.device == META for p in moving)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("adapters", ["none", "lora", "dora"])
def test_a_training_step_leaves_nothing_on_the_cpu(
    autocasts: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch, adapters: str, checkpointing: bool
) -> None:
    """All that a loss and its gradient meet is where the batch is, and so is each autocast."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: False)
    model = build(SHAPE)
    if adapters != "none":
        model.requires_grad_(False)
        names = matching(model, ["attn1.to_q", "attn2.to_k", "ff.conv_inverted", "proj_out"])
        generator = torch.Generator().manual_seed(0)
        attach(model, new_changes(model, names, 2, 1.0, adapters == "dora", generator), dropout=0.1)
    model = on_meta(model).train()
    model.activation_checkpointing = checkpointing
    objective = RectifiedFlow(ObjectiveConfig(), 1.0, "bf16")
    losses = objective.losses(model, drawn_batch(objective).to(META))
    assert all(loss.device == META for loss in losses.values())
    if not checkpointing:  # which asks for the state of meta's random numbers
        total(losses).sum().backward()
        assert all_there(model)
    assert {kind for kind, _ in autocasts} == {"meta"}
    assert ("meta", True) in autocasts


@pytest.mark.parametrize(
    "distill", [{}, {"method": "scm", "tangent": "jvp"}, {"method": "scm", "tangent": "difference"}]
)
def test_a_distillation_leaves_nothing_on_the_cpu(
    autocasts: list[tuple[str, bool]], distill: Mapping[str, Any]
) -> None:
    config = DistillConfig.model_validate({"teacher": "some", **distill})
    student = student_architecture(SHAPE, 0.1)
    objective = Distillation(config, student, build(SHAPE), "flow_prediction", "bf16", is_pixels=True, seed=0)
    model, average = on_meta(build(student)), on_meta(build(student))
    objective.teacher.to(META)
    nn.ModuleDict(objective.modules).to(META)
    objective.use_average(average)
    losses = objective.losses(model, drawn_batch(objective).to(META))
    assert set(losses) == {"loss", "adversarial", "critic"}
    total(losses).sum().backward()
    assert all_there(model)
    assert all(all_there(module) for module in objective.modules.values())
    assert {kind for kind, _ in autocasts} == {"meta"}


@pytest.mark.parametrize("solver", ["dpm++", "euler", "heun", "scm"])
def test_sampling_leaves_nothing_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, autocasts: list[tuple[str, bool]], solver: str
) -> None:
    """Noise is drawn on the CPU, so that it does not depend on the device, and moved."""
    shape = student_architecture(SHAPE, 0.1) if solver == "scm" else SHAPE
    model = on_meta(build(shape))
    monkeypatch.setattr(sampler, "free_memory", lambda where: 2**30 if where == META else None)
    settings = SampleConfig.model_validate({"solver": solver, "steps": 3})
    recipe = sampler.Recipe(settings, (1, 16, 16), "flow_prediction", "bf16")
    captions = [torch.zeros(n, 16) for n in (3, 2)]
    steps = list(sampler.sample_images(model, captions, captions, [1, 2], recipe))
    assert [step.images.device for step in steps] == [META] * 3
    assert [step.x_0.device for step in steps] == [META] * 3
    assert {kind for kind, _ in autocasts} == {"meta"}


def test_a_batch_is_as_large_as_the_free_memory_of_the_device_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda": 2**21, "cpu": 2**22}
    monkeypatch.setattr(sampler, "free_memory", lambda where: free[where.type])
    on_gpu, on_cpu = (sampler.images_at_once(SHAPE, (1, 16, 16), 2, where) for where in (CUDA, CPU))
    assert on_gpu > 1
    assert on_cpu in (2 * on_gpu, 2 * on_gpu + 1)


# --- on a device ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", "cuda"])
def where(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(request.param)


def losses_of(config: Config) -> list[float]:
    """The loss of each step of a run, which is trained."""
    trained(config)
    return [line["loss"] for line in metrics_lines(config.run.dir)]


@pytest.mark.parametrize(
    "overrides",
    [
        (), ("optim.optimizer=muon",), ("optim.optimizer=came",), ("train.activation_checkpointing=true",),
        ("optim.ema_device=cpu",), ("model.qk_norm=rms_norm_across_heads",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_run_is_that_of_the_cpu(config: Config, where: torch.device, overrides: tuple[str, ...]) -> None:
    """With its samples and its checkpoints; to rounding."""

    def cut(name: str, kind: str) -> Config:
        return again(
            config, *overrides, "optim.lr=1e-3", f"run.dir={config.run.dir}-{name}", f"run.device={kind}"
        )

    with device.exact_float32():
        expected, found = losses_of(cut("there", "cpu")), losses_of(cut("here", str(where)))
    # Muon orthogonalises in bf16
    assert found == pytest.approx(expected, rel=1e-3 if "muon" in str(overrides) else 1e-4)
    assert (cut("here", "cpu").run.dir / "samples" / "step-000004.png").is_file()


@pytest.mark.parametrize("optimizer", ["adamw", "came"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_run_that_is_resumed_is_the_run(
    config: Config, where: torch.device, optimizer: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer goes on with its moments, and AdamW with its count of steps, on the device."""
    for module in (plan, device, kernels):
        monkeypatch.setattr(module, "has_native_bf16", lambda _: True)
    place = (
        f"run.device={where}",
        f"optim.optimizer={optimizer}",
        f"train.weights={weights}",
        "optim.lr=1e-2",
    )
    kind = ("train.precision=bf16",) if weights == "bf16" else ()

    def cut(name: str, *more: str) -> Config:
        return again(
            config, *place, *kind, f"run.dir={config.run.dir}-{name}", "optim.schedule=constant", *more
        )

    whole = trained(cut("whole"))
    trained(cut("cut", "train.steps=2"))
    resumed = trained(cut("cut"), resume="auto")
    one, two = checkpoint_tensors(whole.checkpoint), checkpoint_tensors(resumed.checkpoint)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.endswith("attn2.to_k.bias"):
            continue  # its gradient is zero but for rounding, and the update is as large as any
        rounding = 1e-2 if tensor.dtype == torch.bfloat16 or kind else 1e-4
        size = float(tensor.double().norm())
        assert float((two[name].double() - tensor.double()).norm()) <= rounding * size + 1e-6, name


def test_rounding_at_random_is_the_same_everywhere(where: torch.device) -> None:
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found = []
    for place in (CPU, where):
        into = torch.empty(1000, dtype=torch.bfloat16, device=place)
        round_at_random(numbers.to(place), into, "key")
        found.append(into.cpu())
    assert torch.equal(*found)


def test_a_step_of_each_objective_is_that_of_the_cpu(config: Config, where: torch.device) -> None:
    """Losses and gradients of a distillation, whose tangent is a forward derivative."""
    student = student_architecture(SHAPE, 0.1)
    expected: dict[str, Tensor] = {}
    for place in (CPU, where):
        chosen = DistillConfig.model_validate({"teacher": "some", "method": "scm", "tangent": "jvp"})
        teacher, model = build(SHAPE, 1).to(place), build(student, 2).to(place)
        objective = Distillation(chosen, student, teacher, "flow_prediction", "fp32", is_pixels=True, seed=0)
        nn.ModuleDict(objective.modules).to(place)
        objective.use_average(model)
        torch.manual_seed(0)
        batch = drawn_batch(objective)
        generator = torch.Generator().manual_seed(0)
        numbers = {
            name: torch.rand(value.shape, generator=generator)
            for name, value in vars(batch).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        full = MicroBatch(**(vars(batch) | numbers)).to(place)
        with device.exact_float32():
            total(objective.losses(model, full)).sum().backward()
        found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        expected = expected or found
        for name, gradient in found.items():
            size = float(expected[name].norm())
            assert float((gradient - expected[name]).norm()) <= 1e-3 * size + 1e-5, name


def test_pictures_are_those_of_the_cpu(config: Config, where: torch.device) -> None:
    """In float32, to a shade of grey or two."""
    step = trained(config).checkpoint
    with device.exact_float32():
        expected = sampled(step, "4 two", "six").pixels
        *_, summary = sample(SampleOptions(("4 two", "six"), checkpoint=step, device=str(where)))
    assert isinstance(summary, SampleSummary)
    assert int((summary.pixels.int() - expected.int()).abs().max()) <= 2


def test_memory_of_the_device_is_counted(where: torch.device) -> None:
    before, free = device.peak_memory(where), device.free_memory(where)
    kept = torch.ones(2**24, device=where)  # 64 MiB
    assert device.peak_memory(where) >= before
    assert device.peak_memory(where) >= kept.numel() * 4
    left = device.free_memory(where)
    if where.type == "cuda":
        assert free is not None
        assert left is not None
        assert 2**25 < free - left < 2**28
        del kept
        again_free = device.free_memory(where)
        assert again_free is not None
        assert again_free - left > 2**25, "what the allocator keeps is free"


def test_a_micro_batch_arrives_whole(config: Config, where: torch.device) -> None:
    made = make_trainer(config, 4)
    batch = training_batch(made.task.train_set, made.task.objective, 0, np.arange(4))
    there = batch.to(where)
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            moved = getattr(there, name)
            assert moved.device.type == where.type
            assert torch.equal(moved.cpu(), value), name
    made.close()
