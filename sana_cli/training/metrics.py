"""What a run records of itself: losses by noise level, lines of metrics.jsonl, TensorBoard. It knows no model.

Shapes: n images.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sana_cli.errors import SanaError
from sana_cli.runtime import files

SIGMA_BINS = 10  # of equal width, from data (0) to noise (1)
METRICS = "metrics.jsonl"


class Losses:
    """Sums of losses, over all images and in each bin of sigma: float64, saved and resumed exactly."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.bin_sums = [0.0] * SIGMA_BINS
        self.bin_images = [0] * SIGMA_BINS
        self.other_sums = dict[str, float]()  # of what is minimised beside the loss, by name

    def add(
        self, losses: Iterable[float], sigmas: Iterable[float], others: Mapping[str, float] | None = None
    ) -> None:
        """Count images with their losses (n,) and noise levels (n,), and the means of what else is minimised."""
        before = self.images
        for loss, sigma in zip(losses, sigmas, strict=True):
            self.sum += loss
            bin_ = min(int(sigma * SIGMA_BINS), SIGMA_BINS - 1)
            self.bin_sums[bin_] += loss
            self.bin_images[bin_] += 1
        for name, mean in (others or {}).items():
            self.other_sums[name] = self.other_sums.get(name, 0.0) + mean * (self.images - before)

    @property
    def others(self) -> dict[str, float]:
        """Mean per image of what is minimised beside the loss."""
        return {name: total / self.images for name, total in self.other_sums.items()}

    @property
    def images(self) -> int:
        """How many images were counted."""
        return sum(self.bin_images)

    @property
    def mean(self) -> float:
        """Mean loss per image."""
        return self.sum / self.images

    def bins(self) -> dict[str, list[Any]]:
        """Mean loss (None without images) and images of each bin."""
        means = [
            total / count if count else None
            for total, count in zip(self.bin_sums, self.bin_images, strict=True)
        ]
        return {"loss": means, "images": list(self.bin_images)}

    def state(self) -> dict[str, Any]:
        """As JSON, which keeps every bit of a float."""
        state = dict(vars(self))
        if not self.other_sums:
            del state["other_sums"]
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Losses":
        """What `state` gave."""
        made = cls()
        vars(made).update(state)
        return made


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run repeats, and an incomplete last line."""
    if not path.is_file():
        return
    kept = [json.dumps(line) for line in read(path) if line["step"] <= step]
    with files.whole_file(path) as partial:
        files.write_text(partial, "".join(f"{line}\n" for line in kept))


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class Log:
    """The open metrics.jsonl of a run, and TensorBoard's event file if asked for."""

    def __init__(self, run: Path, step: int, tensorboard: bool) -> None:
        """Go on after `step`.

        Raises:
            SanaError: TensorBoard is asked for and not installed.
        """
        keep_until(run / METRICS, step)
        self._file = (run / METRICS).open("a", encoding="utf-8")
        self._board = _open_board(run, step) if tensorboard else None

    def write(self, line: Mapping[str, Any]) -> None:
        """Write a line and flush it."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _scalars(line):
                self._board.add_scalar(name, value, line["step"])
            self._board.flush()

    def picture(self, path: Path, step: int) -> None:
        """A grid, for TensorBoard."""
        if self._board is not None:
            import numpy as np
            from PIL import Image

            with Image.open(path) as image:
                self._board.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")
            self._board.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _scalars(line: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, int | float) and name != "step":
            yield name, value
        elif isinstance(value, Mapping):
            means: Sequence[float | None] = value["loss"]
            for bin_, mean in enumerate(means):
                if mean is not None:
                    yield f"{name}/{bin_ / SIGMA_BINS:.1f}-{(bin_ + 1) / SIGMA_BINS:.1f}", mean


def check_tensorboard() -> None:
    """Refuse `log.tensorboard` before a run begins.

    Raises:
        SanaError: TensorBoard is not installed.
    """
    if find_spec("tensorboard") is None:
        raise SanaError(
            "log.tensorboard: TensorBoard is not installed",
            "pip install 'sana-cli[tensorboard]', or set log.tensorboard=false: "
            "metrics.jsonl and report.html need nothing",
        )


def _open_board(run: Path, step: int) -> Any:
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
