"""Adapters that a command is told to put on a model: `FILE` or `FILE:SCALE`, or a run that trained some.

It knows no form of file (`adapters.py`) and no prompts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_cli.adapters import Change
from sana_cli.config.keys import Architecture
from sana_cli.errors import SanaError
from sana_cli.model import build
from sana_cli.runtime import files, hub
from sana_cli.weights import checkpoint
from sana_cli.weights.adapters import StoredAdapter, read_adapter, shapes_of


@dataclass(frozen=True)
class Worn:
    """An adapter, and how strongly it acts."""

    path: Path
    scale: float
    stored: StoredAdapter

    @property
    def changes(self) -> Mapping[str, Change]:
        """The changes of layers, by name, at this scale."""
        return {name: change.scaled(self.scale) for name, change in self.stored.layers.items()}

    @property
    def record(self) -> dict[str, Any]:
        """What a picture or a merged model remembers of it."""
        file = self.stored.path
        return {
            "name": hub.model_name(str(self.path)),
            "scale": self.scale,
            "sha256": files.sha256_file(file),
        }

    def note(self, base_sha256: str) -> str | None:
        """What a person should know of it: that it was trained on another model than the one with this hash."""
        own = self.stored.metadata.get("base_sha256")
        if own is None or own == base_sha256:
            return None
        return f"{self.path} was trained on another model, {self.stored.metadata.get('base', 'one of another name')}"


def read_worn(given: Sequence[str], model: Architecture) -> tuple[Worn, ...]:
    """The adapters that are given, found to fit a model.

    Raises:
        SanaError: one is missing, damaged, of another model, or its scale is no number.
    """
    shapes = shapes_of(build(model, seed=None))
    worn = []
    for text in given:
        path, scale = _path_and_scale(text)
        worn.append(Worn(path, scale, read_adapter(_file(path), shapes)))
    return tuple(worn)


def _path_and_scale(text: str) -> tuple[Path, float]:
    whole = Path(text).expanduser()
    head, colon, tail = text.rpartition(":")
    if whole.exists() or not colon or not head:
        return whole, 1.0
    try:
        scale = float(tail)
    except ValueError:
        return whole, 1.0
    if not math.isfinite(scale):
        raise SanaError(f"`adapter`: the scale of {text} is not a finite number", exit_code=2)
    return Path(head).expanduser(), scale


def _file(path: Path) -> Path:
    """The step folder of a run, or what is named."""
    if not path.exists():
        raise SanaError(
            f"`adapter`: no file or folder {path}",
            "give a .safetensors file, a folder that has one, or a run: FILE, or FILE:0.8 for 0.8 of its strength",
            exit_code=2,
        )
    if not (path / "checkpoints").is_dir():
        return path
    folder = checkpoint.find_checkpoint(path)
    if not checkpoint.has_adapters_alone(folder):
        raise SanaError(
            f"`adapter`: {path} is a run that trained all weights, not adapters",
            f"draw with it: sana sample --checkpoint {path}",
            exit_code=2,
        )
    return folder
