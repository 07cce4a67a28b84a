"""The console of a long command: the curve, and the lines of a log."""

import math
import time

import pytest

from sana_cli import console


def test_the_curve_is_logarithmic_and_as_wide_as_it_may_be() -> None:
    assert console.curve([math.exp(-x) for x in range(8)]) == "█▇▆▅▄▃▂▁"
    assert len(console.curve([1.0 / (x + 1) for x in range(1000)])) == console.CURVE_WIDTH
    assert console.curve([1.0]) == ""
    assert set(console.curve([2.0, 2.0, 2.0])) == {"▁"}


def test_lines_of_a_log_grow_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, notes = iter(range(10**6)), list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(console, "note", notes.append)
    console._watch_plain(range(1, 20001), lambda n: console.Line("train", n, 20000, f"loss {n}"))
    assert notes[0].startswith("train 10/20000")
    assert notes[-1].startswith("train 20000/20000")
    assert 200 < len(notes) < 600  # every ten seconds at first, then every fiftieth of the time so far
