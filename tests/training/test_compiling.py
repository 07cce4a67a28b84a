"""When `torch.compile` pays, and that a compiled run is the same run."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sana_cli.training import compiling
from sana_cli.training.compiling import Decision, Measured

KIND, MANY = "0123456789abcdef", 100_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for what is measured."""
    monkeypatch.setenv(compiling.CACHE, str(tmp_path))
    return tmp_path


def never() -> float:
    raise AssertionError("nothing is measured here")


def started(took: float, each: float) -> Callable[[], tuple[float, float]]:
    return lambda: (took, each)


def decided(
    micro_batches: int, plain: Callable[[], float], start: Callable[[], tuple[float, float]]
) -> Decision:
    *notes, decision = compiling.decide(KIND, micro_batches, plain, start)
    assert isinstance(decision, Decision)
    assert all(isinstance(note, str) for note in notes)
    return decision


def test_gain_is_what_the_steps_save_less_the_start() -> None:
    assert Measured(0.05, 0.03, start=40).gain(1000) == pytest.approx(20 - compiling.CACHED * 40)
    assert Measured(0.05, 0.03, start=40, again=5).gain(1000) == pytest.approx(15)
    assert Measured(0.03, 0.05, start=0).gain(10) == pytest.approx(-0.2)
    assert Measured(0.05, None, start=40).gain(10**9) < 0


def test_a_short_run_measures_nothing(cache: Path) -> None:
    assert not decided(compiling.FEWEST - 1, never, lambda: (never(), 0)).compiled
    assert not list(cache.iterdir())


def test_a_run_whose_steps_are_quick_does_not_compile(cache: Path) -> None:
    quick = 0.9 * compiling.LIKELY_START / compiling.LIKELY_GAIN / MANY
    decision = decided(MANY, lambda: quick, lambda: (never(), 0))
    assert not decision.compiled
    assert "would not pay" in decision.why
    assert not list(cache.iterdir())


def test_what_is_measured_serves_later_runs() -> None:
    assert decided(MANY, lambda: 0.1, started(50, 0.06)).compiled
    assert compiling.known(KIND) == Measured(0.1, 0.06, 50)
    # 500 micro-batches save 20 s, and a start from the cache is expected to take less
    assert decided(500, lambda: 0.1, started(9, 0.06)).compiled
    assert compiling.known(KIND) == Measured(0.1, 0.06, 50, again=9)
    # 200 save 8 s, which a start of 9 does not pay for
    decision = decided(200, never, lambda: (never(), 0))
    assert not decision.compiled
    assert "60 ms with it and 100 without" in decision.why


def test_a_slower_result_is_not_used_and_remembered() -> None:
    assert not decided(MANY, lambda: 0.1, started(50, 0.11)).compiled
    assert not decided(MANY, never, lambda: (never(), 0)).compiled


def test_a_compiler_that_fails_leaves_the_run_as_it_is() -> None:
    def fails() -> tuple[float, float]:
        raise RuntimeError("no such thing\nand a long trace")

    decision = decided(MANY, lambda: 0.1, fails)
    assert not decision.compiled
    assert "the compiler failed (no such thing)" in decision.why
    assert not decided(MANY, never, lambda: (never(), 0)).compiled


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plain": 1}'])
def test_a_damaged_record_counts_as_none(cache: Path, text: str) -> None:
    (cache / f"sana-{KIND}.json").write_text(text)
    assert compiling.known(KIND) is None


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "file").touch()
    monkeypatch.setenv(compiling.CACHE, str(cache / "file" / "inside"))
    assert decided(MANY, lambda: 0.1, started(50, 0.06)).compiled


def test_the_cache_outlives_a_restart_unless_the_user_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiling.use_cache() == tmp_path
    monkeypatch.delenv(compiling.CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert compiling.use_cache() == Path("/somewhere/sana/compiled")


def test_a_user_without_a_home_has_a_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(compiling.CACHE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert compiling.use_cache() == Path(tempfile.gettempdir()) / "sana" / "compiled"


def test_what_lacks_a_compiler_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/clang++" if name == "clang++" else None)
    assert compiling.missing_compiler(torch.device("cpu")) is None
    monkeypatch.setattr("shutil.which", lambda _name: None)
    assert "C++ compiler" in (compiling.missing_compiler(torch.device("cpu")) or "")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "Triton" in (compiling.missing_compiler(torch.device("cuda")) or "")
    assert "mps" in (compiling.missing_compiler(torch.device("mps")) or "")


def test_kinds_differ_by_machine_and_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    kind = compiling.kind_of_micro_batch(cpu, {"batch": 32})
    assert kind == compiling.kind_of_micro_batch(cpu, {"batch": 32})
    assert kind != compiling.kind_of_micro_batch(cpu, {"batch": 64})
    monkeypatch.setattr("platform.node", lambda: "another")
    assert kind != compiling.kind_of_micro_batch(cpu, {"batch": 32})
