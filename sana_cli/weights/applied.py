"""Adapters that a command puts on a model: given as `FILE` or `FILE:SCALE`, or as a run that trained some.

It knows no form of file (`adapters.py`) and no prompts.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sana_cli.adapters import Change
from sana_cli.choices import Weights
from sana_cli.config.keys import Architecture, TextConfig
from sana_cli.errors import SanaError
from sana_cli.model import build
from sana_cli.runtime import files, hub
from sana_cli.weights import checkpoint
from sana_cli.weights.adapters import StoredAdapter, read_adapter, shapes_of


@dataclass(frozen=True)
class Applied:
    """An adapter, and how strongly it acts."""

    path: Path
    scale: float
    stored: StoredAdapter

    @property
    def changes(self) -> Mapping[str, Change]:
        """The changes of layers, by name, at this scale."""
        if self.scale == 0:  # a DoRA would keep its norms
            return {}
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

    def notes(self, base_sha256: str, text: TextConfig | None = None) -> list[str]:
        """What a person should know of it.

        Args:
            base_sha256: of the model that it is put on; "" where the adapter does not record its own.
            text: how prompts will be encoded; None: they will not.
        """
        found, own = list(self.stored.notes), self.stored.metadata
        if own.get("base_sha256", base_sha256) != base_sha256:
            found.append(f"was trained on another model, {own.get('base', 'one of another name')}")
        with suppress(ValueError, RecursionError):  # of an untrusted file
            asked = json.loads(own.get(checkpoint.TEXT_SETTINGS, "null"))
            if text is not None and isinstance(asked, dict):
                asked = {"layer": None} | asked  # what older ones do not say
                odd = [
                    key for key in checkpoint.TEXT_KEYS if key in asked and asked[key] != getattr(text, key)
                ]
                if odd:
                    found.append(
                        f"was trained with another {', '.join(f'text.{key}' for key in odd)}; a run of adapters is "
                        "drawn from as it was trained with `checkpoint` RUN"
                    )
        return [f"{self.path} {note}" for note in found]

    @property
    def records_base(self) -> bool:
        """Whether it says which model it is for."""
        return "base_sha256" in self.stored.metadata


def notes_on(
    applied: Sequence[Applied], base_sha256: Callable[[], str], text: TextConfig | None = None
) -> list[str]:
    """`Applied.notes` of each; the model's hash, which takes seconds, is asked for only where it matters."""
    base = base_sha256() if any(one.records_base for one in applied) else ""
    return [note for one in applied for note in one.notes(base, text)]


def read_applied(given: Sequence[str], model: Architecture, weights: Weights = "ema") -> tuple[Applied, ...]:
    """The adapters that are given, found to fit a model; of runs and step folders, these weights.

    Raises:
        SanaError: one is missing, damaged, of another model, or its scale is no number.
    """
    shapes = shapes_of(build(model, seed=None))
    applied = []
    for text in given:
        path, scale = _path_and_scale(text)
        place = _place(path)
        stored = read_adapter(place, shapes)
        if weights == "raw" and place.is_dir() and checkpoint.has_adapters_alone(place):
            stored = replace(
                stored,
                path=place / checkpoint.RAW_WEIGHTS,
                layers=checkpoint.own_adapters(place, model, weights),
            )
        applied.append(Applied(path, scale, stored))
    return tuple(applied)


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


def _place(path: Path) -> Path:
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
