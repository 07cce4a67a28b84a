"""How OpenMP threads wait for each other while torch runs operations on a CPU.

At the end of each operation a thread waits for the others. OpenMP spins, which is fast while
every thread has a core of its own. If other programs use the cores, the threads that would end
the wait cannot run, and training nearly stops.

There are two remedies. Before OpenMP is loaded, the environment asks for a short spin
(`ask_for_short_waits`). During a command, a thread measures how long our threads wait for a
core (`watch`). If that is long, it makes libgomp stop spinning until the cores are free again.
Both are needed: with a short spin alone, two runs at once are four times slower or worse;
without any spin, a single run loses up to four fifths of its speed. Only waiting changes, no
computed number. This module does not import torch.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

SETTINGS = {
    "GOMP_SPINCOUNT": "10000",  # libgomp (torch's Linux wheels): about 0.2 ms; default 6 ms
    "KMP_BLOCKTIME": "1",  # libomp and Intel's (macOS, Windows, conda): 1 ms; default 200 ms
}
USERS = (*SETTINGS, "OMP_WAIT_POLICY", "KMP_LIBRARY")  # if the user sets one of these, we change nothing
PERIOD = 0.25  # seconds between measurements
# Limits on the seconds per second that all threads together waited for a core. On two cores, a
# spinning run has 0.07 alone (its batch reader) and over 0.6 beside other work; a run that does
# not spin has 0.02 and 0.46.
CROWDED = 0.25  # above this, plus the next for each core, spinning stops
CROWDED_PER_CORE = 0.02  # many threads have many short waits
CALM = 0.12  # below this the cores are free
LOOKS_UNTIL_CALM = 8  # consecutive calm measurements before spinning starts again


def ask_for_short_waits(environment: MutableMapping[str, str]) -> None:
    """Ask OpenMP for a short spin, in `environment`, unless the user has set any of `USERS`.

    Call it before `import torch`: OpenMP reads the environment when it is loaded. Child
    processes inherit the setting.
    """
    if not any(name in environment for name in USERS):
        environment.update(SETTINGS)


def waited_for_a_core(tasks: Path = Path("/proc/self/task")) -> float | None:
    """Total seconds that our threads were ready to run but had no core; None if unknown.

    It is the second number of Linux's `schedstat`, in nanoseconds
    (Documentation/scheduler/sched-stats.rst).
    """
    total = found = 0
    with contextlib.suppress(OSError):
        for task in tasks.iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):  # the thread has just ended
                total += int((task / "schedstat").read_text(encoding="ascii").split()[1])
                found += 1
    return total / 1e9 if found else None


def _throttle() -> Callable[[int], object] | None:
    """A function that opens a team of idle threads in the loaded libgomp; None without libgomp.

    libgomp counts the threads of all its teams. With more threads than cores it spins at most a
    hundred times (GOMP_SPINCOUNT in its manual: "when there are more managed OpenMP threads
    than available CPUs"). A team lasts as long as the thread that opened it.
    """
    import ctypes  # here, to keep --help fast

    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)  # torch loads its OpenMP with global symbols
        if hasattr(library, "kmp_set_blocktime"):  # libomp, which has GOMP functions too
            return None
        parallel, free = library.GOMP_parallel, ctypes.cast(library.free, ctypes.c_void_p)
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return lambda threads: parallel(free, None, threads, 0)  # each thread calls free(NULL), a no-op
    return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Throttle:
    """Stops libgomp's spinning until it is closed."""

    def __init__(self, open_team: Callable[[int], object]) -> None:
        self._end = threading.Event()

        def hold() -> None:
            open_team(_cores() + 1)
            self._end.wait()

        self._thread = threading.Thread(target=hold, name="openmp-throttle", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let it spin again."""
        self._end.set()
        self._thread.join(timeout=1)


class Watch:
    """Decides from measurements whether the cores are crowded. It reads no clock itself."""

    def __init__(self, cores: int) -> None:
        self.crowded = False
        self._most = CROWDED + CROWDED_PER_CORE * cores
        self._calm_looks = 0

    def look(self, waited: float, elapsed: float) -> bool:
        """Add a measurement and return whether to stop spinning.

        In the last `elapsed` seconds, all threads together waited `waited` seconds for a core.
        """
        share = waited / elapsed if elapsed > 0 else 0.0
        self._calm_looks = self._calm_looks + 1 if share < CALM else 0
        if share > self._most:
            self.crowded = True
        elif self._calm_looks >= LOOKS_UNTIL_CALM:
            self.crowded = False
        return self.crowded


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """During the block, stop libgomp's spinning while other programs crowd the cores.

    It does nothing without libgomp, or if the environment has other settings than those of
    `ask_for_short_waits`. Torch must be loaded.
    """
    before = waited_for_a_core()
    found = {name: os.environ[name] for name in USERS if name in os.environ}
    asked = bool(found) and all(SETTINGS.get(name) == value for name, value in found.items())
    open_team = _throttle() if asked else None
    if before is None or open_team is None:
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch_loop, args=(ended, open_team), name="openmp-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join(timeout=1)


def _watch_loop(ended: threading.Event, open_team: Callable[[int], object]) -> None:
    state, throttle = Watch(_cores()), None
    before, clock = waited_for_a_core() or 0.0, time.monotonic()
    while not ended.wait(PERIOD):
        now, waited = time.monotonic(), waited_for_a_core() or 0.0
        crowded = state.look(max(0.0, waited - before), now - clock)
        before, clock = waited, now
        if crowded and throttle is None:
            throttle = Throttle(open_team)
        elif not crowded and throttle is not None:
            throttle.close()
            throttle = None
    if throttle is not None:
        throttle.close()
