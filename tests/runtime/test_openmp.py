"""Short OpenMP waits: set by every way to start `sana`, and switched while a command runs."""

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPOSITORY, SMALL, process_environment

from sana_cli.runtime import openmp

TELL = "import json, os, sys; print(json.dumps({n: os.environ.get(n) for n in sys.argv[1].split(',')}))"
NAMES = ",".join(openmp.USERS)
# writes the OpenMP variables of a process at its first import of torch to a file beside it
SPY = """
import importlib.abc, importlib.util, json, os, pathlib, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            found = {n: os.environ[n] for n in %r if n in os.environ}
            pathlib.Path(__file__).with_name(f"found-{os.getpid()}.json").write_text(json.dumps(found))
            sys.meta_path.remove(self)
        return None
sys.meta_path.insert(0, Finder())
"""


def recorded(folder: Path) -> list[dict[str, str]]:
    return [json.loads(path.read_text()) for path in folder.glob("found-*.json")]


@pytest.fixture
def spied(tmp_path: Path) -> Path:
    """A folder in which processes record their OpenMP variables, in site/."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SPY % (openmp.USERS,))
    (tmp_path / "small.yaml").write_text(SMALL + "run: {dir: runs/small, device: cpu}\n")
    return tmp_path


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {
        name: value for name, value in process_environment(folder).items() if name not in openmp.USERS
    } | more


SCRIPT = str(Path(sys.executable).with_name("sana"))
WAYS = {
    "sana": [SCRIPT],
    "python -m": [sys.executable, "-m", "sana_cli"],
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29637"),
        *("-m", "sana_cli"),
    ],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_asks_before_torch_is_loaded(way: str, spied: Path) -> None:
    if way == "sana" and not Path(SCRIPT).exists():
        pytest.skip("not installed as a script")
    command = [*WAYS[way], "embed", "--config", "small.yaml", "--limit", "300", "--set", "data.workers=2"]
    done = subprocess.run(
        command, cwd=spied, env=environment(spied), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = recorded(spied / "site")
    asked = [one for one in found if one == openmp.SETTINGS]
    launcher = 1 if way == "torchrun" else 0  # torchrun itself computes nothing
    assert len(asked) == len(found) - launcher >= (2 if way == "torchrun" else 1)


def test_workers_inherit_it(spied: Path) -> None:
    """Spawned processes inherit the settings of their parent."""
    script = (
        "import os, sys, subprocess\nfrom sana_cli.runtime.openmp import ask_for_short_waits\n"
        "ask_for_short_waits(os.environ)\n"
        f"subprocess.run([sys.executable, '-c', {TELL!r}, {NAMES!r}], check=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(spied), capture_output=True, text=True, check=True
    )
    assert {n: v for n, v in json.loads(done.stdout).items() if v is not None} == openmp.SETTINGS


@pytest.mark.parametrize("name", openmp.USERS)
def test_the_users_own_word_counts(name: str) -> None:
    mine = {name: "7", "OTHER": "1"}
    openmp.ask_for_short_waits(mine)
    assert mine == {name: "7", "OTHER": "1"}
    empty: dict[str, str] = {}
    openmp.ask_for_short_waits(empty)
    assert empty == openmp.SETTINGS


def test_the_watch_knows_a_crowd_from_a_run_alone() -> None:
    """Shares measured on two cores, with and without spinning, alone and beside other work."""
    watch = openmp.Watch(cores=2)
    assert not any(watch.look(0.07 * 0.25, 0.25) for _ in range(50)), "a run alone, with its batch reader"
    assert watch.look(0.6 * 0.25, 0.25), "one busy loop beside it"
    assert all(watch.look(0.46 * 0.25, 0.25) for _ in range(50)), "two runs that do not spin: still a crowd"
    assert watch.look(0.02 * 0.25, 0.25), "one quiet moment is not enough"
    assert not [watch.look(0.02 * 0.25, 0.25) for _ in range(openmp.LOOKS_UNTIL_CALM)][-1], "alone again"
    assert not openmp.Watch(cores=64).look(0.8, 1.0), "many threads have many small waits"
    assert not openmp.Watch(cores=2).look(1.0, 0.0), "no time has passed"


def test_waits_are_read_off_each_thread(tmp_path: Path) -> None:
    for name, text in (
        ("1", "5000000000 2000000000 7\n"),
        ("2", "1 500000000 9\n"),
        ("3", "nonsense"),
        ("4", ""),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    (tmp_path / "5").mkdir()  # a thread that just ended
    assert openmp.waited_for_a_core(tmp_path) == 2.5
    assert openmp.waited_for_a_core(tmp_path / "nowhere") is None, "a system without schedstat"


def libgomp() -> bool:
    library = ctypes.CDLL(None)
    return hasattr(library, "GOMP_parallel") and not hasattr(library, "kmp_set_blocktime")


@pytest.mark.skipif(not sys.platform.startswith("linux") or not libgomp(), reason="torch uses another OpenMP")
def test_more_threads_than_cores_stop_libgomp_from_spinning() -> None:
    """After an operation of two threads, the processor time of the second shows if it spins."""
    script = """
import os, time
os.environ["GOMP_SPINCOUNT"] = "100000000000"
import torch
from sana_cli.runtime import openmp
torch.set_num_threads(2)
work = torch.ones(4_000_000)
def burnt():
    work.mul_(1.0)
    before = time.process_time()
    time.sleep(0.4)
    return time.process_time() - before
spinning = burnt()
throttle = openmp.Throttle(openmp._throttle())
time.sleep(0.3)
work.mul_(1.0)
time.sleep(0.1)
throttled = burnt()
throttle.close()
time.sleep(0.2)
again = burnt()
print(spinning > 0.1, throttled < 0.05, again > 0.1)
"""
    environment = {
        name: value for name, value in os.environ.items() if name not in (*openmp.USERS, "OMP_NUM_THREADS")
    }
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["True", "True", "True"], done.stderr


def test_a_watch_opens_and_closes_its_throttle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Driven by simulated waits: first a crowd, then none."""
    waited = [0.0]
    teams: list[int] = []
    alive = [0]

    class Counted(openmp.Throttle):
        def __init__(self, open_team: object) -> None:
            super().__init__(teams.append)
            alive[0] += 1

        def close(self) -> None:
            super().close()
            alive[0] -= 1

    monkeypatch.setattr(openmp, "PERIOD", 0.01)
    monkeypatch.setattr(openmp, "Throttle", Counted)
    monkeypatch.setattr(openmp, "_throttle", lambda: teams.append)
    monkeypatch.setattr(openmp, "waited_for_a_core", lambda: waited[0])
    for name in openmp.USERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in openmp.SETTINGS.items():
        monkeypatch.setenv(name, value)

    def wait_until(wanted: int, step: float) -> None:
        deadline = time.monotonic() + 30
        while alive[0] != wanted:
            waited[0] += step
            time.sleep(0.005)
            assert time.monotonic() < deadline

    with openmp.watch():
        wait_until(1, 1.0)
        wait_until(0, 0.0)
        wait_until(1, 1.0)
    assert alive[0] == 0, "it closes with the command"
    monkeypatch.delenv("KMP_BLOCKTIME")
    with openmp.watch():  # one of the two variables is enough
        wait_until(1, 1.0)
    assert teams
    assert min(teams) > (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    before = len(teams)
    with openmp.watch():
        waited[0] += 100
        time.sleep(0.1)
    assert len(teams) == before, "the user's setting wins"
