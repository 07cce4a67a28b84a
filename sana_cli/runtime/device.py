"""Devices, precisions and memory: what the machine has, and what a config selects.

It knows no model.
"""

import contextlib
import ctypes
import functools
import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from sana_cli.choices import Precision
from sana_cli.errors import SanaError

# not on Windows
resource: Any = importlib.import_module("resource") if importlib.util.find_spec("resource") else None

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # parameters of glibc's mallopt (malloc.h)
MAX_KEPT_BLOCK = 1 << 25  # bytes: larger tensors return their memory when freed; older glibc allow no more
MAX_KEPT = 1 << 30  # bytes kept in all
# kernels that oneDNN keeps compiled, of 1024 by default. In bf16 each count of caption tokens needs its own: they took
# 100 MB more after 80 steps. A step of one shape needs some sixty.
KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "64"}


def resolve_device(name: str) -> torch.device:
    """Resolve a device name; `auto` is CUDA, MPS or the CPU. Also call `keep_freed_memory`.

    Raises:
        SanaError: this machine has no such device.
    """
    keep_freed_memory()
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SanaError(
            f"no device {name!r}", "devices are auto, cpu, mps, cuda and cuda:N", exit_code=2
        ) from error
    has_cuda = cuda and (device.index or 0) < torch.cuda.device_count()
    available = {"cpu": True, "cuda": has_cuda, "mps": mps}
    if not available.get(device.type, False):
        raise SanaError(
            f"this machine has no device {name}",
            f"it has: {', '.join(devices())}; auto takes the best of them",
        )
    return device


def devices() -> list[str]:
    """List the names of this machine's devices, the CPU first."""
    cuda = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def has_native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bf16, which makes bf16 the faster choice."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return False
        with torch.cuda.device(device):  # it asks the current one
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return cpu_has_bf16()
    return False


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bf16: AVX-512 or AMX on x86-64, or bf16 on ARM."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@functools.cache
def mkl_keeps_to_avx2() -> bool:
    """Whether MKL, by which PyTorch multiplies float32 on a CPU, leaves its AVX-512 units unused.

    It does on AMD's. oneDNN uses them: its products were 2.3 times as fast on a Zen 5.
    """
    capabilities = torch.cpu.get_capabilities()
    here = capabilities.get("avx512_f") and "AMD" in capabilities.get("cpu_name", "")
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return bool(
        here and both and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )  # which is not a public name


def resolve_precision(name: str, device: torch.device) -> str:
    """Resolve a precision; `auto` is bf16 if the device has it natively, else fp32.

    Raises:
        SanaError: it is not one of `choices.Precision`.
    """
    if name not in get_args(Precision):
        raise SanaError(f"precision: {name!r} is not one of {', '.join(get_args(Precision))}", exit_code=2)
    return ("bf16" if has_native_bf16(device) else "fp32") if name == "auto" else name


def frozen_dtype(device: torch.device) -> torch.dtype:
    """The type of encoders where nothing else is asked: float32 on a CPU, and on a GPU that only emulates bf16."""
    emulated = device.type == "cuda" and not has_native_bf16(device)
    return torch.float32 if device.type == "cpu" or emulated else torch.bfloat16


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast, or none for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated on CUDA, otherwise resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def free_memory(device: torch.device) -> int | None:
    """Bytes still available on the device; None if the system does not report it."""
    if device.type == "cuda":  # what PyTorch has reserved and does not use is free for its next tensors
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    with contextlib.suppress(OSError, StopIteration, IndexError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory: a class on CUDA, and only a message elsewhere or of its libraries."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def exact_float32() -> AbstractContextManager[None]:
    """Float32 products without TF32, which cuDNN uses for convolutions by default."""
    return tf32(allowed=False)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let products and convolutions of float32 round their factors to TF32, or not."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    with contextlib.ExitStack() as undo:
        for backend, operations in ((cudnn, cudnn.conv), (matmul, matmul)):
            # PyTorch has two switches, and raises if the older is read after the newer was set otherwise
            try:
                undo.callback(setattr, backend, "allow_tf32", backend.allow_tf32)
                backend.allow_tf32 = allowed
            except RuntimeError:
                undo.callback(setattr, operations, "fp32_precision", operations.fp32_precision)
                operations.fp32_precision = "tf32" if allowed else "ieee"
        yield


def resident_memory() -> int:
    """Resident bytes of this process now; the peak if the system does not report it."""
    return _status("VmRSS")


def _status(field: str) -> int:
    """Read a field of Linux's /proc/self/status, in bytes; elsewhere the peak resident size."""
    # ru_maxrss is inherited from the parent process on Linux
    with contextlib.suppress(OSError, StopIteration, IndexError, ValueError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


T = TypeVar("T")


class Stage:
    """The models of one command on one device: all kept, or with `offload` one at a time.

    Each model is loaded straight onto the device and used once. `report` is called with "load"
    or "free" and the model's name.
    """

    def __init__(
        self,
        device: torch.device,
        offload: bool,
        report: Callable[[str, str], None] = lambda _what, _name: None,
    ) -> None:
        self.device, self.offload, self.report = device, offload, report
        self.kept: dict[str, Any] = {}

    @contextmanager
    def hold(self, name: str, load: Callable[[], T]) -> Iterator[T]:
        """Load a model for the block, which must keep no other reference to it."""
        model = load()
        self.report("load", name)
        try:
            yield model
        finally:
            if not self.offload:
                self.kept[name] = model
            del model
            if self.offload:
                release_memory(self.device)
                self.report("free", name)


def keep_freed_memory() -> None:
    """Keep the memory of freed CPU tensors for later ones. `return_memory` still returns it.

    By default glibc returns it to the system after nearly every operation. A third of the
    sampling time then went into page faults. Fewer of oneDNN's compiled kernels are kept than by default.
    """
    for variable, count in KERNELS_KEPT.items():
        os.environ.setdefault(variable, count)  # oneDNN reads them at its first use
    _glibc("mallopt", MMAP_THRESHOLD, MAX_KEPT_BLOCK)
    _glibc("mallopt", TRIM_THRESHOLD, MAX_KEPT)


def _glibc(function: str, *arguments: int) -> None:
    """Call a function of the C library if it is glibc."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)


def release_memory(device: torch.device) -> None:
    """Collect reference cycles and return freed memory, to make room for a model."""
    gc.collect()
    return_memory(device)


def return_memory(device: torch.device) -> None:
    """Return the memory of freed tensors to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        _glibc("malloc_trim", 0)
