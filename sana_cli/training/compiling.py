"""Whether `torch.compile` of the blocks pays for its start, from what was measured on this machine.

It knows no model and no run: it is given functions that time a micro-batch. What they found is kept beside
the compiler's own cache, for each machine and kind of micro-batch, so a later run need not measure again.
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sana_cli.runtime import files
from sana_cli.units import human_time

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # the compiler's own variable for where it keeps what it made
COMPILERS = ("c++", "g++", "clang++", "cl")  # one of which it calls on a CPU; CXX names another
FEWEST = 2_000  # micro-batches: for fewer, no step is so slow that it is worth finding out
LIKELY_GAIN = 0.15  # of a micro-batch's time, where nothing was measured yet
LIKELY_START = 60.0  # seconds, likewise
CACHED = 0.35  # of the first start, for one that finds it in the cache: 0.21 to 0.26 was measured


@dataclass(frozen=True)
class Measured:
    """Seconds of one kind of micro-batch, forward and back, on this machine."""

    plain: float
    compiled: float | None  # None: the compiler failed
    start: float  # from nothing
    again: float | None = None  # with the cache of a former run; None: not seen yet

    def gain(self, micro_batches: int) -> float:
        """Seconds that compiling saves, less those of its next start; below 0 it costs."""
        if self.compiled is None:
            return -self.start
        start = CACHED * self.start if self.again is None else self.again
        return micro_batches * (self.plain - self.compiled) - start


@dataclass(frozen=True)
class Decision:
    """Whether the blocks are compiled, and the line that says why."""

    compiled: bool
    why: str


def use_cache() -> Path:
    """The folder in which the compiler keeps what it made: the user's, or one that outlives a restart.

    PyTorch chooses one under /tmp as soon as it imports its compiler, so this comes first.
    """
    if CACHE not in os.environ:
        try:
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:  # a user without a home, as in some containers
            home = Path(tempfile.gettempdir())
        os.environ[CACHE] = str(home / "sana" / "compiled")
    return Path(os.environ[CACHE])


def missing_compiler(device: torch.device) -> str | None:
    """What `torch.compile` would need on this device and cannot find; None: it is there."""
    if device.type == "cpu":
        named = os.environ.get("CXX", "").split()
        found = any(shutil.which(name) for name in (*named[:1], *COMPILERS))
        return None if found else "a C++ compiler (g++ or clang++)"
    if device.type == "cuda":
        from torch.utils._triton import has_triton  # slow to import

        return None if has_triton() else "Triton (pip install triton)"
    return f"a compiler for {device.type}"


def kind_of_micro_batch(device: torch.device, facts: Mapping[str, Any]) -> str:
    """A name for what is measured: equal for equal machines, versions and `facts`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    machine = {
        "device": device.type,
        "name": name,
        "node": platform.node(),
        "threads": torch.get_num_threads(),
    }
    whole = {"torch": torch.__version__, **machine, **facts}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:16]


def known(kind: str) -> Measured | None:
    """What was measured of this kind before, if that is on record and readable."""
    try:
        return Measured(**json.loads(_path(kind).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def keep(kind: str, found: Measured) -> None:
    """Put a measurement on record. A cache that cannot be written costs a later run its time, and nothing else."""
    try:
        _path(kind).parent.mkdir(parents=True, exist_ok=True)
        files.write_text(_path(kind), json.dumps(asdict(found)))
    except OSError:
        pass


def _path(kind: str) -> Path:
    return use_cache() / f"sana-{kind}.json"


def decide(
    kind: str, micro_batches: int, plain: Callable[[], float], start: Callable[[], tuple[float, float]]
) -> Iterator[str | Decision]:
    """Yields a line before what takes long, and a `Decision` at the end.

    Args:
        kind: of micro-batch (`kind_of_micro_batch`).
        micro_batches: that are left of the run, in this process.
        plain: seconds of a micro-batch as it is.
        start: compiles, and returns the seconds until the first micro-batch was done and those of a later one.
            May raise whatever a compiler raises.
    """
    before = known(kind)
    if before is None:
        if micro_batches < FEWEST:
            yield Decision(False, "")  # too short to speak of
            return
        seconds = plain()
        likely = Measured(seconds, seconds * (1 - LIKELY_GAIN), LIKELY_START, again=LIKELY_START)
        if likely.gain(micro_batches) <= 0:
            left = human_time(seconds * micro_batches)
            yield Decision(False, f"blocks are not compiled: {left} of training would not pay for its start")
            return
    elif before.gain(micro_batches) <= 0:
        yield Decision(False, f"blocks are not compiled: {_in_words(before)} ({_path(kind)})")
        return
    else:
        seconds = plain()  # again: the machine may have been busy then
    yield "compiling the blocks, which may take a minute (train.compile=false leaves it out)"
    try:
        took, compiled = start()
    except Exception as error:  # whatever a compiler raises: the run goes on without it
        keep(kind, Measured(seconds, None, LIKELY_START))
        reason = str(error).strip().splitlines() or [type(error).__name__]
        yield Decision(False, f"blocks are not compiled: the compiler failed ({reason[0]:.120})")
        return
    if before is None:
        found = Measured(seconds, compiled, took)
    else:
        found = replace(before, plain=seconds, compiled=compiled, again=took)
    keep(kind, found)
    faster = compiled < seconds
    yield Decision(faster, f"blocks are {'' if faster else 'not '}compiled: {_in_words(found)}")


def _in_words(found: Measured) -> str:
    if found.compiled is None:
        return "the compiler failed here before"
    start = found.start if found.again is None else found.again
    return (
        f"a micro-batch takes {1000 * found.compiled:.0f} ms with it and {1000 * found.plain:.0f} without, "
        f"and it starts in {start:.0f} s"
    )
