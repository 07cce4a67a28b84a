"""What a run measures of itself: losses between two lines of metrics, speed, waiting. It writes no file."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sana_cli.runtime.records import State
from sana_cli.training.metrics import Losses
from sana_cli.training.trainer import Step


class Progress:
    """Counts steps into lines of metrics. An unfinished line is saved with a checkpoint and resumed."""

    def __init__(self, images: int, saved: State | None = None) -> None:
        """Begin, or go on from a checkpoint's state. `images` is how many a step has."""
        self.images = images
        self.window = Losses() if saved is None else Losses.from_state(saved.window)
        self.last = {"lr": 0.0, "grad_norm": 0.0} | (saved.last if saved is not None else {})
        self.step: Step | None = None  # the latest of this process
        self.held_out_loss: float | None = None
        self.movement = dict[str, float]()  # of adapters, by kind of layer, at the latest line
        self.steps = 0  # of this process
        self.seconds = 0.0  # in its steps
        self._at_line = (0, 0.0, 0.0)  # steps, seconds, and seconds without data, at the line before
        self.data_wait = 0.0  # share of the time since the line before

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around an optimizer step."""
        clock = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - clock

    def count(self, step: Step) -> None:
        """Take an optimizer step into the next line."""
        self.step = step
        self.steps += 1
        self.window.add(step.losses.tolist(), step.sigma.tolist(), step.others)
        self.last = {"lr": step.lr, "grad_norm": step.grad_norm}

    @property
    def loss(self) -> float:
        """Mean loss of the latest step; NaN before the first."""
        return math.nan if self.step is None else self.step.loss

    @property
    def grad_norm(self) -> float:
        """Of the latest step; NaN before the first."""
        return math.nan if self.step is None else self.step.grad_norm

    @property
    def samples_per_second(self) -> float:
        """Over all steps of this process; 0 before the first."""
        return self.steps * self.images / self.seconds if self.seconds else 0.0

    def measure_wait(self, waited: float) -> None:
        """The share of the time since the last line without data; `waited` is in seconds since the start."""
        _, seconds, before = self._at_line
        since = self.seconds - seconds
        self.data_wait = (waited - before) / since if since else 0.0

    def line(self, step: int, held_out: Losses | None, waited: float, memory: int) -> dict[str, Any]:
        """A line of metrics.jsonl, after `step` steps; a new window begins."""
        line: dict[str, Any] = {
            "step": step,
            "loss": self.window.mean,
            **self.window.others,
            **self.last,
            "sigma_bins": self.window.bins(),
        }
        if held_out is not None:
            self.held_out_loss = held_out.mean
            line |= {"held_out_loss": held_out.mean, "held_out_sigma_bins": held_out.bins()}
        steps, seconds, _ = self._at_line
        since = self.seconds - seconds
        if since:
            line["samples_per_second"] = (self.steps - steps) * self.images / since
            line["data_wait"] = self.data_wait
            line["memory_bytes"] = memory
        self.window, self._at_line = Losses(), (self.steps, self.seconds, waited)
        return line
