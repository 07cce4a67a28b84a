"""Devices, precisions and memory: which there are, and which a config means. It knows no model."""

import contextlib
import ctypes
import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from sana_cli.choices import Precision
from sana_cli.errors import SanaError

resource: Any = importlib.import_module("resource") if importlib.util.find_spec("resource") else None  # Windows has none

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of glibc's mallopt (malloc.h)
KEPT_PIECE = 1 << 25  # bytes of the largest tensor whose memory is kept when it is freed: older glibc allow no more
KEPT = 1 << 30  # bytes kept in all


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU; anything else must be there. Freed memory is kept from here on.

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
        raise SanaError(f"no device {name!r}", "devices are auto, cpu, mps, cuda and cuda:N", exit_code=2) from error
    here = {"cpu": True, "cuda": cuda and (device.index or 0) < torch.cuda.device_count(), "mps": mps}
    if not here.get(device.type, False):
        raise SanaError(f"this machine has no device {name}", f"it has: {', '.join(devices())}; auto takes the best of them")
    return device


def devices() -> list[str]:
    """The names of this machine's devices, the CPU first."""
    cuda = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in hardware rather than by conversion: then bf16 is the faster choice."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return cpu_has_bf16()
    return False


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies in bf16: AVX-512 or AMX on x86-64, the bf16 instructions on ARM."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the device has it natively, else fp32.

    Raises:
        SanaError: it is none of `choices.Precision`.
    """
    if name not in get_args(Precision):
        raise SanaError(f"precision: {name!r} is not one of {', '.join(get_args(Precision))}", exit_code=2)
    return ("bf16" if has_native_bf16(device) else "fp32") if name == "auto" else name


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on CUDA, resident in this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def free_memory(device: torch.device) -> int | None:
    """Bytes that could still be taken on the device, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    with contextlib.suppress(OSError, StopIteration, IndexError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device, or the system, has no room for a tensor: CUDA has a class for it, others words."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def resident_memory() -> int:
    """Bytes of this process that are in memory now, or have been at most where the system does not tell."""
    return _status("VmRSS")


def _status(field: str) -> int:
    with contextlib.suppress(OSError, StopIteration, IndexError, ValueError):  # Linux: of this program, not of its parent as well
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


T = TypeVar("T")


class Stage:
    """The models of one command on one device: one at a time (`offload`), or each kept once it is there.

    A model is loaded straight on to the device when it is first needed and dropped when its turn is over; nobody needs it
    a second time. `report` is told of each coming and going.
    """

    def __init__(
        self, device: torch.device, offload: bool, report: Callable[[str, str], None] = lambda _what, _name: None
    ) -> None:
        self.device, self.offload, self.report = device, offload, report
        self.kept: dict[str, Any] = {}

    @contextmanager
    def hold(self, name: str, load: Callable[[], T]) -> Iterator[T]:
        """What `load` gives, for as long as the block lasts. The block must keep no other reference to it."""
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
    """Let this process keep what tensors on the CPU free, for the next ones; `return_memory` still gives it back.

    glibc by itself returns it to the system after nearly every operation, and a third of the time of drawing went into the page faults
    of taking it again.
    """
    _glibc("mallopt", MMAP_THRESHOLD, KEPT_PIECE)
    _glibc("mallopt", TRIM_THRESHOLD, KEPT)


def _glibc(function: str, *arguments: int) -> None:
    """Call a function of the C library, where it is glibc."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)


def release_memory(device: torch.device) -> None:
    """Free what only cycles still hold, and give all back to the system, so that the next model finds room."""
    gc.collect()
    return_memory(device)


def return_memory(device: torch.device) -> None:
    """Give back to the system what freed tensors held."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        _glibc("malloc_trim", 0)  # it keeps what was freed until it is told
