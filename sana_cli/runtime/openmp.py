"""How threads wait for one another in OpenMP, which runs torch's operations on a CPU.

At the end of every operation a thread waits for the others. The runtimes spin there: quick, as long as every thread has a core
of its own. Beside other work they spin while what they wait for has no core to run on, and training all but stops.

Two things are done about it. Before OpenMP is loaded the environment asks for a short spin (`ask_for_short_waits`). While a
command works, a thread looks at how long ours wait for a core (`watch`). Where that is much, it makes libgomp stop spinning,
and spin again once the cores are free: the short spin alone still costs two runs at once a factor of four or more, and no spin
costs one run alone up to four fifths. It changes when threads wait, and no number that they compute. It does not import torch.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

SETTINGS = {
    "GOMP_SPINCOUNT": "10000",  # libgomp (torch's wheels for Linux): a fifth of a millisecond or so, in place of six
    "KMP_BLOCKTIME": "1",  # libomp and Intel's (macOS, Windows, conda): milliseconds, in place of 200
}
USERS = (*SETTINGS, "OMP_WAIT_POLICY", "KMP_LIBRARY")  # who has set one of these has decided
PERIOD = 0.25  # seconds between two looks
# seconds in a second that threads, all together, waited for a core. On two cores a run alone has 0.07 (its reader of batches), a
# spinning one beside other work 0.6 and more; one that does not spin has 0.02 alone, and 0.46 beside other work
CROWDED = 0.25  # from here on nobody spins,
CROWDED_PER_CORE = 0.02  # and so much more for each core: many threads have many small waits
CALM = 0.12  # below this the cores are free again
LOOKS_UNTIL_CALM = 8  # in a row


def ask_for_short_waits(environment: MutableMapping[str, str]) -> None:
    """Ask OpenMP for a short spin, in `environment`, which processes started from here inherit. The user's own word counts.

    It acts on runtimes that are loaded after it, so it comes before `import torch`.
    """
    if not any(name in environment for name in USERS):
        environment.update(SETTINGS)


def waited_for_a_core(tasks: Path = Path("/proc/self/task")) -> float | None:
    """Seconds that the threads of this process were ready to run and had no core, so far; None where the system does not tell.

    It is the second number of Linux's `schedstat`, in nanoseconds (Documentation/scheduler/sched-stats.rst).
    """
    total = found = 0
    with contextlib.suppress(OSError):
        for task in tasks.iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that has just ended
                total += int((task / "schedstat").read_text(encoding="ascii").split()[1])
                found += 1
    return total / 1e9 if found else None


def _throttle() -> Callable[[int], object] | None:
    """A function that opens a team of so many idle threads in the libgomp that is loaded; None where there is no such.

    libgomp counts the threads of all its teams. While they are more than the cores it spins a hundred times at most (the
    manual's GOMP_SPINCOUNT: "when there are more managed OpenMP threads than available CPUs"). A team lasts as long as the
    thread that opened it.
    """
    import ctypes  # not on the way to --help

    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)  # torch loads its OpenMP for all to see
        if hasattr(library, "kmp_set_blocktime"):  # libomp, which takes GOMP's calls too
            return None
        parallel, nothing = library.GOMP_parallel, ctypes.cast(library.free, ctypes.c_void_p)
        parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return lambda threads: parallel(nothing, None, threads, 0)  # each calls free(NULL), which does nothing
    return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Throttle:
    """libgomp told to stop spinning, until it is closed."""

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
    """Decides, look after look, whether the cores are crowded. It knows no thread and no clock: it is given what they say."""

    def __init__(self, cores: int) -> None:
        self.crowded = False
        self._most = CROWDED + CROWDED_PER_CORE * cores
        self._calm_looks = 0

    def look(self, waited: float, elapsed: float) -> bool:
        """Whether nobody should spin, after `elapsed` more seconds in which threads waited `waited` seconds for a core."""
        share = waited / elapsed if elapsed > 0 else 0.0
        self._calm_looks = self._calm_looks + 1 if share < CALM else 0
        if share > self._most:
            self.crowded = True
        elif self._calm_looks >= LOOKS_UNTIL_CALM:
            self.crowded = False
        return self.crowded


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """While the block lasts, stop libgomp's spinning whenever other work crowds the cores. Where it cannot, do nothing.

    It does nothing unless the environment asks for short waits, as `ask_for_short_waits` does: who has set any of `USERS`
    otherwise has decided. It needs a loaded torch.
    """
    before = waited_for_a_core()
    said = {name: os.environ[name] for name in USERS if name in os.environ}
    asked = bool(said) and all(SETTINGS.get(name) == value for name, value in said.items())
    open_team = _throttle() if asked else None
    if before is None or open_team is None:
        yield
        return
    ended = threading.Event()
    looking = threading.Thread(target=_look, args=(ended, open_team), name="openmp-watch", daemon=True)
    looking.start()
    try:
        yield
    finally:
        ended.set()
        looking.join(timeout=1)


def _look(ended: threading.Event, open_team: Callable[[int], object]) -> None:
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
